"""nvidia-smi's answers, played back."""

import pytest

from moebius_bench.measure.sensors import find_sensors
from moebius_runtime.hardware import nvidia


def smi(reasons_name="clocks_event_reasons.active", reasons="0x0000000000000000", apps=""):
    """A query function of a machine with two cards."""
    fields = {
        "index": ["0", "1"],
        "name": ["NVIDIA H100 80GB HBM3", "NVIDIA L4"],
        "driver_version": ["580.159.04"] * 2,
        "memory.total": ["81559", "23034"],
        "memory.used": ["4", "300"],
        "pstate": ["P0", "P8"],
        "temperature.gpu": ["31", "40"],
        "power.draw": ["71.55", "16.20"],
        "power.limit": ["700.00", "72.00"],
        "clocks.sm": ["1980", "210"],
        "clocks.mem": ["2619", "405"],
        "clocks.max.sm": ["1980", "[N/A]"],
        reasons_name: [reasons] * 2,
    }

    def query(arguments):
        if arguments[0] == "-L":
            return "GPU 0: NVIDIA H100 80GB HBM3\n"
        if arguments[0].startswith("--query-compute-apps"):
            return apps
        wanted = arguments[0].removeprefix("--query-gpu=").split(",")
        if any(name not in fields for name in wanted):
            return None  # as nvidia-smi refuses a field that it does not know
        return "\n".join(", ".join(fields[name][card] for name in wanted) for card in (0, 1)) + "\n"

    return query


def test_cards_are_described():
    first, second = nvidia.describe_gpus(smi())
    assert first["name"] == "NVIDIA H100 80GB HBM3"
    assert (first["driver"], first["clock_sm_mhz"], first["power_w"]) == ("580.159.04", "1980", "71.55")
    assert first["throttling"] == "none"
    assert "clock_sm_max_mhz" not in second  # what the card does not tell is left out


def test_older_drivers_name_the_reasons_otherwise():
    first, _ = nvidia.describe_gpus(smi("clocks_throttle_reasons.active", "0x0000000000000024"))
    assert first["throttling"] == "software power cap, software thermal slowdown"


def test_a_driver_that_tells_no_reasons():
    assert "throttling" not in nvidia.describe_gpus(smi("something_else"))[0]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("0x0000000000000001", "none"),  # idle is no throttling
        ("0x0000000000000004", "software power cap"),
        ("0x00000000000000C8", "hardware slowdown, hardware thermal slowdown, hardware power brake"),
        ("[N/A]", "unknown ([N/A])"),
    ],
)
def test_throttling_in_words(mask, words):
    assert nvidia.throttling(mask) == words


def test_power_and_memory():
    query = smi(apps="1234, 500\n77, 20\n1234, 12\n99, [N/A]\n")
    assert nvidia.power_draw(query) == pytest.approx(71.55 + 16.20)
    assert nvidia.process_memory(1234, query) == 512 << 20
    assert nvidia.process_memory(99, query) is None
    assert nvidia.process_memory(5, query) is None


def test_a_machine_without_cards():
    def nothing(arguments):
        return None

    assert nvidia.describe_gpus(nothing) == []
    assert nvidia.power_draw(nothing) is None
    assert nvidia.process_memory(1, nothing) is None


def test_sensors_of_a_machine_with_cards(tmp_path):
    sensors = find_sensors(tmp_path, smi(apps="1, 2\n"))
    assert sensors.power() == pytest.approx(87.75)
    assert "cards alone" in sensors.power_source
    assert sensors.memory(1) == 2 << 20
    assert find_sensors(tmp_path, lambda arguments: None).power is None
