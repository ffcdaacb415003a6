"""Dense networks: on flattened images, and for regression."""

from itertools import pairwise
from math import prod
from typing import Literal

from torch import nn

from bilevel_lightning.errors import BilevelError, positive

Activation = Literal["sigmoid", "relu", "none"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "none": nn.Identity}


class LinearNet(nn.Sequential):
    """Multinomial logistic regression: one linear layer.

    Args:
        image_shape: channels, height, width. Default that of MNIST.
        classes: number of classes. Default 10.
        bias: whether there is a bias. Default True.
        init: ``torch`` (default): its own random initialisation. ``zero``: all parameters 0, where no class is
            preferred; the problem is convex.

    Raises:
        BilevelError: for an ``init`` that does not exist.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        bias: bool = True,
        init: Literal["torch", "zero"] = "torch",
    ) -> None:
        super().__init__(nn.Flatten(), nn.Linear(prod(image_shape), classes, bias=bias))
        if init not in ("torch", "zero"):
            raise BilevelError(f"LinearNet.init must be torch or zero, got {init!r}.")
        if init == "zero":
            for parameter in self.parameters():
                nn.init.zeros_(parameter)


class MLPNet(nn.Sequential):
    """One hidden layer, in torch's default initialisation.

    Args:
        image_shape: channels, height, width. Default that of MNIST.
        classes: number of classes. Default 10.
        hidden: units of the hidden layer. Default 300, as in PBGD and IAPTT-GM's hyper-cleaning.
        activation: ``sigmoid`` (default, as in PBGD), ``relu``, or ``none`` (as in IAPTT-GM).
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        hidden: int = 300,
        activation: Activation = "sigmoid",
    ) -> None:
        first, last = nn.Linear(prod(image_shape), hidden), nn.Linear(hidden, classes)
        super().__init__(nn.Flatten(), first, _ACTIVATIONS[activation](), last)


class RegressionMLP(nn.Sequential):
    """Linear layers with ReLU between them, in torch's default initialisation, for the sinusoid of few-shot learning.

    Inputs have shape ``(batch, inputs)``, outputs ``(batch, outputs)``. MAML's own code draws the weights from a normal
    distribution truncated at two standard deviations of 0.01, with zero biases.

    Args:
        inputs: number of inputs. Default 1.
        outputs: number of outputs. Default 1.
        hidden: units of each hidden layer. Default 40, 40, as in MAML: 1 761 parameters.

    Raises:
        BilevelError: if a size is not positive.

    References:
        Chelsea Finn, Pieter Abbeel, Sergey Levine. Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks.
        ICML 2017.
    """

    def __init__(self, inputs: int = 1, outputs: int = 1, hidden: tuple[int, ...] = (40, 40)) -> None:
        positive("RegressionMLP.inputs", inputs)
        positive("RegressionMLP.outputs", outputs)
        for units in hidden:
            positive("RegressionMLP.hidden", units)
        layers: list[nn.Module] = []
        for before, units in pairwise((inputs, *hidden)):
            layers += [nn.Linear(before, units), nn.ReLU()]
        super().__init__(*layers, nn.Linear((inputs, *hidden)[-1], outputs))
