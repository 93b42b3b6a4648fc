"""The Dockerfiles, as far as they can be checked without building them: no network, no GPU, no Jetson."""

import ast
import fnmatch
import importlib
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11")

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(path):
    """(instruction, rest) of each, comments left out and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stages(path):
    """The instructions of each stage, its FROM first."""
    found = []
    for name, rest in instructions(path):
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest))
    return found


def named(path):
    return {rest.split()[2] for name, rest in instructions(path) if name == "FROM" and " AS " in rest}


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def dockerfile(request):
    return request.param


def test_there_is_one_for_each_purpose():
    assert [path.name for path in FILES] == [
        "cpu.Dockerfile",
        "desktop.Dockerfile",
        "jetson-jp6.Dockerfile",
        "serve.Dockerfile",
    ]


def test_base_images_are_pinned(dockerfile):
    for name, rest in instructions(dockerfile):
        if name == "FROM" and rest.split()[0] not in named(dockerfile):
            image, _, tag = rest.split()[0].rpartition(":")
            assert image, rest
            assert tag != "latest"
            assert re.search(r"\d+\.\d+", tag), rest


def test_what_is_copied_exists_and_is_not_ignored(dockerfile):
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    for name, rest in instructions(dockerfile):
        if name != "COPY":
            continue
        words = rest.split()
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in named(dockerfile)
            continue
        for source in words[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in rules, source


def test_the_builder_gets_everything_that_the_wheel_is_made_of():
    path = ROOT / "docker/desktop.Dockerfile"
    copied = {word for name, rest in instructions(path) if name == "COPY" for word in rest.split()[:-1]}
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {package.split("/")[0] for package in wheel["packages"]} <= copied
    assert {PROJECT["readme"], *PROJECT["license-files"], "hatch_build.py"} <= copied


def test_extras_exist(dockerfile):
    extras = re.findall(r"moebius-edge\[([\w,-]+)\]", dockerfile.read_text())
    assert extras
    for extra in ",".join(extras).split(","):
        assert extra in PROJECT["optional-dependencies"], extra


def test_images_run_as_a_plain_user_without_compiler_or_secret(dockerfile):
    found = stages(dockerfile)
    for stage in found[1:]:  # the first makes the wheel
        users = [rest for name, rest in stage if name == "USER"]
        assert users == ["10001"]
        assert [name for name, _ in stage][-3:] == ["USER", "WORKDIR", "CMD"]
        assert "g++" not in " ".join(rest for _, rest in stage)
    assert not re.search(r"(?i)(token|password|secret|api_?key)\s*=", dockerfile.read_text())


def test_apt_leaves_no_lists_and_pip_no_cache(dockerfile):
    for name, rest in instructions(dockerfile):
        if name == "RUN" and "apt-get update" in rest:
            assert "rm -rf /var/lib/apt/lists/*" in rest
            assert "--no-install-recommends" in rest
        for command in re.findall(r"pip (?:install|wheel) [^&]*", rest):
            assert "--no-cache-dir" in command, command


def test_nothing_private_reaches_the_builder():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]

    def sent(path):
        ok = True
        for rule in rules:
            pattern = rule.removeprefix("!")
            parts = [path, *map(str, Path(path).parents)]
            if any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in parts if part != "."):
                ok = rule.startswith("!")
        return ok

    assert sent("runtimes/moebius_runtime/cli.py")
    for path in (".git/config", "moebius-bundle/unet/model.onnx.data", "photo.jpg", ".env", "tests/golden/a.npz"):
        assert not sent(path), path


# --- the commands, outside of a container -------------------------------------------------------------------


def run_commands(path):
    """(program, arguments) of every command of RUN: `a && b`, assignments and the words of `for` left out."""
    found = []
    for name, rest in instructions(path):
        if name != "RUN":
            continue
        for part in re.split(r"&&|;|\||\bdo\b|\bdone\b", rest):
            part = re.sub(r'^\s*\w+="?\$\([^)]*\)"?\s*$', "", part.partition(" > ")[0])
            words = shlex.split(part)
            if words and words[0] != "for":
                found.append((words[0], words[1:]))
    return found


# What the base images have, by Debian's and Ubuntu's essential packages and by python's own image.
IN_BASE = {"apt-get", "rm", "useradd", "echo", "pip", "python3"}


def test_run_commands_are_known(dockerfile):
    """Each program is in the base image, in a package that the same stage installs, or in an environment made there."""
    made = set()
    for program, arguments in run_commands(dockerfile):
        if program == "python3" and arguments[:2] == ["-m", "venv"]:
            made.add(arguments[-1])
        if program.startswith("/"):
            assert any(program.startswith(f"{folder}/bin/") for folder in made), program
        else:
            assert program in IN_BASE, program
    text = dockerfile.read_text()
    if made and not dockerfile.name.startswith("desktop"):  # NVIDIA's image of desktop.Dockerfile has Python and venv
        assert "python3-venv" in text


@cache
def pip_help(command):
    done = subprocess.run([sys.executable, "-m", "pip", command, "--help"], capture_output=True, text=True, check=True)
    return re.findall(r"--[\w-]+", done.stdout)


def test_pip_gets_options_that_it_knows(dockerfile):
    """The options of `pip install` and `pip wheel` exist in this pip: a misspelt one would end the build."""
    for program, arguments in run_commands(dockerfile):
        if Path(program).name != "pip":
            continue
        for option in (word for word in arguments[1:] if word.startswith("--")):
            assert option in pip_help(arguments[0]), f"pip {arguments[0]} {option}"


def commands_of(path):
    """The commands that CMD, ENTRYPOINT and HEALTHCHECK name, and those that the comments show after `docker run`."""
    found = [json.loads(rest) for name, rest in instructions(path) if name in ("CMD", "ENTRYPOINT")]
    found += [json.loads(rest.partition("CMD ")[2]) for name, rest in instructions(path) if name == "HEALTHCHECK"]
    comments = re.sub(r"\\\n#\s*", " ", path.read_text())
    for line in re.findall(r"^#\s+docker run (.*)$", comments, re.MULTILINE):
        image = re.search(r"moebius-edge:[\w.-]+(.*)$", line)
        assert image, line
        words = shlex.split(image[1])
        found += [words] if words else []
    return found


def test_commands_are_scripts_of_the_project_with_options_that_they_have(dockerfile):
    typer = pytest.importorskip("typer")
    found = commands_of(dockerfile)
    assert found
    for program, *arguments in found:
        if program == "python":  # of a HEALTHCHECK, which the next test reads
            continue
        assert program in PROJECT["scripts"], program
        module, name = PROJECT["scripts"][program].split(":")
        assert callable(getattr(importlib.import_module(module), name))
        command = typer.main.get_command(importlib.import_module(module).app)
        while arguments and arguments[0] in getattr(command, "commands", {}):
            command = command.commands[arguments.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for option in (word for word in arguments if word.startswith("-")):
            assert option in known | {"--help"}, f"{program} {option}"


def test_a_server_has_a_health_check_that_its_server_answers():
    """`/health` needs no token and is not the page; Python is all that the image has to ask with."""
    path = ROOT / "docker/serve.Dockerfile"
    (check,) = [rest for name, rest in instructions(path) if name == "HEALTHCHECK"]
    (port,) = [rest for name, rest in instructions(path) if name == "EXPOSE"]
    address = re.search(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", check)
    assert address
    assert address[1] == port
    assert f'_OPEN = ("/", "/docs", "{address[2]}"' in (ROOT / "runtimes/moebius_serve/guard.py").read_text()
    program = json.loads(check.partition("CMD ")[2])
    assert program[0] == "python"
    ast.parse(program[2])


def test_a_file_that_names_something_unknown_would_be_seen(tmp_path):
    """So that the tests above can fail."""
    path = tmp_path / "x.Dockerfile"
    path.write_text('FROM a\nRUN wget x && pip install --no-cashe y\nCMD ["moebius-paint"]\n')
    assert ("wget", ["x"]) in run_commands(path)
    assert commands_of(path) == [["moebius-paint"]]
    with pytest.raises(AssertionError, match="wget"):
        test_run_commands_are_known(path)
    with pytest.raises(AssertionError, match="moebius-paint"):
        test_commands_are_scripts_of_the_project_with_options_that_they_have(path)
