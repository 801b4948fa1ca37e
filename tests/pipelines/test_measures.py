"""Measures of clips: against other implementations, and what they say where they cannot be had."""

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch

from diffattn.pipelines.compare import by_packages, measures
from diffattn.pipelines.compare.clip import Clip
from diffattn.pipelines.compare.measures import (
    BY_NAME,
    MEASURES,
    choose_measures,
    frozen,
    motion,
    take,
)
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.run.compare import MS_SSIM_SIDE, ms_ssim
from diffattn.samples.moving_shapes.captions import Scene
from diffattn.samples.moving_shapes.clips import render_clips

SCENE = Scene("red", "circle", "right", "blue")


def smooth(count: int = 2, height: int = 250, width: int = 300) -> np.ndarray:
    random = np.random.default_rng(0)
    noise = random.integers(0, 255, (count, height, width, 3), dtype=np.uint8)
    return np.stack([cv2.GaussianBlur(frame, (21, 21), 5) for frame in noise])


def noisy(frames: np.ndarray, amount: int) -> np.ndarray:
    random = np.random.default_rng(1)
    noise = random.integers(-amount, amount + 1, frames.shape)
    return np.clip(frames.astype(int) + noise, 0, 255).astype(np.uint8)


def clip(frames: np.ndarray, **rest: object) -> Clip:
    return Clip(frames, 16.0, SCENE.caption, **rest)  # type: ignore[arg-type]


def test_ms_ssim_equals_that_of_torchmetrics() -> None:
    name = "torchmetrics.functional.image"
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("torchmetrics is not installed")
    theirs = importlib.import_module(name).multiscale_structural_similarity_index_measure
    frames = smooth(1, 181, 190)
    other = noisy(frames, 40)
    pair = (torch.from_numpy(x).permute(0, 3, 1, 2).double() for x in (other, frames))
    assert ms_ssim(frames, other) == pytest.approx(float(theirs(*pair, data_range=255.0)), abs=2e-3)
    assert ms_ssim(frames, frames) == 1.0
    assert ms_ssim(frames, other) < 0.97


def test_ms_ssim_says_that_frames_are_too_small() -> None:
    small = smooth(1, MS_SSIM_SIDE - 1, 300)
    reason = BY_NAME["ms_ssim"].of(clip(small), clip(small))
    assert reason == f"too small: MS-SSIM needs {MS_SSIM_SIDE} pixels a side"
    with pytest.raises(ValueError, match=f"MS-SSIM needs {MS_SSIM_SIDE} pixels a side"):
        ms_ssim(small, small)


@pytest.mark.parametrize("name", ["psnr", "ssim", "ms_ssim", "flip", "vmaf", "xpsnr"])
def test_more_noise_is_farther_from_dense(name: str) -> None:
    measure = BY_NAME[name]
    if measure.package is not None and not by_packages.installed(measure.package):
        pytest.skip(f"{measure.package} is not installed")
    dense = clip(smooth())
    values = [measure.of(dense, clip(noisy(dense.frames, amount))) for amount in (0, 8, 40)]
    assert all(isinstance(value, float) for value in values), values
    assert values == sorted(values, reverse=measure.better == "high")
    assert values[1] != values[2]


def test_vmaf_and_xpsnr_refuse_small_frames() -> None:
    small = clip(smooth(2, 96, 96))
    for name in ("vmaf", "xpsnr"):
        assert BY_NAME[name].of(small, small) == "too small: needs 240 pixels a side"


def test_motion_and_freezing() -> None:
    grey = np.zeros((4, 8, 8, 3), np.uint8)
    grey[1:] = 10
    grey[3] = 30
    assert motion(clip(grey)) == pytest.approx((10 + 0 + 20) / 3, rel=1e-5)
    assert frozen(clip(grey)) == pytest.approx(1 / 3)
    half = grey // 2
    ratio = BY_NAME["motion_ratio"]
    assert ratio.of(clip(grey), clip(half)) == pytest.approx(0.5, rel=1e-5)
    still = np.zeros_like(grey)
    assert ratio.of(clip(still), clip(still)) == 1.0
    assert ratio.of(clip(still), clip(grey)) == math.inf


def test_a_picture_has_no_motion() -> None:
    picture = Clip(smooth(1), None, "a cat")
    for name in ("motion", "motion_ratio", "frozen"):
        assert BY_NAME[name].of(picture, picture) == "a picture"


