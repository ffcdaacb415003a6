r"""Solvers of the linear system ``(A + damping I) v = b`` of implicit differentiation, from products with A alone.

Each is a value handed in by a config. What it returns says how far to trust it: the relative residual, the number of
products, and a status. A system that is singular, indefinite or diverging, and a b of zeros, are never passed over.
"""

from bilevel_lightning.linear_solvers.base import LinearSolver, Solution, System
from bilevel_lightning.linear_solvers.dense import Dense, Nystrom
from bilevel_lightning.linear_solvers.krylov import ConjugateGradient, NormalConjugateGradient
from bilevel_lightning.linear_solvers.series import FixedPointIteration, Neumann, Stochastic

__all__ = [
    "ConjugateGradient",
    "Dense",
    "FixedPointIteration",
    "LinearSolver",
    "Neumann",
    "NormalConjugateGradient",
    "Nystrom",
    "Solution",
    "Stochastic",
    "System",
]
