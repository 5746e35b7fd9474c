"""Says what is being done, on standard error, once it takes more than two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

#: What takes no longer needs no word.
PATIENCE = 2.0


class Progress:
    """A bar where tqdm is installed, else a line for each step.

    Args:
        total: number of steps.
        clock: seconds; another one in tests.
    """

    def __init__(self, total: int, clock: Any = time.monotonic) -> None:
        self.total = total
        self._done = 0
        self._clock = clock
        self._start = clock()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        try:
            from tqdm import tqdm
        except ImportError:
            return self
        self._bar = tqdm(total=self.total, file=sys.stderr, delay=PATIENCE, leave=False, unit="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, text: str) -> None:
        """What is done now."""
        if self._bar is not None:
            self._bar.set_description(text, refresh=self._clock() - self._start > PATIENCE)
        elif self._clock() - self._start > PATIENCE:
            print(f"[{self._done + 1}/{self.total}] {text}", file=sys.stderr, flush=True)

    def advance(self) -> None:
        """A step is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
