"""Reweighting sources of text for a language model."""

import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule
from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning.callbacks.reweighting import SourceWeightCurve
from bilevel_lightning.datamodules.text import TextSources
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.models.weights import SampleWeights, SourceWeights
from bilevel_lightning.tasks.reweighting import Reweighting

ROWS = 32  # windows that are evaluated at once at validation and test


class TextReweighting(Reweighting):
    r"""`Reweighting` of the sources of a language model's text, in bits per byte.

    Upper: f(y) = mean over the validation windows of l_j(y), l the mean cross-entropy over a window's positions.
    Lower: g(x, y) = mean over the training windows of softmax(x)_{s(i)} l_i(y) + l2 |y|^2, s(i) the source of window i.

    With `SourceWeights` it is the problem of ScaleBiO, whose minimax penalty is V-PBGD's and F2SA's. Metrics:
    ``bits_per_byte`` of y on the validation or test text, l / log 2 (the perplexity of a byte is 2 to that power);
    ``accuracy`` of the next byte; ``source_bits_per_byte_0``, ... on the first windows of each source, corrupted as
    they are; with `SourceWeights`, ``source_weight_0``, ...

    Args:
        model: network from tokens ``(batch, length)`` to logits ``(batch, length, tokens)``, such as `GPT` or
            `HuggingFaceModel`, alone or in `LowRank`, `Subset`, `Autocast`; its trainable parameters are y.
        weights: as in `Reweighting`.
        l2: as in `Reweighting`.
        normalize: as in `Reweighting`.

    Raises:
        BilevelError: if l2 is negative, or the data do not fit the weights or the model.

    References:
        R. Pan, D. Zhang, H. Zhang, X. Pan, M. Xu, J. Zhang, R. Pi, X. Wang, T. Zhang. ScaleBiO: Scalable Bilevel
        Optimization for LLM Data Reweighting. ACL 2025.
    """

    def __init__(self, model: nn.Module, weights: nn.Module, l2: float = 0.0, normalize: bool = False) -> None:
        super().__init__(model, weights, l2, normalize)

    @torch.no_grad()
    def scores(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the bits per byte of each window, and the share of its bytes that are the likeliest."""
        bits, right = [], []
        for part, wanted in zip(torch.split(inputs, ROWS), torch.split(targets, ROWS), strict=True):
            logits = self.lower(part)
            each = nn.functional.cross_entropy(logits.mT, wanted, reduction="none")
            bits.append(each.mean(1) / math.log(2))
            right.append((logits.argmax(2) == wanted).to(each).mean(1))
        return torch.cat(bits), torch.cat(right)

    @override
    def metrics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        bits, right = self.scores(*batch["upper"])
        found = {"bits_per_byte": bits.mean(), "accuracy": right.mean()}
        inputs, targets, _, source = batch["lower"]
        bits, _ = self.scores(inputs, targets)
        found |= {f"source_bits_per_byte_{s}": bits[source == s].mean() for s in source.unique().tolist()}
        if isinstance(self.upper, SourceWeights):
            found |= {f"source_weight_{s}": value for s, value in enumerate(self.upper.logits.softmax(0))}
        return found

    @override
    def predict(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Returns for each training window its number, source, bits per byte and weight."""
        inputs, targets, index, source = batch
        bits, _ = self.scores(inputs, targets)
        weights = self.upper(bits * math.log(2), index, source)
        return {"index": index, "source": source, "bits_per_byte": bits, "weight": weights}

    @override
    def check_data(self, datamodule: LightningDataModule) -> None:
        if not isinstance(datamodule, TextSources):
            super().check_data(datamodule)
            return
        windows, index, source = datamodule.train
        sources = int(source.max()) + 1
        self._fits(SourceWeights, "sources", sources, f"sources ({', '.join(datamodule.names)})")
        self._fits(SampleWeights, "samples", len(index), "training windows")
        inputs, _ = datamodule.decoded((windows[:1].to(next(self.lower.parameters()).device),))
        try:
            with torch.no_grad():
                shape = tuple(self.lower(inputs).shape)
        except (RuntimeError, IndexError) as error:
            raise BilevelError(f"task.model does not accept windows of {inputs.shape[1]} bytes ({error}).") from error
        if shape[:-1] != tuple(inputs.shape) or shape[-1] < 256:
            raise BilevelError(
                f"task.model returns shape {shape} for one window of {inputs.shape[1]} bytes, where the last dimension "
                "must hold a logit for each of 256 bytes: raise tokens (vocab_size) to 256 or more."
            )

    @override
    def callbacks(self) -> list[Callback]:
        return [SourceWeightCurve()]
