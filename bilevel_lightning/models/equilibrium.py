"""Cells of equilibrium models: maps h -> Phi(h, images) of one state a sample, which contract in h."""

from abc import ABC, abstractmethod
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.projections import ConvolutionBall, SpectralBall


class Cell(nn.Module, ABC):
    r"""``Phi(h, x) = tanh(L h + input(x))`` with a linear map L, whose parameter is ``A``.

    tanh moves no two numbers apart, so Phi contracts in h by the operator norm of L.

    Attributes:
        A: the parameter of L.
        state_shape: of the state of one sample.
        features: numbers that `read` gives a sample.
    """

    A: nn.Parameter
    state_shape: tuple[int, ...]
    features: int

    @abstractmethod
    def input(self, images: Tensor) -> Tensor:
        """Returns what does not depend on h, shape ``(batch, *state_shape)``."""

    @abstractmethod
    def forward(self, h: Tensor, injected: Tensor) -> Tensor:
        """Returns the next states.

        Args:
            h: states, ``(batch, *state_shape)``.
            injected: what `input` gave.
        """

    @abstractmethod
    def project(self, A: Tensor, radius: float) -> Tensor:  # noqa: N803 (the paper's name)
        """Returns the nearest A with ``|L| <= radius``."""

    def read(self, h: Tensor) -> Tensor:
        """Returns what the classifier sees of the states, ``(batch, features)``; default: all of them."""
        return h.flatten(1)


class DenseCell(Cell):
    r"""``Phi(h, x) = tanh(h A + x B + c)``, with A (d, d), B (inputs, d) and c (d,).

    Args:
        image_shape: channels, height, width. Default that of MNIST.
        units: size d of the state. Default 200, as in the paper.
        std: the entries of A, B and c are drawn from N(0, std^2). Default 0.01, as in its code.

    Raises:
        BilevelError: if a setting is not positive.

    References:
        R. Grazzi, M. Pontil, S. Salzo. Bilevel Optimization with a Lower-level Contraction: Optimal Sample Complexity
        without Warm-Start. JMLR 2023.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), units: int = 200, std: float = 0.01) -> None:
        super().__init__()
        positive("DenseCell.units", units)
        positive("DenseCell.std", std)
        self.state_shape, self.features = (units,), units
        self.A = nn.Parameter(std * torch.randn(units, units))
        self.B = nn.Parameter(std * torch.randn(prod(image_shape), units))
        self.c = nn.Parameter(std * torch.randn(units))

    @override
    def input(self, images: Tensor) -> Tensor:
        return torch.addmm(self.c, images.flatten(1), self.B)

    @override
    def forward(self, h: Tensor, injected: Tensor) -> Tensor:
        return torch.addmm(injected, h, self.A).tanh()

    @override
    def project(self, A: Tensor, radius: float) -> Tensor:
        return SpectralBall(radius)(A)


class ConvolutionalCell(Cell):
    r"""``Phi(h, x) = tanh(A * h + pool(B * x) + c)``: convolutions with zero padding, and maxima over 2x2 pixels.

    The state has half the height and width of the image: (C, 14, 14) for MNIST. The classifier sees its maxima over
    2x2 again. The norm of ``A *`` is bounded on the grid of the state (`ConvolutionBall`); the paper's code projects on
    one of half its size, where the norm may be smaller than the true one.

    Args:
        image_shape: channels, height, width, the last two divisible by 4. Default that of MNIST.
        channels: C. Default 100, as in the paper's code.
        kernel_size: height and width of A and B, odd. Default 3.

    Raises:
        BilevelError: if a setting is impossible.

    References:
        R. Grazzi, M. Pontil, S. Salzo. Bilevel Optimization with a Lower-level Contraction: Optimal Sample Complexity
        without Warm-Start. JMLR 2023.
    """

    def __init__(
        self, image_shape: tuple[int, int, int] = (1, 28, 28), channels: int = 100, kernel_size: int = 3
    ) -> None:
        super().__init__()
        colours, height, width = image_shape
        if height % 4 or width % 4:
            raise BilevelError(f"ConvolutionalCell needs images whose sides are divisible by 4, got {height}x{width}.")
        if positive("ConvolutionalCell.kernel_size", kernel_size) % 2 != 1:
            raise BilevelError(f"ConvolutionalCell.kernel_size must be odd, got {kernel_size}.")
        positive("ConvolutionalCell.channels", channels)
        self.state_shape = (channels, height // 2, width // 2)
        self.features, self.padding = channels * (height // 4) * (width // 4), kernel_size // 2
        initial = [nn.Conv2d(n, channels, kernel_size).state_dict() for n in (channels, colours)]  # torch's values
        self.A, self.B = (nn.Parameter(values["weight"]) for values in initial)
        self.c = nn.Parameter(initial[0]["bias"])

    @override
    def input(self, images: Tensor) -> Tensor:
        return max_pool2d(conv2d(images, self.B, padding=self.padding), 2) + self.c[:, None, None]

    @override
    def forward(self, h: Tensor, injected: Tensor) -> Tensor:
        return (conv2d(h, self.A, padding=self.padding) + injected).tanh()

    @override
    def project(self, A: Tensor, radius: float) -> Tensor:
        _, height, width = self.state_shape
        return ConvolutionBall(radius, (height + self.padding, width + self.padding))(A)

    @override
    def read(self, h: Tensor) -> Tensor:
        return max_pool2d(h, 2).flatten(1)
