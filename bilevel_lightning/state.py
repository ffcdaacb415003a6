"""What an algorithm keeps from one upper iteration to the next, in the checkpoint."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bilevel_lightning import tree
from bilevel_lightning.tree import Params


class Row(NamedTuple):
    """New values for one entry, or several, of the leading dimension of kept tensors; the others stay as they are."""

    number: int | Tensor
    rows: Params


class State(nn.Module):
    """Named tensors as buffers, so that they move with the module and are saved with it.

    Args:
        values: initial values; they are copied. Dots in names, which buffers cannot have, are stored as colons.
    """

    def __init__(self, values: Params) -> None:
        super().__init__()
        for name, t in tree.clone(values).items():
            self.register_buffer(name.replace(".", ":"), t)

    @torch.no_grad()
    def set(self, values: Params | Row) -> None:
        """Writes the tensors, or some rows of each, in place."""
        where, given = (values.number, values.rows) if isinstance(values, Row) else (..., values)
        for name, t in self.named_buffers():
            t[where] = given[name.replace(":", ".")]

    def get(self) -> Params:
        """Returns the tensors by their names."""
        return {name.replace(":", "."): t for name, t in self.named_buffers()}
