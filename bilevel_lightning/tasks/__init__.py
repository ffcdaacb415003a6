"""The problems."""

from bilevel_lightning.tasks.architecture import ArchitectureSearch
from bilevel_lightning.tasks.equilibrium import Equilibrium
from bilevel_lightning.tasks.few_shot import FewShot, FewShotRegression
from bilevel_lightning.tasks.hyper_cleaning import HyperCleaning
from bilevel_lightning.tasks.numerical import (
    BDACounterExample,
    GPBGDTrap,
    GroupLasso,
    Lasso,
    MerelyConvex,
    NumericalTask,
    PBGDToy,
    SineSum,
    SinProblem,
    StronglyConvex,
)
from bilevel_lightning.tasks.poisoning import Poisoning
from bilevel_lightning.tasks.reweighting import Reweighting
from bilevel_lightning.tasks.selection import PenaltySelection, QuadraticSum

__all__ = [
    "ArchitectureSearch",
    "BDACounterExample",
    "Equilibrium",
    "FewShot",
    "FewShotRegression",
    "GPBGDTrap",
    "GroupLasso",
    "HyperCleaning",
    "Lasso",
    "MerelyConvex",
    "NumericalTask",
    "PBGDToy",
    "PenaltySelection",
    "Poisoning",
    "QuadraticSum",
    "Reweighting",
    "SinProblem",
    "SineSum",
    "StronglyConvex",
]
