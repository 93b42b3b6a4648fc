from __future__ import annotations

import json
import os
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius.weights import checkpoint
from moebius.weights.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_config
from moebius.weights.stand_in import TensorSpec, stand_in_state_dict

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


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Stand-in


def test_stand_in() -> None:
    loaded = load_checkpoint("stand-in:1", EXPECTED)
    assert same(loaded, averaged())
    assert loaded.stand_in
    assert loaded.origin == "stand-in:1"
    assert loaded.sha256 == load_checkpoint("stand-in:1", dict(reversed(EXPECTED.items()))).sha256
    assert loaded.sha256 != load_checkpoint("stand-in:2", EXPECTED).sha256
    other = EXPECTED | {"conv.weight": TensorSpec((3, 4), torch.float32)}
    assert loaded.sha256 != load_checkpoint("stand-in:1", other).sha256


# Pickles become safetensors


def test_a_pickle_is_opened_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path, plain())
    said: list[str] = []
    first = load_checkpoint(source, EXPECTED, progress=said.append)
    assert same(first, plain())
    assert first.origin == source
    assert not first.stand_in
    key = sha256(Path(source).read_bytes()).hexdigest()
    assert files(cache) == [f"weights-v1/{key}.safetensors", f"weights-v1/{key}.safetensors.sha256"]
    kept = cache / "weights-v1" / f"{key}.safetensors"
    assert first.sha256 == sha256(kept.read_bytes()).hexdigest()
    assert Path(f"{kept}.sha256").read_text() == f"{first.sha256}  {kept.name}\n"
    assert all(torch.equal(value, plain()[name]) for name, value in load_file(kept).items())
    assert any("opening" in line for line in said)

    def never(*_: object, **__: object) -> None:
        raise SystemError("a pickle was opened again")

    monkeypatch.setattr(torch, "load", never)
    second = load_checkpoint(source, EXPECTED)
    assert same(second, plain())
    assert (second.sha256, second.origin) == (first.sha256, first.origin)
    renamed = Path(source).rename(tmp_path / "other.pt")  # known by its content, not by its name
    assert load_checkpoint(str(renamed), EXPECTED).sha256 == first.sha256
    assert "SystemError" in refusal(save(tmp_path, averaged()))  # the guard above works


