"""Finite sums of quadratics at both levels, with everything known in closed form."""

import math
from typing import NamedTuple

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.task import BilevelTask


class _Sum(NamedTuple):
    """The mean of a level's samples: y'Ay / 2 + x'Bx / 2 + x'Cy + a'y + b'x."""

    A: Tensor
    B: Tensor
    C: Tensor
    a: Tensor
    b: Tensor

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the mean at (x, y)."""
        value: Tensor = 0.5 * y @ self.A @ y + 0.5 * x @ self.B @ x + x @ self.C @ y + self.a @ y + self.b @ x
        return value


class QuadraticSum(BilevelTask):
    r"""The quadratic on which stochastic bilevel methods are compared: finite sums at both levels, with a closed form.

    Both f and g are means over samples of

        y^T A_i y / 2 + x^T B_i x / 2 + x^T C_i y + a_i^T y + b_i^T x,

    with other samples for f than for g. A_i = s_i s_i^T, B_i = t_i t_i^T and C_i = u_i w_i^T have rank one; the
    eigenvalues of the mean of A_i are exactly ``upper_dim`` numbers of [mu, L], equally spaced logarithmically, those
    of B_i alike, and the singular values of the mean of C_i lie alike in [min(mu, cross), cross]. The entries of a_i
    and b_i, and those of x and y at the beginning, are standard normal.

    The samples are drawn as the benchmark does, but whitened, so that the spectra hold for the finite sums and not only
    for their expectations. Its B_i have an eigenvalue zero; ours do not. Its test whether F is convex takes half of the
    mixed term of the Hessian; ours takes all of it.

    Batches are ``(index,)`` at both levels, numbers of the samples (`SampleIndices`). The metrics
    are ``value_gap``, F(x) - F*; ``gradient_squared``, |F'(x)|^2; and ``lower_distance``, |y - y*(x)|^2, with
    F(x) = f(x, y*(x)), from the closed form in float64. They are for reporting only: no loss and no step reads it.

    Args:
        lower_samples: terms of g. Default 32768.
        upper_samples: terms of f. Default 1024.
        lower_dim: entries of y. Default 100.
        upper_dim: entries of x. Default 10. These four, and mu, L and cross, are the benchmark's setting.
        mu: least eigenvalue. Default 0.1.
        smoothness: greatest eigenvalue L. Default 1.
        cross: greatest singular value of the mean of C_i. Default 0.1.
        seed: of the samples and of the start. Default 0.

    Raises:
        BilevelError: if a setting is impossible, F is not strongly convex, or the data have other numbers of samples.

    References:
        M. Dagreou, P. Ablin, S. Vaiter, T. Moreau. A Framework for Bilevel Optimization That Enables Stochastic and
        Global Variance Reduction Algorithms. NeurIPS 2022; the quadratic is that of their benchmark_bilevel.
    """

    def __init__(
        self,
        lower_samples: int = 32768,
        upper_samples: int = 1024,
        lower_dim: int = 100,
        upper_dim: int = 10,
        mu: float = 0.1,
        smoothness: float = 1.0,
        cross: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        positive("QuadraticSum.mu", mu)
        positive("QuadraticSum.cross", cross)
        positive("QuadraticSum.lower_dim", lower_dim)
        positive("QuadraticSum.upper_dim", upper_dim)
        if smoothness < mu:
            raise BilevelError(f"QuadraticSum.smoothness={smoothness} is less than mu={mu}; raise it.")
        if min(lower_samples, upper_samples) < max(lower_dim, upper_dim):
            raise BilevelError(
                f"QuadraticSum.lower_samples={lower_samples} and upper_samples={upper_samples} must be at least the "
                f"dimensions, {lower_dim} and {upper_dim}: fewer terms of rank one have a singular mean."
            )
        generator = torch.Generator().manual_seed(seed)
        draw = _Draw(lower_dim, upper_dim, (mu, smoothness), cross, generator)
        self.samples = (lower_samples, upper_samples)
        self._sums: dict[str, _Sum] = {}
        for level, samples in (("lower", lower_samples), ("upper", upper_samples)):
            for name, rows in zip("yx", draw.level(samples), strict=True):
                self.register_buffer(f"{level}_{name}", rows.to(torch.get_default_dtype()), persistent=False)
        start = [torch.randn(d, generator=generator, dtype=torch.float64) for d in (upper_dim, lower_dim)]
        self.upper: nn.ParameterDict = nn.ParameterDict({"x": start[0].to(torch.get_default_dtype())})
        self.lower: nn.ParameterDict = nn.ParameterDict({"y": start[1].to(torch.get_default_dtype())})
        least = float(torch.linalg.eigvalsh(self.hessian()).min())
        if least <= 0:
            raise BilevelError(
                f"QuadraticSum: the Hessian of F has the eigenvalue {least:.3g}; lower cross, raise mu, or take "
                "another seed."
            )

    @override
    def upper_loss(self, batch: tuple[Tensor]) -> Tensor:
        return self._mean("upper", batch[0])

    @override
    def lower_loss(self, batch: tuple[Tensor]) -> Tensor:
        return self._mean("lower", batch[0])

    def _mean(self, level: str, index: Tensor) -> Tensor:
        rows = [getattr(self, f"{level}_{name}") for name in "yx"]
        if len(index) != len(rows[0]) or not torch.equal(index, torch.arange(len(index), device=index.device)):
            rows = [t[index] for t in rows]  # all samples need no copy
        (s, w, a), (t, u, b) = (rows[0] @ self.lower["y"]).T, (rows[1] @ self.upper["x"]).T
        mean: Tensor = (0.5 * s.square() + 0.5 * t.square() + u * w + a + b).mean()
        return mean

    # The closed form.

    def sums(self) -> tuple[_Sum, _Sum]:
        """Returns the means over the samples of g and of f, in float64."""
        if not self._sums:
            for level in ("lower", "upper"):
                (s, w, a), (t, u, b) = (getattr(self, f"{level}_{name}").double().unbind(1) for name in "yx")
                n = len(a)
                self._sums[level] = _Sum(s.T @ s / n, t.T @ t / n, u.T @ w / n, a.mean(0), b.mean(0))
        device = self.upper["x"].device
        lower, upper = (_Sum(*(t.to(device) for t in self._sums[level])) for level in ("lower", "upper"))
        return lower, upper

    def lower_solution(self, x: Tensor) -> Tensor:
        """Returns y*(x) = -A^{-1} (C^T x + a)."""
        g, _ = self.sums()
        y: Tensor = torch.linalg.solve(g.A, -(x @ g.C) - g.a)
        return y

    def value(self, x: Tensor) -> Tensor:
        """Returns F(x) = f(x, y*(x))."""
        return self.sums()[1].value(x, self.lower_solution(x))

    def gradient(self, x: Tensor) -> Tensor:
        """Returns F'(x) = f_x - C A^{-1} f_y at (x, y*(x))."""
        (g, f), y = self.sums(), self.lower_solution(x)
        gradient: Tensor = f.B @ x + f.C @ y + f.b - g.C @ torch.linalg.solve(g.A, f.A @ y + x @ f.C + f.a)
        return gradient

    def hessian(self) -> Tensor:
        """Returns F'' = B + C J + (C J)^T + J^T A J of f's sums, with J = dy*/dx = -A^{-1} C^T of g's."""
        g, f = self.sums()
        J: Tensor = -torch.linalg.solve(g.A, g.C.T)  # noqa: N806
        mixed = f.C @ J
        return f.B + mixed + mixed.T + J.T @ f.A @ J

    def solution(self) -> Tensor:
        """Returns x*, the minimiser of F."""
        at_zero = self.gradient(torch.zeros_like(self.upper["x"], dtype=torch.float64))
        x: Tensor = torch.linalg.solve(self.hessian(), -at_zero)
        return x

    @override
    @torch.no_grad()
    def metrics(self, batch: object) -> dict[str, Tensor]:
        x, y = self.upper["x"].double(), self.lower["y"].double()
        return {
            "value_gap": self.value(x) - self.value(self.solution()),
            "gradient_squared": self.gradient(x).square().sum(),
            "lower_distance": (y - self.lower_solution(x)).square().sum(),
        }

    @override
    def check_data(self, datamodule: LightningDataModule) -> None:
        levels = datamodule.levels()  # type: ignore[attr-defined]
        found = tuple(len(level[0]) for level in levels)
        wanted = self.samples
        if found != wanted:
            raise BilevelError(
                f"The task has {wanted[0]} lower and {wanted[1]} upper samples, and the data {found[0]} and "
                f"{found[1]}: set data.lower_samples and data.upper_samples to the task's."
            )


