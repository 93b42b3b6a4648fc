import pytest

from moebius_bench.measure.variants import combine, parse_list
from moebius_runtime.errors import InputError


def names(*lists):
    return [variant.name for variant in combine(*lists)]


def test_every_combination_is_a_variant_named_by_what_differs():
    assert names(["a/b"], ["ort-cpu"], ["fp32"], [None], [None]) == ["ort-cpu"]
    assert names(["x/a", "x/b"], ["ort-cpu"], ["fp32"], [None], [None]) == ["a", "b"]
    assert names(["a"], ["ort-cpu"], ["fp32"], [1, 2], [10, None]) == [
        "ort-cpu 1 thread 10 steps",
        "ort-cpu 1 thread default steps",
        "ort-cpu 2 threads 10 steps",
        "ort-cpu 2 threads default steps",
    ]
    assert names(["a"], ["ort-cpu"], ["fp32", "fp16"], [None], [None]) == ["ort-cpu fp32", "ort-cpu fp16"]
    modes = combine(["a"], ["ort-cpu"], ["fp32"], [None], [None], ["reference", "fast"])
    assert [(variant.name, variant.mode) for variant in modes] == [
        ("ort-cpu reference", "reference"),
        ("ort-cpu fast", "fast"),
    ]


def test_bundles_of_one_folder_name_are_told_apart():
    assert names(["x/a", "y/a"], ["ort-cpu"], ["fp32"], [None], [None]) == ["x/a", "y/a"]


def test_the_same_variant_twice_is_refused():
    with pytest.raises(InputError, match="--threads: 2, 2 names one value twice"):
        combine(["a"], ["ort-cpu"], ["fp32"], [2, 2], [None])


def test_lists():
    assert parse_list(None, int, "--threads") == [None]
    assert parse_list("1, 4", int, "--threads") == [1, 4]
    assert parse_list("a,b", str, "--runtime") == ["a", "b"]


@pytest.mark.parametrize("text", ["0", "-1", "1,", "two", "1.5", ""])
def test_wrong_numbers_are_refused(text):
    with pytest.raises(InputError, match=r"--threads .*expected numbers from 1 on"):
        parse_list(text, int, "--threads")
