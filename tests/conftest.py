"""Bundles that tests share. Each is made once per run, also when pytest-xdist runs several workers."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_threads: list[int] = []


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
    return _made_once(shared_folder / "tiny-bundle", lambda folder: _export_tiny(folder, rules=()))


@pytest.fixture(scope="session")
def fused_bundle(shared_folder: Path) -> Path:
    """The same with every rewrite, for ort-cpu: what `moebius-export onnx` writes by default. Read only."""
    return _made_once(shared_folder / "fused-bundle", _export_tiny)


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
