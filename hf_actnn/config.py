"""What the user asks for: a level, or the fields that a level stands for."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from hf_actnn.errors import ConfigError, NotAvailableError, message

#: The paper's levels (Chen et al. 2021, table 1) as presets of fields. ``None`` for bits: nothing is compressed.
LEVELS: dict[str, dict[str, Any]] = {
    "L0": {"bits": None, "exact_norms": True},
    "L1": {"bits": 4, "exact_norms": True},
    "L2": {"bits": 4, "exact_norms": False},
}

#: Levels that have a meaning in the paper and none here yet, with what they wait for.
PLANNED_LEVELS: dict[str, str] = {
    "L2.5": "bits chosen per sample",
    "L3": "bits chosen per sample and per kept tensor",
    "L4": "L3 and swapping to the host",
    "L5": "L4 and defragmentation",
}

DEFAULT_LEVEL = "L2"
MIN_BITS, MAX_BITS = 1, 8
MAX_GROUP_SIZE = 4096

Override = int | str


@dataclasses.dataclass(frozen=True)
class ActNNConfig:
    """How activations are kept for the backward pass.

    A level is a fixed set of fields; naming a field beside it replaces that field alone.

    Args:
        level: ``"L0"`` keeps everything exactly, ``"L1"`` quantises to 4 bits and leaves what normalisations keep
            exact, ``"L2"`` quantises that too. ``"L2.5"``, ``"L3"``, ``"L4"`` and ``"L5"`` raise
            :class:`~hf_actnn.errors.NotAvailableError`.
        bits: bits per value, 1 to 8, in place of the level's.
        group_size: the most values that share one minimum and step, 1 to 4096. A row (a token, or one sample of a
            convolution's activation) is cut into equal groups of at most this many.
        skip: patterns (``fnmatch``) on module paths; a match is left exact together with all beneath it.
        overrides: pattern on module paths -> bits (1 to 8) or ``"exact"``. A pattern holds for what it matches and
            all beneath it; of several that match, the last one holds.
        seed: of the stochastic rounding. Torch's own generators are never drawn from.
        min_numel: tensors with fewer values than this are kept exactly; their metadata would cost more than it saves.
        exact_norms: whether what normalisations keep stays exact; ``None`` takes the level's.
        update_interval: steps between two updates of adaptive bits; not available yet, so anything but ``None`` raises.
        swap: swapping to the host; not available yet, so anything but ``None`` raises.

    Raises:
        ConfigError: a field that cannot mean anything.
        NotAvailableError: a level or field that is planned and not there yet.
    """

    level: str = DEFAULT_LEVEL
    bits: int | None = None
    group_size: int = 256
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, Override] = dataclasses.field(default_factory=dict)
    seed: int = 0
    min_numel: int = 1024
    exact_norms: bool | None = None
    update_interval: int | None = None
    swap: bool | None = None

    def __post_init__(self) -> None:
        _check_level(self.level)
        _check_unavailable(self)
        if self.bits is not None:
            _check_bits(self.bits, "bits")
        _check_int("group_size", self.group_size, 1, MAX_GROUP_SIZE)
        _check_int("seed", self.seed, 0, 2**64 - 1)
        _check_int("min_numel", self.min_numel, 0, 2**62)
        if self.exact_norms is not None and not isinstance(self.exact_norms, bool):
            raise ConfigError(
                message(
                    "`exact_norms` is not a yes or no",
                    expected="True, False or None",
                    received=repr(self.exact_norms),
                    next_step="Leave it out to take the level's",
                )
            )
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
            if value != "exact":
                _check_bits(value, f"overrides[{pattern!r}]", " or 'exact'")
        object.__setattr__(self, "overrides", dict(self.overrides))

    # -- what the fields come to ------------------------------------------------------------------------------------

    @property
    def effective_bits(self) -> int | None:
        """Bits per value, or ``None`` where nothing is compressed."""
        return self.bits if self.bits is not None else LEVELS[self.level]["bits"]

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
        return dataclasses.replace(self, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        values = dataclasses.asdict(self)
        values["skip"] = list(self.skip)
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
    if isinstance(level, str) and level in PLANNED_LEVELS:
        raise NotAvailableError(
            message(
                f"level {level!r} ({PLANNED_LEVELS[level]}) is not available yet",
                expected=f"one of {', '.join(LEVELS)}, or bits=1 to 8",
                received=repr(level),
                next_step="Use 'L2', or bits=2 for two bits per value",
            )
        )
    raise ConfigError(
        message(
            "unknown level",
            expected=f"one of {', '.join(LEVELS)}",
            received=repr(level),
            next_step="For a bit width write bits=2",
        )
    )


def _check_unavailable(config: ActNNConfig) -> None:
    for name, what in (("update_interval", "adaptive bits are"), ("swap", "swapping to the host is")):
        if getattr(config, name) is not None:
            raise NotAvailableError(
                message(
                    f"`{name}` cannot be set: {what} not available yet",
                    expected="None",
                    received=repr(getattr(config, name)),
                    next_step="Leave the field out",
                )
            )


def _check_bits(bits: Any, where: str, also: str = "") -> None:
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if whole and MIN_BITS <= bits <= MAX_BITS:
        return
    expected = f"a whole number of bits from {MIN_BITS} to {MAX_BITS}{also}"
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
    if isinstance(bits, float) and bits <= MAX_BITS and bits != int(bits):
        raise NotAvailableError(
            message(
                "an average that is not a whole number of bits needs adaptive bits, which are not available yet",
                where=where,
                expected=expected,
                received=repr(bits),
                next_step="Round it",
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
