"""The adapter of E-LatentLPIPS, on a stand-in of the package: same classes, arguments and names, fewer channels."""

import itertools
import sys
import types

import pytest
import torch
from torch import nn

from moebius.distill.objectives.perceptual import ELatentLpips
from moebius.errors import CheckpointError, TrainingError


class LatentVGG(nn.Module):
    """The trunk for latents: 4 channels in."""

    def __init__(self, channels):
        super().__init__()
        self.model = nn.Module()
        widths = [channels, 3, 3, 3, 3, 3]
        pairs = [(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b)) for a, b in itertools.pairwise(widths)]
        self.model.features = nn.Sequential(*[layer for pair in pairs for layer in pair])


class Trunk(nn.Module):
    """What the package builds without pretrained weights: a trunk for pictures, of 3 channels."""

    def __init__(self):
        super().__init__()
        layers = LatentVGG(3).model.features
        for number in range(5):
            part = nn.Sequential()
            for index in (2 * number, 2 * number + 1):
                part.add_module(str(index), layers[index])
            self.add_module(f"slice{number + 1}", part)

    def forward(self, x):
        seen = []
        for part in self.children():
            x = part(x)
            seen.append(x)
        return seen


class Augment(nn.Module):
    def __init__(self, xflip=0):
        super().__init__()
        self.register_buffer("p", torch.ones([]))

    def forward(self, x, y):
        moved = torch.rand(())
        return x * (1 + moved), y * (1 + moved)


class ELatentLPIPS(nn.Module):
    """Refuses what would download, as a machine without a network does."""

    def __init__(self, pretrained=True, pnet_rand=False, verbose=True, encoder="sd3", augment="bg"):
        super().__init__()
        assert not pretrained
        assert pnet_rand
        assert not verbose
        assert encoder == "sdxl"
        self.net = Trunk()
        self.lin0 = nn.Sequential(nn.Dropout(), nn.Conv2d(3, 1, 1, bias=False))
        self.lins = nn.ModuleList([self.lin0])
        self.augment = augment

    def forward(self, x, y, normalize=False, ensembling=True):
        if normalize:
            x, y = x * 0.13025, y * 0.13025
        if ensembling:
            x, y = self.augment(x, y)
        pairs = zip(self.net(x), self.net(y), strict=True)
        return sum(self.lin0((a - b) ** 2).mean(dim=(2, 3), keepdim=True) for a, b in pairs)


@pytest.fixture
def package(monkeypatch):
    main, vgg = types.ModuleType("elatentlpips.elatentlpips"), types.ModuleType("elatentlpips.vgg16")
    main.ELatentLPIPS, main.AdaAugment, main.ada_augpipe = ELatentLPIPS, Augment, {"bg": {"xflip": 1}, "b": {}}
    vgg.LatentVGG16BN = LatentVGG
    monkeypatch.setitem(sys.modules, "elatentlpips", types.ModuleType("elatentlpips"))
    monkeypatch.setitem(sys.modules, main.__name__, main)
    monkeypatch.setitem(sys.modules, vgg.__name__, vgg)
    return main


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A pickle of the shape that the package's authors give: every name twice where a module has two."""
    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    network = ELatentLPIPS(pretrained=False, pnet_rand=True, verbose=False, encoder="sdxl", augment=None)
    layers = LatentVGG(4).model.features
    for number in range(1, 6):
        part = network.net.get_submodule(f"slice{number}")
        for name, _ in list(part.named_children()):
            part.add_module(name, layers[int(name)])
    with torch.no_grad():
        network.lin0[1].weight.abs_()
    path = tmp_path / "sdxl_latest_vgg16_tuned.pth"
    torch.save(network.state_dict(), path)
    return path, network.eval()


def latents(seed):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_files_weights_are_the_distances(package, weights):
    path, original = weights
    distance = ELatentLpips(path, augment=None)
    found = distance(latents(0), latents(1))
    assert found.shape == (2,)
    expected = original(latents(0), latents(1), ensembling=False).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    scaled = ELatentLpips(path, augment=None, normalize=True)(latents(0), latents(1))
    assert not torch.allclose(scaled, found)
    assert torch.equal(distance(latents(0), latents(0)), torch.zeros(2))


def test_nothing_in_it_is_trained_and_gradients_pass(package, weights):
    distance = ELatentLpips(weights[0])
    distance.train()
    assert not distance.network.net.training
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    x = latents(0).requires_grad_()
    distance(x, latents(1)).mean().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0


def test_both_are_moved_alike_by_torchs_generator(package, weights):
    distance = ELatentLpips(weights[0])
    torch.manual_seed(4)
    first, second = distance(latents(0), latents(1)), distance(latents(0), latents(1))
    torch.manual_seed(4)
    assert torch.equal(first, distance(latents(0), latents(1)))
    assert not torch.equal(first, second)
    assert torch.equal(distance(latents(0), latents(0)), torch.zeros(2))


def test_half_precision_latents_are_measured_in_float32(package, weights):
    assert ELatentLpips(weights[0])(latents(0).bfloat16(), latents(1)).dtype == torch.float32


def test_missing_weights_are_refused_before_anything_is_built(package, tmp_path):
    with pytest.raises(TrainingError, match=r"no file .*gone\.pth .* multiplier to 0"):
        ELatentLpips(tmp_path / "gone.pth")
    with pytest.raises(TrainingError, match="no file hub:some/repo"):
        ELatentLpips("hub:some/repo")


def test_other_weights_are_refused(package, weights, tmp_path):
    state = torch.load(weights[0], weights_only=True)
    del state["net.slice3.4.weight"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"net\.slice3\.4\.weight"):
        ELatentLpips(tmp_path / "short.pth")


def test_options_are_refused(package, weights):
    with pytest.raises(TrainingError, match="encoder is 'flux'"):
        ELatentLpips(weights[0], encoder="flux")
    with pytest.raises(TrainingError, match="augment is 'zoom'; expected one of bg, b"):
        ELatentLpips(weights[0], augment="zoom")


def test_a_missing_package_is_said_in_words(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "elatentlpips", None)
    (tmp_path / "weights.pth").write_bytes(b"anything")
    with pytest.raises(TrainingError, match="needs the package elatentlpips") as error:
        ELatentLpips(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
