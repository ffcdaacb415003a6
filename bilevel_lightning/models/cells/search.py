"""The network that is searched in: all operations on all edges, weighted by the architecture."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.models.cells.genotype import INPUTS, Genotype, cell_of
from bilevel_lightning.models.cells.operations import (
    NONE,
    OPERATIONS,
    FactorizedReduce,
    NormLayer,
    ReLUConvNorm,
    fixed_norm,
    operation,
)


def reductions(layers: int) -> tuple[int, int]:
    """Returns the numbers of the two reduction cells: after a third and after two thirds of the cells."""
    return layers // 3, 2 * layers // 3


def check_images(owner: str, image_shape: tuple[int, int, int], layers: int) -> None:
    """Looks at the sizes that both networks need.

    Raises:
        BilevelError: if two reductions cannot halve the images, or the cells are not of both kinds.
    """
    if any(size < 4 or size % 4 for size in image_shape[1:]):
        raise BilevelError(
            f"{owner}.image_shape must be of multiples of 4, since two cells halve height and width; got "
            f"{image_shape[1]}x{image_shape[2]}."
        )
    if layers < 3:
        raise BilevelError(f"{owner}.layers must be at least 3, two of which reduce, got {layers}.")


def input_layers(before: int, last: int, channels: int, halved: bool, norm: NormLayer) -> nn.ModuleList:
    """Returns what brings the outputs of the two cells before to ``channels``, and to the size of the last one.

    Args:
        before: channels of the cell before the last one, twice as high and wide where ``halved``.
        last: channels of the last cell.
        channels: of the maps within this cell.
        halved: whether the last cell is a reduction.
        norm: makes normalisation layers.
    """
    first = FactorizedReduce(before, channels, norm) if halved else ReLUConvNorm(before, channels, norm)
    return nn.ModuleList([first, ReLUConvNorm(last, channels, norm)])


class CellWeights(NamedTuple):
    """The weights in one kind of cell.

    Attributes:
        operations: of the operations on each edge, shape ``(edges, operations)``, each row's sum 1.
        edges: of the edges of each node, shape ``(edges,)``, each node's sum 1; None: all are 1.
    """

    operations: Tensor
    edges: Tensor | None

    def total(self) -> Tensor:
        """Returns the weight of each operation, times that of its edge."""
        return self.operations if self.edges is None else self.operations * self.edges[:, None]


class ArchitectureWeights(nn.Module):
    r"""The upper variables of a search: logits alpha of the operations, and with edge normalisation beta of the edges.

    The weights are softmax(alpha) over the operations of an edge and softmax(beta) over the edges of a node.

    Args:
        nodes: of each cell.
        operations: names of the operations.
        edge_normalization: whether edges are weighted too.
        scale: standard deviation of the first logits, normal with mean 0.
    """

    def __init__(self, nodes: int, operations: tuple[str, ...], edge_normalization: bool, scale: float) -> None:
        super().__init__()
        self.inputs = [INPUTS + i for i in range(nodes)]
        self.operations = operations
        shape = sum(self.inputs), len(operations)
        self.normal = nn.Parameter(scale * torch.randn(shape))
        self.reduction = nn.Parameter(scale * torch.randn(shape))
        self.edge_normalization = edge_normalization
        if edge_normalization:
            self.normal_edges = nn.Parameter(scale * torch.randn(shape[0]))
            self.reduction_edges = nn.Parameter(scale * torch.randn(shape[0]))

    @override
    def forward(self) -> dict[str, CellWeights]:
        """Returns the weights of the ``normal`` and the ``reduction`` cells."""
        found = {}
        for kind in ("normal", "reduction"):
            edges = None
            if self.edge_normalization:
                parts = getattr(self, f"{kind}_edges").split(self.inputs)
                edges = torch.cat([part.softmax(0) for part in parts])
            found[kind] = CellWeights(getattr(self, kind).softmax(1), edges)
        return found

    @torch.no_grad()
    def genotype(self) -> Genotype:
        """Returns the two strongest edges of each node, by the products of both weights where edges have one."""
        weights = self()
        return Genotype(*(cell_of(weights[kind].total(), self.operations) for kind in ("normal", "reduction")))

    @torch.no_grad()
    def entropy(self) -> dict[str, Tensor]:
        """Returns the mean entropy of an edge's weights in each kind of cell, in nats: log 8 for eight equal ones."""
        return {kind: torch.special.entr(w.operations).sum(1).mean() for kind, w in self().items()}


