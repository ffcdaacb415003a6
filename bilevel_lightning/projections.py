r"""Constraint sets and proximal maps for either level, as small typed values: ``projection(point)``.

A projection returns the nearest point of a convex set C, ``P(p) = argmin_{q in C} |q - p|^2``. A task applies one in
`project_upper`, `project_lower` or `prox_lower`; to all tensors by ``{name: ball(t) for name, t in y.items()}``.
Each works on one tensor of any device and floating type, does not change it, returns a point of the set as it is, and
can be differentiated wherever the map can, so that lower steps with a projection are unrolled like others.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive

Bound: TypeAlias = float | Tensor | None
ORDERS = {"l2": 2.0, "l1": 1.0, "linf": float("inf")}


class Projection(ABC):
    """The Euclidean projection on a closed convex set."""

    @abstractmethod
    def __call__(self, point: Tensor) -> Tensor:
        """Returns the nearest point of the set, of the shape and type of ``point``."""


class Box(Projection):
    """``{q : low <= q <= high}``, entry by entry.

    Args:
        low: a number, or a tensor that broadcasts to the point (derivatives reach it); None (default): no bound.
        high: likewise.

    Raises:
        BilevelError: if there is no bound, or ``low <= high`` does not hold everywhere.
    """

    def __init__(self, low: Bound = None, high: Bound = None) -> None:
        if low is None and high is None:
            raise BilevelError("Box needs low, high, or both.")
        _ordered("Box", low, high)
        self.low, self.high = low, high

    @override
    def __call__(self, point: Tensor) -> Tensor:
        return point.clamp(_spread(self.low, point, -float("inf")), _spread(self.high, point, float("inf")))


class Ball(Projection):
    r"""``{q : |q| <= radius}``, around 0.

    The projection is ``radius p / |p|`` for l2, `soft_threshold` for l1, with the threshold that brings the norm down
    to the radius, and a box for linf.

    Args:
        radius: largest norm, at least 0.
        norm: ``l2`` (default), ``l1`` or ``linf``.
        dims: number of trailing dimensions that the norm runs over; the leading ones count points, each projected by
            itself. 1 takes the rows of a matrix, such as one perturbation a sample. None (default): the whole tensor.

    Raises:
        BilevelError: if a setting is out of its range; when called, if the tensor has fewer than ``dims`` dimensions.

    References:
        J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra. Efficient Projections onto the l1-Ball for Learning in High
        Dimensions. ICML 2008.
    """

    def __init__(self, radius: float, norm: Literal["l2", "l1", "linf"] = "l2", dims: int | None = None) -> None:
        name = type(self).__name__
        self.radius = _not_negative(f"{name}.radius", radius)
        if norm not in ORDERS:
            raise BilevelError(f"{name}.norm must be one of {', '.join(ORDERS)}, got {norm}.")
        if dims is not None:
            positive(f"{name}.dims", dims)
        self.norm, self.dims = norm, dims

    @override
    def __call__(self, point: Tensor) -> Tensor:
        rows = self._rows(point)
        outside = self._size(rows) > self.radius
        if self.norm == "l2":
            moved = rows * (self.radius / self._size(torch.where(outside, rows, 1.0)))
        elif self.norm == "l1":
            zero, infinity = torch.zeros_like(rows), torch.full_like(rows, float("inf"))
            moved = soft_threshold(rows, -_level(torch.ones_like(rows), rows.abs(), zero, infinity, self.radius))
        else:
            moved = rows.clamp(-self.radius, self.radius)
        return torch.where(outside, moved, rows).reshape(point.shape)

    def _rows(self, point: Tensor) -> Tensor:
        """Returns the points as rows: the dimensions of the norm made one."""
        dims = point.ndim if self.dims is None else self.dims
        if dims > point.ndim:
            raise BilevelError(f"{type(self).__name__}.dims is {dims}, but the tensor has {point.ndim} dimensions.")
        return point.flatten(point.ndim - dims)

    def _size(self, rows: Tensor) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(rows, ORDERS[self.norm], -1, keepdim=True)
        return size


class BallInBox(Ball):
    r"""The intersection of a ball around 0 and a box: ``{q : |q| <= radius, low <= q <= high}``.

    This is the nearest point of both, not one projection after the other. Where the box alone gives a point outside
    of the ball, it is ``clamp(s p, low, high)`` for l2 and ``clamp(soft_threshold(p, t), low, high)`` for l1, with the
    multiplier s or t at which the norm is the radius. It is found exactly, from the sorted points at which an entry
    reaches a bound; linf is a smaller box. Derivatives reach bounds that are tensors.

    The example keeps images with perturbations ``delta`` (N, 784) in [0, 1]::

        BallInBox(5.0, dims=1)(delta, low=-images, high=1 - images)

    Args:
        radius: as `Ball`.
        norm: as `Ball`.
        dims: as `Ball`.
        low: a number, or a tensor that broadcasts to the point; None (default): no bound.
        high: likewise.

    Raises:
        BilevelError: if a setting is out of its range, or ``low <= high`` does not hold everywhere; when called, if
            the ball does not meet the box. A box that contains 0 always does; of others, and of tensors handed to the
            call, the values are read then, which `compile` cannot record.

    References:
        K. C. Kiwiel. Breakpoint Searching Algorithms for the Continuous Quadratic Knapsack Problem. Mathematical
        Programming, 2008.
    """

    def __init__(
        self,
        radius: float,
        norm: Literal["l2", "l1", "linf"] = "l2",
        dims: int | None = None,
        low: Bound = None,
        high: Bound = None,
    ) -> None:
        super().__init__(radius, norm, dims)
        self.meets = _ordered("BallInBox", low, high)
        self.low, self.high = low, high

    @override
    def __call__(self, point: Tensor, low: Bound = None, high: Bound = None) -> Tensor:
        """Returns the nearest point of the set; ``low`` and ``high`` replace the bounds of the value."""
        given = low is not None or high is not None
        low, high = self.low if low is None else low, self.high if high is None else high
        meets = _ordered("BallInBox", low, high) if given else self.meets
        rows = self._rows(point)
        low, high = self._rows(_spread(low, point, -float("inf"))), self._rows(_spread(high, point, float("inf")))
        nearest = torch.zeros_like(rows).clamp(low, high)
        if not meets and bool((self._size(nearest) > self.radius * (1 + 16 * torch.finfo(rows.dtype).eps)).any()):
            raise BilevelError(
                "BallInBox: the ball does not meet the box; raise radius, or let low and high come to 0."
            )
        boxed = rows.clamp(low, high)
        least = nearest.abs()
        most = torch.maximum(torch.where(rows < 0, -low, high), least)
        if self.norm == "l2":
            squared = _level(rows.square(), torch.zeros_like(rows), least.square(), most.square(), self.radius**2)
            squared = squared.clamp(max=1.0)
            moved = rows * torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
        elif self.norm == "l1":
            moved = soft_threshold(rows, -_level(torch.ones_like(rows), rows.abs(), least, most, self.radius))
        else:
            moved = rows.clamp(-self.radius, self.radius)
        outside = self._size(boxed) > self.radius
        return torch.where(outside, moved.clamp(low, high), boxed).reshape(point.shape)


class Simplex(Projection):
    r"""``{q : q >= 0, sum_i q_i = total}`` over the last dimension: ``max(p + t, 0)`` with the t that gives the sum.

    Leading dimensions count points; for one simplex of all entries flatten the tensor. A point whose entries add up to
    ``total`` but for rounding moves by that rounding.

    Args:
        total: the sum, above 0. Default 1: probabilities.

    Raises:
        BilevelError: if ``total`` is not positive.

    References:
        M. Held, P. Wolfe, H. P. Crowder. Validation of Subgradient Optimization. Mathematical Programming, 1974.
    """

    def __init__(self, total: float = 1.0) -> None:
        self.total = positive("Simplex.total", total)

    @override
    def __call__(self, point: Tensor) -> Tensor:
        zero, infinity = torch.zeros_like(point), torch.full_like(point, float("inf"))
        return torch.relu(point + _level(torch.ones_like(point), point, zero, infinity, self.total))


class SpectralBall(Projection):
    r"""Matrices (..., m, n) with singular values of at most ``radius``; ``U S V^T`` becomes ``U min(S, r) V^T``.

    Its derivative is written with divided differences of min(s, r), so that equal singular values, which a matrix has
    after its first projection, do it no harm. A convolution's kernel is not its matrix.

    Args:
        radius: largest singular value, above 0.

    Raises:
        BilevelError: if ``radius`` is not positive; when called, if the tensor is no matrix.

    References:
        C. Ding, D. Sun, J. Sun, K.-C. Toh. Spectral Operators of Matrices. Mathematical Programming, 2018.
    """

    def __init__(self, radius: float) -> None:
        self.radius = positive("SpectralBall.radius", radius)

    @override
    def __call__(self, point: Tensor) -> Tensor:
        if point.ndim < 2:
            raise BilevelError(f"SpectralBall needs matrices, got a tensor with {point.ndim} dimensions.")
        projected: Tensor = _Spectral.apply(point, self.radius)
        return projected


class ConvolutionBall(Projection):
    r"""Kernels (outputs, inputs, height, width) whose convolution has an operator norm of at most ``radius``.

    On a torus a convolution of stride 1 is diagonal in blocks: its singular values are those of the outputs x inputs
    matrices of the kernel's Fourier coefficients, one matrix a frequency. A convolution of maps (H, W) that are padded
    with zeros to keep their size is part of the one on the torus ``(H + height // 2, W + width // 2)``, where what
    leaves one side meets zeros on the other, so that the norm there bounds its own. That on a smaller torus does not.

    The set is the intersection of a spectral ball, in the space of kernels as large as the torus, and of the subspace
    of small kernels. Its nearest point is found by Dykstra's alternating projections, which are gradient steps on the
    dual problem, with Nesterov's momentum, restarted where it leads upwards. A last scaling, by less than ``tol`` where
    ``steps`` suffice, makes the norm at most ``radius`` to rounding. No derivative is defined.

    Args:
        radius: largest operator norm, above 0.
        size: height and width of the torus.
        steps: largest number of alternating projections. Default 1000.
        tol: relative excess of the norm to stop at. Default 1e-3.

    Raises:
        BilevelError: if a setting is not positive; when called, if the tensor is no kernel that fits the torus.

    References:
        H. Sedghi, V. Gupta, P. M. Long. The Singular Values of Convolutional Layers. ICLR 2019.
        J. P. Boyle, R. L. Dykstra. A Method for Finding Projections onto the Intersection of Convex Sets in Hilbert
        Spaces. Lecture Notes in Statistics 37, 1986.
        B. O'Donoghue, E. Candes. Adaptive Restart for Accelerated Gradient Schemes. Foundations of Computational
        Mathematics, 2015.
    """

    def __init__(self, radius: float, size: tuple[int, int], steps: int = 1000, tol: float = 1e-3) -> None:
        self.ball = SpectralBall(positive("ConvolutionBall.radius", radius))
        self.size = tuple(int(positive("ConvolutionBall.size", n)) for n in size)
        self.steps, self.tol = int(positive("ConvolutionBall.steps", steps)), positive("ConvolutionBall.tol", tol)

    def norm(self, kernel: Tensor) -> Tensor:
        """Returns the operator norm of the kernel's convolution on the torus, a scalar."""
        found: Tensor = torch.linalg.svdvals(self._spectrum(kernel)).max()
        return found

    @torch.no_grad()
    @override
    def __call__(self, point: Tensor) -> Tensor:
        height, width = point.shape[-2:]
        if point.ndim != 4 or height > self.size[0] or width > self.size[1]:
            raise BilevelError(f"ConvolutionBall on {self.size} needs a kernel inside, got shape {tuple(point.shape)}.")
        radius, norm = self.ball.radius, self.norm(point)
        if norm <= radius * (1 + 16 * torch.finfo(point.dtype).eps):
            return point
        kernel, pace = point, 1.0
        dual = ahead = torch.zeros_like(self._spectrum(point))
        for _ in range(self.steps):
            spectrum = self._spectrum(point - self._small(ahead, height, width)) + ahead
            before, dual = dual, spectrum - self.ball(spectrum)
            kernel = point - self._small(dual, height, width)
            norm = self.norm(kernel)
            if norm <= radius * (1 + self.tol):
                break
            if ((ahead - dual) * (dual - before).conj()).real.sum() > 0:  # the momentum leads upwards
                pace, ahead = 1.0, dual
                continue
            pace, last = (1 + (1 + 4 * pace**2) ** 0.5) / 2, pace
            ahead = dual + (last - 1) / pace * (dual - before)
        scaled: Tensor = kernel * (radius / norm).clamp(max=1.0)
        return scaled

    def _small(self, spectrum: Tensor, height: int, width: int) -> Tensor:
        """Returns the nearest small kernel of Fourier coefficients: the adjoint of `_spectrum`, to a factor."""
        kernel: Tensor = torch.fft.irfft2(spectrum.permute(2, 3, 0, 1), self.size)[..., :height, :width]
        return kernel

    def _spectrum(self, kernel: Tensor) -> Tensor:
        """Returns the Fourier coefficients, matrices (frequencies, frequencies, outputs, inputs)."""
        spectrum: Tensor = torch.fft.rfft2(kernel, self.size).permute(2, 3, 0, 1)
        return spectrum


def soft_threshold(point: Tensor, threshold: float | Tensor) -> Tensor:
    r"""Proximal map of ``sum_i t_i |y_i|``: ``sign(p_i) max(|p_i| - t_i, 0)``.

    Args:
        point: p.
        threshold: t >= 0, a number or a tensor that broadcasts to p; 0 returns p. The sign of a tensor is not checked.

    Raises:
        BilevelError: if the threshold is a number and negative.

    References:
        N. Parikh, S. Boyd. Proximal Algorithms. Foundations and Trends in Optimization, 2014.
    """
    if not isinstance(threshold, Tensor):
        _not_negative("threshold", threshold)
    return torch.where(point.abs() >= threshold, point - threshold * point.sign(), 0.0)


def block_soft_threshold(point: Tensor, threshold: float | Tensor) -> Tensor:
    r"""Proximal map of ``sum_j t_j |y^(j)|_2`` (group lasso): ``max(1 - t_j / |p^(j)|_2, 0) p^(j)``.

    Args:
        point: p; the groups are its rows, along the last dimension.
        threshold: t >= 0, a number or a tensor that broadcasts to ``p.shape[:-1]``; 0 returns p. The sign of a tensor
            is not checked.

    Raises:
        BilevelError: if the threshold is a number and negative.

    References:
        N. Parikh, S. Boyd. Proximal Algorithms. Foundations and Trends in Optimization, 2014.
    """
    if isinstance(threshold, Tensor):
        threshold = threshold.unsqueeze(-1)
    else:
        _not_negative("threshold", threshold)
    size = torch.linalg.vector_norm(point, dim=-1, keepdim=True)
    factor = 1 - threshold / torch.linalg.vector_norm(torch.where(size > 0, point, 1.0), dim=-1, keepdim=True)
    return torch.where(size >= threshold, factor * point, 0.0)


def _level(slope: Tensor, offset: Tensor, low: Tensor, high: Tensor, total: float) -> Tensor:
    """Returns t with ``sum_i clamp(slope_i t + offset_i, low_i, high_i) = total``, row by row (..., n) -> (..., 1).

    The sum grows with t, in straight pieces between the knots at which an entry comes free of its bound ``low`` or
    comes to rest at ``high``. Bisection over the sorted knots finds the piece, and t on it is the quotient below, in
    which derivatives reach all entries; on a level piece it is the knot. Rows whose sum stays below ``total`` give a
    number without meaning.
    """
    with torch.no_grad():
        frees = torch.where(slope > 0, (low - offset) / slope, float("inf"))
        rests = torch.where(slope > 0, (high - offset) / slope, float("inf"))
        knots = torch.cat([frees, rests], -1).sort(-1).values
        last = knots.shape[-1] - 1
        index = torch.zeros_like(knots[..., :1], dtype=torch.long)
        for bit in reversed(range(last.bit_length())):
            trial = index + 2**bit
            t = knots.gather(-1, trial.clamp(max=last))
            below = (slope * t + offset).clamp(low, high).sum(-1, keepdim=True) <= total
            index = torch.where((trial <= last) & below, trial, index)
        t = knots.gather(-1, index)
        free, at_high = (frees <= t) & (t < rests), rests <= t
    bounded = torch.where(free, offset, torch.where(at_high, high, low)).sum(-1, keepdim=True)
    steep = torch.where(free, slope, 0.0).sum(-1, keepdim=True)
    level: Tensor = torch.where(steep > 0, (total - bounded) / torch.where(steep > 0, steep, 1.0), t)
    return level


class _Spectral(torch.autograd.Function):
    """(A, r) -> U min(S, r) V^T; its derivative, a symmetric map, is made anew in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(point: Tensor, radius: float) -> Tensor:
        u, s, vh = torch.linalg.svd(point, full_matrices=False)
        excess: Tensor = (u * (s - radius).clamp(min=0).unsqueeze(-2)) @ vh
        return point - excess

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        point, ctx.radius = inputs
        ctx.save_for_backward(point)

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (point,), (given,) = ctx.saved_tensors, cotangents
        u, s, vh = torch.linalg.svd(point, full_matrices=False)
        uh, v, cut = u.mT, vh.mT, s.clamp(max=ctx.radius)
        row, column, cut_row, cut_column = s.unsqueeze(-1), s.unsqueeze(-2), cut.unsqueeze(-1), cut.unsqueeze(-2)
        flat = (row <= ctx.radius).to(s)  # the derivative of min(s, r), for equal singular values
        same, zero = row == column, row + column == 0
        even = torch.where(same, flat, (cut_row - cut_column) / torch.where(same, 1.0, row - column))
        odd = torch.where(zero, 1.0, (cut_row + cut_column) / torch.where(zero, 1.0, row + column))
        inner = uh @ given @ v
        inner = (even * (inner + inner.mT) + odd * (inner - inner.mT)) / 2
        # what lies outside of the columns of U or V meets singular values that are zero
        ratio = torch.where(s > 0, cut / torch.where(s > 0, s, 1.0), 1.0)
        left, right = given @ v, uh @ given
        outer = ((left - u @ (uh @ left)) * ratio.unsqueeze(-2)) @ vh
        outer = outer + u @ (ratio.unsqueeze(-1) * (right - (right @ v) @ vh))
        return u @ inner @ vh + outer, None


def _not_negative(name: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise BilevelError(f"{name} must not be negative, got {value}.")
    return value


def _ordered(name: str, low: Bound, high: Bound) -> bool:
    """Raises unless ``low <= high``; returns whether 0 lies between them everywhere."""
    lower, upper = -float("inf") if low is None else low, float("inf") if high is None else high
    if not _all(lower <= upper):
        raise BilevelError(f"{name}: low must not be above high in any entry, and neither may be NaN.")
    return _all(lower <= 0) and _all(upper >= 0)


def _all(condition: bool | Tensor) -> bool:
    return bool(condition.all()) if isinstance(condition, Tensor) else condition


def _spread(bound: Bound, point: Tensor, missing: float) -> Tensor:
    """Returns the bound of every entry of ``point``."""
    if isinstance(bound, Tensor):
        return bound.to(point).expand_as(point)
    return point.new_full((), missing if bound is None else bound).expand_as(point)
