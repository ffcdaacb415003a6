"""Bilevel optimization as PyTorch Lightning modules: ``min_x f(x, y*(x))  s.t.  y*(x) in argmin_y g(x, y)``."""

from bilevel_lightning import algorithms
from bilevel_lightning.algorithms import *  # noqa: F403 (the one list of them is its __all__)
from bilevel_lightning.dynamics import (
    Accelerated,
    Adam,
    AggregatedDescent,
    Anderson,
    Dynamics,
    FixedPoint,
    GradientDescent,
    HeavyBall,
    HigherDynamics,
    Momentum,
    Nesterov,
)
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.functional import hypergradient
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.task import BilevelTask, Minibatches

__version__ = "0.1.0"

__all__ = [
    "Accelerated",
    "Adam",
    "AggregatedDescent",
    "Anderson",
    "BilevelError",
    "BilevelModule",
    "BilevelProblem",
    "BilevelTask",
    "Dynamics",
    "FixedPoint",
    "GradientDescent",
    "HeavyBall",
    "HigherDynamics",
    "Minibatches",
    "Momentum",
    "Nesterov",
    "Step",
    "hypergradient",
]
__all__ += algorithms.__all__
