"""What the single-loop stochastic methods share: directions made by an estimator."""

from abc import ABC
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from bilevel_lightning.algorithms.penalty import Loopless
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.estimators import Estimator, Memory, Plain, Term
from bilevel_lightning.task import Bilevel, Draws
from bilevel_lightning.tree import Params


class Estimated(Loopless, ABC):
    """Base of the stochastic methods whose directions an `Estimator` makes.

    SAGA and SARAH need data that know of them, such as `TwoLevelData`.

    Args:
        estimator: of the directions.
        **kwargs: settings of `SingleLoop`, but for ``dynamics`` and ``lower_steps``.

    Raises:
        BilevelError: if warm_start is False; if the lower level has a fixed-point map, a projection or a proximal map;
            or if the estimator has a memory and the task prepares batches, which then differ between iterations.
    """

    def __init__(self, *, estimator: Estimator, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not self.warm_start:
            raise BilevelError(f"{type(self).__name__} steps y once in an iteration: it needs warm_start = True.")
        self.estimator, self.partitioned = estimator, estimator.partitioned

    @override
    def configure_model(self) -> None:
        task = type(self.hooks)
        if not isinstance(self.estimator, Plain) and task.prepare is not Bilevel.prepare:
            raise BilevelError(
                f"{type(self.estimator).__name__} compares directions of several iterations, and prepare(batch) makes "
                "upper variables that live for one: use Plain as estimator, or leave prepare out."
            )
        if not isinstance(self.estimator, Plain) and self.hooks.stored_lowers:
            raise BilevelError(
                f"{type(self.estimator).__name__} compares directions of successive iterations, and an episode's y is "
                "stored until the episode comes again: use Plain as estimator."
            )
        for hook in ("prox_lower", "project_lower", "fixed_point_map"):
            if getattr(task, hook) is not getattr(Bilevel, hook):
                raise BilevelError(
                    f"{type(self).__name__} solves g_yy v = f_y, which does not hold with {hook}: use BSGM or AmIGO."
                )
        super().configure_model()

    def memory(self, point: Params, terms: Sequence[Params], levels: Sequence[str]) -> dict[str, Params]:
        """Returns the estimator's first memory; ``levels``: of whose minibatches each term is a mean."""
        data: Any = getattr(self._trainer, "datamodule", None)
        parts: dict[str, int] = data.parts() if self.partitioned and hasattr(data, "parts") else {}
        return self.estimator.start(point, terms, [parts.get(level, 1) for level in levels])

    def directions(self, terms: Sequence[Term], point: Params) -> tuple[Params, Memory]:
        """Returns the estimated directions, and the estimator's memory after them."""
        k, estimator = self.batches, self.estimator
        return estimator.estimate(terms, point, self.remembered(), k, estimator.restarts(k))

    def remembered(self) -> dict[str, Params]:
        """Returns all that is kept."""
        return {name: kept for name in self.states if (kept := self.kept(name)) is not None}

    @override
    def minibatches(self, k: int) -> tuple[Draws, Draws]:
        size = 0 if self.estimator.whole and self.estimator.restarts(k) else 1
        return [size], [size]


def joined(**parts: Params) -> Params:
    """Returns named trees as one; names begin with that of their tree and a slash."""
    return {f"{prefix}/{name}": t for prefix, part in parts.items() for name, t in part.items()}


def part(point: Params, prefix: str) -> Params:
    """Returns one of the trees that were `joined`."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in point.items() if name.startswith(f"{prefix}/")}


def scaled(a: float, values: Params) -> Params:
    """Returns ``a values``."""
    return {name: a * t for name, t in values.items()}
