"""Bodies of `LocalLambda`: which one a target gets, and `moebius-export tune`."""

from moebius_export.lowering.lowering import (
    DEFAULT_TARGET,
    MAX_PLACES,
    TARGETS,
    Lowering,
    Side,
    Target,
    Tile,
    lowering_of,
    read_lowerings,
    shipped,
    write_lowerings,
)

__all__ = [
    "DEFAULT_TARGET",
    "MAX_PLACES",
    "TARGETS",
    "Lowering",
    "Side",
    "Target",
    "Tile",
    "lowering_of",
    "read_lowerings",
    "shipped",
    "write_lowerings",
]
