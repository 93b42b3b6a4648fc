"""A hub that fails: each answer at each moment and over each state of the cache, and the advice then followed."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_hub import COMMIT, EXPECTED, OLD_COMMIT, Hub, weights  # loaded by conftest.py
from safetensors.torch import save as to_safetensors

from moebius.weights.checkpoint import CheckpointError, load_checkpoint, load_config
from moebius_runtime.files import hub_answers

constants = pytest.importorskip("huggingface_hub.constants")

SOURCE = "hub:owner/repo/net"
FILE = "diffusion_pytorch_model.safetensors"
OLD, NEW = 11, 12
PASSING = [429, 500, 503, "html", "nothing", "drop"]
FINAL = [401, 403, 404, 418]


@pytest.fixture
def net(hub: Hub) -> Hub:
    """A repository with one folder, in an old and a new revision."""
    hub.files = {f"net/{FILE}": to_safetensors(weights(NEW)), "net/config.json": b'{"revision": "new"}'}
    hub.old_files = {f"net/{FILE}": to_safetensors(weights(OLD)), "net/config.json": b'{"revision": "old"}'}
    return hub


def load(source: str = SOURCE) -> tuple[int | None, str, list[str]]:
    """The seed of the weights that were loaded, their origin or the refusal, and the lines of progress."""
    lines: list[str] = []
    try:
        loaded = load_checkpoint(source, EXPECTED, progress=lines.append)
    except CheckpointError as error:
        return None, str(error), lines
    seeds = [seed for seed in (OLD, NEW) if torch.equal(loaded.state_dict["w"], weights(seed)["w"])]
    return seeds[0], loaded.origin, lines


def fill_cache(hub: Hub, state: str) -> None:
    """Fetches one revision as `main`, as an earlier run did."""
    if state == "empty":
        return
    files, main = hub.files, Hub.at
    hub_files = hub.old_files if state == "older" else files
    commit = OLD_COMMIT if state == "older" else COMMIT
    Hub.at = lambda self, revision: (commit, hub_files)  # type: ignore[method-assign]
    try:
        assert load()[0] == (OLD if state == "older" else NEW)
        assert load_config(SOURCE)
    finally:
        Hub.at = main  # type: ignore[method-assign]


MOMENTS = [("list", ""), ("head", FILE), ("get", FILE)]


@pytest.mark.parametrize("cache", ["empty", "older", "same"])
@pytest.mark.parametrize(("moment", "file"), MOMENTS)
@pytest.mark.parametrize("fault", [*PASSING, *FINAL, "cut"])
def test_weights(net: Hub, capfd: Any, fault: int | str, moment: str, file: str, cache: str) -> None:
    if fault == "cut" and moment != "get":
        return
    fill_cache(net, cache)
    net.faults = {(moment, file): fault}
    seed, text, lines = load()
    assert capfd.readouterr() == ("", "")  # the library is silent
    assert sum("trying again" in line for line in lines) == len(net.slept) <= 5
    if seed is None:  # allowed where nothing can serve, or where the answer is final
        assert cache == "empty" or fault in FINAL
        assert fault not in PASSING or "does not hold it" in text
        if isinstance(fault, int):
            assert f"HTTP status {fault}" in text
        advice = "hf auth login" if fault in (401, 403) else "local copy"
        assert advice in text
    else:
        assert cache != "empty"
        assert seed == (OLD if cache == "older" else NEW)
        assert cache == "same" or "taken from the cache" in text
        assert text.startswith(f"{SOURCE}/{FILE}@{OLD_COMMIT if cache == 'older' else COMMIT}")
    net.faults = {}  # "try again", "set HF_ENDPOINT to a mirror"
    assert load()[:2] == (NEW, f"{SOURCE}/{FILE}@{COMMIT}")


@pytest.mark.parametrize("cache", ["empty", "same"])
@pytest.mark.parametrize("moment", ["head", "get"])
@pytest.mark.parametrize("fault", [*PASSING, *FINAL])
def test_config(net: Hub, capfd: Any, fault: int | str, moment: str, cache: str) -> None:
    fill_cache(net, cache)
    net.faults = {(moment, "config.json"): fault}
    missing = fault in (404, 410)
    if cache == "empty" and not missing:
        with pytest.raises(
            CheckpointError, match=f"HTTP status {fault}" if isinstance(fault, int) else "hub"
        ) as caught:
            load_config(SOURCE)
        assert "local copy" in str(caught.value) or fault in (401, 403)
    else:
        assert load_config(SOURCE) in ([None, {"revision": "new"}] if missing else [{"revision": "new"}])
    assert capfd.readouterr() == ("", "")
    net.faults = {}
    assert load_config(SOURCE) == {"revision": "new"}


def test_config_is_optional_where_the_cache_holds_the_weights(net: Hub) -> None:
    assert load()[0] == NEW  # the weights alone
    net.faults = {("head", "config.json"): 503, ("list", ""): 503}
    assert load_config(SOURCE) is None
    assert load()[0] == NEW


@pytest.mark.parametrize("wait", ["3600", "86400"])
def test_a_hub_that_asks_to_wait_for_long_is_not_waited_for(net: Hub, monkeypatch: Any, wait: str) -> None:
    handler = next(cls for cls in _handlers() if getattr(cls, "hub", None) is net)
    answer = handler.answer

    def limited(self: Any, status: int, body: bytes, headers: Any = None) -> None:
        answer(self, status, body, {**(headers or {}), "Retry-After": wait} if status == 429 else headers)

    monkeypatch.setattr(handler, "answer", limited)
    for moment, file in MOMENTS:
        net.faults, net.slept[:] = {(moment, file): 429}, []
        seed, text, _ = load()
        assert seed is None
        assert "HTTP status 429" in text
        assert f"try again in {int(wait) + (moment != 'list')} seconds" in text
        assert net.slept == []


def _handlers() -> list[type]:
    from fake_hub import Handler

    return Handler.__subclasses__()


@pytest.mark.parametrize(("moment", "file"), [*MOMENTS, ("head", "config.json")])
def test_a_stalled_hub_ends(net: Hub, monkeypatch: Any, capfd: Any, moment: str, file: str) -> None:
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.05)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.05)
    net.faults = {(moment, file): "stall"}
    lines: list[str] = []
    if file == "config.json":
        with pytest.raises(CheckpointError) as caught:
            load_config(SOURCE, progress=lines.append)
        text = str(caught.value)
    else:
        _, text, lines = load()
    assert "cannot be reached" in text
    assert "HF_ENDPOINT" in text
    assert sum("trying again" in line for line in lines) == len(net.slept) <= 5
    assert capfd.readouterr() == ("", "")
    net.faults = {}
    net.released.set()
    monkeypatch.undo()


def test_a_download_that_starts_over_again_and_again_ends(net: Hub, monkeypatch: Any) -> None:
    """A proxy that cuts each download and ignores ranges: the library alone resumes for ever."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16)
    net.faults = {("get", FILE): "cut"}
    seed, text, lines = load()
    assert seed is None
    assert "fails" in text
    assert len(net.slept) == sum("trying again" in line for line in lines) == hub_answers._RESUMPTIONS
    net.faults = {}
    assert load()[0] == NEW


