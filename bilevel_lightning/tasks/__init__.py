"""The problems."""

from bilevel_lightning.tasks.hyper_cleaning import HyperCleaning

__all__ = ["HyperCleaning"]
