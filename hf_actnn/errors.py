"""What hf_actnn raises and warns with.

Every message names what went wrong, where, what was expected, what was received and what to do next.
"""

from __future__ import annotations


class ActNNError(Exception):
    """Base class of everything hf_actnn raises."""


class ConfigError(ActNNError, ValueError):
    """A configuration that cannot mean anything: unknown level, bits out of range, a pattern that matches nothing."""


class ConversionError(ActNNError, RuntimeError):
    """A model that cannot be converted as asked. The model is left as it was."""


class CodecError(ActNNError, ValueError):
    """A tensor or an argument the codec cannot take."""


class NativeError(ActNNError, RuntimeError):
    """The compiled extension is present but cannot be used."""


class SavedTensorError(ActNNError, RuntimeError):
    """A kept tensor cannot be given back as autograd saved it.

    Also a ``RuntimeError``, as autograd's own version check raises.
    """


class NotAvailableError(ActNNError, NotImplementedError):
    """Something that is named and planned but cannot be done yet."""


class ActNNWarning(UserWarning):
    """Something works, but at a cost that the message states."""


def message(what: str, *, where: str = "", expected: str = "", received: str = "", next_step: str = "") -> str:
    """Build an error text in the one form the project uses.

    Args:
        what: what went wrong, a whole clause without a full stop.
        where: module path, argument or file.
        expected: what would have been accepted.
        received: what came.
        next_step: what the reader should do now.
    """
    parts = [what + (f" (at {where})" if where else "") + "."]
    if expected:
        parts.append(f"Expected {expected}.")
    if received:
        parts.append(f"Received {received}.")
    if next_step:
        parts.append(next_step if next_step.endswith((".", ")", "?")) else next_step + ".")
    return " ".join(parts)