def test_a_user_s_process_prints_nothing_of_the_library(net: Hub) -> None:
    """In a process of its own, where huggingface_hub adds its log handler as late as it does for users."""
    net.faults = {("head", FILE): 500}
    program = (
        "import time, torch, moebius.weights.checkpoint as c; time.sleep = lambda seconds: None\n"
        "try: c.load_checkpoint('hub:owner/repo/net', {'w': ((4, 3), torch.float32)}, progress=print)\n"
        "except c.CheckpointError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line for line in lines if "trying again" in line] == [
        f"HTTP Error 500; trying again in {wait} s" for wait in (1, 2, 4)
    ]
    assert "HTTP status 500" in lines[-1]
    assert len(lines) == 5


def test_a_request_that_takes_long_to_fail_is_not_repeated(net: Hub, monkeypatch: Any) -> None:
    times = itertools.count(0, 70)
    monkeypatch.setattr(hub_answers, "time", SimpleNamespace(monotonic=lambda: float(next(times))))
    net.faults = {("head", FILE): 500}
    seed, text, _ = load()
    assert seed is None
    assert "HTTP status 500" in text
    assert net.slept == []


def test_other_threads_and_debug_lines_keep_the_library_s_own_log() -> None:
    logger = logging.getLogger("huggingface_hub")
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        lines: list[str] = []
        with hub_answers.quiet_retries(lines.append):
            logger.warning("'reset' thrown while requesting HEAD http://x")
            logger.warning("Retrying in 2s [Retry 1/5].")
            record = logger.makeRecord(logger.name, logging.WARNING, "f", 1, "of another thread", (), None)
            record.thread = -1
            logger.handle(record)
        assert lines == ["reset; trying again in 2 s"]
        assert shown == ["of another thread"]
        logger.warning("after")
        assert shown == ["of another thread", "after"]
    finally:
        logger.removeHandler(handler)


