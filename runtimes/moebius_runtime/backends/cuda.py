"""The CUDA runtime, as far as the engines need it: NVIDIA's own bindings, with errors as exceptions.

Whatever is taken here is given back by `close`, which may be called twice, and by nothing else: no finaliser decides
when device memory is freed. All copies are asynchronous, on the stream that is named.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from moebius_runtime.errors import CudaError, RuntimeUnavailableError

ALIGNMENT = 256  # bytes: of what cudaMalloc gives, and what TensorRT asks of its activation memory

# What to do about the errors that a user meets; any other is CUDA's own words alone.
_MENDING = {
    "cudaErrorMemoryAllocation": (
        "Close what else uses the GPU, leave out --keep-loaded, or build engines of a lower precision"
    ),
    "cudaErrorInsufficientDriver": "Install an NVIDIA driver that is as new as the CUDA bindings, or older bindings",
    "cudaErrorNoDevice": "Check with nvidia-smi that the GPU is there and that CUDA_VISIBLE_DEVICES does not hide it",
    "cudaErrorIllegalAddress": "This process cannot use the GPU any more: start again, and report it if it stays",
    "cudaErrorStreamCaptureUnsupported": "Set MOEBIUS_CUDA_GRAPHS=off to run without CUDA graphs",
    "cudaErrorStreamCaptureInvalidated": "Set MOEBIUS_CUDA_GRAPHS=off to run without CUDA graphs",
}
# After one of these every call of the process fails with it.
_LOST = (
    "cudaErrorECCUncorrectable",
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchTimeout",
    "cudaErrorAssert",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalInstruction",
    "cudaErrorMisalignedAddress",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
)


def load_cuda() -> Cuda:
    """The CUDA runtime, after it was found to have a device.

    Raises:
        RuntimeUnavailableError: the bindings are not installed, or they find no device or no driver.
    """
    cuda = Cuda(_bindings())
    try:
        count = cuda.call("cudaGetDeviceCount")
    except CudaError as error:
        raise RuntimeUnavailableError(f"no GPU can be used: {error}") from error
    if not count:
        raise RuntimeUnavailableError(f"no GPU can be used: CUDA finds none. {_MENDING['cudaErrorNoDevice']}.")
    return cuda


def _bindings() -> Any:
    """`cuda.bindings.runtime`, or `cuda.cudart` as it was called before cuda-python 12.6."""
    try:
        from cuda.bindings import runtime

        return runtime
    except ImportError:
        pass
    try:
        from cuda import cudart

        return cudart
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"the CUDA bindings for Python cannot be imported ({error}). Install those of your driver's CUDA version: "
            '`pip install "cuda-bindings<13"` for CUDA 12, `pip install "moebius-edge[trt]"` for the newest.'
        ) from error


class Cuda:
    """NVIDIA's bindings, whose functions return an error code first, as functions that raise it."""

    def __init__(self, bindings: Any) -> None:
        self.bindings = bindings
        self._lost = False

    def call(self, function: str, *arguments: Any) -> Any:
        """What a function of the CUDA runtime returns after its error code; None where that is all.

        Raises:
            CudaError: the code is not cudaSuccess. Of work on the device it may be an earlier call's.
        """
        code, *values = getattr(self.bindings, function)(*arguments)
        if int(code) != 0:
            self._lost = self._lost or str(getattr(code, "name", code)) in _LOST
            raise CudaError(self._in_words(function, code))
        return values[0] if len(values) == 1 else tuple(values) or None

    def free(self, function: str, handle: Any) -> None:
        """Gives something back. After an error that ends the use of the device nothing can be, and none is raised."""
        try:
            self.call(function, handle)
        except CudaError:
            if not self._lost:
                raise

    def version(self) -> str:
        """The CUDA version of the bindings, such as 12.9."""
        number = int(self.call("cudaRuntimeGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    def _in_words(self, function: str, code: Any) -> str:
        name = str(getattr(code, "name", code))
        with suppress(Exception):  # the words only explain the name, which is known
            name += f" ({self.bindings.cudaGetErrorString(code)[1].decode()})"
        mending = _MENDING.get(name.split()[0], "Look it up in the CUDA runtime's list of errors")
        return f"CUDA: {function} failed with {name}. {mending}."


class Stream:
    """A stream that does not wait for the default one."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._handle: Any = cuda.call("cudaStreamCreateWithFlags", int(cuda.bindings.cudaStreamNonBlocking))

    @property
    def handle(self) -> int:
        """Its address, as other libraries take it."""
        if self._handle is None:
            raise ValueError("the stream was closed")
        return int(self._handle)

    def synchronize(self) -> None:
        """Waits for all work on the stream; `CudaError` where any of it failed."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` puts on this stream, as a graph to be launched later; none of it is done now.

        Raises:
            CudaError: something of it cannot be part of a graph. What `work` itself raises goes through.
        """
        cuda, bindings = self._cuda, self._cuda.bindings
        # Of this thread alone: what other threads of the process do with CUDA neither fails nor spoils the capture.
        mode = bindings.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            with suppress(CudaError):  # the capture may be broken: what broke it is on its way
                cuda.call("cudaGraphDestroy", cuda.call("cudaStreamEndCapture", self.handle))
            raise
        captured = cuda.call("cudaStreamEndCapture", self.handle)
        try:
            return Graph(cuda, cuda.call("cudaGraphInstantiateWithFlags", captured, 0))
        finally:
            cuda.call("cudaGraphDestroy", captured)  # the instance has its own copy

    def close(self) -> None:
        """Frees it now. A second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._cuda.free("cudaStreamDestroy", handle)


class Graph:
    """Captured work, ready to be launched any number of times."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self._cuda = cuda
        self._handle = handle

    def launch(self, stream: Stream) -> None:
        """Puts all of it on a stream in one call."""
        if self._handle is None:
            raise ValueError("the graph was closed")
        self._cuda.call("cudaGraphLaunch", self._handle, stream.handle)

    def close(self) -> None:
        """Frees it now. A second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._cuda.free("cudaGraphExecDestroy", handle)


class DeviceBuffer:
    """Bytes on the device, at a multiple of `ALIGNMENT`."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda = cuda
        self.size = size
        self._address: int | None = int(cuda.call("cudaMalloc", max(size, ALIGNMENT)))

    @property
    def address(self) -> int:
        """Where it is on the device."""
        if self._address is None:
            raise ValueError("the device memory was freed")
        return self._address

    def close(self) -> None:
        """Frees it now. A second call does nothing."""
        address, self._address = self._address, None
        if address is not None:
            self._cuda.free("cudaFree", address)


class PinnedBuffer:
    """Host memory that the device reads and writes by itself, seen as an array: copies need no stop in between."""

    def __init__(self, cuda: Cuda, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self._cuda = cuda
        kind = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        self.size = count * kind.itemsize
        self._address: int | None = int(cuda.call("cudaMallocHost", max(self.size, 1)))
        memory: Any = (ctypes.c_byte * self.size).from_address(self._address)
        self._array: npt.NDArray[Any] | None = np.frombuffer(memory, kind, count).reshape(tuple(shape))

    @property
    def array(self) -> npt.NDArray[Any]:
        """The memory itself. No view of it may be kept beyond `close`."""
        if self._array is None:
            raise ValueError("the pinned memory was freed")
        return self._array

    @property
    def address(self) -> int:
        """Where it is on the host."""
        if self._address is None:
            raise ValueError("the pinned memory was freed")
        return self._address

    def close(self) -> None:
        """Frees it now. A second call does nothing."""
        address, self._address, self._array = self._address, None, None
        if address is not None:
            self._cuda.free("cudaFreeHost", address)


def upload(cuda: Cuda, host: PinnedBuffer, device: DeviceBuffer, stream: Stream, start: int, stop: int) -> None:
    """Copies bytes `start` to `stop` of the host's buffer to the same place of the device's."""
    _check_span(host, device, start, stop)
    kind = cuda.bindings.cudaMemcpyKind.cudaMemcpyHostToDevice
    cuda.call("cudaMemcpyAsync", device.address + start, host.address + start, stop - start, kind, stream.handle)


def download(cuda: Cuda, device: DeviceBuffer, host: PinnedBuffer, stream: Stream) -> None:
    """Copies the whole of the device's buffer to the host's. It is there after the stream was waited for."""
    _check_span(host, device, 0, host.size)
    kind = cuda.bindings.cudaMemcpyKind.cudaMemcpyDeviceToHost
    cuda.call("cudaMemcpyAsync", host.address, device.address, host.size, kind, stream.handle)


def _check_span(host: PinnedBuffer, device: DeviceBuffer, start: int, stop: int) -> None:
    if not 0 <= start < stop <= min(host.size, device.size):
        raise ValueError(f"bytes {start} to {stop} of buffers of {host.size} (host) and {device.size} (device) bytes")
