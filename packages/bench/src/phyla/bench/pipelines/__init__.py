"""The pipelines: every file of this folder is one. Add a file, and `phyla run` has it.

A pipeline is a module with one function `run(context: Context) -> PipelineResult`; the first line of its docstring is its description.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


def names() -> tuple[str, ...]:
    """Return the names of all pipelines, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> Callable[..., Any]:
    """Import a pipeline and return its `run`."""
    module = importlib.import_module(f"{__name__}.{name}")
    run: Callable[..., Any] = module.run
    return run
