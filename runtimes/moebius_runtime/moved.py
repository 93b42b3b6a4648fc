"""Old module paths that still import: `import moebius_runtime.pictures` gives `moebius_runtime.images.pictures`.

Version 0.2 sorted the modules into folders. Each package lists its moved modules in `_moved.py`. Importing an old path
returns the module object of the new path, so that classes and pickles agree, and issues a `DeprecationWarning`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast


class MovedModules:
    """Imports modules of one package by their old paths. Python asks it only for names that no other finder knows.

    It is a finder and a loader of `importlib` by its methods alone: the base classes in `importlib.abc` take 10 ms to
    import, and every process that uses the runtime would pay for them.
    """

    def __init__(self, package: str, moved: Mapping[str, str]) -> None:
        """`moved`: old path, relative to `package` -> new path, absolute."""
        self._moved = {f"{package}.{old}": new for old, new in moved.items()}
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for an old path; None for everything else."""
        return ModuleSpec(fullname, cast(Any, self)) if fullname in self._moved else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Imports and returns the module of the new path."""
        new = self._moved[spec.name]
        warnings.warn(f"{spec.name} has moved to {new}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._specs[new] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Executes nothing; restores the spec of the new path."""
        module.__spec__ = self._specs.pop(module.__name__)


def keep_old_paths(package: str, moved: Mapping[str, str]) -> None:
    """Makes the old module paths of a package importable. A second call for the same package changes nothing."""
    finder = MovedModules(package, moved)
    if not any(isinstance(one, MovedModules) and one._moved == finder._moved for one in sys.meta_path):
        sys.meta_path.append(finder)
