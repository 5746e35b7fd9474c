"""Files that a command is told to write."""

from __future__ import annotations

from pathlib import Path

from hf_actnn.errors import ConfigError, message


def check(path: Path, option: str) -> None:
    """Refuse a file that cannot be written before anything is run.

    Raises:
        ConfigError: its folder does not exist, or it is a folder itself.
    """
    if not path.resolve().parent.is_dir():
        raise ConfigError(
            message(
                "there is no such folder",
                where=option,
                expected="a file in a folder that exists",
                received=str(path),
                next_step="Make it first",
            )
        )
    if path.is_dir():
        raise ConfigError(
            message(
                "this is a folder",
                where=option,
                expected="the path of a file",
                received=str(path),
                next_step="Name a file in it",
            )
        )


def make_folder(path: Path, option: str) -> None:
    """Make a folder before anything is run, unless it is there.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            message(
                "there can be no such folder",
                where=option,
                expected="a folder, or a name for a new one",
                received=f"{path} ({error.strerror})",
                next_step="Name another one",
            )
        ) from error
