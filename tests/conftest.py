"""Bundles that tests share. Each is made once per run, also when pytest-xdist runs several workers."""

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

_threads: list[int] = []


def pytest_configure() -> None:
    """Interrupts reach the tests' processes also where the run was started in the background, which ignores them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sends tests that share a module's or package's fixture to one xdist worker, so that it is made once per run."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None and (owner := _shared_fixtures_of(item)):
            item.add_marker(pytest.mark.xdist_group(owner))


def _shared_fixtures_of(item: pytest.Item) -> str:
    """The folder or file of the widest fixture that the test shares with others; "" where it shares none."""
    used = getattr(item, "_fixtureinfo", None)
    definitions = used.name2fixturedefs.values() if used else ()
    owners = {d[-1].baseid for d in definitions if d and d[-1].scope in ("module", "package")}
    return min((owner for owner in owners if owner), key=len, default="")


def pytest_collection_finish() -> None:
    """Notes torch's threads before any fixture, whatever its scope, has run something that changes them."""
    if "torch" in sys.modules:
        _threads[:] = [sys.modules["torch"].get_num_threads()]


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    """The runtime `torch` sets the threads of its process; with other threads, later tests' sums round differently."""
    _restore_threads()
    yield
    _restore_threads()


def _restore_threads() -> None:
    if _threads and sys.modules["torch"].get_num_threads() != _threads[0]:
        sys.modules["torch"].set_num_threads(_threads[0])


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Records of hashes and other cached files go to a folder of this run, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBIUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden files."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all xdist workers of this run see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session", autouse=True)
def _own_cache(shared_folder: Path) -> Iterator[None]:
    """Keeps what runtimes cache, such as verdicts of devices, out of the user's folder."""
    before = os.environ.get("MOEBIUS_CACHE")
    os.environ["MOEBIUS_CACHE"] = str(shared_folder / "cache")
    yield
    del os.environ["MOEBIUS_CACHE"]
    if before is not None:
        os.environ["MOEBIUS_CACHE"] = before


@pytest.fixture(scope="session")
def tiny_bundle(shared_folder: Path) -> Path:
    """A real export of the network as written: preset tiny, stand-in weights, 128x128 pictures. Read only: copy it."""
    return _made_once(shared_folder / "tiny-bundle", lambda folder: _export_tiny(folder, rules=(), masked=False))


@pytest.fixture(scope="session")
def fused_bundle(shared_folder: Path) -> Path:
    """The same with every rewrite, for ort-cpu: what `moebius-export onnx` writes by default. Read only."""
    return _made_once(shared_folder / "fused-bundle", _export_tiny)


@pytest.fixture(scope="session")
def open_bundle(shared_folder: Path) -> Path:
    """The fused bundle with an open batch, as --dynamic-batch writes it. Read only."""
    return _made_once(shared_folder / "open-bundle", lambda folder: _export_tiny(folder, dynamic_batch=True))


@pytest.fixture(scope="session")
def inlined_bundle(shared_folder: Path, fused_bundle: Path) -> Path:
    """The fused bundle with standard operators only: what `moebius-export inline` writes. Read only."""
    from moebius_export.onnx_export.inline import inline_bundle

    return _made_once(shared_folder / "inlined-bundle", lambda folder: inline_bundle(fused_bundle, folder))


@pytest.fixture(scope="session")
def tensorrt_bundle(shared_folder: Path, fused_bundle: Path) -> Path:
    """The fused bundle with Local-λ as `--target tensorrt` lowers it. Read only."""
    return _made_once(shared_folder / "tensorrt-bundle", lambda folder: _lower_for_tensorrt(fused_bundle, folder))


@pytest.fixture(scope="session")
def kept_bundle(shared_folder: Path, tensorrt_bundle: Path) -> Path:
    """The bundle for TensorRT with fp16 files that keep LocalLambda as a function. Read only."""
    return _made_once(shared_folder / "kept-bundle", lambda folder: _keep_local_lambda(tensorrt_bundle, folder))


