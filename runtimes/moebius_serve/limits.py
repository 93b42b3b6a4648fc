"""What one server accepts: bytes, pixels, waiting jobs, seconds, and results that are kept."""

from __future__ import annotations

from dataclasses import dataclass, fields

from moebius_runtime.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Bounds of a server. Each one that is passed has its HTTP status.

    Attributes:
        body_bytes: of one request; 413.
        receiving_bytes: of the bodies of all requests that are underway, so that memory is bounded; 429.
        pixels: of one picture; 413.
        queue: jobs that wait or run; 429.
        pending_pixels: of all jobs that wait or run, so that the queue's memory is bounded; 429.
        head_seconds: for which a connection may stay without a whole request line and headers; it is closed.
        body_seconds: until a request's body is complete; 408.
        job_seconds: from the start of a job to its result; 408.
        kept_seconds: for which a result can be fetched; 404 after that.
        kept_results: results kept at most, the oldest go first; 404.
        kept_pixels: of all kept results; the oldest go first; 404.
    """

    body_bytes: int = 256 << 20
    receiving_bytes: int = 1 << 30
    pixels: int = 100_000_000
    queue: int = 16
    pending_pixels: int = 200_000_000
    head_seconds: float = 30.0
    body_seconds: float = 120.0
    job_seconds: float = 3600.0
    kept_seconds: float = 900.0
    kept_results: int = 64
    kept_pixels: int = 400_000_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise InputError(f"limit {field.name} is {value}; expected a number above 0")
