"""Adam, differentiable also in its own settings."""

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.dynamics.base import Learn, State, fraction, learnt_fraction
from bilevel_lightning.dynamics.descent import GradientDescent
from bilevel_lightning.errors import positive
from bilevel_lightning.schedules import Schedule
from bilevel_lightning.tree import Params


def mix(memory: Tensor, new: Tensor, weight: float | Tensor) -> Tensor:
    """Returns ``weight memory + (1 - weight) new``."""
    if isinstance(weight, Tensor):
        return new + weight * (memory - new)
    return torch.lerp(new, memory, weight)


class Adam(GradientDescent):
    r"""Adam (Kingma & Ba, ICLR 2015), differentiable, also in its settings.

    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``y <- prox(y - lr m / (1 - b1^(t+1)) / (sqrt(v / (1 - b2^(t+1))) + eps))``.

    Where v = 0 every gradient so far was zero; the derivative of the square root, infinite there, is multiplied by m =
    0, and we take the product as 0 (it would be NaN otherwise). The library `higher` loses the derivative in b2,
    because its bias correction leaves torch; ours is checked against finite differences in tests/test_dynamics.py.

    Args:
        lr: as in `GradientDescent`. Default 0.001, the paper's.
        betas: b1 and b2 in [0, 1). Default (0.9, 0.999), the paper's.
        eps: added to the root. Default 1e-8, the paper's.
        learn_lr: as in `GradientDescent`.
        learn_betas: learn both as upper variables theta, ``b = sigmoid(logit(b) + theta)``. Default False.
        learn_eps: learn eps as an upper variable theta, ``eps exp(theta)``. Default False.

    Raises:
        BilevelError: if a setting is out of its range.
    """

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        learn_lr: Learn = False,
        learn_betas: bool = False,
        learn_eps: bool = False,
    ) -> None:
        super().__init__(lr, learn_lr)
        b1, b2 = (fraction("Adam.betas", b, 0.0 if learn_betas else -1.0) for b in betas)
        self.betas, self.eps = (b1, b2), positive("Adam.eps", eps)
        self.learn_betas, self.learn_eps = learn_betas, learn_eps

    @override
    def learnable(self, steps: int, y: Params) -> Params:
        names = ["logit_beta1", "logit_beta2"] * self.learn_betas + ["log_eps_factor"] * self.learn_eps
        return {**super().learnable(steps, y), **{f"dynamics/{name}": torch.zeros(()) for name in names}}

    @override
    def linear_step(self) -> float | None:
        return None

    @override
    def start(self, y: Params) -> State:
        return (y, tree.zeros_like(y), tree.zeros_like(y))

    @override
    def direction(self, x: Params, g_y: Params, memory: list[Params], t: int) -> tuple[Params, list[Params]]:
        b1, b2 = (learnt_fraction(x, name, b) for name, b in zip(("beta1", "beta2"), self.betas, strict=True))
        eps = self.eps * x["dynamics/log_eps_factor"].exp() if "dynamics/log_eps_factor" in x else self.eps
        m = {name: mix(memory[0][name], g, b1) for name, g in g_y.items()}
        v = {name: mix(memory[1][name], g * g, b2) for name, g in g_y.items()}
        c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        return {name: m[name] / c1 / (self._root(v[name] / c2) + eps) for name in m}, [m, v]

    @staticmethod
    def _root(v: Tensor) -> Tensor:
        zero = v == 0
        return v.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
