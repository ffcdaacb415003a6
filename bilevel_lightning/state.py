"""What an algorithm keeps from one upper iteration to the next, in the checkpoint."""

import torch
from torch import nn

from bilevel_lightning import tree
from bilevel_lightning.tree import Params


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
    def set(self, values: Params) -> None:
        """Writes the tensors in place."""
        for name, t in self.named_buffers():
            t.copy_(values[name.replace(":", ".")])

    def get(self) -> Params:
        """Returns the tensors by their names."""
        return {name.replace(":", "."): t for name, t in self.named_buffers()}
