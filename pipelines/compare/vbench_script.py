"""Scores videos by VBench; the Python of VBench's environment runs this file, without diffattn.

    python -I vbench_script.py request.json

The request names "videos", a folder of nothing else, the "prompts" by file, the "dimension", and
"output", a folder that gets scores.json: the score of each file, 0 to 1.
"""

import json
import sys
from pathlib import Path

import torch
import vbench


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    output, dimension = Path(request["output"]), request["dimension"]
    info = Path(vbench.__file__).with_name("VBench_full_info.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = vbench.VBench(device, str(info), str(output))
    bench.evaluate(
        videos_path=request["videos"],
        name="videos",
        prompt_list=request["prompts"],
        dimension_list=[dimension],
        mode="custom_input",
    )
    results = json.loads((output / "videos_eval_results.json").read_text("utf-8"))
    _, each = results[dimension]
    # VBench divides its mean of the imaging quality by 100, but not what it is the mean of.
    whole = 100 if dimension == "imaging_quality" else 1
    scores = {Path(one["video_path"]).name: float(one["video_results"]) / whole for one in each}
    (output / "scores.json").write_text(json.dumps(scores), "utf-8")


if __name__ == "__main__":
    main()
