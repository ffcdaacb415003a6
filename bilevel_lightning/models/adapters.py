"""A part of a network as the lower variables: chosen parameters, or low-rank adapters beside frozen layers."""

import copy
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive


def _matching(setting: str, pattern: str, names: list[str], what: str) -> list[str]:
    """Returns the names in which the regular expression ``pattern`` is found.

    Raises:
        BilevelError: if it is no regular expression, or is found in none.
    """
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise BilevelError(f"{setting} is no regular expression: {error}.") from error
    if not found:
        raise BilevelError(f"{setting}={pattern!r} is found in no {what}; there are {', '.join(names)}.")
    return found


class Subset(nn.Module):
    r"""A network of which only some parameters are trained; the others are frozen: no level changes them.

    Args:
        model: the network.
        trained: regular expression, found (`re.search`) in the names of the parameters that are trained, such as
            ``blocks\.1|norm`` for the second layer and the norms of `GPT`.

    Raises:
        BilevelError: if no parameter has such a name.
    """

    def __init__(self, model: nn.Module, trained: str) -> None:
        super().__init__()
        self.model = model
        parameters = dict(model.named_parameters())
        found = _matching(f"{type(self).__name__}.trained", trained, [*parameters], "parameter")
        for name, p in parameters.items():
            p.requires_grad_(name in found)

    @override
    def forward(self, inputs: Any) -> Any:
        return self.model(inputs)


class LowRankLayer(nn.Module):
    """``h = W a + bias + (alpha / rank) B A a`` with W and bias frozen; A is random and B zero, so that it starts at W.

    Args:
        base: a linear layer, or one of Hugging Face's ``Conv1D``, whose weight is transposed.
        rank: rows of A and columns of B.
        alpha: scale of the adapter, divided by the rank.
    """

    def __init__(self, base: Any, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.transposed = not isinstance(base, nn.Linear)
        outputs, inputs = base.weight.T.shape if self.transposed else base.weight.shape
        self.A = nn.Parameter(base.weight.new_empty(rank, inputs))
        self.B = nn.Parameter(base.weight.new_zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        h: Tensor = self.base(inputs) + self.scale * linear(linear(inputs, self.A), self.B)
        return h

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Returns the layer with weight ``W + (alpha / rank) B A``."""
        change = self.scale * self.B @ self.A
        layer: nn.Module = copy.deepcopy(self.base)
        layer.weight += change.T if self.transposed else change  # type: ignore[operator]
        return layer


class LowRank(nn.Module):
    """A network with low-rank adapters (LoRA): A and B of each adapted layer are trained, all else is frozen.

    Args:
        model: the network.
        rank: r of the adapters. Default 4, in the middle of the paper's 1 to 64.
        alpha: their scale, divided by the rank. Default 8, twice the rank.
        layers: regular expression, found (`re.search`) in the names of the adapted layers: `torch.nn.Linear`, or
            Hugging Face's ``Conv1D``. Default ``.``: all of them. The paper adapts the attention only: ``qkv|out`` in
            `GPT`.
        trained: regular expression, found in the names of parameters that are trained beside the adapters, such as
            ``embedding|norm`` where the network was not trained before. Default: empty, none.

    Raises:
        BilevelError: if a number is not positive, or nothing has such a name.

    References:
        E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen. LoRA: Low-Rank Adaptation of
        Large Language Models. ICLR 2022.
    """

    def __init__(
        self, model: nn.Module, rank: int = 4, alpha: float = 8.0, layers: str = ".", trained: str = ""
    ) -> None:
        super().__init__()
        positive("LowRank.rank", rank)
        positive("LowRank.alpha", alpha)
        linears = [
            name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
        ]
        if not linears:
            raise BilevelError(f"LowRank.model={type(model).__name__} has no linear layer: train it whole.")
        names = _matching("LowRank.layers", layers, linears, "linear layer")
        parameters = dict(model.named_parameters())
        kept = _matching("LowRank.trained", trained, [*parameters], "parameter") if trained else []
        for name, p in parameters.items():
            p.requires_grad_(name in kept)
        for name in names:
            model.set_submodule(name, LowRankLayer(model.get_submodule(name), rank, alpha))
        self.model = model

    @override
    def forward(self, inputs: Any) -> Any:
        return self.model(inputs)

    def merged(self) -> nn.Module:
        """Returns a copy of the network with the adapters added to the weights, as fast as the network without them."""
        model = copy.deepcopy(self.model)
        for name, layer in [*model.named_modules()]:
            if isinstance(layer, LowRankLayer):
                model.set_submodule(name, layer.merged())
        return model
