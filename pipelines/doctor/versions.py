"""Versions of Python and of the packages that diffattn needs, and whether they can be imported."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec

from ..errors import one_line
from .findings import Check, Finding

# Modules whose name is not that of their distribution.
_MODULES = {"opencv-python": "cv2"}
# Packages that only some devices or commands need: without them a part of diffattn works.
_OF_A_PART = {"triton": "the kernels for GPUs; on the CPU nothing is missing"}


def check_python() -> Iterator[Finding]:
    """Python itself, against the range that the package names."""
    from packaging.specifiers import SpecifierSet

    here = platform.python_version()
    needed = _metadata()["Requires-Python"] if _is_installed() else None
    if needed and not SpecifierSet(needed).contains(here, prereleases=True):
        yield Finding("problem", "python", f"{here}, but {needed} is needed", "install a newer one")
    else:
        yield Finding("ok", "python", here)


def check_packages() -> Iterator[Finding]:
    """Every required package: its version against the range, and an import."""
    from packaging.requirements import Requirement

    if not _is_installed():
        yield Finding(
            "warning",
            "diffattn",
            "runs from a folder and is not installed: the supported versions are not known",
            "pip install --editable . in the checkout",
        )
        return
    yield Finding("ok", "diffattn", metadata.version("diffattn"))
    for line in metadata.requires("diffattn") or ():
        needed = Requirement(line)
        # Without an extra the marker of an optional package does not hold.
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            yield _examined(needed.name, str(needed.specifier))


def _examined(name: str, specifier: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    wanted = f"pip install --upgrade '{name}{specifier}'"
    module = _MODULES.get(name, name.replace("-", "_"))
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        # Distributions such as opencv-python-headless bring the same module.
        if find_spec(module) is None:
            return _failed(name, f"is not installed, but {specifier} is needed", wanted)
        version = ""
    if version and not SpecifierSet(specifier).contains(version, prereleases=True):
        return _failed(name, f"{version} is installed, but {specifier} is needed", wanted)
    try:
        import_module(module)
    except Exception as error:  # packages that do not fit together raise errors of all types
        said = f"{version} cannot be imported: {type(error).__name__}: {one_line(error)[:200]}"
        return _failed(name, said.strip(), f"pip install --force-reinstall '{name}{specifier}'")
    return Finding("ok", name, version or f"module {module} of another distribution")


def _failed(name: str, said: str, advice: str) -> Finding:
    if name in _OF_A_PART and not _has_gpu():
        return Finding("warning", name, f"{said} (for {_OF_A_PART[name]})", advice)
    return Finding("problem", name, said, advice)


def _has_gpu() -> bool:
    """Whether torch sees a device that needs Triton; False where torch itself is broken."""
    try:
        import torch

        return torch.cuda.is_available() or torch.xpu.is_available()
    except Exception:  # reported as a problem of torch
        return False


def _is_installed() -> bool:
    try:
        _metadata()
    except metadata.PackageNotFoundError:
        return False
    return True


def _metadata() -> metadata.PackageMetadata:
    return metadata.metadata("diffattn")


CHECKS: tuple[Check, ...] = (check_python, check_packages)
