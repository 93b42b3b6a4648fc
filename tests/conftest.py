"""Bundles that tests share. Each is made once per run, also when pytest-xdist runs several workers."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden files."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all xdist workers of this run see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def tiny_bundle(shared_folder: Path) -> Path:
    """A real export of the network as written: preset tiny, stand-in weights, 128x128 pictures. Read only: copy it."""
    return _made_once(shared_folder / "tiny-bundle", lambda folder: _export_tiny(folder, rules=()))


@pytest.fixture(scope="session")
def fused_bundle(shared_folder: Path) -> Path:
    """The same with every rewrite, for ort-cpu: what `moebius-export onnx` writes by default. Read only."""
    return _made_once(shared_folder / "fused-bundle", _export_tiny)


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
    from moebius_export.bundle import ExportOptions, export_onnx

    export_onnx(folder, ExportOptions(weights="stand-in", vae="stand-in", preset="tiny", **options))


def _made_once(folder: Path, make) -> Path:
    """Runs `make(folder)` in one worker while the others wait for it."""
    import filelock

    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder)
    return folder
