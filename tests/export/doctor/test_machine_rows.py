"""Rows of the machine, the GPU and the libraries, on machines that are played back."""

import pytest

from moebius_export.doctor import facts
from moebius_export.doctor.gpu import find_gpu, gpu_rows, nvidia_on_pci
from moebius_export.doctor.host import instructions, jetson_rows, memory_rows, processor_rows
from moebius_export.doctor.libraries import check_libraries, library_rows
from moebius_export.doctor.rows import Verdict
from moebius_export.doctor.runtimes import check_runtimes
from moebius_export.doctor.sources import Ran


def named(rows):
    return {row.name: row for row in rows}


def libraries(sources):
    gpu = find_gpu(sources)
    found = check_libraries(sources, gpu)
    return named(library_rows(sources, found)), {status.name: status for status in check_runtimes(found, gpu)}


def test_processors(machines, tmp_path):
    rows = named(processor_rows(machines.machine(tmp_path)))
    assert rows["processor"].found == "AMD EPYC"
    assert rows["instruction sets"].found == "avx2, fma, avx512f, avx512_vnni, avx512_bf16"
    assert {row.verdict for row in rows.values()} == {Verdict.ok}
    assert instructions(machines.ORIN_CPUINFO) == ["asimd", "asimddp"]
    assert instructions("") == []


def test_an_old_python_is_wrong(machines, tmp_path):
    row = named(processor_rows(machines.machine(tmp_path, python=(3, 8))))["python"]
    assert (row.found, row.verdict, row.fix) == ("3.8", Verdict.wrong, "install Python 3.10 or later")


def test_memory_and_disk(machines, tmp_path):
    rows = named(memory_rows(machines.machine(tmp_path), tmp_path / "not" / "yet"))
    assert rows["memory"].found == "19.4 GiB free of 23.5 GiB, no swap"
    assert rows["disk"].found == f"50.0 GiB free in {tmp_path}"
    machines.write(tmp_path, {"proc/meminfo": "MemTotal: 7803904 kB\nMemAvailable: 1048576 kB\n"})
    rows = named(memory_rows(machines.machine(tmp_path, free_disk=lambda path: 1 << 30), tmp_path))
    assert rows["memory"].verdict is Verdict.wrong
    assert rows["disk"].fix == "free some space: a bundle with engines takes 4.0 GiB"


def test_an_orin_nano(machines, tmp_path):
    sources = machines.orin(tmp_path)
    rows = named(jetson_rows(sources))
    assert rows["JetPack"].verdict is Verdict.ok
    assert "JetPack 6.1 or 6.2 (Jetson Linux 36.4.7), which ships TensorRT 10.3" in rows["JetPack"].found
    assert rows["power mode"].found == "2"
    assert "python of JetPack" not in rows
    gpu = find_gpu(sources)
    assert (gpu.sm, gpu.driver) == (87, "540.4.0")  # the board tells the one, the kernel the other
    assert named(gpu_rows(sources, gpu))["gpu"].fix.endswith("--runtime nvidia --group-add video)")


@pytest.mark.parametrize(
    ("l4t", "jetpack", "serves"),
    [("36.3.0", "JetPack 6.0", False), ("36.4.0", "JetPack 6.1 or 6.2", True), ("36.5.0", "JetPack 6.1 or 6.2", True)],
)
def test_releases_of_jetpack(machines, tmp_path, l4t, jetpack, serves):
    row = named(jetson_rows(machines.orin(tmp_path, l4t)))["JetPack"]
    assert row.found.startswith(jetpack)
    assert (row.verdict is Verdict.ok) is serves
    assert (row.fix is None) is serves


def test_a_jetson_of_unknown_release(machines, tmp_path):
    sources = machines.orin(tmp_path)
    (tmp_path / "etc/nv_tegra_release").write_text("nothing that is known\n")
    assert named(jetson_rows(sources))["JetPack"].verdict is Verdict.wrong
    assert facts.jetpack_of("28.1") is None
    assert facts.jetpack_of("38.4.0").name == "JetPack 7"


def test_an_environment_that_does_not_see_the_jetson_s_tensorrt(machines, tmp_path):
    (tmp_path / "usr/lib/python3.10/dist-packages/tensorrt").mkdir(parents=True)
    rows, runtimes = libraries(machines.orin(tmp_path))
    assert rows["tensorrt"].verdict is Verdict.wrong
    assert rows["tensorrt"].fix == "python3.10 -m venv --system-site-packages .venv"
    assert not runtimes["tensorrt"].usable
    # Another Python than the device's cannot load its modules at all.
    row = named(jetson_rows(machines.orin(tmp_path, python=(3, 12))))["python of JetPack"]
    assert row.fix == "python3.10 -m venv --system-site-packages .venv"


