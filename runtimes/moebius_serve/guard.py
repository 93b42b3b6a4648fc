"""What stands before every request: Host, Origin, token, body size and time, and the headers of every answer."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from moebius_serve.limits import Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Refusal = tuple[int, str]  # status, sentence

_READING = ("GET", "HEAD", "OPTIONS")
# The page itself, which asks for the token, and what a load balancer asks.
_OPEN = ("/", "/docs", "/health", "/favicon.ico")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self' blob:; "
    "worker-src 'self' blob:; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
_DRAINED_BYTES, _DRAIN_SECONDS = 1 << 30, 10.0
_PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST, DELETE"),
    (b"access-control-allow-headers", b"authorization, content-type"),
    (b"access-control-max-age", b"600"),
]


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: accepted names of the Host header, without port; others are refused (DNS rebinding). `*`: any.
        origins: pages of other servers that may ask, as `scheme://host[:port]`.
        token: every call of the API must carry it, as `Authorization: Bearer TOKEN`.
    """

    hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "::1"})
    origins: frozenset[str] = field(default_factory=frozenset)
    token: str | None = None


class BodyError(Exception):
    """A body passed a limit while it was read."""


class Guard:
    """ASGI middleware. See `Access` and `Limits`."""

    def __init__(self, app: App, access: Access, limits: Limits) -> None:
        self._app, self._access, self._limits = app, access, limits
        self._receiving = _Budget(limits.receiving_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what is refused itself, and passes on the rest."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        body = _Body(receive, self._limits, self._receiving)
        answer = _Answer(send, origin if origin in self._access.origins else None)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            if "expect" not in headers:
                await _drain(body.receive)
            await answer.refuse(*refusal)
        elif scope["method"] == "OPTIONS" and answer.origin is not None:
            await answer({"type": "http.response.start", "status": 204, "headers": _PREFLIGHT})
            await answer({"type": "http.response.body", "body": b""})
        else:
            await self._pass_on(scope, body, answer)

    async def _pass_on(self, scope: Scope, body: _Body, answer: _Answer) -> None:
        async def send(message: Message) -> None:
            # The framework answers 400 to any error while it reads a body; ours says which.
            if body.problem is None or answer.started:
                await answer(message)

        try:
            await self._app(scope, body, send)
        except BodyError:
            if answer.started:
                raise
        finally:
            body.release()
        if body.problem is not None and not answer.started:
            if body.problem[0] != 408 and not body.complete:
                await _drain(body.receive)
            await answer.refuse(*body.problem)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> Refusal | None:
        host = headers.get("host", "").lower()
        if _name(host) not in self._access.hosts and "*" not in self._access.hosts:
            return 421, f"this server does not answer for the host {host[:80]!r}; start it with --allow-host to add one"
        origin = headers.get("origin")
        foreign = origin is not None and origin not in self._access.origins and urlsplit(origin).netloc.lower() != host
        if foreign and scope["method"] not in _READING:
            return 403, f"pages of {origin!r:.80} may not use this server; start it with --allow-origin to add one"
        if not self._authorised(scope, headers):
            return 401, "this server needs a token: send the header `Authorization: Bearer TOKEN`"
        length = headers.get("content-length", "")
        return too_large(self._limits) if length.isdigit() and int(length) > self._limits.body_bytes else None

    def _authorised(self, scope: Scope, headers: dict[str, str]) -> bool:
        token, path = self._access.token, scope["path"]
        if token is None or path in _OPEN or path.startswith("/page/") or scope["method"] == "OPTIONS":
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


async def _drain(receive: Receive) -> None:
    """Reads the rest of a refused body and drops it: a client that still sends would never see the answer.

    A body that takes longer or is larger than any honest one is left, and its client sees a reset connection.
    """
    left, deadline = _DRAINED_BYTES, time.monotonic() + _DRAIN_SECONDS
    with suppress(asyncio.TimeoutError, TimeoutError):
        while left > 0:
            message = await asyncio.wait_for(receive(), max(0.001, deadline - time.monotonic()))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return
            left -= len(message["body"])


class _Budget:
    """Bytes of bodies that all requests hold together. Only the event loop's thread changes it."""

    def __init__(self, most: int) -> None:
        self.left = most


class _Body:
    """`receive` of a request, which ends a body that is too large or too slow."""

    def __init__(self, receive: Receive, limits: Limits, budget: _Budget) -> None:
        self.receive, self._limits, self._budget = receive, limits, budget
        self._deadline = time.monotonic() + limits.body_seconds
        self._seen, self.complete = 0, False
        self.problem: Refusal | None = None

    async def __call__(self) -> Message:
        if self.complete:  # what comes now is the client's going away
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(0.001, self._deadline - time.monotonic()))
        except (asyncio.TimeoutError, TimeoutError) as error:
            self.problem = 408, f"the request was not complete after {self._limits.body_seconds:.0f} s"
            raise BodyError from error
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._seen += size
            self._budget.left -= size
            self.complete = not message.get("more_body", False)
            if self._seen > self._limits.body_bytes:
                self.problem = too_large(self._limits)
                raise BodyError
            if self._budget.left < 0:
                self.problem = 429, "the server is receiving too many large requests; try again later"
                raise BodyError
        return message

    def release(self) -> None:
        """Gives back what the body took of the budget, once the request is answered."""
        self._budget.left += self._seen
        self._seen = 0


class _Answer:
    """`send` of a request, which adds the headers that every answer has."""

    def __init__(self, send: Send, origin: str | None) -> None:
        self._send = send
        self.origin = origin
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            added = dict(_HEADERS)
            if self.origin is not None:
                added |= {"access-control-allow-origin": self.origin, "vary": "Origin"}
                added |= {"access-control-expose-headers": "X-Seed, Content-Disposition, Retry-After"}
                added["cross-origin-resource-policy"] = "cross-origin"
            present = {name.lower() for name, _ in message["headers"]}
            more = [(k.encode(), v.encode("latin-1")) for k, v in added.items() if k.encode() not in present]
            message = {**message, "headers": [*message["headers"], *more]}
        await self._send(message)

    async def refuse(self, status: int, sentence: str) -> None:
        """A whole answer that says why."""
        body = json.dumps(error_body(sentence)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers.append((b"connection", b"close"))
        if status == 429:
            headers.append((b"retry-after", b"10"))
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def error_body(sentence: str) -> dict[str, Any]:
    """The JSON of every error: `detail` for our page and IOPaint's, `error` for OpenAI's client."""
    return {"detail": sentence, "error": {"message": sentence, "type": "invalid_request_error"}}


def too_large(limits: Limits) -> Refusal:
    """The refusal of a body over the limit."""
    return 413, f"the request is larger than {limits.body_bytes >> 20} MiB, the limit of this server"


def _name(host: str) -> str:
    """The name of a Host header without its port and brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
