from __future__ import annotations

import os
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moebius import checkpoint
from moebius.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from moebius.stand_in import TensorSpec, stand_in_state_dict

EXPECTED = {
    "conv.weight": TensorSpec((4, 3), torch.float32),
    "bn.weight": TensorSpec((4,), torch.float32),
    "bn.running_mean": TensorSpec((4,), torch.float32),
    "bn.num_batches_tracked": TensorSpec((), torch.int64),
    "out.bias": TensorSpec((4,), torch.float32),
}
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test: a folder that does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOEBIUS_CACHE", str(folder))
    return folder


def plain() -> State:
    return stand_in_state_dict(EXPECTED, 0)


def averaged() -> State:
    return stand_in_state_dict(EXPECTED, 1)


def same(checkpoint: Checkpoint, state: State) -> bool:
    assert list(checkpoint.state_dict) == list(EXPECTED)
    return all(
        tensor.dtype == state[name].dtype and torch.equal(tensor, state[name])
        for name, tensor in checkpoint.state_dict.items()
    )


def save(tmp_path: Path, content: object, name: str = "model.bin", **how: Any) -> str:
    torch.save(content, tmp_path / name, **how)
    return str(tmp_path / name)


def refusal(source: str, expected: dict[str, TensorSpec] = EXPECTED, **how: Any) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source, expected, **how)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2000
    assert caught.value.exit_code == 2
    return message


# Hostile and damaged files


