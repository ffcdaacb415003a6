"""The two examples of the penalty-based methods PBGD."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.tasks.numerical.base import NumericalTask, Ranges, Starts
from bilevel_lightning.tree import Params


class PBGDToy(NumericalTask):
    r"""A lower level that is not convex but has one minimiser, and three local solutions.

    Upper: f(x, y) = cos(4y + 2) / (1 + exp(2 - 4x)) + ln((4x - 2)^2 + 1) / 2, with x in [0, 3].
    Lower: g(x, y) = (x + y)^2 + x sin^2(x + y).

    For x >= 0 the lower solution is y*(x) = -x with g = 0, so F(x) = f(x, -x); for x > 1 g is not convex in y.
    `solutions` are the three minimisers of F in [0, 3], the roots 0.38236007, 1.21514548 and 2.82964180 of F'. The
    second is the global one, F = 0.19991089.

    Args:
        starts: as in `NumericalTask`. Default 1.
        ranges: as in `NumericalTask`. Default x in [0, 3.5] and y in [-5, 8.5], the paper's: some starts are not
            feasible, and the first step projects them.
        seed: of the starts. Default 0.

    References:
        H. Shen, T. Chen. On Penalty-based Bilevel Gradient Descent Method. ICML 2023.
    """

    def __init__(self, starts: Starts = 1, ranges: Ranges = ((0.0, 3.5), (-5.0, 8.5)), seed: int = 0) -> None:
        super().__init__(1, 1, starts, ranges, seed)

    @override
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        value: Tensor = torch.cos(4 * y + 2) * torch.sigmoid(4 * x - 2) + 0.5 * torch.log1p((4 * x - 2).square())
        return value.squeeze(1)

    @override
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return ((x + y).square() + x * torch.sin(x + y).square()).squeeze(1)

    @override
    def project_upper(self, upper: Params) -> Params:
        return {"x": upper["x"].clamp(0, 3)}

    @override
    def lower_solutions(self, x: Tensor) -> Tensor:
        return -x[None]

    @override
    def solutions(self) -> tuple[Tensor, Tensor]:
        x = torch.tensor([[0.38236007476698836], [1.2151454754759206], [2.829641800022212]], dtype=torch.float64)
        return x, -x


class GPBGDTrap(NumericalTask):
    r"""A point that holds gradient-norm penalties fast, although it is far from the lower solution.

    Upper: f(x, y) = sin^2(y - 2 pi / 3) + x^2 / 2.
    Lower: g(x, y) = y^2 + 2 sin^2(y).

    The example of the paper has no upper variable. Here x^2 / 2 gives it one that plays no role in y: the solution is
    (0, 0), where g has its only stationary point, and F(x) = 3/4 + x^2 / 2. At y = 2 pi / 3 both f_y and g_yy are zero,
    so that the gradient of f + gamma |g_y|^2 / 2 is zero for every gamma: G-PBGD stays, value gaps do not.

    Args:
        starts: as in `NumericalTask`. Default: the paper's y = 2 pi / 3, with x = 1.
        ranges: as in `NumericalTask`. Default x in [-1.5, 1.5] and y in [-3, 3].
        seed: of the starts. Default 0.

    References:
        H. Shen, T. Chen. On Penalty-based Bilevel Gradient Descent Method. ICML 2023.
    """

    def __init__(
        self,
        starts: Starts = ((1.0, 2 * math.pi / 3),),
        ranges: Ranges = ((-1.5, 1.5), (-3.0, 3.0)),
        seed: int = 0,
    ) -> None:
        super().__init__(1, 1, starts, ranges, seed)

    @override
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return (torch.sin(y - 2 * math.pi / 3).square() + 0.5 * x.square()).squeeze(1)

    @override
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return (y.square() + 2 * torch.sin(y).square()).squeeze(1)

    @override
    def lower_solutions(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)[None]

    @override
    def solutions(self) -> tuple[Tensor, Tensor]:
        zero = torch.zeros(1, 1, dtype=torch.float64)
        return zero, zero
