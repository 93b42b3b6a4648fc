"""`moebius-distill` with accelerate's FSDP 2 on CPU processes.

accelerate itself chooses FSDP only where it finds an accelerator. Here it is told after its set-up that this is such a
run; all that follows is its own code: the parameters' exchange, `fully_shard`, clipping, the scaler.
"""

import os
import sys

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from moebius.distill import trainer
from moebius.distill.cli import main


class ShardingAccelerator(Accelerator):
    """Reads its plugin from the variables that `accelerate launch` sets from a configuration file."""

    def __init__(self, **options):
        super().__init__(**options)
        shared, plugin = AcceleratorState._shared_state, FullyShardedDataParallelPlugin()
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)  # as its own set-up does for FSDP
        shared["distributed_type"], shared["fsdp_plugin"] = DistributedType.FSDP, plugin


if __name__ == "__main__":
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # else it is refused: there is no accelerator
    trainer.Accelerator = ShardingAccelerator
    sys.argv[0] = "moebius-distill"
    main()
