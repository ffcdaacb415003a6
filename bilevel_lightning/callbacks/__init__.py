"""Figures, reports and diagnostics."""

from bilevel_lightning.callbacks.cleaning import CleaningReport, SuspiciousImages, WeightHistogram
from bilevel_lightning.callbacks.numerical import PathFigure, SolutionError
from bilevel_lightning.callbacks.stopping import ResidualStopping

__all__ = ["CleaningReport", "PathFigure", "ResidualStopping", "SolutionError", "SuspiciousImages", "WeightHistogram"]
