"""Which systems the installed phyla packages hold.

A package tells by shipping `_systems.py` with `SYSTEMS`, one `(system, entry points, paper)` a row. The file is loaded by
its path, so that listing never imports a package (or torch).
"""

import importlib.metadata
import importlib.util
import pkgutil
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import phyla


@dataclass(frozen=True)
class System:
    """One system: its package (import name after `phyla.`), the names to import, and the paper it comes from."""

    package: str
    name: str
    entry_points: tuple[str, ...]
    paper: str


def packages() -> tuple[str, ...]:
    """Return the import names (after `phyla.`) of all phyla packages that can be imported here, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(phyla.__path__) if module.ispkg))


def distribution(package: str) -> str:
    """Return the distribution that carries `phyla.<package>`."""
    return "phyla-" + package.replace("_", "-")


def version(package: str) -> str:
    """Return the installed version of a phyla package, or "unknown"."""
    try:
        return importlib.metadata.version(distribution(package))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def systems() -> tuple[System, ...]:
    """Return the systems of all installed packages, by package.

    Raises:
        ValueError: if a package's `_systems.py` does not hold a well-formed SYSTEMS.
    """
    found: list[System] = []
    for package in packages():
        spec = PathFinder.find_spec(f"phyla.{package}", phyla.__path__)
        for folder in (spec.submodule_search_locations if spec else None) or ():
            path = Path(folder, "_systems.py")
            if path.is_file():
                found += _read(package, path)
    return tuple(found)


def _read(package: str, path: Path) -> list[System]:
    spec = importlib.util.spec_from_file_location(f"phyla_systems_{package}", path)
    assert spec is not None  # a .py file always has one, and a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = getattr(module, "SYSTEMS", None)
    if not isinstance(rows, tuple) or not all(isinstance(row, tuple) and [type(cell) for cell in row] == [str] * 3 for row in rows):
        raise ValueError(f"phyla.{package}._systems: expected SYSTEMS, a tuple of (system, entry points, paper), got {rows!r:.60}")
    return [System(package, name, tuple(point.strip() for point in points.split(",")), paper) for name, points, paper in rows]
