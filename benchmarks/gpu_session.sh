#!/usr/bin/env bash
# Everything that is still to be found out on a GPU, in 9 minutes of a lent machine; docs/gpu.md.
#
#     bash benchmarks/gpu_session.sh REVISION
#
# Results go to $OUT, at most 8 files. Wheels in .whl/ are installed first. Work whose times do not
# count (the training of the bundled model, renders, tests) runs beside itself, and apart from work
# whose times count.
revision=$1
gpu_run="python3 benchmarks/gpu_run run --revision $revision"
work=/tmp/session
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1
mkdir -p $work/more
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir .whl/*.whl
python3 -c "
import sys; sys.path.insert(0, 'benchmarks')
from pathlib import Path
from gpu_run.import_folder import make
make(Path('$work/site'), Path('.').resolve())"
export PYTHONPATH=$work/site:$PWD/benchmarks

# The bundled VAE is kept: only the denoiser and the text encoder are trained.
python3 -P -c "
import torch
from diffusers import AutoencoderKLWan
from diffattn.samples.moving_shapes import MODEL_DIR
vae = AutoencoderKLWan.from_pretrained(MODEL_DIR, subfolder='vae', local_files_only=True)
torch.save(vae.float().state_dict(), '$work/vae.pt')"

train() {
    local resume=""
    [ -f $work/checkpoint.pt ] && resume=--resume
    setsid python3 -P -m diffattn.samples.moving_shapes.train --device cuda --minutes 3 \
        --work $work --export $work/more/model --checkpoint-every 50 \
        --stages 4x192x4000,8x128x2000,16x96x6000 $resume >>$work/more/train.log 2>&1 &
    trainer=$!
}
keep() { tar czf "$OUT/more.tgz" -C $work more; }

train
$gpu_run --minutes 2 --only 'compile:*' 'smoke:*'
pkill -TERM -f moving_shapes.train
wait $trainer
$gpu_run --minutes 4 --continue --only 'tune:forward*' 'tune:gather*' 'rates:wan-1.3b*' \
    'rates:cogvideox*' selecting 'building:*' 'rates:hunyuan*' methods
timeout 40 python3 -P benchmarks/model_step.py --layers 4 --rounds 1 --output $work/more/model_step.json \
    --methods radial gna attention-tile sol block-topk vsa sla vmoba lvsa 2>&1 | grep '^{'
timeout 30 python3 -P benchmarks/lora_gpu.py --layers 4 --steps 2 --methods radial gna sol \
    --output $work/more/lora_gpu.json 2>&1 | grep '^{'
keep
train
renders=()
for methods in "dense radial clear gna freeswim agent" "linfusion vmoba sol block-topk svg2 lvsa" \
    "attention-tile sla sla2 vsa by-head auto policy"; do
    # shellcheck disable=SC2086
    timeout 90 python3 -P benchmarks/render_on_gpu.py --methods $methods \
        >$work/more/render-${#renders[@]}.log 2>&1 &
    renders+=($!)
done
$gpu_run --minutes 1.7 --continue --only 'tests:*'
wait "${renders[@]}" $trainer
keep
grep -h '^{' $work/more/render-*.log | cut -c1-200
tail -c 300 $work/more/train.log