class MixedOperation(nn.Module):
    r"""All operations of an edge at once: ``sum_o w_o o(maps)``, pools being followed by normalisation.

    With partial channels (PC-DARTS), only the first 1/K of the channels pass through them; the others are passed on,
    or max-pooled 2x2 where the stride is 2, and all are shuffled, so that the next edge takes others.

    Args:
        channels: of input and output.
        stride: 1 or 2.
        operations: names of the operations.
        partial: K, which divides ``channels``.
        norm: makes normalisation layers.
    """

    def __init__(self, channels: int, stride: int, operations: tuple[str, ...], partial: int, norm: NormLayer) -> None:
        super().__init__()
        self.mixed, self.partial, self.stride = channels // partial, partial, stride
        self.parts = nn.ModuleDict()
        self.columns = []
        for column, name in enumerate(operations):
            if name == NONE:
                continue
            part = operation(name, self.mixed, stride, norm)
            self.parts[name] = nn.Sequential(part, norm(self.mixed)) if "pool" in name else part
            self.columns.append(column)

    @override
    def forward(self, maps: Tensor, weights: Tensor) -> Tensor:
        """Returns the weighted sum, for weights of shape ``(operations,)``."""
        taken = maps[:, : self.mixed]
        terms = [weights[i] * part(taken) for i, part in zip(self.columns, self.parts.values(), strict=True)]
        mixed: Tensor = sum(terms[1:], terms[0])  # stacking them would lose the memory format
        if self.partial == 1:
            return mixed
        rest = maps[:, self.mixed :]
        rest = rest if self.stride == 1 else functional.max_pool2d(rest, 2)
        shuffled: Tensor = functional.channel_shuffle(torch.cat([mixed, rest], 1), self.partial)
        return shuffled


class SearchCell(nn.Module):
    """A cell whose every node is the sum of mixed operations on all states before it.

    Args:
        before: channels of the output of the cell before the last one.
        last: channels of the output of the last cell.
        channels: of each node.
        nodes: number of nodes, whose concatenation is the output.
        reduction: whether the edges from the inputs have stride 2.
        halved: whether the last cell is a reduction.
        operations: names of the operations.
        partial: see `MixedOperation`.
    """

    def __init__(
        self,
        before: int,
        last: int,
        channels: int,
        nodes: int,
        reduction: bool,
        halved: bool,
        operations: tuple[str, ...],
        partial: int,
    ) -> None:
        super().__init__()
        self.kind, self.nodes = "reduction" if reduction else "normal", nodes
        self.inputs = input_layers(before, last, channels, halved, fixed_norm)
        self.edges = nn.ModuleList(
            MixedOperation(channels, 2 if reduction and state < INPUTS else 1, operations, partial, fixed_norm)
            for node in range(nodes)
            for state in range(INPUTS + node)
        )

    @override
    def forward(self, before: Tensor, last: Tensor, weights: CellWeights) -> Tensor:
        """Returns the maps of all nodes, concatenated."""
        states = [layer(maps) for layer, maps in zip(self.inputs, (before, last), strict=True)]
        edge = 0
        for _ in range(self.nodes):
            terms = []
            for state in states:
                term = self.edges[edge](state, weights.operations[edge])
                terms.append(term if weights.edges is None else weights.edges[edge] * term)
                edge += 1
            states.append(sum(terms[1:], terms[0]))
        return torch.cat(states[INPUTS:], 1)


