"""A Hugging Face hub on this machine that takes commits: branches, large file storage, ranges, and faults for tests.

It speaks the HTTP API that huggingface_hub uses without Xet storage. It needs neither torch nor our packages.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
LARGE = (".onnx", ".data")  # suffixes that .gitattributes sends to large file storage


@dataclass
class Repo:
    """Branches and tags by name, and the files of every commit."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: Files, ref: str = "main") -> str:
        content = json.dumps([ref, len(self.commits), sorted((n, sha256(b).hexdigest()) for n, b in files.items())])
        name = sha1(content.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs[ref] = name
        return name

    def at(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class BundleHub:
    """What the server holds, what it was asked, and how it fails."""

    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large file storage, by SHA-256
    requests: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)  # bytes of bodies by path in the repository
    received: Counter[str] = field(default_factory=Counter)  # bytes of uploads by SHA-256
    cut: dict[str, list[int]] = field(default_factory=dict)  # path -> bytes after which each answer is cut
    instead: Files = field(default_factory=dict)  # what is sent for a path in place of its content
    status: dict[str, int] = field(default_factory=dict)  # part of a URL -> status of the answer
    cards: dict[str, dict] = field(default_factory=dict)  # metadata of a repository's card
    card_errors: list[str] = field(default_factory=list)  # what is wrong with every pushed card
    address: str = ""

    def content(self, content: bytes) -> bytes:
        """A pointer to large file storage as its content."""
        found = re.fullmatch(rb"lfs:([0-9a-f]{64})", content)
        return self.stored[found[1].decode()] if found else content


class Handler(BaseHTTPRequestHandler):
    hub: BundleHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.handle_one()

    def do_GET(self) -> None:
        self.handle_one()

    def do_POST(self) -> None:
        self.handle_one()

    def do_PUT(self) -> None:
        self.handle_one()

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for part, status in self.hub.status.items():
            if part in f"{self.command} {path}":
                return self.answer(status, {"error": "refused by the test"})
        if self.command == "PUT":
            oid = path.rpartition("/")[2]
            assert sha256(body).hexdigest() == oid
            self.hub.stored[oid] = body
            self.hub.received[oid] += len(body)
            return self.answer(200, {})
        if path.startswith("/api/"):
            return self.api(path.removeprefix("/api/"), body)
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        owner, name, _, rest = path.strip("/").split("/", 3)
        return self.resolve(f"{owner}/{name}", rest)

    def api(self, path: str, body: bytes) -> None:
        if path == "validate-yaml":
            errors = [{"message": text} for text in self.hub.card_errors]
            return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        if path == "repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            known = name in self.hub.repos
            repo = self.hub.repos.setdefault(name, Repo(private=wanted.get("visibility") == "private"))
            if not known:
                repo.commit({".gitattributes": b"*.onnx filter=lfs\n"})
            return self.answer(409 if known else 200, {"url": f"{self.hub.address}/{name}"})
        match = re.fullmatch(r"models/([^/]+/[^/]+)(?:/(revision|preupload|commit|branch)/(.+))?", path)
        if match is None:
            return self.answer(404, {})
        repo, what, revision = self.hub.repos.get(match[1]), match[2] or "revision", match[3] or "main"
        if repo is None:
            return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        if what == "branch":
            known = revision in repo.refs
            repo.refs.setdefault(revision, repo.refs["main"])
            return self.answer(409 if known else 200, {})
        commit = repo.at(revision)
        if commit is None:
            return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": one, "size": len(self.hub.content(files[one]))} for one in files]
            info = {"id": match[1], "sha": commit, "siblings": siblings, "private": repo.private}
            return self.answer(200, info | ({"cardData": card} if (card := self.hub.cards.get(match[1])) else {}))
        if what == "preupload":
            asked = json.loads(body)["files"]
            modes = [self.upload_mode(one["path"], files) for one in asked]
            return self.answer(200, {"files": modes})
        return self.take_commit(match[1], revision, dict(files), body)

    def upload_mode(self, path: str, files: Files) -> dict[str, object]:
        large = path.endswith(LARGE)
        held = files.get(path)
        oid = None
        if held is not None:
            oid = (
                held.decode()[4:] if held.startswith(b"lfs:") else sha1(b"blob %d\0%b" % (len(held), held)).hexdigest()
            )
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def take_commit(self, repo: str, revision: str, files: Files, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    return self.answer(400, {"error": "the object was not uploaded"})
                files[value["path"]] = f"lfs:{value['oid']}".encode()
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.hub.repos[repo].commit(files, revision)
        return self.answer(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{oid}", "commitOid": oid})

    def batch(self, wanted: dict) -> None:
        objects = []
        for one in wanted["objects"]:
            action = {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}", "header": {}}}
            objects.append({**one, **({} if one["oid"] in self.hub.stored else {"actions": action})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def resolve(self, name: str, rest: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        revision, _, path = rest.partition("/")
        commit = repo.at(revision)
        if commit is None:
            return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        if path not in repo.commits[commit]:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = self.hub.content(repo.commits[commit][path])
        tag = sha256(content).hexdigest() if path.endswith(LARGE) else sha1(content).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, content, headers)
        content = self.hub.instead.get(path, content)
        start, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(found[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        cuts = self.hub.cut.get(path)
        stop = cuts.pop(0) if cuts else len(part)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(part))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(part[:stop])
        self.wfile.flush()
        self.hub.sent[path] += len(part[:stop])
        self.close_connection = stop < len(part) or self.close_connection

    def answer(self, status: int, content: bytes | dict, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running() -> Iterator[BundleHub]:
    """An empty hub on a free port."""
    handler = type("OneBundleHub", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub = BundleHub(address=f"http://127.0.0.1:{server.server_port}")
    handler.hub = hub
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
