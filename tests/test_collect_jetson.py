"""scripts/collect-jetson.sh, run with stand-ins for the commands that a device has."""

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/collect-jetson.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Each says what it was asked, and writes the files that the real one would.
RECORD = 'echo "$(basename "$0") $*" >> "$CALLS"\n'
WRITE = """
while [ $# -gt 0 ]; do
  if [ "$1" = "$OPTION" ]; then printf '%s' "$CONTENT" > "$2"; fi
  shift
done
"""
COMMANDS = {
    "moebius-export": RECORD + 'echo "I am $(id -un) on $(uname -n) in $HOME"\nOPTION=--json\n'
    'CONTENT="{\\"home\\": \\"$HOME\\", \\"twice\\": \\"$HOME $HOME/x\\", \\"other\\": \\"${HOME}less\\"}"\n' + WRITE,
    "moebius-inpaint": RECORD + "OPTION=--out\nCONTENT=picture\n" + WRITE,
    "moebius-bench": RECORD + "OPTION=--json\nCONTENT='{}'\n" + WRITE,
    "tegrastats": RECORD + 'echo "$$" > "$CALLS.tegrastats"\necho "RAM 855/7620MB GR3D_FREQ 0%"\nexec sleep 60\n',
    "nvpmodel": RECORD + "echo 'NV Power Mode: 15W'\n",
}


@pytest.fixture
def device(tmp_path):
    """device(*arguments, **commands): runs the script; a command's text replaces its stand-in, None takes it away."""
    bundle = tmp_path / "my.bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    (tmp_path / "home").mkdir()

    def run(*arguments, **commands):
        bin_folder = tmp_path / "bin"
        shutil.rmtree(bin_folder, ignore_errors=True)
        bin_folder.mkdir()
        for name, text in (COMMANDS | {key.replace("_", "-"): text for key, text in commands.items()}).items():
            if text is not None:
                (bin_folder / name).write_text(f"#!/bin/bash\nset -u\n{text}")
                (bin_folder / name).chmod(0o755)
        environment = {
            "PATH": f"{bin_folder}:/usr/bin:/bin",
            "HOME": str(tmp_path / "home"),
            "CALLS": str(tmp_path / "calls"),
            "TMPDIR": str(tmp_path),
        }
        command = ["bash", str(SCRIPT), *map(str, arguments or ["my.bundle"])]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    run.folder = tmp_path
    return run


def unpacked(path):
    with tarfile.open(path) as archive:
        return {
            member.name.removeprefix("results/"): archive.extractfile(member).read().decode()
            for member in archive.getmembers()
            if member.isfile()
        }


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_step_is_run_and_packed(device):
    done = device()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "moebius-results.tar.gz\n"
    calls = (device.folder / "calls").read_text().splitlines()
    assert "moebius-export trt my.bundle --fp16 --backend tensorrt" in calls
    assert any(call.startswith("moebius-bench run my.bundle --runtime tensorrt --precision fp16") for call in calls)
    assert sum(call.startswith("moebius-inpaint") for call in calls) == 2
    files = unpacked(device.folder / "moebius-results.tar.gz")
    assert {
        "summary.txt",
        "doctor-before.json",
        "doctor-after.json",
        "build.log",
        "quality-against-ort-cpu.json",
        "bench.json",
        "tegrastats.log",
        "power-mode.txt",
    } <= files.keys()
    assert not [name for name in files if name.endswith((".png", ".jpg"))]
    assert "RAM 855/7620MB" in files["tegrastats.log"]
    assert not running(int((device.folder / "calls.tegrastats").read_text()))
    left = {path.name for path in device.folder.iterdir()}
    assert left == {"bin", "calls", "calls.tegrastats", "home", "moebius-results.tar.gz", "my.bundle"}


def test_names_are_hidden_unless_they_may_be_seen(device):
    home = str(device.folder / "home")
    assert device().returncode == 0
    files = unpacked(device.folder / "moebius-results.tar.gz")
    found = json.loads(files["doctor-before.json"])
    assert (found["home"], found["twice"]) == ("HOME", "HOME HOME/x")
    assert found["other"].endswith("/homeless")  # another folder, whose name only begins as the user's does
    assert files["build.log"] == "I am USER on HOST in HOME\n"
    assert device("my.bundle", "--with-names").returncode == 0
    files = unpacked(device.folder / "moebius-results.tar.gz")
    assert json.loads(files["doctor-before.json"])["home"] == home


def test_a_step_that_fails_is_told_and_the_rest_goes_on(device):
    done = device(moebius_export=COMMANDS["moebius-export"] + 'echo "error: no space" >&2\nexit 2\n')
    assert done.returncode == 1
    assert "exit code 2; its last line: error: no space" in done.stderr
    files = unpacked(device.folder / "moebius-results.tar.gz")
    assert "build: exit code 2" in files["summary.txt"]
    assert "bench: exit code 0" in files["summary.txt"]


def test_a_picture_that_is_missing_is_not_compared(device):
    done = device(moebius_inpaint=RECORD + "exit 2\n")
    assert done.returncode == 1
    files = unpacked(device.folder / "moebius-results.tar.gz")
    assert "quality: not run, a picture is missing" in files["summary.txt"]
    assert "quality-against-ort-cpu.json" not in files


def test_other_choices(device):
    done = device(
        "my.bundle",
        "--skip-build",
        "--precision",
        "fp32",
        "--runtime",
        "tensorrt-rtx",
        "--out",
        "x.tgz",
        tegrastats=None,
    )
    assert done.returncode == 0, done.stderr
    calls = (device.folder / "calls").read_text()
    assert " trt " not in calls
    assert "--runtime tensorrt-rtx --precision fp32" in calls
    assert "tegrastats.log" not in unpacked(device.folder / "x.tgz")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--skip-build"], "no BUNDLE was named"),
        (["nothing"], "nothing has no manifest.json"),
        (["my.bundle", "other"], "one BUNDLE is expected"),
        (["my.bundle", "--precision", "int4"], "--precision int4: expected fp16, fp32 or bf16"),
        (["my.bundle", "--steps", "many"], "expected whole numbers"),
        (["my.bundle", "--runtime", "torch"], "--runtime torch: expected"),
        (["my.bundle", "--out"], "--out needs a value"),
        (["my.bundle", "--out", "no/such/x"], "its folder does not exist"),
        (["my.bundle", "--picture", "my.bundle/manifest.json"], "give both --picture and --mask"),
        (["my.bundle", "--colour"], "unknown option --colour"),
    ],
)
def test_wrong_usage(device, arguments, words):
    done = device(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (device.folder / "calls").exists()


def test_a_command_that_is_not_installed(device):
    done = device(moebius_bench=None)
    assert done.returncode == 2
    assert "moebius-bench is not installed, or its environment is not active" in done.stderr


def test_help():
    done = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "--with-names" in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_content():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
