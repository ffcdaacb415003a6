"""The network of a genotype, which is trained in the usual way."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.models.cells.genotype import INPUTS, Genotype, Nodes
from bilevel_lightning.models.cells.operations import operation
from bilevel_lightning.models.cells.search import check_images, input_layers, reductions


def drop_path(maps: Tensor, probability: float) -> Tensor:
    """Sets the maps of each sample to zero with a probability p, and divides the others by 1 - p.

    The expectation is the maps themselves. G. Larsson, M. Maire, G. Shakhnarovich. FractalNet. ICLR 2017.

    Args:
        maps: shape ``(batch, channels, height, width)``, on any device.
        probability: p, 0 <= p < 1.
    """
    if probability == 0:
        return maps
    keep = 1 - probability
    mask = torch.empty((len(maps), 1, 1, 1), dtype=maps.dtype, device=maps.device).bernoulli_(keep)
    return maps * (mask / keep)


class GenotypeCell(nn.Module):
    """A cell with the edges of a genotype.

    Args:
        nodes: of the genotype's cell of this kind.
        before: channels of the output of the cell before the last one.
        last: channels of the output of the last cell.
        channels: of each node.
        reduction: whether the edges from the inputs have stride 2.
        halved: whether the last cell is a reduction.
    """

    def __init__(self, nodes: Nodes, before: int, last: int, channels: int, reduction: bool, halved: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d
        self.inputs = input_layers(before, last, channels, halved, norm)
        self.states = [state for edges in nodes for _, state in edges]
        self.edges = nn.ModuleList(
            operation(name, channels, 2 if reduction and state < INPUTS else 1, norm)
            for edges in nodes
            for name, state in edges
        )

    @override
    def forward(self, before: Tensor, last: Tensor, dropped: float = 0.0) -> Tensor:
        """Returns the maps of all nodes, concatenated; ``dropped``: probability of each edge but the identity's."""
        states = [layer(maps) for layer, maps in zip(self.inputs, (before, last), strict=True)]
        for first in range(0, len(self.edges), 2):
            pair = []
            for layer, state in zip(self.edges[first : first + 2], self.states[first : first + 2], strict=True):
                maps = layer(states[state])
                pair.append(maps if isinstance(layer, nn.Identity) else drop_path(maps, dropped))
            states.append(pair[0] + pair[1])
        return torch.cat(states[INPUTS:], 1)


class AuxiliaryHead(nn.Sequential):
    """A second classifier after two thirds of the cells, on maps of 8x8 to 10x10.

    Args:
        channels: of the maps.
        classes: number of classes.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=3, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(768, classes),
        )


class GenotypeNetwork(nn.Module):
    """A stem, cells with a genotype's edges, mean over space, linear layer.

    Its layout is that of `SearchNetwork`, with batch normalisation of the usual kind: parameters, running statistics.

    Args:
        genotype: the cells.
        image_shape: channels, height, width, the last two multiples of 4. Default that of CIFAR-10.
        classes: number of classes. Default 10.
        channels: C of each node in the first cells. Default 36, DARTS's.
        layers: number of cells. Default 20, DARTS's; MEHA's paper takes 8.
        stem_multiplier: the stem has so many times C channels. Default 3, DARTS's.
        auxiliary: whether there is a second classifier, which is used in training only. Default False.

    Attributes:
        dropped: probability with which training drops an edge (`drop_path`), 0 at first.

    Raises:
        BilevelError: if a size is impossible.

    References:
        H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable Architecture Search. ICLR 2019.
    """

    def __init__(
        self,
        genotype: Genotype,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        channels: int = 36,
        layers: int = 20,
        stem_multiplier: int = 3,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for key, value in {"classes": classes, "channels": channels, "stem_multiplier": stem_multiplier}.items():
            positive(f"{name}.{key}", value)
        check_images(name, image_shape, layers)
        if auxiliary and not all(8 <= size // 4 <= 10 for size in image_shape[1:]):
            raise BilevelError(
                f"{name}.auxiliary is for images of 32 to 40 pixels, whose maps it pools to 2x2; got "
                f"{image_shape[1]}x{image_shape[2]}: leave it out (auxiliary_weight 0)."
            )
        self.dropped = 0.0
        width = stem_multiplier * channels
        self.stem = nn.Sequential(nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.cells = nn.ModuleList()
        before, last, halved = width, width, False
        self.place = reductions(layers)[1]
        for i in range(layers):
            reduction = i in reductions(layers)
            channels *= 1 + reduction
            nodes = genotype.reduction if reduction else genotype.normal
            self.cells.append(GenotypeCell(nodes, before, last, channels, reduction, halved))
            before, last, halved = last, len(nodes) * channels, reduction
            if i == self.place:
                self.auxiliary = AuxiliaryHead(last, classes) if auxiliary else None
        self.classifier = nn.Linear(last, classes)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns logits, shape ``(batch, classes)``, and in training those of the auxiliary head, or else None."""
        before = last = self.stem(images.contiguous(memory_format=torch.channels_last))  # takes half the time on CPUs
        second = None
        for i, cell in enumerate(self.cells):
            before, last = last, cell(before, last, self.dropped if self.training else 0.0)
            if i == self.place and self.training and self.auxiliary is not None:
                second = self.auxiliary(last)
        return self.classifier(last.mean((2, 3))), second
