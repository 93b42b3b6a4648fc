"""Settings of the objectives `guidance` and `consistency`, which train a student for fewer network evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from moebius.distill.objectives.balance import BalanceOptions
from moebius.distill.objectives.consistency import ConsistencyOptions, grid_places
from moebius.distill.objectives.losses import LossOptions

if TYPE_CHECKING:
    from moebius.distill.settings import Settings, StartSettings

Objective = Literal["diffusion", "guidance", "consistency"]
"""`diffusion`: the paper's training, with a teacher or on the true noise alone. `guidance`: the student's conditional
output learns the teacher's guided one (Meng et al. 2023). `consistency`: the student learns to reach the end of the
guided teacher's trajectory in one evaluation (Luo et al. 2023)."""


def with_objective_defaults(content: Any) -> Any:
    """Settings as read, with the timesteps of both papers (`uniform`) as the default of their objectives."""
    if not isinstance(content, dict) or content.get("objective") not in ("guidance", "consistency"):
        return content
    given = content.get("timesteps", {})
    return content | {"timesteps": {"sampling": "uniform"} | given} if isinstance(given, dict) else content


def check_objective(settings: Settings) -> None:
    """Checks that the settings fit their objective.

    Raises:
        ValueError: a setting is missing, or belongs to another objective.
    """
    objective = settings.objective
    if objective != "consistency" and settings.consistency != ConsistencyOptions():
        raise ValueError(f"`consistency` has options of `objective: consistency`; this run's objective is {objective}")
    if objective == "diffusion":
        if settings.guidance_scale is not None:
            raise ValueError(
                f"`guidance_scale: {settings.guidance_scale:g}` is for `objective: guidance` and `objective: "
                "consistency`; leave it out, or name the objective"
            )
        return
    if settings.train != "student":
        raise ValueError(f"`objective: {objective}` trains a student; write `train: student`, not {settings.train}")
    if settings.teacher is None:
        raise ValueError(f"`objective: {objective}` learns from a teacher and `teacher` is null; name its weights")
    if settings.guidance_scale is None:
        raise ValueError(
            f"`objective: {objective}` needs `guidance_scale`, the scale that is distilled (2.5 for scenes, 2.0 for "
            "portraits; 1 is no guidance)"
        )
    if settings.losses != LossOptions() or settings.balance != BalanceOptions() or settings.perceptual is not None:
        raise ValueError(
            f"`objective: {objective}` has one loss of its own; leave out `losses`, `balance` and `perceptual`"
        )
    if settings.pixels is not None:
        raise ValueError(f"`pixels` is for `objective: diffusion`, not for {objective}; leave it out")
    if objective == "consistency" and settings.start is not None:
        _check_start(settings.start)
    if objective == "consistency" and settings.ema is None:
        raise ValueError("`objective: consistency` learns from the averaged network; `ema` must not be null")
    shown = settings.samples
    if shown is not None and shown.guidance_scale != 1:
        raise ValueError(
            f"`samples: {{guidance_scale: {shown.guidance_scale:g}}}`: with `objective: {objective}` the guidance is "
            "inside the network; leave it out"
        )


def _check_start(start: StartSettings) -> None:
    first, last = grid_places(start.least, start.most)
    if first > last:
        raise ValueError(
            f"`start: {{least: {start.least}, most: {start.most}}}` holds no timestep of `objective: "
            "consistency`, which are 19, 39, ..., 999; widen it"
        )


def sample_steps(settings: Settings) -> int:
    """Steps of the sample pictures: as given, else the recommended ones of `consistency`, else 10."""
    shown = settings.samples
    assert shown is not None, "called where sample pictures are on"
    given = settings.objective != "consistency" or "steps" in shown.model_fields_set
    return shown.steps if given else settings.consistency.steps


def distilled_fields(settings: Settings) -> dict[str, Any]:
    """What `config.json` of the finished weights records for the export: distilled guidance, sampler and steps."""
    if settings.objective == "diffusion":
        return {}
    fields: dict[str, Any] = {"guidance": {"distilled": settings.guidance_scale}}
    if settings.objective == "consistency":
        fields |= {"sampler": "lcm", "num_inference_steps": settings.consistency.steps}
    return fields
