"""Parameters that are spread over processes, and whole only while their module runs.

`fully_shard` (FSDP2) gathers them when a module begins and scatters them when it ends, by emptying their memory; in the
backward pass again. So they come to be known as operations are given them, and must not be read at any other time.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from hf_actnn.errors import NotAvailableError, SavedTensorError, message


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether a module's parameters are gathered for the time it runs.

    Raises:
        NotAvailableError: they were flattened into one.
    """
    attributes = vars(module)
    if "_is_fsdp_managed_module" not in attributes:  # which both generations of FSDP set, for torch.compile
        return False
    if not attributes.get("_fsdp_use_orig_params", True):
        raise NotAvailableError(
            message(
                "compressed activations do not work with parameters that were flattened into one",
                where=type(module).__name__,
                expected="fully_shard (FSDP2), or FullyShardedDataParallel(use_orig_params=True)",
                received="FullyShardedDataParallel(use_orig_params=False)",
                next_step="Use fully_shard; with accelerate that is fsdp_version: 2",
            )
        )
    return True


def parameter_of(tensor: Tensor) -> torch.nn.Parameter | None:
    """The parameter that a tensor is, or is a view of."""
    base = tensor._base if tensor._is_view() else tensor
    return base if isinstance(base, torch.nn.Parameter) else None


def check_gathered(parameter: Tensor, where: str) -> None:
    """Raise where a parameter has not been gathered again: to read it would end the process."""
    if parameter.numel() and not parameter.untyped_storage().nbytes():
        raise SavedTensorError(
            message(
                f"a parameter of shape {list(parameter.shape)} is needed outside the module that gathers it, to "
                "compute a tensor again that was not kept",
                where=where,
                expected="its memory, as in the forward pass",
                received="a parameter that is sharded over the processes",
                next_step="Shard this module together with the one that uses its output: one fully_shard call for the "
                "block around both, or for a list of both; or use reshard_after_forward=False",
            )
        )


def check_local(tensor: Tensor, where: str) -> None:
    """Raise for an activation that is spread over processes. Parameters in shards are not saved: they are gathered."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        raise NotAvailableError(
            message(
                "compressed activations do not work with tensor parallelism: this activation is a DTensor",
                where=where,
                expected="activations that each process has for itself, as under DDP and fully_shard",
                received=f"a DTensor with placements {tuple(tensor.placements)}",
                next_step="Leave the layers that are split out with skip=, or train with data parallelism alone",
            )
        )
