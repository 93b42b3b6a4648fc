"""What a device needs: the runtime imports neither torch nor any other package of this project."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import moebius_runtime
from moebius_runtime._moved import MOVED

RUNTIMES = Path(__file__).parents[2] / "runtimes"
PACKAGE = RUNTIMES / "moebius_runtime"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = sorted(
    ".".join(path.relative_to(RUNTIMES).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES
)
FORBIDDEN = {
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxsim",
    "onnx_ir",
    "polygraphy",
    "scipy",
    "skimage",
    "cv2",
    "pickle",
    "moebius",
    "moebius_export",
    "moebius_bench",
    "moebius_calibration",
}
# Beside the standard library. Anything else only where it is named here.
ALLOWED = {"numpy", "PIL", "moebius_runtime"}
ONLY_IN = {
    "onnxruntime": {"backends/ort.py"},
    "onnxruntime_ep_openvino": {"backends/ort_plugin.py"},
    "onnxruntime_ep_webgpu": {"backends/ort_plugin.py"},
    "openvino": {"backends/openvino.py"},
    "cuda": {"backends/cuda.py"},
    "tensorrt": {"backends/trt_library.py"},
    "tensorrt_rtx": {"backends/trt_library.py"},
    "typer": {"cli.py", "console.py", "commands/options.py"},
    "rich": {"console.py", "commands/run.py", "commands/stages.py"},
    "pydantic": {"bundle/json_files.py"},  # which the runtime itself does not import
    "pillow_heif": {"images/pictures.py"},  # optional: HEIC
    "huggingface_hub": {"bundle/hub.py", "files/hub_library.py", "files/hub_answers.py"},  # optional: bundles of a hub
}


# Files that import modules by name, from tables that hold modules of the runtime alone: the next test.
BY_NAME = {PACKAGE / "__init__.py", PACKAGE / "moved.py"}


def imports(path: Path) -> set[str]:
    """Top-level names of every import of a file, also those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if path not in BY_NAME:
                assert name not in ("__import__", "import_module", "exec", "eval"), f"{path}:{node.lineno}: {name}"
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_import_is_one_that_a_device_has(path):
    relative = path.relative_to(PACKAGE).as_posix()
    allowed = ALLOWED | set(sys.stdlib_module_names) | {name for name, where in ONLY_IN.items() if relative in where}
    assert imports(path) - allowed == set()


def test_what_is_imported_by_name_is_the_runtime_itself():
    for name in (*moebius_runtime._HOMES, *MOVED.values()):
        assert name in MODULES


def test_the_scan_sees_all_kinds_of_imports(tmp_path):
    """So that the test above can fail."""
    path = tmp_path / "x.py"
    path.write_text("def f():\n    import torch.nn as nn\n    from moebius.network.config import preset\n")
    assert imports(path) == {"torch", "moebius"}
    for text in ("__import__('torch')", "import importlib; importlib.import_module('torch')", "from . import x"):
        path.write_text(text)
        with pytest.raises(AssertionError):
            imports(path)


HOOK = """
import sys

class Hook:
    tried = []

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            self.tried.append(name)
            raise ModuleNotFoundError(f"{name} is forbidden here", name=name)

sys.meta_path.insert(0, Hook())
"""


def python(code: str, *arguments: object, bare: bool = False) -> str:
    """Runs code in a process of its own; `bare` forbids it what a device does not have."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    environment["PYTHONPATH"] = str(RUNTIMES)
    if bare:
        code = f"FORBIDDEN = {FORBIDDEN - {'pickle'}!r}\n{HOOK}{code}"  # NumPy itself imports pickle: it gets its own
    command = [sys.executable, "-B", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


INPAINT = """
import importlib
for name in sys.argv[4:]:
    importlib.import_module(name)
from PIL import Image
from moebius_runtime import InpaintPipeline
pipeline = InpaintPipeline.from_bundle(sys.argv[1], threads=1)
result = pipeline(Image.open(sys.argv[2]), Image.open(sys.argv[3]), steps=2)
print(result.size, Hook.tried)
"""


def test_a_picture_is_filled_where_the_rest_cannot_be_imported(toy_bundle, tmp_path):
    Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(tmp_path / "a.png")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (40, 40, 80, 80))
    mask.save(tmp_path / "m.png")
    out = python(INPAINT, toy_bundle.path, tmp_path / "a.png", tmp_path / "m.png", *MODULES, bare=True)
    assert out == "(128, 128) []\n"


def test_the_hook_forbids():
    """So that the test above can fail."""
    code = "try:\n    import torch.nn\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert python(code, bare=True) == "torch is forbidden here\n"


LOADED = """
import json, sys
before = set(sys.modules)
import moebius_runtime
from moebius_runtime._moved import MOVED
if sys.argv[1:]:
    from moebius_runtime import *
    assert set(sys.argv[1:]) <= set(dir())
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_the_package_alone_loads_only_the_standard_library():
    loaded = set(json.loads(python(LOADED)))
    assert loaded - sys.stdlib_module_names == {"moebius_runtime"}


