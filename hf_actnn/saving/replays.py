"""Random streams of forward passes that a CUDA graph captures.

A forward pass is numbered on the host, and a graph has that number built in: each replay would round alike. So a pass
that is captured has a number that lies on the device in its place, and counts there first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_actnn.errors import NotAvailableError, message

#: Streams of one forward pass.
STREAMS = 2**32
#: Kinds of devices that have graphs.
_KINDS = ("cuda",)
#: Where replays begin: as many passes lie before as a run will not have.
_FIRST = 2**62


def is_capturing(device: torch.device) -> bool:
    """Whether what this thread launches on a device goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Replays:
    """Counts the replays of a model's captured passes, on each device."""

    def __init__(self) -> None:
        self._counts: dict[torch.device, Tensor] = {}

    def begin(self, device: torch.device, where: str) -> Tensor | None:
        """A forward pass begins. One int64 to add to its streams, if it is captured.

        Raises:
            NotAvailableError: no pass has run on the device before: memory that is allocated in a capture belongs to
                the graph, which would set it anew in each replay.
        """
        if device.type not in _KINDS:
            return None
        count = self._counts.get(device)
        if not is_capturing(device):
            if count is None:
                self._counts[device] = torch.full((1,), _FIRST, dtype=torch.int64, device=device)
            return None
        if count is None:
            raise NotAvailableError(
                message(
                    "a forward pass is captured in a CUDA graph before any has run",
                    where=where,
                    expected="a few ordinary steps first, as torch.cuda.graph asks for in any case",
                    received="the first training forward pass on this device",
                    next_step="Run some steps on a side stream before the capture",
                )
            )
        return count.add_(STREAMS)
