"""Segmentation by click, with small models of SAM's and SAM 2's interfaces: an object has one colour."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from moebius_runtime.errors import InputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from moebius_serve.segmenter import Segmenter, checked_clicks  # noqa: E402

SIZE = 64  # of the small encoder's input


def value(name, kind, shape):
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def save(path, nodes, inputs, outputs, constants):
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def write_model(folder, sam2=False, **changes):
    """The encoder gives its input; the decoder's mask is where that is near the value at the first click."""
    F, node = onnx.TensorProto.FLOAT, onnx.helper.make_node
    embeddings = "image_embed" if sam2 else "image_embeddings"
    folder.mkdir()
    encoder_input = value("input_image", F, changes.get("encoder_shape", [1, 3, SIZE, SIZE]))
    features = value(embeddings, F, [1, 3, "s", "s"])
    save(
        folder / "vit_encoder.onnx", [node("Identity", ["input_image"], [embeddings])], [encoder_input], [features], {}
    )
    inputs = [
        value(embeddings, F, [1, 3, SIZE, SIZE]),
        value("point_coords", F, [1, "n", 2]),
        value("point_labels", F, [1, "n"]),
        value("mask_input", F, [1, 1, SIZE // 4, SIZE // 4]),
        value("has_mask_input", F, [1]),
    ]
    nodes = [
        node("Slice", ["point_coords", "zero", "one", "first_axis"], ["first"]),  # [1, 1, 2]
        node("Cast", ["first"], ["index"], to=onnx.TensorProto.INT64),
        node("Gather", ["index", "swap"], ["row_column"], axis=2),
        node("Transpose", [embeddings], ["last"], perm=[0, 2, 3, 1]),  # [1, S, S, 3]
        node("GatherND", ["last", "row_column"], ["colour"], batch_dims=1),  # [1, 1, 3]
        node("Reshape", ["colour", "as_map"], ["wanted"]),  # [1, 3, 1, 1]
        node("Sub", [embeddings, "wanted"], ["difference"]),
        node("Abs", ["difference"], ["distance"]),
        node("ReduceMax", ["distance"], ["far"], axes=[1], keepdims=1),
        node("Sub", ["near", "far"], ["low_res_masks"]),
        # What every prompt is: all of them reach the scores, so that a wrong one would be seen.
        node("ReduceSum", ["point_labels"], ["labels"], keepdims=0),
        node("ReduceMax", ["mask_input"], ["no_mask"], keepdims=0),
        node("Abs", ["labels"], ["labels_off"]),  # a click on the object, padding, and clicks beside it make 0
        node("Add", ["labels_off", "no_mask"], ["off"]),
        node("Add", ["off", "has_mask_input"], ["all_off"]),
        node("Sub", ["near", "all_off"], ["score"]),
        node("Reshape", ["score", "as_scores"], ["one_score"]),
        node("Neg", ["one_score"], ["other_score"]),
        node("Concat", ["other_score", "one_score"], ["iou_predictions"], axis=1),  # the second mask is the better
    ]
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "first_axis": np.array([1]),
        "swap": np.array([1, 0]),
        "as_map": np.array([1, 3, 1, 1]),
        "as_scores": np.array([1, 1]),
        "near": np.float32([0.5]),
    }
    if sam2:
        nodes += [
            node("Neg", ["low_res_masks"], ["not_it"]),
            node("Concat", ["not_it", "low_res_masks"], ["masks"], axis=1),
        ]
    else:  # as in SAM: to S x S, cut to what is not padding, to the picture's size
        inputs.append(value("orig_im_size", F, [2]))
        nodes += [
            node("ReduceMax", ["orig_im_size"], ["longest"], keepdims=1),
            node("Div", ["side", "longest"], ["factor"]),
            node("Mul", ["orig_im_size", "factor"], ["scaled"]),
            node("Round", ["scaled"], ["rounded"]),
            node("Cast", ["rounded"], ["ends"], to=onnx.TensorProto.INT64),
            node("Slice", ["low_res_masks", "starts", "ends", "axes"], ["cut"]),
            node("Cast", ["orig_im_size"], ["whole"], to=onnx.TensorProto.INT64),
            node("Concat", ["ones", "whole"], ["sizes"], axis=0),
            node("Resize", ["cut", "", "", "sizes"], ["resized"], mode="linear"),
            node("Neg", ["resized"], ["not_it"]),
            node("Concat", ["not_it", "resized"], ["masks"], axis=1),
        ]
        constants |= {"side": np.float32([SIZE]), "starts": np.array([0, 0]), "axes": np.array([2, 3])}
        constants |= {"ones": np.array([1, 1])}
    outputs = [value("masks", F, [1, 2, "h", "w"]), value("iou_predictions", F, [1, 2])]
    outputs.append(value("low_res_masks", F, [1, 1, "s", "s"]))
    if drop := changes.get("drop_output"):
        outputs = [one for one in outputs if one.name != drop]
    if extra := changes.get("extra_input"):
        inputs.append(value(extra, F, [1]))
        nodes.append(node("Identity", [extra], ["unused"]))
    save(folder / "vit_decoder.onnx", nodes, inputs, outputs, constants)
    return folder


def scene(height=90, width=140):
    """A red rectangle on grey."""
    rgb = np.full((height, width, 3), 90, np.uint8)
    rgb[30:60, 80:120] = (220, 30, 30)
    area = np.zeros((height, width), bool)
    area[30:60, 80:120] = True
    return rgb, area


def overlap(one, two):
    return (one & two).sum() / (one | two).sum()


@pytest.mark.parametrize("sam2", [False, True])
@pytest.mark.parametrize("shape", [(90, 140), (200, 130)])
def test_a_click_selects_the_object(tmp_path, sam2, shape):
    """Also off the diagonal and in portrait format: a click at the wrong place or a wrong padding selects the other."""
    segmenter = Segmenter(write_model(tmp_path / "m", sam2), 1)
    rgb, area = scene(*shape)
    assert (
        overlap(segmenter.segment(rgb, checked_clicks([[112, 38, 1]], shape)), area) > 0.8
    )  # the network sees cells of 2 to 3 pixels
    assert overlap(segmenter.segment(rgb, checked_clicks([[10, 70, 1], [100, 40, 0]], shape)), ~area) > 0.95


def test_a_picture_is_encoded_once(tmp_path):
    segmenter = Segmenter(write_model(tmp_path / "m"), 1)
    calls, real = [], segmenter._encoder

    class Counting:
        def run(self, *arguments):
            calls.append(1)
            return real.run(*arguments)

        def __getattr__(self, name):
            return getattr(real, name)

    segmenter._encoder = Counting()
    rgb, _ = scene()
    for x in (5, 100, 20):
        segmenter.segment(rgb, checked_clicks([[x, 40, 1]], rgb.shape[:2]))
    segmenter.segment(rgb[:, ::-1], checked_clicks([[5, 40, 1]], rgb.shape[:2]))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"encoder_shape": [1, 4, SIZE, SIZE]}, "expected one picture"),
        ({"encoder_shape": [1, 3, SIZE, SIZE + 1]}, "expected one picture"),
        ({"drop_output": "iou_predictions"}, "iou_predictions"),
        ({"extra_input": "box"}, "box"),
    ],
)
def test_other_models_are_refused(tmp_path, changes, word):
    with pytest.raises(InputError, match=word):
        Segmenter(write_model(tmp_path / "m", **changes), 1)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="one encoder and one decoder"):
        Segmenter(tmp_path / "none")
    folder = write_model(tmp_path / "m")
    (folder / "vit_decoder.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match="not a model that ONNX Runtime can load"):
        Segmenter(folder)


BAD_CLICKS = [None, [], [[1, 2]], [[1, 2, 3]], [[1, 2, 0]], [["1", 2, 1]], [[-1, 2, 1]], [[140, 2, 1]], [[1, 2, True]]]


@pytest.mark.parametrize("clicks", [*BAD_CLICKS, [[float("nan"), 2, 1]], {"x": 1}, [[1, 2, 1]] * 65, "[[1,2,1]]"])
def test_bad_clicks_are_refused(clicks):
    with pytest.raises(InputError, match="clicks"):
        checked_clicks(clicks, (90, 140))


def test_over_http(serve, draw, tmp_path):
    """The page's call and IOPaint's give the same mask, which `mask_from_picture` takes."""
    live = serve(segmenter=Segmenter(write_model(tmp_path / "m"), 1))
    assert live.client.get("/api/v1/defaults").json()["segmenter"] == "m"
    assert live.client.get("/api/v1/server-config").json()["plugins"][0]["name"] == "InteractiveSeg"
    rgb, area = scene()
    data = draw.png(rgb)
    own = live.post("/api/v1/select", files={"image": ("a.png", data)}, data={"clicks": "[[100, 40, 1]]"})
    assert (
        overlap(np.asarray(Image.open(io.BytesIO(own.content))) > 127, area) > 0.8
    )  # the network sees cells of 2 to 3 pixels
    body = {"name": "InteractiveSeg", "image": base64.b64encode(data).decode(), "clicks": [[100, 40, 1]], "scale": 1}
    theirs = live.post("/api/v1/run_plugin_gen_mask", json=body)
    assert theirs.content == own.content
    bad = live.post("/api/v1/select", files={"image": ("a.png", data)}, data={"clicks": json.dumps([[999, 1, 1]])})
    assert bad.status_code == 400
    assert live.post("/api/v1/run_plugin_gen_mask", json=body | {"name": "RemoveBG"}).status_code == 404
