"""JPEG files that end too early, as a broken transfer or an old camera leaves them: read as browsers show them."""

from __future__ import annotations

import io
from typing import BinaryIO

import numpy as np
from PIL import Image

from moebius_runtime.errors import InputError

_END = b"\xff\xd9"
_MOST_MISSING = 0.03
_UNIT = 16  # pixels: the largest side of a coded unit
_NOISE = b"\x5a\xa5\x3c\xc3\x69\x96" * 4096  # coded data that the missing part cannot have been
_SCAN_BYTES = 1 << 20


def whole_jpeg(stream: BinaryIO) -> tuple[BinaryIO, str] | None:
    """A JPEG that lacks its end, with the end marker that it lacks, and a note; None for a file with an end marker.

    What is missing is measured by two decodings: one with the end marker alone, for which libjpeg fills what is missing
    with flat colour, as browsers do, and one with random coded data before it. They are equal as far as the file goes.

    Raises:
        InputError: over 3 % of the picture is missing, or whole passes of a progressive one are.
    """
    if _has_end(stream):
        return None
    stream.seek(0)
    data = stream.read().rstrip(b"\xff")  # half a marker
    filled = _decoded(data + _END)
    same = (filled == _decoded(data + _NOISE + _END)).all(axis=2)
    rows = np.flatnonzero(~same.all(axis=1))
    missing, (height, width) = 0, same.shape
    if len(rows):
        first = int(rows[0])
        band = same[first : first + _UNIT]
        column = int(np.flatnonzero(~band.all(axis=0))[0])
        missing = band.shape[0] * (width - column) + width * max(0, height - first - _UNIT)
    share = missing / (height * width)
    if share > _MOST_MISSING or _lacks_scans(data):
        what = f"{share:.0%} of the picture is" if share > _MOST_MISSING else "its last passes are"
        raise InputError(f"the file is truncated: {what} missing. Get it again, whole.")
    note = "the file lacks its last bytes"
    note += (
        f"; {max(share, 0.0001):.2%} of the picture, at its end, is flat colour" if missing else ", no pixel is missing"
    )
    return io.BytesIO(data + _END), note


def _has_end(stream: BinaryIO) -> bool:
    """Whether an end marker comes after the last scan: at the very end, or before what some programs append."""
    stream.seek(0, 2)
    size = stream.tell()
    stream.seek(max(0, size - 2))
    if stream.read() == _END:
        stream.seek(0)
        return True
    # Coded data cannot contain the marker. Thumbnails do, and lie before the scan that is looked for.
    stream.seek(0)
    data = stream.read()
    stream.seek(0)
    return data.find(_END, _first_scan(data)) >= 0


def _first_scan(data: bytes) -> int:
    """Where the first scan's header begins, or the end of the data."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xDA:
            return place
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return len(data)


def _lacks_scans(data: bytes) -> bool:
    """Whether coefficients of a progressive JPEG never come at full precision (ITU-T T.81, G.1.1.1)."""
    frame = _segment(data, 0xC2, 0)
    if frame is None:
        return False
    components = data[frame + 9]
    precise = np.zeros((256, 64), bool)
    place = _first_scan(data)
    while 0 <= place < len(data) - 4:
        count = data[place + 4]
        header = data[place + 5 : place + 8 + 2 * count]
        if len(header) < 3 + 2 * count:
            break
        first, last, bits = header[2 * count : 2 * count + 3]
        if not bits & 15:
            precise[list(header[0 : 2 * count : 2]), first : last + 1] = True
        place = _segment_after(data, place + 4)
    identifiers = [data[frame + 10 + 3 * index] for index in range(components)]
    return not precise[identifiers].all()


def _segment(data: bytes, wanted: int, start: int) -> int | None:
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        if data[place + 1] == wanted:
            return place
        place += 1 if data[place + 1] == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _segment_after(data: bytes, place: int) -> int:
    """Where the next scan's header is: a marker inside coded data is followed by 0, or is a restart."""
    return data.find(b"\xff\xda", place)


def _decoded(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 [H, W, C]."""
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)  # [H, W] or [H, W, C] -> [H, W, C]
