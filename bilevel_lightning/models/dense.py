"""Dense networks on flattened images."""

from math import prod
from typing import Literal

from torch import nn

Activation = Literal["sigmoid", "relu", "none"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "none": nn.Identity}


class LinearNet(nn.Sequential):
    """Multinomial logistic regression: one linear layer, in torch's default initialisation.

    Args:
        image_shape: channels, height, width. Default that of MNIST.
        classes: number of classes. Default 10.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> None:
        super().__init__(nn.Flatten(), nn.Linear(prod(image_shape), classes))


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
