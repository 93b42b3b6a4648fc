"""What is stored once: equal tensors, and entries of the first axis of a stored tensor."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from moebius_export.graph.weights_file import weights_file


def model_of(**arrays):
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return helper.make_model(helper.make_graph([], "g", [], [], stored))


def test_an_entry_of_a_stored_tensor_is_not_stored_again(tmp_path):
    rng = np.random.RandomState(0)
    both = rng.standard_normal((2, 32, 64)).astype(np.float32)  # entries of two pages
    odd = rng.standard_normal((2, 500)).astype(np.float32)  # entries of no whole pages
    first = model_of(both=both, odd=odd, same=both)
    second = model_of(one=both[1:], half=odd[1:])
    with weights_file(tmp_path, "w") as weights:
        weights.add(first)
        weights.add(second)
    places = {t.name: {e.key: e.value for e in t.external_data} for m in (first, second) for t in m.graph.initializer}
    assert places["same"]["offset"] == places["both"]["offset"]
    assert int(places["one"]["offset"]) == int(places["both"]["offset"]) + 2 * 4096
    assert int(places["half"]["offset"]) > int(places["odd"]["offset"]) + 500
    assert (tmp_path / "w").stat().st_size == int(places["half"]["offset"]) + 2000
    for model, name, expected in ((second, "one", both[1:]), (second, "half", odd[1:]), (first, "odd", odd)):
        onnx.load_external_data_for_model(model, str(tmp_path))
        (tensor,) = [t for t in model.graph.initializer if t.name == name]
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected)


def test_one_branchs_constants_are_the_bytes_of_both_branches(fused_bundle):
    """So that the conditional U-Net adds none of its own to the weights file of the guided one."""
    arrays = {}
    for file in ("model", "model_conditional"):
        model = onnx.load(fused_bundle / "unet" / f"{file}.onnx")
        arrays[file] = {
            tensor.name.replace(".inner", ""): numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
            if tensor.name.endswith(("attn2.keys", "attn2.values"))
        }
    assert len(arrays["model"]) == 2 * 6
    for name, both in arrays["model"].items():
        np.testing.assert_array_equal(both[1:], arrays["model_conditional"][name])
