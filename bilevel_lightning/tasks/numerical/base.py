"""What the problems with known solutions share: many starts in one run, and the errors that are reported."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from pytorch_lightning import Callback
from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning.callbacks.numerical import PathFigure, SolutionError
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.task import BilevelTask

Starts: TypeAlias = int | Sequence[tuple[float, float]]
"""How many starts are drawn, or the starts (x_0, y_0), of which each entry of x and of y gets its number."""

Ranges: TypeAlias = tuple[tuple[float, float], tuple[float, float]]
"""Bounds of the entries of x and of y between which starts are drawn uniformly; figures show at least these."""


class NumericalTask(BilevelTask):
    r"""A problem without data, solved from many starts in one run.

    x has shape ``(starts, n)``, y ``(starts, m)``. The losses are the sums of f and g over the starts, so that no start
    influences the gradients of another: update rules that act entry by entry (gradient descent, momentum, Adam, and all
    that is unrolled) run the starts independently. Rules with inner products, norms or stopping tests over all of x or
    y, such as conjugate gradient, Anderson's mixing, BOME's multiplier or `upper_clip_norm`, mix them; take one start
    there.

    What is known of the solution is for reporting only: no loss and no step reads it. The metrics are ``error_x`` and
    ``error_y``, the means over the starts of `errors`; with several starts also ``error_x_max`` and ``error_y_max``;
    and ``hyper_gap``, the mean of F(x) - F*, where F(x) = f(x, y*(x)) has a closed form. F* is its global minimum.

    Args:
        n: number of entries of x.
        m: number of entries of y.
        starts: number of starts, drawn uniformly from ``ranges``; or the starts themselves, pairs of numbers: the value
            of all entries of x and that of all entries of y.
        ranges: lowest and highest value of the entries of x, and of those of y; used where ``starts`` is a number.
        seed: of the draw.

    Attributes:
        starts: number of starts.

    Raises:
        BilevelError: if there is no start, or a range is empty.
    """

    def __init__(self, n: int, m: int, starts: Starts, ranges: Ranges, seed: int) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(starts, int):
            positive(f"{name}.starts", starts)
        elif not starts or any(len(pair) != 2 for pair in starts):
            raise BilevelError(f"{name}.starts must be a number or a list of pairs (x_0, y_0), got {starts}.")
        if any(low > high for low, high in ranges):
            raise BilevelError(f"{name}.ranges must be pairs (low, high) of x and of y, got {ranges}.")
        self.ranges, self.starts = ranges, starts if isinstance(starts, int) else len(starts)
        generator = torch.Generator().manual_seed(seed)
        points = []
        for level, size in enumerate((n, m)):
            if isinstance(starts, int):
                low, high = ranges[level]
                point = low + (high - low) * torch.rand(starts, size, dtype=torch.float64, generator=generator)
            else:
                point = torch.tensor([pair[level] for pair in starts], dtype=torch.float64)[:, None].repeat(1, size)
            points.append(point.to(torch.get_default_dtype()))
        self.upper: nn.ParameterDict = nn.ParameterDict({"x": points[0]})
        self.lower: nn.ParameterDict = nn.ParameterDict({"y": points[1]})

    @abstractmethod
    def f(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the upper loss of each start, shape ``(starts,)``."""

    @abstractmethod
    def g(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the lower loss of each start, without a nonsmooth term, shape ``(starts,)``."""

    def solutions(self) -> tuple[Tensor, Tensor] | None:
        """Returns the known x* and y*, shapes ``(k, n)`` and ``(k, m)``, in float64; default: none is known."""
        return None

    def lower_solutions(self, x: Tensor) -> Tensor | None:
        """Returns minimisers of g(x, .), shape ``(k, starts, m)``; default: no closed form.

        There may be more than these, but one with the least f is among them. NaN where there are fewer than k.
        """
        return None

    def hyper_objective(self, x: Tensor) -> Tensor | None:
        """Returns F(x), the least f(x, y) over the minimisers y of g(x, .), shape ``(starts,)``."""
        candidates = self.lower_solutions(x)
        if candidates is None:
            return None
        return torch.stack([self.f(x, y) for y in candidates]).nan_to_num(nan=torch.inf).amin(0)

    def nearest(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Returns for each start the number of the known solution that is nearest to (x, y), shape ``(starts,)``."""
        known = self.solutions()
        if known is None:
            return None
        squares = [(p[:, None] - s.to(p)).square().sum(-1) for p, s in zip((x, y), known, strict=True)]
        return (squares[0] + squares[1]).argmin(1)

    def nearest_solution(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns for each start the known solution that is nearest to (x, y), in the type of x."""
        known, index = self.solutions(), self.nearest(x, y)
        return None if known is None else (known[0].to(x)[index], known[1].to(y)[index])

    def errors(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Returns the errors ``x`` and ``y`` of each start, shape ``(starts,)``; nothing where no solution is known.

        They are |x - x*| / |x*| and |y - y*| / |y*| for the nearest solution; where that is zero, not divided.
        """
        nearest = self.nearest_solution(x, y)
        return {} if nearest is None else {"x": _relative(x, nearest[0]), "y": _relative(y, nearest[1])}

    @override
    def upper_loss(self, batch: Any) -> Tensor:
        return self.f(self.upper["x"], self.lower["y"]).sum()

    @override
    def lower_loss(self, batch: Any) -> Tensor:
        return self.g(self.upper["x"], self.lower["y"]).sum()

    @override
    @torch.no_grad()
    def metrics(self, batch: Any) -> dict[str, Tensor]:
        x, y = self.upper["x"], self.lower["y"]
        errors = self.errors(x, y)
        found = {f"error_{name}": error.mean() for name, error in errors.items()}
        if len(x) > 1:
            found |= {f"error_{name}_max": error.amax() for name, error in errors.items()}
        known, value = self.solutions(), self.hyper_objective(x)
        if known is not None and value is not None:
            best = self.hyper_objective(known[0].to(x))
            assert best is not None
            found["hyper_gap"] = value.mean() - best.amin()
        return found

    @override
    def callbacks(self) -> list[Callback]:
        one_dimensional = self.upper["x"].shape[1] == self.lower["y"].shape[1] == 1
        return [SolutionError(), *([PathFigure()] if one_dimensional else [])]


def _relative(point: Tensor, solution: Tensor) -> Tensor:
    scale: Tensor = torch.linalg.vector_norm(solution, dim=1)
    distance: Tensor = torch.linalg.vector_norm(point - solution, dim=1)
    return distance / scale.where(scale > 0, 1.0)
