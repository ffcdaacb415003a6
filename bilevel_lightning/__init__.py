"""Bilevel optimization as PyTorch Lightning modules: ``min_x f(x, y*(x))  s.t.  y*(x) in argmin_y g(x, y)``."""

from bilevel_lightning.algorithms import RHG, TRHG
from bilevel_lightning.dynamics import Adam, Dynamics, FixedPoint, GradientDescent, Momentum, Nesterov
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.task import BilevelTask, Minibatches

__version__ = "0.1.0"

__all__ = [
    "RHG",
    "TRHG",
    "Adam",
    "BilevelError",
    "BilevelModule",
    "BilevelProblem",
    "BilevelTask",
    "Dynamics",
    "FixedPoint",
    "GradientDescent",
    "Minibatches",
    "Momentum",
    "Nesterov",
    "Step",
]
