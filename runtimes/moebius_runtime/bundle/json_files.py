"""Small JSON files that may come from anywhere: precision plans, quantization plans, lowerings.

They are models of pydantic, which takes a while to import. The runtime itself reads none of them and does not import
this module; what it reads is in `moebius_runtime.bundle.checked`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from moebius_runtime.bundle.checked import first_problem
from moebius_runtime.console import one_line
from moebius_runtime.errors import MoebiusError
from moebius_runtime.files import atomic_write, read_plain

T = TypeVar("T")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShortText = Annotated[str, Field(max_length=1000)]


class StrictModel(BaseModel):
    """Base of checked files: refuses unknown fields, other types and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def read_json(
    path: str | Path, schema: type[T] | TypeAdapter[T], limit: int, expected: str, raised: type[MoebiusError]
) -> T:
    """Returns the content of a JSON file, validated by a pydantic model.

    Args:
        path: the file.
        schema: the model, or a `TypeAdapter` of any type.
        limit: largest size in bytes. A larger file is not read to its end.
        expected: what the file should hold and which command writes it, for the error message.
        raised: class of the error.

    Raises:
        MoebiusError: of class `raised`, on one line: the file is missing, too large, not JSON, or a field is wrong
            (the first of them is named).
    """
    adapter = schema if isinstance(schema, TypeAdapter) else TypeAdapter(schema)
    try:
        return adapter.validate_json(read_plain(path, limit))
    except OSError as error:
        raise raised(one_line(f"{path}: {error.strerror}; expected {expected}")) from error
    except ValueError as error:  # pydantic's is one
        raise raised(one_line(f"{path}: {first_problem(error)}; expected {expected}")) from error


def json_lines(content: Mapping[str, Any]) -> bytes:
    """Returns an object as JSON with one line per field, and one per entry of a field that is an object or a list.

    Such a file stays readable, and can be edited and compared line by line.
    """
    lines = []
    for key, value in content.items():
        text = json.dumps(value)
        if value and isinstance(value, dict):
            entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            text = f"{{\n{entries}\n }}"
        elif value and isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def write_json(content: Mapping[str, Any], path: str | Path) -> None:
    """Writes an object in the layout of `json_lines`, whole or not at all; errors as `atomic_write`."""
    with atomic_write(path) as stream:
        stream.write(json_lines(content))
