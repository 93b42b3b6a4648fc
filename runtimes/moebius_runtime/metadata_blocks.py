"""The blocks that hold metadata: PNG chunks, XMP packets, Photoshop's image resources. Their content is hostile."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

MAX_BYTES = 16 << 20
"""The most that is kept of one picture's metadata of a kind."""

_TIFF_NAMESPACE = rb"http://ns\.adobe\.com/tiff/1\.0/"
_XMP_NAMESPACE = rb"http://ns\.adobe\.com/xap/1\.0/"
_IMAGE_NAMESPACE = rb"http://ns\.adobe\.com/xap/1\.0/g/img/"
_NAME = rb"[\w.-]{1,64}"


def png_chunk(name: bytes, data: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_chunks(stream: BinaryIO) -> Iterator[tuple[bytes, bytes | None]]:
    """(type, data) of a PNG's chunks but those of its pixels; data is None over `MAX_BYTES`.

    The stream's position is put back at the end. A chunk with a wrong checksum, which decoders pass over or refuse,
    is left out.
    """
    before = stream.tell()
    try:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name == b"IEND":
                return
            if name in (b"IDAT", b"fdAT") or length > MAX_BYTES:
                if length > MAX_BYTES and name not in (b"IDAT", b"fdAT"):
                    yield name, None
                stream.seek(length + 4, 1)
                continue
            data, checksum = stream.read(length), stream.read(4)
            if checksum == struct.pack(">I", zlib.crc32(name + data)):
                yield name, data
    finally:
        stream.seek(before)


def photoshop_resources(block: bytes) -> dict[int, bytes]:
    """{number: data} of a block of image resources, as far as it is whole (Adobe Photoshop File Formats, 2019)."""
    found: dict[int, bytes] = {}
    place = 0
    while block[place : place + 4] == b"8BIM" and place + 7 <= len(block):
        (code,) = struct.unpack_from(">H", block, place + 4)
        place += 6 + (block[place + 6] + 2) // 2 * 2  # the name: its length, its bytes, padded to even
        if place + 4 > len(block):
            break
        (size,) = struct.unpack_from(">I", block, place)
        if place + 4 + size > len(block):
            break
        found[code] = block[place + 4 : place + 4 + size]
        place += 4 + (size + 1) // 2 * 2
    return found


def packed_resources(resources: dict[int, bytes]) -> bytes:
    """The block of image resources, which have no names."""
    return b"".join(
        b"8BIM" + struct.pack(">HHI", code, 0, len(data)) + data + b"\0" * (len(data) % 2)
        for code, data in sorted(resources.items())
    )


def upright_xmp(packet: bytes) -> tuple[bytes | None, list[str]]:
    """An XMP packet with orientation 1 and without thumbnails, and what was taken out, in words.

    The packet is text to us, not parsed as XML, which could expand entities without end.
    """
    packet = packet.rstrip(b"\0")
    if b"\0" in packet or not packet:
        return None, ["XMP that is not UTF-8"] if packet else []
    lost = []
    for prefix in _prefixes(packet, _TIFF_NAMESPACE, b"tiff"):
        packet = re.sub(rb"(\b" + prefix + rb":Orientation\s*=\s*[\"'])\s*\d{1,3}\s*(?=[\"'])", rb"\g<1>1", packet)
        packet = re.sub(rb"(<" + prefix + rb":Orientation\s*>)\s*\d{1,3}\s*(?=<)", rb"\g<1>1", packet)
    before = len(packet)
    names = [prefix + b":Thumbnails" for prefix in _prefixes(packet, _XMP_NAMESPACE, b"xmp")]
    names += [prefix + b":image" for prefix in _prefixes(packet, _IMAGE_NAMESPACE, b"xmpGImg")]
    try:
        for name in names:
            packet = _without_element(packet, name)
    except ValueError:
        return None, ["XMP that is damaged"]
    for prefix in _prefixes(packet, _IMAGE_NAMESPACE, b"xmpGImg"):
        packet = re.sub(rb"\s" + prefix + rb":image\s*=\s*(?:\"[^\"]*\"|'[^']*')", b"", packet)
    if len(packet) != before:
        lost.append("the old XMP thumbnail")
    return packet, lost


def _prefixes(packet: bytes, namespace: bytes, usual: bytes) -> set[bytes]:
    """What stands for a namespace in the packet, escaped for an expression."""
    bound = re.findall(rb"xmlns:(" + _NAME + rb")\s*=\s*[\"']" + namespace + rb"[\"']", packet)
    return {re.escape(prefix) for prefix in [usual, *bound[:8]]}


def _without_element(packet: bytes, name: bytes) -> bytes:
    """The packet without elements of this (escaped) name, found in time linear in its length."""
    parts, place = [], 0
    opening, closing = re.compile(b"<" + name + rb"(?=[\s/>])[^<>]*>"), re.compile(b"</" + name + rb"\s*>")
    while found := opening.search(packet, place):
        end = found if found[0].endswith(b"/>") else closing.search(packet, found.end())
        if end is None:
            raise ValueError("an element of the packet has no end")
        parts.append(packet[place : found.start()])
        place = end.end()
    return b"".join([*parts, packet[place:]])
