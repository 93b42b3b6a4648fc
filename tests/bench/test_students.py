"""`moebius-bench students`: the counts against the paper's figures, against hand counts, and a real run."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from moebius import Moebius, preset  # noqa: E402
from moebius.network.lambda_layers import InteractiveLambda, LocalLambda  # noqa: E402
from moebius_bench.measure.costs import count_torch  # noqa: E402
from moebius_bench.paper.students import PAPER, count_student, paper_operations  # noqa: E402


@pytest.mark.parametrize("row", PAPER, ids=lambda row: row.experiments)
def test_the_papers_figures_come_out_to_their_last_digit(row):
    config = replace(preset("full").student, **row.layers)
    with torch.device("meta"):
        student = Moebius(config).eval()
        ids = torch.empty(1, config.tokens, dtype=torch.int64)
        operations = paper_operations(student, (torch.empty(1, 9, 64, 64), torch.empty(1, dtype=torch.int64), ids))
    assert f"{operations / 1e9:.2f}" == f"{row.gflops:.2f}"
    assert round(sum(parameter.numel() for parameter in student.parameters()) / 1e6) == row.parameters


def test_the_papers_rule_by_hand():
    """Layers by their products, norms by four an element; nothing for group norms or the separable batch norms."""
    image = torch.randn(2, 6, 5, 7)
    layers = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1, groups=2), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.ReLU())
    assert paper_operations(layers, (image,)) == 2 * 35 * 4 * (6 // 2) * 9
    assert paper_operations(nn.Sequential(nn.Linear(7, 3), nn.LayerNorm(3)), (image,)) == 2 * 30 * (7 * 3 + 4 * 3)


def test_the_papers_rule_on_lambda_layers_by_hand():
    """C = 16, 4 heads of depth 4, 35 positions, window 3; 6 tokens of width 20."""
    n, c, d, m, wide = 35, 16, 4, 6, 20
    local = n * (c * c + 2 * c * d) + n * d * d * 9 + 4 * n * (c + d) + d * (3 * n - 1)
    assert paper_operations(LocalLambda(c, 4, 3).eval(), (torch.randn(1, n, c), (5, 7))) == local
    interactive = n * c * c + 2 * m * wide * d + 4 * (n * c + m * d) + d * (3 * m - 1)
    inputs = (torch.randn(1, n, c), torch.randn(1, m, wide), (5, 7))
    assert paper_operations(InteractiveLambda(c, 4, n, m, wide).eval(), inputs) == interactive


def test_the_hooks_are_taken_away():
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        paper_operations(layer, (torch.randn(1, 3),))
    assert not layer._forward_hooks


def test_products_of_the_released_network_are_those_of_the_other_commands():
    counted, unet = count_student(preset("tiny").student), count_torch("tiny")["unet_conditional"]
    assert (counted.macs, counted.convolution_macs) == (unet["all"], unet["convolutions"])


def test_what_a_layer_changes_is_its_own_cost():
    """GEGLU for Mix-FFN: hidden 4C in two linear layers for 3C in convolutions, tiny sizes, by hand."""
    tiny = preset("tiny").student
    mix, geglu = count_student(tiny), count_student(replace(tiny, feed_forward="geglu"))
    blocks = {16: (256, 3), 32: (64, 3)}  # channels -> positions, transformers: one down, two up
    by_mix = sum(k * n * (c * 3 * c + 9 * 3 * c + (3 * c // 2) * c) for c, (n, k) in blocks.items())
    by_geglu = sum(k * n * (c * 8 * c + 4 * c * c) for c, (n, k) in blocks.items())
    assert geglu.macs - mix.macs == by_geglu - by_mix
    assert geglu.paper_operations - mix.paper_operations == by_geglu - by_mix
    assert mix.convolution_macs - geglu.convolution_macs == by_mix


def command(*arguments):
    line = [sys.executable, "-m", "moebius_bench.cli", "students", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_real_run(tmp_path):
    done = command("--preset", "tiny", "--json", str(tmp_path / "students.json"))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "students.json").read_text())
    assert [row["paper"]["experiments"] for row in content["rows"]] == [row.experiments for row in PAPER]
    released = content["rows"][-1]["counted"]
    assert released["parameters"] == sum(p.numel() for p in Moebius(preset("tiny").student).parameters())
    assert f"{released['parameters'] / 1e6:.2f} M" in done.stdout
    assert "526 M" not in done.stdout  # the paper's figures are of other sizes
    assert "Interactive-λ" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--preset", "huge"), "full, small, tiny"), (("--json", "no/such/folder.json"), "its folder does not exist")],
)
def test_wrong_use_is_refused_in_a_line(arguments, words):
    done = command(*arguments)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
