"""What is compressed in a process whose script does not know of it, and what is said about that.

`hf_actnn_startup` watches the imports and `patches` changes the host libraries. Both tell the one :class:`Process`,
which converts models, drives their controllers and speaks: once a model took a step, and at the end if none did.
This file imports no host library.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections import defaultdict
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from hf_actnn.config import AUTO, LEVELS, ActNNConfig
from hf_actnn.convert import ConversionReport, Row, controller, convert, is_converted, report
from hf_actnn.errors import ActNNWarning, ConfigError, ConversionError, message
from hf_actnn.precision.controller import Controller
from hf_actnn.record import Record

#: What is compressed, and how: see :func:`parse`. Nothing is while it is unset or empty.
VARIABLE = "HF_ACTNN"
#: The path of a JSON file for what was measured.
REPORT_VARIABLE = "HF_ACTNN_REPORT"
#: A folder for a record of each model: a page and numbers.
RECORD_VARIABLE = "HF_ACTNN_RECORD"

# What starts other processes, or trains nothing that is meant to be compressed here.
_COMMANDS = ("accelerate", "accelerate-launch", "torchrun", "deepspeed", "hf-actnn")
_MODULES = (
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "torch.distributed.run",
    "torch.distributed.launch",
    "hf_actnn.__main__",
    "hf_actnn.cli",
    "hf_actnn.commands.probe",
)


def parse(text: str, where: str) -> ActNNConfig:
    """A configuration from one word.

    Args:
        text: a level ("L3"), a number of bits ("2", "3.5"), "auto", the path of a file that ends in .json, or a JSON
            object of fields.
        where: what the word was given to, for messages.

    Raises:
        ConfigError: it is none of them, or means nothing.
    """
    text = text.strip()
    if text in LEVELS:
        return ActNNConfig(level=text)
    if text == AUTO:
        return ActNNConfig(bits=AUTO)
    if text.endswith(".json"):
        return ActNNConfig.from_json_file(text)
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        return ActNNConfig.from_dict(value, where=where)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ActNNConfig(bits=value)
    raise ConfigError(
        message(
            "this does not say what to compress",
            where=where,
            expected=f"a level ({', '.join(LEVELS)}), a number of bits, auto, a .json file or a JSON object",
            received=repr(text),
            next_step="L3 is the paper's level: 2 bits on average",
        )
    )


def say(text: str) -> None:
    """Print for whoever started the script, apart from what the script prints."""
    bars = sys.modules.get("tqdm")
    if bars is None:
        print(f"hf-actnn: {text}", file=sys.stderr, flush=True)
    else:
        bars.tqdm.write(f"hf-actnn: {text}", file=sys.stderr)  # above a progress bar, not into it


def summary(found: ConversionReport) -> str:
    """A report by operation instead of by module, largest first; parameters, which are there anyhow, left out."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in found.rows:
        if row.kept != "parameter":
            groups[row.kind, row.kept, row.reason].append(row)
    lines = [f"  {'operation':<28} {'kept as':<20} {'bits':>4} {'saves':>6} {'MB before':>10}"]
    for (kind, kept, reason), rows in sorted(groups.items(), key=lambda group: -sum(row.nbytes for row in group[1])):
        nbytes, saves = sum(row.nbytes for row in rows), sum(row.saves for row in rows)
        bits = sum((row.bits or 0) * row.nbytes for row in rows) / nbytes if nbytes else 0
        shown = f"{bits:.2g}" if bits else ""
        lines.append(f"  {kind:<28} {kept:<20} {shown:>4} {saves:>6} {nbytes / 1e6:>10.3f}  {reason}".rstrip())
    return "\n".join(lines)


#: As an entry of `Record.measured`.
_NOTHING = {"saved_bytes": 0, "uncompressed_bytes": 0, "samples": 0}


class Trained:
    """One model that was converted here.

    Attributes:
        name: of its class.
        controller: to be stepped here; None where the Trainer's callback does that.
        record: of the run.
        steps: of an optimizer that holds parameters of it, skipped ones left out.
        rows: of the report after the first step.
    """

    def __init__(self, model: nn.Module, config: ActNNConfig, driven: Controller | None) -> None:
        self.name = type(model).__name__
        self.config = config
        self.controller = driven
        self.record = Record(model)
        self.steps = 0
        self.report: ConversionReport | None = None

    @property
    def first(self) -> dict[str, int]:
        """What the first training forward pass kept; zeros before there was one."""
        return self.record.measured[0] if self.record.measured else _NOTHING

    def __str__(self) -> str:
        saved, uncompressed, samples = (self.first[name] for name in _NOTHING)
        ratio = uncompressed / saved if saved else math.nan
        head = self.config.level if self.config.bits is None else f"bits={self.config.bits}"
        return (
            f"{self.name} trains at {head}. Its first forward pass kept {saved / 1e6:.3f} MB of activations "
            f"instead of {uncompressed / 1e6:.3f} MB, {ratio:.1f} times fewer bytes "
            f"({saved / max(samples, 1):,.0f} bytes per sample)."
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "model": self.name,
            "config": self.config.to_dict(),
            **{name: self.first[name] for name in _NOTHING},
            "steps": self.steps,
            "rows": [] if self.report is None else [row._asdict() for row in self.report.rows],
        }


