"""What the modules of one converted model share."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_actnn.codec.arena import Arenas
from hf_actnn.config import ActNNConfig
from hf_actnn.errors import NotAvailableError, message
from hf_actnn.saving.identity import storage_key
from hf_actnn.saving.kept import Exact, Kept
from hf_actnn.saving.recipes import View
from hf_actnn.saving.replays import Replays
from hf_actnn.saving.swap import Swappers

if TYPE_CHECKING:
    from hf_actnn.saving.policy import Policy
    from hf_actnn.saving.tape import Tape

_MASK = 2**64 - 1


def _mix(value: int) -> int:
    """The finaliser of SplitMix64: a bijection of 64-bit integers that spreads neighbouring seeds apart."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


_names = itertools.count()
_by_name: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()

#: Forward passes between two cleanings of the notes of who reads what.
CLEAN_EVERY = 8


class Observation(NamedTuple):
    """How one operation's saves were kept in the last training forward pass of a module path."""

    path: str
    function: str
    kind: str
    reason: str
    saves: int
    nbytes: int


class Adaptation(Protocol):
    """Who chooses bits while training; `hf_actnn.precision.Controller` is one."""

    steps: int
    adaptive: bool

    def next_forward(self) -> int:
        """Number of a training forward pass."""
        ...

    def identify(self, ids: Any) -> None:
        """Which samples of the data set the next forward pass sees, ``[N]``."""
        ...

    def begin(self, samples: int, root: torch.nn.Module) -> Any:
        """A training forward pass of this module begins: False where nothing is measured, else the tape of
        the step, None before there is one."""
        ...

    def gathered(self, parameter: torch.nn.Parameter) -> None:
        """A parameter in shards has been gathered for the forward pass that has begun."""
        ...

    def keeps(self, key: str) -> bool:
        """Whether a tensor stays exact after all."""
        ...

    def widths(self, key: str, samples: int, policy: Policy, spread: Callable[[], Tensor]) -> int | Tensor:
        """Bits of a tensor, or of each of its samples, ``[S]`` uint8. ``spread`` gives ``[S]``: how far the values of a
        sample's groups lie apart, squared and summed up."""
        ...

    def recorded(self, tape: Tape) -> None: ...

    def failed(self) -> None:
        """The forward pass raised."""
        ...

    def end(self, outputs: list[Tensor], samples: int) -> None:
        """The forward pass ends with these differentiable outputs."""
        ...


class Session:
    """Configuration, random counters and the last observation of a converted model.

    Random streams are numbered by (forward pass, tensor) under a key made of (seed, rank, number).

    Args:
        config: of the model.
        adaptation: chooses bits, where the configuration says that they are chosen.
        number: tells sessions of one seed apart. 0 for every model that is converted, so that a seed gives the same run
            again; layers made one by one count up, or all layers of one model would round alike.
    """

    def __init__(self, config: ActNNConfig, number: int = 0, adaptation: Adaptation | None = None) -> None:
        self.config = config
        self.number = number
        #: By which compiled graphs find the session; like everything that is not saved, another one in a copy.
        self.name = f"session{next(_names)}"
        _by_name[self.name] = self
        self.adaptation = adaptation if adaptation is None or adaptation.adaptive else None
        self.controller = adaptation
        self._steps = itertools.count()
        self.notes: list[tuple[str, str, str, str, int]] = []
        self._lent: dict[int, list[weakref.ref[Exact]]] = {}
        self._until_cleaning = CLEAN_EVERY
        #: Replays of captured passes; where codes are put, and whereto what is kept is swapped, where the configuration
        #: says so. None of it goes along when the model is copied or pickled.
        self.replays = Replays()
        self.arenas = Arenas() if config.uses_arena else None
        self.swappers = Swappers(self.arenas) if config.swaps else None

    @staticmethod
    def named(name: str) -> Session:
        """The session of this name.

        Raises:
            NotAvailableError: its model is gone, or was converted anew.
        """
        found = _by_name.get(name)
        if found is None:
            raise NotAvailableError(
                message(
                    "a compiled graph runs for a model that is gone, or was converted anew",
                    where="torch.compile",
                    expected="the model that was compiled",
                    received=f"no {name}",
                    next_step="Compile again after convert()",
                )
            )
        return found

    def key(self) -> int:
        rank = 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
        return _mix(_mix(self.config.seed) ^ rank ^ self.number << 32)

    def next_step(self) -> int:
        """Number of a training forward pass. A controller counts them where there is one: its state is saved."""
        step = next(self._steps) if self.controller is None else self.controller.next_forward()
        return step & 0xFFFFFFFF

    # -- tensors that recipes refer to and autograd did not save ------------------------------------------------------

    def lend(self, kept: Kept) -> None:
        """Note that a recipe computes from a tensor by reference.

        Autograd did not save it, so whoever writes to it is in the right: :meth:`before_write` then has it copied.
        """
        while type(kept) is View:
            kept = kept.parent
        if type(kept) is Exact and not kept.lent and (tensor := kept.original()) is not None:
            kept.lent = True
            self._lent.setdefault(storage_key(tensor), []).append(weakref.ref(kept))

    def before_write(self, tensor: Tensor) -> list[Exact]:
        """A tensor is about to be written in place: what recipes read of its memory is secured first. Those of which a
        copy had to be made are returned."""
        lent = [kept for one in self._lent.pop(storage_key(tensor), ()) if (kept := one()) is not None]
        return [kept for kept in lent if kept.secure()]

    def opened(self) -> None:
        """A forward pass begins. Once in a while the notes of recipes that are gone are dropped."""
        self._until_cleaning -= 1
        if self._until_cleaning <= 0:
            self._until_cleaning = CLEAN_EVERY
            self._lent = {
                key: alive
                for key, found in self._lent.items()
                if (alive := [one for one in found if one() is not None])
            }

    def observed(self, notes: list[tuple[str, str, str, str, int]], again: bool) -> None:
        """Take over what a forward pass saved: (path, function, kind, reason, bytes) of each save.

        Args:
            again: it was a checkpoint's part of the last one, run again.
        """
        self.notes = self.notes + notes if again else notes

    @property
    def last(self) -> list[Observation]:
        """The last training forward pass, saves of one kind counted together."""
        counts: dict[tuple[str, str, str, str], list[int]] = {}
        for *key, nbytes in self.notes:
            count = counts.setdefault(tuple(key), [0, 0])  # type: ignore[arg-type]
            count[0] += 1
            count[1] += nbytes
        return [Observation(*key, *count) for key, count in counts.items()]

    def __getstate__(self) -> dict[str, Any]:
        step = next(self._steps)
        self._steps = itertools.count(step)
        return {"config": self.config, "number": self.number, "step": step, "controller": self.controller}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"], state["number"], state["controller"])  # type: ignore[misc]
        self._steps = itertools.count(state["step"])
