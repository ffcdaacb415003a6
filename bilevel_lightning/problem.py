"""The oracles of one bilevel problem on one batch: all that an algorithm sees."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bilevel_lightning import tree
from bilevel_lightning.derivatives import Loss, PlainAttention, Rule, Target, gradient
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.tree import Params

Operator: TypeAlias = Callable[[Params], Params]


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
                terms += [] if upper == 0 else [upper * self.each_f(x, y)]
                if weight:
                    away = y if center is None else tree.axpy(-1.0, center, y)
                    terms.append(0.5 * weight * self.square(away))
                return sum(terms[1:], terms[0])

            return loss

        other._g = [blended(g) for g in self._g]
        return other

    def square(self, y: Params) -> Tensor:
        """Returns ``|y|^2``, one value for each episode side by side."""
        if self.episodes is None:
            return tree.dot(y, y)
        return torch.stack([t.flatten(1).square().sum(1) for t in y.values()]).sum(0)

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
            value = value if self.nonsmooth is None else value + self.nonsmooth(x, y).sum()
            return self._reduce({"": value})[""]

    def values_and_gradients(
        self, x: Params, y: Params, t: int = 0, *, upper: bool = True, lower: bool = True
    ) -> tuple[Tensor, Params, Params]:
        """Returns g + h, its derivative in x, and g_y, where h is the nonsmooth term; one evaluation.

        The value is one for each episode side by side, the derivatives are those of the sum.

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
            value = self.each_g(x, y, t)
            g_x, g_y = tree.grad(value.sum(), x if upper else {}, y if lower else {})
            if self.nonsmooth is not None:
                h = self.nonsmooth(x, tree.detach(y))
                value = value + h
                g_x = tree.axpy(1.0, tree.grad(h.sum(), x)[0], g_x) if upper else g_x
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
        x, y = tree.leaf(x), tree.leaf(y)
        g_y = self._graph(x, y, t)
        return self._product(g_y, "hessian_products", y, t), self._product(g_y, "cross_products", x, t)

    def hessian_product(self, x: Params, y: Params, t: int = 0) -> Operator:
        """Returns the map v -> g_yy v at (x, y) alone."""
        y = tree.leaf(y)
        return self._product(self._graph(tree.detach(x), y, t), "hessian_products", y, t)

    def _graph(self, x: Params, y: Params, t: int) -> Params:
        self.count("lower_gradients", t, touched=False)
        with torch.enable_grad(), PlainAttention():
            return tree.grad(self.g(x, y, t), y, create_graph=True)[0]

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
