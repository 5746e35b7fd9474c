"""The command `hf-actnn`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_actnn import __version__
from hf_actnn.commands import estimate, files, profile
from hf_actnn.config import ActNNConfig
from hf_actnn.errors import ActNNError

_PACKAGES = ("hf-actnn", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "numpy", "pybind11")


def environment() -> dict[str, Any]:
    """What a report of a problem should contain: versions, the machine, and which kernels are in use and why."""
    import torch

    from hf_actnn.codec import native

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}},
        "machine": {
            "system": platform.platform(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "gpus": gpus,
        },
        "cpu_kernels": native.status(),
        "cuda_kernels": native.cuda_status(),
    }


def _print_environment(arguments: argparse.Namespace) -> int:
    found = environment()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for title, values in found.items():
        print(title)
        for name, value in values.items():
            text = "-" if value is None or value == [] else value
            print(f"  {name:<14} {text}")
    return 0


def _run_script(arguments: argparse.Namespace) -> int:
    """Compression as asked for in the environment, so that processes the script starts have it too."""
    import hf_actnn_startup
    from hf_actnn.integrations import runner, unmodified

    script, *words = arguments.script
    given = next(((name, value) for name in _CONFIGURATIONS if (value := getattr(arguments, name)) is not None), None)
    try:
        if given is not None:
            config = _configuration(*given)
            os.environ[unmodified.VARIABLE] = json.dumps(config.to_dict())
        elif not os.environ.get(unmodified.VARIABLE):
            os.environ[unmodified.VARIABLE] = "auto"
        unmodified.process.config()
        if arguments.report is not None:
            files.check(arguments.report, "--report")
        if arguments.record is not None:
            files.make_folder(arguments.record, "--record")
        runner.check(script, arguments.module)
    except ActNNError as error:
        print(f"hf-actnn run: {error}", file=sys.stderr)
        return 2
    if arguments.report is not None:
        os.environ[unmodified.REPORT_VARIABLE] = os.path.abspath(arguments.report)
    if arguments.record is not None:
        os.environ[unmodified.RECORD_VARIABLE] = os.path.abspath(arguments.record)
    hf_actnn_startup.install()
    runner.run(script, words, module=arguments.module)
    return 0


_CONFIGURATIONS = ("level", "bits", "config")


def _configuration(option: str, text: str) -> ActNNConfig:
    from hf_actnn.integrations.unmodified import parse

    if option == "level":
        return ActNNConfig(level=text)
    return parse(text, f"--{option}") if option == "bits" else ActNNConfig.from_json_file(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="hf-actnn", description="Compressed activations for vision models.")
    top.add_argument("--version", action="version", version=f"hf-actnn {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    env = commands.add_parser("env", help="print versions, the machine and the kernels in use")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=_print_environment)
    run = commands.add_parser(
        "run",
        help="run a training script with compressed activations",
        description="Run a script as python would, with compressed activations where it trains through transformers' "
        "Trainer or accelerate's prepare. Without a level, bits or a file HF_ACTNN holds, and without that bits=auto.",
    )
    how = run.add_mutually_exclusive_group()
    how.add_argument("--level", help="such as L3")
    how.add_argument("--bits", help="a number of bits per value, or auto")
    how.add_argument("--config", metavar="FILE", help="fields of ActNNConfig as a JSON file")
    run.add_argument("--report", type=Path, metavar="FILE", help="write what was measured to a JSON file")
    run.add_argument("--record", type=Path, metavar="DIR", help="write the bits by layer over time to a folder")
    run.add_argument("-m", "--module", action="store_true", help="the script is a module's name, as in python -m")
    # PARSER takes one word and all behind it, a `--` among them, which two arguments would drop.
    run.add_argument("script", nargs=argparse.PARSER, help="the script's path, and its own arguments")
    run.set_defaults(run=_run_script)
    profile.add(commands)
    estimate.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `hf-actnn`; those of the process if None.

    Returns:
        The exit status: where it could not be done 1, or 2 before a script was run, and the reason on standard error.
    """
    parsed = parser().parse_args(arguments)
    if parsed.run is _run_script:  # what the script raises is its own
        return _run_script(parsed)
    try:
        return int(parsed.run(parsed))
    except ActNNError as error:
        print(f"hf-actnn {parsed.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
