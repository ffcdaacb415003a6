"""The example of IAPTT-GM: a lower level with several minimisers."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.tasks.numerical.base import NumericalTask, Ranges, Starts
from bilevel_lightning.tree import Params


class SinProblem(NumericalTask):
    r"""A lower level with up to six minimisers, of which the upper level wants the least.

    Upper: f(x, y) = x + x y, with x in [1, 10].
    Lower: g(x, y) = -sin(x y), with y in [-2, 2].

    The lower solutions are y = (pi/2 + 2 pi k) / x as far as they lie in [-2, 2], so that F(x) = x + the least such
    x y: it rises with slope 1 and falls by 2 pi wherever a lesser minimiser appears. The solution is (11 pi / 4, -2)
    with F* = -11 pi / 4; x = 1, 3 pi / 4 and 7 pi / 4 are local ones.

    Args:
        starts: as in `NumericalTask`. Default: the paper's (1, 2).
        ranges: as in `NumericalTask`. Default: the feasible set.
        seed: of the starts. Default 0.

    References:
        R. Liu, Y. Liu, S. Zeng, J. Zhang. Towards Gradient-based Bilevel Optimization with Non-convex Followers and
        Beyond. NeurIPS 2021.
    """

    def __init__(
        self, starts: Starts = ((1.0, 2.0),), ranges: Ranges = ((1.0, 10.0), (-2.0, 2.0)), seed: int = 0
    ) -> None:
        super().__init__(1, 1, starts, ranges, seed)

    @override
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + x * y).squeeze(1)

    @override
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return -torch.sin(x * y).squeeze(1)

    @override
    def project_upper(self, upper: Params) -> Params:
        return {"x": upper["x"].clamp(1, 10)}

    @override
    def project_lower(self, upper: Params, lower: Params) -> Params:
        return {"y": lower["y"].clamp(-2, 2)}

    @override
    def lower_solutions(self, x: Tensor) -> Tensor:
        y = torch.stack([(math.pi / 2 + 2 * math.pi * k) / x for k in range(-3, 3)])
        return y.where(y.abs() <= 2, torch.nan)

    @override
    def solutions(self) -> tuple[Tensor, Tensor]:
        return (
            torch.full((1, 1), 11 * math.pi / 4, dtype=torch.float64),
            torch.full((1, 1), -2.0, dtype=torch.float64),
        )
