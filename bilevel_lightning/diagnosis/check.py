"""The comparison of a hypergradient with what it should be."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from bilevel_lightning import tree
from bilevel_lightning.algorithms import AID
from bilevel_lightning.binding import bind, own
from bilevel_lightning.checks import check_losses
from bilevel_lightning.diagnosis.report import PRODUCTS, SETTLED, TOLERANCE, Report
from bilevel_lightning.errors import BilevelError, Diverged, positive
from bilevel_lightning.hypergradients import reverse
from bilevel_lightning.linear_solvers import Dense
from bilevel_lightning.module import BilevelModule, Step
from bilevel_lightning.problem import BilevelProblem, Operator
from bilevel_lightning.tree import Params

STEPS, NUMBERS = 2000, 10**8  # most lower steps of the reference, and numbers in all their iterates
GRID = [m * 10**e for e in range(7) for m in (1, 2, 5)]  # the T and K that are tried


def check(
    module: BilevelModule, batch: Any, *, reference_steps: int | None = None, directions: int = 3, seed: int = 0
) -> Report:
    """Compares an algorithm's hypergradient, at its task's current x and y, with what it should be.

    It works in float64 on a copy; nothing of the module changes. Of several episodes the first is taken.

    Args:
        module: an algorithm with its task.
        batch: the task's batch, ``{"lower": ..., "upper": ...}``.
        reference_steps: most lower steps of the reference. Default: 2000, or 4 T if that is more; fewer where their
            iterates would be more than 1e8 numbers. T or fewer: f(x, y_T(x)) itself is what you want.
        directions: how many random directions finite differences are taken along.
        seed: of these directions, and of all random numbers in the losses.

    Returns:
        The report: plain numbers, and ``report.words()``, what they mean.

    Raises:
        BilevelError: if a setting or a loss is wrong.
    """
    if not module.estimates_hypergradient:
        raise BilevelError(
            f"The direction of {type(module).__name__} at one point is no hypergradient of this problem: "
            "check the same task with --model F2SA or --model RHG, and watch train/gap in the run."
        )
    positive("directions", directions)
    positive("reference_steps", 1 if reference_steps is None else reference_steps)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _check(_Bench(module, batch, seed), reference_steps, directions)
    finally:
        torch.set_default_dtype(default)


class _Bench:
    """Evaluations of one problem, all with the same random numbers, on a copy of the module in float64."""

    def __init__(self, module: BilevelModule, batch: Any, seed: int) -> None:
        # Only modules and tensors are copied: what makes an optimizer, from a config, cannot be.
        shared = {id(v): v for n, v in vars(module).items() if n[0] != "_" and not isinstance(v, Tensor)}
        self.module = copy.deepcopy(module, shared)
        for part in self.module.modules():  # also tensors that are neither parameters nor buffers
            plain = {n: v for n, v in vars(part).items() if n[0] != "_" and isinstance(v, Tensor | list | tuple | dict)}
            vars(part).update(_double(plain))
        self.module.double().configure_model()
        self.x = tree.clone(self.module.upper_parameters())
        self.episode, self.seed = self.module.hooks.episodes(_double(batch))[0], seed

    @contextmanager
    def posed(self, x: Params | None = None) -> Iterator[tuple[BilevelProblem, Params, Params, Operator]]:
        """Gives the problem, its x, y_0 and the pull-back of gradients."""
        x, device = x or self.x, next(iter(self.x.values())).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(self.seed)
            if device.type == "cuda":
                torch.cuda.default_generators[device.index].manual_seed(self.seed)
            problem, z, pull_back = bind(self.module.hooks, self.episode, x)
            yield problem, z, self.module.start_lower(x, self.episode), pull_back

    def solved(self, steps: int) -> tuple[Params, float]:
        """Returns y after some lower steps, and how far it is from rest."""
        self.module.lower_steps, lr = steps, self.module.dynamics.linear_step() or 1.0
        with self.posed() as (problem, x, start, _):
            y = self.module.solve_lower(problem, x, start)
            gradient = tree.mean([problem.grad_g(x, y, t) for t in range(problem.minibatches)])
            moved = problem.prox(x, tree.axpy(-lr, gradient, y), lr)
            return y, float(tree.norm(tree.axpy(-1.0, moved, y))) / lr

    def slopes(self, steps: int, directions: list[Params]) -> Params:
        """Returns the central differences of f(x, y_steps(x)) along the directions."""
        self.module.lower_steps, h = steps, 1e-5 * (1 + float(tree.norm(self.x)))

        def value(shift: float, u: Params) -> Tensor:
            with self.posed(tree.axpy(shift, u, self.x)) as (problem, x, y, _), torch.no_grad():
                return problem.f(x, self.module.solve_lower(problem, x, y))

        return {"": torch.stack([(value(h, u) - value(-h, u)) / (2 * h) for u in directions])}

    def unrolled(self, steps: int, kept: int | None = None) -> Params:
        """Returns the derivative of f(x, y_steps(x)) through the last ``kept`` steps."""
        with self.posed() as (problem, x, y, pull_back):
            found = reverse(problem, self.module.dynamics, x, y, steps, truncation=kept, memory="recompute")
            return pull_back(found[0])

    def step(self, steps: int, y: Params | None = None, products: int | None = None) -> tuple[Params, Step]:
        """Returns the algorithm's own hypergradient, NaN where it diverges, and its step."""
        self.module.lower_steps = steps
        if isinstance(self.module, AID) and products is not None:
            self.module.linear_solver = copy.copy(self.module.linear_solver)
            self.module.linear_solver.steps = products
        with self.posed() as (problem, x, start, pull_back):
            try:
                step = self.module.bilevel_step(problem, x, start if y is None else y)
            except Diverged:
                step = Step({n: torch.full_like(t, torch.nan) for n, t in x.items()}, start)
            return pull_back(step.upper_grad), step