def test_prompts_are_checked_on_the_bundled_model_alone() -> None:
    pixels = render_clips([SCENE], 3)[0].permute(1, 2, 3, 0)
    frames = ((pixels + 1) * 127.5).round().to(torch.uint8).numpy()
    right, whole = BY_NAME["right"], BY_NAME["all_right"]
    own = clip(frames, bundled=True)
    assert (right.of(own, own), whole.of(own, own)) == (1.0, 1.0)
    other = Clip(frames, 16.0, "a red circle moving left on a blue background", bundled=True)
    assert (right.of(other, other), whole.of(other, other)) == (0.75, 0.0)
    assert right.of(own, clip(frames)) == "no checker for this model"
    strange = Clip(frames, 16.0, "a cat", bundled=True)
    assert right.of(strange, strange) == "no checker for this prompt"


def test_sound_against_the_definition() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 2, 500)).astype(np.float32)
    frames = smooth(2, 16, 16)
    error = BY_NAME["audio_nmse"].of(clip(frames, audio=a), clip(frames, audio=b))
    assert error == pytest.approx(((a - b) ** 2).sum() / (a**2).sum(), rel=1e-5)
    assert BY_NAME["audio_nmse"].of(clip(frames), clip(frames)) == "no sound"
    silent = np.zeros((1, 9), np.float32)
    assert BY_NAME["audio_nmse"].of(clip(frames, audio=silent), clip(frames, audio=silent)) == 0


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_packages, "installed", lambda package: False)
    frames = clip(smooth(2, 32, 32))
    assert BY_NAME["flip"].of(frames, frames) == "not installed: flip-evaluator"
    assert BY_NAME["lpips"].of(frames, frames) == "not installed: lpips"
    with pytest.raises(UserError) as error:
        choose_measures(["psnr", "flip"])
    assert str(error.value) == (
        "--measure flip needs the package flip-evaluator: pip install 'diffattn[compare]'"
    )
    with pytest.raises(UserError, match=r"--measure lpips needs the package lpips: pip install"):
        choose_measures(["lpips"])


def test_lpips_gets_frames_between_minus_one_and_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Network:
        def eval(self) -> "Network":
            return self

        def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            seen.append(a)
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    module = types.SimpleNamespace(LPIPS=lambda net, verbose: Network(), __spec__=object())
    monkeypatch.setitem(sys.modules, "lpips", module)  # type: ignore[arg-type]
    by_packages.lpips_network.cache_clear()
    dense, other = (clip(np.full((9, 4, 4, 3), level, np.uint8)) for level in (0, 255))
    assert by_packages.lpips(dense, other) == pytest.approx(2.0)
    assert [tuple(x.shape) for x in seen] == [(8, 3, 4, 4), (1, 3, 4, 4)]
    by_packages.lpips_network.cache_clear()


class _Package(types.ModuleType):
    """A stand-in for lpips, whose network takes AlexNet's weights as the package does."""

    def __init__(self, tried: list[str]) -> None:
        super().__init__("lpips")
        self.tried = tried

    def LPIPS(self, net: str, verbose: bool) -> torch.nn.Module:
        self.tried.append(net)
        return torch.nn.ParameterDict(
            torch.hub.load_state_dict_from_url(by_packages.ALEXNET, progress=False)
        )


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> _Package:
    """lpips beside a folder of torch.hub without files, and no network."""

    def no_route(*arguments: object, **options: object) -> None:
        raise URLError("no route to host")

    found = _Package([])
    monkeypatch.setitem(sys.modules, "lpips", found)
    monkeypatch.setattr(by_packages, "installed", lambda package: True)
    monkeypatch.setattr(measures, "_failed", {})
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_route)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    by_packages.lpips_network.cache_clear()
    return found


def test_weights_of_lpips_that_are_missing(package: _Package, tmp_path: Path) -> None:
    frames = clip(smooth(2, 32, 32))
    want = (
        "LPIPS lacks AlexNet's weights (<urlopen error no route to host>): download"
        " https://download.pytorch.org/models/alexnet-owt-7be5be79.pth and put the file at"
        f" {tmp_path}/hub/checkpoints/alexnet-owt-7be5be79.pth"
    )
    for _ in range(2):
        assert BY_NAME["lpips"].of(frames, frames) == want
    # Each attempt to download may take long.
    assert package.tried == ["alex"]
    # Who asks for the measure is told before anything is rendered.
    with pytest.raises(UserError) as error:
        choose_measures(["psnr", "lpips"])
    assert str(error.value) == f"--measure lpips: {want}"


