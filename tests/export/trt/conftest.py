"""The fake TensorRT in place of the real one, a device, a bundle to build from, and the command."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moebius_runtime.bundle.passport import Device

FAKE = Path(__file__).parents[2] / "fakes" / "fake_tensorrt.py"
FAKE_PLUGIN = Path(__file__).parents[1] / "fake_trt_plugin.py"


@pytest.fixture(scope="session")
def make_module() -> Callable[..., Any]:
    """make_module("10.3.0") or make_module("1.7.1", rtx=True): see tests/fakes/fake_tensorrt.py."""
    return _loaded(FAKE).make_module


@pytest.fixture(scope="session")
def plugins() -> Any:
    """tests/export/fake_trt_plugin.py."""
    return _loaded(FAKE_PLUGIN)


def _loaded(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, make_module: Callable[..., Any], plugins: Any) -> Callable[..., Any]:
    """install("10.3.0"): the only TensorRT here is that version, with its plugins; install() leaves none."""
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)

    def put(version: str | None = None, rtx: bool = False) -> ModuleType | None:
        if version is None:
            return None
        module = make_module(version, rtx)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.delitem(sys.modules, "tensorrt.plugin", raising=False)
        if not rtx and tuple(int(part) for part in version.split(".")[:2]) >= (10, 6):
            monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugins.part_of(module))
        return module

    return put


@pytest.fixture
def device() -> Device:
    """A Jetson Orin Nano with 5 GB free."""
    return Device("Orin", 87, "540.4.0", "12.6", 8 << 30, 5 << 30)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, fp32 only."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "moebius-bundle"))


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """trt(..., device=None): the command in this process; exit code, output, error stream."""
    from moebius_export.commands import app as cli
    from moebius_runtime.hardware import devices

    def call(*arguments: object, device: Device | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(devices, "current_device", lambda: device)
        monkeypatch.setattr(sys, "argv", ["moebius-export", "trt", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return int(leaving.value.code or 0), captured.out, captured.err

    return call
