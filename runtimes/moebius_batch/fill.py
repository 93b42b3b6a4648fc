"""Fills pictures with a warm pipeline, one or several at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from moebius_batch.errors import StoreError
from moebius_batch.items import Item
from moebius_batch.job import Settings
from moebius_batch.keys import seed_of
from moebius_runtime import console
from moebius_runtime.commands.pairing import result_name
from moebius_runtime.errors import InputError, OutputError
from moebius_runtime.images.masks import BoolArray, load_mask
from moebius_runtime.images.pictures import NamedBytes, Picture, load_picture
from moebius_runtime.images.saving import OUTPUT_FORMATS, check_can_save, picture_bytes
from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline, InpaintResult, make_options


@dataclass(frozen=True)
class Filled:
    """A result file: its bytes, its name below the destination, and notes on what it could not keep."""

    data: bytes
    file: str
    notes: tuple[str, ...]


FAILURES = (InputError, OutputError, MemoryError)
"""Errors of one picture, which end no job."""

Failure = InputError | OutputError | MemoryError


@dataclass(frozen=True)
class _Read:
    """A picture that was read, with the pixels to fill, its options and the name of its result."""

    picture: Picture
    area: BoolArray
    options: InpaintOptions
    file: str


def result_file(item: Item) -> str:
    """Name of a picture's result: its key, and its own suffix or, for formats that are not written, `.png`."""
    suffix = PurePosixPath(result_name(PurePosixPath(item.file))).suffix
    return item.key + (suffix if suffix.lower() in OUTPUT_FORMATS else ".png")


class Filler:
    """A pipeline with the options of a job, which is opened when it is first needed and stays loaded."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._common: NamedBytes | None = None
        self._opened: InpaintPipeline | None = None

    @property
    def pipeline(self) -> InpaintPipeline:
        """The pipeline.

        Raises:
            MoebiusError: the bundle cannot be read or run on this machine, or does not serve the options.
        """
        if self._opened is None:
            settings = self._settings
            pipeline = InpaintPipeline.from_bundle(
                settings.bundle,
                settings.runtime,
                threads=settings.threads,
                memory="fast",
                precision=settings.precision,
                trust=settings.trust,
                device=settings.device,
            )
            pipeline.check(make_options(**settings.options), settings.batch)
            self._opened = pipeline
        return self._opened

    def take_notes(self) -> list[str]:
        """Notes of the runtime and of the options, which hold for all pictures."""
        notes = self.pipeline.backend.take_notes()
        return [*notes, *self.pipeline.option_notes(make_options(**self._settings.options))]

    def __call__(self, item: Item) -> Filled:
        """The result of a picture.

        Raises:
            InputError: the picture or its mask is missing, broken, changed or of a kind that cannot be filled.
            OutputError: the network's result is no picture, or the picture cannot be encoded.
        """
        read = self._read(item)
        return self._encoded(read, self.pipeline.inpaint(read.picture, read.area, read.options))

    def several(self, items: Sequence[Item]) -> list[Filled | Failure]:
        """The results of pictures that go through the network together, or, of a picture that fails, its error.

        Where one of them fails in the network, each goes through it alone, so that the others are filled.
        """
        found: dict[int, Filled | Failure] = {}
        reads: dict[int, _Read] = {}
        for index, item in enumerate(items):
            try:
                reads[index] = self._read(item)
            except FAILURES as error:
                found[index] = error
        requests = [(read.picture, read.area, read.options) for read in reads.values()]
        try:
            results = self.pipeline.inpaint_many(requests, batch=self._settings.batch)
        except FAILURES:
            return [found[index] if index in found else self._alone(item) for index, item in enumerate(items)]
        for (index, read), result in zip(reads.items(), results, strict=True):
            try:
                found[index] = self._encoded(read, result)
            except FAILURES as error:
                found[index] = error
        return [found[index] for index in range(len(items))]

    def _alone(self, item: Item) -> Filled | Failure:
        try:
            return self(item)
        except FAILURES as error:
            return error

    def _read(self, item: Item) -> _Read:
        settings = self._settings
        options: dict[str, Any] = {**settings.options, "seed": seed_of(item.key, settings.seed)}
        picture_file = NamedBytes(item.file, item.picture.read())
        mask_file = self._mask(item)
        with console.quiet_libraries():
            picture = load_picture(picture_file)
            file = result_file(item)
            check_can_save(picture, file)
            area = load_mask(mask_file, picture.shape, rotation=picture.orientation, **settings.masking)
        return _Read(picture, area, make_options(**options), file)

    def _encoded(self, read: _Read, result: InpaintResult) -> Filled:
        data, lost = picture_bytes(result.picture, read.file, self._settings.quality)
        common = self.pipeline.option_notes(read.options)
        own = [note for note in result.notes if note not in common]
        return Filled(data, read.file, (*read.picture.notes, *own, *lost))

    def _mask(self, item: Item) -> NamedBytes:
        if item.mask is not None:
            return NamedBytes(f"the mask of {item.file}", item.mask.read())
        common = self._settings.common_mask
        if common is None:
            raise InputError(f"{item.file} has no mask; give --masks, or KEY.mask.png beside it")
        if self._common is None:
            data = common.read()
            if self._settings.mask_sha256 not in (None, hashlib.sha256(data).hexdigest()):
                raise StoreError(
                    f"{common.url}, the mask of all pictures, is not the file that it was when the job began; put that "
                    "back, or start another job"
                )
            self._common = NamedBytes(common.url, data)
        return self._common
