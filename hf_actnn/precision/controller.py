"""When to collect, when to solve, and how many bits each kept tensor and each sample gets until the next time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_actnn.config import ActNNConfig
from hf_actnn.errors import ActNNWarning, ConfigError, message
from hf_actnn.precision import sensitivity
from hf_actnn.precision.minibatch import WINDOW, MinibatchVariance
from hf_actnn.precision.samples import SampleTable, assign
from hf_actnn.precision.sensitivity import Kept, Reading, harmlessness
from hf_actnn.precision.solver import solve, solve_for_target

#: Least weight of the newest reading in the moving averages: what is measured moves more as training goes on than it
#: scatters.
NEWEST = 0.6
#: How far one reading of the gradient's own variance may fall below the average.
LOWEST = 1 / 3
#: Calls of one module in a step, micro-batches say, that are collected from.
MOST_CALLS = 4
#: Collecting steps in a row that may show nothing before the next interval is waited for.
FRUITLESS = 5
#: The least cost per byte an item is given, relative to that of all together, so that a tensor whose gradient happened
#: to be zero is not left without bits.
LEAST_COST = 1e-3
#: What that may come to altogether, of the variance to spend.
LEAST_SHARE = 0.03
#: What choosing bits per sample would have to leave of a tensor's variance to be worth another look at the tensor.
ALIKE = 0.95
#: A parameter's own variance counts as no less than this share of its response to a gradient of random signs: that of a
#: bias before a normalisation is nothing but rounding, and so is what is added to it.
DEAD = 0.1
#: With a budget the variance of a parameter's gradient counts divided by this power of its own for each value. At 0
#: the sum over all parameters is least, and those with small gradients, along which Adam steps as far, are left to the
#: noise; at 1 the mean of the shares of all values is, at many times that sum. One half is what Adam weighs with.
BALANCE = 0.5
#: Share of the allowed variance that is spent: readings of single steps scatter by some tens of percent.
AIM = 0.65
#: Forward passes without a call of `step` after which its absence is reported.
FORGOTTEN = 128
#: Variance that quantisation adds, over the mini-batch's own, from which on a budget is called too small.
TOO_MUCH = 1.0
#: Steps before which it is not.
SETTLED = 100
_VERSION = 3
#: What may differ between the configuration that a state was made with and the one that it is loaded into.
_FREE = frozenset({"update_interval", "swap", "arena", "fused_backward"})


class _Items:
    """What the solver tells apart: parts of kept tensors.

    Attributes:
        costs, weights, low, high, asked: ``[I]``; weights are bytes per bit and sample of the batch, `asked` the bits
            in the configuration.
    """

    def __init__(self, kept: Sequence[Kept], per_sample: bool) -> None:
        shares = [one.parts if per_sample else (1.0,) for one in kept]
        rows = [(one, share, len(parts)) for one, parts in zip(kept, shares, strict=True) for share in parts]
        real = torch.float64
        self.costs = torch.tensor([one.cost * share / count for one, share, count in rows], dtype=real)
        self.weights = torch.tensor([one.numel / 8 / count for one, _, count in rows], dtype=real)
        self.low = torch.tensor([one.low for one, _, _ in rows])
        self.high = torch.tensor([one.high for one, _, _ in rows])
        self.asked = torch.tensor([one.asked for one, _, _ in rows], dtype=real).clamp(self.low, self.high)
        self._counts = torch.tensor([len(parts) for parts in shares])
        self._sizes = torch.tensor([one.sizes for one in kept], dtype=real)

    def _sums(self, values: Tensor) -> Tensor:
        owners = torch.repeat_interleave(torch.arange(len(self._counts)), self._counts)
        return torch.zeros(len(self._counts), dtype=torch.float64).index_add_(0, owners, values)

    def means(self, bits: Tensor) -> Tensor:
        """Average bits of each tensor."""
        return self._sums(bits) / self._counts

    def nbytes(self, bits: Tensor) -> float:
        """Bytes of all codes per sample of the batch, padding included."""
        below = bits.long().clamp(max=7)
        sizes = torch.repeat_interleave(self._sizes, self._counts, dim=0)
        least = sizes.gather(1, below[:, None] - 1)[:, 0]
        more = sizes.gather(1, below[:, None])[:, 0] - least
        return float((self._sums(least + (bits - below) * more) / self._counts).sum())


class Controller:
    """Chooses bits while a model trains; `hf_actnn.controller(model)` gives a model's.

    On one step in every ``update_interval`` the backward pass is measured, and bits are solved for anew. Before the
    first update every tensor gets the average.

    Call :meth:`step` once per optimizer step, after the last backward pass of the step; `ActNNCallback` does. Processes
    that train together exchange their readings there, so each must call it in each step.

    Attributes:
        active: False keeps the bits as they are from here on.
        asked_for: whether anyone has asked for the controller, and so may be going to call :meth:`step`.
        history: one entry per update: ``step``, ``average_bits``, ``bytes_per_sample`` of codes without metadata,
            ``added_variance`` of the gradient by quantisation as a share of that by the drawing of the mini-batch (nan
            where that was not measured), ``relative_variance``: the same relative to the squared response of the
            parameters to a gradient of random signs. Both are means over parameters: of the shares of the
            mini-batch's variance all count alike with ``bits="auto"``, else in proportion to the sum of the standard
            deviations of their gradients' values.
        chosen: by name of a kept tensor, its average bits after each update of ``history``; None where it was not seen.
        steps: calls of :meth:`step` so far.
    """

    def __init__(self, config: ActNNConfig) -> None:
        self.config = config
        self.adaptive = config.is_adaptive and config.effective_bits is not None
        self.active = True
        self.asked_for = False
        self.steps = 0
        self.history: list[dict[str, float]] = []
        self.chosen: dict[str, list[float | None]] = {}
        self.table = SampleTable()
        self._forwards = 0
        self._since_step = 0
        self._told: set[str] = set()
        self._fruitless = 0
        self._calls: dict[int, int] = {}
        self._due = True
        self._tape: Any = None
        self._watching = True
        self._drawing = MinibatchVariance()
        self._kept: dict[str, Kept] = {}
        self._averages = dict.fromkeys(("minibatch", "squared", "drawn"), math.nan)
        self._readings = 0
        self._plan: dict[str, float] = {}
        self._loaded = False  # a state that no update has been made with yet

    # -- what the user calls ------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One optimizer step is complete: its backward passes have run.

        In a distributed run every process must call it, in every step: on an update they exchange what they measured,
        and then all hold the same bits.
        """
        self.steps += 1
        self._since_step = 0
        self.table.settle()
        if not self.adaptive or not self.active:
            self._drawing.forget()
            return
        calls, self._calls = self._calls, {}
        self._drawing.step()
        if self._due:
            readings = [] if self._tape is None else [self._read(self._tape, calls.values())]
            self._tape = None
            reading = sensitivity.merge(_of_all_processes(readings))
            if reading is not None and reading.is_finite and reading.scale > 0:
                self._fruitless = 0
                if self._loaded and self._kept and reading.kept and self._kept.keys().isdisjoint(reading.kept):
                    self._unlearn(reading.kept)
                self._loaded = False
                self._learn(reading)
                self._solve(reading.kept)
            else:
                # Nothing was seen, or it overflowed and the optimizer skips the step too: the next one collects.
                self._fruitless += 1
                if self._fruitless < FRUITLESS:
                    return
                self._say_fruitless(reading)
        self._due = self._is_due(self.steps)
        self._watching = any(self._is_due(self.steps + ahead) for ahead in range(WINDOW + 1))

    def _read(self, tape: Any, calls: Collection[int]) -> Reading:
        """What a step showed. Its differences from others are of all its micro-batches; the tape has some of them."""
        share = sum(min(count, MOST_CALLS) for count in calls) / max(sum(calls), 1)
        drawn = {owner: one * share for owner, one in self._drawing.take().items()}
        budget = self.config.allowed_variance is None
        power = BALANCE if budget else 1.0
        own: dict[int, float] = {}
        weights: dict[int, float] = {}

        def weigh(
            responses: Mapping[int, float], squares: Mapping[int, float], added: Mapping[int, float]
        ) -> Mapping[int, float]:
            for owner, response in responses.items():
                seen = drawn.get(owner)
                own[owner] = squares.get(owner, 0.0) if seen is None else _without(seen, added.get(owner, 0.0))
                least = max(own[owner], DEAD * response)
                values = tape.sizes.get(owner, 1) if budget else 1
                weights[owner] = (values / least) ** power if least > 0 else 0.0
            return weights

        reading = sensitivity.read(tape, weigh)
        return reading._replace(drawn=sum(one * weights[owner] for owner, one in own.items())) if drawn else reading

    def bits(self) -> dict[str, float]:
        """Average bits of each kept tensor, by name: module path, operation and, from the second of its kind on, a
        number. Before the first update the dictionary is empty: every tensor gets the configuration's."""
        return dict(self._plan)

    def values(self) -> dict[str, float]:
        """Values per sample of each kept tensor that was seen so far, by name."""
        return {key: one.numel for key, one in self._kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that later bits and later rounding depend on: plain numbers, strings, lists and dictionaries."""
        return {
            "version": _VERSION,
            "setting": _setting(self.config),
            "steps": self.steps,
            "forwards": self._forwards,
            "due": self._due,
            "watching": self._watching,
            "drawing": self._drawing.state(),
            "averages": dict(self._averages),
            "readings": self._readings,
            "fruitless": self._fruitless,
            "kept": {
                key: [list(part) if isinstance(part, tuple) else part for part in one]
                for key, one in self._kept.items()
            },
            "plan": dict(self._plan),
            "history": [dict(entry) for entry in self.history],
            "chosen": {key: list(bits) for key, bits in self.chosen.items()},
            "table": self.table.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        A state of other settings (level, bits, seed) gives a warning and is not taken over, for its bits mean something
        else; likewise an empty one, of a checkpoint from before conversion. Bits are then chosen anew. Whether a state
        is that of another model shows at the next update, which gives a warning and lets go of it.

        Raises:
            ConfigError: this is no state of a controller.
        """
        if not isinstance(state, Mapping) or (state and not set(self.state_dict()) <= set(state)):
            raise ConfigError(
                message(
                    "this is not the state of a controller",
                    where="load_state_dict",
                    expected="what Controller.state_dict() returned",
                    received=", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__,
                    next_step="Load the entry of the checkpoint that holds the controller",
                )
            )
        if not state and not self.adaptive:
            return
        own = _setting(self.config)
        theirs = state["setting"] if state and isinstance(state["setting"], Mapping) else {}
        if not state or state["version"] != _VERSION or dict(theirs) != own:
            different = [key for key in own if theirs.get(key) != own[key]]
            told = ["level", *different] if "bits" in different and "level" not in different else different
            warnings.warn(
                message(
                    "the checkpoint's bits are not taken over"
                    + ("; they are chosen anew from the next step on" if self.adaptive else ""),
                    where="Controller.load_state_dict",
                    expected=", ".join(f"{key}={own[key]!r}" for key in different) or f"version {_VERSION}",
                    received=", ".join(f"{key}={theirs.get(key)!r}" for key in told)
                    if state
                    else "a checkpoint without a state of the controller",
                    next_step="Nothing needs to be done; to go on as before, use the configuration the run began with",
                ),
                ActNNWarning,
                stacklevel=2,
            )
            return
        try:
            self._take_over(state)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ConfigError(
                message(
                    "the state of the controller is damaged",
                    where="load_state_dict",
                    expected="what Controller.state_dict() returned",
                    received=f"{type(error).__name__}: {error}",
                    next_step="Load another checkpoint, or train on without its state",
                )
            ) from error

    def _take_over(self, state: Mapping[str, Any]) -> None:
        kept = {
            key: Kept(
                *(float(c), float(v), float(n), tuple(map(float, p))),
                *(int(lo), int(hi), tuple(map(float, sizes)), float(asked)),
            )
            for key, (c, v, n, p, lo, hi, sizes, asked) in state["kept"].items()
        }
        plan = {key: float(bits) for key, bits in state["plan"].items()}
        history = [dict(entry) for entry in state["history"]]
        chosen = {
            key: [None if bits is None else float(bits) for bits in column] for key, column in state["chosen"].items()
        }
        averages = {name: float(state["averages"][name]) for name in self._averages}
        readings, fruitless = int(state["readings"]), int(state["fruitless"])
        drawing = MinibatchVariance()
        drawing.load(state["drawing"])
        self.table.load(state["table"])
        self.steps, self._forwards, self._due = int(state["steps"]), int(state["forwards"]), bool(state["due"])
        self._kept, self._plan, self.history, self.chosen = kept, plan, history, chosen
        self._averages, self._readings, self._fruitless, self._tape = averages, readings, fruitless, None
        self._watching, self._drawing, self._loaded = bool(state["watching"]), drawing, True

    # -- what a forward pass asks -------------------------------------------------------------------------------------

    def next_forward(self) -> int:
        """Number of a training forward pass: where its random streams begin."""
        self._forwards += 1
        return self._forwards - 1

    def identify(self, ids: Any) -> None:
        self.table.identify(ids)

    def begin(self, samples: int, root: torch.nn.Module) -> Any:
        self._since_step += 1
        if not self.asked_for or (self.steps == 0 and self._since_step > FORGOTTEN):
            self._say_forgotten()
            self._drawing.forget()
            return False
        if not self.active:
            self._drawing.forget()
            return False
        call = self._calls[id(root)] = self._calls.get(id(root), 0) + 1
        if self._watching:
            self._drawing.watch(root.parameters())
        if not self._due or call > MOST_CALLS:
            return False
        return self._tape

    def gathered(self, parameter: torch.nn.Parameter) -> None:
        if self.asked_for and self.active and self._watching:
            self._drawing.watch([parameter])

    def keeps(self, key: str) -> bool:
        return False

    def widths(self, key: str, samples: int, policy: Any, spread: Callable[[], Tensor]) -> int | Tensor:
        average = self._plan.get(key) if self.config.chooses_per_tensor else float(policy.bits)
        if average is None:
            if self.config.chooses_per_tensor:
                return int(policy.uniform)  # nothing is known yet, and the first step must be no worse than uniform
            average = float(policy.bits)
        average = min(max(average, policy.low), policy.high)
        if samples <= 1 or not (self.config.chooses_per_sample or average % 1):
            return int(average)
        weights = torch.ones(samples, dtype=torch.float64)
        if self.config.chooses_per_sample:
            factors = self.table.factors(samples)
            if factors is not None:
                weights = spread() * factors
            elif key in self._kept and _are_alike(self._kept[key].parts):
                if average == int(average):
                    return int(average)
            else:
                weights = spread()
        return assign(weights, average, policy.low, policy.high)

    def failed(self) -> None:
        self.table.forget()

    def recorded(self, tape: Any) -> None:
        self._tape = tape

    def end(self, outputs: list[Tensor], samples: int) -> None:
        self.table.watch(outputs, samples)

    # -- the way round ------------------------------------------------------------------------------------------------

    def _is_due(self, step: int) -> bool:
        """Every interval, and at powers of two before the first one is over: gradients change most in the first steps,
        and bits that were right for random weights may be far too few some steps later."""
        interval = self.config.interval
        return step % interval == 0 or (step < interval and step & (step - 1) == 0)

    def _learn(self, reading: Reading) -> None:
        """Moving averages of costs, relative to the scale of their step.

        They begin with the second reading: the first is taken at the weights that training starts from, which say
        little about what comes. The gradient's own variance has a harmonic mean: what scatters is the
        scale that it stands over, mostly upwards, and quantisation's variance is on average in proportion to that.
        """
        self._readings += 1
        newest = 1.0 if self._readings <= 2 else NEWEST
        for key, one in reading.kept.items():
            cost, old = one.cost / reading.scale, self._kept.get(key)
            if old is not None:
                cost = newest * cost + (1 - newest) * old.cost
            self._kept[key] = one._replace(cost=cost, variance=one.variance / reading.scale)
        for name in self._averages:
            now, before = getattr(reading, name) / reading.scale, self._averages[name]
            if math.isfinite(now) and now > 0:
                if math.isfinite(before):
                    now = 1 / (newest / max(now, LOWEST * before) + (1 - newest) / before)
                self._averages[name] = now

    def _unlearn(self, seen: Collection[str]) -> None:
        """Let go of what was learnt of another model: a state that was loaded names none of the tensors there are."""
        warnings.warn(
            message(
                "what was known of other tensors is let go of; bits are chosen anew",
                where=f"update at step {self.steps} at {_named(self.config)}",
                expected=f"one of the tensors that the state knew, such as {min(self._kept)!r}",
                received=f"{len(seen)} others, such as {min(seen)!r}",
                next_step="Load the state that was saved with this model; where none was, nothing needs to be done",
            ),
            ActNNWarning,
            stacklevel=3,
        )
        self._kept, self._plan, self._readings = {}, {}, 0
        self._averages = dict.fromkeys(self._averages, math.nan)

    @property
    def _minibatch(self) -> float:
        """Variance of the gradient over the drawing of the batch, relative to the scale; nan while it is not known.

        From the parts of samples only until steps could be compared, and then no more than the squared gradient, which
        is on average that variance and the squared mean: with batch normalisation the parts are not independent, and
        their differences alone say too much.
        """
        known, squared, drawn = (self._averages[name] for name in ("minibatch", "squared", "drawn"))
        if math.isfinite(drawn):
            return drawn
        return min(known, squared) if math.isfinite(squared) else known

    def _solve(self, seen: Collection[str]) -> None:
        """Bits for each part of each kept tensor that the newest reading saw; a tensor's plan is the mean of its parts.

        What it did not see, a layer that was skipped or has been frozen, neither lends nor borrows bytes.
        """
        present = {key: self._kept[key] for key in sorted(seen)}
        open_keys = [key for key, one in present.items() if one.low < one.high]
        self._plan = {key: float(one.low) for key, one in self._kept.items() if one.low == one.high}
        added = sum(
            one.cost * float(harmlessness(torch.tensor(one.low))) for one in present.values() if one.low == one.high
        )
        if open_keys:
            items = _Items([present[key] for key in open_keys], self.config.chooses_per_sample)
            chosen = self._chosen(items, added)
            self._plan.update(zip(open_keys, items.means(chosen).tolist(), strict=True))
            added += float((items.costs * harmlessness(chosen)).sum())
        size = sum(one.numel for one in present.values()) / 8
        self.history.append(
            {
                "step": self.steps,
                "average_bits": sum(one.numel / 8 * self._plan[key] for key, one in present.items()) / size,
                "bytes_per_sample": sum(one.bytes_at(self._plan[key]) for key, one in present.items()),
                "added_variance": added / self._minibatch if self._minibatch > 0 else math.nan,
                "relative_variance": added,
            }
        )
        self._note(present)
        self._say_too_much(self.history[-1]["added_variance"])

    def _note(self, seen: Collection[str]) -> None:
        """Write the newest bits down. To a thousandth: the columns of a long run travel in every checkpoint."""
        for key in self._plan:
            self.chosen.setdefault(key, [None] * (len(self.history) - 1))
        for key, column in self.chosen.items():
            column.append(round(self._plan[key], 3) if key in seen else None)

    def _chosen(self, items: _Items, added: float) -> Tensor:
        """Bits of each part. ``added``: variance of the tensors that have no choice."""
        asked = items.asked
        if not self.config.chooses_per_tensor:
            return asked
        costs, weights = items.costs, items.weights
        floor = LEAST_COST * float(costs.sum() / weights.sum())
        share = self.config.allowed_variance
        target = max(AIM * share * self._minibatch - added, 0.0) if share is not None else math.nan
        if math.isfinite(target):
            floor = min(floor, LEAST_SHARE * target / float(weights.sum()))  # or one large cost would use up the target
        costs = torch.maximum(costs, floor * weights)
        if math.isfinite(target):
            return _fewest(costs, weights, target, items.low, items.high)
        allowed = items.nbytes(asked)
        budget = least = float((weights * items.low).sum())
        budget = float((weights * asked).sum())
        while True:
            chosen = solve(costs, weights, budget, items.low, items.high).double()
            over = items.nbytes(chosen) - allowed
            if over <= 0 or budget <= least:
                return chosen
            budget = max(budget - max(over, 1e-6 * allowed), least)  # groups are padded to whole bytes

    def _first_time(self, warning: str) -> bool:
        """Whether the warning has not been given yet; it has after this."""
        known = warning in self._told
        self._told.add(warning)
        return not known

    def _say_forgotten(self) -> None:
        if self._since_step <= FORGOTTEN or not self._first_time("forgotten"):
            return
        warnings.warn(
            message(
                "bits do not adapt: nothing has called the controller's step()",
                where=f"{self._since_step} training forward passes at {_named(self.config)}",
                expected="hf_actnn.controller(model).step() after the backward passes of each optimizer step",
                received="no call",
                next_step="Add the call, or use ActNNCallback in a Trainer; the average bits are used meanwhile",
            ),
            ActNNWarning,
            stacklevel=2,
        )

    def _say_too_much(self, share: float) -> None:
        """Of a budget, and not of the first steps, whose weights training has hardly begun with."""
        budget = self.config.allowed_variance is None
        if not budget or self.steps < SETTLED or not share > TOO_MUCH or not self._first_time("too much"):
            return
        warnings.warn(
            message(
                "quantisation adds more variance to the gradient than drawing the mini-batch does",
                where=f"update at step {self.steps} at {_named(self.config)}",
                expected=f"a share below {TOO_MUCH:g}; bits='auto' keeps it to 0.1",
                received=f"{share:.2g} times the mini-batch's",
                next_step="Give more bits, as in bits=4, or bits='auto'; hf_actnn.variance_report shows which tensors",
            ),
            ActNNWarning,
            stacklevel=2,
        )

    def _say_fruitless(self, reading: Reading | None) -> None:
        if not self._first_time("fruitless"):
            return
        seen = (
            "no quantised tensor took part in a backward pass" if reading is None else "gradients that are not finite"
        )
        warnings.warn(
            message(
                "bits do not adapt: measuring the backward pass showed nothing",
                where=f"{self._fruitless} steps in a row at {_named(self.config)}",
                expected="outputs as tensors, or in lists, tuples and dictionaries, and finite gradients of parameters",
                received=seen,
                next_step="Ask hf_actnn.controller(model) again if the model was converted anew since, else compare "
                "with hf_actnn.variance_report(model, step); the bits stay as they are meanwhile",
            ),
            ActNNWarning,
            stacklevel=2,
        )

    def __getstate__(self) -> dict[str, Any]:
        # A tape belongs to a graph that is neither copied nor pickled.
        return {**self.__dict__, "_tape": None, "_calls": {}}


@lru_cache(maxsize=4096)
def _are_alike(parts: tuple[float, ...]) -> bool:
    """Whether samples differ so little in spread that looking at each would not gain what it costs: the geometric mean
    over the arithmetic one is what the best bits, fractions allowed, leave of the variance."""
    return math.exp(sum(math.log(max(part, 1e-12)) for part in parts) / len(parts)) > ALIKE


def _fewest(costs: Tensor, weights: Tensor, target: float, low: Tensor, high: Tensor) -> Tensor:
    """The solver's law has no exception for one bit, so its goal is lowered until the sum with it is what was meant."""
    goal = target
    for _ in range(5):
        chosen = solve_for_target(costs, weights, goal, low, high).double()
        found = float((costs * harmlessness(chosen)).sum())
        if found <= target or bool((chosen == high).all()):
            break
        goal *= target / found
    return chosen


def _named(config: ActNNConfig) -> str:
    return f"level={config.level}" + (f", bits={config.bits}" if config.bits is not None else "")


def _setting(config: ActNNConfig) -> dict[str, Any]:
    """What a state must have in common with the configuration it is loaded into."""
    values = {**config.to_dict(), "level": config.level, "bits": config.bits}
    if config.level in ("L4", "L5"):
        values["level"] = "L3"  # where the codes are has nothing to do with their bits
    return {key: value for key, value in values.items() if key not in _FREE}


def _without(seen: float, added: float) -> float:
    """A variance without what quantisation adds to it. What is left of much noise is not known well."""
    return max(seen - added, seen / 4)


def _is_alone() -> bool:
    """Whether no other process trains with this one."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def _of_all_processes(readings: list[Reading]) -> list[Reading]:
    """The readings of all processes, in the order of their ranks: the same list everywhere."""
    if _is_alone():
        return readings
    distributed = torch.distributed
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, readings)
    return [reading for of_rank in gathered for reading in of_rank]
