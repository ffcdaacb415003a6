r"""Lower-level update maps: how y moves towards argmin_y g(x, y), differentiably.

A dynamics is a value without state of its own. The state of the lower level, a tuple of named tensors whose first entry
is y, is passed in and out, so that an unrolled differentiation may store it, restart from it and differentiate through
it, and so that its settings may be learnt as upper variables (``learn_lr`` and its like).
"""

from bilevel_lightning.dynamics.adam import Adam
from bilevel_lightning.dynamics.base import Dynamics, State
from bilevel_lightning.dynamics.descent import (
    Accelerated,
    AggregatedDescent,
    GradientDescent,
    HeavyBall,
    Momentum,
    Nesterov,
)
from bilevel_lightning.dynamics.fixed_point import Anderson, FixedPoint
from bilevel_lightning.dynamics.library import HigherDynamics

__all__ = [
    "Accelerated",
    "Adam",
    "AggregatedDescent",
    "Anderson",
    "Dynamics",
    "FixedPoint",
    "GradientDescent",
    "HeavyBall",
    "HigherDynamics",
    "Momentum",
    "Nesterov",
    "State",
]