class SearchNetwork(nn.Module):
    r"""A stem, cells of which two reduce, mean over space, linear layer; the lower variables of a search.

    The cells after a third and two thirds of all are reduction cells, which double the channels. Normalisation is by
    the batch at hand, without parameters or running statistics, in evaluation too: the losses are functions of the
    architecture, the weights and the batch alone, and a prediction depends on its whole batch.

    Args:
        image_shape: channels, height, width, the last two multiples of 4. Default that of CIFAR-10.
        classes: number of classes. Default 10.
        channels: C of each node in the first cells. Default 16, DARTS's.
        layers: number of cells. Default 8, DARTS's; MEHA's paper takes 3.
        nodes: of each cell. Default 4, DARTS's.
        stem_multiplier: the stem has so many times C channels. Default 3, DARTS's.
        operations: names of the operations on each edge. Default all eight, DARTS's.
        partial_channels: K: only 1/K of the channels pass through the operations (`MixedOperation`). Default 1, all;
            PC-DARTS takes 4.
        edge_normalization: weigh the edges of each node too, as PC-DARTS does. Default False.

    Raises:
        BilevelError: if a size is impossible, or an operation does not exist.

    References:
        H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable Architecture Search. ICLR 2019.
        Y. Xu, L. Xie, X. Zhang, X. Chen, G.-J. Qi, Q. Tian, H. Xiong. PC-DARTS: Partial Channel Connections for
        Memory-Efficient Architecture Search. ICLR 2020.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        channels: int = 16,
        layers: int = 8,
        nodes: int = 4,
        stem_multiplier: int = 3,
        operations: tuple[str, ...] = OPERATIONS,
        partial_channels: int = 1,
        edge_normalization: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        sizes = {"classes": classes, "channels": channels, "nodes": nodes, "stem_multiplier": stem_multiplier}
        for key, value in {**sizes, "partial_channels": partial_channels}.items():
            positive(f"{name}.{key}", value)
        check_images(name, image_shape, layers)
        if channels % partial_channels:
            raise BilevelError(
                f"{name}.partial_channels={partial_channels} does not divide channels={channels}: change one of them."
            )
        operations = tuple(operations)
        if wrong := [one for one in operations if one not in OPERATIONS]:
            raise BilevelError(f"{name}.operations: there is no {wrong[0]!r}; choose among {', '.join(OPERATIONS)}.")
        if not {*operations} - {NONE} or len({*operations}) < len(operations):
            raise BilevelError(f"{name}.operations needs an operation other than {NONE}, and each but once.")
        self.nodes, self.operations, self.edge_normalization = nodes, operations, edge_normalization
        self.image_shape = (image_shape[0], image_shape[1], image_shape[2])
        width = stem_multiplier * channels
        self.stem = nn.Sequential(nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False), fixed_norm(width))
        self.cells = nn.ModuleList()
        before, last, halved = width, width, False
        for i in range(layers):
            reduction = i in reductions(layers)
            channels *= 1 + reduction
            self.cells.append(
                SearchCell(before, last, channels, nodes, reduction, halved, operations, partial_channels)
            )
            before, last, halved = last, nodes * channels, reduction
        self.classifier = nn.Linear(last, classes)

    def architecture(self, scale: float) -> ArchitectureWeights:
        """Returns new upper variables for this network; `scale` as there."""
        return ArchitectureWeights(self.nodes, self.operations, self.edge_normalization, scale)

    @override
    def forward(self, images: Tensor, weights: dict[str, CellWeights]) -> Tensor:
        """Returns logits, shape ``(batch, classes)``."""
        before = last = self.stem(images.contiguous(memory_format=torch.channels_last))  # takes half the time on CPUs
        cell: Any
        for cell in self.cells:
            before, last = last, cell(before, last, weights[cell.kind])
        logits: Tensor = self.classifier(last.mean((2, 3)))
        return logits
