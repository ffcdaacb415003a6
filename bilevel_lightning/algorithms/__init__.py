"""The algorithms, each named as in its paper. ``__all__`` is the only registry: tests and docs go over it."""

from bilevel_lightning.algorithms.rhg import RHG, TRHG

__all__ = ["RHG", "TRHG"]
