"""The algorithms, each named as in its paper. ``__all__`` is the only registry: tests and docs go over it."""

from bilevel_lightning.algorithms.aid import AID, AIDCG, AIDFP, AIDNeumann, Nystrom
from bilevel_lightning.algorithms.darts import DARTS, SAMA
from bilevel_lightning.algorithms.forward import FG2U, ForwardHG
from bilevel_lightning.algorithms.pzobo import PZOBO
from bilevel_lightning.algorithms.rhg import ITD, RHG, TRHG

__all__ = [
    "AID",
    "AIDCG",
    "AIDFP",
    "DARTS",
    "FG2U",
    "ITD",
    "PZOBO",
    "RHG",
    "SAMA",
    "TRHG",
    "AIDNeumann",
    "ForwardHG",
    "Nystrom",
]
