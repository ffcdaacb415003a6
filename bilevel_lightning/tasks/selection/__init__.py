"""Selection of hyper-parameters, and the finite-sum quadratic on which its stochastic methods are compared."""

from bilevel_lightning.tasks.selection.penalties import PenaltySelection
from bilevel_lightning.tasks.selection.quadratic import QuadraticSum

__all__ = ["PenaltySelection", "QuadraticSum"]
