"""What a mask's bits may stand for, in each dtype."""

import math

import torch

_PAIRS = (
    (2.5, -1.25),
    (0.0, -math.inf),  # what attention adds where it is shut
    (math.inf, -0.0),
    (math.nan, -math.nan),
    (65519.0, 65520.0),  # the last that fp16 rounds to a number, and the first that it does not
    (1e300, -1e6),
    (1 / 3, 3e-8),  # a subnormal in fp16
)


def pairs(dtype: torch.dtype) -> tuple[tuple[float, float], ...]:
    """``(on, off)`` that the dtype has, or rounds, or has infinities for."""
    return ((2.5, 0.0), (255.0, 1.0)) if dtype == torch.uint8 else _PAIRS