def _check(bench: _Bench, cap: int | None, number: int) -> Report:
    module, steps = bench.module, bench.module.lower_steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with bench.posed() as (problem, x, y, _):
            check_losses(problem, x, y)
        found, step = bench.step(steps)
    remarks = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    if hasattr(module, "directions"):
        remarks.append("One draw of random directions is mostly noise; its mean over many iterations counts.")

    # The derivative as such.
    generator = torch.Generator().manual_seed(bench.seed)
    random = [{n: torch.randn(t.shape, generator=generator).to(t) for n, t in bench.x.items()} for _ in range(number)]
    random = [{n: t / tree.norm(u) for n, t in u.items()} for u in random]

    def deviation(gradient: Params, slopes: Params) -> float:
        return _relative({"": torch.stack([tree.dot(gradient, u) for u in random])}, slopes)

    slopes, full, enough = bench.slopes(steps, random), bench.unrolled(steps), max(steps, 2)  # g_yy: from two steps on
    derivative = deviation(bench.unrolled(enough), slopes if steps == enough else bench.slopes(enough, random))

    # The reference: its steps are doubled until nothing changes.
    reference, n, change = full, steps, 0.0
    cap = cap or max(4 * steps, min(STEPS, NUMBERS // sum(t.numel() for t in y.values())))
    adapts = problem.start_depends_on_x and not isinstance(module, AID)
    if cap > steps and not adapts:
        n = max(min(max(2 * steps, 50), cap // 2), 1)
        n = -(-n // problem.minibatches) * problem.minibatches
        reference, change = bench.unrolled(n), math.inf
        while change > SETTLED and (2 * n <= cap or change == math.inf):
            before, n = reference, 2 * n
            reference, direct = bench.unrolled(n), bench.unrolled(n, 0)
            change = _relative(tree.axpy(-1.0, direct, before), tree.axpy(-1.0, direct, reference))

    def error(gradient: Params) -> float:
        return _relative(own(gradient), own(reference))

    # The settings that would do.
    rest, resting = bench.solved(n)
    fewer = sorted({t for t in (-(-k // problem.minibatches) * problem.minibatches for k in GRID) if t < n})
    kept, few, solved_error = getattr(module, "truncation", None), None, None
    if isinstance(module, AID):
        solved_error = error(bench.step(0, rest)[0])
        if not isinstance(module.linear_solver, Dense):
            kept = module.linear_solver.steps
            few = _least([k for k in GRID if k <= PRODUCTS], lambda k: error(bench.step(0, rest, k)[0]))
        least = _least(fewer, lambda t: error(bench.step(t, None, few or kept)[0]))
    else:
        least = steps if n == steps else _least(fewer, lambda t: error(bench.unrolled(t)))
        goal = full if least is None else reference
        last = least or steps
        few = _least([*(k for k in GRID if k < last), last], lambda k: _relative(bench.unrolled(last, k), goal))
    residual = step.logs.get("train/residual")
    return Report(
        method=type(module).__name__,
        steps=steps,
        kept=kept,
        error=error(found),
        cosine=_cosine(own(found), own(reference)),
        stopped_error=_relative(found, full),
        unrolled_error=error(full),
        solved_error=solved_error,
        differences=deviation(found, slopes),
        derivative=derivative,
        reference_steps=n,
        change=change,
        stationarity=(bench.solved(0)[1], bench.solved(steps)[1], resting),
        residual=None if residual is None else float(residual),
        suggested_steps=least,
        suggested_kept=few,
        stops=adapts or not module.warm_start,
        remarks=tuple(dict.fromkeys(remarks)),
    )


def _least(numbers: list[int], error: Callable[[int], float]) -> int | None:
    """Returns the one of ascending numbers from which on the error is within the tolerance."""
    found = None
    for n in reversed(numbers):
        if not error(n) <= TOLERANCE:
            break
        found = n
    return found


def _relative(a: Params, b: Params) -> float:
    difference, scale = float(tree.norm(tree.axpy(-1.0, b, a))), float(tree.norm(b))
    return difference / scale if scale else (math.inf if difference else 0.0)


def _cosine(a: Params, b: Params) -> float:
    scale = float(tree.norm(a) * tree.norm(b))
    return float(tree.dot(a, b)) / scale if scale else float(_relative(a, b) == 0)


def _double(values: Any) -> Any:
    return apply_to_collection(values, Tensor, lambda t: t.double() if t.is_floating_point() else t)