@pytest.fixture(scope="session")
def distilled_bundle(shared_folder: Path) -> Path:
    """The export of a tiny checkpoint that records guidance distilled at 2.5, for sampler lcm and 3 steps. Read only.

    Its weights lie beside it, in the folder `distilled-weights`.
    """
    return _made_once(shared_folder / "distilled-bundle", _export_distilled)


@pytest.fixture
def tiny_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def fused_bundle_copy(fused_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the fused bundle that a test may damage."""
    return Path(shutil.copytree(fused_bundle, tmp_path / "fused"))


def _export_tiny(folder: Path, **options) -> None:
    pytest.importorskip("torch", reason="the export needs torch; the runtime's own tests do not")
    from moebius_export.onnx_export.export import ExportOptions, export_onnx

    export_onnx(folder, ExportOptions(weights="stand-in", vae="stand-in", preset="tiny", **options))


def _export_distilled(folder: Path) -> None:
    pytest.importorskip("torch", reason="the export needs torch; the runtime's own tests do not")
    from safetensors.torch import save_file

    from moebius import preset
    from moebius.weights.load import load_student
    from moebius_export.onnx_export.export import ExportOptions, export_onnx

    weights = folder.with_name("distilled-weights")
    weights.mkdir(exist_ok=True)
    save_file(load_student("stand-in:5", preset("tiny").student)[0].state_dict(), weights / "model.safetensors")
    record = {"prediction_type": "epsilon", "guidance": {"distilled": 2.5}, "sampler": "lcm", "num_inference_steps": 3}
    (weights / "config.json").write_text(json.dumps(record))
    export_onnx(folder, ExportOptions(weights=str(weights), vae="stand-in", preset="tiny"))


def _lower_for_tensorrt(source: Path, folder: Path) -> None:
    import onnx

    from moebius_export.lowering.lowering import shipped
    from moebius_export.lowering.relower import relowered
    from moebius_runtime.bundle.manifest import FileInfo, read_manifest, sha256_file, write_manifest

    shutil.copytree(source, folder)
    manifest = read_manifest(folder)
    files = dict(manifest.files)
    for name in ("unet/model.onnx", "unet/model_conditional.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        (folder / name).write_bytes(relowered(model, shipped()["tensorrt"]).SerializeToString())
        files[name] = FileInfo(size=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
    write_manifest(manifest.model_copy(update={"files": files}), folder)


def _keep_local_lambda(source: Path, folder: Path) -> None:
    from moebius_export.precision.planning import Planner, PlanOptions
    from moebius_export.precision.write import write_typed
    from moebius_runtime.bundle.bundle import Bundle

    bundle = Bundle.open(shutil.copytree(source, folder))
    options = PlanOptions(pictures=1, steps=2, evaluations=6, samples=1, keep=("LocalLambda",))
    plans = Planner(bundle, options, lambda what, done, total: None).run()
    write_typed(bundle, plans, only=False, progress=lambda what, done, total: None)


def _made_once(folder: Path, make) -> Path:
    """Runs `make(folder)` in one worker while the others wait for it."""
    import filelock

    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture
def only_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[float]]:
    """only_hub(address): empty caches and no other hub than that one; returns the seconds that the library waits."""
    constants = pytest.importorskip("huggingface_hub.constants")

    def use(address: str) -> list[float]:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "MOEBIUS_CACHE": str(tmp_path / "moebius"),
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        # huggingface_hub has read its environment when it was imported.
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        slept: list[float] = []  # the library waits between its tries
        for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
            monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=slept.append, time=time.time))
        return slept

    return use


@pytest.fixture
def bundle_hub(only_hub: Callable[[str], list[float]]) -> Iterator[Any]:
    """A hub that takes commits (tests/fakes/bundle_hub.py)."""
    with _fake("bundle_hub").running() as hub:
        only_hub(hub.address)
        yield hub


def _fake(name: str) -> ModuleType:
    """tests/fakes/NAME.py."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "fakes" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
