from __future__ import annotations

import json
import math
import tracemalloc
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from moebius.weights.stand_in import TensorSpec, draw, stand_in_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"

# SHA-256 of the bytes that the reference recipe gives, the one that the golden files were made with. One
# tensor of each kind; encoder_hid_proj and rel_pos_emb are larger than what is drawn at a time.
REFERENCE = [
    (
        "embedding_layer.weight",
        (20, 3072),
        0,
        "f83257f574ca500ca319196af392ce00deab3fcf1a3b6cfa2b448fd1d5b7ff49",
    ),
    (
        "diff_model.encoder_hid_proj.weight",
        (768, 3072),
        0,
        "1aebdf7daddb57a48074b1fbfc069160b0670fbc401483a4c1a127396597324f",
    ),
    (
        "diff_model.encoder_hid_proj.weight",
        (768, 3072),
        7,
        "8370f0a1daf561883f782f38a6cee2bb1aedca429b8a67cc95efe04e4f491939",
    ),
    (
        "diff_model.conv_in.bn1.running_var",
        (9,),
        0,
        "d1675cefb90a98abaf9df6d6d0b7d4d57d72b131158f1da02bb87e63a74858d4",
    ),
    (
        "diff_model.conv_in.bn1.running_mean",
        (9,),
        0,
        "c481355191e87f2d589955775a56a3087b3529a787cf74856ace18cde54e594e",
    ),
    (
        "diff_model.conv_in.bn1.num_batches_tracked",
        (),
        0,
        "7c9fa136d4413fa6173637e883b6998d32e1d675f88cddff9dcbcf331820f4b8",
    ),
    (
        "diff_model.conv_in.bn1.weight",
        (9,),
        0,
        "b446310064402652f825f0c36c3e65f75631a007a347c8573bccdc1d1b348f00",
    ),
    (
        "diff_model.conv_in.bn1.bias",
        (9,),
        0,
        "404c91eefcb6df53c786ffa4a684366ea19091011707ba543b859f65fa170bdf",
    ),
    (
        "diff_model.down_blocks.2.attentions.0.transformer_blocks.0.attn2.rel_pos_emb",
        (256, 10, 160, 1),
        0,
        "c11fbdf751580fd2af1dd1abd202e34465a6fa6592699588d1f040073e6ae211",
    ),
]
# Of the reference's bytes of all tensors of up to 100,000 values, by manifest and then by name.
SMALL_TENSORS = (1665, "27ddb498d2bc7b442af50e758c2c2930b21ee90860c80cca95238cee4d627f84")


@pytest.mark.parametrize(("name", "shape", "seed", "digest"), REFERENCE)
def test_bytes_are_those_of_the_reference(name: str, shape: tuple[int, ...], seed: int, digest: str) -> None:
    tensor = draw(name, shape, seed)
    assert tensor.shape == shape
    assert tensor.dtype == (np.int64 if name.endswith("tracked") else np.float32)
    assert sha256(tensor.tobytes()).hexdigest() == digest


def test_small_tensors_of_all_manifests_are_those_of_the_reference() -> None:
    digest, count = sha256(), 0
    for model in ("moebius_student", "pixelhacker_teacher", "vae"):
        manifest = json.loads((GOLDEN / f"{model}_manifest.json").read_text())
        for name, (shape, _) in sorted(manifest.items()):
            if math.prod(shape) <= 100_000:
                digest.update(draw(name, tuple(shape)).tobytes())
                count += 1
    assert (count, digest.hexdigest()) == SMALL_TENSORS


def test_state_dict_has_the_order_shapes_and_dtypes_that_are_expected() -> None:
    expected = {
        "z.weight": TensorSpec((4, 3), torch.float32),
        "a.num_batches_tracked": TensorSpec((), torch.int64),
        "m.bias": TensorSpec((5,), torch.float16),
    }
    drawn = stand_in_state_dict(expected, seed=3)
    assert list(drawn) == list(expected)
    assert {name: (tuple(t.shape), t.dtype) for name, t in drawn.items()} == expected
    assert drawn["a.num_batches_tracked"].item() == 1
    torch.testing.assert_close(drawn["z.weight"], torch.from_numpy(draw("z.weight", (4, 3), 3)), rtol=0, atol=0)
    assert not torch.equal(drawn["z.weight"], stand_in_state_dict(expected, seed=4)["z.weight"])


def test_memory_stays_near_the_result() -> None:
    expected = {f"{n}.weight": TensorSpec((1024, 1024), torch.float32) for n in range(4)}
    stand_in_state_dict(expected)  # imports and thread stacks, once
    tracemalloc.start()
    try:
        drawn = stand_in_state_dict(expected)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    result = sum(tensor.nbytes for tensor in drawn.values())
    # 0.5 MiB of float64 scratch for each of up to four threads; one whole float64 tensor would be 8 MiB.
    assert result <= peak < result + 4 * 1024**2
