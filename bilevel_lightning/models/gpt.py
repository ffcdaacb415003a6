"""A decoder-only transformer in the manner of GPT-2: bytes, or other tokens, to logits."""

from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive


class Block(nn.Module):
    """One pre-norm layer: ``h <- h + attention(norm(h))``, then ``h <- h + mlp(norm(h))``.

    Attention is causal and scaled by the root of the head's width; the MLP has four times the width and a GELU.

    Args:
        width: numbers a token, a multiple of ``heads``.
        heads: number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    @override
    def forward(self, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        moved: Tensor = h + self.down(functional.gelu(self.up(self.norm2(h))))
        return moved


class GPT(nn.Module):
    """Decoder-only transformer: tokens, integers of shape ``(batch, length)``, to logits ``(batch, length, tokens)``.

    Learnt positions, pre-norm layers (`Block`), a last norm, and an output layer that is the embedding (tied). No
    dropout: losses are functions of (x, y), which differences of losses (MEHA, F2SA) need. Weights are drawn from a
    normal distribution of standard deviation 0.02, those into the residual stream from 0.02 / sqrt(2 depth); biases are
    0. All of that as in GPT-2. With the defaults 120 576 parameters.

    Args:
        tokens: size of the vocabulary. Default 256: bytes.
        context: longest sequence, in tokens. Default 64.
        width: numbers a token. Default 64.
        depth: number of layers. Default 2.
        heads: attention heads of each layer; they divide the width. Default 4.
        weights: file whose weights it begins with: a checkpoint of a run, or what `torch.save` wrote of a
            ``state_dict``, of a `GPT` of the same sizes (also in `Autocast`). Default: random weights.

    Raises:
        BilevelError: if a size is impossible, a sequence is longer than the context, or the file does not fit.

    References:
        A. Radford, J. Wu, R. Child, D. Luan, D. Amodei, I. Sutskever. Language Models are Unsupervised Multitask
        Learners. OpenAI, 2019 (GPT-2).
    """

    def __init__(
        self,
        tokens: int = 256,
        context: int = 64,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"tokens": tokens, "context": context, "width": width, "depth": depth, "heads": heads}
        for name, value in sizes.items():
            positive(f"GPT.{name}", value)
        if width % heads:
            raise BilevelError(f"GPT.heads={heads} must divide GPT.width={width}.")
        self.context = context
        self.embedding, self.positions = nn.Embedding(tokens, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * depth) ** 0.5 if into_residual else 0.02)
        if weights is not None:
            self._load(weights)

    def _load(self, path: str) -> None:
        """Reads the weights of a file, which may hold more than the network."""
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            found = found.get("state_dict", found)
            prefix = next(name for name in found if name.endswith("embedding.weight")).removesuffix("embedding.weight")
            self.load_state_dict({name: found[prefix + name] for name in self.state_dict()})
        except (OSError, RuntimeError, KeyError, StopIteration, UnpicklingError) as error:
            raise BilevelError(f"GPT.weights={path} does not fit: {type(error).__name__}: {error}") from error

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        length = inputs.shape[1]
        if length > self.context:
            raise BilevelError(f"A sequence of {length} tokens is longer than GPT.context={self.context}; raise it.")
        h = self.embedding(inputs) + self.positions(torch.arange(length, device=inputs.device))
        for block in self.blocks:
            h = block(h)
        return functional.linear(self.norm(h), self.embedding.weight)
