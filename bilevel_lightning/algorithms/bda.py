"""Bilevel descent aggregation."""

from typing import Any

from bilevel_lightning.algorithms.rhg import RHG
from bilevel_lightning.dynamics import AggregatedDescent


class BDA(RHG):
    r"""Bilevel descent aggregation (BDA): `RHG` through lower steps that also descend the upper loss.

    ``y_{t+1} = prox(y_t - (alpha_t upper_lr f_y + (1 - alpha_t) lr g_y))``, and the hypergradient of f(x, y_T).

    Where g has many minimisers, the share of f leads to the one that f prefers. With alpha decreasing to zero, as by
    default and in the paper, y still comes to rest in argmin g; with a fixed alpha, as in the released torch code, it
    does not: on the scalar problem f = ((x-1)^2 + y^2)/2, g = y^2/2 - xy, with lr = upper_lr, the limit of x is
    1/(1 + (1-alpha)^2 (1-q)), q = (1 - lr)^T, not 1/2 (tests/algorithms/test_iapttgm_bda.py). At validation and test,
    where f would show the labels to predict, y descends g alone.

    Args:
        dynamics: the steps, with ``lr``, ``upper_lr`` and ``alpha``. Default 0.1, 0.1 and 0.5 / (1 + t).
        **kwargs: settings of `RHG`.

    References:
        R. Liu, P. Mu, X. Yuan, S. Zeng, J. Zhang. A Generic First-Order Algorithmic Framework for Bi-Level Programming
        Beyond Lower-Level Singleton. ICML 2020.
    """

    def __init__(self, *, dynamics: AggregatedDescent = AggregatedDescent(lr=0.1), **kwargs: Any) -> None:  # noqa: B008
        super().__init__(dynamics=dynamics, **kwargs)
