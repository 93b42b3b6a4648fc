"""Configurations of student, teacher and VAE, and their presets: released, small for the demo, tiny for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from moebius.errors import CheckpointError

SelfAttention = Literal["local_lambda", "gla"]
CrossAttention = Literal["interactive_lambda", "attention"]
FeedForward = Literal["mix", "geglu"]
Convolution = Literal["separable", "full"]
PredictionType = Literal["epsilon", "v_prediction"]
"""A network predicts the noise, or the velocity sqrt(a) * noise - sqrt(1 - a) * latents (Salimans and Ho 2022)."""


class _Categories:
    """Checks and splits `num_categories` into the conditional and the unconditional half."""

    num_categories: int

    def _check_categories(self) -> None:
        if self.num_categories % 2:
            raise ValueError(f"{self.num_categories} latent categories cannot be split into two branches")

    @property
    def tokens(self) -> int:
        """Latent-category tokens per branch (10 in the released network)."""
        return self.num_categories // 2


@dataclass(frozen=True)
class StudentConfig(_Categories):
    """Sizes and layer kinds of the student. The defaults are the released network.

    `sample_size` is the side of the square latent in latent pixels; the Interactive-λ embeddings tie the network to it.
    `num_categories` latent categories are split into two halves: conditional ids first, unconditional ids second.

    The last four fields choose the layers. Values other than the defaults give the networks of the paper's table 2,
    which can be trained but not exported. `window` applies to Local-λ only, `ff_mult` to Mix-FFN only.
    """

    sample_size: int = 64
    in_channels: int = 9
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2
    num_heads: int = 8
    window: int = 15
    ff_mult: int = 5
    norm_num_groups: int = 32
    num_categories: int = 20
    embedding_dim: int = 3072
    cross_attention_dim: int = 768
    self_attention: SelfAttention = "local_lambda"
    cross_attention: CrossAttention = "interactive_lambda"
    feed_forward: FeedForward = "mix"
    convolution: Convolution = "separable"

    def __post_init__(self) -> None:
        for name, choices in VARIANT_CHOICES.items():
            if (chosen := getattr(self, name)) not in choices:
                raise ValueError(f"{name} {chosen!r}: expected {' or '.join(map(repr, choices))}")
        for channels in self.block_out_channels:
            if self.self_attention == "gla" and channels % (2 * self.num_heads):
                raise ValueError(
                    f"{channels} channels with {self.num_heads} heads: GLA's keys are half as wide as its values, so "
                    "channels must be a multiple of twice the heads"
                )
            if channels % self.norm_num_groups or channels % self.num_heads or channels * self.ff_mult % 2:
                raise ValueError(
                    f"{channels} channels with {self.num_heads} heads, {self.norm_num_groups} norm groups and a "
                    f"feed-forward factor of {self.ff_mult}: channels must be a multiple of heads and groups, "
                    "and channels * factor must be even"
                )
        if self.window % 2 == 0:
            raise ValueError(f"window {self.window} is even; the position convolution needs a centre")
        self._check_categories()
        levels = len(self.block_out_channels) - 1
        if self.sample_size % (1 << levels):
            raise ValueError(f"sample_size {self.sample_size} cannot be halved {levels} times")

    @property
    def changed_layers(self) -> dict[str, str]:
        """The layer fields that differ from the released network, such as `{"feed_forward": "geglu"}`."""
        chosen = {name: str(getattr(self, name)) for name in VARIANT_CHOICES}
        return {name: value for name, value in chosen.items() if value != VARIANT_CHOICES[name][0]}


VARIANT_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "self_attention": get_args(SelfAttention),
        "cross_attention": get_args(CrossAttention),
        "feed_forward": get_args(FeedForward),
        "convolution": get_args(Convolution),
    }
)
"""Layer fields of `StudentConfig` -> allowed values, the released network's first."""