class _Draw:
    """Draws the samples of a level as s, w, a, stacked to ``(n, 3, lower_dim)``, and t, u, b, ``(n, 3, upper_dim)``."""

    def __init__(
        self, lower: int, upper: int, spectrum: tuple[float, float], cross: float, generator: torch.Generator
    ) -> None:
        self.lower, self.upper, self.spectrum, self.cross = lower, upper, spectrum, cross
        self.generator = generator

    def level(self, n: int) -> tuple[Tensor, Tensor]:
        """Returns n samples."""
        s, t = (self._white(n, d) @ self._root(d) for d in (self.lower, self.upper))
        k = min(self.lower, self.upper)
        z = self._white(n, k)
        singular = self._between(min(self.spectrum[0], self.cross), self.cross, k)
        w = z @ self._orthogonal(self.lower, self.lower)[:k]
        u = (z * singular) @ self._orthogonal(self.upper, self.upper)[:k]
        a, b = self._normal(n, self.lower), self._normal(n, self.upper)
        return torch.stack([s, w, a], 1), torch.stack([t, u, b], 1)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def _white(self, n: int, d: int) -> Tensor:
        """Returns n vectors whose second moment is the identity, exactly."""
        return math.sqrt(n) * self._orthogonal(n, d)

    def _orthogonal(self, n: int, d: int) -> Tensor:
        columns: Tensor = torch.linalg.qr(self._normal(n, d))[0]
        return columns

    def _between(self, low: float, high: float, d: int) -> Tensor:
        return torch.logspace(math.log10(low), math.log10(high), d, dtype=torch.float64)

    def _root(self, d: int) -> Tensor:
        """A square root of a matrix with the spectrum and random eigenvectors."""
        vectors = self._orthogonal(d, d)
        return vectors * self._between(*self.spectrum, d).sqrt() @ vectors.T
