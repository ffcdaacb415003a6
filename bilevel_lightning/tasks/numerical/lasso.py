"""The examples of MEHA with a nonsmooth lower level: lasso and group lasso, with a penalty weight each."""

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.errors import BilevelError
from bilevel_lightning.projections import block_soft_threshold, soft_threshold
from bilevel_lightning.tasks.numerical.base import NumericalTask, Ranges, Starts
from bilevel_lightning.tree import Params


class Lasso(NumericalTask):
    r"""A penalty weight for each entry of a lasso.

    Upper: f(x, y) = sum_i y_i, with x in [0, 1]^n.
    Lower: g(x, y) = |y - v|^2 / 2, and the nonsmooth term sum_i x_i |y_i|, with v_i = 1/n in the first half and -1/n in
    the second.

    y*(x) is v soft-thresholded by x, and the solutions are x_i in [1/n, 1] and y_i = 0 in the first half, x_i = 0 and
    y_i = -1/n in the second, with F* = -1/2. Errors of x are measured to the nearest of them.

    Args:
        n: number of entries, even. Default 1000, that of the released code.
        starts: as in `NumericalTask`. Default: all entries of x and of y are 1, as in the released code.
        ranges: as in `NumericalTask`. Default x in [0, 1] and y in [-1, 1].
        seed: of the starts. Default 0.

    Raises:
        BilevelError: if n is not even.

    References:
        R. Liu, Z. Liu, W. Yao, S. Zeng, J. Zhang. Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-Loop
        and Hessian-Free Solution Strategy. ICML 2024, problem (20).
    """

    sign: Tensor

    def __init__(
        self,
        n: int = 1000,
        starts: Starts = ((1.0, 1.0),),
        ranges: Ranges = ((0.0, 1.0), (-1.0, 1.0)),
        seed: int = 0,
    ) -> None:
        if n < 2 or n % 2:
            raise BilevelError(f"Lasso.n must be even and at least 2, got {n}.")
        super().__init__(n, n, starts, ranges, seed)
        # n v: exact in every precision, also when a module made in float32 becomes double
        self.register_buffer("sign", torch.ones(n).index_fill(0, torch.arange(n // 2, n), -1.0), persistent=False)

    @override
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return y.sum(1)

    @override
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y - self.sign / len(self.sign)).square().sum(1)

    @override
    def nonsmooth_lower(self, upper: Params, lower: Params) -> Tensor:
        return (upper["x"] * lower["y"].abs()).sum()

    @override
    def prox_lower(self, upper: Params, lower: Params, step: float | Tensor) -> Params:
        return {"y": soft_threshold(lower["y"], step * upper["x"])}

    @override
    def project_upper(self, upper: Params) -> Params:
        return {"x": upper["x"].clamp(0, 1)}

    @override
    def lower_solutions(self, x: Tensor) -> Tensor:
        return soft_threshold((self.sign.to(x) / len(self.sign)).expand_as(x), x)[None]

    @override
    def solutions(self) -> tuple[Tensor, Tensor]:
        """Returns the solution with the least x, that of the paper; `errors` know the others."""
        sign = self.sign.to("cpu", torch.float64)[None] / len(self.sign)
        return sign.clamp(min=0), sign.clamp(max=0)

    @override
    def nearest_solution(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        least, y_star = (t.to(x).expand_as(x) for t in self.solutions())
        return torch.where(least > 0, x.clamp(least, torch.ones_like(x)), least), y_star


class GroupLasso(NumericalTask):
    r"""A penalty weight for each group of features, chosen on validation data.

    Upper: f(x, y) = |b - A y|^2 / (2 N) on the validation data, with x >= 0.
    Lower: g(x, y) = |b - A y|^2 / (2 N) on the training data, and the nonsmooth term sum_j x_j |y^(j)|_2.

    Data: N = 100 samples each for training, validation and test, drawn together. The entries of A are standard normal,
    b = A beta + noise, beta consists of three equal parts (1, 2, 3, 4, 5, 0, ..., 0), and the normal noise is scaled so
    that |A beta| = 2 |noise| (SNR 2). The groups are equal blocks of neighbouring features. The paper's description
    leaves beta, and what SNR means, open; these are common choices for sparse group lasso. It writes sums over the
    samples: means divide x by N and change nothing else, and only with them is the paper's step size 0.05 below 2 / L
    (L = 1190 for sums and 12 for means where m = 600).

    No solution is known. The metrics are the mean squared errors ``validation_error`` and ``test_error``, means over
    the starts. Knowing beta leaves the variance of the noise, 41 in expectation; y = 0 has 206.

    Args:
        m: number of features, a multiple of 3 and of ``groups``, at least 15. Default 600, the paper's smallest.
        groups: number of groups. Default 30.
        samples: number N of samples of each part. Default 100.
        starts: as in `NumericalTask`. Default x = 1 and y = 0, our choice.
        ranges: as in `NumericalTask`. Default x in [0, 2] and y in [-0.1, 0.1].
        seed: of the data and of the starts. Default 0.

    Raises:
        BilevelError: if m is no such multiple.

    References:
        R. Liu, Z. Liu, W. Yao, S. Zeng, J. Zhang. Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-Loop
        and Hessian-Free Solution Strategy. ICML 2024, problem (21).
        J. Feng, N. Simon. Gradient-based Regularization Parameter Selection for Problems with Nonsmooth Penalty
        Functions. Journal of Computational and Graphical Statistics, 2018.
    """

    features: Tensor
    responses: Tensor
    coefficients: Tensor

    def __init__(
        self,
        m: int = 600,
        groups: int = 30,
        samples: int = 100,
        starts: Starts = ((1.0, 0.0),),
        ranges: Ranges = ((0.0, 2.0), (-0.1, 0.1)),
        seed: int = 0,
    ) -> None:
        if groups < 1 or samples < 1 or m < 15 or m % 3 or m % groups:
            raise BilevelError(
                f"GroupLasso.m={m} must be a multiple of 3 and of GroupLasso.groups={groups}, at least 15, with at "
                f"least one group and one sample (GroupLasso.samples={samples})."
            )
        super().__init__(groups, m, starts, ranges, seed)
        self.groups = groups
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(3, samples, m, dtype=torch.float64, generator=generator)
        coefficients = torch.zeros(3, m // 3, dtype=torch.float64)
        coefficients[:, :5] = torch.arange(1, 6)
        signal = features @ coefficients.flatten()
        noise = torch.randn(3, samples, dtype=torch.float64, generator=generator)
        responses = signal + noise * (signal.norm() / (2 * noise.norm()))
        data = {"features": features, "responses": responses, "coefficients": coefficients.flatten()}
        for name, value in data.items():
            self.register_buffer(name, value.to(torch.get_default_dtype()), persistent=False)

    def squared_error(self, y: Tensor, part: int) -> Tensor:
        """Returns the mean squared error on part 0 (training), 1 (validation) or 2 (test), shape ``(starts,)``."""
        return (self.responses[part] - y @ self.features[part].T).square().mean(1)

    def blocks(self, y: Tensor) -> Tensor:
        """Returns y by groups, shape ``(starts, groups, m / groups)``."""
        return y.reshape(len(y), self.groups, -1)

    @override
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * self.squared_error(y, 1)

    @override
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * self.squared_error(y, 0)

    @override
    def nonsmooth_lower(self, upper: Params, lower: Params) -> Tensor:
        sizes: Tensor = torch.linalg.vector_norm(self.blocks(lower["y"]), dim=2)
        return (upper["x"] * sizes).sum()

    @override
    def prox_lower(self, upper: Params, lower: Params, step: float | Tensor) -> Params:
        return {"y": block_soft_threshold(self.blocks(lower["y"]), step * upper["x"]).flatten(1)}

    @override
    def project_upper(self, upper: Params) -> Params:
        return {"x": upper["x"].clamp(min=0)}

    @override
    @torch.no_grad()
    def metrics(self, batch: object) -> dict[str, Tensor]:
        y = self.lower["y"]
        return {name: self.squared_error(y, i).mean() for i, name in ((1, "validation_error"), (2, "test_error"))}