@dataclass(frozen=True)
class TeacherConfig(_Categories):
    """Sizes of the teacher. The defaults are the released network, PixelHacker.

    Every level except the last has transformers, and so has the middle block. Categories are split as in the student.
    """

    in_channels: int = 9
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    num_heads: int = 8
    gate_rank: int = 16
    norm_num_groups: int = 32
    num_categories: int = 20
    embedding_dim: int = 3072
    cross_attention_dim: int = 768

    def __post_init__(self) -> None:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups or channels % (2 * self.num_heads):
                raise ValueError(
                    f"{channels} channels with {self.num_heads} heads and {self.norm_num_groups} norm groups: channels "
                    "must be a multiple of the groups and of twice the heads"
                )
        if len(self.block_out_channels) < 2:
            raise ValueError(
                f"{len(self.block_out_channels)} levels; the last has no transformers, expected two or more"
            )
        self._check_categories()

    def to_diffusers(self) -> dict[str, Any]:
        """The constructor arguments of `diffusers.UNet2DConditionModel`."""
        crossing = len(self.block_out_channels) - 1
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "down_block_types": ("CrossAttnDownBlock2D",) * crossing + ("DownBlock2D",),
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossing,
            "block_out_channels": self.block_out_channels,
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_num_groups,
            "cross_attention_dim": self.cross_attention_dim,
            "encoder_hid_dim": self.embedding_dim,
            "encoder_hid_dim_type": "text_proj",
            "attention_head_dim": self.num_heads,  # diffusers reads it as the number of heads
        }


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of diffusers' `AutoencoderKL`. The defaults are the released autoencoder."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.13025

    @property
    def downscale(self) -> int:
        """Picture pixels per latent pixel along a side: 8 for four blocks."""
        return 1 << (len(self.block_out_channels) - 1)

    def to_diffusers(self) -> dict[str, Any]:
        """The constructor arguments of `diffusers.AutoencoderKL`."""
        levels = len(self.block_out_channels)
        return {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": self.block_out_channels,
            "layers_per_block": self.layers_per_block,
            "act_fn": "silu",
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_num_groups,
            "sample_size": self.sample_size,
            "scaling_factor": self.scaling_factor,
        }


@dataclass(frozen=True)
class Preset:
    """A student, the autoencoder that it works with and the teacher that it is distilled from.

    `guidance_scale` is the default at inference (paper, table 6: 2.5 for scenes). `prediction_type` applies to
    student and teacher.
    """

    student: StudentConfig
    vae: VaeConfig
    teacher: TeacherConfig
    guidance_scale: float = 2.5
    prediction_type: PredictionType = "epsilon"


PRESETS = MappingProxyType(
    {
        "full": Preset(StudentConfig(), VaeConfig(), TeacherConfig()),
        # The released topology at a tenth of the width: what this project trains and ships (docs/small.md).
        "small": Preset(
            StudentConfig(
                block_out_channels=(32, 64, 128), norm_num_groups=8, embedding_dim=64, cross_attention_dim=64
            ),
            VaeConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8, scaling_factor=0.2),
            TeacherConfig(
                block_out_channels=(32, 64, 128, 128), norm_num_groups=8, embedding_dim=64, cross_attention_dim=64
            ),
            guidance_scale=1.0,  # trained without the foreground task, so the unconditional branch carries nothing
            prediction_type="v_prediction",  # an error in the noise would grow 14-fold in the picture (docs/small.md)
        ),
        # Odd enough to catch a mixed-up axis, small enough for a test: 16x16 latents, 128x128 pictures.
        "tiny": Preset(
            StudentConfig(
                sample_size=16,
                block_out_channels=(16, 32),
                layers_per_block=1,
                num_heads=4,
                window=7,
                ff_mult=3,
                norm_num_groups=8,
                num_categories=12,
                embedding_dim=24,
                cross_attention_dim=20,
            ),
            VaeConfig(block_out_channels=(8, 16, 24, 24), layers_per_block=1, norm_num_groups=4, sample_size=128),
            TeacherConfig(
                block_out_channels=(16, 32, 32),
                layers_per_block=1,
                num_heads=4,
                gate_rank=3,
                norm_num_groups=8,
                num_categories=12,
                embedding_dim=24,
                cross_attention_dim=20,
            ),
        ),
    }
)


def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        CheckpointError: there is none; the message lists the choices.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise CheckpointError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}") from None
