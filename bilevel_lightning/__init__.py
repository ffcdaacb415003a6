"""Bilevel optimization as PyTorch Lightning modules: ``min_x f(x, y*(x))  s.t.  y*(x) in argmin_y g(x, y)``."""

from bilevel_lightning.algorithms import (
    AID,
    AIDCG,
    AIDFP,
    DARTS,
    FG2U,
    ITD,
    PZOBO,
    RHG,
    SAMA,
    TRHG,
    AIDNeumann,
    ForwardHG,
    Nystrom,
)
from bilevel_lightning.dynamics import (
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
    "AID",
    "AIDCG",
    "AIDFP",
    "DARTS",
    "FG2U",
    "ITD",
    "PZOBO",
    "RHG",
    "SAMA",
    "TRHG",
    "AIDNeumann",
    "Adam",
    "AggregatedDescent",
    "Anderson",
    "BilevelError",
    "BilevelModule",
    "BilevelProblem",
    "BilevelTask",
    "Dynamics",
    "FixedPoint",
    "ForwardHG",
    "GradientDescent",
    "HeavyBall",
    "HigherDynamics",
    "Minibatches",
    "Momentum",
    "Nesterov",
    "Nystrom",
    "Step",
    "hypergradient",
]
