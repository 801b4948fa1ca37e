"""Packages that some options need."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from .findings import Check, Finding

# Of people who change diffattn.
_NOT_FOR_USERS = ("dev",)


def check_extras() -> Iterator[Finding]:
    """The packages of the extras that the package names."""
    from packaging.requirements import Requirement

    try:
        about = metadata.metadata("diffattn")
    except metadata.PackageNotFoundError:
        return  # reported among the versions
    needed = [Requirement(line) for line in metadata.requires("diffattn") or ()]
    for extra in about.get_all("Provides-Extra") or ():
        if extra in _NOT_FOR_USERS:
            continue
        for one in needed:
            if one.marker is None or not one.marker.evaluate({"extra": extra}):
                continue
            if one.marker.evaluate({"extra": ""}):
                continue  # needed without the extra, too
            yield _examined(one.name, one.specifier, extra)


def _examined(name: str, specifier: object, extra: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    install = f"pip install 'diffattn[{extra}]'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("ok", name, f"not installed ({install} brings it)")
    if not SpecifierSet(str(specifier)).contains(version, prereleases=True):
        said = f"{version} is installed, but {specifier} is needed"
        return Finding("warning", name, said, install)
    return Finding("ok", name, version)


CHECKS: tuple[Check, ...] = (check_extras,)
