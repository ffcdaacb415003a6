"""Figures, reports and diagnostics."""

from bilevel_lightning.callbacks.architecture import ArchitectureFigures, GenotypeReport
from bilevel_lightning.callbacks.budget import SampleBudget
from bilevel_lightning.callbacks.cleaning import CleaningReport, SuspiciousImages, WeightHistogram
from bilevel_lightning.callbacks.equilibrium import UpperStationarity
from bilevel_lightning.callbacks.few_shot import AdaptationCurve, EpisodeFigure, FewShotReport, RegressionFigure
from bilevel_lightning.callbacks.numerical import PathFigure, SolutionError
from bilevel_lightning.callbacks.poisoning import PoisonedImages, PoisoningReport
from bilevel_lightning.callbacks.reweighting import ReweightingReport, SourceWeightCurve, WeightFigure
from bilevel_lightning.callbacks.saving import SaveEvery
from bilevel_lightning.callbacks.stopping import ResidualStopping

__all__ = [
    "AdaptationCurve",
    "ArchitectureFigures",
    "CleaningReport",
    "EpisodeFigure",
    "FewShotReport",
    "GenotypeReport",
    "PathFigure",
    "PoisonedImages",
    "PoisoningReport",
    "RegressionFigure",
    "ResidualStopping",
    "ReweightingReport",
    "SampleBudget",
    "SaveEvery",
    "SolutionError",
    "SourceWeightCurve",
    "SuspiciousImages",
    "UpperStationarity",
    "WeightFigure",
    "WeightHistogram",
]
