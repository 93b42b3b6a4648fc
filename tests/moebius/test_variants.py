"""The students of the paper's table 2: sizes, training, and the full layers against the teacher's own."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from moebius import Moebius, StudentConfig, Teacher, preset
from moebius.distill.objectives.balance import coarse_parameter, fine_parameter
from moebius.errors import CheckpointError, MisfitError
from moebius.network.config import VARIANT_CHOICES
from moebius.network.gla import GatedLinearAttention, set_gla_form
from moebius.weights.load import load_student

TINY = preset("tiny").student
# Experiment of table 2 -> its layers, in the order of VARIANT_CHOICES, and its parameters in the released sizes.
EXPERIMENTS = {
    1: (("gla", "attention", "geglu", "full"), 525_918_108),
    2: (("local_lambda", "attention", "geglu", "full"), 496_415_908),
    3: (("gla", "interactive_lambda", "geglu", "full"), 514_463_308),
    4: (("gla", "attention", "mix", "full"), 478_049_308),
    5: (("gla", "attention", "geglu", "separable"), 314_867_331),
    6: (("local_lambda", "interactive_lambda", "geglu", "full"), 484_961_108),
    8: (("local_lambda", "interactive_lambda", "geglu", "separable"), 273_910_331),
    9: (("local_lambda", "interactive_lambda", "mix", "separable"), 226_041_531),
}


def variant(experiment, base=TINY):
    return replace(base, **dict(zip(VARIANT_CHOICES, EXPERIMENTS[experiment][0], strict=True)))


def given(model, batch=2):
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(batch, 9, 16, 16, generator=generator)
    ids = torch.stack([model.unconditional_ids, model.conditional_ids])[:batch]
    return sample, torch.tensor([10, 900])[:batch], ids


@pytest.mark.parametrize("experiment", list(EXPERIMENTS))
def test_parameters_in_the_released_sizes(experiment):
    with torch.device("meta"):
        model = Moebius(variant(experiment, StudentConfig()))
    assert sum(parameter.numel() for parameter in model.parameters()) == EXPERIMENTS[experiment][1]


def test_the_defaults_are_the_released_network():
    assert variant(9) == TINY
    assert StudentConfig().changed_layers == {}
    assert variant(4).changed_layers == {"self_attention": "gla", "cross_attention": "attention", "convolution": "full"}


@pytest.mark.parametrize("experiment", list(EXPERIMENTS))
def test_training_reaches_every_parameter(experiment):
    model, _ = load_student("stand-in:0", variant(experiment))
    with torch.inference_mode():
        alone = model(*(part[1:] for part in given(model)))
        both, features = model.forward_features(*given(model))
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)
    assert [tuple(feature.shape) for feature in features] == [
        *[(2, 16, 8, 8), (2, 32, 8, 8)],  # down, the first after its downsampler
        *[(2, 32, 16, 16), (2, 16, 16, 16)],  # up, the first after its upsampler
    ]
    model.train()(*given(model)).square().mean().backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("experiment", [1, 6])
def test_checkpointing_and_forms_change_no_gradient(experiment):
    gradients = []
    for saving, form, gla in ((False, "reference", "recurrence"), (True, "fast", "chunked")):
        model = load_student("stand-in:0", variant(experiment))[0].double().train()
        model.diff_model.gradient_checkpointing = saving
        model.set_lambda_form(form)
        set_gla_form(model, gla)
        sample, timesteps, ids = given(model)
        model(sample.double(), timesteps, ids).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def test_experiment_1_is_the_teachers_network_without_last_level_and_middle():
    """diffusers' own network of the same sizes with GLA: its state dict loads, and the outputs are the same."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention import BasicTransformerBlock

    levels = len(TINY.block_out_channels)
    options = replace(preset("tiny").teacher, block_out_channels=TINY.block_out_channels).to_diffusers() | {
        "down_block_types": ("CrossAttnDownBlock2D",) * levels,
        "mid_block_type": None,
        "up_block_types": ("CrossAttnUpBlock2D",) * levels,
    }
    model = load_student("stand-in:0", variant(1))[0]
    unet = UNet2DConditionModel(**options).eval()
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.attn1 = GatedLinearAttention(block.norm1.normalized_shape[0], TINY.num_heads)
    unet.load_state_dict(model.diff_model.state_dict(), strict=True)
    sample, timesteps, ids = given(model)
    with torch.inference_mode():
        expected = unet(sample, timesteps, encoder_hidden_states=model.embedding_layer(ids)).sample
        actual = model(sample, timesteps, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experiment", [1, 5])
def test_losses_are_balanced_at_the_last_weights(experiment):
    model, _ = load_student("stand-in:0", variant(experiment))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    last = "weight" if experiment == 1 else "conv_pw.weight"
    assert names[id(fine_parameter(model))] == f"diff_model.conv_out.{last}"
    assert names[id(coarse_parameter(model, 1))] == "diff_model.down_blocks.1.attentions.0.proj_out.weight"


@pytest.mark.parametrize("field", list(VARIANT_CHOICES))
def test_an_unknown_layer_names_the_choices(field):
    first, second = VARIANT_CHOICES[field]
    with pytest.raises(ValueError, match=f"{field} 'linear': expected '{first}' or '{second}'"):
        replace(TINY, **{field: "linear"})


def test_gla_needs_halves_of_heads():
    sizes = replace(TINY, block_out_channels=(16, 32), num_heads=16, norm_num_groups=8)
    with pytest.raises(ValueError, match="16 channels with 16 heads: GLA"):
        replace(sizes, self_attention="gla")


@pytest.mark.parametrize("experiment", [1, 3, 8])
def test_weights_of_other_layers_are_refused_by_the_layers_names(experiment, tmp_path):
    """Both ways: the file of a variant for the released layers, and the released layers' file for the variant."""
    for held, wanted in ((variant(experiment), TINY), (TINY, variant(experiment))):
        file = tmp_path / "weights.safetensors"
        save_file(Moebius(held).state_dict(), file)
        with pytest.raises(CheckpointError, match="other layers than this network") as raised:
            load_student(str(file), wanted)
        found, expected = str(raised.value).split("; choose")[0].split(": ", 1)[1].split(", expected ")
        differing = [name for name in VARIANT_CHOICES if getattr(held, name) != getattr(wanted, name)]
        assert found == ", ".join(f"{name} {getattr(held, name)}" for name in differing)
        assert expected == ", ".join(f"{name} {getattr(wanted, name)}" for name in differing)
        assert "\n" not in str(raised.value)
        load_student(str(file), held)


def test_a_teachers_weights_are_not_taken_for_a_variants(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(Teacher(preset("tiny").teacher).state_dict(), file)
    with pytest.raises(MisfitError, match="does not fit a network"):
        load_student(str(file), TINY)


@pytest.mark.parametrize("experiment", [1, 6])
def test_a_training_file_names_the_layers(experiment, tmp_path):
    """Distilled by all but the perceptual loss, balanced, averaged, written, and read back."""
    from moebius.distill.loop.trainer import Trainer
    from moebius.distill.settings import parse_settings

    config = variant(experiment)
    layers = {name: getattr(config, name) for name in VARIANT_CHOICES}
    content = {
        "train": "student",
        "out": str(tmp_path),
        "steps": 1,
        "batch": 2,
        "network": {"preset": "tiny", "student": layers},
        "teacher": "stand-in",
        "vae": "stand-in",
        "data": {"pictures": [{"source": "scenes:4"}], "threads": 0},
        "losses": {"perceptual": 0},
        "tensorboard": False,
    }
    trainer = Trainer(parse_settings(content, "test"))
    reports = []
    trainer.on_step = reports.append
    trainer.run()
    assert {"loss/coarse", "loss/task", "loss/fine", "weight/fine", "weight/out"} <= reports[0].values.keys()
    load_student(str(tmp_path), config)
    with pytest.raises(CheckpointError, match="Only the released network's layers can be exported"):
        load_student(str(tmp_path), TINY)