class Payload:
    """Pickles to a call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", ["system", "open", "eval"])
def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path: Path, cache: Path, call: str, zipped: bool) -> None:
    proof = tmp_path / "proof"
    payload = {
        "system": Payload(os.system, f"touch {proof}"),
        "open": Payload(open, str(proof), "w"),
        "eval": Payload(eval, f"open({str(proof)!r}, 'w').close()"),
    }[call]
    source = save(tmp_path, {**plain(), "x": payload}, _use_new_zipfile_serialization=zipped)
    message = refusal(source)
    assert f"{call}, that is code" in message
    assert "nothing of it was run" in message
    assert not proof.exists()
    assert not cache.exists()
    torch.load(source, weights_only=False)  # the payload is live: only our way of loading keeps it from running
    assert proof.exists()


def test_objects_beside_the_tensors_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path, {"state_dict": plain(), "where": Path("x")})
    assert "carries pathlib" in refusal(source)


def damaged(tmp_path: Path) -> Iterator[tuple[str, bytes, str]]:
    save(tmp_path, plain(), "whole")
    save(tmp_path, plain(), "legacy", _use_new_zipfile_serialization=False)
    save_file(plain(), tmp_path / "whole.safetensors")
    whole, legacy = (tmp_path / "whole").read_bytes(), (tmp_path / "legacy").read_bytes()
    tensors = (tmp_path / "whole.safetensors").read_bytes()
    yield "model.bin", b"", "is empty"
    yield "model.safetensors", b"", "is empty"
    yield "model.bin", b"<!DOCTYPE html><html>not found</html>", "is a web page"
    yield "model.safetensors", b"\n <html>not found</html>", "is a web page"
    yield "model.bin", b"not found", "neither a safetensors file nor"
    yield "model.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"
    for length in (4, 40, len(whole) // 2, len(whole) - 1):
        yield "model.bin", whole[:length], "damaged or cut short"
    for length in (1, 20, len(legacy) // 2, len(legacy) - 1):
        yield "model.bin", legacy[:length], "damaged or not a checkpoint"
    for length in (4, 9, 60, len(tensors) - 1):
        yield "model.safetensors", tensors[:length], "damaged or not a safetensors file"
    at = whole.index(plain()["conv.weight"].numpy().tobytes())
    yield "model.bin", whole[: at + 5] + bytes([whole[at + 5] ^ 8]) + whole[at + 6 :], "checksum of"
    yield "model.safetensors", b"\xff" * 8 + tensors[8:], "damaged or not a safetensors file"
    yield "model.safetensors", whole, "a pickle by its content"
    yield "model.bin", tensors, ""  # safetensors under another name are read as what they are


def test_damaged_files_are_refused(tmp_path: Path, cache: Path) -> None:
    for name, content, words in damaged(tmp_path):
        (tmp_path / name).write_bytes(content)
        if words:
            assert words in refusal(str(tmp_path / name)), (name, len(content))
            assert not cache.exists()
        else:
            assert same(load_checkpoint(str(tmp_path / name), EXPECTED), plain())


def test_any_flipped_bit_of_a_pickle_is_refused_or_harmless(tmp_path: Path, cache: Path) -> None:
    path = Path(save(tmp_path, plain()))
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 29):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            loaded = load_checkpoint(str(path), EXPECTED)
        except CheckpointError as error:
            refused += str(error).isprintable()
        else:  # the bit lay in padding or in a time stamp
            assert same(loaded, plain())
    assert refused > 20


def test_other_archives_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.add(save(tmp_path, plain()), "tensors")
    assert "tar archive" in refusal(str(tmp_path / "old.pt"))
    with zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        packed.write(tmp_path / "model.bin", "model.bin")
    assert "not one of torch.save" in refusal(str(tmp_path / "packed.pt"))
    with (
        zipfile.ZipFile(tmp_path / "model.bin") as plain_zip,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain_zip.infolist():
            bomb.writestr(entry.filename, plain_zip.read(entry))
    assert "not one of torch.save" in refusal(str(tmp_path / "bomb.pt"))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as script:
        script.writestr("script/data.pkl", b"")
        script.writestr("script/constants.pkl", b"")
    assert "TorchScript" in refusal(str(tmp_path / "script.pt"))


# Wrappers and averages


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"module": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    ],
)
def test_wrappers_are_taken_off(tmp_path: Path, wrap: Callable[[State], Any]) -> None:
    loaded = load_checkpoint(save(tmp_path, wrap(plain())), EXPECTED)
    assert same(loaded, plain())
    assert "EMA" not in loaded.origin


def with_prefix(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda p, a: {"state_dict": p, "ema": a}, "'ema'"),
        (lambda p, a: {"model_ema": {"state_dict": a, "decay": 0.9}, "model": p}, "'model_ema'"),
        (lambda p, a: {"ema_state_dict": with_prefix("module.", a)}, "'ema_state_dict'"),
        (
            lambda p, a: {
                **with_prefix("online_model.", p),
                **with_prefix("ema_model.", a),
                "step": torch.tensor(7),
            },
            "ema_model.*",
        ),
        (
            lambda p, a: {"state_dict": {**p, **with_prefix("model_ema.", a), "model_ema.decay": torch.ones(())}},
            "model_ema.*",
        ),
        (lambda p, a: {**with_prefix("module.", a), "n_averaged": torch.tensor(5)}, "n_averaged"),
    ],
)
def test_averaged_weights_are_preferred_and_said(
    tmp_path: Path, wrap: Callable[[State, State], Any], said: str
) -> None:
    source = save(tmp_path, wrap(plain(), averaged()))
    for _ in range(2):  # the note outlives the conversion
        loaded = load_checkpoint(source, EXPECTED)
        assert same(loaded, averaged())
        assert "EMA weights" in loaded.origin
        assert said in loaded.origin


def test_an_averages_file_is_recognised_by_its_name(tmp_path: Path) -> None:
    save(tmp_path, plain(), "diffusion_pytorch_model.bin")
    save(tmp_path, averaged(), "ema_diffusion_pytorch_model.bin")
    loaded = load_checkpoint(str(tmp_path), EXPECTED)
    assert same(loaded, averaged())
    assert loaded.origin.endswith("; EMA file")


def test_nameless_averages_take_the_names_of_the_plain_weights(tmp_path: Path) -> None:
    names = ["conv.weight", "bn.weight", "out.bias"]  # the parameters, without the statistics
    shadow = {"decay": 0.99, "shadow_params": [averaged()[name] for name in names]}
    loaded = load_checkpoint(save(tmp_path, {"model": plain(), "ema": shadow}), EXPECTED)
    assert same(loaded, plain() | {name: averaged()[name] for name in names})
    assert "shadow_params" in loaded.origin
    assert "without names" in refusal(save(tmp_path, shadow))
    assert "without names" in refusal(save(tmp_path, {"ema": shadow}))
    short = {"model": plain(), "ema": {"shadow_params": shadow["shadow_params"][:2]}}
    assert "do not match" in refusal(save(tmp_path, short))
    turned = {"model": plain(), "ema": {"shadow_params": shadow["shadow_params"][::-1]}}
    assert "do not match" in refusal(save(tmp_path, turned))


def test_old_names_of_the_vae_attention(tmp_path: Path) -> None:
    old = [f"encoder.mid_block.attentions.0.{part}.weight" for part in ("query", "key", "value", "proj_attn")]
    new = [f"encoder.mid_block.attentions.0.{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    values = [torch.full((2, 2), float(n)) for n in range(4)]
    expected = {name: TensorSpec((2, 2), torch.float32) for name in new}
    loaded = load_checkpoint(save(tmp_path, dict(zip(old, values, strict=True))), expected)
    assert all(torch.equal(loaded.state_dict[name], value) for name, value in zip(new, values, strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "holds a list"),
        ({}, "empty"),
        ({"a": {"b": torch.ones(1)}}, "1 entries are not tensors (a)"),
        ({**plain(), "epoch": 3, "lr": 0.1}, "2 entries are not tensors (epoch, lr)"),
        ({"model": {"model": {"model": {"model": {"model": plain()}}}}}, "not tensors"),
    ],
)
def test_what_is_not_a_state_dict_is_refused(tmp_path: Path, content: object, words: str) -> None:
    assert words in refusal(save(tmp_path, content))


def test_torch_is_not_asked_to_run_pickles() -> None:
    """No call of torch.load in the package leaves `weights_only` to its default or turns it off."""
    package = Path(checkpoint.__file__).parent
    found = subprocess.run(
        ["grep", "-rn", "--include=*.py", "torch.load(", str(package)], capture_output=True, text=True
    ).stdout.splitlines()
    assert found
    assert all("weights_only=True" in line for line in found)
