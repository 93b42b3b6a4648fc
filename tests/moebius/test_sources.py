from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moebius import sources
from moebius.config import preset
from moebius.errors import CheckpointError
from moebius.load import default_guidance
from moebius.sources import (
    RELEASED,
    HubSource,
    LocalSource,
    ShippedSource,
    StandInSource,
    choose_weights,
    locate,
    parse_source,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hub:hustvl/Moebius/ft_places2", HubSource("hustvl/Moebius", "ft_places2")),
        ("hub:hustvl/Moebius", HubSource("hustvl/Moebius")),
        ("shipped:small/vae", ShippedSource("small/vae")),
        ("hub:o/r/a/b.c/d_e@refs/pr/1", HubSource("o/r", "a/b.c/d_e", None, "refs/pr/1")),
        (f"hub:o/r/vae@{COMMIT}", HubSource("o/r", "vae", None, COMMIT)),
        ("hub:o/r@v1.0", HubSource("o/r", "", None, "v1.0")),
        ("hub:o/r/a/ema_model.bin", HubSource("o/r", "a", "ema_model.bin")),
        ("hub:o/r/model.safetensors@main", HubSource("o/r", "", "model.safetensors", "main")),
        ("stand-in", StandInSource(0)),
        ("stand-in:12", StandInSource(12)),
        ("some/folder", LocalSource(Path("some/folder"))),
        ("/abs/ünï code.bin", LocalSource(Path("/abs/ünï code.bin"))),
        ("places2", HubSource("hustvl/Moebius", "ft_places2")),
        ("celebahq", HubSource("hustvl/Moebius", "ft_celebahq")),
        ("ffhq", HubSource("hustvl/Moebius", "ft_ffhq")),
        ("pretrained", HubSource("hustvl/Moebius", "pretrained")),
        ("./pretrained", LocalSource(Path("pretrained"))),
        ("Places2", LocalSource(Path("Places2"))),
        ("stand-ins", LocalSource(Path("stand-ins"))),
    ],
)
def test_source_strings(text: str, source: object) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "shipped:large",
        "shipped:../small",
        "hub:",
        "hub:Moebius",
        "hub:/Moebius/x",
        "hub:o//x",
        "hub:o/r/",
        "hub:o/r//x",
        "hub:o/r/../../etc",
        "hub:o/r/..",
        "hub:../r",
        "hub:o/r/a b",
        "hub:o/r/x@",
        "hub:o/r/x@a@b",
        "hub:o/r@../x",
        "hub:o/r/-x",
        "hub:o/r?x=1",
        "hub:o/r#x",
        "hub:" + "o" * 200 + "/r",
        "hub:o/r" + "/a" * 20,
        "stand-in:",
        "stand-in:-1",
        "stand-in:1.5",
        "stand-in:007",
        "stand-in:٣",
        "stand-in:" + "9" * 40,
        "https://huggingface.co/hustvl/Moebius",
        "file:///etc/passwd",
    ],
)
def test_garbled_source_strings_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(CheckpointError, match="expected") as caught:
        parse_source(text)
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["config.json", "diffusion_pytorch_model.bin"], "diffusion_pytorch_model.bin"),
        (
            ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"],
            "diffusion_pytorch_model.safetensors",
        ),
        (["model.ckpt", "model.pth", "model.pt"], "model.pt"),
        (["mine.pt", "notes.txt"], "mine.pt"),
        (["diffusion_pytorch_model.bin", "optimizer.bin", "scheduler.bin"], "diffusion_pytorch_model.bin"),
        (
            ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"],
            "diffusion_pytorch_model.bin",
        ),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        (
            ["diffusion_pytorch_model.safetensors", "ema_diffusion_pytorch_model.bin"],
            "ema_diffusion_pytorch_model.bin",
        ),
        (["model.bin", "model_ema.bin"], "model_ema.bin"),
        (["ema.pt", "model.pt"], "ema.pt"),
        (["schema.pt"], "schema.pt"),  # "ema" inside a word is no mark
        (["model-00001-of-00002.bin", "model.bin"], "model.bin"),
    ],
)
def test_which_file_of_a_folder(names: list[str], chosen: str) -> None:
    assert choose_weights(names, "folder") == chosen
    assert choose_weights(names[::-1], "folder") == chosen


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "holds no weights"),
        (["config.json", "readme.md"], "holds no weights"),
        (["a.pt", "b.pt"], r"several checkpoints \(a.pt, b.pt\)"),
        (["model.bin", "diffusion_pytorch_model.safetensors"], "several checkpoints"),
        (["ema_a.pt", "ema_b.pt"], "several checkpoints"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "cut in 2 parts"),
    ],
)
def test_no_or_several_candidates_are_refused(names: list[str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        choose_weights(names, "folder")


def test_a_long_list_of_candidates_is_abridged() -> None:
    with pytest.raises(CheckpointError, match="and 92 more") as caught:
        choose_weights([f"{n:03}{'x' * 500}.pt" for n in range(100)], "folder")
    assert len(str(caught.value)) < 1500


def test_local_places(tmp_path: Path) -> None:
    (tmp_path / "ema_model.pt").write_bytes(b"x")
    (tmp_path / "folder.pt").mkdir()
    located = locate(str(tmp_path))
    assert located.path == tmp_path / "ema_model.pt"
    assert located.origin == f"{tmp_path / 'ema_model.pt'}; EMA file"
    with pytest.raises(CheckpointError, match="no such file or folder"):
        locate(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="not a regular file"):
        locate("/dev/null")
    with pytest.raises(CheckpointError, match=r"File name too long|no such file"):
        locate("x" * 5000)
    with pytest.raises(CheckpointError, match="drawn, not read"):
        locate("stand-in")


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_released_name_that_is_a_path_too_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    {"file": path.touch, "folder": path.mkdir, "dangling link": lambda: path.symlink_to("nowhere")}[kind]()
    with pytest.raises(CheckpointError, match="name of released weights and of a file or folder here") as caught:
        parse_source(name)
    for advised, source in ((f"./{name}", LocalSource), (f"hub:hustvl/Moebius/{RELEASED[name].folder}", HubSource)):
        assert advised in str(caught.value)
        assert isinstance(parse_source(advised), source)


@pytest.mark.parametrize(
    ("source", "scale"),
    [
        ("places2", 2.5),
        ("celebahq", 2.0),
        ("ffhq", 2.0),
        ("pretrained", 2.5),
        ("hub:hustvl/Moebius/ft_celebahq", 2.0),
        (f"hub:hustvl/Moebius/ft_ffhq/diffusion_pytorch_model.bin@{COMMIT}", 2.0),
        ("hub:HUSTVL/moebius/ft_celebahq@main", 2.0),
        ("hub:hustvl/Moebius/ft_celebahq/inner", 2.5),
        ("hub:someone/Moebius/ft_celebahq", 2.5),
        ("./ft_celebahq", 2.5),
        ("stand-in", 2.5),
    ],
)
def test_the_papers_guidance_of_released_weights(source: str, scale: float) -> None:
    """Table 6: 2.5 for scenes, 2.0 for portraits; for other weights the preset's."""
    assert default_guidance(source, preset("full")) == scale
    if scale == 2.5 and not source.startswith(("places2", "pretrained")):
        assert default_guidance(source, preset("small")) == 1.0


@pytest.mark.parametrize("first", ["moebius.hub", "moebius.sources", "moebius.locate", "moebius.checkpoint"])
def test_no_import_circle_and_the_old_place_of_locate(first: str) -> None:
    program = f"import {first}, moebius.sources as s, moebius.locate as l; assert s.locate is l.locate"
    subprocess.run([sys.executable, "-c", program], check=True)
    lines = Path(sources.__file__).read_text().splitlines()
    assert not [line for line in lines if line.startswith(("import moebius", "from moebius")) and "errors" not in line]
