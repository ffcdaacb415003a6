"""The operations of an edge in the DARTS search space, on maps of shape ``(batch, channels, height, width)``."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning.errors import BilevelError

NormLayer: TypeAlias = Callable[[int], nn.Module]
"""Makes a normalisation layer for a number of channels."""

NONE = "none"
OPERATIONS = (
    NONE,
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The names of the operations, in the order of DARTS."""


def fixed_norm(channels: int) -> nn.Module:
    """Returns batch normalisation by the batch at hand, with neither parameters nor running statistics.

    That of searching: what a loss remembered would depend on the algorithm, and learnt scales would weigh operations.
    """
    return nn.BatchNorm2d(channels, affine=False, track_running_stats=False)


class ReLUConvNorm(nn.Sequential):
    """ReLU, 1x1 convolution, normalisation: what brings a cell's inputs to its number of channels.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        norm: makes the normalisation layer.
    """

    def __init__(self, inputs: int, outputs: int, norm: NormLayer) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), norm(outputs))


class FactorizedReduce(nn.Module):
    """Halves height and width without dropping pixels' neighbours: two 1x1 convolutions of stride 2, one shifted by 1.

    Args:
        inputs: channels of the input, whose height and width are even.
        outputs: channels of the output, one half from each convolution.
        norm: makes the normalisation layer.
    """

    def __init__(self, inputs: int, outputs: int, norm: NormLayer) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, stride=2, bias=False)
        self.norm = norm(outputs)

    @override
    def forward(self, maps: Tensor) -> Tensor:
        """Returns the reduced maps."""
        maps = torch.relu(maps)
        normed: Tensor = self.norm(torch.cat([self.even(maps), self.odd(maps[:, :, 1:, 1:])], 1))
        return normed


def _depthwise(channels: int, size: int, stride: int, dilation: int, norm: NormLayer) -> list[nn.Module]:
    padding = dilation * (size - 1) // 2
    spatial = nn.Conv2d(channels, channels, size, stride, padding, dilation, groups=channels, bias=False)
    return [nn.ReLU(), spatial, nn.Conv2d(channels, channels, 1, bias=False), norm(channels)]


def operation(name: str, channels: int, stride: int, norm: NormLayer) -> nn.Module:
    """Returns one operation; ``none``, which gives zeros, is left out wherever it is applied, and has no module.

    ``sep_conv_KxK``: twice ReLU, depthwise KxK and 1x1 convolution, normalisation; the stride is in the first.

    ``dil_conv_KxK``: ReLU, depthwise KxK convolution with dilation 2, 1x1 convolution, normalisation.

    ``max_pool_3x3``, ``avg_pool_3x3``: the average without what padding adds; no normalisation.

    ``skip_connect``: the identity, or with stride 2 a `FactorizedReduce`.

    Args:
        name: one of `OPERATIONS` but ``none``.
        channels: of input and output.
        stride: 1 or 2.
        norm: makes normalisation layers.

    Raises:
        BilevelError: for an operation that does not exist.

    References:
        H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable Architecture Search. ICLR 2019.
    """
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, 1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, norm)
    kind, _, size = name.partition("_conv_")
    if name in OPERATIONS and kind == "sep":
        first = _depthwise(channels, int(size[0]), stride, 1, norm)
        return nn.Sequential(*first, *_depthwise(channels, int(size[0]), 1, 1, norm))
    if name in OPERATIONS and kind == "dil":
        return nn.Sequential(*_depthwise(channels, int(size[0]), stride, 2, norm))
    raise BilevelError(f"There is no operation {name!r} to apply; choose among {', '.join(OPERATIONS[1:])}.")
