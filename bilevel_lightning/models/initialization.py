"""Initial weights of few-shot networks."""

from typing import Literal, get_args

from torch import nn

from bilevel_lightning.errors import BilevelError

Init = Literal["torch", "xavier", "he"]
"""Choices of `initialize`."""


def initialize(module: nn.Module, init: Init) -> None:
    """Draws the weights of all convolutions and linear layers anew; their biases become zero.

    ``torch``: leaves what torch's constructors drew, biases too.

    ``xavier``: uniform in +-sqrt(6 / (fan_in + fan_out)), as MAML's network for MiniImageNet. Xavier Glorot, Yoshua
    Bengio. Understanding the difficulty of training deep feedforward neural networks. AISTATS 2010.

    ``he``: convolutions normal with variance 2 / fan_out, linear layers normal with standard deviation 0.01, as
    IAPTT-GM's ConvNet. Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun. Delving Deep into Rectifiers. ICCV 2015.

    Args:
        module: the network.
        init: the choice.

    Raises:
        BilevelError: for a choice that does not exist.
    """
    if init not in get_args(Init):
        raise BilevelError(f"{type(module).__name__}.init must be one of {', '.join(get_args(Init))}, got {init!r}.")
    if init == "torch":
        return
    for layer in module.modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        if init == "xavier":
            nn.init.xavier_uniform_(layer.weight)
        elif isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.normal_(layer.weight, std=0.01)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
