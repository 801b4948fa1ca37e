"""The method of docs/your-own-method.md, and packages of plug-ins as pip would install them."""

from pathlib import Path

_DOC = Path(__file__).parents[1] / "docs" / "your-own-method.md"


def source() -> str:
    """The module that the document writes: the first of its blocks of Python."""
    return _DOC.read_text("utf-8").partition("```python\n")[2].partition("```")[0]


def sources_under(heading: str) -> list[str]:
    """The blocks of Python in the section of the document that has a heading."""
    section = _DOC.read_text("utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [block.partition("```")[0] for block in section.split("```python\n")[1:]]


def install(folder: Path, name: str, code: str, entry_points: dict[str, str]) -> None:
    """Put a distribution of one module into a folder that is, or will be, on `sys.path`.

    Args:
        folder: of installed packages; it is made if there is none.
        name: of the module and of the distribution, whose version is 0.3.
        code: of the module.
        entry_points: of the group `diffattn.methods`: what each name stands for.
    """
    about = folder / f"{name}-0.3.dist-info"
    about.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.3\n")
    lines = [f"{entry} = {value}" for entry, value in entry_points.items()]
    (about / "entry_points.txt").write_text("\n".join(["[diffattn.methods]", *lines, ""]))


def install_strip(folder: Path) -> None:
    """Install the method of the document."""
    install(folder, "strip_attn", source(), {"strip": "strip_attn:StripAttn"})
