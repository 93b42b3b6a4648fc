"""Pictures as people have them: read whole and upright, given to the network as RGB, written as they came.

Reading and writing keep bit depth, alpha, ICC profile and EXIF. Pixels that a format cannot hold are refused.
"""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, features

from moebius_runtime import colour, deep_colour
from moebius_runtime.errors import InputError
from moebius_runtime.exif import describing_exif, exif_bytes, upright_exif
from moebius_runtime.metadata import Metadata, read_metadata
from moebius_runtime.saving import check_can_save as check_can_save
from moebius_runtime.saving import picture_bytes as picture_bytes
from moebius_runtime.saving import save_picture as save_picture
from moebius_runtime.truncated import whole_jpeg

MIN_SIDE = 64
MAX_PIXELS = 100_000_000
INPUT_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", *["AVIF"] * features.check_module("avif"))
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# The orientation that undoes another: quarter turns undo each other, all else undoes itself.
INVERSE_ORIENTATION = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}

Mode = Literal["L", "RGB", "CMYK"]
_MODES: dict[int, Mode] = {1: "L", 3: "RGB", 4: "CMYK"}


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, upright, in its own colour numbers.

    Attributes:
        pixels: uint8 or uint16 [H, W, C], without alpha; C is 1 (L), 3 (RGB) or 4 (CMYK, 0 = no ink).
        mode: the meaning of the channels.
        alpha: [H, W] of the same type as `pixels`, or None; not premultiplied.
        icc_profile: the embedded profile's bytes. Numbers of L and RGB pictures are never converted by it.
        exif: the EXIF block, a TIFF header and directories without the "Exif" prefix; its orientation is 1.
        metadata: resolution, XMP and the like, see `moebius_runtime.metadata`.
        format: Pillow's name of the format that it was read from.
        usable_profile: whether `icc_profile` converts CMYK to sRGB and back; looked at for CMYK only.
        orientation: EXIF orientation of the stored pixels; `pixels` and `alpha` are upright already.
        notes: what reading could not keep, one sentence each, to be told to the user.
    """

    pixels: npt.NDArray[Any]
    mode: Mode
    alpha: npt.NDArray[Any] | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None
    metadata: Metadata = field(default_factory=Metadata)
    format: str | None = None
    usable_profile: bool = True
    orientation: int = 1
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def bits(self) -> int:
        """Bits a channel, 8 or 16."""
        return 8 * self.pixels.itemsize

    def turned(self, orientation: int) -> Picture:
        """The picture with pixels and alpha turned upright from an EXIF orientation."""
        alpha = None if self.alpha is None else _turned(self.alpha, orientation)
        return replace(self, pixels=_turned(self.pixels, orientation), alpha=alpha)

    def part(self, window: tuple[slice, slice]) -> Picture:
        """The picture cut to a window (rows, columns), without alpha, EXIF and metadata; the pixels are a view."""
        return replace(self, pixels=self.pixels[window], alpha=None, exif=None, metadata=Metadata())

    def to_rgb(self) -> npt.NDArray[np.uint8]:
        """Numbers for the network, uint8 [H, W, 3].

        Grey is repeated, 16 bits become round(v / 257), CMYK goes to sRGB (`colour.convert`).
        """
        pixels = colour.to_8_bits(self.pixels)
        if self.mode == "L":
            return np.repeat(pixels, 3, axis=2)
        return colour.convert(pixels, "CMYK", "RGB", self._cmyk_profile) if self.mode == "CMYK" else pixels

    def native_from_rgb(self, rgb: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The way back for a region: [h, w, 3] in 0..255 to this picture's channels and range, [h, w, C].

        RGB at 8 bits comes back as given. Otherwise the result is float32: grey by luma (ITU-R BT.601),
        CMYK from rounded sRGB (`colour.convert`), 16 bits times 257.
        """
        if self.mode == "RGB" and self.bits == 8:
            return rgb
        native = rgb.astype(np.float32)
        if self.mode == "L":
            native = native @ np.array([[0.299], [0.587], [0.114]], np.float32)  # [h, w, 3] -> [h, w, 1]
        elif self.mode == "CMYK":
            rounded = np.clip(native + 0.5, 0, 255).astype(np.uint8)
            native = colour.convert(rounded, "RGB", "CMYK", self._cmyk_profile).astype(np.float32)
        return native * np.float32(257) if self.bits == 16 else native

    @property
    def _cmyk_profile(self) -> bytes | None:
        return self.icc_profile if self.usable_profile else None

    def to_image(self) -> Image.Image:
        """A Pillow image, profile and EXIF in its `info`; 16 bits become 8, but for grey without alpha."""
        if self.mode == "L" and self.bits == 16 and self.alpha is None:
            image = Image.fromarray(np.ascontiguousarray(self.pixels[:, :, 0]))
        else:
            pixels = colour.to_8_bits(self.pixels)
            planes = [pixels[:, :, channel] for channel in range(pixels.shape[2])]
            if self.alpha is not None:
                planes.append(colour.to_8_bits(self.alpha))
            bands = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
            image = Image.merge(self.mode if self.alpha is None else f"{self.mode}A", bands)
        if self.icc_profile:
            image.info["icc_profile"] = self.icc_profile
        if self.exif:
            image.info["exif"] = b"Exif\0\0" + self.exif
        for name in ("dpi", "xmp", "comment"):
            if value := getattr(self.metadata, name):
                image.info[name] = value
        return image


