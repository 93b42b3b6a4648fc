"""What the parent asks of a worker process, as JSON on its standard input."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Job(BaseModel):
    """One process's work: a picture measured, a profile taken, costs counted, the machine's rate, a plain export.

    Attributes:
        bundle: its folder; for the torch baseline, the bundle whose network is run.
        threads: None leaves the number to the runtime.
        steps: None takes the bundle's default.
        image, mask: files; None draws a picture and a mask from `seed`.
        warmup_steps: denoising steps of the first, uncounted picture, 1 or more.
        repeats: counted pictures.
        baseline: runtime torch is then the network as written, in eager PyTorch, and not the runtime of that name.
        weights, vae: sources for the torch baseline; None takes what the manifest says of stand-in weights.
        out: a .npy file for the filled picture, uint8 [H, W, 3]; for an export, the folder of the bundle.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["measure", "profile", "cost", "rate", "export"]
    runtime: str
    bundle: str = ""
    precision: str = "fp32"
    threads: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    image: str | None = None
    mask: str | None = None
    warmup_steps: int = 1
    repeats: int = 1
    baseline: bool = False
    weights: str | None = None
    vae: str | None = None
    out: str | None = None
