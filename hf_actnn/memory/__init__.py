"""How many bytes are held for the backward pass."""

from hf_actnn.memory.probe import measure_next_forward
from hf_actnn.memory.track import MemoryReport, own_storages, track_memory

__all__ = ["MemoryReport", "measure_next_forward", "own_storages", "track_memory"]
