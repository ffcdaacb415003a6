"""The oracles of one bilevel problem on one batch: all that an algorithm sees."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from bilevel_lightning import tree
from bilevel_lightning.derivatives import Loss, PlainAttention, Rule, Target, gradient
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.task import Bilevel, Minibatches
from bilevel_lightning.tree import Params

Operator: TypeAlias = Callable[[Params], Params]

LEVELS = (("lower", "upper"), ("support", "query"), ("train", "test"))
"""Names of the two levels' parts in a batch: ours, few-shot learning's, torchmeta's."""


class BilevelProblem:
    r"""The losses f(x, y) and g(x, y) of one problem on one batch, with their derivatives.

    x and y are named tensors (`tree.Params`). Names of x with a slash are not the task's own:
    ``dynamics/...`` are learnable settings of the lower dynamics, ``prepared/...`` what `Bilevel.prepare` computed.

    Args:
        f: upper loss, or one for each upper minibatch, whose mean it is.
        g: lower loss, or one for each lower minibatch; lower step t uses number ``t mod len``.
        prox: proximal map (or projection) of the lower level, ``prox(x, y, step)``; default: identity.
        nonsmooth: the term h(x, y) of the lower level that ``prox`` stands for: the whole lower loss is g + h, whose
            derivatives in x have both, and those in y only g's; default: none.
        fixed_point: map y -> Phi(x, y), or one for each lower minibatch (equilibrium models).
        initial: y_0(x), where the start of the lower level depends on x (MAML).
        reduce: differentiable average over processes, where y is shared by them; default: identity.
        agree: makes random directions equal on the processes that share y; default: identity.
        samples: how many samples each lower minibatch and each upper one hold, to count what was touched.
        parts: by level, ``lower`` or ``upper``, where its minibatches are parts of a fixed partition of its samples:
            the numbers of the parts, and each part's share of the samples.
        episodes: number E of independent problems side by side: tensors of y, and those that `Bilevel.prepare` made,
            have a leading dimension E, f and g return one value for each, and what is differentiated is their sum;
            None: a single problem.
        evaluate: calls a method of the task, such as ``metrics``, on the whole batch at (x, y), for each episode side
            by side: ``evaluate("metrics", x, y)``.
        enter: called with t before g is evaluated for lower step t, and with the step after it before f is.

    Attributes:
        episodes: as given.
        start_depends_on_x: whether y_0 is a function of x.
        nonsmooth: h, or None.
        constrained: whether the lower level has a proximal map or a projection.
        minibatches: number of lower minibatches.
        parts: as given.
        rule: how tracked gradients are differentiated (`derivatives`).
        counts: number of evaluated oracles so far, by name: ``upper_gradients``, ``lower_gradients``, ``lower_values``,
            ``upper_values``, ``hessian_products`` (g_yy v), ``cross_products`` (g_xy v), ``fixed_point_maps``, and
            ``samples``, how many samples all of them touched; a gradient that is only built to be multiplied with
            touches those of the products.
    """

    def __init__(
        self,
        f: Loss | Sequence[Loss],
        g: Loss | Sequence[Loss],
        *,
        prox: Callable[[Params, Params, float | Tensor], Params] | None = None,
        fixed_point: Sequence[Callable[[Params, Params], Params]] = (),
        nonsmooth: Loss | None = None,
        initial: Callable[[Params], Params] | None = None,
        reduce: Operator | None = None,
        agree: Operator | None = None,
        samples: tuple[Sequence[int], Sequence[int]] = ((0,), (0,)),
        parts: Mapping[str, tuple[Sequence[int], Sequence[float]]] = MappingProxyType({}),
        episodes: int | None = None,
        evaluate: Callable[[str, Params, Params], Any] = lambda method, x, y: {},
        enter: Callable[[int], None] | None = None,
    ) -> None:
        self._f = [f] if callable(f) else list(f)
        self.episodes, self._evaluate = episodes, evaluate
        self._enter, self._last = enter, [-1]
        self._g = [g] if callable(g) else list(g)
        self.nonsmooth = nonsmooth
        self._prox, self._fixed_point, self._initial = prox, fixed_point, initial
        self.start_depends_on_x, self.constrained = initial is not None, prox is not None
        self.minibatches = max(len(self._g), len(fixed_point))
        self._reduce = reduce or (lambda values: values)
        self.agree = agree or (lambda values: values)
        self._samples, self.parts = samples, parts
        self.rule: Rule = "graph"
        self._radius, self._weights = 0.0, (0.0, 1.0)
        self.counts: Counter[str] = Counter()

    def tracked_by(self, rule: Rule, radius: float = 0.01) -> "BilevelProblem":
        """Returns the same problem, and counts, with tracked gradients differentiated by ``rule`` (`derivatives`)."""
        other = copy.copy(self)
        other.rule, other._radius = rule, radius
        return other

    def blend(
        self, upper: float, lower: float = 1.0, center: Params | None = None, weight: float = 0.0
    ) -> "BilevelProblem":
        """The problem, with the same counts, of the lower loss ``upper f + lower g + weight |y - center|^2 / 2``.

        Dynamics on it solve the lower levels of penalty methods. ``center`` None is zero.
        """
        other = copy.copy(self)
        other._weights = (upper, lower)

        def blended(g: Loss) -> Loss:
            def loss(x: Params, y: Params) -> Tensor:
                terms = [g(x, y) if lower == 1 else lower * g(x, y)] if lower else []
                terms += [] if upper == 0 else [upper * self.f(x, y)]
                if weight:
                    away = y if center is None else tree.axpy(-1.0, center, y)
                    terms.append(0.5 * weight * tree.dot(away, away))
                return sum(terms[1:], terms[0])

            return loss

        other._g = [blended(g) for g in self._g]
        return other

    def only(self, lower: Sequence[int], upper: Sequence[int]) -> "BilevelProblem":
        """The problem, with the same counts, on some of the minibatches; numbers count modulo how many there are."""
        other = copy.copy(self)

        def taken(values: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
            return [values[i % len(values)] for i in numbers] if values else []

        other._g, other._f = taken(self._g, lower), taken(self._f, upper)
        other._fixed_point = taken(self._fixed_point, lower)
        other._samples = (taken(self._samples[0], lower), taken(self._samples[1], upper))
        other.minibatches = len(lower)
        return other

    def count(self, oracle: str, t: int | None = None, times: int = 1, *, touched: bool = True) -> None:
        """Adds ``times`` evaluations of an oracle on lower minibatch ``t``, or on all upper ones (None).

        ``touched`` False leaves out their samples.
        """
        if oracle == "lower_gradients" and self._weights != (0.0, 1.0):  # of a blend
            if self._weights[0]:
                self.count("upper_gradients", times=times, touched=touched)
            if not self._weights[1]:
                return
        lower, upper = self._samples
        times *= self.episodes or 1
        self.counts[oracle] += times
        self.counts["samples"] += touched * times * (sum(upper) if t is None else lower[t % len(lower)])

    def each_f(self, x: Params, y: Params, steps: int | None = None) -> Tensor:
        """Returns the upper loss, of shape ``(episodes,)`` where there are several side by side.

        ``steps``: how many lower steps are taken, for `Bilevel.at_lower_step`; default: all so far.
        """
        self.enter(steps)
        values = [f(x, y) for f in self._f]
        return values[0] if len(values) == 1 else torch.stack(values).mean(0)

    def enter(self, steps: int | None = None) -> None:
        """Calls `Bilevel.at_lower_step` for what is evaluated after ``steps`` lower steps; default: all so far."""
        if self._enter is not None:
            self._enter(self._last[0] + 1 if steps is None else steps)

    def each_g(self, x: Params, y: Params, t: int = 0) -> Tensor:
        """Returns the lower loss on the minibatch of lower step ``t``, one value for each episode side by side."""
        if self._enter is not None:
            self._enter(t)
            self._last[0] = max(self._last[0], t)
        return self._g[t % len(self._g)](x, y)

    def evaluate(self, method: str, x: Params, y: Params, steps: int | None = None) -> Any:
        """Calls a method of the task, such as ``metrics``, on the whole batch, for each episode side by side."""
        self.enter(steps)
        return self._evaluate(method, x, y)

    def f(self, x: Params, y: Params, steps: int | None = None) -> Tensor:
        """Returns the upper loss, the sum over episodes side by side."""
        value = self.each_f(x, y, steps)
        return value if self.episodes is None else value.sum()

    def g(self, x: Params, y: Params, t: int = 0) -> Tensor:
        """Returns the lower loss on the minibatch of lower step ``t``, the sum over episodes side by side."""
        value = self.each_g(x, y, t)
        return value if self.episodes is None else value.sum()

    def upper_values(self, x: Params, y: Params) -> Tensor:
        """Returns the upper loss without a graph, averaged over the processes that share y; as `each_f`."""
        self.count("upper_values")
        with torch.no_grad():
            return self._reduce({"": self.each_f(x, y)})[""]

    def grad_f(self, x: Params, y: Params) -> tuple[Params, Params]:
        """Returns (f_x, f_y)."""
        self.count("upper_gradients")
        x, y = tree.leaf(x), tree.leaf(y)
        with torch.enable_grad():
            f_x, f_y = tree.grad(self.f(x, y), x, y)
        return self._reduce(f_x), self._reduce(f_y)

    def grad_f_x(self, x: Params, y: Params) -> Params:
        """Returns f_x."""
        self.count("upper_gradients")
        x, y = tree.leaf(x), tree.detach(y)
        with torch.enable_grad():
            return self._reduce(tree.grad(self.f(x, y), x)[0])

    def grad_f_y(self, x: Params, y: Params, *, track: bool = False) -> Params:
        """Returns f_y; with ``track`` as a differentiable function of the given x and y."""
        f = partial(self.f, steps=self._last[0] + 1)  # fixed, since its graph may be built again later
        return self._gradient(f, partial(self.count, "upper_gradients"), x, y, track)

    def grad_g(self, x: Params, y: Params, t: int = 0, *, track: bool = False) -> Params:
        """Returns g_y at lower step ``t``; with ``track`` as a differentiable function of the given x and y."""
        return self._gradient(partial(self.g, t=t), partial(self.count, "lower_gradients", t), x, y, track)

    def value(self, x: Params, y: Params, t: int = 0) -> Tensor:
        """Returns g + h, where h is the nonsmooth term."""
        self.count("lower_values", t)
        with torch.no_grad():
            value = self.g(x, y, t)
            value = value if self.nonsmooth is None else value + self.nonsmooth(x, y)
            return self._reduce({"": value})[""]

    def values_and_gradients(
        self, x: Params, y: Params, t: int = 0, *, upper: bool = True, lower: bool = True
    ) -> tuple[Tensor, Params, Params]:
        """Returns g + h, its derivative in x, and g_y, where h is the nonsmooth term; one evaluation.

        Args:
            x: upper variables.
            y: lower variables.
            t: lower step, whose minibatch is taken.
            upper: False leaves out the derivative in x.
            lower: False leaves out g_y.
        """
        self.count("lower_gradients", t)
        x, y = (tree.leaf if upper else tree.detach)(x), (tree.leaf if lower else tree.detach)(y)
        with torch.enable_grad():
            value = self.g(x, y, t)
            g_x, g_y = tree.grad(value, x if upper else {}, y if lower else {})
            if self.nonsmooth is not None:
                h = self.nonsmooth(x, tree.detach(y))
                value = value + h
                g_x = tree.axpy(1.0, tree.grad(h, x)[0], g_x) if upper else g_x
        return self._reduce({"": value.detach()})[""], self._reduce(g_x), self._reduce(g_y)

    def stationarity_gradients(self, x: Params, y: Params, t: int = 0) -> tuple[Params, Params, Params]:
        """Returns g_y, and the derivatives g_xy g_y and g_yy g_y of ``|g_y|^2 / 2`` in x and y; one evaluation."""
        self.count("lower_gradients", t)
        self.count("hessian_products", t)
        self.count("cross_products", t)
        x, y = tree.leaf(x), tree.leaf(y)
        with torch.enable_grad(), PlainAttention():
            (g_y,) = tree.grad(self.g(x, y, t), y, create_graph=True)
        mean = self._reduce(tree.detach(g_y))
        d_x, d_y = tree.vjp([*g_y.values()], [mean[name] for name in g_y], x, y)
        return mean, self._reduce(d_x), self._reduce(d_y)

    def _gradient(self, loss: Loss, evaluated: Callable[[], None], x: Params, y: Params, track: bool) -> Params:
        evaluated()
        if track:
            return self._reduce(gradient(Target(loss, evaluated, self._radius), x, y, self.rule))
        x, y = tree.detach(x), tree.leaf(y)
        with torch.enable_grad():
            return self._reduce(tree.grad(loss(x, y), y)[0])

    def hessian_products(self, x: Params, y: Params, t: int = 0) -> tuple[Operator, Operator]:
        """Returns the maps v -> g_yy v and v -> g_xy v at (x, y); the gradient's graph is built once for both."""
        self.count("lower_gradients", t, touched=False)
        x, y = tree.leaf(x), tree.leaf(y)
        with torch.enable_grad(), PlainAttention():
            g_y = tree.grad(self.g(x, y, t), y, create_graph=True)[0]
        return self._product(g_y, "hessian_products", y, t), self._product(g_y, "cross_products", x, t)

    def gradient_and_products(self, x: Params, y: Params, v: Params, t: int = 0) -> tuple[Params, Params, Params]:
        """Returns g_y, g_yy v and g_xy v at (x, y), from one evaluation on minibatch ``t``."""
        for oracle in ("lower_gradients", "hessian_products", "cross_products"):
            self.count(oracle, t)
        x, y = tree.leaf(x), tree.leaf(y)
        with torch.enable_grad(), PlainAttention():
            (g_y,) = tree.grad(self.g(x, y, t), y, create_graph=True)
        cross, product = tree.vjp([*g_y.values()], [v[name] for name in g_y], x, y)
        return self._reduce(tree.detach(g_y)), self._reduce(product), self._reduce(cross)

    def map_products(
        self, phi: Callable[["BilevelProblem", Params, Params], Params], x: Params, y: Params, t: int = 0
    ) -> tuple[Operator, Operator, Operator]:
        """Returns v -> Phi_y^T v, v -> Phi_x^T v and v -> Phi_y v at (x, y) for a map ``phi(problem, x, y)``."""
        x, y = tree.leaf(x), tree.leaf(y)
        with torch.enable_grad(), PlainAttention():
            image = phi(self.tracked_by("graph"), x, y)
            cotangents = {name: torch.zeros_like(t, requires_grad=True) for name, t in image.items()}
            (adjoint,) = tree.vjp([*image.values()], [*cotangents.values()], y, create_graph=True)

        def forward(v: Params) -> Params:
            self.count("hessian_products", t)
            through = tree.vjp([*adjoint.values()], [v[n] for n in adjoint], cotangents, retain_graph=True)
            return self._reduce(through[0])

        return self._product(image, "hessian_products", y, t), self._product(image, "cross_products", x, t), forward

    def _product(self, outputs: Params, name: str, wrt: Params, t: int) -> Operator:
        def apply(v: Params) -> Params:
            self.count(name, t)
            return self._reduce(tree.vjp([*outputs.values()], [v[n] for n in outputs], wrt, retain_graph=True)[0])

        return apply

    def prox(self, x: Params, y: Params, step: float | Tensor) -> Params:
        """Returns the proximal map (or projection) of the lower level at y."""
        return y if self._prox is None else self._prox(x, y, step * self._weights[1])

    def fixed_point(self, x: Params, y: Params, t: int = 0) -> Params:
        """Returns Phi(x, y), the task's fixed-point map at lower step ``t``."""
        if not self._fixed_point:
            raise BilevelError("This problem has no fixed-point map; use gradient dynamics or define fixed_point_map.")
        phi = self._fixed_point[t % len(self._fixed_point)]

        def evaluate(x: Params, y: Params) -> Params:
            self.count("fixed_point_maps", t)
            return phi(x, y)

        if torch.is_grad_enabled() and self.rule in ("recompute", "mixed"):
            with torch.enable_grad(), PlainAttention():
                again: Params = checkpoint(evaluate, x, y, use_reentrant=False)
            return again
        return evaluate(x, y)

    def initial(self, x: Params) -> Params:
        """Returns y_0(x), where the start of the lower level depends on x.

        Raises:
            BilevelError: if it does not.
        """
        if self._initial is None:
            raise BilevelError(
                "This algorithm learns y_0(x), and here y_0 does not depend on x: define initial_lower with "
                "persistent_lower = False, or use FewShot with start 'learned'."
            )
        return self._initial(x)

    def initial_vjp(self, x: Params, v: Params) -> Params:
        """Returns v^T d y_0 / d x."""
        x = tree.leaf(x)
        with torch.enable_grad():
            y0 = self.initial(x)
        return tree.vjp([*y0.values()], [v[name] for name in y0], x)[0]


class Functional:
    """Calls a method of a task with other values in place of its upper and lower parameters.

    Tied parameters are all replaced (as by `torch.func.functional_call`, but where they lie is looked up once, which
    matters for small problems). Running statistics of normalisation layers are read, but what an evaluation adds to
    them is dropped: the losses stay functions of (x, y). `BilevelModule` advances the statistics once in an upper
    iteration, with ``advance``.

    Args:
        task: whose methods are called.
        advance: keep what an evaluation adds to running statistics.
    """

    def __init__(self, task: Any, advance: bool = False) -> None:
        self.task = task
        places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in task.modules():
            for name, p in module._parameters.items():
                places.setdefault(id(p), []).append((module._parameters, name))
        self._upper = {name: places[id(p)] for name, p in tree.of(task.upper).items()}
        self._lower = {name: places[id(p)] for name, p in tree.of(task.lower).items()}
        self._statistics = [] if advance else [layer.__dict__ for _, layer in running_norms(task)]

    def at(self, x: Params, y: Params, method: str, *args: Any) -> Any:
        """Returns ``task.method(*args)`` at (x, y)."""
        before = []
        try:
            for values, level in ((x, self._upper), (y, self._lower)):
                for name, t in values.items():
                    for owner, key in level.get(name, ()):
                        before.append((owner, key, owner[key]))
                        owner[key] = t
            for settings in self._statistics:  # in training mode the batch's statistics are used either way
                before.append((settings, "track_running_stats", True))
                settings["track_running_stats"] = False
            return getattr(self.task, method)(*args)
        finally:
            for owner, key, value in reversed(before):
                owner[key] = value


def running_norms(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the normalisation layers, with their names, whose running statistics an evaluation would change."""
    layers = [(name, m) for name, m in module.named_modules() if isinstance(m, _NormBase)]
    return [(name, m) for name, m in layers if m.training and m.track_running_stats]


def size(part: Any, dim: int = 0) -> int:
    """Returns the number of samples in a part of a batch: the length of its first tensor along ``dim``."""
    lengths = [t.shape[dim] if t.ndim > dim else 1 for t in tree_flatten(part)[0] if isinstance(t, Tensor)]
    return lengths[0] if lengths else 0


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


def _side_by_side(function: Callable[[Params, Any], Any], y: Params, data: Any) -> Any:
    """Returns ``function(y, data)`` for each entry of the leading dimension of y and of the tensors in data."""
    dims = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, data)
    return torch.func.vmap(function, in_dims=(0, dims), randomness="different")(y, data)


def stack(episodes: Sequence[Any]) -> Any:
    """Returns episodes as one batch whose tensors have them as leading dimension.

    Raises:
        BilevelError: if they differ in shape.
    """
    flat = [tree_flatten(episode) for episode in episodes]
    if len({str([getattr(t, "shape", t) for t in leaves]) + str(spec) for leaves, spec in flat}) > 1:
        raise BilevelError("Episodes of different shapes cannot be solved side by side: set episodes_at_once to 1.")
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return tree_unflatten([torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in columns], flat[0][1])


def start_depends_on_x(task: Bilevel) -> bool:
    """Whether `Bilevel.initial_lower` gives a function of the upper variables, as in MAML, and not fixed values."""
    if task.persistent_lower or type(task).initial_lower is Bilevel.initial_lower:
        return False
    x = tree.leaf(tree.of(task.upper))
    with torch.enable_grad():
        start = task.initial_lower(x)
    given = {id(t) for t in x.values()}
    return any(t.grad_fn is not None or id(t) in given for t in start.values())


def _prepare(
    task: Bilevel, call: Functional, batch: Any, x: Params, episodes: int | None
) -> tuple[Any, Params, Operator]:
    """Runs `Bilevel.prepare`: the batch, what was prepared of it by name, and the pull-back of that to x."""
    if type(task).prepare is Bilevel.prepare:
        return batch, {}, lambda gradient: gradient
    source = tree.leaf(x)
    with torch.enable_grad():
        if episodes is None:
            batch = call.at(source, {}, "prepare", batch)
        else:
            batch = _side_by_side(lambda _, data: call.at(source, {}, "prepare", data), {}, batch)
    leaves = [t for t in tree_flatten(batch)[0] if isinstance(t, Tensor) and t.requires_grad]
    prepared = {f"prepared/{i}": t for i, t in enumerate(leaves)}

    def pull_back(gradient: Params) -> Params:
        through = tree.vjp([*prepared.values()], [gradient[name] for name in prepared], source)[0]
        return {name: gradient[name] + through[name] for name in source}

    return batch, prepared, pull_back


def _filled(part: Any, prepared: Params) -> Callable[[Params], Any]:
    """Returns a part of a batch as a function of x, whose ``prepared/...`` take the places of what was prepared."""
    names = {id(t): name for name, t in prepared.items()}
    leaves, spec = tree_flatten(part)
    if not any(id(leaf) in names for leaf in leaves):
        return lambda x: part
    return lambda x: tree_unflatten([x[names[id(t)]] if id(t) in names else t for t in leaves], spec)


def bind(
    task: Bilevel,
    batch: Any,
    x: Params,
    reduce: Operator | None = None,
    agree: Operator | None = None,
    episodes: int | None = None,
) -> tuple[BilevelProblem, Params, Operator]:
    """Binds a task to one episode, or to several side by side.

    Args:
        task: the losses and hooks.
        batch: one episode, ``{"lower": ..., "upper": ...}``, or several of them by `stack`.
        x: values of the upper variables.
        reduce: average over processes; used where the task's y is shared by them.
        agree: makes random directions equal on all processes; used where the task's y is shared by them.
        episodes: how many episodes are stacked in ``batch``, None: it is a single one, without leading dimension.

    Returns:
        The problem, its upper variables (x and, with `Bilevel.prepare`, the prepared tensors), and the map that
        pulls a gradient with respect to those back to x.
    """
    call = Functional(task)
    batch, z, pull_back = _prepare(task, call, batch, x, episodes)

    def on(part: Any, method: str) -> Any:
        fill = _filled(part, z)

        def loss(x: Params, y: Params) -> Any:
            if episodes is None:
                return call.at(x, y, method, fill(x))
            return _side_by_side(lambda y, data: call.at(x, y, method, data), y, fill(x))

        return loss

    def prox(x: Params, y: Params, step: float | Tensor) -> Params:
        one = partial(task.prox_lower, own(x), step=step)
        found: Params = one(y) if episodes is None else torch.func.vmap(one)(y)
        return found

    def initial(x: Params) -> Params:
        return tree.repeat(task.initial_lower(own(x)), episodes)

    lower, upper = ([*part] if isinstance(part, Minibatches) else [part] for part in split(batch))
    number = partial(size, dim=0 if episodes is None else 1)
    hooks = type(task)
    constrained = hooks.prox_lower is not Bilevel.prox_lower or hooks.project_lower is not Bilevel.project_lower
    nonsmooth = hooks.nonsmooth_lower is not Bilevel.nonsmooth_lower
    mapped = hooks.fixed_point_map is not Bilevel.fixed_point_map
    shared = task.persistent_lower
    problem = BilevelProblem(
        [on(part, "upper_loss") for part in upper],
        [on(part, "lower_loss") for part in lower],
        prox=prox if constrained else None,
        nonsmooth=(lambda x, y: task.nonsmooth_lower(own(x), y)) if nonsmooth else None,
        fixed_point=[on(part, "fixed_point_map") for part in lower] if mapped else (),
        initial=initial if start_depends_on_x(task) else None,
        reduce=reduce if shared else None,
        agree=agree if shared else None,
        samples=([*map(number, lower)], [*map(number, upper)]),
        parts=batch.get("parts", {}) if isinstance(batch, dict) else {},
        episodes=episodes,
        evaluate=lambda method, x, y: on(batch, method)(x, y),
        enter=task.at_lower_step if hooks.at_lower_step is not Bilevel.at_lower_step else None,
    )
    return problem, {**x, **tree.detach(z)}, pull_back
