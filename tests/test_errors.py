"""The form of error texts, and what can be caught as what."""

from __future__ import annotations

import pytest

from hf_actnn import errors


def test_the_form():
    text = errors.message("it broke", where="encoder.0", expected="this", received="that", next_step="Do so")
    assert text == "it broke (at encoder.0). Expected this. Received that. Do so."
    assert errors.message("it broke") == "it broke."
    assert errors.message("it broke", next_step="Call f(x)").endswith("Call f(x)")


@pytest.mark.parametrize(
    "name, builtin",
    [
        ("ConfigError", ValueError),
        ("ConversionError", RuntimeError),
        ("CodecError", ValueError),
        ("NativeError", RuntimeError),
        ("SavedTensorError", RuntimeError),
        ("NotAvailableError", NotImplementedError),
    ],
)
def test_can_be_caught_as_ours_and_as_pythons(name, builtin):
    cls = getattr(errors, name)
    assert issubclass(cls, errors.ActNNError) and issubclass(cls, builtin)


def test_the_warning_is_a_user_warning():
    assert issubclass(errors.ActNNWarning, UserWarning)
