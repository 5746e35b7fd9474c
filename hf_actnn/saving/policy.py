"""What the configuration says of one module path."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from hf_actnn.config import EXACT, MAX_BITS, MIN_BITS, ActNNConfig
from hf_actnn.errors import ConfigError, message


class Policy(NamedTuple):
    """How the tensors saved beneath a module path are kept.

    Attributes:
        bits: bits per value, where they are chosen the average asked for; ``None`` keeps everything exactly.
        exact_norms: whether the inputs of normalisations stay exact.
        reason: why nothing is compressed, for the report; empty where something is.
        low, high: the fewest and the most bits that may be chosen; both equal ``bits`` where they are not.
        checkpoint_bits, recompute_bits: bits of what gradient checkpoints keep, and of what their blocks save when they
            run again; ``None`` keeps it exactly.
    """

    bits: float | None
    exact_norms: bool
    group_size: int
    min_numel: int
    reason: str = ""
    low: int = 1
    high: int = 8
    checkpoint_bits: int | None = None
    recompute_bits: int | None = None

    @property
    def uniform(self) -> int:
        """The whole number of bits that stays within the average."""
        assert self.bits is not None
        return min(max(int(self.bits), self.low), self.high)

    @property
    def is_fixed(self) -> bool:
        return self.low == self.high

    def for_source_of(self, times: float) -> Policy:
        """The policy for a tensor from which one is made, linearly, that has so many times as many values.

        Where one error stands behind ``times`` values, errors that would have averaged out add up: the variance of what
        is summed over them is that many times larger at worst. A bit divides it by four.
        """
        if self.bits is None:
            return self
        bits = min(self.bits + math.ceil(math.log(times, 4)), MAX_BITS)
        if not self.is_fixed:  # where bits are chosen, until it is known what errors do
            return self._replace(bits=bits)
        return self._replace(bits=bits, low=int(bits), high=int(bits))


@lru_cache(maxsize=4096)
def again(policy: Policy) -> Policy:
    """The policy for what a checkpoint's block saves when it runs again.

    That is held until the block's backward pass is through, and no bits are chosen for it.
    """
    bits = policy.recompute_bits
    if bits is None:
        return policy._replace(bits=None)
    return policy._replace(bits=bits, low=bits, high=bits, reason="")


def _covers(pattern: str, path: str) -> bool:
    """Whether a pattern matches a path or any module above it. The root's path is the empty string."""
    if fnmatch.fnmatchcase(path, pattern):
        return True
    parts = path.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts)))


def policies(config: ActNNConfig, paths: Iterable[str]) -> dict[str, Policy]:
    """The policy of each module path.

    Raises:
        ConfigError: a pattern of ``skip`` or ``overrides`` that matches no path.
    """
    paths = list(paths)
    for field, patterns in (("skip", config.skip), ("overrides", config.overrides)):
        for pattern in patterns:
            if not any(_covers(pattern, path) for path in paths):
                near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3)
                raise ConfigError(
                    message(
                        f"a pattern of `{field}` matches no module",
                        expected="a pattern on module paths"
                        + (f", for example {', '.join(map(repr, near))}" if near else ""),
                        received=repr(pattern),
                        next_step="List the paths with [name for name, _ in model.named_modules()]",
                    )
                )
    made = {}
    for path in paths:
        bits, reason = config.effective_bits, ""
        at_checkpoints, recomputed = config.effective_checkpoint_bits, config.effective_recompute_bits
        low, high = (MIN_BITS, MAX_BITS) if config.is_adaptive or bits is None else (int(bits), int(bits))
        if bits is None:
            reason = f"level {config.level} compresses nothing"
        for pattern, value in config.overrides.items():
            if _covers(pattern, path):
                if value == EXACT:
                    bits, at_checkpoints, recomputed, reason = None, None, None, f"override {pattern!r}"
                elif isinstance(value, tuple):
                    low, high = value
                    bits, reason = min(max(config.effective_bits or low, low), high), ""
                else:
                    bits, reason = int(value), ""
                    low = high = int(value)
        for pattern in config.skip:
            if _covers(pattern, path):
                bits, at_checkpoints, recomputed, reason = None, None, None, f"skip {pattern!r}"
        made[path] = Policy(
            bits,
            config.effective_exact_norms,
            config.group_size,
            config.min_numel,
            reason,
            low,
            high,
            at_checkpoints,
            recomputed,
        )
    return made
