"""The oracles of one bilevel problem on one batch: all that an algorithm sees."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.task import Bilevel, Minibatches
from bilevel_lightning.tree import Params

Loss: TypeAlias = Callable[[Params, Params], Tensor]
Operator: TypeAlias = Callable[[Params], Params]

LEVELS = (("lower", "upper"), ("support", "query"), ("train", "test"))
"""Names of the two levels' parts in a batch: ours, few-shot learning's, torchmeta's."""


class BilevelProblem:
    r"""The losses f(x, y) and g(x, y) of one problem on one batch, with their derivatives.

    x and y are named tensors (`tree.Params`). Names of x with a slash are not the task's own:
    ``dynamics/...`` are learnable settings of the lower dynamics, ``prepared/...`` what `Bilevel.prepare` computed.

    Args:
        f: upper loss.
        g: lower loss, or one for each lower minibatch; lower step t uses number ``t mod len``.
        prox: proximal map (or projection) of the lower level, ``prox(x, y, step)``; default: identity.
        fixed_point: map y -> Phi(x, y), or one for each lower minibatch (equilibrium models).
        initial: y_0(x), where the start of the lower level depends on x (MAML).
        reduce: differentiable average over processes, where y is shared by them; default: identity.

    Attributes:
        start_depends_on_x: whether y_0 is a function of x.
        counts: number of evaluated oracles so far, by name: ``upper_gradients``, ``lower_gradients``,
            ``hessian_products`` (g_yy v) and ``cross_products`` (g_xy v).
    """

    def __init__(
        self,
        f: Loss,
        g: Loss | Sequence[Loss],
        *,
        prox: Callable[[Params, Params, float | Tensor], Params] | None = None,
        fixed_point: Sequence[Callable[[Params, Params], Params]] = (),
        initial: Callable[[Params], Params] | None = None,
        reduce: Operator | None = None,
    ) -> None:
        self.f = f
        self._g = [g] if callable(g) else list(g)
        self._prox, self._fixed_point, self._initial = prox, fixed_point, initial
        self.start_depends_on_x = initial is not None
        self._reduce = reduce or (lambda values: values)
        self.counts: Counter[str] = Counter()

    def g(self, x: Params, y: Params, t: int = 0) -> Tensor:
        """Returns the lower loss on the minibatch of lower step ``t``."""
        return self._g[t % len(self._g)](x, y)

    def grad_f(self, x: Params, y: Params) -> tuple[Params, Params]:
        """Returns (f_x, f_y)."""
        self.counts["upper_gradients"] += 1
        x, y = tree.leaf(x), tree.leaf(y)
        with torch.enable_grad():
            f_x, f_y = tree.grad(self.f(x, y), x, y)
        return self._reduce(f_x), self._reduce(f_y)

    def grad_g(self, x: Params, y: Params, t: int = 0, *, track: bool = False) -> Params:
        """Returns g_y at lower step ``t``; with ``track`` as a differentiable function of the given x and y."""
        self.counts["lower_gradients"] += 1
        if not track:
            x, y = tree.detach(x), tree.leaf(y)
        with torch.enable_grad():
            (g_y,) = tree.grad(self.g(x, y, t), y, create_graph=track)
        return self._reduce(g_y)

    def hessian_products(self, x: Params, y: Params, t: int = 0) -> tuple[Operator, Operator]:
        """Returns the maps v -> g_yy v and v -> g_xy v at (x, y); the gradient's graph is built once for both."""
        x, y = tree.leaf(x), tree.leaf(y)
        with torch.enable_grad():
            g_y = tree.grad(self.g(x, y, t), y, create_graph=True)[0]

        def product(name: str, wrt: Params) -> Operator:
            def apply(v: Params) -> Params:
                self.counts[name] += 1
                cotangents = [v[key] for key in g_y]
                return self._reduce(tree.vjp([*g_y.values()], cotangents, wrt, retain_graph=True)[0])

            return apply

        return product("hessian_products", y), product("cross_products", x)

    def prox(self, x: Params, y: Params, step: float | Tensor) -> Params:
        """Returns the proximal map (or projection) of the lower level at y."""
        return y if self._prox is None else self._prox(x, y, step)

    def fixed_point(self, x: Params, y: Params, t: int = 0) -> Params:
        """Returns Phi(x, y), the task's fixed-point map at lower step ``t``."""
        if not self._fixed_point:
            raise BilevelError("This problem has no fixed-point map; use gradient dynamics or define fixed_point_map.")
        self.counts["fixed_point_maps"] += 1
        return self._fixed_point[t % len(self._fixed_point)](x, y)

    def initial_vjp(self, x: Params, v: Params) -> Params:
        """Returns v^T d y_0 / d x: zero unless the start of the lower level depends on x."""
        if self._initial is None:
            return tree.zeros_like(x)
        x = tree.leaf(x)
        with torch.enable_grad():
            y0 = self._initial(x)
        return tree.vjp([*y0.values()], [v[name] for name in y0], x)[0]


