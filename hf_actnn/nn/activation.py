"""Elementwise activations and softmax."""

from torch import nn

from hf_actnn.nn.registry import named

ReLU, ReLU6, LeakyReLU, Hardtanh, Hardsigmoid = named(
    "activation", nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Hardsigmoid
)
GELU, SiLU, Mish, Hardswish, ELU, Softplus = named(
    "activation", nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.Softplus
)
Sigmoid, Tanh, Softmax, Softmin = named("activation", nn.Sigmoid, nn.Tanh, nn.Softmax, nn.Softmin)
SELU, CELU, GLU, LogSigmoid, Threshold = named("activation", nn.SELU, nn.CELU, nn.GLU, nn.LogSigmoid, nn.Threshold)
