"""What compression did while a model trained: figures for a logger, and bits by layer over time."""

from hf_actnn.record.record import Record, record

__all__ = ["Record", "record"]
