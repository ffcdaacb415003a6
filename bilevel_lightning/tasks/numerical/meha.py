"""The smooth examples of MEHA, from strongly convex to nonconvex lower levels, and that of BDA."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.errors import positive
from bilevel_lightning.tasks.numerical.base import NumericalTask, Ranges, Starts
from bilevel_lightning.tree import Params


class StronglyConvex(NumericalTask):
    r"""A lower level with the Hessian I.

    Upper: f(x, y) = |x - e|^2 / 2 + |y|^2 / 2, e being the vector of ones.
    Lower: g(x, y) = |y|^2 / 2 - x^T y.

    y*(x) = x, F(x) = |x - e|^2 / 2 + |x|^2 / 2, and the solution is x* = y* = e / 2 with F* = n / 4.

    Args:
        n: number of entries of x and of y. Default 100, the paper's.
        starts: as in `NumericalTask`. Default: all entries of x and of y are 2.
        ranges: as in `NumericalTask`. Default [-3, 3] for both.
        seed: of the starts. Default 0.

    References:
        R. Liu, Z. Liu, W. Yao, S. Zeng, J. Zhang. Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-Loop
        and Hessian-Free Solution Strategy. ICML 2024, problem (77).
    """

    def __init__(
        self,
        n: int = 100,
        starts: Starts = ((2.0, 2.0),),
        ranges: Ranges = ((-3.0, 3.0), (-3.0, 3.0)),
        seed: int = 0,
    ) -> None:
        positive("StronglyConvex.n", n)
        super().__init__(n, n, starts, ranges, seed)

    @override
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x - 1).square().sum(1) + 0.5 * y.square().sum(1)

    @override
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return (0.5 * y.square() - x * y).sum(1)

    @override
    def lower_solutions(self, x: Tensor) -> Tensor:
        return x[None]

    @override
    def solutions(self) -> tuple[Tensor, Tensor]:
        half = torch.full((1, self.upper["x"].shape[1]), 0.5, dtype=torch.float64)
        return half, half


class MerelyConvex(NumericalTask):
    r"""A convex lower level that leaves half of y free.

    Upper: f(x, y) = |x - y_2|^2 / 2 + |y_1 - e|^2 / 2, with y = (y_1, y_2) in R^{2n} and e the vector of ones.
    Lower: g(x, y) = |y_1|^2 / 2 - x^T y_1.

    Every y_2 is optimal: g_yy is singular, and implicit differentiation is not defined. The solution is x* = y_1* =
    y_2* = e with F* = 0; F(x) = |x - e|^2 / 2, at y_2 = x. Methods that never move y_2 end at (e + y_2) / 2.

    Args:
        n: number of entries of x; y has 2n. Default 10, that of the released code.
        starts: as in `NumericalTask`. Default: all entries of x and of y are 0.01, as in the released code.
        ranges: as in `NumericalTask`. Default [-3, 3] for both.
        seed: of the starts. Default 0.

    References:
        R. Liu, Z. Liu, W. Yao, S. Zeng, J. Zhang. Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-Loop
        and Hessian-Free Solution Strategy. ICML 2024, problem (18).
    """

    def __init__(
        self,
        n: int = 10,
        starts: Starts = ((0.01, 0.01),),
        ranges: Ranges = ((-3.0, 3.0), (-3.0, 3.0)),
        seed: int = 0,
    ) -> None:
        positive(f"{type(self).__name__}.n", n)
        super().__init__(n, 2 * n, starts, ranges, seed)

    @override
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, dim=1)
        return 0.5 * (x - y2).square().sum(1) + 0.5 * (y1 - 1).square().sum(1)

    @override
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        y1, _ = y.chunk(2, dim=1)
        return (0.5 * y1.square() - x * y1).sum(1)

    @override
    def lower_solutions(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)[None]

    @override
    def solutions(self) -> tuple[Tensor, Tensor]:
        n = self.upper["x"].shape[1]
        return torch.ones(1, n, dtype=torch.float64), torch.ones(1, 2 * n, dtype=torch.float64)


class BDACounterExample(MerelyConvex):
    r"""The counter-example of BDA: `MerelyConvex` with n = 1 and x in [-100, 100].

    min (x - y_2)^2 / 2 + (y_1 - 1)^2 / 2  s.t.  y in argmin y_1^2 / 2 - x y_1. Methods that take the lower solution for
    unique never move y_2 and end at x = (1 + y_2) / 2, where the solution is x = 1.

    Args:
        starts: as in `NumericalTask`. Default: x = 0, y = (0, 0), our choice.
        ranges: as in `NumericalTask`. Default [-3, 3] for both.
        seed: of the starts. Default 0.

    References:
        R. Liu, P. Mu, X. Yuan, S. Zeng, J. Zhang. A Generic First-Order Algorithmic Framework for Bi-Level Programming
        Beyond Lower-Level Singleton. ICML 2020.
    """

    def __init__(
        self, starts: Starts = ((0.0, 0.0),), ranges: Ranges = ((-3.0, 3.0), (-3.0, 3.0)), seed: int = 0
    ) -> None:
        super().__init__(1, starts, ranges, seed)

    @override
    def project_upper(self, upper: Params) -> Params:
        return {"x": upper["x"].clamp(-100, 100)}


class SineSum(NumericalTask):
    r"""A nonconvex lower level with infinitely many minimisers; MEHA's nonconvex example.

    Upper: f(x, y) = (x - a)^2 + |y - a e - c|^2, with one x, y in R^n, and e the vector of ones.
    Lower: g(x, y) = sum_i sin(x + y_i - c_i), where all c_i equal c.

    The lower solutions are y_i = C_k + c - x with C_k = -pi/2 + 2 pi k. With C the C_k nearest to 2a the solution is
    x* = ((1 - n) a + n C) / (1 + n), y_i* = C + c - x*, and F* = n (C - 2a)^2 / (1 + n): for a = c = 2 and n = 1
    x* = 3 pi / 4. f alone is least, zero, at (a, a e + c), which is no lower solution: a result near 0 means that the
    lower level was ignored.

    Args:
        n: number of entries of y. Default 1.
        a: default 2, the paper's.
        c: default 2, the paper's.
        starts: as in `NumericalTask`. Default: the paper's x = -6, y = 0.
        ranges: as in `NumericalTask`. Default x in [-6, 6] and y in [-1, 11].
        seed: of the starts. Default 0.

    References:
        R. Liu, Z. Liu, W. Yao, S. Zeng, J. Zhang. Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-Loop
        and Hessian-Free Solution Strategy. ICML 2024, problem (19).
    """

    def __init__(
        self,
        n: int = 1,
        a: float = 2.0,
        c: float = 2.0,
        starts: Starts = ((-6.0, 0.0),),
        ranges: Ranges = ((-6.0, 6.0), (-1.0, 11.0)),
        seed: int = 0,
    ) -> None:
        positive("SineSum.n", n)
        super().__init__(1, n, starts, ranges, seed)
        self.a, self.c = a, c

    @override
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - self.a).square().squeeze(1) + (y - self.a - self.c).square().sum(1)

    @override
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.sin(x + y - self.c).sum(1)

    @override
    def lower_solutions(self, x: Tensor) -> Tensor:
        """Those with equal entries, on the five branches around the one with the least f."""
        nearest = torch.round((x + self.a + math.pi / 2) / (2 * math.pi))
        branches = torch.stack([2 * math.pi * (nearest + k) - math.pi / 2 for k in range(-2, 3)])
        return (branches + self.c - x).expand(-1, -1, self.lower["y"].shape[1])

    @override
    def solutions(self) -> tuple[Tensor, Tensor]:
        n, a = self.lower["y"].shape[1], self.a
        nearest = 2 * math.pi * round((2 * a + math.pi / 2) / (2 * math.pi)) - math.pi / 2
        x = ((1 - n) * a + n * nearest) / (1 + n)
        return (
            torch.full((1, 1), x, dtype=torch.float64),
            torch.full((1, n), nearest + self.c - x, dtype=torch.float64),
        )
