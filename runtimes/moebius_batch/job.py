"""The settings of a job: how its pictures are filled, and the record of it that the destination keeps."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from moebius_batch.items import Blob
from moebius_batch.sources import Source
from moebius_runtime.bundle.manifest import Precision

Write = Literal["folder", "tars"]


class Settings(BaseModel):
    """What a worker needs beside its shards. JSON of it goes to other processes and machines.

    Attributes:
        bundle: path of the bundle, which every worker must reach.
        runtime: see `moebius_runtime.backends.create_backend`, as `device`, `precision`, `trust` and `threads`.
        batch: pictures that go through the network at once.
        options: keywords of `make_options`, but the seed.
        masking: keywords of `load_mask`.
        seed: of the job; with the key it gives a picture's seed.
        quality: of JPEG and AVIF results.
        out: the destination, a path or URL.
        write: pictures in folders, or one tar a shard.
        source: the source, a path or URL, for the check that a worker on another machine reaches it.
        mask: fields of the `Blob` of the mask for all, or None.
        mask_sha256: digest of its bytes.
        retry_failed: fill pictures again that failed before.
        scratch: folder for copies of remote tars; None takes the system's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str
    runtime: str = "ort-cpu"
    device: str | None = None
    precision: Precision | None = None
    trust: bool = False
    threads: int | None = None
    batch: int = 1
    options: dict[str, Any] = {}
    masking: dict[str, Any] = {}
    seed: int = 0
    quality: int = 95
    out: str
    write: Write = "folder"
    source: str = ""
    mask: dict[str, Any] | None = None
    mask_sha256: str | None = None
    retry_failed: bool = False
    scratch: str | None = None

    @property
    def common_mask(self) -> Blob | None:
        """The mask of all pictures without their own."""
        return None if self.mask is None else Blob(**self.mask)


def record(settings: Settings, source: Source, where: str, bundle_sha256: str) -> dict[str, Any]:
    """Everything that the results follow from, as JSON: two jobs with equal records write equal bytes.

    Args:
        settings: the job's settings. Bundle path, threads, retries and, on a CPU, the batch change no byte and are left
            out.
        source: the listed source.
        where: the source as given, for messages.
        bundle_sha256: digest of the bundle's manifest, which holds the hashes of its files.
    """
    kept = settings.model_dump(
        include={"runtime", "device", "precision", "options", "masking", "seed", "quality", "write"}
    )
    return {
        "schema_version": 1,
        "source": where,
        "kind": source.kind,
        "pictures": source.pictures,
        "shards": len(source.shards),
        "list_sha256": source.fingerprint,
        "mask_sha256": settings.mask_sha256,
        "bundle_sha256": bundle_sha256,
        **settings.model_dump(include=set(kept)),
    }


def mask_fields(mask: Blob | None) -> dict[str, Any]:
    """`Settings.mask` and `Settings.mask_sha256` of the mask for all, which is read; errors as `Store.read`."""
    if mask is None:
        return {}
    return {"mask": asdict(mask), "mask_sha256": hashlib.sha256(mask.read()).hexdigest()}