# --- addresses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["hf-mirror.com", "hf-mirror.com:8080/hub", "ftp://hf-mirror.com", "https://", "http://[::1", "not one"]
)
def test_an_address_that_is_none(net: Hub, monkeypatch: Any, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    for call in (lambda: load_checkpoint(SOURCE, EXPECTED), lambda: load_config(SOURCE)):
        with pytest.raises(CheckpointError, match="HF_ENDPOINT is ") as caught:
            call()
        assert "https://" in str(caught.value)


def test_the_advice_for_a_missing_scheme_works(net: Hub, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_ENDPOINT", net.address.removeprefix("http://"))
    text = load()[1]
    advised = text.partition("such as ")[2].partition(". Unset")[0]
    assert advised == net.address.replace("http://", "https://")
    monkeypatch.setenv("HF_ENDPOINT", net.address)
    assert load()[0] == NEW


# --- damage ----------------------------------------------------------------------------------------------------


def damaged(content: bytes, kind: str) -> bytes:
    return {
        "bit": content[:-2] + bytes([content[-2] ^ 1]) + content[-1:],
        "truncated": content[:-40],
        "empty": b"",
        "html": b"<html>Log in</html>".ljust(len(content)),
        "zeros": bytes(len(content)),
    }[kind]


KINDS = ["bit", "truncated", "empty", "html", "zeros"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_blob_is_downloaded_again(net: Hub, monkeypatch: Any, tmp_path: Path, kind: str, links: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    assert load()[0] == NEW
    folder = "blobs/*" if links else f"net/{FILE}"
    blob = next(path for path in (tmp_path / "hf" / "hub").rglob(folder))
    blob.write_bytes(damaged(net.files[f"net/{FILE}"], kind))
    if links:  # without a network the message names the blob; as advised, a run with one fetches it again
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        text = load()[1]
        assert str(blob) in text or kind == "empty"
        assert "run once with network access" in text
        monkeypatch.delenv("HF_HUB_OFFLINE")
    seed, origin, lines = load()
    assert (seed, origin) == (NEW, f"{SOURCE}/{FILE}@{COMMIT}")
    assert any(f"{blob} is damaged; downloading it again" in line for line in lines)
    net.requests.clear()
    assert load()[0] == NEW
    assert not any(request.startswith("GET") and "/resolve/" in request for request in net.requests)


@pytest.mark.parametrize("kind", ["bit", "html", "zeros"])
def test_a_mirror_that_changes_the_file(net: Hub, tmp_path: Path, kind: str) -> None:
    net.sent_instead[f"net/{FILE}"] = damaged(net.files[f"net/{FILE}"], kind)
    seed, text, _ = load()
    blob = next((tmp_path / "hf").rglob("blobs/*"))
    assert seed is None
    assert str(blob) in text
    assert "second download" in text
    net.sent_instead.clear()  # another mirror
    assert load()[0] == NEW


@pytest.mark.parametrize("kind", ["truncated", "empty", "html"])
def test_a_damaged_config(net: Hub, monkeypatch: Any, tmp_path: Path, kind: str) -> None:
    assert load_config(SOURCE)
    assert load()[0] == NEW
    blob = next(path for path in (tmp_path / "hf").rglob("blobs/*") if path.stat().st_size < 100)
    blob.write_bytes({"truncated": b'{"rev', "empty": b"", "html": b"<html>"}[kind])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="is not JSON") as caught:
        load_config(SOURCE)
    assert str(blob) in str(caught.value)
    content = blob.read_bytes()
    blob.unlink()  # as advised: it is optional
    assert load_config(SOURCE) is None
    blob.write_bytes(content)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert load_config(SOURCE) == {"revision": "new"}


# --- what the cache alone is enough for ------------------------------------------------------------------------

STATES = ["whole", "missing", "dangling", "empty", "truncated"]
REFS = ["main", "missing", "unknown commit", "garbage"]
OTHERS = [0, 1, 2]


def build_cache(folder: Path, state: str, config: str, ref: str, others: int) -> Path:
    """A cache as huggingface_hub lays it out, with the new revision in a state; the blob of its weights."""
    repository = folder / "models--owner--repo"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    commits = [COMMIT, OLD_COMMIT, "f" * 40][: 1 + others]
    blobs = []
    for commit in commits:
        snapshot = repository / "snapshots" / commit / "net"
        snapshot.mkdir(parents=True)
        content = to_safetensors(weights(NEW if commit == COMMIT else OLD))
        blob = repository / "blobs" / sha256(content).hexdigest()
        blobs.append(blob)
        how = state if commit == COMMIT else "whole"
        if how != "missing":
            (snapshot / FILE).symlink_to(f"../../../blobs/{blob.name}")
        if how != "dangling" and how != "missing":
            blob.write_bytes({"empty": b"", "truncated": content[:-40]}.get(how, content))
        how = config if commit == COMMIT else "there"
        if how != "missing":
            (snapshot / "config.json").symlink_to(f"../../../blobs/config-{commit[:4]}")
        if how == "there":
            (repository / "blobs" / f"config-{commit[:4]}").write_text(f'{{"revision": "{commit[:4]}"}}')
    if ref != "missing":
        text = {"main": COMMIT, "unknown commit": "e" * 40, "garbage": "../../../etc"}[ref]
        (repository / "refs" / "main").write_text(text)
    return blobs[0]


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("ref", REFS)
def test_states_of_a_cache(net: Hub, monkeypatch: Any, tmp_path: Path, ref: str, offline: bool) -> None:
    """Without a network, or with a hub that fails: the asked revision, else the only complete one, else an offer."""
    cases = itertools.product(STATES, ["there", "missing", "dangling"], OTHERS)
    for number, (state, config, others) in enumerate(cases):
        cache = tmp_path / f"cache-{number}"
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
        net.status = None if offline else 503
        blob = build_cache(cache, state, config, ref, others)
        case = (state, config, ref, others)
        with_content = state in ("whole", "truncated")
        complete = [COMMIT] * with_content + [OLD_COMMIT, "f" * 40][:others]
        taken = COMMIT if ref == "main" and with_content else None
        if taken is None and len(complete) == 1:
            taken = complete[0]
        seed, text, lines = load()
        if taken is None:
            assert seed is None, case
            assert all(f"{SOURCE}@{commit}" in text for commit in complete), case  # offered by name
            for commit in complete:
                if commit != COMMIT or state == "whole":
                    assert load(f"{SOURCE}@{commit}")[0] == (NEW if commit == COMMIT else OLD), case
        elif taken == COMMIT and state == "truncated":
            assert seed is None, case
            assert str(blob) in text, case
        else:
            assert seed == (NEW if taken == COMMIT else OLD), case
            assert text.startswith(f"{SOURCE}/{FILE}@{taken}"), case
            noted = "the cache's only complete revision" in text
            assert noted == (ref != "main" or taken != COMMIT), case
            found = load_config(SOURCE)
            beside = taken != COMMIT or config == "there"
            assert found == ({"revision": taken[:4]} if beside else None), case
        assert len(lines) <= 6, case
    net.status = None
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert load()[0] == NEW  # "run once with network access"


def test_another_revision_is_offered_and_not_taken_for_a_pinned_one(net: Hub, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    build_cache(tmp_path / "cache", "missing", "there", "main", 1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for pinned in (COMMIT, "v1", "a" * 40):
        seed, text, _ = load(f"{SOURCE}@{pinned}")
        assert seed is None
        assert f"name {SOURCE}@{OLD_COMMIT}" in text
    assert load(f"{SOURCE}@{OLD_COMMIT}")[0] == OLD  # the advice


@pytest.mark.parametrize("status", [*range(400, 420), 425, 429, *range(500, 512)])
def test_every_status_has_its_advice(net: Hub, status: int) -> None:
    net.status = status
    seed, text, lines = load()
    assert seed is None
    assert f"HTTP status {status}" in text
    later = status in (408, 425, 429) or status >= 500
    assert ("try again in" in text) == later
    assert len([line for line in lines if "trying" in line]) == 0  # the list of files is asked for once
    net.status = None
    assert load()[0] == NEW


@pytest.mark.parametrize("repo", ["owner/a--b", "owner/name.", "owner/x.git"])
def test_a_name_that_no_repository_can_have(net: Hub, repo: str) -> None:
    seed, text, _ = load(f"hub:{repo}/net")
    assert seed is None
    assert f"{repo} is no name of a repository" in text
    assert "answer" not in text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_cache_without_room_or_rights(net: Hub, monkeypatch: Any, tmp_path: Path, number: int) -> None:
    real = Path.open

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".incomplete" and str(tmp_path / "hf") in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    seed, text, _ = load()
    assert seed is None
    assert os.strerror(number) in text
    assert "set HF_HOME to a folder" in text
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))  # the advice
    assert load()[0] == NEW


def test_settings_of_the_library_that_it_cannot_use(net: Hub, monkeypatch: Any) -> None:
    import builtins

    real = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "huggingface_hub":
            raise ValueError("invalid literal for int() with base 10: 'ten'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(CheckpointError, match="check the variables HF_"):
        load_checkpoint(SOURCE, EXPECTED)
