"""Arithmetic on named tensors, ``dict[str, Tensor]``: the form of ``x``, ``y`` and every derivative."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Params: TypeAlias = dict[str, Tensor]


def of(module: nn.Module) -> Params:
    """Returns the trainable parameters of ``module`` by name; frozen ones (``requires_grad=False``) are left out."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def detach(tree: Params) -> Params:
    """Returns the same values, cut off from any graph (no copy)."""
    return {name: t.detach() if t.requires_grad else t for name, t in tree.items()}


def leaf(tree: Params) -> Params:
    """Returns the same values as fresh leaves that require gradients (no copy)."""
    return {name: t.detach().requires_grad_() for name, t in tree.items()}


def clone(tree: Params) -> Params:
    """Returns detached copies."""
    return {name: t.detach().clone() for name, t in tree.items()}


def zeros_like(tree: Params) -> Params:
    """Returns zeros of the same shapes, types and devices."""
    return {name: torch.zeros_like(t) for name, t in tree.items()}


def axpy(a: float | Tensor, x: Params, y: Params) -> Params:
    """Returns ``a x + y``."""
    if isinstance(a, Tensor):
        return {name: torch.addcmul(y[name], a, t) for name, t in x.items()}
    return {name: torch.add(y[name], t, alpha=a) for name, t in x.items()}


def dot(x: Params, y: Params) -> Tensor:
    """Returns the inner product, a scalar."""
    return _plain(torch.stack([torch.sum(t * y[name]) for name, t in x.items()]).sum())


def norm(x: Params) -> Tensor:
    """Returns the Euclidean norm over all entries of all tensors, a scalar."""
    norms = torch.stack([torch.linalg.vector_norm(t) for t in x.values()])
    return _plain(torch.linalg.vector_norm(norms))


def divided(t: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which each process has a part (`sharding`)."""
    return hasattr(t, "full_tensor")


def _plain(t: Any) -> Tensor:
    """Returns a scalar over all parts of divided tensors as a usual one."""
    plain: Tensor = t.full_tensor() if divided(t) else t
    return plain


def mean(trees: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """Returns the average of trees with equal names; ``weights`` are relative, default equal."""
    if len(trees) == 1:
        return trees[0]
    weights = [1.0] * len(trees) if weights is None else weights
    total = sum(weights)
    return {
        name: torch.stack([w / total * tree[name] for w, tree in zip(weights, trees, strict=True)]).sum(0)
        for name in trees[0]
    }


def repeat(tree: Params, number: int | None) -> Params:
    """Returns the tree ``number`` times along a new leading dimension, without copies; None: as it is."""
    return tree if number is None else {name: t.expand(number, *t.shape) for name, t in tree.items()}


@torch.no_grad()
def assign(module: nn.Module, values: Params) -> None:
    """Writes ``values`` into the parameters of ``module`` in place."""
    for name, p in of(module).items():
        p.copy_(values[name])


def grad(output: Tensor, *inputs: Params, create_graph: bool = False) -> tuple[Params, ...]:
    """Returns the gradients of a scalar, one tree an input; what does not influence ``output`` gets zeros."""
    return vjp([output], [None], *inputs, create_graph=create_graph)


def vjp(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    *inputs: Params,
    create_graph: bool = False,
    retain_graph: bool | None = None,
    batched: bool = False,
) -> tuple[Params, ...]:
    """Returns the vector-Jacobian products ``sum_i cotangent_i^T d output_i / d input``, one tree an input.

    With ``batched`` the cotangents, and the products, are stacked in front of their shapes.
    """
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    number = [len(c) for c in cotangents[:1] if c is not None] if batched else []
    if not pairs:
        return tuple({name: t.new_zeros((*number, *t.shape)) for name, t in tree.items()} for tree in inputs)
    flat = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            [t for tree in inputs for t in tree.values()],
            [c for _, c in pairs],
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )
    )
    return tuple(
        {name: t.new_zeros((*number, *t.shape)) if (g := next(flat)) is None else g for name, t in tree.items()}
        for tree in inputs
    )
