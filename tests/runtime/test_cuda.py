"""The wrapper over CUDA, and that the fakes notice what they are there to notice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime.backends.cuda import Cuda, DeviceBuffer, PinnedBuffer, Stream, download, load_cuda, upload
from moebius_runtime.errors import CudaError

_spec = importlib.util.spec_from_file_location("gpu", Path(__file__).with_name("gpu.py"))
gpu = sys.modules.setdefault("gpu", importlib.util.module_from_spec(_spec))
if not hasattr(gpu, "Machine"):
    _spec.loader.exec_module(gpu)
Error, Kind, Mode = gpu.fake_cuda.Error, gpu.fake_cuda.MemcpyKind, gpu.fake_cuda.CaptureMode
DOWN = Kind.cudaMemcpyDeviceToHost


@pytest.fixture
def fake(monkeypatch):
    fake = gpu.fake_cuda.FakeCuda()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def cuda(fake):
    return load_cuda()


@pytest.fixture
def parts(cuda):
    """A stream, and 8 floats on the host and on the device."""
    stream, host, device = Stream(cuda), PinnedBuffer(cuda, (2, 4), np.float32), DeviceBuffer(cuda, 32)
    return stream, host, device


def test_there_and_back(cuda, fake, parts):
    stream, host, device = parts
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    host.array[...] = values
    upload(cuda, host, device, stream, 0, 32)
    stream.synchronize()
    host.array.fill(0)
    download(cuda, device, host, stream)
    assert not host.array.any()  # it was not waited for
    stream.synchronize()
    assert np.array_equal(host.array, values)
    for part in (host, device, stream):
        part.close()
        part.close()  # the second does nothing
    assert fake.leaks() == []
    with pytest.raises(ValueError, match="was freed"):
        host.array  # noqa: B018
    with pytest.raises(ValueError, match="was closed"):
        stream.handle  # noqa: B018
    with pytest.raises(ValueError, match="was freed"):
        device.address  # noqa: B018


@pytest.mark.parametrize(("start", "stop"), [(-4, 8), (0, 36), (8, 8), (8, 4)])
def test_copies_stay_inside(cuda, parts, start, stop):
    stream, host, device = parts
    with pytest.raises(ValueError, match=r"of buffers of 32 \(host\) and 32 \(device\) bytes"):
        upload(cuda, host, device, stream, start, stop)


def test_a_graph_is_launched_again_and_again(cuda, fake, parts):
    stream, host, device = parts
    graph = stream.capture(lambda: upload(cuda, host, device, stream, 0, 32))
    for value in (1.0, 2.0):
        host.array.fill(value)
        graph.launch(stream)
        stream.synchronize()
        assert (fake.span(device.address, 32).view(np.float32) == value).all()
    assert fake.graphs == {}
    graph.close()
    assert fake.executables == {}
    with pytest.raises(ValueError, match="was closed"):
        graph.launch(stream)


def test_work_that_raises_ends_its_capture(cuda, fake, parts):
    stream, host, device = parts

    def work():
        upload(cuda, host, device, stream, 0, 32)
        raise KeyError("bug")

    with pytest.raises(KeyError):
        stream.capture(work)
    assert not fake.capturing()
    assert fake.graphs == {}
    stream.synchronize()


@pytest.mark.parametrize("illegal", ["allocate", "wait"])
def test_what_cannot_be_captured(cuda, fake, parts, illegal):
    stream = parts[0]
    work = stream.synchronize if illegal == "wait" else lambda: DeviceBuffer(cuda, 1)
    with pytest.raises(CudaError, match=r"cudaErrorStreamCaptureUnsupported \(the words for 900\).*GRAPHS=off"):
        stream.capture(work)
    assert not fake.capturing()


def test_errors_have_their_name_and_what_to_do(cuda, fake):
    fake.room = 100
    with pytest.raises(CudaError, match=r"cudaMalloc failed with cudaErrorMemoryAllocation \(.*Close what else uses"):
        DeviceBuffer(cuda, 1000)
    fake.failing["cudaStreamCreateWithFlags"] = Error.cudaErrorInvalidValue
    with pytest.raises(CudaError, match=r"cudaErrorInvalidValue .*list of errors"):
        Stream(cuda)


def test_nothing_is_hidden_by_frees_that_cannot_be(cuda, fake, parts):
    stream, host, device = parts
    fake.broken = Error.cudaErrorInvalidValue  # an error that does not end the use of the device
    with pytest.raises(CudaError, match=r"cudaFree failed"):
        device.close()
    fake.broken = Error.cudaErrorIllegalAddress
    with pytest.raises(CudaError, match=r"cudaStreamSynchronize failed with cudaErrorIllegalAddress"):
        stream.synchronize()
    host.close()


def test_the_version(cuda):
    assert cuda.version() == "12.9"


# --- the fake: each of these is what a bug of ours would do ----------------------------------------------------


def test_the_fake_notices_freed_memory(cuda, fake, parts):
    stream, host, device = parts
    address = device.address
    device.close()
    assert fake.cudaFree(address) == (Error.cudaErrorInvalidValue,)
    assert fake.cudaMemcpyAsync(host.address, address, 32, DOWN, stream.handle) == (Error.cudaErrorInvalidValue,)


def test_the_fake_notices_memory_that_is_freed_before_the_work_is_done(cuda, fake, parts):
    stream, host, device = parts
    graph = stream.capture(lambda: download(cuda, device, host, stream))
    device.close()
    graph.launch(stream)
    with pytest.raises(CudaError, match=r"cudaErrorIllegalAddress"):
        stream.synchronize()


def test_the_fake_notices_copies_beyond_the_end_and_pageable_memory(cuda, fake, parts):
    stream, host, device = parts
    pageable = np.zeros(8, np.float32)
    for target, size in ((host.address, 33), (host.address + 4, 32), (pageable.ctypes.data, 32)):
        code = fake.cudaMemcpyAsync(target, device.address, size, DOWN, stream.handle)
        assert code == (Error.cudaErrorInvalidValue,)


def test_the_fake_notices_a_stream_that_is_gone(cuda, fake, parts):
    stream, host, device = parts
    graph = stream.capture(lambda: download(cuda, device, host, stream))
    handle = stream.handle
    stream.close()
    assert fake.cudaGraphLaunch(graph._handle, handle) == (Error.cudaErrorInvalidResourceHandle,)
    assert fake.cudaStreamSynchronize(handle) == (Error.cudaErrorInvalidResourceHandle,)
    assert fake.cudaStreamDestroy(handle) == (Error.cudaErrorInvalidResourceHandle,)


def test_the_fake_notices_leaks(cuda, fake, parts):
    graph = parts[0].capture(lambda: None)
    assert sorted(leak.rpartition(" ")[0] for leak in fake.leaks()) == [
        "device memory",
        "graph executable",
        "pinned memory",
        "stream",
    ]
    graph.close()


# --- the fakes against the real ones, where those are installed ------------------------------------------------


def public(kind: object) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_the_real_bindings_have_what_the_fake_has():
    real = pytest.importorskip("cuda.bindings.runtime", reason="the wheel cuda-bindings is not installed (extra trt)")
    names = {name for name in dir(gpu.fake_cuda.FakeCuda) if name.startswith("cuda")}
    assert {name for name in names if not hasattr(real, name)} == set()
    for code in Error:
        assert int(getattr(real.cudaError_t, code.name)) == code
    if load_is_impossible(real):
        with pytest.raises(CudaError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
            Stream(Cuda(real))


def load_is_impossible(real) -> bool:
    code, count = real.cudaGetDeviceCount()
    return int(code) != 0 or not count


def test_the_real_rtx_has_what_the_fake_has():
    real = pytest.importorskip("tensorrt_rtx", reason="the wheel tensorrt-rtx is not installed (extra trt-rtx)")
    fake = gpu.fake_runtime
    module = fake.fake_runtime(gpu.fake_cuda.FakeCuda(), "1.7.1.116", rtx=True)
    ours = {"cuda", "rtx", "has_size_v1", "has_size_v2", "has_set_device_memory", "alive", "most_alive", "runs"}
    assert {name for name in public(module) - ours if not hasattr(real, name)} == set()
    for name in ("Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache", "Refitter"):
        extra = {"complain", "allocation", "cache", "content", "module"}  # the fake's own
        assert {one for one in public(getattr(fake, name)) - extra if not hasattr(getattr(real, name), one)} == set()
    for name in ("get_engine_validity",):
        assert hasattr(real.Runtime, name)
    for name in ("set_device_memory", "is_stream_capturable"):
        assert hasattr(real.IExecutionContext, name)
    for name in ("device_memory_size_v2", "create_runtime_config"):
        assert hasattr(real.ICudaEngine, name)
    assert not hasattr(real.ICudaEngine, "device_memory_size")
