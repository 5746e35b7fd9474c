"""Lets torchvision be imported beside a torch that was built without CUDA.

Some torchvision wheels carry a compiled part that needs CUDA's libraries. Without them `import torchvision` stops with
"operator torchvision::nms does not exist", and with it timm and every Hugging Face model that touches images. Nothing
this project runs calls those operators; their two schemas only have to exist. So they are defined at the moment
torchvision has tried its compiled part and is about to register fakes for it, and only if it did not define them.

`python tools/torchvision_without_cuda.py` installs this file and a `.pth` line into the running interpreter's
site-packages, so that child processes (accelerate launch, torchrun) are covered too. Beside a torch with CUDA it
removes them again. Starting Python stays cheap: this file imports nothing but sys at its top, and torch is imported by
torchvision itself or not at all.
"""

from __future__ import annotations

import sys

NAME = "torchvision_without_cuda"

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# The first modules torchvision imports after its compiled part.
_AFTER_COMPILED_PART = ("torchvision._autograd_registrations", "torchvision._meta_registrations")

_libraries: list[object] = []  # an operator's definition lives as long as its library object


class _TorchvisionWatch:
    """Finds nothing; it only notices when torchvision has got past its compiled part."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname in _AFTER_COMPILED_PART and not _libraries:
            _define_missing()
        return None


def _define_missing() -> None:
    import torch

    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            library.define(schema)
        _libraries.append(library)


def install() -> None:
    """Watch for torchvision's import in this process. Calling it again changes nothing."""
    # By name: this file may have been imported twice, by tests and from site-packages.
    if not any(type(finder).__name__ == _TorchvisionWatch.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionWatch())


def main() -> None:
    """Put the watch into this interpreter's site-packages, or take it out where torch has CUDA."""
    import shutil
    import sysconfig
    from pathlib import Path

    import torch

    site = Path(sysconfig.get_paths()["purelib"])
    module, start = site / f"{NAME}.py", site / f"{NAME}.pth"
    if torch.version.cuda is None:
        shutil.copyfile(__file__, module)
        start.write_text(f"import {NAME}; {NAME}.install()\n")
    else:
        module.unlink(missing_ok=True)
        start.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
