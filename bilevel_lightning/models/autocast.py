"""Reduced precision around a network's forward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning.errors import BilevelError


def _first_only(gradient: Tensor) -> None:
    """Refuses to be part of a second derivative."""
    if torch.is_grad_enabled():
        raise BilevelError(
            "Autocast is for methods without second derivatives (MEHA, F2SA, VPBGD, BOME, DARTS, SAMA, ...), which "
            "bfloat16 would spoil (docs/trust.md): give the network without it."
        )


class Autocast(nn.Module):
    """A network evaluated under `torch.autocast` in bfloat16; its parameters and its output stay float32.

    Matrix products, and the attention, are computed and stored for the backward pass in bfloat16; losses, gradients,
    and the steps of x and y are float32. Upper iterations run in float32 otherwise, also with ``bf16-mixed``
    (docs/trust.md has the errors that bfloat16 makes). Only for methods without second derivatives. On CPUs without
    instructions for bfloat16 it saves memory but no time.

    Args:
        model: the network.

    Raises:
        BilevelError: when its second derivatives are taken.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, inputs: Any) -> Tensor:
        # The cache of cast weights would last as long as the upper iteration, with a copy for each y that it visits.
        with torch.autocast(inputs.device.type, torch.bfloat16, cache_enabled=False):
            outputs: Tensor = self.model(inputs)
        outputs = outputs.float()
        if outputs.requires_grad:
            outputs.register_hook(_first_only)  # type: ignore[no-untyped-call]
        return outputs
