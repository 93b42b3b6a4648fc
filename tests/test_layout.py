"""The layout: which folder may import which, no circles, and old module paths that still import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {
    "moebius": ROOT,
    "moebius_runtime": ROOT / "runtimes",
    "moebius_serve": ROOT / "runtimes",
    "moebius_batch": ROOT / "runtimes",
    "moebius_export": ROOT / "export",
    "moebius_calibration": ROOT / "calibration",
    "moebius_bench": ROOT / "benchmarks",
}
# Which packages a package may import, beside itself.
BELOW = {
    "moebius_runtime": set(),
    "moebius_serve": {"moebius_runtime"},
    "moebius_batch": {"moebius_runtime"},
    "moebius": {"moebius_runtime"},
    "moebius_export": {"moebius", "moebius_runtime"},
    "moebius_calibration": {"moebius_export", "moebius", "moebius_runtime"},
    "moebius_bench": {"moebius_export", "moebius", "moebius_batch", "moebius_runtime"},
}
# Folders of the export, lowest first: a folder imports only folders before it in this list, or the package's own files.
EXPORT_ORDER = (
    *("pages", "graph", "network", "trajectories", "lowering", "rules", "precision", "onnx_export"),
    *("plugins", "trt", "web", "verify", "doctor", "publish", "commands"),
)
# Folders of the runtime, likewise. docs/development.md describes them.
RUNTIME_ORDER = (
    *("files", "sampling", "bundle", "hardware", "settings", "images", "regions", "kernels", "backends", "commands"),
)
PUBLIC_NAMES = json.loads((ROOT / "tests/golden/public_names_0_1.json").read_text())


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package, home in HOMES.items():
        for path in (home / package).rglob("*.py"):
            name = ".".join(path.relative_to(home).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Our modules that a file imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
    return found & known.keys()


def folder_of(module: str, known: dict[str, Path]) -> str:
    """What a module counts as: its folder, or, for a file directly in a package, the file itself."""
    package, *rest = module.split(".")
    if not rest:
        return f"{package}.__init__"
    is_folder = len(rest) > 1 or known[module].name == "__init__.py"
    return f"{package}.{rest[0]}" + ("/" if is_folder else "")


def arrows(known: dict[str, Path]) -> dict[str, set[str]]:
    """Which folders each folder imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, path in known.items():
        for other in imported(path, known):
            if (a := folder_of(module, known)) != (b := folder_of(other, known)):
                found[a].add(b)
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Folders that reach themselves."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return seen

    return sorted(one for one in graph if one in reach(one))


def test_no_circle():
    """A package's `__init__` gathers names from below: nothing inside the package imports it for them."""
    found = {
        one: {other for other in others if not other.endswith("__init__")} for one, others in arrows(MODULES).items()
    }
    assert circles(found) == []


def test_a_circle_would_be_found(tmp_path):
    """So that the test above can fail."""
    (tmp_path / "a.py").write_text("from p.b import x")
    (tmp_path / "b.py").write_text("def f():\n    import p.a")
    assert circles(arrows({"p.a": tmp_path / "a.py", "p.b": tmp_path / "b.py"})) == ["p.a", "p.b"]


@pytest.mark.parametrize("package", HOMES)
def test_packages_import_only_what_is_below_them(package):
    for module, path in MODULES.items():
        if module.split(".")[0] == package:
            others = {other.split(".")[0] for other in imported(path, MODULES)} - {package}
            assert others <= BELOW[package], module


@pytest.mark.parametrize(
    ("package", "order"),
    [("moebius_export", EXPORT_ORDER), ("moebius_runtime", RUNTIME_ORDER)],
    ids=["export", "runtime"],
)
def test_folders_import_only_what_is_below_them(package, order):
    prefix = f"{package}."
    inside = {
        one.removeprefix(prefix).strip("/"): {
            other.removeprefix(prefix).strip("/")
            for other in others
            if other.startswith(prefix) and other.endswith("/")
        }
        for one, others in arrows(MODULES).items()
        if one.startswith(prefix) and one.endswith("/")
    }
    assert set(inside) <= set(order)
    for folder, others in inside.items():
        assert others <= set(order[: order.index(folder)]), folder


OLD_NAMES = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
lost = []
for module, names in json.load(sys.stdin).items():
    found = importlib.import_module(module)
    lost += [f"{module}.{name}" for name in names if not hasattr(found, name)]
print(json.dumps(lost))
"""


def test_every_public_name_of_version_0_1_imports_from_its_old_path():
    """`CHANGELOG.md` lists the names that went for good; they are not in the golden file."""
    command = [sys.executable, "-c", OLD_NAMES]
    done = subprocess.run(command, input=json.dumps(PUBLIC_NAMES), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_an_old_path_gives_the_module_itself():
    import moebius_runtime.images.masks as new

    sys.modules.pop("moebius_runtime.masks", None)
    with pytest.warns(DeprecationWarning, match=r"moebius_runtime.masks has moved to moebius_runtime.images.masks"):
        old = import_module("moebius_runtime.masks")
    assert old is new
    assert new.__spec__.name == "moebius_runtime.images.masks"
