r"""A loss's gradient in y as a differentiable function of (x, y), by one of several rules.

With v a cotangent of g_y, the products g_xy v and g_yy v come

* ``graph``: from the graph that the gradient was computed with (reverse over reverse);
* ``recompute``: from the slope of the loss along v (`directional`), evaluated when the products are needed, so that
  only (x, y) is kept;
* ``mixed``: from the derivative of (g_x, g_y) along (0, v), forward over reverse, also with only (x, y) kept;
* ``differences``: from central differences ``(g_.(x, y + eps v) - g_.(x, y - eps v)) / (2 eps)``, eps = radius / |v|.

Second derivatives of attention exist only for its plain implementation, so that one is chosen inside.

`in_parts` is another matter: a mean of losses whose first derivatives are gathered one after the other.
"""

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from bilevel_lightning import randomness, tree
from bilevel_lightning.directional import slope
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.layers import quick
from bilevel_lightning.tree import Params

Loss: TypeAlias = Callable[[Params, Params], Tensor]
Pair: TypeAlias = tuple[Params, Params]
Rule: TypeAlias = Literal["graph", "recompute", "mixed", "differences"]


class Target(NamedTuple):
    """A loss, what to call at each further evaluation of its gradient, and the radius of the differences."""

    loss: Loss
    evaluated: Callable[[], None]
    radius: float


class PlainAttention:
    """Attention inside is evaluated by its plain implementation (`torch.nn.attention.sdpa_kernel`, but lighter)."""

    def __enter__(self) -> None:
        backends: Any = torch.backends.cuda
        self.before = backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.cudnn_sdp_enabled()
        self._set(False, False, False)

    def __exit__(self, *error: object) -> None:
        self._set(*self.before)

    @staticmethod
    def _set(flash: bool, efficient: bool, cudnn: bool) -> None:
        backends: Any = torch.backends.cuda
        backends.enable_flash_sdp(flash)
        backends.enable_mem_efficient_sdp(efficient)
        backends.enable_cudnn_sdp(cudnn)


def gradient(target: Target, x: Params, y: Params, rule: Rule) -> Params:
    """Returns the gradient of the loss in y as a function of x and y that is differentiable by ``rule``."""
    if rule == "graph":
        with torch.enable_grad(), PlainAttention():
            y = {name: t if t.requires_grad else t.detach().requires_grad_() for name, t in y.items()}
            return tree.grad(target.loss(x, quick(y)), y, create_graph=True)[0]
    found = _Gradient.apply(target, rule, (list(x), list(y)), *x.values(), *y.values())
    return dict(zip(y, found, strict=True))


class _Gradient(torch.autograd.Function):
    """The gradient with only its arguments kept; its products by the rules that evaluate the loss again."""

    @staticmethod
    @override
    def forward(ctx: Any, target: Target, rule: Rule, names: tuple[list[str], list[str]], *values: Tensor) -> Any:
        ctx.target, ctx.rule, ctx.names = target, rule, names
        ctx.random = randomness.state(values)
        ctx.save_for_backward(*values)
        x, y = _named(names, values)
        return tuple(_first(target.loss, x, y, {}, y)[1].values())

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        x, y = _named(ctx.names, ctx.saved_tensors)
        v = dict(zip(y, cotangents, strict=True))
        needed = ctx.needs_input_grad[3:]
        x_wanted, y_wanted = dict(compress(x.items(), needed)), dict(compress(y.items(), needed[len(x) :]))
        with randomness.replayed(ctx.random):
            d_x, d_y = PRODUCTS[ctx.rule](ctx.target, x, y, v, x_wanted, y_wanted)
        return None, None, None, *(d_x.get(name) for name in x), *(d_y.get(name) for name in y)


def _named(names: tuple[list[str], list[str]], values: tuple[Tensor, ...]) -> Pair:
    cut = len(names[0])
    x, y = dict(zip(names[0], values[:cut], strict=True)), dict(zip(names[1], values[cut:], strict=True))
    return tree.detach(x), tree.detach(y)


def _first(loss: Loss, x: Params, y: Params, x_wanted: Params, y_wanted: Params) -> Pair:
    """Returns the gradients of the loss at (x, y) in the wanted variables, without a graph."""
    x_leaf, y_leaf = tree.leaf({n: x[n] for n in x_wanted}), tree.leaf({n: y[n] for n in y_wanted})
    with torch.enable_grad():
        g_x, g_y = tree.grad(loss({**x, **x_leaf}, {**y, **y_leaf}), x_leaf, y_leaf)
    return g_x, g_y


