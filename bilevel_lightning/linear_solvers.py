r"""Solvers of the linear system ``(A + damping I) v = b`` of implicit differentiation, from products with A alone.

Each is a value handed in by a config. What it returns says how far to trust it: the relative residual, the number of
products, and a status. A system that is singular, indefinite or diverging, and a b of zeros, are never passed over.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from typing_extensions import override

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
            ``singular``, ``diverged`` (residual above 1: v = 0 is better; not for samples) or ``not finite``.
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

    stochastic = False
    """Whether each product may take another sample of A."""

    def __init__(self, steps: int, tol: float = 0.0, damping: float = 0.0) -> None:
        name = type(self).__name__
        self.steps = int(positive(f"{name}.steps", steps))
        for setting, value in (("tol", tol), ("damping", damping)):
            if not 0 <= value < float("inf"):
                raise BilevelError(f"{name}.{setting} must not be negative, got {value}.")
        self.tol, self.damping = tol, damping

    @property
    def samples(self) -> int:
        """Number of samples of A that one solution takes."""
        return self.steps if self.stochastic else 1

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

        with torch.no_grad():
            counted = system._replace(product=product, transpose=transpose)
            if start is None or self.stochastic:
                v, residual, status = self._solve(counted, scale, start)
            else:  # solves for the correction of start
                rhs = tree.axpy(-1.0, product(start, 0), system.rhs)
                v, residual, status = self._solve(counted._replace(rhs=rhs), scale, None)
                v = tree.axpy(1.0, start, v)
        if not torch.isfinite(tree.norm(v)):
            status = "not finite"
        elif status == "stopped" and residual > 1.0 and not system.sampled:
            status = "diverged"
        return Solution(v, residual, products, "converged" if status == "stopped" and residual <= self.tol else status)

    @abstractmethod
    def _solve(self, system: System, scale: float, start: Params | None) -> tuple[Params, float, str]:
        """Solves, from ``start`` where the solver is stochastic; residuals are relative to ``scale``.

        Returns:
            v, the residual and the status.
        """

    def _step(self, system: System, lr: float | None) -> float:
        if lr is None and system.step is None:
            raise BilevelError(f"{type(self).__name__}.lr must be given: these dynamics have no step size of its kind.")
        return lr if lr is not None else float(system.step or 0.0)


class ConjugateGradient(LinearSolver):
    """Conjugate gradient: exact after as many steps as A has distinct eigenvalues, for A symmetric positive definite.

    Args:
        steps: largest number of steps, one product each. Default 20.
        tol: relative residual to stop at. Default 1e-10, that of hypertorch.
        damping: added to the diagonal. Default 0.

    References:
        M. R. Hestenes, E. Stiefel. Methods of Conjugate Gradients for Solving Linear Systems. 1952.
    """

    def __init__(self, steps: int = 20, tol: float = 1e-10, damping: float = 0.0) -> None:
        super().__init__(steps, tol, damping)

    @override
    def _solve(self, system: System, scale: float, start: Params | None) -> tuple[Params, float, str]:
        v, r = tree.zeros_like(system.rhs), system.rhs
        p, rr, largest = r, float(tree.dot(r, r)), 0.0
        small = 10 * torch.finfo(next(iter(r.values())).dtype).eps
        for _ in range(self.steps):
            if rr**0.5 <= self.tol * scale:
                break
            image = system.product(p, 0)
            curvature, pp = float(tree.dot(p, image)), float(tree.dot(p, p))
            largest = max(largest, float(tree.norm(image)) / pp**0.5)
            if curvature <= small * largest * pp:
                return v, rr**0.5 / scale, "indefinite" if curvature < -small * largest * pp else "singular"
            v, r = tree.axpy(rr / curvature, p, v), tree.axpy(-rr / curvature, image, r)
            rr, old = float(tree.dot(r, r)), rr
            p = tree.axpy(rr / old, p, r)
        return v, rr**0.5 / scale, "stopped"


class NormalConjugateGradient(LinearSolver):
    """Conjugate gradient on the normal equations ``A^T A v = A^T b``: for any A, at two products a step.

    Args:
        steps: largest number of steps. Default 40.
        tol: relative residual to stop at. Default 1e-10.
        damping: added to the diagonal. Default 0.
    """

    symmetric = False

    def __init__(self, steps: int = 40, tol: float = 1e-10, damping: float = 0.0) -> None:
        super().__init__(steps, tol, damping)

    @override
    def _solve(self, system: System, scale: float, start: Params | None) -> tuple[Params, float, str]:
        assert system.transpose is not None
        v, r = tree.zeros_like(system.rhs), system.rhs
        s = system.transpose(r)
        p, ss = s, float(tree.dot(s, s))
        small, norm = 10 * torch.finfo(next(iter(r.values())).dtype).eps, 0.0
        for _ in range(self.steps):
            length = float(tree.norm(r))
            norm = max(norm, ss**0.5 / length) if length else norm
            if length <= self.tol * scale:
                break
            if ss**0.5 <= small * norm * length:  # the residual is orthogonal to all that A reaches
                return v, length / scale, "singular"
            image = system.product(p, 0)
            step = ss / float(tree.dot(image, image))
            v, r = tree.axpy(step, p, v), tree.axpy(-step, image, r)
            s = system.transpose(r)
            ss, old = float(tree.dot(s, s)), ss
            p = tree.axpy(ss / old, p, s)
        return v, float(tree.norm(r)) / scale, "stopped"


class Neumann(LinearSolver):
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

    symmetric, stochastic = False, True

    def __init__(
        self, steps: int = 20, lr: float | None = None, damping: float = 0.0, randomised: bool = False
    ) -> None:
        super().__init__(steps, damping=damping)
        self.lr = lr if lr is None else positive("Neumann.lr", lr)
        self.randomised = randomised

    @override
    def _solve(self, system: System, scale: float, start: Params | None) -> tuple[Params, float, str]:
        lr, term, length = self._step(system, self.lr), system.rhs, self.steps
        if start is not None and not self.randomised:  # the series and (I - lr A)^{K+1} start
            v, residual = start, 1.0
            for j in range(self.steps + 1):
                v, residual = _richardson(system, v, j, lr, scale)
            return v, residual, "stopped"
        if self.randomised:
            like = next(iter(term.values()))
            length = int(system.agree({"": torch.randint(self.steps + 1, (1,), device=like.device)})[""])
        if start is not None:
            term = tree.axpy(-1.0, system.product(start, length), term)
        total = term
        for j in range(length):
            term = tree.axpy(-lr, system.product(term, j), term)
            total = tree.axpy(1.0, term, total)
        if self.randomised:
            v = _scaled((self.steps + 1) * lr, term)
            return v if start is None else tree.axpy(1.0, start, v), float(tree.norm(term)) / scale, "stopped"
        # (I - lr A)^i b is the residual after i terms.
        return _scaled(lr, total), float(tree.norm(term)) / scale, "stopped"


class FixedPointIteration(LinearSolver):
    """``v <- v - lr (A v - b)``; from zero, K steps are `Neumann` with K - 1.

    Args:
        steps: largest number of steps, one product each but for the first from zero. Default 20.
        tol: relative residual to stop at. Default 1e-10.
        lr: step size, below 2 / (largest eigenvalue). Default: the lower dynamics', where they are of that kind.
        damping: added to the diagonal. Default 0.

    References:
        R. Grazzi, L. Franceschi, M. Pontil, S. Salzo. On the Iteration Complexity of Hypergradient Computation. ICML
        2020.
    """

    symmetric, stochastic = False, True

    def __init__(self, steps: int = 20, tol: float = 1e-10, lr: float | None = None, damping: float = 0.0) -> None:
        super().__init__(steps, tol, damping)
        self.lr = lr if lr is None else positive("FixedPointIteration.lr", lr)

    @override
    def _solve(self, system: System, scale: float, start: Params | None) -> tuple[Params, float, str]:
        lr, residual = self._step(system, self.lr), 1.0
        v, steps = (_scaled(lr, system.rhs), self.steps - 1) if start is None else (start, self.steps)
        for j in range(steps):
            v, residual = _richardson(system, v, j, lr, scale, self.tol)
            if residual <= self.tol:
                break
        return v, residual, "stopped"


def _richardson(system: System, v: Params, j: int, lr: float, scale: float, tol: float = 0.0) -> tuple[Params, float]:
    """Returns ``v - lr (A_j v - b)``, or v where its residual is within ``tol``, and the relative residual of v."""
    r = tree.axpy(-1.0, system.product(v, j), system.rhs)
    residual = float(tree.norm(r)) / scale
    return (v if residual <= tol else tree.axpy(lr, r, v)), residual


class Stochastic(LinearSolver):
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

    symmetric, stochastic = False, True

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
    def _solve(self, system: System, scale: float, start: Params | None) -> tuple[Params, float, str]:
        v = {n: t.clone().requires_grad_() for n, t in (start or tree.zeros_like(system.rhs)).items()}
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


class Nystrom(LinearSolver):
    r"""Nystroem approximation of A from ``steps`` random columns, inverted by Woodbury's identity.

    With the columns C = A[:, I] and W = A[I, I], ``A ~ C W^+ C^T`` and
    ``v = (b - C (damping W + C^T C)^+ C^T b) / damping``. The residual takes one more product.

    Args:
        steps: number of columns, one product each. Default 10, the paper's.
        damping: rho > 0. Default 0.01, the paper's.

    References:
        R. Hataya, M. Yamada. Nystroem Method for Accurate and Scalable Implicit Differentiation. AISTATS 2023.
    """

    def __init__(self, steps: int = 10, damping: float = 0.01) -> None:
        super().__init__(steps, damping=positive("Nystrom.damping", damping))

    @override
    def _solve(self, system: System, scale: float, start: Params | None) -> tuple[Params, float, str]:
        b = _flat(system.rhs)
        order = system.agree({"": torch.randperm(len(b)).to(b.device)})[""]
        index = order[: min(self.steps, len(b))]
        columns = []
        for i in index.tolist():
            e = torch.zeros_like(b)
            e[i] = 1.0
            columns.append(_flat(system.product(_unflat(e, system.rhs), 0)) - self.damping * e)
        c = torch.stack(columns, 1)
        if not torch.isfinite(c).all():
            return _unflat(b * torch.nan, system.rhs), float("nan"), "not finite"
        w = c[index]
        eigenvalues = torch.linalg.eigvalsh((w + w.T) / 2)
        inner = self.damping * w + c.T @ c
        v = (b - c @ (torch.linalg.pinv(inner, hermitian=True) @ (c.T @ b))) / self.damping
        residual = float((b - _flat(system.product(_unflat(v, system.rhs), 0))).norm()) / scale
        negative = float(eigenvalues.min()) < -1e-3 * float(eigenvalues.abs().max())
        return _unflat(v, system.rhs), residual, "indefinite" if negative else "stopped"


class Dense(LinearSolver):
    """The exact solution from the whole matrix, column by column: for small problems and as a reference.

    A singular system gets its least-squares solution of smallest norm, and says so.

    Args:
        largest: largest number of unknowns allowed. Default 2000.
        damping: added to the diagonal. Default 0.

    Raises:
        BilevelError: if there are more unknowns.
    """

    symmetric = False

    def __init__(self, largest: int = 2000, damping: float = 0.0) -> None:
        super().__init__(1, damping=damping)
        self.largest = largest

    @override
    def _solve(self, system: System, scale: float, start: Params | None) -> tuple[Params, float, str]:
        b = _flat(system.rhs)
        if len(b) > self.largest:
            raise BilevelError(
                f"Dense would need {len(b)} products and a matrix of that size; raise Dense.largest (now "
                f"{self.largest}) or use ConjugateGradient."
            )
        eye = torch.eye(len(b), dtype=b.dtype, device=b.device)
        a = torch.stack([_flat(system.product(_unflat(e, system.rhs), 0)) for e in eye], 1)
        if not torch.isfinite(a).all():
            return _unflat(b * torch.nan, system.rhs), float("nan"), "not finite"
        values = torch.linalg.svdvals(a)
        status = "stopped"
        if values[-1] <= len(b) * torch.finfo(b.dtype).eps * values[0]:
            v, status = torch.linalg.pinv(a) @ b, "singular"
        else:
            v = torch.linalg.solve(a, b)
            v = v + torch.linalg.solve(a, b - a @ v)
            if torch.allclose(a, a.T) and torch.linalg.eigvalsh(a)[0] < 0:
                status = "indefinite"
        return _unflat(v, system.rhs), float((b - a @ v).norm()) / scale, status


def _scaled(factor: float, v: Params) -> Params:
    return {n: factor * t for n, t in v.items()}


def _flat(v: Params) -> Tensor:
    return torch.cat([t.reshape(-1) for t in v.values()])


def _unflat(flat: Tensor, like: Params) -> Params:
    parts = torch.split(flat, [t.numel() for t in like.values()])
    return {n: part.view_as(t) for (n, t), part in zip(like.items(), parts, strict=True)}
