"""Per torch function: which of its saved tensors is kept how, and which outputs are recipes."""

from hf_actnn.saving.rules import (
    activations,
    arithmetic,
    attention,
    copies,
    dropout,
    linear,
    losses,
    norms,
    pooling,
    products,
    reductions,
    sampling,
)
from hf_actnn.saving.rules.rule import TRANSPARENT, Rule, all_rules, find, functions, register

__all__ = [
    "TRANSPARENT",
    "Rule",
    "all_rules",
    "find",
    "functions",
    "register",
    "activations",
    "arithmetic",
    "attention",
    "copies",
    "dropout",
    "linear",
    "losses",
    "norms",
    "pooling",
    "products",
    "reductions",
    "sampling",
]
