"""What a linear solver is given, what it returns, and what all of them share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch

from bilevel_lightning import tree
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.tree import Params


class System(NamedTuple):
    """A linear system by its products.

    Attributes:
        product: (v, j) -> A v; a stochastic A takes its j-th sample, j = 0, 1, ....
        rhs: b.
        transpose: w -> A^T w; None: A is symmetric.
        step: a step size with which ``v - step A v`` contracts; None: unknown.
        agree: makes random numbers equal on all processes.
        sampled: whether the products j take different samples, so that the residual is one of a sample.
    """

    product: Callable[[Params, int], Params]
    rhs: Params
    transpose: Callable[[Params], Params] | None = None
    step: float | None = None
    agree: Callable[[Params], Params] = lambda values: values
    sampled: bool = False


class Solution(NamedTuple):
    """What a solver found.

    Attributes:
        v: the last iterate, or the solution.
        residual: ``|b - (A + damping I) v| / |b|`` at the last product with an iterate: for the solvers that step
            along the residual (Neumann, fixed point, optimizers) that of the iterate before v.
        products: number of products with A and its transpose.
        status: ``converged`` (residual <= tol), ``stopped`` (number of steps), ``zero`` (b = 0), ``indefinite``,
            ``singular``, ``diverged`` (residual above 1: v = 0 is better; not for samples, nor after one product from a
            start, whose residual it is) or ``not finite``.
    """

    v: Params
    residual: float
    products: int
    status: str


class LinearSolver(ABC):
    r"""Solves ``(A + damping I) v = b``.

    Args:
        steps: largest number of steps.
        tol: relative residual to stop at.
        damping: added to the diagonal of A. Default 0.

    Raises:
        BilevelError: if a setting is out of its range.
    """

    symmetric = True
    """Whether A must be symmetric."""

    def __init__(self, steps: int, tol: float = 0.0, damping: float = 0.0) -> None:
        name = type(self).__name__
        self.steps = int(positive(f"{name}.steps", steps))
        for setting, value in (("tol", tol), ("damping", damping)):
            if not 0 <= value < float("inf"):
                raise BilevelError(f"{name}.{setting} must not be negative, got {value}.")
        self.tol, self.damping = tol, damping

    @property
    def samples(self) -> int:
        """Number of samples of A that the products of one solution take; 0: one sample serves them and g_xy v."""
        return 0

    def solve(self, system: System, start: Params | None = None) -> Solution:
        """Solves the system, from ``start`` or from zero."""
        if self.symmetric and system.transpose is not None:
            raise BilevelError(
                f"{type(self).__name__} needs a symmetric system, but this lower level is a fixed-point map or has a "
                "projection: use NormalConjugateGradient, Neumann, FixedPointIteration, Stochastic or Dense."
            )
        scale = float(tree.norm(system.rhs))
        if scale == 0:
            return Solution(tree.zeros_like(system.rhs), 0.0, 0, "zero")
        products = 0

        def product(v: Params, j: int) -> Params:
            nonlocal products
            products += 1
            image = system.product(v, j)
            return tree.axpy(self.damping, v, image) if self.damping else image

        def transpose(w: Params) -> Params:
            nonlocal products
            if system.transpose is None:
                return product(w, 0)
            products += 1
            image = system.transpose(w)
            return tree.axpy(self.damping, w, image) if self.damping else image

        counted = system._replace(product=product, transpose=transpose)
        with torch.no_grad():
            found = self._solve(counted, scale) if start is None else self._continue(counted, scale, start)
        v, residual, status = found
        if not torch.isfinite(tree.norm(v)):
            status = "not finite"
        elif status == "stopped" and residual > 1.0 and not system.sampled and (start is None or products > 1):
            status = "diverged"
        return Solution(v, residual, products, "converged" if status == "stopped" and residual <= self.tol else status)

    @abstractmethod
    def _solve(self, system: System, scale: float) -> tuple[Params, float, str]:
        """Solves from zero.

        Returns:
            v, the residual relative to ``scale``, and the status.
        """

    def _continue(self, system: System, scale: float, start: Params) -> tuple[Params, float, str]:
        """Solves from ``start``; here by solving for its correction."""
        rhs = tree.axpy(-1.0, system.product(start, 0), system.rhs)
        v, residual, status = self._solve(system._replace(rhs=rhs), scale)
        return tree.axpy(1.0, start, v), residual, status
