"""Readers of the machine, on file trees as the systems lay them out."""

import pytest

from moebius_bench.measure import machine
from moebius_bench.measure.sensors import find_sensors
from moebius_runtime.hardware import jetson


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cores(count, low, high, now):
    """cpufreq of `count` cores, kHz."""
    files = {}
    for cpu in range(count):
        folder = f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        files |= {
            f"{folder}/scaling_governor": "schedutil\n",
            f"{folder}/scaling_min_freq": f"{low}\n",
            f"{folder}/scaling_max_freq": f"{high}\n",
            f"{folder}/scaling_cur_freq": f"{now}\n",
        }
    return files


def rails(address, channels, number=1):
    """One INA3221: (label, millivolts, milliamperes) per channel."""
    folder = f"sys/bus/i2c/drivers/ina3221/1-00{address}/hwmon/hwmon{number}"
    files = {f"{folder}/name": "ina3221\n"}
    for index, (label, volts, amperes) in enumerate(channels, start=1):
        files |= {
            f"{folder}/in{index}_label": f"{label}\n",
            f"{folder}/in{index}_input": f"{volts}\n",
            f"{folder}/curr{index}_input": f"{amperes}\n",
        }
    # the sum channel of the driver has a label and no current of its own
    return files | {f"{folder}/in7_label": "sum of shunt voltages\n", f"{folder}/in7_input": "12\n"}


MODES = (
    "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n\n< POWER_MODEL ID=1 NAME=7W >\nCPU_ONLINE CORE_0 1\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
)


@pytest.fixture
def orin_nano(tmp_path):
    """An Orin Nano developer kit with JetPack 6, as its device tree, nvpmodel and sensors look."""
    gpu = "sys/class/devfreq/17000000.gpu"
    return write(
        tmp_path,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\x00",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
            "etc/nvpmodel.conf": MODES,
            "var/lib/nvpmodel/status": "pmode:0002\n",
            f"{gpu}/min_freq": "306000000\n",
            f"{gpu}/max_freq": "1020000000\n",
        }
        | cores(6, 729600, 1728000, 1510400)
        | rails("40", [("VDD_IN", 5040, 1480), ("VDD_CPU_GPU_CV", 5032, 520), ("VDD_SOC", 5040, 300)]),
    )


def test_an_orin_nano(orin_nano):
    assert jetson.is_jetson(orin_nano)
    assert jetson.describe_jetson(orin_nano) == {
        "jetson_release": "L4T 36.4.3",
        "nvpmodel": "2 (MAXN_SUPER)",
        "jetson_clocks": "off",
        "power_rails": "VDD_IN, VDD_CPU_GPU_CV, VDD_SOC",
    }
    # The input rail is the whole; the others are parts of it and are not added.
    assert jetson.total_power(orin_nano) == pytest.approx(5.040 * 1.480)
    facts = machine.describe_machine(orin_nano)
    assert facts["board"] == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert facts["governor"] == "schedutil"
    assert facts["clock"] == "1510 to 1510 of 1728 MHz"


def test_pinned_clocks_are_seen(orin_nano):
    write(orin_nano, cores(6, 1728000, 1728000, 1728000))
    assert jetson.describe_jetson(orin_nano)["jetson_clocks"] == "partly: 6 of 7 clocks are pinned"
    write(orin_nano, {"sys/class/devfreq/17000000.gpu/min_freq": "1020000000\n"})
    assert jetson.describe_jetson(orin_nano)["jetson_clocks"] == "on"


def test_an_agx_orin_s_power_is_the_sum_of_three_rails(tmp_path):
    root = write(
        tmp_path,
        {"proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\x00"}
        | rails("40", [("VDD_GPU_SOC", 19000, 210), ("VDD_CPU_CV", 19000, 80), ("VIN_SYS_5V0", 4960, 900)])
        | rails("41", [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 4960, 200), ("NC", 0, 0)], number=2),
    )
    assert jetson.total_power(root) == pytest.approx(19 * 0.210 + 19 * 0.080 + 4.96 * 0.900)
    assert set(jetson.read_rails(root)) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}
    assert "nvpmodel" not in jetson.describe_jetson(root)


def test_rails_that_are_not_known_to_be_the_whole_are_no_total(orin_nano):
    write(orin_nano, rails("40", [("VDD_GPU", 5040, 1480), ("VDD_CPU", 5032, 520), ("VDD_SOC", 5040, 300)]))
    assert jetson.total_power(orin_nano) is None
    assert find_sensors(orin_nano, lambda arguments: "").power is None


def test_another_sensor_chip_is_not_read(orin_nano):
    write(orin_nano, {"sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/name": "lm90\n"})
    assert jetson.read_rails(orin_nano) == {}


def test_a_rail_that_cannot_be_read_is_left_out(orin_nano):
    write(orin_nano, {"sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input": "\n"})
    assert set(jetson.read_rails(orin_nano)) == {"VDD_CPU_GPU_CV", "VDD_SOC"}
    assert jetson.total_power(orin_nano) is None


def test_sensors_of_a_jetson_are_the_board_s_own(orin_nano):
    sensors = find_sensors(orin_nano, lambda arguments: pytest.fail("no nvidia-smi on a Jetson"))
    assert sensors.power() == pytest.approx(5.040 * 1.480)
    assert "VDD_IN" in sensors.power_source
    assert sensors.memory is None  # shared with the processor


def test_a_machine_without_anything_readable(tmp_path):
    facts = machine.describe_machine(tmp_path)
    assert not {"board", "governor", "clock", "memory", "load_average"} & facts.keys()
    assert {"architecture", "cores", "python"} <= facts.keys()
    assert not jetson.is_jetson(tmp_path)
    assert jetson.describe_jetson(tmp_path) == {}


def test_a_server(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC\ncpu MHz\t\t: 2445.420\n\n"
            "processor\t: 1\nmodel name\t: AMD EPYC\ncpu MHz\t\t: 2600.000\n",
            "proc/meminfo": "MemTotal:       24650944 kB\nMemFree:  1000 kB\nMemAvailable:   12325472 kB\n",
            "proc/loadavg": "1.23 0.99 0.50 2/345 6789\n",
            "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\n',
        },
    )
    facts = machine.describe_machine(root)
    assert facts["cpu"] == "AMD EPYC"
    assert facts["clock"] == "2445 to 2600 MHz (as /proc/cpuinfo states)"
    assert facts["memory"] == "23.5 GiB, 11.8 GiB free at the start"
    assert facts["load_average"] == "1.23"
    assert facts["system"] == "Debian GNU/Linux 12 (bookworm)"


def test_installed_sizes_follow_the_needs():
    sizes = machine.installed_sizes(["pydantic"])
    assert {"pydantic", "pydantic-core", "typing-extensions", "moebius_runtime"} <= sizes.keys()
    assert sizes["pydantic-core"] > 1_000_000  # a compiled library
    assert "email-validator" not in sizes  # an extra of pydantic's
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert machine.installed_sizes(["no-such-distribution"]).keys() == {"moebius_runtime"}
