"""Hypergradients without Lightning: one function."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel_lightning import algorithms, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.module import BilevelModule
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.task import BilevelTask
from bilevel_lightning.tree import Params


def hypergradient(
    problem: BilevelTask | tuple[Callable[[Params, Params], Tensor], Callable[[Params, Params], Tensor]],
    x: Params | None = None,
    y: Params | None = None,
    *,
    method: str | type[BilevelModule] = "RHG",
    batch: Any = None,
    **settings: Any,
) -> Params:
    """Returns the hypergradient of a task, or of two functions, by any algorithm of this package.

    Nothing is changed: neither the task's parameters nor ``x`` and ``y``. Where you solved the lower level by other
    means, use an implicit method with ``lower_steps=0``.

    Args:
        problem: a task, or the pair (f, g) of functions of (x, y), dictionaries of tensors, that return scalars.
        x: upper variables by name; default: the task's.
        y: start of the lower level by name; default: the task's.
        method: an algorithm or its name, such as ``"AIDCG"``; upper or lower case.
        batch: the task's batch, ``{"lower": ..., "upper": ...}``.
        **settings: of the algorithm: ``dynamics``, ``lower_steps``, ``truncation``, ``linear_solver``, ....

    Returns:
        The hypergradient, by the names of x; what the algorithm adds to x has a slash in its name, such as
        ``dynamics/...`` for learnt settings of the dynamics.

    Raises:
        BilevelError: if the method is unknown or its direction is no hypergradient (VPBGD, GPBGD, BOME, BVFSM, MEHA,
            which move x and y together; Reptile; IMAML, whose lower problem is another), a setting is impossible, or x
            or y is missing beside two functions.
    """
    if isinstance(method, str):
        found = {name.lower(): name for name in algorithms.__all__}
        if method.lower() not in found:
            raise BilevelError(f"There is no method {method!r}; choose one of {', '.join(algorithms.__all__)}.")
        method = getattr(algorithms, found[method.lower()])
    module = method(**settings)  # type: ignore[operator]
    if not module.estimates_hypergradient:
        raise BilevelError(
            f"The direction of {type(module).__name__} at one point is no hypergradient of this problem: "
            "use F2SA, the first-order method that solves the lower level, or RHG."
        )
    if not isinstance(problem, tuple):
        module.task = problem
        x = tree.of(problem.upper) if x is None else x
        y = problem.episode_lower(x, batch) if y is None else y
    if x is None or y is None:
        raise BilevelError("Two functions state the problem: give x and y, dictionaries of tensors.")
    like = next(iter(x.values()))
    added = {name: t.to(like) for name, t in module.added_upper(y).items()}
    x, y = tree.detach({**added, **x}), tree.detach(y)
    if isinstance(problem, tuple):
        return dict(module.bilevel_step(BilevelProblem(*problem), x, y).upper_grad)
    oracles, z, pull_back = bind(problem, batch, x)
    return pull_back(module.bilevel_step(oracles, z, y).upper_grad)