class Functional(nn.Module):
    """Calls a method of a task with other values in place of its upper and lower parameters."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        self.task = task

    @override
    def forward(self, method: str, *args: Any) -> Any:
        return getattr(self.task, method)(*args)

    def at(self, x: Params, y: Params, method: str, *args: Any) -> Any:
        """Returns ``task.method(*args)`` at (x, y)."""
        values = {f"task.upper.{name}": t for name, t in x.items() if "/" not in name}
        values.update({f"task.lower.{name}": t for name, t in y.items()})
        return functional_call(self, values, (method, *args))


def own(x: Params) -> Params:
    """Returns the upper variables that are parameters of ``task.upper``."""
    return {name: t for name, t in x.items() if "/" not in name}


def split(batch: Any) -> tuple[Any, Any]:
    """Returns the lower and the upper part of a batch; without the known keys both levels get all of it.

    Raises:
        BilevelError: for a dictionary without the known keys.
    """
    if not isinstance(batch, dict):
        return batch, batch
    for lower, upper in LEVELS:
        if lower in batch and upper in batch:
            return batch[lower], batch[upper]
    raise BilevelError(
        f"A batch needs the keys 'lower' and 'upper' (or 'support' and 'query'), got {sorted(batch)}. "
        "Rename them in the data module's collate function."
    )


def _prepare(
    task: Bilevel, call: Functional, batch: Any, x: Params
) -> tuple[Params, Callable[[Params], Any], Operator]:
    """Runs `Bilevel.prepare`: the prepared tensors, the batch as a function of them, and their pull-back to x."""
    if type(task).prepare is Bilevel.prepare:
        return {}, lambda x: batch, lambda gradient: gradient
    source = tree.leaf(x)
    with torch.enable_grad():
        leaves, spec = tree_flatten(call.at(source, {}, "prepare", batch))
    prepared = {f"prepared/{i}": t for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad}

    def fill(x: Params) -> Any:
        return tree_unflatten([x.get(f"prepared/{i}", t) for i, t in enumerate(leaves)], spec)

    def pull_back(gradient: Params) -> Params:
        through = tree.vjp([*prepared.values()], [gradient[name] for name in prepared], source)[0]
        return {name: gradient[name] + through[name] for name in source}

    return tree.detach(prepared), fill, pull_back


def bind(task: Bilevel, batch: Any, x: Params, reduce: Operator) -> tuple[BilevelProblem, Params, Operator]:
    """Binds a task to one episode.

    Args:
        task: the losses and hooks.
        batch: one episode, ``{"lower": ..., "upper": ...}``.
        x: values of the upper variables.
        reduce: average over processes; used where the task's y is shared by them.

    Returns:
        The problem, its upper variables (x and, with `Bilevel.prepare`, the prepared tensors), and the map that
        pulls a gradient with respect to those back to x.
    """
    call = Functional(task)
    z, fill, pull_back = _prepare(task, call, batch, x)

    def level(method: str, part: int, t: int | None = None) -> Any:
        def loss(x: Params, y: Params) -> Any:
            data = split(fill(x))[part]
            return call.at(x, y, method, data if t is None else data[t])

        return loss

    lower = split(batch)[0]
    steps: Sequence[int | None] = range(len(lower)) if isinstance(lower, Minibatches) else [None]
    problem = BilevelProblem(
        level("upper_loss", 1),
        [level("lower_loss", 0, t) for t in steps],
        prox=lambda x, y, step: task.prox_lower(own(x), y, step),
        fixed_point=[level("fixed_point_map", 0, t) for t in steps],
        initial=None if task.persistent_lower else lambda x: task.initial_lower(own(x)),
        reduce=reduce if task.persistent_lower else None,
    )
    return problem, {**x, **z}, pull_back
