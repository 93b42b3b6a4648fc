"""A toy bundle, made by the real manifest writer around functions small enough to write again in NumPy; the command."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moebius_runtime.bundle import manifest as schema
from moebius_runtime.bundle.check_values import check_inputs, make_check
from moebius_runtime.files import sha256_file

try:
    import onnx
except ImportError:
    onnx = None

RUNTIMES = Path(__file__).parents[2] / "runtimes"

SIDE, BLOCK, CHANNELS = 16, 8, 4
PIXELS = SIDE * BLOCK
SCALE = 0.13025
# What each graph says it takes and gives. "B" is the number of pictures.
INPUTS: dict[str, dict[str, tuple[str, list[Any]]]] = {
    "unet": {
        "sample": ("float32", ["B", 2 * CHANNELS + 1, SIDE, SIDE]),
        "timestep": ("int64", [1]),
        "guidance_scale": ("float32", [1]),
    },
    "unet_conditional": {"sample": ("float32", ["B", 2 * CHANNELS + 1, SIDE, SIDE]), "timestep": ("int64", [1])},
    "vae_encoder": {"image": ("float32", ["B", 3, PIXELS, PIXELS])},
    "vae_decoder": {"latent": ("float32", ["B", CHANNELS, SIDE, SIDE])},
}
OUTPUTS: dict[str, tuple[str, list[Any]]] = {
    "unet": ("noise_pred", ["B", CHANNELS, SIDE, SIDE]),
    "unet_conditional": ("noise_pred", ["B", CHANNELS, SIDE, SIDE]),
    "vae_encoder": ("latent", ["B", CHANNELS, SIDE, SIDE]),
    "vae_decoder": ("image", ["B", 3, PIXELS, PIXELS]),
}
FILES = {
    "unet": "unet/model.onnx",
    "unet_conditional": "unet/model_conditional.onnx",
    "vae_encoder": "vae_encoder/model.onnx",
    "vae_decoder": "vae_decoder/model.onnx",
}


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.RandomState(3)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return {
        "encoder": normal(CHANNELS, 3, 1, 1, scale=1.0),
        "encoder_bias": normal(CHANNELS, scale=0.2),
        "with": normal(CHANNELS, 2 * CHANNELS + 1, 3, 3, scale=0.15),  # the conditional branch
        "without": normal(CHANNELS, 2 * CHANNELS + 1, 3, 3, scale=0.15),
        "time": normal(1, CHANNELS, 1, 1, scale=0.3),
        "decoder": normal(CHANNELS, 3, BLOCK, BLOCK, scale=0.03),
        "decoder_bias": normal(3, scale=0.1),
    }


@dataclass(frozen=True)
class Toy:
    """What the graphs of the toy bundle compute, in float64 and by loops."""

    path: Path
    weights: dict[str, np.ndarray] = field(default_factory=_weights)

    def encode(self, image: np.ndarray) -> np.ndarray:
        """[1, 3, 128, 128] -> [1, 4, 16, 16]: the mean of each block, its channels mixed, and scaled."""
        means = image.astype(np.float64).reshape(1, 3, SIDE, BLOCK, SIDE, BLOCK).mean(axis=(3, 5))
        mixed = np.einsum("oc,bchw->bohw", self.weights["encoder"][:, :, 0, 0], means)
        return SCALE * (mixed + self.weights["encoder_bias"][:, None, None])

    def conditional(self, sample: np.ndarray, timestep: int) -> np.ndarray:
        """[1, 9, 16, 16] -> [1, 4, 16, 16]."""
        return np.tanh(_convolved(sample, self.weights["with"])) + timestep / 1000 * self.weights["time"]

    def unet(self, sample: np.ndarray, timestep: int, scale: float) -> np.ndarray:
        """Both branches, guided."""
        without = np.tanh(_convolved(sample, self.weights["without"])) - timestep / 1000 * self.weights["time"]
        return without + scale * (self.conditional(sample, timestep) - without)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """[1, 4, 16, 16] -> [1, 3, 128, 128]: each latent pixel becomes a block of 8 x 8."""
        blocks = np.einsum("bchw,coij->bohiwj", latent.astype(np.float64) / SCALE, self.weights["decoder"])
        return blocks.reshape(1, 3, PIXELS, PIXELS) + self.weights["decoder_bias"][:, None, None]


def _convolved(sample: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    padded = np.pad(sample.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    total = 0.0
    for row in range(3):
        for column in range(3):
            part = padded[:, :, row : row + sample.shape[2], column : column + sample.shape[3]]
            total = total + np.einsum("oc,bchw->bohw", kernel[:, :, row, column], part)
    return total


def _nodes() -> dict[str, list[Any]]:
    node = onnx.helper.make_node

    def branch(name: str, sign: str) -> list[Any]:
        return [
            node("Conv", ["sample", name], [f"{name}_conv"], pads=[1, 1, 1, 1]),
            node("Tanh", [f"{name}_conv"], [f"{name}_tanh"]),
            node(sign, [f"{name}_tanh", "moved"], [f"eps_{name}"]),
        ]

    time: list[Any] = [
        node("Cast", ["timestep"], ["t"], to=onnx.TensorProto.FLOAT),
        node("Div", ["t", "thousand"], ["share"]),
        node("Mul", ["share", "time"], ["moved"]),
    ]
    guided = [
        node("Sub", ["eps_with", "eps_without"], ["difference"]),
        node("Mul", ["guidance_scale", "difference"], ["scaled"]),
        node("Add", ["eps_without", "scaled"], ["noise_pred"]),
    ]
    return {
        "unet": [*time, *branch("with", "Add"), *branch("without", "Sub"), *guided],
        "unet_conditional": [*time, *branch("with", "Add"), node("Identity", ["eps_with"], ["noise_pred"])],
        "vae_encoder": [
            node("AveragePool", ["image"], ["means"], kernel_shape=[BLOCK, BLOCK], strides=[BLOCK, BLOCK]),
            node("Conv", ["means", "encoder", "encoder_bias"], ["mixed"]),
            node("Mul", ["mixed", "scale"], ["latent"]),
        ],
        "vae_decoder": [
            node("Div", ["latent", "scale"], ["unscaled"]),
            node("ConvTranspose", ["unscaled", "decoder", "decoder_bias"], ["image"], strides=[BLOCK, BLOCK]),
        ],
    }


def _write_graph(folder: Path, name: str, nodes: list[Any], weights: dict[str, np.ndarray], batch: Any) -> None:
    """One graph; weights of more than 8 values go to the folder's one weights file, at multiples of 4096."""

    def value(label: str, dtype: str, shape: list[Any]) -> Any:
        kind = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}[dtype]
        return onnx.helper.make_tensor_value_info(label, kind, [batch if size == "B" else size for size in shape])

    used = {label for node in nodes for label in node.input}
    constants = weights | {"thousand": np.float32([1000]), "scale": np.float32([SCALE])}
    model = folder / FILES[name]
    model.parent.mkdir(parents=True, exist_ok=True)
    tensors = []
    for label in sorted(used & constants.keys()):
        tensor = onnx.numpy_helper.from_array(constants[label], label)
        if constants[label].size > 8:
            offset = 4096 * sorted(weights).index(label)
            data = model.with_name("model.onnx.data")
            with open(data, "r+b" if data.exists() else "w+b") as stream:
                stream.seek(offset)
                stream.write(tensor.raw_data)
            _refer(tensor, "model.onnx.data", offset, constants[label].nbytes)
        tensors.append(tensor)
    graph = onnx.helper.make_graph(
        nodes,
        name,
        [value(label, *info) for label, info in INPUTS[name].items()],
        [value(OUTPUTS[name][0], "float32", OUTPUTS[name][1])],
        tensors,
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    model.write_bytes(proto.SerializeToString())


def _refer(tensor: Any, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _seal(folder: Path, batch: Any = 1, **changes: Any) -> None:
    """A manifest of the files as they are now. `changes` replace whole sections."""

    def tensor(label: str, dtype: Any, shape: list[Any]) -> schema.TensorInfo:
        return schema.TensorInfo(name=label, dtype=dtype, shape=[batch if size == "B" else size for size in shape])

    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != schema.MANIFEST_NAME]
    weights = schema.WeightsInfo(origin="toy", sha256="0" * 64, stand_in=False)
    sections: dict[str, Any] = {
        "model": schema.ModelInfo(preset="toy", parameters=1, unet=weights, vae=weights),
        "geometry": schema.Geometry(
            image_size=PIXELS, latent_size=SIDE, latent_channels=CHANNELS, scaling_factor=SCALE
        ),
        "schedule": schema.ScheduleInfo(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="epsilon",
        ),
        "defaults": schema.Defaults(num_inference_steps=6, guidance_scale=2.5, strength=0.99, noise_offset=0.0357),
        "graphs": {
            name: schema.GraphInfo(
                files={
                    "fp32": schema.GraphFile(
                        model=file, weights=str(Path(file).with_name("model.onnx.data")).replace("\\", "/")
                    )
                },
                inputs=[tensor(label, *info) for label, info in INPUTS[name].items()],
                outputs=[tensor(OUTPUTS[name][0], "float32", OUTPUTS[name][1])],
            )
            for name, file in FILES.items()
        },
        "files": {
            path.relative_to(folder).as_posix(): schema.FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
            for path in paths
        },
    }
    rest: dict[str, Any] = {"created": "today", "rewrites": [], "parity": {}, "tools": {}}
    schema.write_manifest(schema.Manifest(schema_version=1, **(sections | rest | changes)), folder)


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., Toy]:
    """make_toy(folder, batch=1, nodes={graph: nodes}, weights={name: array}, **sections of the manifest)."""

    def make(
        folder: Path, batch: Any = 1, nodes: dict[str, Any] | None = None, weights: Any = None, **changes: Any
    ) -> Toy:
        pytest.importorskip("onnx")
        toy = Toy(folder, _weights() | (weights or {}))
        for name, own in (_nodes() | (nodes or {})).items():
            _write_graph(folder, name, own, toy.weights, batch)
        _seal(folder, batch, **changes)
        return toy

    return make


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory, make_toy: Callable[..., Toy]) -> Toy:
    """The toy bundle: 128 x 128 pictures, made in milliseconds. Read only."""
    return make_toy(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def toy_copy(toy_bundle: Toy, tmp_path: Path) -> Toy:
    """A copy of the toy bundle that a test may damage."""
    return Toy(Path(shutil.copytree(toy_bundle.path, tmp_path / "bundle")), toy_bundle.weights)


@pytest.fixture(scope="session")
def reseal() -> Callable[..., None]:
    """reseal(folder): a valid manifest for files that a test has changed, as whoever made a hostile bundle would."""
    return _seal


@pytest.fixture(scope="session")
def edit_manifest() -> Callable[..., None]:
    """edit_manifest(folder, change, sign=True): change(content) edits the JSON; `sign` makes its hash right again."""

    def edit(folder: Path, change: Callable[[dict[str, Any]], object], sign: bool = True) -> None:
        path = folder / "manifest.json"
        content = json.loads(path.read_text())
        stated = content.pop("manifest_sha256")
        change(content)
        # The rule of docs/bundle.md, written again here: SHA-256 of the JSON with sorted keys, without spaces.
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest() if sign else stated
        path.write_text(json.dumps(content))

    return edit


@pytest.fixture(scope="session")
def checks_of() -> Callable[[Toy], dict[str, schema.GraphCheck]]:
    """checks_of(toy): the values by which a device is checked, from the toy's float64 loops."""

    def make(toy: Toy) -> dict[str, schema.GraphCheck]:
        outputs = {
            "unet": lambda i: toy.unet(i["sample"], 500, 2.5),
            "unet_conditional": lambda i: toy.conditional(i["sample"], 500),
            "vae_encoder": lambda i: toy.encode(i["image"]),
            "vae_decoder": lambda i: toy.decode(i["latent"]),
        }
        found = {}
        for graph, info in schema.read_manifest(toy.path).graphs.items():
            inputs = check_inputs(info, 1)
            found[graph] = make_check(inputs, outputs[graph](inputs).astype(np.float32), 1)
        return found

    return make


# --- bundles of a hub -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def two_precisions(toy_bundle: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle with another file of the U-Net, which computes the same, as its int8_cpu precision."""
    pytest.importorskip("onnx")
    weights = "unet/model_int8_cpu.onnx.data"
    folder = Path(shutil.copytree(toy_bundle.path, tmp_path_factory.mktemp("two") / "bundle"))
    manifest = schema.read_manifest(folder)
    graphs, files = dict(manifest.graphs), dict(manifest.files)
    shutil.copy(folder / "unet/model.onnx.data", folder / weights)
    for name, stem in (("unet", "model"), ("unet_conditional", "model_conditional")):
        path = f"unet/{stem}_int8_cpu.onnx"
        model = onnx.load(folder / f"unet/{stem}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = Path(weights).name
        (folder / path).write_bytes(model.SerializeToString())
        for file in (path, weights):
            files[file] = schema.FileInfo(size=(folder / file).stat().st_size, sha256=sha256_file(folder / file))
        more = {"int8_cpu": schema.GraphFile(model=path, weights=weights)}
        graphs[name] = graphs[name].model_copy(update={"files": {**graphs[name].files, **more}})
    schema.write_manifest(manifest.model_copy(update={"graphs": graphs, "files": files}), folder)
    return folder


@pytest.fixture
def hub(bundle_hub: Any, two_precisions: Path) -> Any:
    """The hub with the bundle in `owner/bundle`, and a repository without one."""
    repo = sys.modules["bundle_hub"].Repo
    bundle_hub.repos = {"owner/bundle": repo(), "owner/other": repo()}
    paths = [path for path in two_precisions.rglob("*") if path.is_file()]
    files = {path.relative_to(two_precisions).as_posix(): path.read_bytes() for path in paths}
    bundle_hub.repos["owner/bundle"].commit(files | {"README.md": b"card"})
    bundle_hub.repos["owner/other"].commit({"README.md": b"nothing"})
    return bundle_hub


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_bundle: Toy) -> Path:
    """The current folder: a picture a.png, its mask m.png, and the bundle under its default name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moebius-bundle").symlink_to(toy_bundle.path)
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (PIXELS, PIXELS, 3)).astype(np.uint8)).save("a.png")
    mask = np.zeros((PIXELS, PIXELS), np.uint8)
    mask[40:80, 48:80] = 255
    Image.fromarray(mask).save("m.png")
    return tmp_path


@pytest.fixture
def folder(here: Path) -> Path:
    """`in`, beside them: three pictures of three formats."""
    (here / "in").mkdir()
    for index, name in enumerate(("a.png", "b.jpg", "c.bmp")):
        pixels = np.random.RandomState(index).randint(0, 256, (PIXELS, PIXELS, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(here / "in" / name)
    return here / "in"


Outcome = tuple[int, str, list[str]]
"""Exit code, standard output, lines of the error stream."""


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """run("a.png", "--mask", ...): the command, in this process."""
    cli = pytest.importorskip("moebius_runtime.cli")

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["moebius-inpaint", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return int(leaving.value.code or 0), captured.out, [line for line in captured.err.splitlines() if line.strip()]

    return call


@pytest.fixture
def run_process(here: Path) -> Callable[..., Outcome]:
    """As `run`, in a process of its own, as a user runs it: with what libraries in C write."""

    def call(*arguments: object, **more: Any) -> Outcome:
        environment = os.environ | {"PYTHONPATH": str(RUNTIMES), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "moebius_runtime.cli", *map(str, arguments)]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, timeout=120, **more)
        assert b"Traceback" not in done.stderr, done.stderr
        lines = done.stderr.decode(errors="surrogateescape").split("\n")
        return done.returncode, done.stdout.decode(errors="surrogateescape"), [line for line in lines if line.strip()]

    return call


@pytest.fixture
def files_here(here: Path) -> Callable[[], dict[str, bytes | None]]:
    """Every path under the current folder, and what it holds."""

    def look() -> dict[str, bytes | None]:
        return {str(path.relative_to(here)): path.read_bytes() if path.is_file() else None for path in here.rglob("*")}

    return look


@pytest.fixture
def refused(run: Callable[..., Outcome], files_here: Callable[[], object]) -> Callable[..., str]:
    """refused(arguments, *words): exit code 2, one line of error with the words, nothing else said, no file changed."""

    def check(arguments: list[object], *words: str) -> str:
        before = files_here()
        code, out, err = run(*arguments)
        assert (code, out, len(err)) == (2, "", 1), err
        assert err[0].startswith("error: ")
        for word in words:
            assert word in err[0], err[0]
        assert files_here() == before
        return err[0]

    return check
