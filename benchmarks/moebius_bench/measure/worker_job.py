"""The job that a worker process gets from its parent, as JSON on its standard input."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Job(BaseModel):
    """The work of one process: measure pictures, profile, count MACs, measure the machine's rate, or export unfused.

    Attributes:
        bundle: its folder; for the torch baseline, the bundle whose network is run.
        threads: None leaves the number to the runtime.
        steps: None takes the bundle's default.
        mode: the mode of `moebius-inpaint`. reference is the original's procedure.
        image, mask: files; None draws a picture and a mask from `seed`.
        warmup_steps: denoising steps of the first picture, which is not measured; 1 or more.
        repeats: number of measured pictures.
        baseline: whether runtime `torch` means the unfused network in eager PyTorch, not the runtime of that name.
        weights, vae: sources for the torch baseline; None takes the random test weights that the manifest names.
        out: a .npy file for the filled picture, uint8 [H, W, 3]; for an export, the folder of the bundle.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["measure", "profile", "cost", "rate", "export"]
    runtime: str
    bundle: str = ""
    precision: str = "fp32"
    threads: int | None = None
    steps: int | None = None
    mode: str = "reference"
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