def _recompute(target: Target, x: Params, y: Params, v: Params, x_wanted: Params, y_wanted: Params) -> Pair:
    target.evaluated()
    x_leaf, y_leaf = tree.leaf(x_wanted), tree.leaf(y_wanted)
    with PlainAttention():
        along_v = slope(target.loss, {**x, **x_leaf}, {**y, **y_leaf}, v)
        d_x, d_y = tree.grad(along_v, x_leaf, y_leaf)
    return d_x, d_y


def _mixed(target: Target, x: Params, y: Params, v: Params, x_wanted: Params, y_wanted: Params) -> Pair:
    target.evaluated()

    def gradients(y: Params) -> Pair:
        pair: Pair = torch.func.grad(lambda x_w, y: target.loss({**x, **x_w}, y), argnums=(0, 1))(x_wanted, y)
        return pair

    with PlainAttention():
        d_x, d_y = torch.func.jvp(gradients, (y,), (v,))[1]
    return d_x, {n: d_y[n] for n in y_wanted}


def _differences(target: Target, x: Params, y: Params, v: Params, x_wanted: Params, y_wanted: Params) -> Pair:
    norm = float(tree.norm(v))
    if norm == 0:
        return tree.zeros_like(x_wanted), tree.zeros_like(y_wanted)
    radius, random = target.radius / norm, randomness.state(y.values())

    def side(shift: float) -> Pair:
        target.evaluated()
        with randomness.replayed(random):
            return _first(target.loss, x, tree.axpy(shift, v, y), x_wanted, y_wanted)

    above, below = side(radius), side(-radius)
    d_x = {n: (above[0][n] - below[0][n]) / (2 * radius) for n in x_wanted}
    return d_x, {n: (above[1][n] - below[1][n]) / (2 * radius) for n in y_wanted}


PRODUCTS = {"recompute": _recompute, "mixed": _mixed, "differences": _differences}


_FIRST_ORDER = (
    "samples_at_once is for methods without second derivatives (MEHA, F2SA, VPBGD, BOME, DARTS, SAMA, ...): leave it "
    "out, or lower the batch size."
)


def in_parts(losses: Sequence[Loss], weights: Sequence[float]) -> Loss:
    """Returns the sum of ``losses`` times ``weights``, of whose graphs only one exists at a time (accumulation).

    Its first derivatives are computed with its value, so that memory is that of one part; second ones do not exist.
    """
    if len(losses) == 1:
        return losses[0]

    def loss(x: Params, y: Params) -> Tensor:
        if torch._C._are_functorch_transforms_active():  # the rule ``mixed``
            raise BilevelError(_FIRST_ORDER)
        total: Tensor = _InParts.apply(losses, weights, (list(x), list(y)), *x.values(), *y.values())
        return total

    return loss


class _InParts(torch.autograd.Function):
    """The weighted sum of losses, with its gradients kept instead of its graph."""

    @staticmethod
    @override
    def forward(
        ctx: Any, losses: Sequence[Loss], weights: Sequence[float], names: tuple[list[str], list[str]], *values: Tensor
    ) -> Tensor:
        x, y = _named(names, values)
        needed = ctx.needs_input_grad[3:]
        x_leaf = tree.leaf(dict(compress(x.items(), needed)))
        y_leaf = tree.leaf(dict(compress(y.items(), needed[len(x) :])))
        total, d_x, d_y = values[0].new_zeros(()), tree.zeros_like(x_leaf), tree.zeros_like(y_leaf)
        for loss, weight in zip(losses, weights, strict=True):
            with torch.set_grad_enabled(any(needed)):
                value = weight * loss({**x, **x_leaf}, {**y, **y_leaf})
                g_x, g_y = tree.grad(value, x_leaf, y_leaf)
            total, d_x, d_y = total + value.detach(), tree.axpy(1.0, g_x, d_x), tree.axpy(1.0, g_y, d_y)
        ctx.found, ctx.names = (d_x, d_y), names
        return total

    @staticmethod
    @override
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise BilevelError(_FIRST_ORDER)
        d_x, d_y = ({name: cotangent * t for name, t in part.items()} for part in ctx.found)
        x, y = ctx.names
        return None, None, None, *(d_x.get(name) for name in x), *(d_y.get(name) for name in y)
