r"""Linear layers of many samples and some ten outputs, with their products in the order that a CPU is fast at.

``z W^T`` is taken as ``(W z^T)^T``, and likewise ``z U^T``, which comes up where the weight's gradient ``r^T z`` is
differentiated along U. Autograd chooses the order of the latter by how ``r^T`` lies in memory, which is why the layer
has a derivative of its own here. `python benchmarks/order.py` measures which layers gain.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from typing_extensions import override

from bilevel_lightning.tree import Params

OUTPUTS, INPUTS, ENTRIES = range(8, 16), 512, 1_000_000
"""Of the layers that gain: numbers of outputs, least number of inputs, and least number of entries of z."""


def quick(y: Params) -> Params:
    """Returns y with the weights of such layers marked; the values, and what is computed of them, are the same.

    Where a dispatch mode listens, as in recording (`compiled`), there are no marks: modes know plain tensors only.
    """
    if torch._C._len_torch_dispatch_stack():
        return y
    return {name: _Weight.of(t) if _suits(t) else t for name, t in y.items()}


def _suits(t: Tensor) -> bool:
    return t.ndim == 2 and len(t) in OUTPUTS and t.shape[1] >= INPUTS and t.device.type == "cpu" and type(t) is Tensor


class _Weight(Tensor):
    """A weight that knows itself without the mark."""

    plain: Tensor

    @staticmethod
    def of(t: Tensor) -> "_Weight":
        weight: _Weight = t.as_subclass(_Weight)
        weight.plain = t
        return weight

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is linear and len(args) > 1 and isinstance(args[1], cls) and _tall(args[0]):
                product, bias = _Product.apply(args[0], args[1].plain), args[2] if len(args) > 2 else kwargs.get("bias")
                return product if bias is None else product + bias
            return func(*args, **kwargs)


def _tall(z: Tensor) -> bool:
    """Whether z has many rows; autocast's own casts are left alone."""
    return z.ndim == 2 and z.numel() >= ENTRIES and not torch.is_autocast_enabled("cpu")


class _Product(torch.autograd.Function):
    """``z W^T``."""

    generate_vmap_rule = True

    @staticmethod
    @override
    def forward(z: Tensor, w: Tensor) -> Tensor:
        return (w @ z.T).T.contiguous()

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (r,), (z, w) = cotangents, ctx.saved_tensors
        return r @ w if ctx.needs_input_grad[0] else None, r.T.contiguous() @ z if ctx.needs_input_grad[1] else None
