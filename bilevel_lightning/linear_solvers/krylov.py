"""Conjugate gradient, on the system and on its normal equations."""

import torch
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.linear_solvers.base import LinearSolver, System
from bilevel_lightning.tree import Params


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
    def _solve(self, system: System, scale: float) -> tuple[Params, float, str]:
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
    def _solve(self, system: System, scale: float) -> tuple[Params, float, str]:
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
