"""The algorithms, each named as in its paper. ``__all__`` is the only registry: tests and docs go over it."""

from bilevel_lightning.algorithms.aid import AID, AIDCG, AIDFP, AIDNeumann, Nystrom
from bilevel_lightning.algorithms.bamm import BAMM
from bilevel_lightning.algorithms.bda import BDA
from bilevel_lightning.algorithms.bome import BOME
from bilevel_lightning.algorithms.bsa import BSA, TTSA
from bilevel_lightning.algorithms.bsgm import BSGM
from bilevel_lightning.algorithms.bvfsm import BVFSM
from bilevel_lightning.algorithms.darts import DARTS, SAMA
from bilevel_lightning.algorithms.f2sa import F2SA
from bilevel_lightning.algorithms.forward import FG2U, ForwardHG
from bilevel_lightning.algorithms.fsla import FSLA
from bilevel_lightning.algorithms.iapttgm import IAPTTGM
from bilevel_lightning.algorithms.imaml import IMAML
from bilevel_lightning.algorithms.maml import ANIL, FOMAML, MAML, MetaSGD
from bilevel_lightning.algorithms.meha import MEHA
from bilevel_lightning.algorithms.mrbo import MRBO, SUSTAIN, VRBO
from bilevel_lightning.algorithms.pbgd import GPBGD, VPBGD
from bilevel_lightning.algorithms.pzobo import PZOBO
from bilevel_lightning.algorithms.reptile import Reptile
from bilevel_lightning.algorithms.rhg import ITD, RHG, TRHG
from bilevel_lightning.algorithms.soba import MASOBA, SABA, SOBA, SRBA
from bilevel_lightning.algorithms.stocbio import ALSET, AmIGO, StocBiO

__all__ = [
    "AID",
    "AIDCG",
    "AIDFP",
    "ALSET",
    "ANIL",
    "BAMM",
    "BDA",
    "BOME",
    "BSA",
    "BSGM",
    "BVFSM",
    "DARTS",
    "F2SA",
    "FG2U",
    "FOMAML",
    "FSLA",
    "GPBGD",
    "IAPTTGM",
    "IMAML",
    "ITD",
    "MAML",
    "MASOBA",
    "MEHA",
    "MRBO",
    "PZOBO",
    "RHG",
    "SABA",
    "SAMA",
    "SOBA",
    "SRBA",
    "SUSTAIN",
    "TRHG",
    "TTSA",
    "VPBGD",
    "VRBO",
    "AIDNeumann",
    "AmIGO",
    "ForwardHG",
    "MetaSGD",
    "Nystrom",
    "Reptile",
    "StocBiO",
]
