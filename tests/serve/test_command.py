"""`moebius-serve`: what it refuses to start with, its process, and what it imports."""

from __future__ import annotations

import ast
import base64
import builtins
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
import typer

from moebius_serve import cli


@pytest.fixture
def refused(toy_bundle, monkeypatch, capsys):
    """refused(arguments, word, bundle): exit code 2 and one line of error with the word; None gives no bundle."""

    def check(*arguments: object, word: str, bundle=toy_bundle.path) -> None:
        given = arguments if bundle is None else (bundle, *arguments)
        monkeypatch.setattr(sys, "argv", ["moebius-serve", *map(str, given)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.strip()]
        assert (leaving.value.code, captured.out, len(lines)) == (2, "", 1), captured
        assert word in lines[0], lines

    return check


def test_a_port_that_is_taken(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused("--port", taken.getsockname()[1], word="Choose another --port")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--host", "0.0.0.0"], "--token"),
        (["--host", "::"], "--token"),
        (["--host", "192.0.2.1"], "--token"),
        (["--host", "192.0.2.1", "--token", "x"], "cannot listen on 192.0.2.1"),  # no address of this machine
        (["--token", ""], "--token"),
        (["--token", "a\nb"], "--token"),
        (["--allow-origin", "paint.example"], "https://NAME"),
        (["--allow-origin", "https://paint.example/x"], "https://NAME"),
        (["--allow-origin", "*"], "https://NAME"),
        (["--mode", "worst"], "--mode"),
        (["--queue", "0"], "--queue"),
        (["--max-megapixels", "101"], "--max-megapixels"),
        (["--runtime", "abacus", "--port", "0"], "abacus"),
        (["--segmenter", "none", "--port", "0"], "one encoder and one decoder"),
        (["--port", "x"], "--port"),
    ],
)
def test_wrong_arguments(refused, arguments, word):
    refused(*arguments, word=word)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--runtime", "ort-cpu"], ["--runtime"]),  # the default, but given
        (["--device", "0"], ["--device"]),
        (["--precision", "fp16", "--threads", "2"], ["--precision", "--threads"]),
        (["--mode", "fast"], ["--mode"]),
        (["--segmenter", "folder"], ["--segmenter"]),
        (["--save-dir", "folder"], ["--save-dir"]),
        (["--token", "secret"], ["--token"]),
        (["--allow-origin", "https://a.example"], ["--allow-origin"]),
        (["--queue", "3", "--max-megapixels", "4"], ["--queue", "--max-megapixels"]),
        (["some-bundle"], ["some-bundle"]),
        (["moebius-bundle"], ["moebius-bundle"]),
    ],
)
def test_a_site_refuses_what_concerns_a_bundle(refused, arguments, named, tmp_path):
    for name in named:
        refused(*arguments, "--site", tmp_path, "--port", "0", word=name, bundle=None)
    refused(*arguments, "--site", tmp_path, "--port", "0", word="would have no effect", bundle=None)
    assert not (tmp_path / "folder").exists()


def test_a_site_refuses_a_token_of_the_environment(refused, monkeypatch, tmp_path):
    """A person who set it believes that the server is locked."""
    monkeypatch.setenv("MOEBIUS_TOKEN", "secret")
    refused("--site", tmp_path, word="the variable MOEBIUS_TOKEN", bundle=None)


def test_every_option_is_a_sites_or_a_bundles():
    """A new option is refused beside --site unless it is listed, and no listed one has gone."""
    names = {parameter.name for parameter in typer.main.get_command(cli.app).params}
    assert names > cli.SITE_OPTIONS


def test_no_bundle_and_a_save_dir_that_is_a_file(refused, tmp_path):
    refused("--port", 0, word="manifest.json", bundle=tmp_path)
    (tmp_path / "file").touch()
    refused("--save-dir", tmp_path / "file", word="--save-dir")


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra(refused, monkeypatch, missing):
    """The first line that needs it says what to install."""
    real = builtins.__import__

    def without(name, *arguments, **more):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *arguments, **more)

    for name in [name for name in sys.modules if name.startswith(("moebius_serve.", missing)) and name != cli.__name__]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    refused("--port", 0, word="pip install 'moebius-edge[serve]'")


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moebius-serve", "--version"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert not leaving.value.code
    assert re.fullmatch(r"moebius-edge \d+\.\d+.*\n", capsys.readouterr().out)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_job_exits_with_0(toy_bundle, draw, sign):
    """The job is cancelled, its client is answered, and nothing is left on the error stream."""
    paths = [path for path in sys.path if path]
    command = [sys.executable, "-m", "moebius_serve.cli", str(toy_bundle.path), "--port", "0", "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        url = re.search(r"http://localhost:\d+", process.stdout.readline()).group()
        area = draw.mask(1000, 1000)
        area[10:900, 10:900] = 255  # dozens of squares of 1000 steps: minutes
        fields = {"image": draw.png(draw.colours(0, 1000, 1000)), "mask": draw.png(area)}
        body = {name: base64.b64encode(data).decode() for name, data in fields.items()} | {"sd_steps": 1000}
        answers: list[httpx.Response] = []
        client = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/api/v1/inpaint", json=body, timeout=60))
        )
        client.start()
        while not httpx.get(f"{url}/health").json()["running"]:
            pass
        process.send_signal(sign)
        assert process.wait(20) == 0
        client.join(20)
        assert answers[0].status_code == 499
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


# --- imports --------------------------------------------------------------------------------------------------

PACKAGE = cli.Path(cli.__file__).parent
ALLOWED = {"fastapi", "starlette", "uvicorn", "numpy", "PIL", "typer", "moebius_runtime", "moebius_serve"}


def imports(path) -> set[str]:
    """Top-level names of every import of a file, also those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_the_server_imports_the_runtime_and_its_extra_only(path):
    assert imports(path) - ALLOWED - ({"onnxruntime"} if path.name == "segmenter.py" else set()) == set()


def test_the_runtime_imports_nothing_of_the_server():
    files = list((PACKAGE.parent / "moebius_runtime").rglob("*.py"))
    assert len(files) > 40
    assert not [path for path in files if imports(path) & {"moebius_serve", "fastapi", "starlette", "uvicorn"}]


def test_the_command_starts_without_the_extra_and_without_torch():
    """`--help` and the advice on a missing extra need neither."""
    code = (
        "import sys, moebius_serve.cli; print(sorted({'fastapi', 'uvicorn', 'torch', 'onnxruntime'} & {*sys.modules}))"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == "[]\n", done.stderr
