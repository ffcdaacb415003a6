"""Confidence intervals over episodes."""

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class Interval(Metric):
    r"""Half the width of a 95 % confidence interval of a mean: ``1.96 s / sqrt(n)``, s the standard deviation.

    s has n - 1 in its denominator; with a single value the width is 0. The values of all processes are
    gathered.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    @override
    def update(self, values: Tensor) -> None:
        self.values.append(values.detach().reshape(-1))

    @override
    def compute(self) -> Tensor:
        values = torch.cat(self.values) if isinstance(self.values, list) else self.values
        if len(values) < 2:
            return values.new_zeros(())
        width: Tensor = 1.96 * values.std() / len(values) ** 0.5
        return width
