"""Weights of training samples, the upper variables of hyper-cleaning and reweighting.

All are called alike, ``weights(losses, index, source)``, with tensors of shape ``(batch,)``: a sample's own loss
without its graph, its number, and the number of its class or source. They return shape ``(batch,)``. Which of the three
a module reads is what distinguishes them; the others may be None.
"""

import torch
from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning.errors import positive


class SampleWeights(nn.Module):
    """One weight ``sigmoid(logit)`` in (0, 1) for each training sample, 0.5 at the beginning.

    Args:
        samples: number of training samples.

    Raises:
        BilevelError: if it is not positive.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(int(positive("SampleWeights.samples", samples))))

    @override
    def forward(self, losses: Tensor | None, index: Tensor, source: Tensor | None = None) -> Tensor:
        """Returns the weights of the samples ``index``, shape ``(batch,)``."""
        return torch.sigmoid(self.logits[index])


class SourceWeights(nn.Module):
    """One weight for each source of samples (or class), a softmax over the sources: ``1 / sources`` at the beginning.

    Args:
        sources: number of sources.

    Raises:
        BilevelError: if it is not positive.
    """

    def __init__(self, sources: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(int(positive("SourceWeights.sources", sources))))

    @override
    def forward(self, losses: Tensor | None, index: Tensor | None, source: Tensor) -> Tensor:
        """Returns the weights of samples from the sources ``source``, shape ``(batch,)``."""
        return self.logits.softmax(0)[source]


class LossWeights(nn.Sequential):
    """A weight in (0, 1) as a function of the sample's loss: Meta-Weight-Net, ``sigmoid(MLP(loss))``.

    One hidden layer with ReLU, in torch's default initialisation. The number of parameters, 301 with the default, does
    not depend on the data.

    Args:
        hidden: units of the hidden layer. Default 100, the paper's.

    Raises:
        BilevelError: if it is not positive.

    References:
        J. Shu, Q. Xie, L. Yi, Q. Zhao, S. Zhou, Z. Xu, D. Meng. Meta-Weight-Net: Learning an Explicit Mapping For
        Sample Weighting. NeurIPS 2019.
    """

    def __init__(self, hidden: int = 100) -> None:
        units = int(positive("LossWeights.hidden", hidden))
        super().__init__(nn.Linear(1, units), nn.ReLU(), nn.Linear(units, 1), nn.Sigmoid())

    @override
    def forward(self, losses: Tensor, index: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        """Returns the weights of samples with these losses, shape ``(batch,)``."""
        weights: Tensor = super().forward(losses[:, None])  # type: ignore[no-untyped-call]
        return weights[:, 0]
