"""Warm-started relatives of BSGM: stocBiO, AmIGO, ALSET."""

from typing import Any

from bilevel_lightning.algorithms.bsgm import BSGM, Count


class StocBiO(BSGM):
    r"""stocBiO: `BSGM` that goes on from the last y, but solves the linear system anew.

    From v = rho f_y, K steps on fresh minibatches are the Neumann series
    rho sum_{q=0..K} prod_{j=K-q+1..K} (I - rho H_j) f_y.

    Args:
        lower_steps: T. Default 10.
        linear_steps: K. Default 10; both as in M. Dagréou et al., "A framework for bilevel optimization that enables
            stochastic and global variance reduction algorithms", NeurIPS 2022.
        cross_samples: J. Default 1.
        warm_start: as in `BilevelModule`. Default True.
        **kwargs: settings of `BSGM`.

    References:
        K. Ji, J. Yang, Y. Liang. Bilevel Optimization: Convergence Analysis and Enhanced Design. ICML 2021.
    """

    def __init__(
        self,
        *,
        lower_steps: Count = 10,
        linear_steps: Count | None = 10,
        cross_samples: Count | None = 1,
        warm_start: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            lower_steps=lower_steps,
            linear_steps=linear_steps,
            cross_samples=cross_samples,
            warm_start=warm_start,
            **kwargs,
        )


class AmIGO(StocBiO):
    r"""AmIGO: `StocBiO` that also goes on from the last v.

    With T = K = 1 and ``order="simultaneous"`` its iteration is that of `SOBA`.

    Args:
        warm_start_linear: start from the last v. Default True.
        **kwargs: settings of `StocBiO`, with its defaults.

    References:
        M. Arbel, J. Mairal. Amortized Implicit Differentiation for Stochastic Bilevel Optimization. ICLR 2022.
    """

    def __init__(self, *, warm_start_linear: bool = True, **kwargs: Any) -> None:
        super().__init__(warm_start_linear=warm_start_linear, **kwargs)


class ALSET(StocBiO):
    r"""ALSET: `StocBiO` with a single lower step.

    Args:
        lower_steps: T. Default 1.
        **kwargs: settings of `StocBiO`, with its defaults.

    References:
        T. Chen, Y. Sun, W. Yin. Closing the Gap: Tighter Analysis of Alternating Stochastic Gradient Methods for
        Bilevel Problems. NeurIPS 2021.
    """

    def __init__(self, *, lower_steps: Count = 1, **kwargs: Any) -> None:
        super().__init__(lower_steps=lower_steps, **kwargs)