@dataclass(frozen=True)
class NamedBytes:
    """The content of a picture file that has no path, such as standard input's, and what messages call it."""

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


def load_picture(path: str | Path | NamedBytes) -> Picture:
    """Reads a JPEG, PNG, WebP, TIFF, BMP, GIF or AVIF; its size is checked before any pixel is decoded.

    HEIC is read where the package pillow-heif is installed. A JPEG without its last bytes is read as browsers show
    it, with a note.

    Raises:
        InputError: there is no such file, it is not a whole picture of these formats, its shortest side is
            under 64 pixels, it has over 100 megapixels, or its colours have no white level (32-bit, Lab).
    """
    source = path if isinstance(path, NamedBytes) else Path(path)
    with _opened(source) as stream, _one_line_refusals(source):
        formats = (*INPUT_FORMATS, *_heif(stream))
        image = Image.open(stream, formats=formats)
        _check_size(image)
        whole, notes = stream, []
        if image.format in ("JPEG", "MPO") and (found := whole_jpeg(stream)):
            whole, note = found
            notes.append(note)
            image = Image.open(whole, formats=formats)
        return _picture(image, deep_colour.raw_mode(image), whole, notes)


def picture_from_image(image: Image.Image, name: str = "the image") -> Picture:
    """A `Picture` of a Pillow image, which is left as it is; checks, notes and errors as `load_picture`.

    `name` is what error messages call it. Anything but a Pillow image is refused.
    """
    if not isinstance(image, Image.Image):
        raise InputError(f"{name} is {_received(image)}")
    with _one_line_refusals(name):
        _check_size(image)
        raw = deep_colour.raw_mode(image)  # gone once the pixels are loaded
        return _picture(image.copy(), raw, None, [])


def _received(value: object) -> str:
    """What was given in place of a Pillow image, and how to make one of it."""
    if isinstance(value, np.ndarray):
        kind = f"a NumPy array, {value.dtype} {list(value.shape)}"
        return f"{kind}; expected a Pillow image. Convert it with PIL.Image.fromarray, uint8 [H, W] or [H, W, 3]."
    if isinstance(value, (str, Path)):
        return f"the path {str(value)!r}; expected a Pillow image. Open the file with PIL.Image.open."
    return f"of type {type(value).__name__}; expected a Pillow image (PIL.Image.Image)."


@contextmanager
def _opened(path: Path | NamedBytes) -> Iterator[BinaryIO]:
    """The file's stream; anything but a plain file is refused (a pipe would be waited for)."""
    if isinstance(path, NamedBytes):
        if not path.data:
            raise InputError(f"{path} is empty; expected a whole picture file.")
        yield io.BytesIO(path.data)
        return
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a plain file"
            raise InputError(f"{path} is {kind}; expected a picture file.")
        if not status.st_size:
            raise InputError(f"{path} is empty; expected a whole picture file.")
        stream = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}. Give an existing, readable picture.") from error
    with stream:
        yield stream


def _heif(stream: BinaryIO) -> list[str]:
    """["HEIF"] for a HEIC file, after Pillow was given the plugin that reads it."""
    head = stream.read(12)
    stream.seek(0)
    if head[4:8] != b"ftyp" or head[8:] not in _HEIF_BRANDS:
        return []
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        if head[8:] in (b"mif1", b"msf1"):  # AVIF files can have this brand too
            return []
        raise InputError("HEIC is read where `pip install pillow-heif` has been run; or save it as JPEG.") from error
    register_heif_opener()
    return ["HEIF"]


@contextmanager
def _one_line_refusals(name: str | Path | NamedBytes) -> Iterator[None]:
    """Whatever Pillow's readers raise on damaged or hostile bytes, as an `InputError` of one line."""
    expected = "expected a whole JPEG, PNG, WebP, TIFF, BMP, GIF or AVIF"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own size limit stands in for Pillow's bomb warning
            yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a picture that can be read; {expected}.") from error
    except Exception as error:  # the readers raise nearly every built-in class, struct.error and zlib.error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{name} cannot be decoded ({reason}); {expected}.") from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
        raise InputError(
            f"it is {width}x{height} pixels; expected a shortest side of {MIN_SIDE} or more and at most "
            f"{MAX_PIXELS // 1_000_000} megapixels. Resize it first."
        )


