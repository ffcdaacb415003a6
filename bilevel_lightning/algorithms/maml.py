"""MAML and what derives from it: the start of the lower level is learnt."""

from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.algorithms.rhg import RHG
from bilevel_lightning.binding import own
from bilevel_lightning.dynamics import Dynamics, GradientDescent
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.hypergradients import reverse
from bilevel_lightning.module import Step
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.tree import Params

LEAST = 0.03
"""The share of 1/T that a step before the last keeps at the end of the annealing, as in MAML++."""


class MAML(RHG):
    r"""Model-agnostic meta-learning: `RHG` through ``lower_steps`` steps that start at y_0(x).

    min_x mean over episodes of f(x, y_T(x)), y_0 = y_0(x), y_{t+1} = Phi_t(y_t).

    Two options of MAML++ (Antoniou, Edwards, Storkey. How to Train Your MAML. ICLR 2019): step sizes learnt for each
    step (``dynamics: GradientDescent``, ``learn_lr: per_step``), and the loss over all steps, sum_t w_t f(x, y_t),
    whose weights go from 1/T each linearly to nearly all on the last (0.03/T remain to the others).

    Args:
        multi_step: number of upper iterations over which the weights go to the last step; 0 (default): f(x, y_T) alone.
        upper_optimizer: default Adam with step size 0.001, the paper's.
        dynamics: default gradient descent with step size 0.4, the paper's for Omniglot, 5 ways.
        lower_steps: default 1, as there.
        **kwargs: settings of `RHG`.

    Raises:
        BilevelError: if y_0 does not depend on x, or multi_step comes with truncation or first_order.

    References:
        C. Finn, P. Abbeel, S. Levine. Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks. ICML 2017.
    """

    compilable = False

    def __init__(
        self,
        *,
        multi_step: int = 0,
        upper_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=0.001),
        dynamics: Dynamics = GradientDescent(lr=0.4),  # noqa: B008 (a value: it has no state)
        lower_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(upper_optimizer=upper_optimizer, dynamics=dynamics, lower_steps=lower_steps, **kwargs)
        if multi_step < 0 or (multi_step and (self.first_order or self.truncation is not None)):
            raise BilevelError("multi_step must not be negative, and goes with neither first_order nor truncation.")
        self.multi_step = multi_step

    def weights(self, k: int) -> list[float]:
        """Returns w_1..w_T at upper iteration ``k``."""
        steps = self.lower_steps
        others = max(1 - k / self.multi_step, LEAST) / steps
        return [others] * (steps - 1) + [1 - (steps - 1) * others]

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        problem.initial(x)  # raises where there is none to learn
        if not self.multi_step:
            return super().bilevel_step(problem, x, y)
        weights = self.weights(self.global_step)

        def objective(x: Params, iterates: list[Params]) -> Tensor:
            return torch.stack([w * problem.f(x, y) for w, y in zip(weights, iterates, strict=True)]).sum()

        return Step(*reverse(problem, self.dynamics, x, y, self.lower_steps, memory=self.memory, objective=objective))


class FOMAML(MAML):
    r"""First-order MAML: `MAML` with d y_T / d y_0 := I, so that the direction is f_y at y_T.

    Args:
        first_order: default True.
        **kwargs: settings of `MAML`.

    References:
        C. Finn, P. Abbeel, S. Levine. Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks. ICML 2017.
    """

    def __init__(self, *, first_order: bool = True, **kwargs: Any) -> None:
        super().__init__(first_order=first_order, **kwargs)


class ANIL(MAML):
    r"""Almost no inner loop: `MAML` whose lower variables are the head alone, the body being only upper variables.

    Args:
        **kwargs: settings of `MAML`.

    Raises:
        BilevelError: if all upper variables are starts of lower ones.

    References:
        A. Raghu, M. Raghu, S. Bengio, O. Vinyals. Rapid Learning or Feature Reuse? Towards Understanding the
        Effectiveness of MAML. ICLR 2020.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @override
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        if sum(t.numel() for t in own(x).values()) <= sum(t.numel() for t in y.values()) // (problem.episodes or 1):
            raise BilevelError("ANIL adapts a part of the network: use FewShot with adapt 'head', or MAML.")
        return super().bilevel_step(problem, x, y)


class MetaSGD(MAML):
    r"""Meta-SGD: `MAML` with a learnt step size for each entry of y.

    ``y <- y - lr exp(theta) * g_y`` entry by entry, theta = 0 at first. The paper's step sizes may also become
    negative; these stay positive.

    Args:
        dynamics: default gradient descent from step size 0.1 with ``learn_lr: per_parameter``.
        **kwargs: settings of `MAML`.

    Raises:
        BilevelError: if dynamics does not learn them.

    References:
        Z. Li, F. Zhou, F. Chen, H. Li. Meta-SGD: Learning to Learn Quickly for Few-Shot Learning. arXiv 2017.
    """

    def __init__(
        self,
        *,
        dynamics: GradientDescent = GradientDescent(lr=0.1, learn_lr="per_parameter"),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        super().__init__(dynamics=dynamics, **kwargs)
        if getattr(dynamics, "learn_lr", False) != "per_parameter":
            raise BilevelError(
                "MetaSGD learns a step size for each parameter: set learn_lr to per_parameter, or use MAML."
            )
