"""What the user asks for: a level, or the fields that a level stands for."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from hf_actnn.errors import ConfigError, message

_L3 = {"bits": 2, "exact_norms": False, "per_sample": True, "per_tensor": True}
#: The paper's levels (Chen et al. 2021, table 1) as presets of fields. ``None`` for bits: nothing is compressed. Fields
#: that a level does not name are off.
LEVELS: dict[str, dict[str, Any]] = {
    "L0": {"bits": None, "exact_norms": True},
    "L1": {"bits": 4, "exact_norms": True},
    "L2": {"bits": 4, "exact_norms": False},
    "L2.5": {"bits": 4, "exact_norms": False, "per_sample": True},
    "L3": _L3,
    "L4": {**_L3, "swap": True},
    "L5": {**_L3, "swap": True, "arena": True},
}

MIN_BITS, MAX_BITS = 1, 8
MAX_GROUP_SIZE = 4096

#: Steps between two updates of adaptive bits, where the configuration names none.
UPDATE_INTERVAL = 200
#: In place of a number of bits: as few as the allowed variance permits.
AUTO = "auto"
MAX_ADDED_VARIANCE = 0.1
#: In place of a number of bits: none, the tensor itself.
EXACT = "exact"
#: Of what gradient checkpoints keep, where the configuration names none.
CHECKPOINT_BITS = 8

#: What fields hold that nobody has named.
_UNNAMED: dict[str, Any] = {"level": "", "bits": None}

Override = int | str | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ActNNConfig:
    """How activations are kept for the backward pass.

    A level is a fixed set of fields; naming a field beside it replaces that field alone. ``ActNNConfig()`` is
    ``bits="auto"``; a whole number of bits without a level is that number everywhere, at L2.

    Args:
        level: ``"L0"`` keeps everything exactly, ``"L1"`` quantises to 4 bits and leaves what normalisations keep
            exact, ``"L2"`` quantises that too, ``"L2.5"`` chooses the bits of each sample, 4 on average, ``"L3"`` those
            of each sample and each kept tensor, 2 on average, ``"L4"`` swaps what L3 keeps to the host, and ``"L5"``
            puts its codes into one allocation besides.
        bits: bits per value, 1 to 8, in place of the level's. Where bits are chosen it is their average, and may be a
            fraction. ``"auto"``: as few as keep the added variance within ``max_added_variance``, chosen per sample and
            per kept tensor whatever the level.
        group_size: the most values that share one minimum and step, 1 to 4096. A row (a token, or one sample of a
            convolution's activation) is cut into equal groups of at most this many.
        skip: patterns (``fnmatch``) on module paths; a match is left exact together with all beneath it.
        overrides: pattern on module paths -> bits (1 to 8), ``"exact"``, or ``(fewest, most)`` bits where they are
            chosen. A pattern holds for what it matches and all beneath it; of several that match, the last one holds.
        seed: of the stochastic rounding. Torch's own generators are never drawn from.
        min_numel: tensors with fewer values than this are kept exactly; their metadata would cost more than it saves.
        exact_norms: whether what normalisations keep stays exact; ``None`` takes the level's.
        update_interval: optimizer steps between two updates of adaptive bits; ``None`` is 200.
        max_added_variance: with ``bits="auto"``, the variance that quantisation may add to the gradient of a parameter,
            as a share of the variance that drawing the mini-batch gives it, on average over parameters; ``None`` is
            0.1.
        per_sample: whether bits are chosen per sample; ``None`` takes the level's.
        per_tensor: whether they are chosen per kept tensor; ``None`` takes the level's.
        swap: whether what is kept on a CUDA device, exact tensors included, waits for the backward pass in pinned host
            memory; ``None`` takes the level's. On a CPU there is nothing to swap to, and one warning says so.
        arena: whether the codes of a step share one allocation per device, so that their changing sizes do not cut the
            allocator's memory to pieces; ``None`` takes the level's.
        fused_backward: whether backward passes of activations, and on a CPU of linear layers, convolutions,
            normalisations and products too, read codes of large tensors as they are or some samples at a time, in place
            of the tensors decoded beforehand.

        checkpoint_bits: bits of the tensors that gradient checkpoints keep, from which they compute their blocks again:
            1 to 8, or ``"exact"``; ``None`` is 8, and ``"exact"`` at L0.
        recompute_bits: bits of what such a block saves when it runs again, until it is differentiated: 1 to 8, which
            lowers the peak and takes time, or ``"exact"``, as is ``None``.

    Raises:
        ConfigError: a field that cannot mean anything.
    """

    level: str = ""
    bits: int | float | str | None = None
    group_size: int = 256
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, Override] = dataclasses.field(default_factory=dict)
    seed: int = 0
    min_numel: int = 1024
    exact_norms: bool | None = None
    update_interval: int | None = None
    max_added_variance: float | None = None
    per_sample: bool | None = None
    per_tensor: bool | None = None
    swap: bool | None = None
    arena: bool | None = None
    fused_backward: bool = True
    checkpoint_bits: int | str | None = None
    recompute_bits: int | str | None = None
    _implied: ClassVar[set[str]]

    def __post_init__(self) -> None:
        #: Fields that nobody named: they follow from the others again when those are replaced.
        object.__setattr__(self, "_implied", set())
        if self.level == AUTO and self.bits in (None, AUTO):  # as the table of levels has it
            object.__setattr__(self, "level", "")
        if not self.level:
            self._implied.add("level")
            if self.bits is None and self.per_tensor is not False:
                self._implied.add("bits")
                object.__setattr__(self, "bits", AUTO)
            whole = isinstance(self.bits, int)
            object.__setattr__(self, "level", "L2" if whole else "L3")
        _check_level(self.level)
        for name in ("per_sample", "per_tensor", "exact_norms", "swap", "arena"):
            _check_yes_or_no(name, getattr(self, name))
        _check_yes_or_no("fused_backward", self.fused_backward, or_none=False)
        if self.bits is not None and self.bits != AUTO:
            _check_bits(self.bits, "bits", adaptive=self.is_adaptive, also=f" or {AUTO!r}")
        for name in ("checkpoint_bits", "recompute_bits"):
            if getattr(self, name) not in (None, EXACT):
                _check_bits(getattr(self, name), name, also=f" or {EXACT!r}")
        if self.update_interval is not None:
            _check_int("update_interval", self.update_interval, 1, 2**31)
        _check_share(self)
        _check_int("group_size", self.group_size, 1, MAX_GROUP_SIZE)
        _check_int("seed", self.seed, 0, 2**64 - 1)
        _check_int("min_numel", self.min_numel, 0, 2**62)
        if (
            isinstance(self.skip, str)
            or not isinstance(self.skip, Iterable)
            or not all(isinstance(pattern, str) for pattern in self.skip)
        ):
            raise ConfigError(
                message(
                    "`skip` is not a sequence of patterns",
                    expected='for example ("classifier",)',
                    received=repr(self.skip),
                    next_step="Wrap a single pattern in a tuple",
                )
            )
        object.__setattr__(self, "skip", tuple(self.skip))
        if not isinstance(self.overrides, Mapping) or not all(isinstance(key, str) for key in self.overrides):
            raise ConfigError(
                message(
                    "`overrides` is not a mapping",
                    expected='for example {"encoder.*.mlp": 8}',
                    received=repr(self.overrides),
                    next_step="Give pattern -> bits or 'exact'",
                )
            )
        for pattern, value in self.overrides.items():
            if isinstance(value, (list, tuple)):
                _check_range(value, f"overrides[{pattern!r}]", self.is_adaptive)
            elif value != EXACT:
                _check_bits(value, f"overrides[{pattern!r}]", also=f" or {EXACT!r}")
        ranges = {key: tuple(value) if isinstance(value, list) else value for key, value in self.overrides.items()}
        object.__setattr__(self, "overrides", ranges)

    # -- what the fields come to ------------------------------------------------------------------------------------

    @property
    def effective_bits(self) -> float | None:
        """Bits per value, on average where they are chosen, or ``None`` where nothing is compressed.

        With ``bits="auto"`` those that a run starts with, L2's.
        """
        if self.bits == AUTO:
            return LEVELS["L2"]["bits"]
        return self.bits if self.bits is not None else LEVELS[self.level]["bits"]  # type: ignore[return-value]

    @property
    def chooses_per_sample(self) -> bool:
        """Whether samples of one tensor may differ in bits."""
        return self._chosen("per_sample", self.bits == AUTO)

    @property
    def chooses_per_tensor(self) -> bool:
        """Whether kept tensors may differ in bits."""
        return self._chosen("per_tensor", self.bits == AUTO)

    @property
    def swaps(self) -> bool:
        """Whether what is kept waits in host memory."""
        return self._chosen("swap")

    @property
    def uses_arena(self) -> bool:
        """Whether the codes of a step share one allocation."""
        return self._chosen("arena")

    def _chosen(self, name: str, otherwise: bool = False) -> bool:
        """A yes or no: the field if it is named, else ``otherwise`` or the level's."""
        chosen = getattr(self, name)
        return bool(otherwise or LEVELS[self.level].get(name, False)) if chosen is None else chosen

    @property
    def is_adaptive(self) -> bool:
        """Whether bits are chosen while training."""
        return self.chooses_per_sample or self.chooses_per_tensor

    @property
    def interval(self) -> int:
        """Optimizer steps between two updates of adaptive bits."""
        return self.update_interval or UPDATE_INTERVAL

    @property
    def allowed_variance(self) -> float | None:
        """With ``bits="auto"``, the share of the mini-batch's variance that quantisation may add, on average over
        parameters; else ``None``."""
        if self.bits != AUTO:
            return None
        return MAX_ADDED_VARIANCE if self.max_added_variance is None else self.max_added_variance

    @property
    def effective_checkpoint_bits(self) -> int | None:
        """Bits of what gradient checkpoints keep; ``None`` where that stays exact."""
        if self.checkpoint_bits is None:
            return None if self.effective_bits is None else CHECKPOINT_BITS
        return None if self.checkpoint_bits == EXACT else int(self.checkpoint_bits)

    @property
    def effective_recompute_bits(self) -> int | None:
        """Bits of what a checkpoint's block saves when it runs again; ``None`` where that stays exact."""
        return None if self.recompute_bits in (None, EXACT) else int(self.recompute_bits)  # type: ignore[arg-type]

    @property
    def effective_exact_norms(self) -> bool:
        """Whether what normalisations keep stays exact."""
        if self.exact_norms is not None:
            return self.exact_norms
        return LEVELS[self.level]["exact_norms"] and not (self.level == "L0" and self.bits is not None)

    # -- to and from ------------------------------------------------------------------------------------------------

    def replace(self, **fields: Any) -> ActNNConfig:
        """A copy with some fields replaced, checked like a new one."""
        _check_keys(fields, "the keyword arguments")
        return dataclasses.replace(self, **{**{name: _UNNAMED[name] for name in self._implied}, **fields})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON. What nobody has named is left out: it goes on to follow from the rest."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in self._implied}
        values["skip"] = list(self.skip)
        values["overrides"] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in self.overrides.items()
        }
        return values

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> ActNNConfig:
        """The inverse of :meth:`to_dict`; an unknown key raises :class:`ConfigError`."""
        if not isinstance(values, Mapping):
            raise ConfigError(
                message(
                    "a configuration is not a mapping",
                    where=where,
                    expected="a JSON object",
                    received=type(values).__name__,
                    next_step="See ActNNConfig for the fields",
                )
            )
        _check_keys(values, where or "the configuration")
        fields: dict[str, Any] = dict(values)
        if isinstance(fields.get("skip"), list):  # as JSON has it
            fields["skip"] = tuple(fields["skip"])
        return cls(**fields)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> ActNNConfig:
        """Read what :meth:`to_json_string` wrote."""
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
        except OSError as error:
            raise ConfigError(
                message(
                    "the configuration file cannot be read",
                    where=os.fspath(path),
                    received=str(error),
                    next_step="Check the path",
                )
            ) from error
        except json.JSONDecodeError as error:
            raise ConfigError(
                message(
                    "the configuration file is not JSON",
                    where=os.fspath(path),
                    received=str(error),
                    next_step="Write it with to_json_string()",
                )
            ) from error
        return cls.from_dict(values, where=os.fspath(path))

    @classmethod
    def resolve(cls, config: ActNNConfig | str | Mapping[str, Any] | os.PathLike[str] | None) -> ActNNConfig:
        """A configuration from what a user may pass: itself, a level, a mapping, a path of a JSON file, ``None``."""
        if config is None:
            return cls()
        if isinstance(config, ActNNConfig):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if isinstance(config, os.PathLike) or (isinstance(config, str) and config.endswith(".json")):
            return cls.from_json_file(config)
        if isinstance(config, str):
            return cls(level=config)
        raise ConfigError(
            message(
                "this is not a configuration",
                expected="an ActNNConfig, a level such as 'L2', a mapping, or the path of a JSON file",
                received=f"{type(config).__name__} {config!r}",
                next_step="For a bit width write convert(model, bits=2)",
            )
        )


