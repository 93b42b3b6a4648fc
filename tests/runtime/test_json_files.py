"""The reader of small JSON files: every refusal is one line of the wanted class, and what is written reads back."""

import json
import os

import pytest
from pydantic import Field

from moebius_runtime.bundle.json_files import StrictModel, json_lines, read_json, write_json
from moebius_runtime.errors import BundleError
from moebius_runtime.files import read_plain


class Shelf(StrictModel):
    name: str
    books: dict[str, list[int]] = Field(default_factory=dict)


def test_written_files_read_back_and_hold_one_entry_a_line(tmp_path):
    content = {"name": 'a "b"\n', "books": {"x": [1, 2], "y": []}}
    write_json(content, tmp_path / "shelf.json")
    assert read_json(tmp_path / "shelf.json", Shelf, 1000, "a shelf", BundleError) == Shelf(**content)
    lines = (tmp_path / "shelf.json").read_text().splitlines()
    assert lines == ["{", ' "name": "a \\"b\\"\\n",', ' "books": {', '  "x": [1, 2],', '  "y": []', " }", "}"]
    for value in ({}, {"a": []}, {"a": {}}, {"a": [[1], {"b": None}], "c": {"d": {}}}):
        assert json.loads(json_lines(value)) == value


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "content: Invalid JSON"),
        (b"\xff\xfe", "content: Invalid JSON"),
        (b"[" * 900, "content: Invalid JSON"),
        (b'{"name": "a"' + b" " * 1024 + b"}", "over 1 KiB"),
        (b'{"name": 1}', "name: Input should be a valid string, got 1"),
        (b'{"name": "a", "colour\\u001b": 1, "size": 2}', "Extra inputs are not permitted, got 1 (and 1 more)"),
    ],
)
def test_refusals(tmp_path, data, problem):
    path = tmp_path / "bad\nname\x1b.json"
    path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        read_json(path, Shelf, 1024, "a shelf", BundleError)
    message = str(caught.value)
    assert problem in message
    assert message.endswith("; expected a shelf")
    assert message.isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # noqa: TID251
    for name, problem in (("none", "No such file"), (".", "it is a folder"), ("pipe", "it is not a plain file")):
        with pytest.raises(BundleError, match=problem):
            read_json(tmp_path / name, Shelf, 1024, "a shelf", BundleError)


def test_the_limit_is_the_largest_size_that_is_read(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 2048)
    assert len(read_plain(tmp_path / "f", 2048)) == 2048
    with pytest.raises(OSError, match="over 1 KiB"):
        read_plain(tmp_path / "f", 2047)
