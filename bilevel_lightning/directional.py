r"""The slope ``d/d eps g(x, y + eps v)`` at eps = 0, as a differentiable function of (x, y).

It equals ``<g_y, v>``, and its gradient is (g_xy v, g_yy v). But g_y itself is not evaluated: a layer ``z W^T`` is
differentiated in eps as ``z V^T``, and its gradient ``r^T z``, as costly as the layer, is never needed. For a linear
model that is three products with the data where reverse mode over reverse mode takes four.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.tree import Params

PRODUCTS = {linear, torch.matmul, torch.mm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.__matmul__}
"""Functions of two factors, and perhaps a bias, that are linear in the second one."""


def slope(loss: Callable[[Params, Params], Tensor], x: Params, y: Params, v: Params) -> Tensor:
    """Returns ``<g_y(x, y), v>`` for the scalar loss g, differentiable in what of x and y requires gradients.

    Args:
        loss: g(x, y).
        x: upper variables.
        y: lower variables.
        v: direction, by the names of y.
    """
    eps = next(iter(y.values())).new_zeros((), requires_grad=True)
    with torch.enable_grad():
        moved: Params = {name: _Moved.of(t, v[name], eps) for name, t in y.items()}
        return tree.grad(loss(x, moved), {"eps": eps}, create_graph=True)[0]["eps"]


class _Shift(torch.autograd.Function):
    """``value + eps change`` at eps = 0."""

    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(value: Tensor, change: Tensor, eps: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, change, eps = inputs
        ctx.save_for_backward(change)
        ctx.dtype = eps.dtype

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (r,), (change,) = cotangents, ctx.saved_tensors
        return r, None, torch.sum(r * change, dtype=ctx.dtype)


class _Moved(Tensor):
    """``value + eps change``, of which products are taken with ``value`` and with ``change`` apart."""

    parts: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def of(value: Tensor, change: Tensor, eps: Tensor) -> "_Moved":
        moved: _Moved = torch.addcmul(value, eps, change).as_subclass(_Moved)
        moved.parts = value, change, eps
        return moved

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in PRODUCTS and len(args) > 1 and isinstance(args[1], _Moved):
                value, change, eps = args[1].parts
                along = func(args[0], value, *args[2:], **kwargs), func(args[0], change)
                return _Shift.apply(*along, eps)
            return func(*args, **kwargs)