def _check_level(level: Any) -> None:
    if isinstance(level, str) and level in LEVELS:
        return
    raise ConfigError(
        message(
            "unknown level",
            expected=f"one of {', '.join(LEVELS)}, or {AUTO!r} alone",
            received=repr(level),
            next_step=_instead_of(str(level)),
        )
    )


def _instead_of(level: str) -> str:
    if level == AUTO:
        return "Leave `bits` out, or name a level"
    if level.upper() in LEVELS:
        return f"Did you mean {level.upper()!r}?"
    return 'For a bit width write bits=2 in Python, {"bits": 2} as a configuration'


def _check_yes_or_no(name: str, value: Any, or_none: bool = True) -> None:
    if not (isinstance(value, bool) or (or_none and value is None)):
        raise ConfigError(
            message(
                f"`{name}` is not a yes or no",
                expected="True, False or None" if or_none else "True or False",
                received=repr(value),
                next_step="Leave it out to take the level's" if or_none else "Leave it out for True",
            )
        )


def _check_share(config: ActNNConfig) -> None:
    if config.bits == AUTO and config.per_tensor is False:
        raise ConfigError(
            message(
                "as few bits as a variance allows are chosen per kept tensor",
                where="per_tensor",
                expected='True or nothing beside bits="auto"',
                received="False",
                next_step="Leave per_tensor out, or give a number of bits",
            )
        )
    share = config.max_added_variance
    if share is None:
        return
    if config.bits != AUTO:
        raise ConfigError(
            message(
                "`max_added_variance` says how many bits to spend, and so does `bits`",
                expected='bits="auto" beside it',
                received=f"bits={config.bits!r}, max_added_variance={share!r}",
                next_step='Write bits="auto", or leave max_added_variance out',
            )
        )
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < math.inf:
        raise ConfigError(
            message(
                "`max_added_variance` is out of range",
                expected="a share above 0; 0.1 is a tenth of the mini-batch's own variance",
                received=repr(share),
                next_step="Leave it out to take 0.1",
            )
        )


