"""Tiny random pipelines, built offline, in folders as ``save_pretrained`` writes them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import torch

from diffattn.pipelines import cli

SIZE = ["--height", "32", "--width", "48", "--num-frames", "5", "--steps", "2"]
"""Options that keep a run of :func:`tiny_wan` short."""


@dataclass(frozen=True)
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; fails the test if there is more, or less, than that."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("diffattn: ")
        return lines[0].removeprefix("diffattn: ")


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other are most of the work of models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def diffattn(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def generate(
    diffattn: Callable[..., Result], tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run ``diffattn generate`` on the tiny model, inside ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        return diffattn("generate", "--model", tiny_wan, *SIZE, *arguments)

    return run


@pytest.fixture
def record(tmp_path: Path) -> Callable[[str], dict]:
    """Read a JSON file of ``tmp_path``; out.json is also the record of the one out.mp4, .gif, .."""

    def read(name: str) -> dict:
        path = tmp_path / name
        if not path.exists():
            (path,) = tmp_path.glob(f"{path.stem}.*.json")
        return json.loads(path.read_text("utf-8"))

    return read


@pytest.fixture
def fake_ffmpeg(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Put a shell script in the place of ffmpeg, which is "$real" in the script."""
    real = imageio_ffmpeg.get_ffmpeg_exe()
    path = tmp_path_factory.mktemp("program") / "ffmpeg"

    def use(script: str) -> None:
        path.write_text(f"#!/bin/sh\nreal='{real}'\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return use


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WanPipeline of random weights: 8 pixels and 4 frames a latent, 16 pixels a token."""
    import tiny_complete

    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny_complete.wan(transformer=_transformer()).save_pretrained(folder)
    # Wan's 512 text tokens are most of the work at this size.
    (folder / "generation.json").write_text(json.dumps({"fps": 8, "max_sequence_length": 32}))
    return folder


@pytest.fixture(scope="session")
def tiny_wan_two_experts(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path) -> Path:
    """The same with Wan 2.2's second expert."""
    from diffusers import WanPipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-wan-two"
    other = _transformer(seed=1)
    pipe = WanPipeline.from_pretrained(tiny_wan, transformer_2=other, boundary_ratio=0.5)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wan_every_frame(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path) -> Path:
    """The same with a VAE that compresses space only, as the bundled model's."""
    from diffusers import WanPipeline
    from tiny_wan import vae

    folder = tmp_path_factory.mktemp("models") / "tiny-wan-every-frame"
    of_frames = vae(temperal_downsample=[False] * 3, scale_factor_temporal=1)
    pipe = WanPipeline.from_pretrained(tiny_wan, vae=of_frames)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wan_few_words(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path) -> Path:
    """The same with a tokenizer that knows three words."""
    from diffusers import WanPipeline
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-wan-few-words"
    words = ["<pad>", "<unk>", "a", "red", "circle"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    pipe = WanPipeline(
        **WanPipeline.from_pretrained(tiny_wan).components | {"tokenizer": tokenizer}
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wan_image(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path) -> Path:
    """A WanImageToVideoPipeline, which cannot be called without an image."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-wan-image"
    pipe = WanImageToVideoPipeline(**WanPipeline.from_pretrained(tiny_wan).components)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_ltx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LTXPipeline of random weights: 32 pixels and 8 frames a token, as the published ones."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )
    from transformers import ByT5Tokenizer

    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("models") / "tiny-ltx"
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(4, 4, 4),
        down_block_types=("LTXVideoDownBlock3D",) * 3,
        decoder_block_out_channels=(4, 4, 4),
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True),
        decoder_spatio_temporal_scaling=(True, True, True),
        decoder_inject_noise=(False, False, False, False),
        upsample_residual=(False, False, False),
        upsample_factor=(1, 1, 1),
        timestep_conditioning=True,
        scaling_factor=0.5,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2)
    pipe = LTXPipeline(
        tokenizer=ByT5Tokenizer(),
        text_encoder=_text_encoder(),
        vae=vae,
        # As the published model's.
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
    )
    pipe.save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps({"max_sequence_length": 16}))
    return folder


@pytest.fixture(scope="session")
def tiny_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file for :func:`tiny_wan` that changes the picture."""
    return _save_lora(tmp_path_factory.mktemp("loras"), _transformer())


@pytest.fixture(scope="session")
def wide_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file for a model of the same layers, twice as wide."""
    return _save_lora(tmp_path_factory.mktemp("loras"), _transformer(num_attention_heads=4))


def _text_encoder() -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def _transformer(seed: int = 0, **changes: Any) -> torch.nn.Module:
    from tiny_wan import transformer

    return transformer(seed, **{"attention_head_dim": 16, "num_layers": 2, **changes})


def _save_lora(folder: Path, transformer: torch.nn.Module) -> Path:
    from diffusers import WanPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(2)
    targets = ["to_q", "to_k", "to_v"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    WanPipeline.save_lora_weights(
        folder, transformer_lora_layers=get_peft_model_state_dict(transformer)
    )
    return folder / "pytorch_lora_weights.safetensors"
