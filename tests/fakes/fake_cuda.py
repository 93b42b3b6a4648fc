"""A CUDA runtime of host memory, strict where the real one is, and stricter where it would only be undefined.

Work put on a stream is done when something waits for it, not before: who forgets to wait sees old data. Every call is
recorded. What is illegal (memory that was freed, copies outside of a buffer, pageable memory, allocation during a
capture) gives the error code that CUDA documents for it, or `cudaErrorIllegalAddress` at the next wait.
"""

from __future__ import annotations

import ctypes
import enum
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np


class Error(enum.IntEnum):
    """cudaError_t, as far as it is given here."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class MemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class CaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


Work = Callable[[], None]


class IllegalAccess(Exception):
    """Work touched memory that is not the device's, or no more."""


class _Stream:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.pending: list[Work] = []
        self.captured: list[Work] | None = None
        self.broken = False

    def put(self, work: Work) -> None:
        (self.pending if self.captured is None else self.captured).append(work)


class FakeCuda:
    """The module `cuda.bindings.runtime`. `device_memory` bytes can be allocated."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = MemcpyKind
    cudaStreamCaptureMode = CaptureMode
    cudaError_t = Error

    def __init__(self, device_memory: int = 1 << 30) -> None:
        self.calls: list[str] = []
        self.room = device_memory
        self.devices = 1
        self.broken: Error | None = None  # what every call gives once the device has failed
        self.failing: dict[str, Error] = {}  # by function: what its next call gives
        self._next = 0x7F00_0000_0000
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, _Stream] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}

    # --- for tests ---

    def install(self, monkeypatch: Any, old_layout: bool = False) -> None:
        """Makes it importable as `cuda.bindings.runtime`, or as `cuda.cudart`."""
        package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
        monkeypatch.setitem(sys.modules, "cuda", package)
        if old_layout:
            package.cudart = self
            monkeypatch.setitem(sys.modules, "cuda.bindings", None)
            monkeypatch.setitem(sys.modules, "cuda.cudart", self)
        else:
            package.bindings, bindings.runtime = bindings, self
            monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
            monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self)

    def leaks(self) -> list[str]:
        """What was taken and not given back."""
        owned = {
            "device memory": self.device,
            "pinned memory": self.pinned,
            "stream": self.streams,
            "graph": self.graphs,
            "graph executable": self.executables,
        }
        return [f"{kind} {handle:#x}" for kind, taken in owned.items() for handle in taken]

    def span(self, address: int, size: int) -> np.ndarray:
        """Bytes of the device's memory; `IllegalAccess` where they are not all inside one live allocation."""
        for base, memory in self.device.items():
            if base <= address and address + size <= base + memory.size:
                return memory[address - base : address - base + size]
        raise IllegalAccess(f"{size} bytes at {address:#x}")

    def host(self, address: int, size: int) -> np.ndarray:
        """Bytes of pinned memory."""
        for base, memory in self.pinned.items():
            if base <= address and address + size <= base + len(memory):
                return np.frombuffer(memory, np.uint8)[address - base : address - base + size]
        raise IllegalAccess(f"{size} bytes at {address:#x} of the host, which are not pinned")

    def put(self, stream: int, work: Work) -> None:
        """What a library does that starts a kernel on a stream."""
        if stream not in self.streams:
            raise IllegalAccess(f"stream {stream:#x} does not exist")
        self.streams[stream].put(work)

    def capturing(self) -> bool:
        """Whether any stream is."""
        return any(stream.captured is not None for stream in self.streams.values())

    # --- the API: a tuple of the error code and what comes back ---

    def _begin(self, name: str, *details: object, unsafe: bool = False) -> Error:
        """Records a call. `unsafe` ones break a capture that is going on, as CUDA documents it."""
        self.calls.append(" ".join([name, *map(str, details)]))
        if name in self.failing:
            return self.failing.pop(name)
        if self.broken is not None:
            return self.broken
        if unsafe and self.capturing():
            for stream in self.streams.values():
                stream.broken = stream.broken or stream.captured is not None
            return Error.cudaErrorStreamCaptureUnsupported
        return Error.cudaSuccess

    def cudaGetErrorString(self, code: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, f"the words for {code.value}".encode()

    def cudaRuntimeGetVersion(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 12090

    def cudaGetDeviceCount(self) -> tuple[Error, int | None]:
        code = self._begin("cudaGetDeviceCount")
        return code, None if code else self.devices

    def cudaMalloc(self, size: int) -> tuple[Error, int | None]:
        code = self._begin("cudaMalloc", size, unsafe=True)
        if code or size > self.room:
            return code or Error.cudaErrorMemoryAllocation, None
        self.room -= size
        address, self._next = self._next, self._next + (size + 511) // 256 * 256  # a gap after each
        self.device[address] = np.full(size, 0xA5, np.uint8)
        return code, address

    def cudaFree(self, address: int) -> tuple[Error]:
        code = self._begin("cudaFree", address, unsafe=True)
        if not code and address not in self.device:
            return (Error.cudaErrorInvalidValue,)
        if not code:
            for stream in self.streams.values():  # the real one waits for the device
                self._drain(stream)
            self.room += self.device.pop(address).size
        return (code,)

    def cudaMallocHost(self, size: int) -> tuple[Error, int | None]:
        code = self._begin("cudaMallocHost", size, unsafe=True)
        if code:
            return code, None
        memory = (ctypes.c_ubyte * size)(*([0xA5] * min(size, 64)))
        self.pinned[ctypes.addressof(memory)] = memory
        return code, ctypes.addressof(memory)

    def cudaFreeHost(self, address: int) -> tuple[Error]:
        code = self._begin("cudaFreeHost", address, unsafe=True)
        if not code and self.pinned.pop(address, None) is None:
            return (Error.cudaErrorInvalidValue,)
        return (code,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, int | None]:
        code = self._begin("cudaStreamCreateWithFlags", flags)
        if code:
            return code, None
        self._next += 256
        self.streams[self._next] = _Stream(flags)
        return code, self._next

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        code = self._begin("cudaStreamDestroy")
        if not code and self.streams.pop(stream, None) is None:
            return (Error.cudaErrorInvalidResourceHandle,)
        return (code,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        code = self._begin("cudaStreamSynchronize", unsafe=True)
        if code:
            return (code,)
        if stream not in self.streams:
            return (Error.cudaErrorInvalidResourceHandle,)
        self._drain(self.streams[stream])
        return (self.broken or Error.cudaSuccess,)

    def _drain(self, stream: _Stream) -> None:
        pending, stream.pending = stream.pending, []
        for work in pending:
            try:
                work()
            except IllegalAccess as error:
                self.calls.append(f"illegal access: {error}")
                self.broken = Error.cudaErrorIllegalAddress
                return

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: MemcpyKind, stream: int) -> tuple[Error]:
        code = self._begin("cudaMemcpyAsync", kind.name.removeprefix("cudaMemcpy"), size)
        if code:
            return (code,)
        if stream not in self.streams:
            return (Error.cudaErrorInvalidResourceHandle,)
        up = kind == MemcpyKind.cudaMemcpyHostToDevice

        def ends() -> tuple[np.ndarray, np.ndarray]:
            if up:
                return self.span(target, size), self.host(source, size)
            return self.host(target, size), self.span(source, size)

        try:
            ends()
        except IllegalAccess as error:
            self.calls.append(f"illegal copy: {error}")
            return (Error.cudaErrorInvalidValue,)

        def copy() -> None:
            to, come_from = ends()
            to[:] = come_from

        self.streams[stream].put(copy)
        return (code,)

    def cudaStreamBeginCapture(self, stream: int, mode: CaptureMode) -> tuple[Error]:
        code = self._begin("cudaStreamBeginCapture", mode.name)
        if code:
            return (code,)
        if stream not in self.streams or self.streams[stream].captured is not None:
            return (Error.cudaErrorInvalidResourceHandle,)
        self.streams[stream].captured = []
        self.streams[stream].broken = False
        return (code,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, int | None]:
        code = self._begin("cudaStreamEndCapture")
        if code:
            return code, None
        known = self.streams.get(stream)
        if known is None or known.captured is None:
            return Error.cudaErrorInvalidResourceHandle, None
        work, known.captured = known.captured, None
        if known.broken:
            return Error.cudaErrorStreamCaptureInvalidated, None
        self._next += 256
        self.graphs[self._next] = work
        return code, self._next

    def cudaGraphInstantiateWithFlags(self, graph: int, flags: int) -> tuple[Error, int | None]:
        code = self._begin("cudaGraphInstantiateWithFlags", flags)
        if code or graph not in self.graphs:
            return code or Error.cudaErrorInvalidValue, None
        self._next += 256
        self.executables[self._next] = list(self.graphs[graph])
        return code, self._next

    def cudaGraphDestroy(self, graph: int) -> tuple[Error]:
        code = self._begin("cudaGraphDestroy")
        return (code if self.graphs.pop(graph, None) is not None else Error.cudaErrorInvalidValue,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Error]:
        code = self._begin("cudaGraphExecDestroy")
        return (code if self.executables.pop(graph, None) is not None else Error.cudaErrorInvalidValue,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Error]:
        code = self._begin("cudaGraphLaunch")
        if code:
            return (code,)
        if graph not in self.executables or stream not in self.streams:
            return (Error.cudaErrorInvalidResourceHandle,)
        for work in self.executables[graph]:
            self.streams[stream].put(work)
        return (code,)