def test_the_public_names_load_neither_a_runtime_nor_a_command_line():
    loaded = set(json.loads(python(LOADED, *moebius_runtime.__all__)))
    assert loaded & ({*ONLY_IN, "click"} | FORBIDDEN - {"pickle"}) == set()
    assert {"moebius_runtime", "numpy", "PIL"} <= loaded


SLOW_TO_IMPORT = {"importlib.metadata", "importlib.abc", "email", "http", "asyncio", "unittest", "pydantic"}
"""What no import of the runtime loads. Everything that is loaded takes time at every start."""

STARTS = {
    "import moebius_runtime": ({"moebius_runtime"}, {"moebius_runtime", "_moved", "moved"}),
    "from moebius_runtime import Bundle; Bundle.open(sys.argv[1])": (
        {"moebius_runtime", "numpy"},
        {"moebius_runtime", "_moved", "moved", "errors", "bundle", "files", "sampling"},
    ),
    "from moebius_runtime import InpaintPipeline": (
        {"moebius_runtime", "numpy", "PIL"},
        {
            *("moebius_runtime", "_moved", "moved", "errors", "bundle", "files", "sampling"),
            *(
                "backends",
                "decoding",
                "filling",
                "graph_choice",
                "hardware",
                "images",
                "kernels",
                "pipeline",
                "regions",
                "settings",
            ),
        },
    ),
    "import moebius_runtime.cli": (
        {
            "moebius_runtime",
            "typer",
            "rich",
            "click",
            "shellingham",
            "typing_extensions",
            "annotated_doc",
            "_black_version",
        },
        {"moebius_runtime", "_moved", "moved", "errors", "cli", "commands", "console", "settings"},
    ),
    "import moebius_serve.cli": (
        {
            "moebius_runtime",
            "moebius_serve",
            "typer",
            "rich",
            "click",
            "shellingham",
            "typing_extensions",
            "annotated_doc",
        },
        {"moebius_runtime", "_moved", "moved", "errors", "cli", "commands", "console", "settings"},
    ),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_start_loads_no_more_than_its_list(start, toy_bundle):
    """Packages, and parts of this one. `moebius_serve.cli --help` loads no FastAPI, and no command's help NumPy."""
    packages, parts = STARTS[start]
    code = f"import json, sys\nbefore = set(sys.modules)\n{start}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    loaded = set(json.loads(python(code, toy_bundle.path)))
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names <= packages
    assert {"".join(name.split(".")[1:2]) or name for name in loaded if name.startswith("moebius_runtime")} <= parts
    if "cli" not in start:
        assert not loaded & SLOW_TO_IMPORT


def test_an_unknown_name_of_the_package_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = moebius_runtime.Pipeline


STATE = """
import json, os, signal, sys, threading, warnings
import numpy, PIL.Image, PIL.ImageFile, PIL.ImageCms, pydantic, rich, typer
PIL.Image.init()  # Pillow registers its own formats when it needs them

def state():
    return json.dumps([
        PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, sorted(PIL.Image.OPEN), sorted(PIL.Image.SAVE),
        numpy.geterr(), repr(numpy.get_printoptions()), repr(numpy.random.get_state()[1][:3]),
        repr(warnings.filters), repr(signal.getsignal(signal.SIGINT)), repr(signal.getsignal(signal.SIGTERM)),
        sorted(os.environ), os.getcwd(), sys.path, sys.getrecursionlimit(), repr(sys.excepthook),
        threading.active_count(),
    ])

before = state()
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
assert state() == before, (before, state())
"""


def test_imports_have_no_effects():
    """Every module: nothing printed, no thread, no global of Pillow, NumPy, warnings or signals touched."""
    assert python(STATE, *MODULES) == ""


RUN_STATE = STATE.replace(
    "import importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n",
    """
from PIL import Image
from moebius_runtime import InpaintPipeline, load_picture, save_picture
before = state()
pipeline = InpaintPipeline.from_bundle(sys.argv[1], threads=1)
image = Image.effect_noise((128, 128), 50).convert("RGB")
mask = Image.new("L", (128, 128))
mask.paste(255, (40, 40, 80, 80))
pipeline(image, mask, steps=2)
image.save(sys.argv[2])
save_picture(load_picture(sys.argv[2]), sys.argv[2])
""",
)


def test_running_has_no_effects_either(toy_bundle, tmp_path):
    assert python(RUN_STATE, toy_bundle.path, tmp_path / "a.png") == ""


README = Path(__file__).parents[2] / "README.md"
EXAMPLE = """
import sys
exec(compile(sys.stdin.read(), "README.md", "exec"))
print(type(filled).__name__, filled.size)
"""


def test_the_python_example_of_the_readme_runs(toy_bundle, tmp_path):
    """With the toy bundle for `moebius-bundle`, and generated pictures for those that it names."""
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "moebius-bundle").symlink_to(toy_bundle.path)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (40, 40, 80, 80))
    for name in re.findall(r'"([\w-]+\.(?:jpg|png))"', code):
        picture = mask if "mask" in name else Image.linear_gradient("L").resize((128, 128)).convert("RGB")
        picture.save(tmp_path / name)
    command = [sys.executable, "-c", EXAMPLE]
    environment = {**os.environ, "PYTHONPATH": str(RUNTIMES)}
    done = subprocess.run(command, input=code, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("Image (128, 128)\n", 0), done.stderr
