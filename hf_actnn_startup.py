"""Compression in scripts that do not know of it: waits for the modules of the host libraries that train.

A line in site-packages, `hf_actnn.pth`, calls :func:`install` where Python starts with HF_ACTNN set, and `hf-actnn run`
calls it before it runs a script. This module stands beside the package and imports nothing, because `import hf_actnn`
imports torch, which a launcher or a process that loads data may never need.
"""

from __future__ import annotations

import atexit
import sys
from typing import Any

#: Modules that are changed once they are imported. `hf_actnn.integrations.patches` says how.
WATCHED = ("transformers.trainer", "transformers.hf_argparser", "accelerate.accelerator")


class Watch:
    """Finds the watched modules as Python would, and has each patched when its own code has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in WATCHED:
            return None
        # Those behind this one alone: another hook in front may ask all the others, this one among them.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find_spec = getattr(finder, "find_spec", None)  # old finders have none, and Python passes over them
            spec = None if find_spec is None else find_spec(name, path, target)
            if spec is not None:
                _patch_when_executed(name, spec.loader)
                return spec
        return None


def _patch_when_executed(name: str, loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: Any) -> None:
        execute(module)
        if module.__name__ == name:  # in a zip file all modules have one loader
            _patch(module)

    loader.exec_module = exec_module


def _patch(module: Any) -> None:
    from hf_actnn.integrations.patches import PATCHES

    PATCHES[module.__name__](module)


def _say_what_became_of_it() -> None:
    if "torch" in sys.modules:  # otherwise nothing can have been trained
        from hf_actnn.integrations.unmodified import process

        process.finish()


def install() -> None:
    """Watch the imports of this process; a watched module that is there already is patched now.

    Calling it again changes nothing.
    """
    if any(isinstance(finder, Watch) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, Watch())
    atexit.register(_say_what_became_of_it)
    for name in WATCHED:
        if name in sys.modules:
            _patch(sys.modules[name])
