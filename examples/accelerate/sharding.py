"""FSDP2 without a GPU, to try a script out."""

from __future__ import annotations

import os

from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin


def shard_on_cpu(accelerator: Accelerator) -> None:
    """Have an accelerator shard on the CPU too, as its launcher was asked to.

    On a CPU accelerate takes no notice of its options for FSDP and uses DDP instead, although torch can shard there. So
    it is told that it shards; all that follows, `prepare` and checkpoints included, is what it does on GPUs. Where
    there is a GPU, or nobody asked for FSDP, nothing is changed.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin()  # from what the launcher put into the environment
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
