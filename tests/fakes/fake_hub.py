"""A Hugging Face hub on this machine, for tests: it answers as a hub does, and can fail at each moment."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler
from threading import Event
from urllib.parse import unquote, urlsplit

import torch

from moebius.stand_in import TensorSpec, stand_in_state_dict

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "76543210fedcba9876543210fedcba9876543210"
EXPECTED = {"w": TensorSpec((4, 3), torch.float32), "b": TensorSpec((4,), torch.float32)}


def weights(seed: int) -> dict[str, torch.Tensor]:
    return stand_in_state_dict(EXPECTED, seed)


def pickled(seed: int) -> bytes:
    stream = io.BytesIO()
    torch.save(weights(seed), stream)
    return stream.getvalue()


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    files: dict[str, bytes]  # of owner/repo at COMMIT, which is `main`
    old_files: dict[str, bytes]  # at OLD_COMMIT
    sent_instead: dict[str, bytes] = field(default_factory=dict)  # what a broken server sends for a path
    gated: bool = False
    status: int | None = None  # answer everything with this status
    faults: dict[tuple[str, str], int | str] = field(default_factory=dict)  # (moment, file): see `Handler.fail`
    released: Event = field(default_factory=Event)  # ends the stalled answers
    requests: list[str] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)  # seconds that the library wanted to wait between tries
    address: str = ""

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        return {
            "main": (COMMIT, self.files),
            COMMIT: (COMMIT, self.files),
            "v0": (OLD_COMMIT, self.old_files),
            OLD_COMMIT: (OLD_COMMIT, self.old_files),
        }.get(revision)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.status:
            return self.answer(self.hub.status, b"broken")
        if self.hub.gated:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/") and not path.startswith("/api/models/"):
            return self.answer(404, b"")  # what the library asks for itself
        moment = "list" if path.startswith("/api/") else self.command.lower()
        fault = self.hub.faults.get((moment, path.rpartition("/")[2] if moment != "list" else ""))
        if fault == "stall" and moment != "get":
            self.hub.released.wait(30)
            fault = "drop"
        if fault not in (None, "cut", "stall"):
            return self.fail(fault)
        if path.startswith("/api/models/"):
            owner, repo, _, revision = path.removeprefix("/api/models/").split("/", 3)
        else:
            owner, repo, _, revision, *rest = path.strip("/").split("/")
        if f"{owner}/{repo}" != "owner/repo":
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if not (found := self.hub.at(unquote(revision))):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if path.startswith("/api/"):
            siblings = [self.sibling(name, content) for name, content in files.items()]
            info = {"id": "owner/repo", "sha": commit, "siblings": siblings}
            return self.answer(200, json.dumps(info).encode())
        name = "/".join(rest)
        if name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        tag = self.sibling(name, files[name])["blobId"]
        if "lfs" in (entry := self.sibling(name, files[name])):
            tag = entry["lfs"]["sha256"]
        body = files[name] if self.command == "HEAD" else self.hub.sent_instead.get(name, files[name])
        if fault:
            return self.send_half(body, stall=fault == "stall")
        return self.answer(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})

    def fail(self, fault: int | str | None) -> None:
        """Answer with a status, with a page ("html"), with an empty body ("nothing"), or not at all ("drop")."""
        if isinstance(fault, int):
            return self.answer(fault, b"failed")
        if fault == "drop":
            self.close_connection = True
            return None
        return self.answer(200, b"<!doctype html><title>Log in</title>" if fault == "html" else b"")

    def send_half(self, body: bytes, *, stall: bool) -> None:
        """Announce a body, send half of it, and end the connection or send nothing more."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if stall:
            self.hub.released.wait(30)
        self.close_connection = True

    @staticmethod
    def sibling(name: str, content: bytes) -> dict:
        entry = {"rfilename": name, "size": len(content), "blobId": sha1(content).hexdigest()}
        if not name.endswith(".json"):
            entry["lfs"] = {"size": len(content), "sha256": sha256(content).hexdigest(), "pointerSize": 134}
        return entry

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
