"""The algorithms, each named as in its paper. ``__all__`` is the only registry: tests and docs go over it."""

from bilevel_lightning.algorithms.aid import AID, AIDCG, AIDFP, AIDNeumann, Nystrom
from bilevel_lightning.algorithms.bda import BDA
from bilevel_lightning.algorithms.bome import BOME
from bilevel_lightning.algorithms.bvfsm import BVFSM
from bilevel_lightning.algorithms.darts import DARTS, SAMA
from bilevel_lightning.algorithms.f2sa import F2SA
from bilevel_lightning.algorithms.forward import FG2U, ForwardHG
from bilevel_lightning.algorithms.iapttgm import IAPTTGM
from bilevel_lightning.algorithms.imaml import IMAML
from bilevel_lightning.algorithms.maml import ANIL, FOMAML, MAML, MetaSGD
from bilevel_lightning.algorithms.meha import MEHA
from bilevel_lightning.algorithms.pbgd import GPBGD, VPBGD
from bilevel_lightning.algorithms.pzobo import PZOBO
from bilevel_lightning.algorithms.reptile import Reptile
from bilevel_lightning.algorithms.rhg import ITD, RHG, TRHG

__all__ = [
    "AID",
    "AIDCG",
    "AIDFP",
    "ANIL",
    "BDA",
    "BOME",
    "BVFSM",
    "DARTS",
    "F2SA",
    "FG2U",
    "FOMAML",
    "GPBGD",
    "IAPTTGM",
    "IMAML",
    "ITD",
    "MAML",
    "MEHA",
    "PZOBO",
    "RHG",
    "SAMA",
    "TRHG",
    "VPBGD",
    "AIDNeumann",
    "ForwardHG",
    "MetaSGD",
    "Nystrom",
    "Reptile",
]
