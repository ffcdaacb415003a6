"""The same random numbers twice: dropout in a loss must not change between evaluations that are compared."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

Generators: TypeAlias = tuple[list[torch.device], list[Tensor]]


def state(tensors: Iterable[Tensor]) -> Generators:
    """Returns the state of the generators that a loss of ``tensors`` draws from: the CPU's and their accelerators'."""
    devices = list({t.device for t in tensors if t.device.type == "cuda"})
    return devices, [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


def saved() -> dict[str, Any]:
    """Returns the state of torch's generators on all devices, as it lies in checkpoints."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def restore(states: dict[str, Any]) -> None:
    """Sets the generators to what `saved` gave."""
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in states["cuda"]])


@contextmanager
def replayed(generators: Generators) -> Iterator[None]:
    """Runs the block with the random numbers that followed ``state``; afterwards the generators are as before it."""
    devices, states = generators
    with torch.random.fork_rng(devices):
        torch.set_rng_state(states[0])
        for device, values in zip(devices, states[1:], strict=True):
            torch.cuda.set_rng_state(values, device)
        yield
