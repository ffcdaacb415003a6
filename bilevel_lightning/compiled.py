"""A whole upper iteration's hypergradient, with all its derivatives, as one compiled function."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from bilevel_lightning.errors import BilevelError


class Compiled:
    """Traces a function of nested tensors down to plain tensor operations, derivatives included, and compiles those.

    `torch.compile` alone stops at `torch.autograd.grad`. Here `make_fx` first records what autograd does. The recording
    holds for one set of shapes; another set is recorded and compiled anew, which takes minutes for many lower steps.

    Args:
        function: returns nested tensors and the oracle counts, which are those of the recording; it must not branch
            on values.
    """

    def __init__(self, function: Callable[..., tuple[Any, Counter[str]]]) -> None:
        self.function = function
        self.programs: dict[Any, tuple[Callable[..., list[Tensor]], Any, Counter[str]]] = {}

    def __call__(self, *args: Any) -> tuple[Any, Counter[str]]:
        """Returns what ``function`` returns."""
        leaves, spec = tree_flatten(args)
        shapes = [(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves]
        key = (str(spec), str(shapes))
        if key not in self.programs:
            self.programs[key] = self._compile(leaves, spec)
        program, result, counts = self.programs[key]
        return tree_unflatten(program(*(t for t in leaves if isinstance(t, Tensor))), result), counts

    def _compile(self, leaves: list[Any], spec: Any) -> tuple[Callable[..., list[Tensor]], Any, Counter[str]]:
        found: dict[str, Any] = {}

        def flat(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            filled = [next(given) if isinstance(t, Tensor) else t for t in leaves]
            result, found["counts"] = self.function(*tree_unflatten(filled, spec))
            out, found["result"] = tree_flatten(result)
            return out

        try:
            traced = make_fx(flat)(*(t for t in leaves if isinstance(t, Tensor)))
        except RuntimeError as error:
            raise BilevelError(f"compile cannot record this task or algorithm; leave it off. ({error})") from error
        return torch.compile(traced, dynamic=False), found["result"], found["counts"]
