"""The part of the CUDA runtime that the engines need, over NVIDIA's bindings, with errors as exceptions.

Resources are freed only by `close`, which may be called twice; no finaliser decides when device memory is freed. All
copies are asynchronous on the given stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from moebius_runtime.errors import CudaError, RuntimeUnavailableError

ALIGNMENT = 256  # bytes: the alignment of cudaMalloc, which TensorRT requires of its activation memory

# What to do about the errors that users meet. Other errors keep CUDA's own message.
_ADVICE = {
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
    """Loads the CUDA runtime and checks that it has a device.

    Raises:
        RuntimeUnavailableError: the bindings are not installed, or they find no device or no driver.
    """
    cuda = Cuda(_bindings())
    try:
        count = cuda.call("cudaGetDeviceCount")
    except CudaError as error:
        raise RuntimeUnavailableError(f"no GPU can be used: {error}") from error
    if not count:
        raise RuntimeUnavailableError(f"no GPU can be used: CUDA finds none. {_ADVICE['cudaErrorNoDevice']}.")
    return cuda


def _bindings() -> Any:
    """`cuda.bindings.runtime`, or `cuda.cudart`, its name before cuda-python 12.6."""
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
        """Calls a function of the CUDA runtime; returns its values after the error code, or None if there are none.

        Raises:
            CudaError: the code is not cudaSuccess. The error can come from an earlier call's work on the device.
        """
        code, *values = getattr(self.bindings, function)(*arguments)
        if int(code) != 0:
            self._lost = self._lost or str(getattr(code, "name", code)) in _LOST
            raise CudaError(self._message(function, code))
        return values[0] if len(values) == 1 else tuple(values) or None

    def free(self, function: str, handle: Any) -> None:
        """Frees a resource. After an error that makes the device unusable, errors are ignored."""
        try:
            self.call(function, handle)
        except CudaError:
            if not self._lost:
                raise

    def version(self) -> str:
        """The CUDA version of the bindings, such as 12.9."""
        number = int(self.call("cudaRuntimeGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    def _message(self, function: str, code: Any) -> str:
        name = str(getattr(code, "name", code))
        with suppress(Exception):  # the text only explains the name
            name += f" ({self.bindings.cudaGetErrorString(code)[1].decode()})"
        advice = _ADVICE.get(name.split()[0], "Look it up in the CUDA runtime's list of errors")
        return f"CUDA: {function} failed with {name}. {advice}."


class Stream:
    """A stream that does not wait for the default one."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._handle: Any = cuda.call("cudaStreamCreateWithFlags", int(cuda.bindings.cudaStreamNonBlocking))

    @property
    def handle(self) -> int:
        """Its address, for other libraries."""
        if self._handle is None:
            raise ValueError("the stream was closed")
        return int(self._handle)

    def synchronize(self) -> None:
        """Waits for all work on the stream; `CudaError` where any of it failed."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Captures the work that `work` puts on this stream as a graph, without running it.

        Raises:
            CudaError: some of the work cannot be captured. Exceptions of `work` itself are passed on.
        """
        cuda, bindings = self._cuda, self._cuda.bindings
        # Thread-local: CUDA calls of other threads neither fail nor break the capture.
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
    """Captured work, which can be launched any number of times."""

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
        """Its address on the device."""
        if self._address is None:
            raise ValueError("the device memory was freed")
        return self._address

    def close(self) -> None:
        """Frees it now. A second call does nothing."""
        address, self._address = self._address, None
        if address is not None:
            self._cuda.free("cudaFree", address)


class PinnedBuffer:
    """Page-locked host memory as an array, for asynchronous copies."""

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
        """Its address on the host."""
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
    """Copies the whole of the device's buffer to the host's. It is complete after the stream was synchronized."""
    _check_span(host, device, 0, host.size)
    kind = cuda.bindings.cudaMemcpyKind.cudaMemcpyDeviceToHost
    cuda.call("cudaMemcpyAsync", host.address, device.address, host.size, kind, stream.handle)


def _check_span(host: PinnedBuffer, device: DeviceBuffer, start: int, stop: int) -> None:
    if not 0 <= start < stop <= min(host.size, device.size):
        raise ValueError(f"bytes {start} to {stop} of buffers of {host.size} (host) and {device.size} (device) bytes")