def _check_range(value: Any, where: str, adaptive: bool) -> None:
    if not adaptive:
        raise ConfigError(
            message(
                "a range of bits where bits are not chosen",
                where=where,
                expected="a number of bits, or a level that chooses them: L2.5, L3, L4, L5",
                received=repr(value),
                next_step="Give one number of bits, or level='L3'",
            )
        )
    if len(value) != 2 or any(not isinstance(end, int) or isinstance(end, bool) for end in value):
        low, high = 0, 0
    else:
        low, high = value
    if not MIN_BITS <= low <= high <= MAX_BITS:
        raise ConfigError(
            message(
                "a range of bits means nothing",
                where=where,
                expected=f"(fewest, most), whole numbers from {MIN_BITS} to {MAX_BITS}",
                received=repr(value),
                next_step="For example (2, 6)",
            )
        )


def _check_bits(bits: Any, where: str, adaptive: bool = False, also: str = "") -> None:
    number = isinstance(bits, (int, float)) and not isinstance(bits, bool)
    if number and MIN_BITS <= bits <= MAX_BITS and (adaptive or isinstance(bits, int)):
        return
    expected = f"{'a number' if adaptive else 'a whole number'} of bits from {MIN_BITS} to {MAX_BITS}{also}"
    if isinstance(bits, float) and bits < MIN_BITS:
        raise ConfigError(
            message(
                "no allocation can meet this budget: every value takes at least one bit",
                where=where,
                expected=expected,
                received=repr(bits),
                next_step="Ask for 1 bit or more",
            )
        )
    if isinstance(bits, float) and bits <= MAX_BITS:
        raise ConfigError(
            message(
                "a fraction of a bit is an average, and here all values get the same bits",
                where=where,
                expected=expected,
                received=repr(bits),
                next_step="Write level='L3', which chooses bits per kept tensor, or round it",
            )
        )
    raise ConfigError(
        message(
            "bits out of range",
            where=where,
            expected=expected,
            received=repr(bits),
            next_step="2 is the paper's default, 4 the safe one, 8 nearly exact",
        )
    )


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(
            message(
                f"`{name}` is out of range",
                expected=f"a whole number from {low} to {high}",
                received=repr(value),
                next_step="Leave it out to take the default",
            )
        )


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    known = [field.name for field in dataclasses.fields(ActNNConfig)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ConfigError(
            message(
                f"unknown configuration key {unknown[0]!r}",
                where=where,
                expected=f"keys among {', '.join(known)}",
                received=", ".join(map(repr, unknown)),
                next_step="Remove it or correct its spelling",
            )
        )
