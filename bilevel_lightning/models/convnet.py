"""The four-block convolutional network of few-shot learning, whole and without its last layer."""

from typing import Any, Literal, get_args

from torch import nn

from bilevel_lightning.errors import BilevelError
from bilevel_lightning.models.initialization import Init, initialize
from bilevel_lightning.models.norm import Norm, normalization

Order = Literal["norm_relu_pool", "pool_norm_relu", "relu_pool_norm"]
Pooling = Literal["max", "stride"]


class ConvNetBody(nn.Sequential):
    """Blocks of 3x3 convolution, normalisation, ReLU, 2x2 pooling; then the maps as one vector of features.

    Forms of the literature (the convolutions have biases, the normalisation is affine):

    * IAPTT-GM, BDA on MiniImageNet: ``image_shape=(3, 84, 84), width=32, norm="transductive", order="pool_norm_relu",
      init="he"``; 28 896 parameters, features 32x5x5.
    * IAPTT-GM, hypertorch on Omniglot: ``width=64, norm="transductive", order="relu_pool_norm"``; 64 features
      (hypertorch: ``init="he"``).
    * BioptExps on MiniImageNet: as the first with ``order="relu_pool_norm", tanh=True``; bounded features bound the
      curvature of a softmax head on them.
    * MAML on MiniImageNet: as the first with ``order="norm_relu_pool", init="xavier"``.
    * MAML on Omniglot: ``width=64, norm="transductive", pooling="stride", mean=True, init="xavier"``; 64 features.

    Args:
        image_shape: channels, height, width. Default that of MNIST and Omniglot.
        width: channels of each block; with ``norm="group"`` a multiple of 8. Default 32.
        blocks: number of blocks; each halves height and width. Default: 4, or as many as the image allows.
        norm: ``group`` (default), ``transductive``, ``frozen``, ``per_step`` or ``none``; see `normalization`. Group
            normalisation makes a loss a function of parameters and single images, hence the default.
        steps: sets of statistics of ``norm="per_step"``; T + 1 for T lower steps. Default 1.
        order: what follows a convolution. Default ``norm_relu_pool``.
        pooling: ``max`` (default), which drops the last of an odd number of rows, or ``stride``, convolutions of
            stride 2, which keep it.
        mean: whether the features are means over space. Default False.
        tanh: whether the features pass through a hyperbolic tangent. Default False.
        init: initial weights, see `initialize`. Default ``torch``.

    Attributes:
        shape: channels, height and width of what the features are; the last two are 1 with ``mean``.
        features: their number.

    Raises:
        BilevelError: if the image is too small for the blocks, or for an impossible width, order or pooling.

    References:
        Chelsea Finn, Pieter Abbeel, Sergey Levine. Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks.
        ICML 2017.

        Risheng Liu, Yaohua Liu, Shangzhi Zeng, Jin Zhang. Towards Gradient-based Bilevel Optimization with Non-convex
        Followers and Beyond. NeurIPS 2021.
    """

    shape: tuple[int, int, int]
    features: int

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        width: int = 32,
        blocks: int | None = None,
        norm: Norm = "group",
        steps: int = 1,
        order: Order = "norm_relu_pool",
        pooling: Pooling = "max",
        mean: bool = False,
        tanh: bool = False,
        init: Init = "torch",
    ) -> None:
        name = type(self).__name__
        for setting, value, choices in (("order", order, get_args(Order)), ("pooling", pooling, get_args(Pooling))):
            if value not in choices:
                raise BilevelError(f"{name}.{setting} must be one of {', '.join(choices)}, got {value!r}.")
        channels, height, columns = image_shape
        most = min(height, columns).bit_length() - 1
        blocks = min(4, most) if blocks is None else blocks
        if not 1 <= blocks <= most:
            raise BilevelError(
                f"{name}.blocks must be between 1 and {most} for images of {height}x{columns}, got {blocks}."
            )
        layers: list[nn.Module] = []
        strided = pooling == "stride"
        for i in range(blocks):
            parts = {
                "norm": normalization(norm, width, steps, name),
                "relu": nn.ReLU(),
                "pool": nn.Identity() if strided else nn.MaxPool2d(2),
            }
            layers.append(nn.Conv2d(width if i else channels, width, 3, stride=2 if strided else 1, padding=1))
            layers += [parts[part] for part in order.split("_")]
            height, columns = (height + strided) // 2, (columns + strided) // 2
        super().__init__(
            *layers, *([nn.AdaptiveAvgPool2d(1)] if mean else []), nn.Flatten(), *([nn.Tanh()] if tanh else [])
        )
        initialize(self, init)
        self.shape = (width, 1, 1) if mean else (width, height, columns)
        self.features = self.shape[0] * self.shape[1] * self.shape[2]


class ConvNet(ConvNetBody):
    """A `ConvNetBody` and a linear layer: images to logits.

    With the defaults, four blocks of 3x3 convolution, group normalisation, ReLU and 2x2 max-pooling.

    Args:
        image_shape: channels, height, width. Default that of MNIST and Omniglot.
        classes: number of classes. Default 10.
        width: channels of each block. Default 32.
        blocks: number of blocks. Default: 4, or as many as the image allows.
        init: initial weights, of the linear layer too, see `initialize`. Default ``torch``.
        options: the other settings of `ConvNetBody`.

    Raises:
        BilevelError: for settings that `ConvNetBody` refuses.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        width: int = 32,
        blocks: int | None = None,
        init: Init = "torch",
        **options: Any,
    ) -> None:
        super().__init__(image_shape, width, blocks, **options)
        self.append(nn.Linear(self.features, classes))
        initialize(self, init)