class Process:
    """The models that this process compresses although its script does not know of it.

    Attributes:
        level: what `--actnn` named; it replaces the level of the environment.
    """

    def __init__(self) -> None:
        self.level: str | None = None
        self._models: WeakKeyDictionary[nn.Module, Trained] = WeakKeyDictionary()
        self._all: list[Trained] = []
        self._refused: WeakSet[nn.Module] = WeakSet()
        self._reasons: list[str] = []
        self._own = False

    def config(self) -> ActNNConfig:
        """What the environment asks for, at the level that the script's own command line names.

        Raises:
            ConfigError: it means nothing.
        """
        config = parse(os.environ.get(VARIABLE) or AUTO, f"the environment variable {VARIABLE}")
        return config if self.level is None else config.replace(level=self.level, bits=None)

    def leave_to_script(self, what: str) -> None:
        """The script uses hf_actnn itself; that is said once."""
        if not self._own:
            self._own = True
            say(f"the script compresses {what} itself; {VARIABLE} and `hf-actnn run` change nothing there.")

    def wants(self, model: nn.Module) -> bool:
        """Whether a model is going to be trained and nobody has converted it or tried to."""
        if model in self._models or model in self._refused:
            return False
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return False
        if is_converted(model):
            self.leave_to_script(type(model).__name__)
            return False
        return True

    def take(self, model: nn.Module, *, drive: bool) -> Controller | None:
        """Convert a model.

        Args:
            model: one that it :meth:`wants`.
            drive: whether its controller is to be stepped here.

        Returns:
            That controller, if it is.

        Raises:
            ConfigError: a configuration that does not fit the model.
        """
        config = self.config()
        try:
            convert(model, config)
        except ConversionError as error:
            self.refuse(model, error)
            return None
        driven = controller(model) if drive else None
        self.follow(model, config, driven)
        return driven

    def refuse(self, model: nn.Module, error: ConversionError) -> None:
        """A model stays as it is; that is said at once and at the end."""
        self._refused.add(model)
        self._reasons.append(f"{type(model).__name__} was left as it is: {error}")
        warnings.warn(message(self._reasons[-1].rstrip(".")), ActNNWarning, stacklevel=3)

    def follows(self, model: nn.Module) -> bool:
        """Whether a model was converted here."""
        return model in self._models

    def follow(self, model: nn.Module, config: ActNNConfig, driven: Controller | None = None) -> None:
        """Measure a converted model, and step its controller where nobody else does."""
        if model in self._models:  # a second Trainer, whose callback has converted it again
            self._models[model].controller = driven
            return
        self._models[model] = trained = Trained(model, config, driven)
        self._all.append(trained)

    def about_to_step(self, parameters: set[int]) -> None:
        """All backward passes of a step have run, and an optimizer is going to use their gradients.

        A step that loss scaling then skips is none to the optimizer, but the controller has to hear of it: it drops
        what overflowed, and would take it for a part of the next step's otherwise.

        Args:
            parameters: ids of those the optimizer holds.
        """
        for _, trained in self._held(parameters):
            if trained.controller is not None:
                trained.controller.step()

    def stepped(self, parameters: set[int], speaks: bool) -> None:
        """An optimizer took a step.

        Args:
            parameters: ids of those it holds.
            speaks: whether this is the process that prints.
        """
        for model, trained in self._held(parameters):
            trained.steps += 1
            trained.record.follow()
            if trained.report is None and trained.first["samples"]:
                trained.report = report(model)
                if speaks:
                    say(f"{trained}\n{summary(trained.report)}")
                    self._write()

    def _held(self, parameters: set[int]) -> list[tuple[nn.Module, Trained]]:
        return [
            (model, trained)
            for model, trained in self._models.items()
            if any(id(parameter) in parameters for parameter in model.parameters())
        ]

    def finish(self) -> None:
        """The process ends: write what was measured, and say so if nothing was compressed."""
        if not _is_main_process() or _trains_nothing(sys.argv[0]):
            return
        self._write()
        self._write_records()
        failed = hasattr(sys, "last_type")  # the script's own error says enough
        if not failed and not self._own and not any(trained.first["saved_bytes"] for trained in self._all):
            say(f"nothing was compressed in this process: {' '.join(self._reasons) or self._why_nothing()}")

    def _why_nothing(self) -> str:
        if self._all:
            return f"{', '.join(one.name for one in self._all)} was converted, but no training forward pass came."
        return (
            "the script gave no trainable model to transformers' Trainer or to accelerate's prepare. "
            "In a loop of its own one line turns it on: hf_actnn.convert(model)."
        )

    def _write(self) -> None:
        path = os.environ.get(REPORT_VARIABLE)
        if path and self._all:
            try:
                with open(path, "w") as file:
                    json.dump({"models": [trained.to_dict() for trained in self._all]}, file, indent=2)
            except OSError as error:  # no reason to end a training
                say(f"the report could not be written: {error}")

    def _write_records(self) -> None:
        folder = os.environ.get(RECORD_VARIABLE)
        for number, trained in enumerate(self._all if folder else (), 1):
            name = "record" if number == 1 else f"record-{number}"
            try:
                for ending in (".html", ".json"):
                    trained.record.save(os.path.join(str(folder), name + ending))
            except OSError as error:
                say(f"the record could not be written: {error}")


def _is_main_process() -> bool:
    """Rank 0 of a launcher, and no worker that multiprocessing started."""
    workers = sys.modules.get("multiprocessing.process")
    return os.environ.get("RANK", "0") == "0" and (workers is None or workers.parent_process() is None)


def _trains_nothing(started: str) -> bool:
    """Whether a program, by its sys.argv[0], is a launcher or another command of this project."""
    of_module = (started == name or started.endswith(f"/{name.replace('.', '/')}.py") for name in _MODULES)
    return os.path.basename(started) in _COMMANDS or any(of_module)


process = Process()
