"""Three decisions of docs/architecture.md, each beside its alternative, in the same run and on one thread.

    python benchmarks/decisions.py [--rounds 21]

* One step of ``memory: recompute`` evaluates (g_xy v, g_yy v) from (x, y) alone: from the slope of g along v (ours),
  by reverse over reverse, by forward over reverse (``memory: mixed``), or by reverse over forward as torch has it.
* One step of ``memory: graph`` with products of layers in the order that a CPU is fast at (ours), or as they come.
* One step of forward mode along 10 and 100 directions: the adjoint of the step differentiated in its cotangents
  (ours), or `vmap` of `torch.func.jvp` of the step.

All on hyper-cleaning of random images with a linear model. Each alternative is first checked to give the same numbers.
Milliseconds are CPU time, medians over the rounds, in which all take turns; ratios to ours are medians of the rounds'.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from hypergradients import LR, Case, linear, ours, seconds
from torch import Tensor
from torch.func import grad, jvp, vmap

from bilevel_lightning import RHG, GradientDescent, layers, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.derivatives import PRODUCTS, Target
from bilevel_lightning.hypergradients.forward import slopes
from bilevel_lightning.models import LinearNet

STEPS = 10


def compare(title: str, ways: dict[str, Callable[[], Tensor]], per: int, rounds: int) -> None:
    """Prints one line; the first way is ours, and each call takes ``per`` steps."""
    first, *others = ways
    expected = ways[first]()
    for name in others:
        torch.testing.assert_close(ways[name](), expected, rtol=1e-3, atol=1e-6)
    times = [{name: 1e3 / per * seconds(time.process_time, way) for name, way in ways.items()} for _ in range(rounds)]
    cells = [
        f"{name} {median(t[name] for t in times):.2f} ms ({median(t[name] / t[first] for t in times):.2f})"
        for name in ways
    ]
    print(f"{title}: {', '.join(cells)}")


def products(rounds: int) -> None:
    """Compares three ways to (g_xy v, g_yy v)."""
    case = Case("", LinearNet(), linear, (5000, 5000), 1)
    problem, x, _ = bind(case.task, case.batch, tree.detach(tree.of(case.task.upper)))
    y = tree.detach(tree.of(case.task.lower))
    _, v = problem.grad_f(x, y)

    def reverse_over_forward() -> Tensor:
        x_leaf, y_leaf = tree.leaf(x), tree.leaf(y)
        slope = jvp(lambda y: problem.g(x_leaf, y), (y_leaf,), (v,))[1]
        return flat(*tree.grad(slope, x_leaf, y_leaf))

    def by_rule(rule: str) -> Tensor:
        return flat(*PRODUCTS[rule](Target(problem.g, lambda: None, 0.0), x, y, v, x, y))

    def reverse_over_reverse() -> Tensor:
        x_leaf, y_leaf = tree.leaf(x), tree.leaf(y)
        (g_y,) = tree.grad(problem.g(x_leaf, y_leaf), y_leaf, create_graph=True)
        return flat(*tree.vjp([*g_y.values()], [v[name] for name in g_y], x_leaf, y_leaf))

    ways = {"slope": partial(by_rule, "recompute"), "reverse over reverse": reverse_over_reverse}
    others = {"forward over reverse": partial(by_rule, "mixed"), "reverse over forward": reverse_over_forward}
    compare("products", {**ways, **others}, 1, rounds)


def layer(rounds: int) -> None:
    """Compares two orders of the products of a differentiated step."""
    case = Case("", LinearNet(), linear, (5000, 5000), STEPS)

    def as_they_come() -> Tensor:
        least, layers.ENTRIES = layers.ENTRIES, 10**12
        try:
            return ours(case, STEPS, RHG)
        finally:
            layers.ENTRIES = least

    ways = {"the quick order": partial(ours, case, STEPS, RHG), "as they come": as_they_come}
    compare("graph, a step", ways, STEPS, rounds)


def flat(*parts: tree.Params) -> Tensor:
    """Returns all entries in a row."""
    return torch.cat([t.flatten() for part in parts for t in part.values()])


def forward(directions: int, rounds: int) -> None:
    """Compares two ways to push tangents along all directions of x through a step."""
    case = Case("", LinearNet(), linear, (directions, directions), STEPS)
    problem, x, _ = bind(case.task, case.batch, tree.detach(tree.of(case.task.upper)))
    y, u = tree.detach(tree.of(case.task.lower)), torch.eye(directions)

    def step(x: Tensor, y: list[Tensor]) -> list[Tensor]:
        gradient = grad(lambda y: case.lower_loss(x, partial(case.by_hand, y)))(y)
        return [t - LR * g for t, g in zip(y, gradient, strict=True)]

    def by_jvp() -> Tensor:
        state, tangents = [*y.values()], [t.new_zeros(directions, *t.shape) for t in y.values()]
        for _ in range(STEPS):
            push = vmap(lambda u, v, state=state: jvp(step, (x["logits"], state), (u, v))[1])
            state, tangents = step(x["logits"], state), push(u, tangents)
        f_y = grad(lambda y: case.upper_loss(partial(case.by_hand, y)))(state)
        return sum(v.flatten(1) @ f.flatten() for v, f in zip(tangents, f_y, strict=True))

    def by_adjoint() -> Tensor:
        return slopes(problem, GradientDescent(LR), x, y, STEPS, {"logits": u})[0]

    title = f"forward mode along {directions} directions, a step"
    compare(title, {"differentiated adjoint": by_adjoint, "vmap of jvp": by_jvp}, STEPS, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="timed runs (default 21)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    products(arguments.rounds)
    layer(arguments.rounds)
    for directions in (10, 100):
        forward(directions, arguments.rounds)
