"""One part of an export in a process of its own, beside the other part."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from moebius_export.errors import ExportError
from moebius_runtime.errors import MoebiusError
from moebius_runtime.hardware.processors import physical_cores

Progress = Callable[[str, str], None]
_Result = TypeVar("_Result")


@contextmanager
def started(work: Callable[..., _Result], *arguments: Any, parallel: bool) -> Iterator[Callable[[Progress], _Result]]:
    """Starts `work(*arguments, progress)` in a child process; yields the function that waits for its result.

    The child is a fork: it shares what is imported, and has one thread. It ends with the block. Where `parallel` is
    False, on systems other than Linux, and with one core, the function does the work itself. A fork copies
    the locks that other threads hold, so use it where none of them holds one that `work` needs; a progress display's is
    none.

    Raises:
        ExportError: from the function, where the child was killed. What `work` raises comes from it too.
    """
    if not (parallel and sys.platform == "linux" and physical_cores() >= 2):
        yield lambda progress: work(*arguments, progress)
        return
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, work, arguments), daemon=True)
    child.start()
    sender.close()  # the child has the only one, so its end is seen
    try:
        yield lambda progress: _result(receiver, progress)
    finally:
        child.terminate()
        child.join()
        receiver.close()


def _result(receiver: Connection, progress: Progress) -> Any:
    while True:
        try:
            kind, content = receiver.recv()
        except EOFError:
            raise ExportError(
                "the process that exports the decoder was killed, perhaps for lack of memory; nothing was written"
            ) from None
        if kind == "progress":
            progress(*content)
        elif kind == "error":
            raise content
        else:
            return content


def _child(sender: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # the threads of an OpenMP pool do not survive a fork
    try:
        result = work(*arguments, lambda graph, stage: sender.send(("progress", (graph, stage))))
    except MoebiusError as error:
        sender.send(("error", error))
    except Exception as error:  # not all of these can be pickled
        sender.send(("error", RuntimeError("".join(traceback.format_exception(error)))))
    else:
        sender.send(("result", result))
