"""Every denoiser of diffusers is served, refused with a reason, or looks at no picture."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import diffusers
import pytest
from diffusers.models import transformers, unets

from diffattn.models import _WITHOUT_GRID, FAMILIES, family_of

# Models without self-attention over a picture or a video, and what they make instead.
WITHOUT_PICTURES = {
    "AceStepTransformer1DModel": "music",
    "LongCatAudioDiTTransformer": "sound",
    "MiniMaxMusic3RVQDepthDecoder": "music",
    "MiniMaxMusic3Transformer1DModel": "music",
    "PriorTransformer": "embeddings of images",
    "RFD4ProteinaTransformer": "proteins",
    "StableAudio3DiTModel": "sound",
    "StableAudioDiTModel": "sound",
    "T5FilmDecoder": "spectrograms of music",
    "UNet1DModel": "trajectories and sound",
}


def denoisers() -> dict[str, type]:
    """The classes of models that diffusers defines among its transformers and U-Nets."""
    found: dict[str, type] = {}
    for package in (transformers, unets):
        for module in pkgutil.iter_modules(package.__path__):
            home = importlib.import_module(f"{package.__name__}.{module.name}")
            found |= {
                name: cls
                for name, cls in vars(home).items()
                if inspect.isclass(cls)
                and cls.__module__ == home.__name__
                and issubclass(cls, diffusers.ModelMixin)
            }
    return found


def _pinned() -> str:
    constraints = Path(__file__).parents[2] / "constraints.txt"
    pin = re.search(r"^diffusers==(\S+)", constraints.read_text("utf-8"), flags=re.MULTILINE)
    assert pin is not None
    return pin[1]


of_the_pinned_release = pytest.mark.skipif(
    diffusers.__version__ != _pinned(), reason=f"not diffusers {_pinned()}, which CI has"
)
SERVED = {name for family in FAMILIES for name in family.model_classes}


@of_the_pinned_release
def test_every_class_is_served_or_has_a_reason() -> None:
    new = sorted(denoisers().keys() - SERVED - _WITHOUT_GRID.keys() - WITHOUT_PICTURES.keys())
    assert not new, (
        f"{', '.join(new)}: docs/adding-a-family.md says how to serve a class; a class that cannot"
        f" be served needs a reason in _WITHOUT_GRID, or a line in WITHOUT_PICTURES"
    )


@of_the_pinned_release
def test_lists_name_classes_that_exist() -> None:
    assert denoisers().keys() >= SERVED | _WITHOUT_GRID.keys() | WITHOUT_PICTURES.keys()


def test_no_class_is_in_two_lists() -> None:
    assert not SERVED & _WITHOUT_GRID.keys()
    assert not SERVED & WITHOUT_PICTURES.keys()
    assert not _WITHOUT_GRID.keys() & WITHOUT_PICTURES.keys()


@pytest.mark.parametrize("name", _WITHOUT_GRID)
def test_a_refused_class_says_its_reason(name: str) -> None:
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    with pytest.raises(ValueError, match=f"{name} has no .*: {re.escape(_WITHOUT_GRID[name])}"):
        family_of(cls.__new__(cls))


@pytest.mark.parametrize("name", WITHOUT_PICTURES)
def test_a_class_without_pictures_is_not_known(name: str) -> None:
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    with pytest.raises(ValueError, match=f"does not know the attention sites of {name}; it knows"):
        family_of(cls.__new__(cls))
