"""uvicorn, with what it lacks: a time limit for request heads, and an end on SIGTERM that is not one by a signal."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from socket import IPPROTO_TCP, TCP_NODELAY, socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from moebius_serve.guard import App
from moebius_serve.jobs import Jobs
from moebius_serve.limits import Limits

_LOOKS = 4  # at a connection, per `head_seconds`


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM, which cancel the job that runs within a step; `run` then returns.

    Args:
        application: see `create_app`.
        jobs: are stopped by the signal; None where there are none.
        limits: of this server.
        ready: called once connections are accepted.
    """

    def __init__(self, application: App, jobs: Jobs | None, limits: Limits, ready: Callable[[], None]) -> None:
        class Protocol(_Protocol):
            head_seconds = limits.head_seconds

        super().__init__(
            uvicorn.Config(
                application,
                http=Protocol,
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=15,
                h11_max_incomplete_event_size=64 << 10,
            )
        )
        self._jobs, self._ready = jobs, ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stops the jobs, then the server. uvicorn's own would raise the signal again at the end."""
        if self._jobs is not None:
            self._jobs.stop()  # also ends streams of events, which uvicorn waits for
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """As uvicorn's; then reports that it is ready."""
        await super().startup(sockets)
        self._ready()


class _Protocol(H11Protocol):
    """Closes a connection that sends no whole head for `head_seconds`."""

    head_seconds: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so only for sockets that were made with a protocol number. Without it a head and its body, which
        # are two writes, are 40 ms apart where the client delays its acknowledgement.
        transport.get_extra_info("socket").setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        self._idle, self._last = 0, None
        self.loop.call_later(self.head_seconds / _LOOKS, self._look)

    def _look(self) -> None:
        cycle: Any = self.cycle
        busy = cycle is not None and not cycle.response_complete
        self._idle = 0 if busy or cycle is not self._last else self._idle + 1
        self._last = cycle
        if self.transport.is_closing():
            return
        if self._idle >= _LOOKS:
            self.transport.close()
        else:
            self.loop.call_later(self.head_seconds / _LOOKS, self._look)
