"""One engine in the device's memory: its context, its buffers, and its work captured as a CUDA graph."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from moebius_runtime.backends.cuda import Cuda, DeviceBuffer, Graph, PinnedBuffer, Stream, download, upload
from moebius_runtime.backends.trt_library import Library
from moebius_runtime.cache import Kept
from moebius_runtime.errors import CudaError, EngineError, InputError
from moebius_runtime.manifest import GraphInfo, TensorInfo

SWITCH = "MOEBIUS_CUDA_GRAPHS"
_TYPES = {"float32": "FLOAT", "int64": "INT64"}  # the manifest's names and TensorRT's
_WORD = np.dtype(np.uint32)  # both types are whole words


def graphs_wanted() -> bool:
    """Whether work is to be captured: `MOEBIUS_CUDA_GRAPHS` is not `off`; `InputError` where it is anything else."""
    value = os.environ.get(SWITCH, "")
    if value not in ("", "off"):
        raise InputError(f"{SWITCH} is {value!r}; expected off, or nothing")
    return not value


class ActivationMemory:
    """The activation memory of all engines of a backend, which run one after the other: one allocation, the largest.

    When it has to grow, every context is given its new place, and forgets the graph that it captured with the old. A
    context that could not be given a place holds none: `provide` finds one before it runs, or raises.
    """

    def __init__(self, cuda: Cuda, library: Library) -> None:
        self._cuda = cuda
        self._library = library
        self._users: list[EngineRunner] = []
        self._provided: set[EngineRunner] = set()  # whose contexts have the address of `_buffer`
        self._buffer: DeviceBuffer | None = None

    @property
    def size(self) -> int:
        """Bytes that are allocated now."""
        return self._buffer.size if self._buffer else 0

    def join(self, user: EngineRunner) -> None:
        """Gives an engine's context its memory. The device must be idle.

        Raises:
            CudaError: there is not enough. Engines that were there before have theirs again, or get it by `provide`.
            EngineError: the library refuses the memory.
        """
        self._users.append(user)
        try:
            self.provide(user)
        except BaseException:
            self.leave(user)
            if self._users and self._buffer is None:
                with suppress(CudaError):  # there is less than before: their next run tries again, and says so
                    self._allocate()
            raise

    def provide(self, user: EngineRunner) -> None:
        """Makes sure that a joined engine's context has live memory; to be called before each run, the device idle.

        Raises:
            CudaError, EngineError: as `join`.
        """
        if user in self._provided:
            return
        if self._buffer is not None and self._buffer.size >= user.memory_needed:
            self._give(user, self._buffer)
        else:
            self._allocate()

    def _allocate(self) -> None:
        for user in self._users:
            user.forget_graph()
        self.close()  # before the larger one is taken: there may be no room for both
        self._buffer = DeviceBuffer(self._cuda, max(user.memory_needed for user in self._users))
        for user in self._users:
            self._give(user, self._buffer)

    def _give(self, user: EngineRunner, buffer: DeviceBuffer) -> None:
        self._library.give_memory(user.context, buffer.address, buffer.size)
        self._provided.add(user)

    def leave(self, user: EngineRunner) -> None:
        """What `join` gave is not used any more; with the last engine the memory goes."""
        self._provided.discard(user)
        if user in self._users:
            self._users.remove(user)
        if not self._users:
            self.close()

    def close(self) -> None:
        """Frees it now. No context has memory any more."""
        self._provided.clear()
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.close()


class EngineRunner:
    """A loaded engine.

    The first run of given shapes is put on the stream as it is: the library may compile and allocate in it. From the
    second on, the work and the copy of its result are one captured graph; inputs are copied before it, and of them
    only what has changed since the last run.
    """

    def __init__(
        self, library: Library, cuda: Cuda, stream: Stream, memory: ActivationMemory, engine: Any, info: GraphInfo
    ) -> None:
        self._library = library
        self._cuda = cuda
        self._stream = stream
        self._memory = memory
        self._info = info
        self._engine = engine
        self._buffers = ExitStack()
        self._bound: dict[str, tuple[PinnedBuffer, DeviceBuffer]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._graph: Graph | None = None
        self._runs = 0
        self._config = library.runtime_config(engine)
        self._kernels: Kept | None = None
        self._kernel_cache: Any = None
        self._library_captures = False
        self._captures = False
        self.context: Any = None
        self.memory_needed = library.memory_needed(engine)
        _check_tensors(library, engine, info)

    def start(self, kernels: Kept | None = None) -> None:
        """Makes the context.

        Args:
            kernels: where RTX's compiled kernels are kept between starts; None keeps them nowhere.
        """
        if kernels is not None and self._config is not None and hasattr(self._config, "create_runtime_cache"):
            self._kernels, self._kernel_cache = kernels, self._config.create_runtime_cache()
            earlier = kernels.read()
            if earlier is not None:
                self._kernel_cache.deserialize(earlier)  # False: of another driver or GPU; they are compiled anew
                self._library.forget_errors()
            self._config.set_runtime_cache(self._kernel_cache)
        wanted = graphs_wanted()
        self._library_captures = wanted and self._library.let_it_capture(self._config)
        self.context = self._library.context(self._engine, self._config)
        if wanted and not self._library_captures:
            self._captures = self._library.capturable(self.context, self._stream.handle)
        self._memory.join(self)

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The output, an array of the caller's own.

        Raises:
            EngineError: the engine was not built for such shapes, or TensorRT reports an error.
            CudaError: the device does.
        """
        self._memory.provide(self)
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._shapes:
            self._bind(shapes)
        for name, array in inputs.items():
            self._upload_changes(name, array)
        if self._graph is None and self._captures and self._runs:
            self._graph = self._stream.capture(self._enqueue)
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._enqueue()
        self._stream.synchronize()
        self._library.check(True, "an error was reported while an engine ran")
        self._runs += 1
        output, _ = self._bound[self._info.outputs[0].name]
        result: npt.NDArray[Any] = output.array.copy()
        return result

    def graph_in_words(self) -> str:
        """What replays the steps: `captured`, `by TensorRT-RTX`, `off`, or that it has not come to it."""
        if self._library_captures:
            return "by TensorRT-RTX"
        if self._graph is not None:
            return "captured"
        if self._captures:
            return "from the second run on"
        return "off" if not graphs_wanted() else "not capturable"

    def keep_kernels(self) -> str | None:
        """Writes what RTX compiled for the next start. Returns why that was not possible, or None."""
        if self._kernels is None or not self._shapes:
            return None
        return self._kernels.write(bytes(self._kernel_cache.serialize()))

    def forget_graph(self) -> None:
        """Drops the captured graph, whose addresses are no longer right; the second run from now captures a new one."""
        graph, self._graph, self._runs = self._graph, None, 0
        if graph is not None:
            graph.close()

    def close(self) -> None:
        """Frees everything, what uses other parts first."""
        self.forget_graph()
        self.context = None
        self._config = self._kernels = self._kernel_cache = None
        self._memory.leave(self)
        self._bound.clear()
        self._shapes = {}
        self._buffers.close()
        self._engine = None

    def _bind(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Buffers for inputs of these shapes and the output that follows from them, their addresses set once."""
        self.forget_graph()
        self._bound.clear()
        self._buffers.close()
        self._shapes = {}
        for name, shape in shapes.items():
            self._library.check(
                self.context.set_input_shape(name, shape),
                f"its engine was not built for {name} of shape {list(shape)}; build it with a range of batches that "
                "holds it",
            )
        unknown = self._library.made(self.context.infer_shapes, "the shapes of an engine do not fit")
        self._library.check(not unknown, f"shapes are missing of {', '.join(unknown)}")
        output = self._info.outputs[0]
        expected = {**shapes, output.name: tuple(self.context.get_tensor_shape(output.name))}
        for tensor in (*self._info.inputs, output):
            host = PinnedBuffer(self._cuda, expected[tensor.name], tensor.dtype)
            self._buffers.callback(host.close)
            device = DeviceBuffer(self._cuda, host.size)
            self._buffers.callback(device.close)
            set_ = self.context.set_tensor_address(tensor.name, device.address)
            self._library.check(set_, f"the address of {tensor.name} was refused")
            self._bound[tensor.name] = host, device
        for tensor in self._info.inputs:  # so that what is on the device is what is compared with
            host, device = self._bound[tensor.name]
            host.array.fill(0)
            upload(self._cuda, host, device, self._stream, 0, host.size)
        self._stream.synchronize()
        self._shapes = shapes

    def _upload_changes(self, name: str, array: npt.NDArray[Any]) -> None:
        """Copies the span from the first to the last changed word. The device is idle: it reads no buffer now."""
        host, device = self._bound[name]
        old, new = host.array.reshape(-1).view(_WORD), array.reshape(-1).view(_WORD)
        different = old != new
        first = int(different.argmax())
        if not different[first]:
            return
        last = different.size - int(different[::-1].argmax())
        old[first:last] = new[first:last]
        upload(self._cuda, host, device, self._stream, first * _WORD.itemsize, last * _WORD.itemsize)

    def _enqueue(self) -> None:
        """The engine's work and the copy of its output, put on the stream."""
        self._library.check(self.context.execute_async_v3(self._stream.handle), "an engine could not be run")
        host, device = self._bound[self._info.outputs[0].name]
        download(self._cuda, device, host, self._stream)


def _check_tensors(library: Library, engine: Any, info: GraphInfo) -> None:
    """Refuses an engine whose inputs and outputs are not the manifest's, or not in the device's memory."""
    trt = library.module
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for mode, tensors in ((trt.TensorIOMode.INPUT, info.inputs), (trt.TensorIOMode.OUTPUT, info.outputs)):
        found = {name: engine.get_tensor_dtype(name).name for name in names if engine.get_tensor_mode(name) == mode}
        stated = {tensor.name: _TYPES[tensor.dtype] for tensor in tensors}
        if found != stated:
            raise EngineError(
                f"an engine has {_listed(found)}, the manifest says {_listed(stated)}. Build the engines again."
            )
    for tensor in (*info.inputs, *info.outputs):
        if engine.get_tensor_location(tensor.name) != trt.TensorLocation.DEVICE:
            raise EngineError(f"an engine wants {tensor.name} in host memory, which none of ours does. Build it again.")
        _check_shape(engine.get_tensor_shape(tensor.name), tensor)


def _check_shape(shape: Sequence[int], tensor: TensorInfo) -> None:
    """Dimensions that the engine leaves open (-1) or the manifest does (a name) fit any."""
    fits = len(shape) == len(tensor.shape) and all(
        have == -1 or isinstance(want, str) or have == want for have, want in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise EngineError(
            f"an engine has {tensor.name} of shape {list(shape)}, the manifest says {tensor.shape}. Build it again."
        )


def _listed(tensors: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in tensors.items())
