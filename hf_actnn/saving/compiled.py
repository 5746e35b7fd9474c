"""Compression in graphs that torch.compile makes.

No hook and no function mode runs in a compiled graph. What a converted module does while it is traced is to put a mark
before and behind its own operations, an operator that computes nothing. When the graph is divided into a forward and a
backward one, `saving.partition` reads the marks, takes them away, and has what goes from the one to the other coded.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_actnn import codec
from hf_actnn.errors import ActNNWarning, message
from hf_actnn.saving.policy import Policy
from hf_actnn.saving.replays import STREAMS
from hf_actnn.saving.session import Session

_library = torch.library.Library("hf_actnn", "FRAGMENT")
_warned: set[str] = set()


def label(policy: Policy, session: Session) -> str:
    """What a mark says of its module. The same for all modules of one policy, so that they share compiled code; and
    another for another seed, which is a constant of the code that is compiled, and may be kept on disk."""
    return json.dumps(
        {
            "seed": [session.config.seed, session.number],
            "bits": None if policy.bits is None else policy.uniform,
            "exact_norms": policy.exact_norms,
            "group_size": policy.group_size,
            "min_numel": policy.min_numel,
        }
    )


def of(text: str) -> Policy:
    """The policy that a label speaks of."""
    fields = json.loads(text)
    del fields["seed"]
    return Policy(**fields)


def run_marked(session: str, policy: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run a module's call between marks; torch.compile traces this."""
    torch.ops.hf_actnn.enter(session, policy)
    out = forward(*args, **kwargs)
    torch.ops.hf_actnn.leave()
    return out


def is_running_for_compiler() -> bool:
    """Whether this is the plain run of a function that torch.compile did not make a graph of."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


def warn_of_checkpoint() -> None:
    """Say that a graph's own choice of what runs again goes before the model's."""
    warn_once(
        "checkpoint",
        message(
            "a gradient checkpoint inside a compiled graph is not followed: what its block saves is kept as codes",
            where="torch.compile",
            expected="a model without checkpoints, or checkpoints around blocks that are compiled one by one",
            received="a checkpoint in a graph",
            next_step="Turn the checkpoints off, or compile block by block",
        ),
    )


def warn_once(key: str, text: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(text, ActNNWarning, stacklevel=2)


def _enter(session: str, policy: str) -> None:
    """Runs only where nothing took the mark out."""
    warn_once(
        "unmarked",
        message(
            "a compiled graph keeps its activations uncompressed",
            where="torch.compile",
            expected='backend="inductor", and something to train in the graph',
            received="a graph that was not divided into a forward and a backward one by inductor, or a module that a "
            "graph break cuts in two",
            next_step="Leave `backend` out, and look for graph breaks inside modules; of frozen layers nothing is lost",
        ),
    )


def _enter_fake(session: str, policy: str) -> None:
    from hf_actnn.saving import partition  # not before something is compiled: it imports the compiler

    partition.install()
    _say_what_is_not_done(Session.named(session), json.loads(policy)["bits"])


def _say_what_is_not_done(session: Session, bits: int | None) -> None:
    """Once for each model, what its configuration asks for that a compiled graph does not do."""
    config = session.config
    if session.adaptation is not None and bits is not None:
        warn_once(
            f"bits of {session.name}",
            message(
                f"bits are not chosen in compiled graphs: every tensor gets {bits}",
                where="torch.compile",
                expected="a number of bits",
                received=f"level {config.level!r}, bits={config.bits!r}",
                next_step=f"Write bits={bits}, or train without compiling where bits are to be chosen",
            ),
        )
    if config.swaps:
        warn_once(
            f"swapping of {session.name}",
            message(
                "compiled graphs keep their codes on the device: nothing is swapped to the host",
                where="torch.compile",
                expected="swap=False",
                received=f"level {config.level!r}, swap={config.swap!r}",
                next_step="Write swap=False, or train without compiling",
            ),
        )


def _next_step(session: str, device: torch.device) -> Tensor:
    """The number from which a forward pass counts its random streams, ``[1]`` int64: another one in every run."""
    codec.release()  # as every forward pass that is trained, see `Scope.run`
    step = Session.named(session).next_step() * STREAMS
    return torch.tensor([step if step < 2**63 else step - 2**64], device=device)


_library.define("enter(str session, str policy) -> ()")
_library.define("leave() -> ()")
_library.define(
    "next_step(str session, Device device) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
_library.impl("enter", _enter, "CompositeExplicitAutograd")
_library.impl("leave", lambda: None, "CompositeExplicitAutograd")
_library.impl("next_step", _next_step, "CompositeExplicitAutograd")
torch.library.register_fake("hf_actnn::enter", _enter_fake, lib=_library)
torch.library.register_fake("hf_actnn::leave", lambda: None, lib=_library)
torch.library.register_fake(
    "hf_actnn::next_step", lambda session, device: torch.empty(1, dtype=torch.int64, device=device), lib=_library
)
ENTER, LEAVE = torch.ops.hf_actnn.enter.default, torch.ops.hf_actnn.leave.default
for _mark in (ENTER, LEAVE):
    torch.fx.node.has_side_effect(_mark)
