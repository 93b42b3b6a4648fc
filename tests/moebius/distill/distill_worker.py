"""`moebius-distill` in processes that are forked from a server which has imported torch: a start takes milliseconds."""

import json
import multiprocessing
import os
import socket
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401  # seconds to import

from moebius.data.encoded import LatentBatch
from moebius.distill import cli
from moebius.distill.loop import checkpoints, tasks, trainer

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["distill_worker"])


class ShardingAccelerator(Accelerator):
    """accelerate's FSDP 2 on CPU processes.

    accelerate itself chooses FSDP only where it finds an accelerator. Here it gets it after its set-up; all that
    follows is its own code: the parameters' exchange, `fully_shard`, clipping, the scaler. The plugin is read from the
    variables that `accelerate launch` sets from a configuration file.
    """

    def __init__(self, **options):
        super().__init__(**options)
        shared, plugin = AcceleratorState._shared_state, FullyShardedDataParallelPlugin()
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)  # as its own set-up does for FSDP
        shared["distributed_type"], shared["fsdp_plugin"] = DistributedType.FSDP, plugin


def shard():
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # else it is refused: there is no accelerator
    trainer.Accelerator = ShardingAccelerator


def newton_schulz(grad, coefficients, steps, eps):
    """Muon's orthogonal step in the gradient's own precision; torch's computes in bfloat16, which enlarges rounding."""
    a, b, c = coefficients
    x = grad / grad.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def compute_in_float64():
    """Networks, latents and Muon's orthogonal step in float64: what is left is the order of sums, some 1e-16."""
    build = trainer.build_task

    def built(*arguments):
        task = build(*arguments)
        for network in (task.network, *task.frozen):
            network.double()
        samples = task.samples
        task.samples = lambda batch: LatentBatch(
            *(v.double() if v is not None and v.is_floating_point() else v for v in samples(batch))
        )
        return task

    trainer.build_task = built
    torch.optim._muon._zeropower_via_newtonschulz = newton_schulz


def stop_in_process(rank, step):
    """`stop` answers True in one process only, as where a signal reaches one of them a step earlier."""
    run = trainer.Trainer.run

    def stopped(self, stop):
        return run(self, lambda: stop() or (self._rank == rank and self.step == step))

    trainer.Trainer.run = stopped


def fail_in_process_1(at):
    """In one process only: statistics that are NaN, or a disk that is full."""

    def failing(self, batches, original=trainer.Trainer._one_step):
        report = original(self, batches)
        if self._rank == 1:
            if at == "sum of":
                tasks.statistics(self.task.module)[0].fill_(float("nan"))
            else:
                checkpoints._save_json = full
        return report

    def full(content, path):
        raise OSError(28, "No space left on device")

    trainer.Trainer._one_step = failing


CHANGES = {"shard": shard, "float64": compute_in_float64, "stop in process 1": lambda: stop_in_process(1, 2)}
CHANGES |= {f"fail in process 1: {at}": partial(fail_in_process_1, at) for at in ("sum of", "write_rank")}


def work(log, environment, arguments, changes):
    os.environ.update(environment)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    torch.set_num_threads(1)
    for change in changes:
        CHANGES[change]()
    sys.argv = ["moebius-distill", *map(str, arguments)]
    cli.main()


class Run:
    """Processes of one `moebius-distill`."""

    def __init__(self, log, arguments, world=1, changes=(), environment=None):
        self.log = Path(log)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(world):
            own = dict(environment or {})
            if world > 1:
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
            process = CONTEXT.Process(target=work, args=(str(self.log), own, arguments, changes), daemon=True)
            process.start()
            self.processes.append(process)

    @property
    def output(self):
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def wait(self, seconds=300):
        """Exit codes; None for a process that still ran, which is then killed."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()


if __name__ == "__main__":  # as `accelerate launch` starts it, see test_sharding.py
    if record := os.environ.get("RECORD_ENVIRONMENT"):
        found = {name: value for name, value in os.environ.items() if name.startswith(("FSDP_", "ACCELERATE_"))}
        Path(record).write_text(json.dumps(found))
    shard()
    sys.argv[0] = "moebius-distill"
    cli.main()
