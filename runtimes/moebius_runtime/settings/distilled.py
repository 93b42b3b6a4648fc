"""What a bundle of a distilled network can serve: one guidance scale, and perhaps one sampler for a few steps."""

from __future__ import annotations

from moebius_runtime.bundle.manifest import Manifest
from moebius_runtime.errors import InputError
from moebius_runtime.settings.modes import Settings
from moebius_runtime.settings.options import InpaintOptions


def distilled_settings(settings: Settings, options: InpaintOptions, manifest: Manifest) -> Settings:
    """The values of a run on this bundle.

    A bundle with distilled guidance runs at that scale. A bundle for sampler `lcm` runs with it, in every mode and with
    no more steps than it recommends, unless the options give a number.

    Raises:
        InputError: an option that the bundle's network cannot serve.
    """
    made_for = manifest.defaults.sampler
    if (made_for == "lcm") != (settings.sampler == "lcm") and options.sampler is not None:
        if made_for == "lcm":
            raise InputError(
                f"sampler {options.sampler!r}: this bundle's network was distilled for sampler lcm; leave --sampler out"
            )
        raise InputError(
            "sampler 'lcm': this bundle's network was not distilled for it; use ddim, dpmpp-2m or unipc, or a bundle "
            "that was (docs/distill.md)"
        )
    if made_for == "lcm":
        steps = (
            settings.steps if options.steps is not None else min(settings.steps, manifest.defaults.num_inference_steps)
        )
        settings = settings._replace(sampler="lcm", steps=steps)
    if manifest.guidance is None:
        return settings
    if options.guidance_interval is not None:
        raise InputError(
            "guidance interval: this bundle's network has its guidance inside, at every step; leave it out, or use a "
            "bundle of the network before its distillation"
        )
    scale, asked = manifest.guidance.distilled, options.guidance_scale
    if asked is not None and asked != scale:
        raise InputError(
            f"guidance scale {asked:g}: this bundle's network was distilled at {scale:g} and has no other; leave "
            "--guidance-scale out, or use a bundle of the network before its distillation"
        )
    return settings._replace(guidance_scale=scale, guidance_interval=None)


def distilled_notes(settings: Settings, manifest: Manifest) -> list[str]:
    """A note where more steps are run than a bundle for sampler `lcm` recommends."""
    recommended = manifest.defaults.num_inference_steps
    if settings.sampler != "lcm" or settings.steps <= recommended:
        return []
    return [
        f"{settings.steps} steps: this bundle was distilled for {recommended}, more take longer and may not look better"
    ]
