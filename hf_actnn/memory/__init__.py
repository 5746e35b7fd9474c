"""How many bytes are held for the backward pass."""

from hf_actnn.memory.track import MemoryReport, track_memory

__all__ = ["MemoryReport", "track_memory"]
