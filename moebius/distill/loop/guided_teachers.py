"""Loads the teacher of the objectives `guidance` and `consistency`, and the student that starts from it."""

from __future__ import annotations

import copy

from moebius.distill.objectives.guidance import GuidedTeacher
from moebius.distill.settings import Settings
from moebius.errors import CheckpointError, MisfitError, TrainingError
from moebius.network.config import Preset
from moebius.network.student import Moebius
from moebius.network.teacher import Teacher
from moebius.weights.load import check_prediction_type, load_student, load_teacher
from moebius.weights.sampling_record import SamplingRecord, read_sampling_record
from moebius.weights.sources import Progress


def load_guided_teacher(settings: Settings, sizes: Preset, progress: Progress) -> GuidedTeacher:
    """Loads the run's teacher, a student or a teacher network, with the scale that is left to apply.

    Raises:
        CheckpointError: the weights cannot be read, predict something else, or are of another geometry.
        TrainingError: their guidance is distilled at another scale than the settings'.
    """
    source, scale = settings.teacher, settings.guidance_scale
    assert source is not None and scale is not None, "settings without them are refused"  # noqa: PT018
    check_prediction_type(source, sizes.prediction_type, progress)
    known = read_sampling_record(source, progress)
    _check_scale(source, scale, known)
    if known.sampler is not None:
        progress(f"{source} was made for sampler {known.sampler}: one DDIM step of it follows no trajectory exactly")
    return GuidedTeacher(_either(source, sizes, settings, progress), scale if known.guidance_scale is None else 1.0)


def _check_scale(source: str, scale: float, known: SamplingRecord) -> None:
    if known.guidance_scale is not None and known.guidance_scale != scale:
        raise TrainingError(
            f"`guidance_scale: {scale:g}`, and {source} was distilled at {known.guidance_scale:g}; write "
            f"{known.guidance_scale:g}, or name the network before its distillation as `teacher`"
        )


def _either(source: str, sizes: Preset, settings: Settings, progress: Progress) -> Moebius | Teacher:
    """The student or the teacher network with the weights of `source`, whichever they fit."""
    try:
        student = load_student(source, sizes.student, progress)[0]
        student.set_lambda_form(settings.lambda_form)
        return student
    except MisfitError as error:
        misfit = error
    try:
        return load_teacher(source, sizes.teacher, progress)[0]
    except MisfitError:
        raise CheckpointError(
            f"`teacher: {source}` fits neither the student nor the teacher of `network: {{preset: "
            f"{settings.network.preset}}}`; choose the preset and sizes that it was trained at ({misfit})"
        ) from misfit


def starting_student(settings: Settings, sizes: Preset, teacher: GuidedTeacher, progress: Progress) -> Moebius:
    """The network to train: the weights of `init`, else a copy of the teacher's.

    Raises:
        CheckpointError: the weights of `init` cannot be read or do not fit.
        TrainingError: there is no `init`, and the teacher is no student network.
    """
    if settings.init is not None:
        check_prediction_type(settings.init, sizes.prediction_type, progress)
        return load_student(settings.init, sizes.student, progress)[0]
    if not isinstance(teacher.network, Moebius):
        raise TrainingError(
            f"`objective: {settings.objective}` starts from trained weights, and {settings.teacher} is a teacher "
            "network, which the student cannot start from; name a trained student as `init`"
        )
    return copy.deepcopy(teacher.network)


def check_known_vaes(settings: Settings, data: str, vae_sha256: str) -> None:
    """Checks that samples are latents of the VAE that teacher and `init` were trained with, where they record it.

    Raises:
        TrainingError: they are of another VAE. A fine-tuned one has the same sizes and other latents.
    """
    for name, source in (("teacher", settings.teacher), ("init", settings.init)):
        expected = None if source is None else read_sampling_record(source).vae_sha256
        if expected is not None and expected != vae_sha256:
            raise other_vae(data, vae_sha256, name, expected)


def other_vae(data: str, found: str, name: str, expected: str) -> TrainingError:
    """The error for samples of another VAE than that of the setting `name`."""
    return TrainingError(
        f"{data} has latents of another VAE (SHA-256 {found[:16]}...) than `{name}` ({expected[:16]}...); encode the "
        "pictures with the network's own VAE"
    )
