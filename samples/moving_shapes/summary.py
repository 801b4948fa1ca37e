"""What an adaptation has done: a table of the figures, and a judgement that hides no loss."""

from __future__ import annotations

from .adaptation import Figures

_COLUMNS = ("dense", "sparse", "sparse + LoRA")


def summary(dense: Figures, sparse: Figures, adapted: Figures, videos: int) -> str:
    """The figures of a model in three states, how each figure is measured, and `judgement`.

    Args:
        dense: the figures of the dense model.
        sparse: those of the sparse model before its training.
        adapted: those of the sparse model with its LoRA.
        videos: number of generated videos.
    """
    states = (dense, sparse, adapted)
    rows = [
        ("loss", [f"{state.loss:.4f}" for state in states]),
        ("distance to dense", [f"{state.distance:.4f}" for state in states]),
        ("PSNR to dense, dB", [_decibels(state.psnr_db) for state in states]),
        *(
            (f"{name} right", [_share(state.accuracy[name], videos) for state in states])
            for name in dense.accuracy
        ),
    ]
    lines = [_line("", _COLUMNS), *(_line(name, cells) for name, cells in rows)]
    about = [
        "loss: flow matching on held-out clips at fixed noise. distance: mean squared difference",
        "to the dense model's predictions for the same noisy clips. PSNR: of videos of held-out",
        "captions to the dense model's from the same noise. right: such videos, as a program reads",
        f"them; with {videos} videos, one more or less is chance.",
    ]
    return "\n".join([*lines, "", *about, "", *judgement(dense, sparse, adapted, videos)])


def judgement(dense: Figures, sparse: Figures, adapted: Figures, videos: int) -> list[str]:
    """Sentences on whether a LoRA is of use.

    A LoRA is of use if nothing is worse with the LoRA than without it, and something is better.
    Attributes of videos that are still wrong more often than in the dense model's are named in any
    case.

    Args:
        dense, sparse, adapted, videos: as for `summary`.
    """
    worse = _changes(adapted, sparse, videos)
    better = _changes(sparse, adapted, videos)
    if worse:
        said = ["The LoRA is NOT of use, worse than without it:", *(f"- {one}" for one in worse)]
    elif better:
        said = ["Nothing that is measured here is worse with the LoRA than without it."]
    else:
        said = ["The LoRA changes nothing that is measured here."]
    if sparse.distance > 0:
        left = adapted.distance / sparse.distance
        said.append(f"Of the distance that the mask makes, {left:.0%} is left.")
    wrong = [
        f"{name} is right in {_share(adapted.accuracy[name], videos)} videos, in the dense model's"
        f" {_share(right, videos)}"
        for name, right in dense.accuracy.items()
        if adapted.accuracy[name] < right
    ]
    if wrong:
        said += ["Not restored:", *(f"- {one}" for one in wrong)]
    return said


def _changes(now: Figures, before: Figures, videos: int) -> list[str]:
    """The figures that are worse in the state `now` than in the state `before`."""
    found = []
    for name in ("loss", "distance"):
        old, new = getattr(before, name), getattr(now, name)
        if new > old:
            found.append(f"{name} {new:.4f}, was {old:.4f}")
    if now.psnr_db is not None and before.psnr_db is not None and now.psnr_db < before.psnr_db:
        found.append(f"PSNR to dense {now.psnr_db:.1f} dB, was {before.psnr_db:.1f} dB")
    found += [
        f"{name} right in {_share(now.accuracy[name], videos)} videos, was {_share(right, videos)}"
        for name, right in before.accuracy.items()
        if now.accuracy[name] < right
    ]
    return found


def _share(right: float, videos: int) -> str:
    return f"{round(right * videos)} of {videos}"


def _decibels(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}"


def _line(name: str, cells: tuple[str, ...] | list[str]) -> str:
    return f"{name:<24}" + "".join(f"{cell:>15}" for cell in cells)