def _picture(image: Image.Image, raw: str, stream: BinaryIO | None, notes: list[str]) -> Picture:
    """From an image opened from `stream`, not yet loaded; or from one in memory, without a stream.

    `raw` is its raw mode before loading (`deep_colour.raw_mode`).
    """
    if getattr(image, "is_animated", False):
        notes.append("the file holds several pictures or frames; only the first was read")
    tags: dict[int, Any] = getattr(image, "tag_v2", {})
    _check_tiff(image, tags)
    metadata = read_metadata(image, stream)
    form = "JPEG" if image.format == "MPO" else image.format  # a JPEG that holds several
    # Before loading: Pillow turns a TIFF upright as it loads it, and takes the orientation out.
    exif, orientation = _tiff_exif(image, notes) if tags else None, 1
    stored = tags.get(ExifTags.Base.Orientation, 1)
    if stream is not None and deep_colour.can_read(raw):
        pixels, alpha = deep_colour.read(image, raw, stream, INPUT_FORMATS)
    else:
        pixels, alpha = _native(image)
        if raw[-4:-1] == ";16" and pixels.dtype == np.uint8:
            notes.append("its 16 bits a channel were read as 8")
        if pixels.dtype == np.uint16 and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            pixels = ~pixels  # white is zero: Pillow turns 8-bit grey round, but not 16-bit
    if tags.get(TiffImagePlugin.EXTRASAMPLES) and alpha is None:
        notes.append("its extra channels were dropped")
    if not tags:
        exif, orientation = _exif(image, notes)
        stored = orientation
    profile = image.info.get("icc_profile")
    if profile is not None and not (isinstance(profile, bytes) and profile):
        profile = None
        notes.append("its ICC profile is damaged and was dropped")
    mode = _MODES[pixels.shape[2]]
    problem = colour.profile_problem(profile) if profile and mode == "CMYK" else None
    if problem:
        notes.append(f"its ICC profile cannot convert CMYK ({problem}); plain conversion takes its place")
    return Picture(
        pixels=_turned(pixels, orientation),
        mode=mode,
        alpha=None if alpha is None else _turned(alpha, orientation),
        icc_profile=profile,
        exif=exif,
        metadata=metadata.turned() if orientation in (5, 6, 7, 8) else metadata,
        format=form,
        usable_profile=problem is None,
        orientation=stored if stored in INVERSE_ORIENTATION else 1,
        notes=tuple(notes),
    )


def _check_tiff(image: Image.Image, tags: dict[int, Any]) -> None:
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, 8)
    deepest = max(bits) if isinstance(bits, tuple) else bits
    if deepest == 12:
        raise InputError("it is a 12-bit picture. Convert it to 8 or 16 bits a channel.")
    if deepest > 8 and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and image.mode[0] != "I":
        raise InputError("it is a 16-bit TIFF with separate colour planes. Save it with interleaved ones.")


def _native(image: Image.Image) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Pixels [H, W, C] and alpha of what Pillow can hold: 8 bits a channel, or 16-bit grey."""
    if image.mode in ("I", "F", "LAB"):
        raise InputError(
            f"its colour mode is {image.mode} (32-bit or Lab), which has no white level to scale by. "
            "Convert it to grey, RGB or CMYK with 8 or 16 bits a channel."
        )
    image.load()
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16)[:, :, None]
        return grey, deep_colour.alpha_from_key(grey, image)
    base = "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    has_alpha = image.has_transparency_data and base != "CMYK"
    wanted = f"{base}A" if has_alpha else base
    values = np.asarray(image if image.mode == wanted else image.convert(wanted))
    values = values.reshape(*values.shape[:2], -1)  # [H, W] or [H, W, C] -> [H, W, C]
    return (values[:, :, :-1], values[:, :, -1]) if has_alpha else (values, None)


def _exif(image: Image.Image, notes: list[str]) -> tuple[bytes | None, int]:
    """The block to carry and the orientation to apply, of anything but TIFF."""
    block = image.info.get("exif")
    if isinstance(block, bytes) and block:
        try:
            return upright_exif(block)
        except ValueError as error:
            notes.append(f"its EXIF block is damaged ({error}) and was dropped")
            return None, 1
    found = image.getexif()  # where a PNG writer kept it as text, or XMP names the orientation
    orientation = found.pop(ExifTags.Base.Orientation, 1)
    return exif_bytes(found), orientation if isinstance(orientation, int) else 1


def _tiff_exif(image: Image.Image, notes: list[str]) -> bytes | None:
    try:
        return exif_bytes(describing_exif(image.getexif()))
    except Exception as error:  # as in `_one_line_refusals`, but the pixels may be sound
        notes.append(f"its descriptive tags are damaged ({type(error).__name__}) and were dropped")
        return None


def _turned(array: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """[H, W, ...] as it is meant to be seen (EXIF 2.32, tag 274), contiguous."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)  # [H, W, ...] -> [W, H, ...]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)
