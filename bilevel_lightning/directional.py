r"""The slope ``d/d eps g(x, y + eps v)`` at eps = 0, as a differentiable function of (x, y).

It equals ``<g_y, v>``, and its gradient is (g_xy v, g_yy v). But g_y itself is not evaluated: a layer ``z W^T`` is
differentiated in eps as ``z V^T``, and its gradient ``r^T z``, as costly as the layer, is never needed. ``z W^T`` and
``z V^T`` are one product, ``z [W; V]^T``, which for many samples and few outputs costs hardly more than either. For a
linear model that is two products with the data where reverse mode over reverse mode takes four.
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


class _Layers(torch.autograd.Function):
    """``z W^T`` and ``z V^T`` in one pass over z. Like `_Shift`, it has no gradient in V."""

    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(z: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        both = linear(z, torch.cat([w, v]))
        return both[..., : len(w)], both[..., len(w) :]

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        z, *weights = ctx.saved_tensors
        d_z = [r @ w for r, w in zip(cotangents, weights, strict=True) if r is not None and ctx.needs_input_grad[0]]
        r, d_w = cotangents[0], None
        if r is not None and ctx.needs_input_grad[1]:
            d_w = r.reshape(-1, r.shape[-1]).T @ z.reshape(-1, z.shape[-1])
        return sum(d_z[1:], start=d_z[0]) if d_z else None, d_w, None


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
                if func is linear and _tall(args[0], value):
                    product, along = _Layers.apply(args[0], value, change)
                    bias = args[2] if len(args) > 2 else kwargs.get("bias")
                    return _Shift.apply(product if bias is None else product + bias, along, eps)
                return _Shift.apply(func(args[0], value, *args[2:], **kwargs), func(args[0], change), eps)
            return func(*args, **kwargs)


def _tall(z: Tensor, w: Tensor) -> bool:
    """Whether z has at least as many rows as the layer has outputs; autocast's own casts are left alone."""
    return w.dim() == 2 and z.numel() >= w.numel() and not torch.is_autocast_enabled(z.device.type)
