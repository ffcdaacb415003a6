"""Sparse products and their derivatives against torch's own and dense ones, on generated text.

python benchmarks/sparse.py
"""

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel_lightning.datamodules import SyntheticText
from bilevel_lightning.sparse import matmul


def cpu(product: Callable[[Tensor], Tensor], labels: Tensor, weight: Tensor, repeats: int = 5) -> tuple[float, float]:
    """Returns milliseconds of CPU time of a gradient, and of a product with the Hessian after it."""
    first = second = 0.0
    for _ in range(repeats):
        start = time.process_time()
        (gradient,) = torch.autograd.grad(cross_entropy(product(weight), labels), weight, create_graph=True)
        middle = time.process_time()
        torch.autograd.grad(gradient, weight, weight.detach())
        first, second = first + middle - start, second + time.process_time() - middle
    return 1e3 * first / repeats, 1e3 * second / repeats


torch.set_num_threads(1)
data = SyntheticText()
data.setup()
weight = torch.zeros(data.features, data.classes, requires_grad=True)
table = Table("rows", "product", "gradient, ms", "Hessian product, ms")
for name, index in (("all", slice(None)), ("64", torch.arange(64))):
    inputs, labels = data.train[0][index], data.train[1][index]
    products = {"sparse.matmul": lambda w: matmul(inputs, w), "torch CSR": lambda w: inputs.rows @ w}  # noqa: B023
    if name == "64":
        dense = inputs.rows.to_dense()
        products["dense"] = lambda w: dense @ w  # noqa: B023
    for label, product in products.items():
        table.add_row(name, label, *(f"{ms:.3g}" for ms in cpu(product, labels, weight)))
Console().print(table)