@pytest.mark.parametrize("version", ["540.4.0", "535.129.03", "580.173.02", "390.48"])
def test_driver_versions(machines, tmp_path, version):
    machines.write(tmp_path, {"proc/driver/nvidia/version": machines.DRIVERS[version]})
    assert find_gpu(machines.machine(tmp_path)).driver == version


@pytest.mark.parametrize("text", ["", "GCC version:  gcc version 12.2.0 (GCC)\n"])
def test_no_driver_version(machines, tmp_path, text):
    machines.write(tmp_path, {"proc/driver/nvidia/version": text})
    assert find_gpu(machines.machine(tmp_path)).driver is None


def test_a_machine_without_anything(machines, tmp_path):
    sources = machines.machine(tmp_path)
    gpu = find_gpu(sources)
    assert {row.verdict for row in gpu_rows(sources, gpu)} == {Verdict.missing}
    rows, runtimes = libraries(sources)
    assert [name for name, row in rows.items() if row.verdict is Verdict.ok] == ["compiled kernels"]
    assert all(row.fix for row in rows.values())
    assert not any(runtime.usable for runtime in runtimes.values())
    assert runtimes["torch"].reasons == ("PyTorch is not installed",)


def test_a_card_without_its_driver(machines, tmp_path):
    sources = machines.machine(tmp_path)
    folder = "sys/bus/pci/devices/0000:01:00"
    machines.write(tmp_path, {f"{folder}.1/vendor": "0x10de\n", f"{folder}.1/class": "0x040300\n"})
    assert not nvidia_on_pci(sources)  # the sound device of a card
    machines.write(tmp_path, {f"{folder}.0/vendor": "0x10de\n", f"{folder}.0/class": "0x030000\n"})
    row = named(gpu_rows(sources, find_gpu(sources)))["driver"]
    assert row.verdict is Verdict.wrong
    assert "on the PCI bus" in row.found


def test_a_driver_that_does_not_answer(machines, tmp_path):
    # What nvidia-smi says after an update of the driver without a reboot.
    said = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.173\n"
    sources = machines.machine(tmp_path, run=lambda arguments: Ran(18, said))
    row = named(gpu_rows(sources, find_gpu(sources)))["driver"]
    assert row.verdict is Verdict.wrong
    assert "Driver/library version mismatch NVML library version" in row.found


def test_a_desktop_where_everything_fits(machines, tmp_path):
    ask = machines.answers(
        device=machines.device(),
        onnxruntime=machines.ORT_GPU,
        tensorrt={"version": "11.4.1.21", "file": "x", "cuda": 13},
        tensorrt_rtx={"version": "1.7.1.116", "file": "x", "cuda": 13},
        cuda={"version": "13.0.3", "file": "x"},
        torch=machines.TORCH,
        triton={"version": "3.9.0"},
        openvino={"version": "2026.4.1", "devices": ["CPU AMD EPYC"]},
        **{"ort-webgpu": {"version": "0.4.0", "devices": ["GPU Arc", "GPU Iris"]}},
        **{"ort-openvino": {"version": "1.8.1", "devices": ["NPU Intel AI Boost"]}},
    )
    rows, runtimes = libraries(machines.machine(tmp_path, run=machines.smi(), ask=ask))
    assert {row.verdict for row in rows.values()} == {Verdict.ok}
    assert all(runtime.usable for runtime in runtimes.values())
    assert runtimes["tensorrt-rtx"].note == "on NVIDIA GeForce RTX 4070, SM 89"
    assert rows["onnxruntime"].found == "1.27.0, Tensorrt, CUDA, CPU"
    assert rows["WebGPU provider"].found == "0.4.0, GPU Arc; GPU Iris"
    assert runtimes["ort-webgpu"].note == "on GPU Arc; GPU Iris"


def test_providers_without_a_device(machines, tmp_path):
    ask = machines.answers(onnxruntime=machines.ORT, **{"ort-webgpu": {"version": "0.4.0", "devices": []}})
    rows, runtimes = libraries(machines.machine(tmp_path, ask=ask))
    assert rows["WebGPU provider"].found == "0.4.0, no device"
    assert runtimes["ort-webgpu"].reasons == ("the WebGPU provider lists no device",)
    assert rows["OpenVINO"].found == "not installed; for --runtime openvino, on CPUs, and on Intel's GPUs and NPUs"
    assert rows["OpenVINO"].fix == 'pip install "moebius-edge[openvino]"'
    assert runtimes["openvino"].reasons == ("OpenVINO is not installed",)


@pytest.mark.parametrize(
    ("words", "saturates", "expected"),
    [
        ("avx512vnni", False, "kernels avx512vnni"),
        ("avx512", False, "kernels avx512; INT8 is exact and gains little over fp32"),
        ("avx2", True, "exact only for weights of 7 bits"),
    ],
)
def test_what_int8_is_worth_on_this_processor(machines, tmp_path, words, saturates, expected):
    ask = machines.answers(kernels={"words": words}, onnxruntime={**machines.ORT_GPU, "saturates": saturates})
    _, runtimes = libraries(machines.machine(tmp_path, ask=ask))
    note = runtimes["ort-cpu"].note
    assert expected in note
    assert ("INT8" in note) is (words != "avx512vnni")
    assert ("saturate at 16 bits" in note) is saturates


