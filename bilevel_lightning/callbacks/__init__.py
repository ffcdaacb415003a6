"""Figures, reports and diagnostics."""

from bilevel_lightning.callbacks.cleaning import CleaningReport, SuspiciousImages, WeightHistogram

__all__ = ["CleaningReport", "SuspiciousImages", "WeightHistogram"]
