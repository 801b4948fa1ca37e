"""The ``diffattn`` command: arguments only; the work is in the other modules."""

import sys
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from . import options
from .errors import RunInterruptedError, UserError, one_line
from .lora_cli import app as lora_app
from .request import BUNDLED_MODEL, CONTEXT_PARALLEL, DTYPES, OFFLOADS, option

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(lora_app, name="lora")

# What `generate` takes by itself; its other options are settings of a request.
_NOT_OF_A_REQUEST = (
    "prompt",
    "output",
    "attn",
    "attn_arg",
    "attn_config",
    "prompts_file",
    "record",
)
# The same of `plan`, whose other options are arguments of `diffattn.plan`,
_NOT_OF_A_PLAN = ("method", "arg", "model", "grid", "as_json")
# and of `mask`, whose other options are of a run and of a call in it.
_NOT_OF_A_RUN = ("grid", "method", "arg", "output", "query", "prompt")
_OF_A_CALL = ("step", "layer", "head")

_BAD_INPUT = 2
_INTERRUPTED = 130


def _show_version(asked: bool) -> None:
    if asked:
        from .sidecar import versions

        _say(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit()


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 2."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    command = typer.main.get_command(app)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(command, list(arguments))


def _run(command: Any, arguments: list[str]) -> int:
    try:
        return command.main(arguments, prog_name="diffattn", standalone_mode=False) or 0
    except UserError as error:
        return _fail(str(error), _BAD_INPUT)
    except RunInterruptedError as interruption:
        return _fail(str(interruption), _INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(str(RunInterruptedError([])), _INTERRUPTED)
    except Exception as error:
        # Typer carries click's usage errors, under another module in each of its versions.
        if not hasattr(error, "format_message"):
            raise
        return _fail(one_line(error.format_message()), _BAD_INPUT)


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions."),
    ] = False,
) -> None:
    """Sparse attention for diffusers video pipelines."""


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="File (.mp4, .gif, .png for a folder of frames) or folder (ends with /); it is "
            "overwritten. Without it, a new name made of the prompt.",
        ),
    ] = None,
    model: options.Model = None,
    attn: options.Attn = None,
    attn_arg: options.AttnArg = None,
    attn_config: options.AttnConfig = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Count = None,
    steps: options.Count = None,
    guidance_scale: options.Number = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same for every prompt (default: 0).")
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames a second of the file (default: the model's or 16)."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="|".join(DTYPES), help="Default: float32 on the CPU, else bfloat16."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, .. (default: the accelerator, if any).")
    ] = None,
    offload: Annotated[
        str | None, typer.Option(metavar="|".join(OFFLOADS), help="What waits in main memory.")
    ] = None,
    context_parallel: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(CONTEXT_PARALLEL),
            help="How the processes that torchrun started share the work.",
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(help="LoRA file or folder; one of `lora train` brings its method."),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file with one prompt a line; one video each.")
    ] = None,
    compare: Annotated[
        bool | None,
        typer.Option("--compare/--no-compare", help="Also render dense, and show both."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--from", help="Repeat the run of a JSON sidecar; other options override it."),
    ] = None,
) -> None:
    """Render a video for a prompt."""
    from .attention_settings import MethodOptions
    from .job import Source, plan_job

    job = plan_job(
        Source(prompt, prompts_file, record),
        MethodOptions(attn, tuple(attn_arg or ()), attn_config),
        options.given_options(context, _NOT_OF_A_REQUEST),
        output,
        _say,
    )

    from .generate import generate as make_videos

    make_videos(job, _say, _warn)