def test_weights_of_lpips_that_are_damaged(package: _Package, tmp_path: Path) -> None:
    path = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    frames = clip(smooth(2, 32, 32))
    reason = BY_NAME["lpips"].of(frames, frames)
    assert isinstance(reason, str)
    assert reason.startswith(f"LPIPS cannot read AlexNet's weights {path} (")
    assert reason.endswith("): remove the file")


def test_an_lpips_that_cannot_be_imported(
    package: _Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lpips.py").write_text("raise RuntimeError('torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "lpips")
    monkeypatch.syspath_prepend(tmp_path)
    frames = clip(smooth(2, 32, 32))
    assert BY_NAME["lpips"].of(frames, frames) == (
        "the package lpips cannot be imported (torchvision::nms does not exist): it needs a"
        f" torchvision made for this torch, {torch.__version__}"
    )


def test_lpips_needs_frames_that_alexnet_can_take() -> None:
    small = clip(smooth(2, 30, 64))
    assert BY_NAME["lpips"].lacking(small) == "too small: LPIPS needs 31 pixels a side"
    assert BY_NAME["lpips"].lacking(clip(smooth(2, 31, 31))) is None


def test_the_package_lpips_with_weights_made_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real package, where it is installed, against the same written out with torch alone."""
    pytest.importorskip("lpips", exc_type=ImportError)
    from torchvision.models import AlexNet_Weights, alexnet

    assert AlexNet_Weights.IMAGENET1K_V1.url == by_packages.ALEXNET
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(measures, "_failed", {})
    by_packages.lpips_network.cache_clear()
    torch.manual_seed(0)
    trunk = alexnet(weights=None)
    path = tmp_path / "checkpoints" / by_packages.ALEXNET.rpartition("/")[2]
    path.parent.mkdir()
    torch.save(trunk.state_dict(), path)

    dense, side = clip(smooth(9, 31, 40)), by_packages.LPIPS_SIDE
    assert dense.frames.shape[1] == side
    other = clip(noisy(dense.frames, 40))
    found = BY_NAME["lpips"].of(dense, other)
    heads = by_packages.lpips_network().state_dict()
    shift, scale = (heads[f"scaling_layer.{name}"] for name in ("shift", "scale"))
    total = torch.zeros(len(dense.frames), dtype=torch.float64)
    a, b = (
        (torch.from_numpy(x.frames).permute(0, 3, 1, 2).float() / 127.5 - 1 - shift) / scale
        for x in (dense, other)
    )
    for index, layer in enumerate(trunk.features[:12]):
        a, b = layer(a), layer(b)
        if index in (1, 4, 7, 9, 11):
            unit = [x / x.square().sum(1, keepdim=True).sqrt() for x in (a, b)]
            weight = heads[f"lin{(1, 4, 7, 9, 11).index(index)}.model.1.weight"]
            squares = torch.nn.functional.conv2d((unit[0] - unit[1]).nan_to_num() ** 2, weight)
            total += squares.mean((1, 2, 3)).double()
    assert found == pytest.approx(float(total.detach().mean()), rel=1e-4)
    assert BY_NAME["lpips"].of(dense, dense) == 0
    by_packages.lpips_network.cache_clear()


def test_an_ffmpeg_without_the_filters(
    monkeypatch: pytest.MonkeyPatch, fake_ffmpeg: Callable[[str], None]
) -> None:
    monkeypatch.setattr(measures, "_failed", {})
    fake_ffmpeg('echo "No such filter: libvmaf" >&2; exit 1')
    frames = clip(smooth())
    reason = BY_NAME["vmaf"].of(frames, frames)
    assert isinstance(reason, str)
    assert reason.startswith("ffmpeg cannot compute libvmaf (")


def test_measures_that_are_not_known() -> None:
    with pytest.raises(UserError, match=r"--measure 'psnrr' is not known; did you mean 'psnr'\?"):
        choose_measures(["psnrr"])
    with pytest.raises(UserError, match="--measure ssim is given twice"):
        choose_measures(["ssim", "ssim"])
    assert choose_measures([]) == [measure.name for measure in MEASURES]
    assert choose_measures(["ssim", "psnr"]) == ["psnr", "ssim"]


def test_the_dense_model_is_not_compared_with_itself() -> None:
    frames = clip(smooth(2, 32, 32))
    values = take(["psnr", "motion"], frames, frames, is_dense=True)
    assert values["psnr"] == ""
    assert isinstance(values["motion"], float)
