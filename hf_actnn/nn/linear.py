"""Linear layers."""

from torch import nn

from hf_actnn.nn.registry import named

(Linear,) = named("linear", nn.Linear)