def test_a_gpu_that_only_nvidia_smi_sees(machines, tmp_path):
    sources = machines.machine(tmp_path, run=machines.smi(), ask=machines.answers(onnxruntime=machines.ORT_GPU))
    gpu = find_gpu(sources)
    assert (gpu.device, gpu.name, gpu.sm, gpu.driver) == (None, "NVIDIA GeForce RTX 4070", 89, "580.173.02")
    assert named(gpu_rows(sources, gpu))["gpu"].verdict is Verdict.wrong
    _, runtimes = libraries(sources)
    assert [name for name, runtime in runtimes.items() if runtime.usable] == ["ort-cpu", "ort-cuda", "ort-tensorrt"]


@pytest.mark.parametrize(
    ("library", "version", "cuda", "device", "words"),
    [
        ("tensorrt", "8.6.2", 12, {}, "older than 10.3"),
        ("tensorrt", "10.7.0", 12, {"sm": 120}, "does not support SM 120; 10.8 is the first"),
        ("tensorrt", "10.7.0", 12, {"sm": 70}, "SM 70 is older than SM 75"),
        ("tensorrt", "11.4.1", 13, {"driver": "535.129.03"}, "needs driver 580 or later; found 535.129.03"),
        ("tensorrt", "11.4.1", 12, {"driver": "525.60.13"}, "needs driver 535 or later; found 525.60.13"),
        ("tensorrt_rtx", "1.7.1", 13, {"sm": 90}, "does not support SM 90; it supports 75, 80, 86, 89, 120, 121"),
        ("tensorrt_rtx", "1.7.1", 13, {"driver": "570.10"}, "made for CUDA 13, which needs driver 580"),
        ("cuda", "13.0.3", None, {"driver": "540.4.0"}, "made for CUDA 13, which needs driver 580"),
    ],
)
def test_versions_that_do_not_fit(machines, tmp_path, library, version, cuda, device, words):
    values = {library: {"version": version, "file": "x", "cuda": cuda}, "device": machines.device(**device)}
    rows, runtimes = libraries(machines.machine(tmp_path, ask=machines.answers(**values)))
    row = rows[{"tensorrt_rtx": "tensorrt-rtx", "cuda": "CUDA bindings"}.get(library, library)]
    assert row.verdict is Verdict.wrong
    assert words in row.found
    assert row.fix
    assert not runtimes["tensorrt"].usable
    assert not runtimes["tensorrt-rtx"].usable


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1", "11.4.1"])
def test_versions_that_fit(machines, tmp_path, version):
    values = {"tensorrt": {"version": version, "cuda": 12}, "device": machines.device(driver="550.54.15")}
    rows, _ = libraries(machines.machine(tmp_path, ask=machines.answers(**values)))
    assert rows["tensorrt"].verdict is Verdict.ok


def test_jetpack_6_cannot_take_tensorrt_11(machines, tmp_path):
    orin = machines.device("Orin", 87, "540.4.0", "12.6")
    ask = machines.answers(tensorrt={"version": "11.4.1", "cuda": None}, device=orin)
    rows, _ = libraries(machines.orin(tmp_path, ask=ask))
    assert "TensorRT 11.4.1 does not run on JetPack 6.1 or 6.2, which ships 10.3" in rows["tensorrt"].found
    ask = machines.answers(
        tensorrt={"version": "10.3.0", "cuda": None}, device=orin, cuda={"version": "12.6.2", "file": "x"}
    )
    rows, runtimes = libraries(machines.orin(tmp_path, ask=ask))
    assert rows["tensorrt"].verdict is Verdict.ok
    assert runtimes["tensorrt"].usable
    assert "there is none for aarch64" in rows["tensorrt-rtx"].found


def test_two_onnxruntimes_are_wrong(machines, tmp_path):
    conflict = "onnxruntime 1.27.0 and onnxruntime-gpu 1.27.0 are both installed and overwrite each other's files."
    rows, runtimes = libraries(machines.machine(tmp_path, ask=machines.answers(onnxruntime=conflict)))
    assert rows["onnxruntime"].verdict is Verdict.wrong
    assert rows["onnxruntime"].found == conflict
    assert runtimes["ort-cpu"].reasons == ("ONNX Runtime does not work",)


def test_a_torch_without_the_rest_of_the_export(machines, tmp_path):
    ask = machines.answers(torch=machines.TORCH | {"lacking": ["diffusers"]})
    _, runtimes = libraries(machines.machine(tmp_path, ask=ask))
    assert runtimes["torch"].reasons == ("diffusers not installed",)