@app.command()
def upscale(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the video or the picture shows.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="As in generate; it is overwritten."),
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(help="Video or picture to start from (default: one of the model's own size)."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Folder or hub id of a pipeline of Wan or LTX-Video, or for pictures of Stable "
            "Diffusion 1.5, 2.1, XL or Flux."
        ),
    ] = BUNDLED_MODEL,
    preset: Annotated[str | None, typer.Option(metavar="1080p|1440p|2160p")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels (default: twice as many).")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels (default: twice as many).")] = None,
    num_frames: options.Count = None,
    base_height: Annotated[int | None, typer.Option(help="The model's own size.")] = None,
    base_width: Annotated[int | None, typer.Option(help="The model's own size.")] = None,
    base_steps: options.Count = None,
    steps: Annotated[
        int | None, typer.Option(help="At the large size, before strength (default: the model's).")
    ] = None,
    strength: Annotated[float, typer.Option(help="How much is made anew, up to 1.")] = 0.7,
    strengths: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y..",
            help="Pictures: how much is made anew at each size (default: 0.4,0.3,0.2,0.1, or 0.7).",
        ),
    ] = None,
    attn: Annotated[
        str | None, typer.Option(help="Pictures: attention method (default: the untouched model).")
    ] = None,
    attn_arg: options.AttnArg = None,
    attn_config: options.AttnConfig = None,
    cache_steps: Annotated[
        str,
        typer.Option(
            metavar="N|none",
            help="All tokens guide every so many steps, and the others reuse it; 1: they guide in "
            "each; none: in each, and without the prompt too, as in the public code's slower mode.",
        ),
    ] = "2",
    store: Annotated[
        str, typer.Option(metavar="device|cpu|pinned", help="Where guidance waits to be reused.")
    ] = "device",
    interpolation: Annotated[
        str, typer.Option(metavar="nearest|bilinear|bicubic|lanczos")
    ] = "bilinear",
    flow_shift: Annotated[float, typer.Option(help="Noise schedule at the large size.")] = 9.0,
    negative_prompt: Annotated[
        str | None, typer.Option(help="At the large size (default: the model's, or the paper's).")
    ] = None,
    guidance_scale: options.Number = None,
    seed: Annotated[int, typer.Option()] = 0,
    fps: Annotated[
        float | None, typer.Option(help="Of the file (default: the input's or the model's).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="|".join(DTYPES))] = None,
    device: Annotated[str | None, typer.Option(help="As in generate.")] = None,
    offload: Annotated[str, typer.Option(metavar="|".join(OFFLOADS))] = "none",
) -> None:
    """Make a video or a picture beyond the model's own size, from a prompt or from a smaller one.

    Videos are made by FreeSwim, pictures by doubling them and making their details anew.
    """
    from .attention_settings import MethodOptions
    from .request import Request
    from .upscale import VIDEO_OPTIONS, UpscaleSettings, check_counts, read_cache_steps
    from .upscale import upscale as make_large
    from .upscale_picture import (
        PICTURE_OPTIONS,
        PictureSettings,
        makes_pictures,
        picture_attention,
        read_strengths,
        upscale_picture,
    )

    check_counts(base_height=base_height, base_width=base_width, base_steps=base_steps, steps=steps)
    request = Request(
        prompt,
        model=model,
        height=base_height,
        width=base_width,
        num_frames=num_frames,
        steps=base_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        fps=fps,
        dtype=dtype,
        device=device,
        offload=offload,
    )
    if makes_pictures(model):
        _refuse_others(context, PICTURE_OPTIONS, "pictures")
        method = MethodOptions(attn, tuple(attn_arg or ()), attn_config)
        picture = PictureSettings(
            input=input,
            height=height,
            width=width,
            steps=steps,
            strengths=read_strengths(strengths),
            negative_prompt=negative_prompt,
            attention=picture_attention(method),
            attn_config=attn_config,
        )
        upscale_picture(request, picture, output, _say)
        return
    _refuse_others(context, VIDEO_OPTIONS, "videos")
    settings = UpscaleSettings(
        input=input,
        preset=preset,
        height=height,
        width=width,
        steps=steps,
        strength=strength,
        cache_steps=read_cache_steps(cache_steps),
        store=store,
        interpolation=interpolation,
        flow_shift=flow_shift,
        negative_prompt=negative_prompt,
    )
    make_large(request, settings, output, _say, _warn)


def _refuse_others(context: typer.Context, known: Collection[str], kind: str) -> None:
    """Refuse options that were written, but have no effect on what the model makes."""
    others = [name for name in options.written_options(context) if name not in known]
    if not others:
        return
    hint = ""
    if kind == "videos":
        hint = ", whose two paths are FreeSwim's"
    elif "strength" in others:
        hint = "; for pictures it is --strengths"
    raise UserError(
        f"{', '.join(map(option, others))} cannot be given with a model of {kind}{hint}"
    )


@app.command()
def methods() -> None:
    """List the attention methods with their parameters."""
    from .listing import method_lines

    for line in method_lines():
        _say(line)


@app.command()
def models() -> None:
    """List the model families."""
    from .listing import model_lines

    for line in model_lines():
        _say(line)


@app.command()
def plan(
    context: typer.Context,
    method: options.MethodName = "radial",
    arg: options.MethodArg = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id of a well-known model, or a pipeline's folder.")
    ] = None,
    grid: options.Grid = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Count = None,
    text: Annotated[
        int | None, typer.Option(help="Text tokens in the model's sequence (default: the model's).")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="With --grid (default: 1).")] = None,
    head_dim: Annotated[int | None, typer.Option(help="With --grid (default: 128).")] = None,
    layers: Annotated[int | None, typer.Option(help="With --grid (default: 1).")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Say what a method costs on a model or grid, without running or downloading anything."""
    from .plan_table import PlanOptions, plan_lines

    numbers = options.given_options(context, _NOT_OF_A_PLAN)
    for line in plan_lines(PlanOptions(method, tuple(arg or ()), model, grid, numbers), as_json):
        _say(line)


@app.command()
def mask(
    context: typer.Context,
    grid: options.Grid = None,
    method: options.MethodName = "radial",
    arg: options.MethodArg = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="PNG file; it is overwritten."),
    ] = Path("mask.png"),
    query: Annotated[
        str | None,
        typer.Option(
            metavar="T,Y,X", help="Whose neighbourhood is shown (default: the middle token)."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="For a method that selects by content: the run to look into, no --grid."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"Of the run (default: the bundled {BUNDLED_MODEL}).")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Of the run, pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the run, pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Of the run.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the run (default: 0).")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the run (default: the model's).")] = None,
    step: Annotated[
        int | None, typer.Option(help="Which one to look into, from 1 (default: the middle).")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="From 0 (default: 0).")] = None,
    head: Annotated[int | None, typer.Option(help="From 0 (default: 0).")] = None,
) -> None:
    """Draw which tokens attend to which under a method, on a grid or in a run."""
    from .mask_picture import RunOptions, draw_mask

    settings = options.given_options(context, _NOT_OF_A_RUN)
    call = {name: settings.pop(name) for name in _OF_A_CALL if name in settings}
    run = RunOptions(prompt, settings, call)
    for line in draw_mask(method, tuple(arg or ()), grid, query, output, run):
        _say(line)


def _say(line: str) -> None:
    typer.echo(line)


def _warn(line: str) -> None:
    typer.echo(f"warning: {line}", err=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a library's warning as one line: where in its code it was raised helps no user."""
    _warn(one_line(message))


def _fail(message: str, code: int) -> int:
    typer.echo(f"diffattn: {message}", err=True)
    return code
