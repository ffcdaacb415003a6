"""The twelve-layer residual network of few-shot learning, whole and without its last layer."""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.models.initialization import Init, initialize
from bilevel_lightning.models.norm import Norm, normalization

HALVINGS = 3


class ResidualBlock(nn.Module):
    """pool(ReLU(F(a) + S(a))): F three 3x3 convolutions, S one 1x1 convolution, each normalised; ReLU within F.

    Args:
        inputs: channels of the input, shape ``(batch, inputs, height, width)``.
        outputs: channels of the output.
        pool: whether 2x2 max-pooling halves height and width. Default True.
        norm: see `normalization`. Default ``transductive``.
        steps: sets of statistics of ``norm="per_step"``. Default 1.
    """

    def __init__(
        self, inputs: int, outputs: int, pool: bool = True, norm: Norm = "transductive", steps: int = 1
    ) -> None:
        super().__init__()

        def convolution(inputs: int, size: int) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=norm == "none")
            return [layer, normalization(norm, outputs, steps, "ResNet12")]

        first, second, third = convolution(inputs, 3), convolution(outputs, 3), convolution(outputs, 3)
        self.residual = nn.Sequential(*first, nn.ReLU(), *second, nn.ReLU(), *third)
        self.shortcut = nn.Sequential(*convolution(inputs, 1))
        self.end = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2) if pool else nn.Identity())

    @override
    def forward(self, maps: Tensor) -> Tensor:
        """Returns the output maps."""
        end: Tensor = self.end(self.residual(maps) + self.shortcut(maps))
        return end


class ResNet12Body(nn.Sequential):
    """Four residual blocks, the first three with 2x2 max-pooling, then means over space: the features.

    IAPTT-GM's network of 7 996 800 parameters. Its layout, by arithmetic: the weights of twelve 3x3 convolutions
    (7 816 896) and four 1x1 shortcuts (172 224), all without biases, and two affine parameters a channel for the
    normalisation of all sixteen (8 x 960 = 7 680). Convolutions have biases with ``norm="none"`` only.

    Args:
        image_shape: channels, height, width, both at least 8. Default that of MiniImageNet.
        width: channels of each block. Default 64, 128, 256, 512, as in IAPTT-GM; MetaOptNet has 64, 160, 320, 640.
        norm: ``transductive`` (default, as in IAPTT-GM), ``frozen``, ``per_step``, ``group`` or ``none``; see
            `normalization`.
        steps: sets of statistics of ``norm="per_step"``; T + 1 for T lower steps. Default 1.
        init: initial weights, see `initialize`. Default ``he``, customary for residual networks.

    Attributes:
        shape: channels of the last block, 1, 1.
        features: channels of the last block.

    Raises:
        BilevelError: if the image is too small, or for an impossible width.

    References:
        Boris Oreshkin, Pau Rodriguez, Alexandre Lacoste. TADAM: Task dependent adaptive metric for improved few-shot
        learning. NeurIPS 2018.

        Kwonjoon Lee, Subhransu Maji, Avinash Ravichandran, Stefano Soatto. Meta-Learning with Differentiable Convex
        Optimization. CVPR 2019.

        Risheng Liu, Yaohua Liu, Shangzhi Zeng, Jin Zhang. Towards Gradient-based Bilevel Optimization with Non-convex
        Followers and Beyond. NeurIPS 2021.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 84, 84),
        width: tuple[int, int, int, int] = (64, 128, 256, 512),
        norm: Norm = "transductive",
        steps: int = 1,
        init: Init = "he",
    ) -> None:
        if min(image_shape[1:]) < 2**HALVINGS:
            raise BilevelError(
                f"{type(self).__name__}.image_shape must be at least {2**HALVINGS}x{2**HALVINGS}, got "
                f"{image_shape[1]}x{image_shape[2]}. Enlarge the images, or take ConvNet with fewer blocks."
            )
        for outputs in width:
            positive(f"{type(self).__name__}.width", outputs)
        maps = pairwise((image_shape[0], *width))
        blocks = [ResidualBlock(inputs, outputs, i < HALVINGS, norm, steps) for i, (inputs, outputs) in enumerate(maps)]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        initialize(self, init)
        self.features = width[-1]
        self.shape = (self.features, 1, 1)


class ResNet12(ResNet12Body):
    """A `ResNet12Body` and a linear layer: images to logits.

    Args:
        image_shape: channels, height, width. Default that of MiniImageNet.
        classes: number of classes. Default 5, the ways of the usual episode.
        init: initial weights, of the linear layer too, see `initialize`. Default ``he``.
        options: the other settings of `ResNet12Body`.

    Raises:
        BilevelError: for settings that `ResNet12Body` refuses.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 84, 84),
        classes: int = 5,
        init: Init = "he",
        **options: Any,
    ) -> None:
        super().__init__(image_shape, init="torch", **options)
        self.append(nn.Linear(self.features, classes))
        initialize(self, init)
