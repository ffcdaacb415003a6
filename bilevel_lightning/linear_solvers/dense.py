"""From columns of the matrix: some of them, or all."""

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.linear_solvers.base import LinearSolver, System
from bilevel_lightning.tree import Params


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
    def _solve(self, system: System, scale: float) -> tuple[Params, float, str]:
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
    def _solve(self, system: System, scale: float) -> tuple[Params, float, str]:
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


def _flat(v: Params) -> Tensor:
    return torch.cat([t.reshape(-1) for t in v.values()])


def _unflat(flat: Tensor, like: Params) -> Params:
    parts = torch.split(flat, [t.numel() for t in like.values()])
    return {n: part.view_as(t) for (n, t), part in zip(like.items(), parts, strict=True)}
