"""Averages over processes, once, so that no algorithm needs to know how many there are."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning.tree import Params, divided


class _Mean(torch.autograd.Function):
    """Mean over processes whose derivative, the mean of cotangents, is again differentiable."""

    @staticmethod
    @override
    def forward(ctx: Any, flat: Tensor) -> Tensor:
        out = flat.clone()
        dist.all_reduce(out)
        return out.div_(dist.get_world_size())

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return _Mean.apply(cotangents[0])


def processes() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process."""
    return dist.get_rank() if processes() > 1 else 0


def mean_over_processes(tree: Params, weight: int | None = None) -> Params:
    """Returns the average over all processes, with one collective per data type; differentiable.

    Divided tensors (`sharding`), which are averages already, stay as they are.

    Lightning's DDP strategy does not see gradients taken with `torch.autograd.grad`, so every derivative of a loss over
    shared variables goes through here. With one process it returns its argument.

    Args:
        tree: this process's values.
        weight: this process's weight, such as the number of its episodes; None: all processes weigh the same.
    """
    if processes() == 1:
        return tree
    if weight is not None:
        weighted = {name: weight * t for name, t in tree.items()}
        total = mean_over_processes({**weighted, "": next(iter(tree.values())).new_tensor(float(weight))})
        return {name: total[name] / total[""] for name in tree}
    out: Params = {name: t for name, t in tree.items() if divided(t)}
    for dtype in {t.dtype for name, t in tree.items() if name not in out}:
        part = {name: t for name, t in tree.items() if t.dtype == dtype and name not in out}
        flat = _Mean.apply(torch.cat([t.reshape(-1) for t in part.values()]))
        pieces = flat.split([t.numel() for t in part.values()])
        out.update({name: piece.view_as(t) for piece, (name, t) in zip(pieces, part.items(), strict=True)})
    return {name: out[name] for name in tree}


def total_over_processes(number: int, device: torch.device) -> int:
    """Returns the sum of a count over all processes."""
    if processes() == 1:
        return number
    total = torch.tensor(number, device=device)
    dist.all_reduce(total)
    return int(total)


def gather(t: Tensor) -> Tensor:
    """Returns the tensors of all processes, of equal shapes, one after the other along their leading dimension."""
    if processes() == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(processes())]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)


def statistics(layers: Iterable[nn.Module]) -> list[Params]:
    """Returns copies of the running statistics of normalisation layers."""
    return [{name: t.clone() for name, t in layer.named_buffers(recurse=False)} for layer in layers]


def merge_statistics(layers: Iterable[nn.Module], before: list[Params]) -> None:
    """Makes running statistics those of one process that takes the batches of all, one process after the other.

    The n batches of a process have taken statistics s to a s + c, a = (1 - momentum)^n; such maps are composed. Layers
    without momentum, whose statistics are means over the run, keep their own.

    Args:
        layers: normalisation layers, after this process's batches.
        before: their `statistics` before these, equal on all processes.
    """
    if processes() == 1:
        return
    for layer, old in zip(layers, before, strict=True):
        momentum: Any = layer.momentum
        if momentum is None:
            continue
        numbers = gather((layer.get_buffer("num_batches_tracked") - old["num_batches_tracked"])[None])
        layer.get_buffer("num_batches_tracked").copy_(old["num_batches_tracked"] + numbers.sum(0))
        for name in ("running_mean", "running_var"):
            now, value = layer.get_buffer(name), old[name]
            kept = (1 - momentum) ** numbers.to(now.dtype)[..., None]
            added = gather((now - kept[rank()] * value)[None])
            for a, c in zip(kept, added, strict=True):
                value = a * value + c
            now.copy_(value)


def agree(tree: Params) -> Params:
    """Returns the first process's values on all processes: random directions that all of them must share."""
    if processes() == 1:
        return tree
    out = {name: t.contiguous() for name, t in tree.items()}
    for t in out.values():
        dist.broadcast(t, src=0)
    return out
