"""From a task and a batch to a `BilevelProblem`: its losses as functions of (x, y), for one episode or several."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bilevel_lightning import tree
from bilevel_lightning.derivatives import in_parts
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.problem import BilevelProblem, Operator
from bilevel_lightning.sharding import parts, whole
from bilevel_lightning.task import Bilevel, Minibatches
from bilevel_lightning.tree import Params

LEVELS = (("lower", "upper"), ("support", "query"), ("train", "test"))
"""Names of the two levels' parts in a batch: ours, few-shot learning's, torchmeta's."""


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
                for name, places in level.items():
                    for owner, key in places if name in values else ():
                        before.append((owner, key, owner[key]))
                        owner[key] = values[name]
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


def rows(part: Any, first: int, number: int) -> Any:
    """Returns ``number`` samples of a part of a batch, from ``first``: rows of all tensors that count its samples."""
    samples = size(part)

    def cut(leaf: Any) -> Any:
        counts = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == samples
        return leaf[first : first + number] if counts else leaf

    return tree_map(cut, part)


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


def unstack(batch: Any, number: int | None) -> list[Any]:
    """Returns the ``number`` parts along the leading dimension of a batch's tensors: the inverse of `stack`.

    None: the batch is one part.
    """
    if number is None:
        return [batch]
    return [tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, batch) for i in range(number)]  # noqa: B023


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


def _filled(part: Any, names: dict[int, str]) -> Callable[[Params], Any]:
    """Returns a part of a batch as a function of x, whose ``prepared/...`` take the places of what was prepared.

    ``names`` are those of the prepared tensors, by id.
    """
    if not names:
        return lambda x: part
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
    samples_at_once: int | None = None,
) -> tuple[BilevelProblem, Params, Operator]:
    """Binds a task to one episode, or to several side by side.

    Args:
        task: the losses and hooks.
        batch: one episode, ``{"lower": ..., "upper": ...}``, or several of them by `stack`.
        x: values of the upper variables.
        reduce: average over processes; used where the task's y is shared by them.
        agree: makes random directions equal on all processes; used where the task's y is shared by them.
        episodes: how many episodes are stacked in ``batch``, None: it is a single one, without leading dimension.
        samples_at_once: how many samples of a minibatch a loss gets at once; None: all.

    Returns:
        The problem, its upper variables (x and, with `Bilevel.prepare`, the prepared tensors), and the map that
        pulls a gradient with respect to those back to x.
    """
    call = Functional(task)
    batch, z, pull_back = _prepare(task, call, batch, x, episodes)
    names = {id(t): name for name, t in z.items()}

    def in_turn(part: Any, method: str) -> Any:
        """The loss on a minibatch as the mean of those on its parts."""
        most = samples_at_once
        if most is None or (total := size(part)) <= most:
            return on(part, method)
        fill = _filled(part, names)

        def loss(x: Params, y: Params, first: int) -> Any:
            return call.at(x, y, method, rows(fill(x), first, most))

        starts = range(0, total, most)
        weights = [min(most, total - first) / total for first in starts]
        return in_parts([partial(loss, first=first) for first in starts], weights)

    def on(part: Any, method: str) -> Any:
        fill = _filled(part, names)

        def loss(x: Params, y: Params) -> Any:
            if episodes is None:
                return call.at(x, y, method, fill(x))
            return _side_by_side(lambda y, data: call.at(x, y, method, data), y, fill(x))

        return loss

    def prox(x: Params, y: Params, step: float | Tensor) -> Params:
        one = partial(task.prox_lower, own(x), step=step)
        found: Params = one(whole(y)) if episodes is None else torch.func.vmap(one)(y)
        return parts(found, y)

    def at_whole(loss: Callable[[Params, Params], Any]) -> Callable[[Params, Params], Any]:
        return lambda x, y: loss(x, whole(y))

    def nonsmooth(x: Params, y: Params) -> Tensor:
        one = partial(task.nonsmooth_lower, own(x))
        found: Tensor = one(y) if episodes is None else torch.func.vmap(one)(y)
        return found

    def initial(x: Params) -> Params:
        return tree.repeat(task.initial_lower(own(x)), episodes)

    lower, upper = ([*part] if isinstance(part, Minibatches) else [part] for part in split(batch))
    number = partial(size, dim=0 if episodes is None else 1)
    hooks = type(task)
    constrained = hooks.prox_lower is not Bilevel.prox_lower or hooks.project_lower is not Bilevel.project_lower
    has_nonsmooth = hooks.nonsmooth_lower is not Bilevel.nonsmooth_lower
    mapped = hooks.fixed_point_map is not Bilevel.fixed_point_map
    shared = task.persistent_lower
    problem = BilevelProblem(
        [at_whole(in_turn(part, "upper_loss")) for part in upper],
        [at_whole(in_turn(part, "lower_loss")) for part in lower],
        prox=prox if constrained else None,
        nonsmooth=at_whole(nonsmooth) if has_nonsmooth else None,
        fixed_point=[on(part, "fixed_point_map") for part in lower] if mapped else (),
        initial=initial if start_depends_on_x(task) else None,
        reduce=reduce if shared else None,
        agree=agree if shared else None,
        samples=([*map(number, lower)], [*map(number, upper)]),
        parts=batch.get("parts", {}) if isinstance(batch, dict) else {},
        episodes=episodes,
        evaluate=lambda method, x, y: on(batch, method)(x, whole(y)),
        enter=task.at_lower_step if hooks.at_lower_step is not Bilevel.at_lower_step else None,
    )
    return problem, {**x, **tree.detach(z)}, pull_back
