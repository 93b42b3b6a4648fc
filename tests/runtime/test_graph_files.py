"""The walk over an ONNX file finds every place where it can name another file."""

from __future__ import annotations

import pytest

from moebius_runtime.bundle.graph_files import _MESSAGES, external_files

onnx = pytest.importorskip("onnx")

NAMES = {  # ours: ONNX's
    "Model": "ModelProto",
    "Training": "TrainingInfoProto",
    "Graph": "GraphProto",
    "Function": "FunctionProto",
    "Node": "NodeProto",
    "Attribute": "AttributeProto",
    "SparseTensor": "SparseTensorProto",
    "Tensor": "TensorProto",
    "Entry": "StringStringEntryProto",
}


def outside(location: str, name: str = "w"):
    tensor = onnx.TensorProto(name=name, data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_no_way_to_a_tensor_is_missing():
    """By ONNX's own descriptors: every field whose message leads to a tensor is walked, and no other."""
    descriptors = {ours: getattr(onnx, theirs).DESCRIPTOR for ours, theirs in NAMES.items()}
    ours = {descriptor.full_name: name for name, descriptor in descriptors.items()}
    leading = {descriptors["Tensor"].full_name}
    while True:  # all messages from which a tensor can be reached
        found = {
            message.full_name
            for message in onnx.ModelProto.DESCRIPTOR.file.message_types_by_name.values()
            if any(field.message_type and field.message_type.full_name in leading for field in message.fields)
        }
        if found <= leading:
            break
        leading |= found
    assert leading <= ours.keys()
    for name, descriptor in descriptors.items():
        if name in ("Entry", "Tensor"):
            continue
        expected = {
            field.number: ours[field.message_type.full_name]
            for field in descriptor.fields
            if field.message_type and field.message_type.full_name in leading
        }
        assert _MESSAGES[name] == expected, name
    (external,) = [field for field in descriptors["Tensor"].fields if field.name == "external_data"]
    assert _MESSAGES["Tensor"] == {external.number: "Entry"}


def test_every_place_is_found(tmp_path):
    helper = onnx.helper
    model = onnx.ModelProto(ir_version=10)
    model.graph.initializer.append(outside("initializer"))
    sparse = onnx.SparseTensorProto(values=outside("values"), indices=outside("indices"))
    model.graph.sparse_initializer.append(sparse)
    node = model.graph.node.add(op_type="Constant")
    node.attribute.append(helper.make_attribute("value", outside("attribute")))
    node.attribute.append(helper.make_attribute("values", [outside("list")]))
    node.attribute.append(helper.make_attribute("sparse", sparse))
    inner = onnx.GraphProto()
    inner.initializer.append(outside("inner"))
    deeper = onnx.GraphProto()
    deeper.node.add(op_type="If").attribute.append(helper.make_attribute("then_branch", inner))
    node.attribute.append(helper.make_attribute("body", deeper))
    node.attribute.append(helper.make_attribute("bodies", [deeper]))
    function = model.functions.add(name="f")
    function.node.add(op_type="Constant").attribute.append(helper.make_attribute("value", outside("function")))
    function.attribute_proto.append(helper.make_attribute("default", outside("default")))
    model.training_info.add().algorithm.initializer.append(outside("training"))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    places = "initializer values indices attribute list inner function default training"
    assert external_files(path) == set(places.split())


def test_inline_weights_name_no_file(tmp_path):
    model = onnx.ModelProto(ir_version=10)
    model.graph.initializer.add(name="w", data_type=1, dims=[4], raw_data=b"location" * 2)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert external_files(tmp_path / "m.onnx") == set()


def bytes_field(number: int, data: bytes, tag_bytes: int = 0) -> bytes:
    tag = number << 3 | 2
    encoded = bytes([tag]) if tag_bytes < 2 else bytes([tag | 0x80, *[0x80] * (tag_bytes - 2), 0])
    return encoded + bytes([len(data)]) + data


ENTRY = bytes_field(1, b"location") + bytes_field(2, b"out")


@pytest.mark.parametrize(
    "entry",
    [
        ENTRY,
        bytes_field(2, b"out") + bytes_field(1, b"location"),  # in the other order
        bytes_field(1, b"offset") + ENTRY,  # the last of repeated fields counts
        bytes_field(2, b"in") + ENTRY + b"\x18\x01",  # beside a field that ONNX does not know
        bytes_field(1, b"location", tag_bytes=3) + bytes_field(2, b"out", tag_bytes=2),  # longer than needed
    ],
)
def test_unusual_but_legal_spellings(tmp_path, entry):
    data = bytes_field(7, bytes_field(5, bytes_field(13, entry)))
    parsed = onnx.ModelProto.FromString(data).graph.initializer[0].external_data[0]
    assert (parsed.key, parsed.value) == ("location", "out")  # so does a runtime read it
    (tmp_path / "m.onnx").write_bytes(data)
    assert "out" in external_files(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 20,
        b"\x3a",  # a field without length
        b"\x3a\x05abc",  # longer than the file
        b"\x09\x00",  # eight bytes of which one is there
        b"\x3b\x3c",  # a group
        b"\x3a\x06" + b"\x2a\x7f" + b"abcd",  # a field that reaches out of its message, not out of the file
        bytes([0xBA, 0x80, 0x80, 0x80, 0x10, 0]),  # field 7 with a bit beyond the 32nd
        bytes_field(7, bytes_field(5, bytes_field(13, bytes_field(1, b"location") + bytes_field(2, b"\xff")))),
    ],
)
def test_what_is_no_protocol_buffer_of_onnx(tmp_path, data):
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ValueError):
        external_files(tmp_path / "m.onnx")


def nested(levels: int) -> bytes:
    """Graphs in attributes of nodes of graphs, each three messages deeper."""
    data = bytes_field(5, bytes_field(13, ENTRY))
    for _ in range(levels):
        for number in (6, 5, 1):
            data = bytes([number << 3 | 2, len(data) & 0x7F | 0x80, len(data) >> 7]) + data
    return bytes([7 << 3 | 2, len(data) & 0x7F | 0x80, len(data) >> 7]) + data


def test_endless_nesting(tmp_path):
    (tmp_path / "m.onnx").write_bytes(nested(30))
    assert external_files(tmp_path / "m.onnx") == {"out"}
    (tmp_path / "m.onnx").write_bytes(nested(40))
    with pytest.raises(ValueError, match="nested too deeply"):
        external_files(tmp_path / "m.onnx")


def test_a_missing_file(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        external_files(tmp_path / "m.onnx")
