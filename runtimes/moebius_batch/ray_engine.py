"""The engine `ray`: Ray Data hands shards to a pool of actors, each with a warm pipeline. Ray retries what dies."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moebius_batch.destination import Destination
from moebius_batch.errors import FailingJobError, StoreError, WorkerError
from moebius_batch.items import Shard
from moebius_batch.job import Settings
from moebius_batch.stores import is_remote, store_of
from moebius_runtime.errors import InputError, MoebiusError, RuntimeUnavailableError, one_line

GPU_RUNTIMES = ("ort-cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx")


def connect(address: str) -> Any:
    """Connects to a cluster and returns Ray's module; a connection that this process has already is kept.

    Args:
        address: `auto`, `local` for a new cluster of this machine, `HOST:PORT` or `ray://HOST:PORT`.

    Raises:
        RuntimeUnavailableError: Ray is not installed.
        InputError: there is no cluster at the address, or it runs another version of Ray or Python.
    """
    if address != "local":  # lines of Ray's C++ core on the terminal; a new cluster's own logs stay complete
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"--engine ray needs the package {error.name}. Install it: pip install 'moebius-edge[ray]'"
        ) from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except Exception as error:  # ConnectionError, RuntimeError, ValueError and classes of gRPC
            text = one_line(str(error))
            if "ersion mismatch" in text or "VERSION_MISMATCH" in text:
                raise InputError(
                    f"the Ray cluster at {address} has another version of Ray or Python than this one ({text[:300]}); "
                    f"install one version on all machines (here: Ray {ray.__version__})"
                ) from error
            raise InputError(
                f"no Ray cluster at --address {address} ({text[:200]}); start one with `ray start --head`, or give "
                "--address local"
            ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return ray


def pool_size(ray: Any, workers: int | None, cpus: int, gpus: int) -> int:
    """The number of actors that the cluster holds beside one CPU for Ray's own tasks.

    Without that CPU Ray Data waits for ever, silently: the actors hold all CPUs that its other tasks need.

    Args:
        ray: the module, connected.
        workers: wanted actors, or None for as many as fit.
        cpus: of an actor.
        gpus: of an actor, 0 or 1.

    Raises:
        InputError: so many actors do not fit; the message names what is missing.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = int(sum(node.get("CPU", 0) for node in nodes))
    fitting = sum(int(node.get("CPU", 0)) // cpus for node in nodes)
    fitting -= sum(int(node.get("CPU", 0)) % cpus for node in nodes) == 0  # one CPU is left beside them
    if gpus:
        fitting = min(fitting, int(sum(node.get("GPU", 0) for node in nodes)))
    wanted = workers or max(fitting, 1)
    if wanted > fitting:
        have = f"{len(nodes)} nodes with {total} CPUs and {int(sum(n.get('GPU', 0) for n in nodes))} GPUs"
        each = f"{cpus} CPU{'s' * (cpus != 1)}" + " and a GPU" * bool(gpus)
        raise InputError(
            f"the Ray cluster has {have}, which hold {max(fitting, 0)} workers with {each} each beside 1 CPU for Ray's "
            f"own tasks; {wanted} are wanted: add nodes, or give fewer --workers or --threads"
        )
    return wanted


class ShardWorker:
    """The actor: fills a shard a call, and returns errors as rows, because Ray would run a call that raises again."""

    def __init__(self, settings_json: str) -> None:
        from moebius_batch.fill import Filler

        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._settings = Settings.model_validate_json(settings_json)
        self._fill = Filler(self._settings)

    def check_paths(self) -> None:
        """Refuses to work on a machine that lacks a path of the driver's, before it writes to a folder of its own.

        Raises:
            StoreError: the message names the machine and the path.
        """
        settings = self._settings
        paths = {"bundle": settings.bundle, "source": settings.source, "--masks": (settings.mask or {}).get("url", "")}
        paths["record of the job in --out"] = Destination(settings.out).record_url
        for what, path in paths.items():
            if path and not is_remote(path) and not path.startswith("hub:") and store_of(path).kind(path) is None:
                raise StoreError(
                    f"the worker on {socket.gethostname()} has no {path} ({what}); every machine of the cluster needs "
                    "it: put it on a disk that they share, or name a URL"
                )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """{"shard": [JSON of a shard]} -> {"result": [JSON]}."""
        from moebius_batch.shards import run_shard

        results = []
        for text in batch["shard"]:
            shard = Shard.from_json(str(text))
            try:
                self.check_paths()
                summary = run_shard(self._settings, shard, self._fill)
                result: dict[str, Any] = {"pictures": summary.pictures, "failed": summary.failed}
            except MoebiusError as error:
                result = {"error": str(error), "exit_code": error.exit_code}
            results.append(json.dumps({"shard": shard.number, **result}))
        return {"result": results}


def map_rows(
    ray: Any,
    kind: type,
    arguments: tuple[Any, ...],
    rows: Sequence[dict[str, str]],
    *,
    workers: int,
    cpus: int,
    gpus: int,
) -> Iterator[dict[str, Any]]:
    """Gives each row to one of `workers` actors and yields the results' objects as they come, in any order.

    Ray starts an actor again whose process or node dies, and runs its rows again.

    Args:
        ray: the module, connected.
        kind: class of the actors; a call takes {name: array of texts} and returns {"result": list of JSON texts}.
        arguments: of its constructor.
        rows: texts by name.
        workers: number of actors.
        cpus: of an actor.
        gpus: of an actor.

    Raises:
        WorkerError: a result has a key `error`.
        FailingJobError: Ray gave up.
    """
    data = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    results = data.map_batches(
        kind,
        fn_constructor_args=arguments,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    try:
        for row in results.iter_rows():
            content = json.loads(row["result"])
            if "error" in content:
                raise WorkerError(content["error"], content["exit_code"])
            yield content
    except MoebiusError:
        raise
    except ray.exceptions.RayError as error:
        raise FailingJobError(f"Ray gave up: {one_line(str(error))[-400:]}; see its dashboard and logs") from error


def run_ray(
    settings: Settings,
    shards: Sequence[Shard],
    workers: int | None,
    address: str,
    on_count: Callable[[int, int], None],
    on_note: Callable[[str], None],
) -> None:
    """Runs shards on a cluster.

    Args:
        settings: of the job; `threads` is also the number of CPUs of an actor, 1 by default.
        shards: the unfinished ones.
        workers: number of actors; None takes as many as fit.
        address: see `connect`.
        on_count: called with the numbers of pictures and of failures of each finished shard.
        on_note: called with a note.

    Raises:
        MoebiusError: as `connect`, `pool_size` and `map_rows`.
    """
    if not shards:
        return
    ray = connect(address)
    gpus = int(settings.runtime in GPU_RUNTIMES)
    cpus = 1 if gpus else settings.threads or 1
    count = min(pool_size(ray, workers, cpus, gpus), len(shards))
    if not gpus and settings.threads is None:
        settings = settings.model_copy(update={"threads": cpus})
    on_note(f"{count} workers on {sum(node['Alive'] for node in ray.nodes())} Ray nodes, {cpus} CPUs each")
    for row in map_rows(
        ray,
        ShardWorker,
        (settings.model_dump_json(),),
        [{"shard": shard.to_json()} for shard in shards],
        workers=count,
        cpus=cpus,
        gpus=gpus,
    ):
        on_count(row["pictures"], row["failed"])
