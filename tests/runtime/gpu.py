"""A machine with a fake GPU, for tests of what runs on one."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moebius_runtime.backends.tensorrt as backend_module
from moebius_runtime.bundle.manifest import read_manifest
from moebius_runtime.bundle.passport import Device, EngineInfo, Passport, engine_file, folder_name, write_passport
from moebius_runtime.files import sha256_file

_FAKES = Path(__file__).parents[1] / "fakes"


def load_fake(name: str) -> Any:
    """A module of tests/fakes."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _FAKES / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


fake_cuda = load_fake("fake_cuda")
fake_runtime = load_fake("fake_runtime")

DEVICE = Device("NVIDIA RTX 4060", 89, "550.54", "12.4", 8 << 30, 6 << 30)


@dataclass
class Machine:
    """What is installed: a CUDA runtime, a TensorRT, a GPU."""

    cuda: Any
    trt: Any
    device: Device | None = DEVICE
    opened: list[Any] = field(default_factory=list)

    @property
    def backend(self) -> str:
        return "tensorrt-rtx" if self.trt.rtx else "tensorrt"

    def build(self, bundle: Path, precision: str = "fp32", gpu: str | None = DEVICE.name, **more: Any) -> Path:
        """Engines of every graph of a bundle with their passport. `more`: only, sm, version, driver, flags, engine."""
        manifest = read_manifest(bundle)
        version = more.get("version", self.trt.__version__)
        sm = more.get("sm", [89])
        device = gpu or "sm" + "+".join(map(str, sm))
        folder = bundle / "engines" / folder_name(device, self.backend, version, precision)
        folder.mkdir(parents=True)
        engines = {}
        for graph in more.get("only", manifest.graphs):
            file = manifest.graphs[graph].files[precision]
            made = {"activations": fake_runtime.ACTIVATIONS[graph], **more.get("engine", {})}
            data = fake_runtime.engine_bytes((bundle / file.model).resolve(), self.trt.__version__, **made)
            path = folder / engine_file(graph)
            path.write_bytes(data)
            engines[graph] = EngineInfo(
                size=len(data),
                sha256=sha256_file(path),
                onnx_sha256=manifest.files[file.model].sha256,
                weights_sha256=None if file.weights is None else manifest.files[file.weights].sha256,
                plan_sha256=None,
                shapes={},
                device_memory=None,
                build_seconds=1.0,
            )
        passport = Passport(
            schema_version=1,
            created="today",
            backend=self.backend,
            backend_version=version,
            precision=precision,
            gpu=gpu,
            sm=sm,
            driver=more.get("driver"),
            cuda=None,
            flags=more.get("flags", {}),
            engines=engines,
        )
        write_passport(passport, folder)
        return folder


def make_machine(monkeypatch: Any, cache: Path, version: str = "10.9.0.34", rtx: bool = False, **more: Any) -> Machine:
    """Installs the fakes. `more`: device_memory, old_layout."""
    cuda = fake_cuda.FakeCuda(more.get("device_memory", 1 << 30))
    cuda.install(monkeypatch, more.get("old_layout", False))
    trt = fake_runtime.fake_runtime(cuda, version, rtx)
    fake_runtime.install(trt, monkeypatch)
    machine = Machine(cuda, trt)
    monkeypatch.setenv("MOEBIUS_CACHE", str(cache))
    monkeypatch.setattr(backend_module, "current_device", lambda: machine.device)
    return machine
