"""Products with sparse inputs that can be differentiated any number of times."""

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override


class Sparse(NamedTuple):
    """A sparse matrix of samples, with its transpose, so that a derivative costs what the product costs.

    torch's own product with a CSR matrix has right derivatives too, but sorts the matrix anew in each of them
    (docs/selection.md has the time of both).

    Attributes:
        rows: CSR tensor, shape ``(samples, features)``.
        columns: its transpose, CSR, shape ``(features, samples)``.
    """

    rows: Tensor
    columns: Tensor


Inputs: TypeAlias = Tensor | Sparse
"""Samples by features, dense or sparse."""


def matmul(inputs: Inputs, weight: Tensor) -> Tensor:
    """Returns ``inputs weight``, shape ``(samples, outputs)``, for a weight of shape ``(features, outputs)``."""
    if isinstance(inputs, Sparse):
        product: Tensor = _Product.apply(inputs.rows, inputs.columns, weight)
        return product
    return inputs @ weight


class _Product(torch.autograd.Function):
    """A W. It is linear in W, and its adjoint is the product with the transpose: the same function once more."""

    @staticmethod
    @override
    def forward(rows: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
        return rows @ weight

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        rows, columns, _ = inputs
        ctx.save_for_backward(rows, columns)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        rows, columns = ctx.saved_tensors
        return None, None, _Product.apply(columns, rows, grad)

    @staticmethod
    @override
    def vmap(info: Any, in_dims: Any, rows: Tensor, columns: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        """Several weights side by side are more outputs of one."""
        moved = weight.movedim(in_dims[2], 2)
        product = _Product.apply(rows, columns, moved.flatten(1))
        return product.unflatten(1, moved.shape[1:]), 2