def test_a_damaged_conversion_is_made_anew_and_said(tmp_path: Path, cache: Path) -> None:
    source = save(tmp_path, plain())
    first = load_checkpoint(source, EXPECTED)
    (kept,) = cache.rglob("*.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said: list[str] = []
    again = load_checkpoint(source, EXPECTED, progress=said.append)
    assert same(again, plain())
    assert again.sha256 == first.sha256
    assert kept.read_bytes() == whole
    assert any("damaged" in line and "anew" in line for line in said)


@pytest.mark.parametrize("content", [b"", b"nonsense\n", b"0" * 64 + b"  x\n"])
def test_a_conversion_without_its_hash_is_made_anew(tmp_path: Path, cache: Path, content: bytes) -> None:
    source = save(tmp_path, plain())
    load_checkpoint(source, EXPECTED)
    (sidecar,) = cache.rglob("*.sha256")
    right = sidecar.read_bytes()
    sidecar.write_bytes(content)
    assert same(load_checkpoint(source, EXPECTED), plain())
    assert sidecar.read_bytes() == right


def test_a_conversion_is_deterministic(tmp_path: Path) -> None:
    source = save(tmp_path, plain())
    one = load_checkpoint(source, EXPECTED, cache_dir=tmp_path / "one")
    two = load_checkpoint(source, EXPECTED, cache_dir=tmp_path / "two")
    assert one.sha256 == two.sha256
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_legacy_pickles_and_parameters_and_shared_storage(tmp_path: Path) -> None:
    state: dict[str, Any] = plain()
    state["bn.weight"] = torch.nn.Parameter(state["bn.weight"])
    state["out.bias"] = state["bn.weight"]
    state["conv.weight"] = state["conv.weight"].t().contiguous().t()  # not contiguous
    want = {name: value.detach() for name, value in state.items()}
    for how in ({}, {"_use_new_zipfile_serialization": False}):
        loaded = load_checkpoint(save(tmp_path, OrderedDict(state), **how), EXPECTED)
        assert same(loaded, want)
        assert not any(value.requires_grad for value in loaded.state_dict.values())


def test_a_folder_prefers_safetensors(tmp_path: Path) -> None:
    save(tmp_path, plain(), "diffusion_pytorch_model.bin")
    save_file(averaged(), tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_checkpoint(str(tmp_path), EXPECTED)
    assert same(loaded, averaged())
    assert loaded.origin == str(tmp_path / "diffusion_pytorch_model.safetensors")


def test_a_safetensors_file_is_read_where_it_lies(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(plain(), path)
    loaded = load_checkpoint(str(path), EXPECTED)
    assert same(loaded, plain())
    assert loaded.sha256 == sha256(path.read_bytes()).hexdigest()
    assert not cache.exists()
    Path(f"{path}.sha256").write_text(f"{loaded.sha256} *model.safetensors\n")
    assert same(load_checkpoint(str(path), EXPECTED), plain())
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
    assert "damaged: its SHA-256" in refusal(str(path))


# The check against the network


def test_everything_that_does_not_fit_is_named(tmp_path: Path, cache: Path) -> None:
    state = plain()
    del state["bn.weight"], state["bn.num_batches_tracked"]
    state["conv.weight"] = torch.ones(4, 4)
    state["out.bias"] = torch.ones(4, dtype=torch.int32)
    state["bn.running_mean"] = torch.ones(4).to_sparse()
    state |= {"extra\x1b[31m\n": torch.ones(1), "y": torch.ones(1)}
    message = refusal(save(tmp_path, state))
    for words in (
        "2 missing (bn.weight, bn.num_batches_tracked)",
        "2 unexpected (extra\\x1b[31m , y)",
        "1 of wrong shape (conv.weight [4, 4], expected [4, 3])",
        "1 of wrong dtype (out.bias int32, expected float32)",
        "1 not dense tensors on the CPU (bn.running_mean)",
    ):
        assert words in message
    assert not cache.exists()


def test_long_lists_are_abridged(tmp_path: Path) -> None:
    many = plain() | {f"x{n}": torch.ones(1) for n in range(100)}
    message = refusal(save(tmp_path, many))
    assert "100 unexpected (x0, x1," in message
    assert "x19 and 80 more" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_and_said(tmp_path: Path, dtype: torch.dtype) -> None:
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in plain().items()}
    want = {name: value.float() if value.is_floating_point() else value for name, value in half.items()}
    save_file(half, tmp_path / "half.safetensors")
    for source in (save(tmp_path, half), str(tmp_path / "half.safetensors")):
        for _ in range(2):
            loaded = load_checkpoint(source, EXPECTED)
            assert same(loaded, want)
            assert "4 half-precision tensors converted to float32" in loaded.origin


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    state = plain() | {"conv.weight": torch.ones(4, 3, dtype=dtype)}
    assert "1 of wrong dtype (conv.weight" in refusal(save(tmp_path, state))
    counter = plain() | {"bn.num_batches_tracked": torch.ones(())}
    assert "bn.num_batches_tracked float32, expected int64" in refusal(save(tmp_path, counter))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, cache: Path, value: float) -> None:
    state = plain()
    state["conv.weight"][3, 2] = value
    state["out.bias"][0] = value
    assert "2 tensors hold NaN or infinite values (conv.weight, out.bias)" in refusal(save(tmp_path, state))
    assert not cache.exists()


def test_a_huge_view_of_a_small_storage_is_not_unfolded(tmp_path: Path) -> None:
    state = plain() | {"conv.weight": torch.ones(1).expand(1 << 20, 1 << 20)}  # 4 TiB if it were made real
    assert "1 of wrong shape" in refusal(save(tmp_path, state))


# The cache


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MOEBIUS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert checkpoint.cache_folder() == tmp_path / "xdg" / "moebius-edge"
    for unset in ("", "relative/one"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert checkpoint.cache_folder() == tmp_path / "home" / ".cache" / "moebius-edge"


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path, plain())
    (tmp_path / "file").write_text("in the way")
    message = refusal(source, cache_dir=tmp_path / "file")
    assert "cannot keep the converted weights" in message
    assert "MOEBIUS_CACHE" in message


def test_a_full_disk_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    expected = {"w": TensorSpec((1 << 16,), torch.float32)}
    source = save(tmp_path, {"w": torch.ones(1 << 16)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))  # files end at 16 KiB, as on a full disk
    try:
        message = refusal(source, expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot keep the converted weights" in message
    assert files(cache) == []
    assert load_checkpoint(source, expected).state_dict["w"].sum() == 1 << 16


def test_an_interrupted_conversion_leaves_no_half_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path, plain())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_checkpoint(source, EXPECTED)
    assert files(cache) == []
    assert same(load_checkpoint(source, EXPECTED), plain())


# config.json


def test_config(tmp_path: Path) -> None:
    source = save(tmp_path, plain())
    path = tmp_path / "config.json"
    assert load_config(source) is None
    assert load_config(str(tmp_path)) is None
    assert load_config("stand-in") is None
    path.write_text(json.dumps({"scaling_factor": 0.13025}))
    assert load_config(source) == load_config(str(tmp_path)) == {"scaling_factor": 0.13025}
    for content, words in [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "holds a JSON list"),
        (b" " * ((1 << 20) + 1), "at most 1 MiB"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words) as caught:
            load_config(source)
        assert str(caught.value).isprintable()
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a file"):
        load_config(source)
