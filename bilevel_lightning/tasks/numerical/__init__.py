"""Problems of the papers with known solutions, and without data."""

from bilevel_lightning.tasks.numerical.base import NumericalTask
from bilevel_lightning.tasks.numerical.iaptt import SinProblem
from bilevel_lightning.tasks.numerical.lasso import GroupLasso, Lasso
from bilevel_lightning.tasks.numerical.meha import BDACounterExample, MerelyConvex, SineSum, StronglyConvex
from bilevel_lightning.tasks.numerical.pbgd import GPBGDTrap, PBGDToy

__all__ = [
    "BDACounterExample",
    "GPBGDTrap",
    "GroupLasso",
    "Lasso",
    "MerelyConvex",
    "NumericalTask",
    "PBGDToy",
    "SinProblem",
    "SineSum",
    "StronglyConvex",
]
