"""What is looked at before a run begins, and while it goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.dynamics import Dynamics
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.task import Bilevel, BilevelTask
from bilevel_lightning.tree import Params


def check_trainer(trainer: Trainer) -> None:
    """Refuses settings of the trainer that bilevel runs cannot keep.

    Raises:
        BilevelError: for fp16 and for parameters in bfloat16, for strategies that divide the parameters, and for what
            does nothing or cannot run.
    """
    if trainer.precision in ("16-mixed", "16-true"):
        raise BilevelError(
            f"precision {trainer.precision} cannot be used: its loss scaling does not reach hypergradients. "
            "Choose 32-true, 64-true or bf16-mixed."
        )
    if trainer.precision in ("bf16-true", "transformer-engine", "transformer-engine-float16"):
        raise BilevelError(
            f"precision {trainer.precision} would keep x and y in bfloat16 or less, which rounds small steps away. "
            "Choose 32-true, 64-true or bf16-mixed; models.Autocast makes the evaluation of a network cheaper."
        )
    for name in ("check_val_every_n_epoch", "val_check_interval"):
        if getattr(trainer, name) == 0:
            raise BilevelError(f"trainer.{name} must be positive, got 0; limit_val_batches: 0 leaves validations out.")
    check_strategy(trainer.strategy)
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "_train_time_interval", None) is not None:
            raise BilevelError(
                "ModelCheckpoint.train_time_interval does nothing in manual optimization: use the callback "
                "SaveEvery(seconds) instead."
            )


def check_automatic(trainer: Trainer) -> None:
    """Refuses what Lightning does with gradients of automatic optimization, and names the setting that stands for it.

    Raises:
        BilevelError: for gradient clipping and accumulation by the trainer.
    """
    if trainer.gradient_clip_val:
        raise BilevelError(
            "trainer.gradient_clip_val does not reach hypergradients: set the algorithm's upper_clip_norm or "
            "upper_clip_value instead."
        )
    if trainer.accumulate_grad_batches != 1:
        raise BilevelError(
            "trainer.accumulate_grad_batches does not reach hypergradients: set the algorithm's accumulate instead."
        )


def check_settings(task: Any, dynamics: Any, evaluation_dynamics: Any, optimizer: Any, lower_steps: Any) -> None:
    """Looks at the types of settings that were given from Python; of a config the command line has done so.

    Raises:
        BilevelError: where a class, a name or an object of torch stands for one of this library.
    """
    if not isinstance(task, BilevelTask | None):
        raise BilevelError(f"task must be an instance of a BilevelTask, got {_said(task)}.")
    for name, value in (("dynamics", dynamics), ("evaluation_dynamics", evaluation_dynamics)):
        if not isinstance(value, Dynamics) and not (value is None and name == "evaluation_dynamics"):
            raise BilevelError(f"{name} must be a Dynamics, such as Momentum(lr=0.1), got {_said(value)}.")
    if not callable(optimizer):
        raise BilevelError(
            "upper_optimizer must be a function of the parameters, such as functools.partial(torch.optim.SGD, lr=0.1), "
            f"got {_said(optimizer)}."
        )
    if not isinstance(lower_steps, Integral):
        raise BilevelError(f"lower_steps must be an integer, got {lower_steps!r}.")


def _said(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of {type(value).__name__}"


def check_strategy(strategy: Any) -> None:
    """Refuses strategies, by name or as such, that divide all parameters.

    Raises:
        BilevelError: for these.
    """
    if isinstance(strategy, str):
        name, divides = strategy, strategy.startswith(("fsdp", "deepspeed", "model_parallel"))
    else:
        name = type(strategy).__name__
        divides = isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)
    if divides:
        raise BilevelError(
            f"{name} keeps a part of the parameters on each process, and hypergradients read all of them: set "
            "trainer.strategy to ddp, or for a method of first derivatives to sharded, which divides y alone."
        )


def output_shape(model: nn.Module, inputs: Tensor) -> tuple[int, ...]:
    """Returns the shape of what a task's model gives for the first of ``inputs`` alone, in evaluation mode.

    Raises:
        BilevelError: if it does not accept that.
    """
    like, modes = next(model.parameters(), torch.empty(0)), [(m, m.training) for m in model.modules()]
    model.eval()  # batch normalisation takes one sample, and keeps its statistics
    try:
        with torch.no_grad():
            first = inputs[:1].to(like) if inputs.is_floating_point() else inputs[:1].to(like.device)
            return tuple(model(first).shape)
    except (RuntimeError, IndexError) as error:
        kind = "images" if inputs.ndim == 4 else "inputs"
        raise BilevelError(
            f"task.model does not accept {kind} of shape {tuple(inputs.shape[1:])} ({error}); set its "
            f"{'image_shape' if inputs.ndim == 4 else 'sizes'} to the data's."
        ) from error
    finally:
        for m, training in modes:
            m.training = training


def check_classifier(model: nn.Module, images: Tensor, classes: int) -> None:
    """Looks whether a task's model takes images and gives one number for each class.

    Raises:
        BilevelError: if not.
    """
    shape = output_shape(model, images)
    if shape != (1, classes):
        raise BilevelError(f"task.model returns shape {shape} for one image instead of (1, {classes}).")


def check_levels(task: Bilevel) -> tuple[Params, Params]:
    """Returns x and y of a task.

    Raises:
        BilevelError: if a level is missing, is empty, or shares a parameter with the other.
    """
    for name in ("upper", "lower"):
        if not isinstance(getattr(task, name, None), nn.Module):
            other = "" if isinstance(task, BilevelTask) else " Set task, or define it."
            raise BilevelError(f"{type(task).__name__}.{name} must be a module that holds the {name} variables.{other}")
    x, y = tree.of(task.upper), tree.of(task.lower)
    for name, values in (("upper", x), ("lower", y)):
        if not values:
            raise BilevelError(f"{type(task).__name__}.{name} has no trainable parameter.")
    shared = {id(p) for p in x.values()} & {id(p) for p in y.values()}
    if shared:
        names = [name for name, p in y.items() if id(p) in shared]
        raise BilevelError(f"A parameter is both an upper and a lower variable: {names}. Give each level its own.")
    return x, y


class _UsesAttention(TorchFunctionMode):
    """Notices whether scaled dot-product attention is called inside."""

    found = False

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def check_task(task: Bilevel) -> None:
    """Looks for compiled modules in a task.

    Raises:
        BilevelError: if there is one.
    """
    for name, module in task.named_modules():  # type: ignore[attr-defined]
        if isinstance(module, OptimizedModule):
            raise BilevelError(
                f"{name} is compiled by torch.compile: it has no second derivatives, and would be compiled again for "
                "each value of its parameters. Give the plain module; RHG has compile."
            )


def check_batch(episode: Any, like: Tensor) -> str:
    """Returns what could be wrong with a batch whose losses fail: types or devices that the parameters do not have."""
    tensors = [t for t in tree_flatten(episode)[0] if isinstance(t, Tensor)]
    kinds = {f"{t.dtype} on {t.device}" for t in tensors if t.is_floating_point()}
    places = {f"{t.dtype} on {t.device}" for t in tensors if t.device != like.device}
    wrong = sorted((kinds - {f"{like.dtype} on {like.device}"}) | places)
    return f"The batch holds {', '.join(wrong)}, the parameters are {like.dtype} on {like.device}" if wrong else ""


@contextmanager
def watched(task: Bilevel) -> Iterator[None]:
    """Looks at what evaluating the losses changes.

    Raises:
        BilevelError: if it is a parameter.
    """
    module: Any = task
    kept = {name: p.detach().clone() for name, p in module.named_parameters() if not tree.divided(p)}
    buffers = {name: t.clone() for name, t in module.named_buffers() if not tree.divided(t)}
    yield
    changed = [name for name, p in module.named_parameters() if name in kept and not _same(p, kept[name])]
    if changed:
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(kept.get(name, p))
        raise BilevelError(f"A loss changes the parameters {changed} in place: compute new tensors from them instead.")
    moved = [name for name, t in module.named_buffers() if name in buffers and not _same(t, buffers[name])]
    if moved:
        rank_zero_warn(
            f"A loss changes the buffers {moved}. It is evaluated many times in an upper iteration, so that what they "
            "hold depends on the algorithm: leave them as they are, or keep what you count outside the losses."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def check_losses(
    problem: BilevelProblem, x: Params, y: Params, where: str = "on the first batch", task: Bilevel | None = None
) -> float:
    """Looks at the losses once, before anything has changed.

    Args:
        problem: the oracles.
        x: upper variables.
        y: lower variables.
        where: of which evaluation messages speak.
        task: whose own parameters the losses must not read in place of x and y; None: not looked at.

    Returns:
        ``|g_y|``.

    Raises:
        BilevelError: if a loss is not a finite scalar, the lower one does not depend on y, or one reads parameters
            in a way that other values cannot be put in their place.
    """
    module: Any = task
    own = {} if task is None else {name: p for name, p in module.named_parameters() if p.requires_grad}
    levels = [] if task is None else [id(p) for m in (task.upper, task.lower) for p in m.parameters()]
    size = 0.0
    x, y = tree.leaf(x), tree.leaf(y)
    used: set[str] = set()
    losses: dict[str, Callable[[Params, Params], Tensor]] = {"upper_loss": problem.f, "lower_loss": problem.g}
    if problem.nonsmooth is not None:
        losses["nonsmooth_lower"] = problem.nonsmooth
    for name, loss in losses.items():
        with _UsesAttention() as attention:
            value = loss(x, y)
        if name == "lower_loss" and attention.found:
            rank_zero_info(
                "The lower loss uses scaled dot-product attention: where its second derivatives are taken, its plain "
                "implementation is used, since the fused ones have none; it is slower and takes more memory."
            )
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise BilevelError(f"{name} must return a scalar tensor, got {shape}; take its mean or sum.")
        if not torch.isfinite(value):
            raise BilevelError(f"{name} is {value.item()} {where}; look for NaN or Inf in the data.")
        if own and value.requires_grad:
            found = torch.autograd.grad(value, [*own.values()], allow_unused=True, retain_graph=True)
            around = [n for n, g in zip(own, found, strict=True) if g is not None]
            if fixed := [n for n in around if id(own[n]) in levels]:
                raise BilevelError(
                    f"{name} reads the parameters {fixed} not as members of self.upper or self.lower, such as from a "
                    "list, so that it does not see other values of them: read them there."
                )
            if around:
                rank_zero_warn(f"{name} uses the parameters {around} of neither level: they stay as they are.")
        inputs = {**{f"x {n}": t for n, t in x.items()}, **{f"y {n}": t for n, t in y.items()}}
        grads: Any = [None] * len(inputs)
        if value.requires_grad:
            grads = torch.autograd.grad(value, [*inputs.values()], allow_unused=True)
        reached = {n for n, g in zip(inputs, grads, strict=True) if g is not None}
        if name == "lower_loss":
            gradient = {n: g for n, g in zip(inputs, grads, strict=True) if g is not None and n.startswith("y ")}
            size = float(tree.norm(gradient)) if gradient else 0.0
        if name == "lower_loss" and not any(n.startswith("y ") for n in reached):
            raise BilevelError("lower_loss does not depend on any parameter of self.lower.")
        used |= reached
    if problem.start_depends_on_x:
        start = torch.stack([t.sum() for t in problem.initial(x).values()]).sum()
        through = torch.autograd.grad(start, [*x.values()], allow_unused=True)
        used |= {f"x {n}" for n, g in zip(x, through, strict=True) if g is not None}
    prepared = any(n.startswith("prepared/") for n in x)  # then x is also used through what was prepared
    unused = [n for n in x if f"x {n}" not in used and "/" not in n and not prepared]
    if unused:
        rank_zero_warn(f"The losses use no gradient of the upper variables {unused}: they will not be learnt.")
    return size


def diagnose(problem: BilevelProblem, x: Params, y: Params) -> Params:
    """Returns what is logged after an upper iteration: both losses and ``|g_y|``, one value for each episode."""
    y = tree.leaf(y)
    with torch.no_grad():
        upper_loss = problem.each_f(x, y)
    with torch.enable_grad():
        lower_loss = problem.each_g(x, y)
        gradient = tree.grad(lower_loss.sum(), y)[0]
        if problem.nonsmooth is not None:
            lower_loss = lower_loss + problem.nonsmooth(x, y)
    first = 0 if problem.episodes is None else 1
    norms = torch.stack([torch.linalg.vector_norm(t.reshape(*t.shape[:first], -1), dim=-1) for t in gradient.values()])
    return {
        "train/upper_loss": upper_loss,
        "train/lower_loss": lower_loss.detach(),
        "train/stationarity": torch.linalg.vector_norm(norms, dim=0).detach(),
    }


def plain(value: Any) -> bool:
    """Whether a hyper-parameter can be stored in a checkpoint that loads without unpickling code."""
    if isinstance(value, dict):
        return all(map(plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, bool | int | float | str)
