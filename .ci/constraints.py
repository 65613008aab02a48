"""Writes constraints.txt to the standard output: `make constraints`.

A pin for every distribution in the closure of saepatch, its `dev` and its `dashboard` extras, as installed in the
running environment. A pin whose own metadata asks for a newer Python than saepatch does gets that as a marker, so that
pip on an older Python chooses for itself instead of failing. Local version labels (`+cpu`) are dropped: they name a
build, and which build fits is the installing machine's affair.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

OWN = "saepatch"
EXTRAS = ("dev", "dashboard")
OLDEST = (3, 10)
PYTHONS = [(3, minor) for minor in range(10, 14)]


def wanted(requirement: Requirement, extras: frozenset[str]) -> bool:
    """Whether the requirement applies here under any of the extras (none counts as one)."""
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras})


def closure(name: str, extras: tuple[str, ...]) -> dict[str, Distribution]:
    """Every installed distribution that `name[extras]` needs, itself left out."""
    found: dict[str, Distribution] = {}
    done: set[tuple[str, frozenset[str]]] = set()
    todo = [(canonicalize_name(name), frozenset(extras))]
    while todo:
        item = todo.pop()
        if item in done:
            continue
        done.add(item)
        try:
            dist = distribution(item[0])
        except PackageNotFoundError:
            sys.exit(f"{item[0]} is needed but not installed: run `make setup` first")
        found[item[0]] = dist
        for line in dist.requires or []:
            requirement = Requirement(line)
            if wanted(requirement, item[1]):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    del found[canonicalize_name(name)]
    return found


def marker(dist: Distribution) -> str:
    """The marker of a pin: the oldest Python, of those supported, that the distribution itself allows."""
    allowed = SpecifierSet(dist.metadata["Requires-Python"] or "")
    # Requires-Python may name a patch release (>=3.11.3); the newest patch of a line decides for the line.
    oldest = next((python for python in PYTHONS if allowed.contains(f"{python[0]}.{python[1]}.99")), None)
    if oldest is None:
        sys.exit(f"{dist.name} {dist.version} runs on no Python that saepatch supports ({allowed})")
    return "" if oldest == OLDEST else f' ; python_version >= "{oldest[0]}.{oldest[1]}"'


def main() -> None:
    print("# What is tested. Written by `make constraints`; ranges for users stand in pyproject.toml.")
    print("# A pin that needs a newer Python than 3.10 says so: there pip picks the newest that fits.")
    print(f"# Made with Python {sys.version_info.major}.{sys.version_info.minor}.")
    for name, dist in sorted(closure(OWN, EXTRAS).items()):
        version = Version(dist.version).public
        # The marker platform of a compiled wheel plays no part here; only the Python version does.
        print(f"{re.sub(r'[-_.]+', '-', name)}=={version}{marker(dist)}")


if __name__ == "__main__":
    main()
