"""Can a hypergradient be trusted? It is compared with finite differences, and with that of a solved lower level."""

from bilevel_lightning.diagnosis.check import check
from bilevel_lightning.diagnosis.report import TOLERANCE, Report

__all__ = ["TOLERANCE", "Report", "check"]
