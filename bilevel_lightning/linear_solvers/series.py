"""Iterations that step along the residual, each product with the next sample of A where there are several."""

import torch
from pytorch_lightning.cli import OptimizerCallable
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.linear_solvers.base import LinearSolver, System
from bilevel_lightning.schedules import Schedule, at, scheduled
from bilevel_lightning.tree import Params


class _Sampled(LinearSolver):
    """A solver of which each product takes the next sample of A."""

    symmetric = False

    @property
    @override
    def samples(self) -> int:
        return self.steps


class Neumann(_Sampled):
    r"""The truncated Neumann series ``v = lr sum_{i=0..K} (I - lr A)^i b``.

    With ``randomised``, ``v = (K + 1) lr (I - lr A)^p b`` with p uniform in 0..K: the same in expectation, with fresh
    samples of A where there are several.

    Args:
        steps: number K of products; K + 1 terms. From a start v_0 one product more, and (I - lr A)^{K+1} v_0 is added.
            Default 20.
        lr: step size, below 2 / (largest eigenvalue). Default: the lower dynamics', where they are of that kind.
        damping: added to the diagonal. Default 0.
        randomised: draw one term. Default False.

    References:
        J. Lorraine, P. Vicol, D. Duvenaud. Optimizing Millions of Hyperparameters by Implicit Differentiation.
        AISTATS 2020. The randomised form: S. Ghadimi, M. Wang. Approximation Methods for Bilevel Programming. 2018.
    """

    def __init__(
        self, steps: int = 20, lr: float | None = None, damping: float = 0.0, randomised: bool = False
    ) -> None:
        super().__init__(steps, damping=damping)
        self.lr = lr if lr is None else positive("Neumann.lr", lr)
        self.randomised = randomised

    @override
    def _solve(self, system: System, scale: float) -> tuple[Params, float, str]:
        if self.randomised:
            return self._term(system, scale, system.rhs, self._power(system))
        lr = at(_lr(self, system), 0)
        total = term = system.rhs
        for j in range(self.steps):
            term = tree.axpy(-lr, system.product(term, j), term)
            total = tree.axpy(1.0, term, total)
        # (I - lr A)^i b is the residual after i terms.
        return _scaled(lr, total), float(tree.norm(term)) / scale, "stopped"

    @override
    def _continue(self, system: System, scale: float, start: Params) -> tuple[Params, float, str]:
        if not self.randomised:
            return _richardson(system, start, range(self.steps + 1), _lr(self, system), scale)
        power = self._power(system)
        rhs = tree.axpy(-1.0, system.product(start, power), system.rhs)
        v, residual, status = self._term(system, scale, rhs, power)
        return tree.axpy(1.0, start, v), residual, status

    def _power(self, system: System) -> int:
        """Draws p."""
        device = next(iter(system.rhs.values())).device
        return int(system.agree({"": torch.randint(self.steps + 1, (1,), device=device)})[""])

    def _term(self, system: System, scale: float, rhs: Params, power: int) -> tuple[Params, float, str]:
        """Returns ``(K + 1) lr (I - lr A)^p rhs``."""
        lr, term = at(_lr(self, system), 0), rhs
        for j in range(power):
            term = tree.axpy(-lr, system.product(term, j), term)
        return _scaled((self.steps + 1) * lr, term), float(tree.norm(term)) / scale, "stopped"


class FixedPointIteration(_Sampled):
    """``v <- v - lr_j (A v - b)``, j = 0, 1, ...; from zero, K steps of constant size are `Neumann` with K - 1.

    Args:
        steps: largest number of steps, one product each but for the first from zero. Default 20.
        tol: relative residual to stop at. Default 1e-10.
        lr: step size, below 2 / (largest eigenvalue), or a schedule over the steps. Default: the lower dynamics', where
            they are of that kind.
        damping: added to the diagonal. Default 0.
        first: what b is multiplied with for the first iterate. Default lr_0, the step from zero.

    References:
        R. Grazzi, L. Franceschi, M. Pontil, S. Salzo. On the Iteration Complexity of Hypergradient Computation. ICML
        2020.
    """

    def __init__(
        self,
        steps: int = 20,
        tol: float = 1e-10,
        lr: float | Schedule | None = None,
        damping: float = 0.0,
        first: float | None = None,
    ) -> None:
        super().__init__(steps, tol, damping)
        self.lr = lr if lr is None else scheduled("FixedPointIteration.lr", lr)
        self.first = first if first is None else positive("FixedPointIteration.first", first)

    @override
    def _solve(self, system: System, scale: float) -> tuple[Params, float, str]:
        lr = _lr(self, system)
        start = _scaled(at(lr, 0) if self.first is None else self.first, system.rhs)
        return _richardson(system, start, range(1, self.steps), lr, scale, self.tol)

    @override
    def _continue(self, system: System, scale: float, start: Params) -> tuple[Params, float, str]:
        return _richardson(system, start, range(self.steps), _lr(self, system), scale, self.tol)


class Stochastic(_Sampled):
    """Any torch optimizer on the linear system: its gradient is ``A_j v - b``, with a fresh sample of A at each step.

    SGD with a step size ``lr`` is `FixedPointIteration`.

    Args:
        steps: number of steps, one product each. Default 20.
        optimizer: makes the optimizer from parameters. Default SGD with step size 0.1.
        tol: relative residual to stop at. Default 0, since the residual of one sample says little.
        damping: added to the diagonal. Default 0.

    References:
        R. Grazzi, M. Pontil, S. Salzo. Bilevel Optimization with a Lower-level Contraction: Optimal Sample Complexity
        without Warm-Start. JMLR 2023.
    """

    def __init__(
        self,
        steps: int = 20,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1),
        tol: float = 0.0,
        damping: float = 0.0,
    ) -> None:
        super().__init__(steps, tol, damping)
        self.optimizer = optimizer

    @override
    def _solve(self, system: System, scale: float) -> tuple[Params, float, str]:
        return self._continue(system, scale, tree.zeros_like(system.rhs))

    @override
    def _continue(self, system: System, scale: float, start: Params) -> tuple[Params, float, str]:
        v = {n: t.clone().requires_grad_() for n, t in start.items()}
        optimizer, residual = self.optimizer(v.values()), 1.0
        for j in range(self.steps):
            r = tree.axpy(-1.0, system.rhs, system.product(tree.detach(v), j))
            residual = float(tree.norm(r)) / scale
            if residual <= self.tol:
                break
            for n, t in v.items():
                t.grad = r[n]
            optimizer.step()
        return tree.detach(v), residual, "stopped"


def _lr(solver: Neumann | FixedPointIteration, system: System) -> float | Schedule:
    """Returns the solver's step size, by default that of the lower dynamics."""
    lr = system.step if solver.lr is None else solver.lr
    if lr is None:
        raise BilevelError(f"{type(solver).__name__}.lr must be given: these dynamics have no step size of its kind.")
    return lr


def _richardson(
    system: System, v: Params, steps: range, lr: float | Schedule, scale: float, tol: float = 0.0
) -> tuple[Params, float, str]:
    """Runs ``v <- v - lr_i (A_j v - b)`` for the steps i, j = 0, 1, ..., until the residual is within ``tol``."""
    residual = 1.0
    for j, i in enumerate(steps):
        r = tree.axpy(-1.0, system.product(v, j), system.rhs)
        residual = float(tree.norm(r)) / scale
        if residual <= tol:
            break
        v = tree.axpy(at(lr, i), r, v)
    return v, residual, "stopped"


def _scaled(factor: float, v: Params) -> Params:
    return {n: factor * t for n, t in v.items()}
