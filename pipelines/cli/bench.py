"""`diffattn bench`: its arguments; `diffattn.pipelines.bench` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffattn._checks import number, whole

from ..errors import UserError
from ..run.request import check_option, option
from . import options
from .say import say

if TYPE_CHECKING:
    from ..bench.rows import Record

EXAMPLES = options.examples(
    'bench --grid 21x30x52 --attn "gna window=7,15,15" --attn vmoba --output now.json',
    "bench --model Wan-AI/Wan2.1-T2V-1.3B --attn radial --backward --dtype bfloat16",
    "bench --compare before.json now.json --fail-above 10",
    "bench --compare before.json --output now.json",
)

_DTYPES = ("float32", "bfloat16", "float16")
_MEASURING = "Measuring"
_COMPARING = "Comparing"
_SLOWER = 1

# What remains of the options where an earlier file says what to measure.
_WITH_OLD = (
    "new", "compare", "fail_above", "relative", "output", "as_json", "device", "minutes", "rounds",
    "no_memory_check",
)  # fmt: skip
_WITH_BOTH = ("new", "compare", "fail_above", "relative", "as_json")


def bench(
    context: typer.Context,
    new: Annotated[
        Path | None,
        typer.Argument(
            metavar="[NEW.json]", help="With --compare: the new file (default: measure now)."
        ),
    ] = None,
    attn: Annotated[
        list[str] | None,
        typer.Option(
            "--attn",
            "--method",
            metavar="METHOD",
            help='Method, also with parameters: "gna window=7,15,15"; may be repeated; `all` for'
            " every method (default: radial).",
            rich_help_panel=options.ATTENTION,
        ),
    ] = None,
    attn_arg: options.AttnArg = None,
    attn_config: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON file with a method and its parameters; may be repeated.",
            rich_help_panel=options.ATTENTION,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Shapes of a model: hub id of a well-known model, or a pipeline's folder.",
            rich_help_panel=options.SIZE,
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Latent frames x height x width in tokens; text tokens as 21x30x52+256; may be"
            " repeated.",
            rich_help_panel=options.SIZE,
        ),
    ] = None,
    reference: options.References = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Frames = None,
    text: Annotated[
        int | None,
        typer.Option(
            help="Text tokens in the model's sequence (default: the model's).",
            rich_help_panel=options.SIZE,
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="With --grid (default: 12).", rich_help_panel=options.SIZE)
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="With --grid (default: 128).", rich_help_panel=options.SIZE)
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Samples in a call.", rich_help_panel=options.SIZE)
    ] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(_DTYPES)} (default: float32 on the CPU, bfloat16 elsewhere).",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Time gradients, too.", rich_help_panel=_MEASURING)
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, .. (default: the accelerator, if any).",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    minutes: Annotated[
        float,
        typer.Option(
            help="Time for everything; what takes longer is refused.", rich_help_panel=_MEASURING
        ),
    ] = 5.0,
    rounds: Annotated[
        int, typer.Option(help="The most rounds of a shape.", rich_help_panel=_MEASURING)
    ] = 15,
    no_memory_check: options.NoMemoryCheck = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file of the result; overwritten.")
    ] = None,
    as_json: options.AsJson = False,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OLD.json",
            help="File of an earlier run: compare NEW.json, or measure the same cases now.",
            rich_help_panel=_COMPARING,
        ),
    ] = None,
    relative: Annotated[
        bool,
        typer.Option(
            "--relative",
            help="Compare times over dense attention's: other load on the machine counts less.",
            rich_help_panel=_COMPARING,
        ),
    ] = False,
    fail_above: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT",
            help="Exit with 1 if a case is slower by more than this, and by more than noise.",
            rich_help_panel=_COMPARING,
        ),
    ] = None,
) -> None:
    """Time attention of your own shapes: methods beside the device's best dense attention."""
    for name, value, allowed in (
        ("heads", heads, whole(1)), ("head_dim", head_dim, whole(1)), ("batch", batch, whole(1)),
        ("rounds", rounds, whole(3)), ("minutes", minutes, number(above=0)),
        ("height", height, whole(1)), ("width", width, whole(1)),
        ("num_frames", num_frames, whole(1)), ("text", text, whole(0)),
        ("fail_above", fail_above, number(at_least=0)),
    ):  # fmt: skip
        if value is not None:
            check_option(name, value, allowed)
    _check_comparing(context, new, compare)
    from ..bench.comparing import check_device
    from ..bench.comparing import compare as put_beside
    from ..bench.rows import read_record
    from ..bench.session import Budget, Settings, groups_again, groups_of, run_groups
    from ..bench.tables import comparison_lines, record_lines
    from ..run.loading import choose_device
    from ..run.machine import describe_device

    old = None if compare is None else read_record(compare)
    budget = Budget(minutes, rounds, not no_memory_check)

    def show(record: Record) -> None:
        if as_json:
            _say_json([row.to_dict() for row in record.rows])
            return
        for line in record_lines(record):
            say(line)

    if new is not None:
        record = read_record(new)
    else:
        if old is not None:
            device = device or str(old.device.get("type"))
            check_device(old, describe_device(str(choose_device(device))))
            groups = groups_again(old.rows)
        else:
            from .grid_text import read_grid, with_references

            sizes = {"height": height, "width": width, "num_frames": num_frames, "text": text}
            if reference and not grid:
                raise UserError("--reference needs --grid, among whose tokens it stands")
            grids = (read_grid(text) for text in grid or ())
            groups = groups_of(
                Settings(
                    methods=tuple(attn or ()),
                    arguments=tuple(attn_arg or ()),
                    configs=tuple(attn_config or ()),
                    grids=tuple(with_references(one, tuple(reference or ())) for one in grids),
                    model=model,
                    sizes={name: value for name, value in sizes.items() if value is not None},
                    heads=heads,
                    head_dim=head_dim,
                    batch=batch,
                    dtype=_dtype(dtype, device),
                    backward=backward,
                )
            )
        record = run_groups(groups, device, budget, output, _tell, show)
    if old is None:
        show(record)
        return
    comparison = put_beside(old, record, relative)
    if as_json:
        _say_json(
            [
                {
                    "case": change.new.to_dict(),
                    "old": change.spreads[0].median,
                    "new": change.spreads[1].median,
                    "ratio": change.ratio,
                    "noise": change.noise,
                    "verdict": change.verdict,
                }
                for change in comparison.changes
            ]
        )
    else:
        for line in comparison_lines(comparison, fail_above):
            say(line)
    if fail_above is not None and any(x.fails(fail_above) for x in comparison.changes):
        raise typer.Exit(_SLOWER)


def _check_comparing(context: typer.Context, new: Path | None, compare: Path | None) -> None:
    """Refuse options that an earlier file decides."""
    if compare is None:
        if new is not None:
            raise UserError(f"{new} is given without --compare OLD.json")
        for name in ("fail_above", "relative"):
            if name in options.written_options(context):
                raise UserError(f"{option(name)} needs --compare OLD.json")
        return
    allowed = _WITH_OLD if new is None else _WITH_BOTH
    others = [n for n in options.written_options(context) if n not in allowed]
    if others:
        names = ", ".join(option(name) for name in others)
        what = "the old file says what to measure" if new is None else "nothing is measured"
        raise UserError(f"{names} cannot be given with --compare: {what}")


def _dtype(dtype: str | None, device: str | None) -> str:
    if dtype is None:
        from ..run.loading import choose_device

        return "float32" if choose_device(device).type == "cpu" else "bfloat16"
    from diffattn._checks import choice

    check_option("dtype", dtype, choice(_DTYPES))
    return dtype


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _say_json(content: object) -> None:
    import json

    say(json.dumps(content, indent=1, allow_nan=False))
