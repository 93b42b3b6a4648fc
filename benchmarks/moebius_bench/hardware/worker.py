"""One stage in a process of its own: a request as JSON on standard input, how it ended as JSON on standard output."""

from __future__ import annotations

import json
import os
import sys
import traceback

from moebius_bench.hardware.recorder import NotInstalledError, NotRunError, Recorder, Request
from moebius_bench.hardware.stages import STAGES
from moebius_bench.worker import own_stdout
from moebius_runtime.errors import MoebiusError

_LONGEST = 1000  # characters of a reason


def main() -> int:
    """Runs the stage. Every error is an answer; one that is no message for users leaves a traceback beside it."""
    answer = own_stdout()
    request = Request.model_validate_json(sys.stdin.read())
    status, reason = "ok", ""
    try:
        STAGES[request.stage].run()(Recorder(request))
    except NotInstalledError as error:
        status, reason = "not installed", str(error)
    except NotRunError as error:
        status, reason = "not run", str(error)
    except MoebiusError as error:
        status, reason = "failed", " ".join(str(error).split())
    except Exception as error:  # a driver or a library may raise anything; the report must hold it
        traceback.print_exc()
        status, reason = "failed", " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]
    with os.fdopen(answer, "w") as stream:
        json.dump({"status": status, "reason": reason}, stream)
    return 0


if __name__ == "__main__":
    sys.exit(main())
