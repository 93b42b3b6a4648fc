"""The body of `LocalLambda` for a target: its kind, and a tile per resolution, in a JSON file.

    {"ort-cpu": {"form": "tiles", "tiles": {"64": [2, 8], "32": [2, 8], "16": [1, 16]}}}

A tile is [Ty, Tx] positions; a side that the file leaves out has `moebius.network.lambda_ops.default_tile`. The shipped
choices are in `lowerings.json`; `moebius-export tune` writes such a file for this machine. Files are validated.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from moebius.network.lambda_ops import default_tile
from moebius_export.errors import ExportError
from moebius_runtime.bundle.json_files import read_json, write_json

Target = Literal["ort-cpu", "tensorrt", "webgpu", "generic"]
TARGETS: tuple[Target, ...] = get_args(Target)
DEFAULT_TARGET: Target = "ort-cpu"

MAX_PLACES = 256
"""Positions of a tile. The shifted kernels hold the window once per position: 147 MB a layer at 256 of 16x16."""
_MAX_BYTES = 64 << 10
_EXAMPLE = '{"ort-cpu": {"form": "tiles", "tiles": {"64": [2, 8]}}}'

Side = Annotated[int, Field(ge=1, le=1024)]
Tile = tuple[Side, Side]


class Lowering(BaseModel):
    """The body of `LocalLambda`: one of `moebius_export.graph.functions.FORMS`, and the tile (Ty, Tx) of each side."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    form: Literal["tiles", "convolution"] = "tiles"
    tiles: Annotated[dict[Side, Tile], Field(max_length=32)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole_tiles(self) -> Lowering:
        for side, (tall, wide) in self.tiles.items():
            if side % tall or side % wide:
                raise ValueError(f"tiles of {tall}x{wide} do not divide {side}x{side}")
            if tall * wide > MAX_PLACES:
                raise ValueError(f"tiles of {tall}x{wide} have {tall * wide} positions, at most {MAX_PLACES} are taken")
        return self

    def tile(self, side: int) -> tuple[int, int]:
        """The tile of a picture of `side` x `side` positions."""
        return self.tiles.get(side) or default_tile(side, side)


_FILE = TypeAdapter(dict[Target, Lowering])


@lru_cache(maxsize=1)
def shipped() -> Mapping[Target, Lowering]:
    """The shipped choices, one for each of `TARGETS`."""
    return read_lowerings(Path(__file__).with_name("lowerings.json"))


def read_lowerings(path: str | Path) -> Mapping[Target, Lowering]:
    """Returns target -> lowering of a validated file.

    Raises:
        ExportError: the file is missing or is not valid.
    """
    expected = f"lowerings such as {_EXAMPLE}; `moebius-export tune BUNDLE` writes them"
    return read_json(path, _FILE, _MAX_BYTES, expected, ExportError)


def lowering_of(path: str | Path, target: Target) -> Lowering:
    """The lowering of one target in a file; `ExportError` also where the file has none for it."""
    lowerings = read_lowerings(path)
    if target not in lowerings:
        raise ExportError(
            f"{path} has lowerings for {', '.join(lowerings) or 'no target'}, none for {target}; "
            "choose another --target, or add one"
        )
    return lowerings[target]


def write_lowerings(lowerings: Mapping[Target, Lowering], path: str | Path) -> None:
    """Writes a file that `read_lowerings` reads, whole or not at all."""
    write_json({target: lowering.model_dump() for target, lowering in lowerings.items()}, path)
