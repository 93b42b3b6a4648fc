"""The steps of the workflows are targets of the Makefile, so they run on any machine (`make release-lint` lints)."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
# What prepares the machine, and cibuildwheel, which calls the build by itself.
OTHERS = r"sudo apt-get update && sudo apt-get install |python -m pip install cibuildwheel==|python -m cibuildwheel "


def jobs():
    return [
        (f"{path.name}: {name}", job)
        for path in FILES
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items()
    ]


@pytest.mark.parametrize(("name", "job"), jobs(), ids=lambda value: value if isinstance(value, str) else "")
def test_steps_are_targets(name, job):
    for step in job.get("steps", []):
        command = step.get("run")
        if command is None or re.match(OTHERS, command):
            continue
        target = re.match(r"make ([a-z0-9-]+)", command)
        assert target, command
        assert target[1] in TARGETS, command


@pytest.mark.parametrize(("name", "job"), jobs(), ids=lambda value: value if isinstance(value, str) else "")
def test_only_publishing_may_write(name, job):
    """No job gets more than reading, except for the token of trusted publishing, which only a tag reaches."""
    permissions = job.get("permissions", {})
    if name != "wheels.yml: publish":
        assert not permissions
        return
    assert permissions == {"id-token": "write"}
    assert "refs/tags/v" in job["if"]
    assert {"tests", "compiled", "pure"} <= set(job["needs"])


def test_the_default_permission_is_reading():
    for path in FILES:
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}, path.name


def test_the_oldest_python_is_tested():
    declared = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    tested = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]
    for job in ("suite", "runtime"):
        assert tested[job]["strategy"]["matrix"]["python"][0] == declared


def test_each_target_is_described_and_phony():
    described = set(re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    assert TARGETS == described == phony


def test_nothing_secret_is_named():
    assert "secrets." not in "".join(path.read_text(encoding="utf-8") for path in FILES)
