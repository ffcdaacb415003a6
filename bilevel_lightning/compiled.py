"""A whole upper iteration's hypergradient, with all its derivatives, as one compiled function."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from typing_extensions import override

from bilevel_lightning import randomness
from bilevel_lightning.errors import BilevelError


class Compiled:
    """Traces a function of nested tensors down to plain tensor operations, derivatives included, and compiles those.

    `torch.compile` alone stops at `torch.autograd.grad`. Here `make_fx` first records what autograd does. The recording
    holds for one set of shapes; another set is recorded and compiled anew, which takes minutes for many lower steps.

    Random numbers (dropout) are recorded as draws: each call draws anew, reproducibly from torch's seed, but other
    numbers than without compiling. Recording itself leaves the random state as it was.

    Args:
        function: returns nested tensors and the oracle counts, which are those of the recording; it must not branch
            on values, nor take them out of tensors (``item``, ``tolist``, ``numpy``).

    Raises:
        BilevelError: if it does, or has an operation that cannot be recorded or compiled.
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
            self.programs[key] = self._record(leaves, spec)
        program, result, counts = self.programs[key]
        try:
            out = program(*(t for t in leaves if isinstance(t, Tensor)))
        except RuntimeError as error:  # of the compiler, or a size that was recorded from values and is another now
            reason = str(error).partition("\n")[0]
            raise BilevelError(f"compile cannot run its recording on this batch; leave it off. ({reason})") from error
        return tree_unflatten(out, result), counts.copy()

    def _record(self, leaves: list[Any], spec: Any) -> tuple[Callable[..., list[Tensor]], Any, Counter[str]]:
        found: dict[str, Any] = {}
        tensors = [t for t in leaves if isinstance(t, Tensor)]

        def flat(*tensors: Tensor) -> list[Tensor]:
            given = iter(tensors)
            filled = [next(given) if isinstance(t, Tensor) else t for t in leaves]
            with _NoConstants():
                result, found["counts"] = self.function(*tree_unflatten(filled, spec))
            out, found["result"] = tree_flatten(result)
            return out

        try:
            with randomness.replayed(randomness.state(tensors)):
                traced = make_fx(flat)(*tensors)
        except (RuntimeError, TypeError) as error:  # TypeError: of tensor subclasses
            raise BilevelError(f"compile cannot record this task or algorithm; leave it off. ({error})") from error
        return torch.compile(traced, dynamic=False), found["result"], found["counts"]


class _NoConstants(TorchFunctionMode):
    """Refuses what takes values out of tensors without `make_fx` noticing: they would be constants of the recording."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
            raise RuntimeError(f"Tensor.{func.__name__} gives values that would stay those of the first batch")
        return func(*args, **(kwargs or {}))
