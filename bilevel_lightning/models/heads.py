"""Last layers of few-shot networks, for tasks that learn them apart from the body: features to logits."""

from typing import Literal

from torch import nn

from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.models.initialization import Init, initialize
from bilevel_lightning.models.norm import Norm, normalization


class LinearHead(nn.Linear):
    """One linear layer: a lower level that is convex.

    Args:
        features: those of the body. Default 64, of the Omniglot network; 800 of IAPTT-GM's ConvNet (4 005 parameters
            with 5 ways), 512 of ResNet-12 (2 565).
        ways: number of classes. Default 5.
        init: initial weights, see `initialize`, or ``zero``, which prefers no class. Default ``torch``; IAPTT-GM has
            ``he`` on a ConvNet.

    Raises:
        BilevelError: if a number is not positive.
    """

    def __init__(self, features: int = 64, ways: int = 5, init: Init | Literal["zero"] = "torch") -> None:
        positive("LinearHead.features", features)
        positive("LinearHead.ways", ways)
        super().__init__(features, ways)
        if init == "zero":
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)
        else:
            initialize(self, init)


class ConvHead(nn.Sequential):
    """Blocks of 3x3 convolution, 2x2 max-pooling, normalisation, Softplus; then a linear layer: not convex.

    The lower level of IAPTT-GM on MiniImageNet; with the defaults 9 957 parameters. It takes the body's features as
    vectors, shape ``(batch, C H W)``. A body of ``blocks=4-k`` with a head of ``blocks=k`` moves k blocks of ConvNet-4
    into the lower level.

    Args:
        shape: channels C, height H, width W of the features, the body's ``shape``. Default that of `ConvNetBody` on
            images of 84x84.
        ways: number of classes. Default 5.
        width: channels of each block. Default 32, as in IAPTT-GM.
        blocks: number of blocks; each halves height and width. Default 1, as in IAPTT-GM.
        norm: see `normalization`. Default ``transductive``, as in IAPTT-GM.
        steps: sets of statistics of ``norm="per_step"``. Default 1.
        init: initial weights, see `initialize`. Default ``he``, as in IAPTT-GM.

    Raises:
        BilevelError: if the features have no such height and width, or for an impossible width.

    References:
        Risheng Liu, Yaohua Liu, Shangzhi Zeng, Jin Zhang. Towards Gradient-based Bilevel Optimization with Non-convex
        Followers and Beyond. NeurIPS 2021.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (32, 5, 5),
        ways: int = 5,
        width: int = 32,
        blocks: int = 1,
        norm: Norm = "transductive",
        steps: int = 1,
        init: Init = "he",
    ) -> None:
        channels, height, columns = shape
        most = min(height, columns).bit_length() - 1
        if not 1 <= blocks <= most:
            raise BilevelError(
                f"ConvHead.blocks must be between 1 and {most} for features of {height}x{columns}, got {blocks}. "
                "Take LinearHead, or a body with fewer blocks."
            )
        positive("ConvHead.width", width)
        positive("ConvHead.ways", ways)
        layers: list[nn.Module] = [nn.Unflatten(1, shape)]
        for i in range(blocks):
            layers += [
                nn.Conv2d(width if i else channels, width, 3, padding=1),
                nn.MaxPool2d(2),
                normalization(norm, width, steps, "ConvHead"),
                nn.Softplus(),
            ]
        features = width * (height >> blocks) * (columns >> blocks)
        super().__init__(*layers, nn.Flatten(), nn.Linear(features, ways))
        initialize(self, init)
