"""The Dockerfiles, as far as they can be checked without building them: no network, no GPU, no Jetson."""

import fnmatch
import re
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
