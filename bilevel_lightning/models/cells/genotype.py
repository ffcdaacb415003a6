"""What a search finds: which operation lies on which edge of the two kinds of cells."""

import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.models.cells.operations import NONE, OPERATIONS

Edge: TypeAlias = tuple[str, int]
"""An operation, and the number of the state that it is applied to."""
Nodes: TypeAlias = tuple[tuple[Edge, Edge], ...]

INPUTS = 2
EDGE = re.compile(r"(\w+)\((\d+)\)")


@dataclass(frozen=True)
class Genotype:
    """The normal and the reduction cell, each a list of nodes with two edges.

    The states of a cell are its two inputs, 0 and 1 (the outputs of the cell before the last one, and of the last), and
    its nodes, from 2 on. A node is the sum of its two edges; the cell's output the concatenation of all its nodes.
    ``str(genotype)`` is one line, which `Genotype.of` reads again.

    Args:
        normal: for each node its two edges ``(operation, state)``.
        reduction: the same of the reduction cell.

    Raises:
        BilevelError: if it describes no cell; the message names the edge.
    """

    normal: Nodes
    reduction: Nodes

    def __post_init__(self) -> None:
        for kind in ("normal", "reduction"):
            nodes = getattr(self, kind)
            if not nodes:
                raise BilevelError(f"The {kind} cell of a genotype has no node; it needs at least one.")
            for i, edges in enumerate(nodes):
                if len(edges) != INPUTS:
                    raise BilevelError(f"Node {INPUTS + i} of the {kind} cell has {len(edges)} edges; it needs two.")
                for name, state in edges:
                    if name not in OPERATIONS or name == NONE:
                        raise BilevelError(
                            f"Node {INPUTS + i} of the {kind} cell has the operation {name!r}; choose among "
                            f"{', '.join(OPERATIONS[1:])}."
                        )
                    if not 0 <= state < INPUTS + i:
                        raise BilevelError(
                            f"Node {INPUTS + i} of the {kind} cell reads state {state}; only 0 to {INPUTS + i - 1} "
                            "come before it."
                        )

    def __str__(self) -> str:
        cells = {
            kind: " | ".join(" ".join(f"{name}({state})" for name, state in edges) for edges in nodes)
            for kind, nodes in asdict(self).items()
        }
        return " ".join(f"{kind}[{text}]" for kind, text in cells.items())

    @classmethod
    def of(cls, text: str, seed: int = 0, nodes: int = 4) -> "Genotype":
        """Returns the genotype of a published name, a JSON file, a line that `str` made, or ``random``.

        Args:
            text: which.
            seed: of ``random``.
            nodes: nodes of each cell of ``random``.

        Raises:
            BilevelError: if it is none of them.
        """
        if text == "random":
            return cls.random(seed, nodes)
        if text in PUBLISHED:
            return PUBLISHED[text]
        if found := re.fullmatch(r"\s*normal\[(.*)\]\s*reduction\[(.*)\]\s*", text):
            cells: list[Any] = []
            for part in found.groups():
                tokens = [node.split() for node in part.split("|")]
                edges = [[EDGE.fullmatch(token) for token in node] for node in tokens]
                if not all(match for node in edges for match in node):
                    raise BilevelError(f"{part!r} is no cell: a node is written as 'sep_conv_3x3(0) skip_connect(1)'.")
                cells.append(tuple(tuple((m[1], int(m[2])) for m in node if m) for node in edges))
            return cls(*cells)
        if not Path(text).is_file():
            raise BilevelError(
                f"The genotype {text!r} is neither a file nor 'random' nor one of {', '.join(PUBLISHED)}. A search "
                "writes genotype.json into its run's folder."
            )
        return cls.load(text)

    @classmethod
    def load(cls, path: str | Path) -> "Genotype":
        """Reads a file that `save` wrote.

        Raises:
            BilevelError: if it is not there, or holds no genotype.
        """
        try:
            content = json.loads(Path(path).read_text())
            cells = [
                tuple(tuple((str(name), int(state)) for name, state in edges) for edges in content[kind])
                for kind in ("normal", "reduction")
            ]
        except OSError as error:
            raise BilevelError(f"Cannot read the genotype {path}: {error.strerror}.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise BilevelError(
                f'{path} holds no genotype ({type(error).__name__}: {error}). It is a JSON object {{"normal": nodes, '
                '"reduction": nodes} with nodes such as [["sep_conv_3x3", 0], ["skip_connect", 1]].'
            ) from error
        try:
            return cls(*cells)  # type: ignore[arg-type]
        except BilevelError as error:
            raise BilevelError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes a JSON file, one node a line."""
        cells = [
            f'  "{kind}": [\n' + ",\n".join(f"    {json.dumps(edges)}" for edges in nodes) + "\n  ]"
            for kind, nodes in asdict(self).items()
        ]
        Path(path).write_text("{\n" + ",\n".join(cells) + "\n}\n")

    @classmethod
    def random(cls, seed: int = 0, nodes: int = 4, operations: tuple[str, ...] = OPERATIONS) -> "Genotype":
        """Draws a genotype: of each node two different states, and on each edge an operation, uniformly.

        The control of every search. It does not touch the global random numbers.
        """
        positive("nodes", nodes)
        generator = random.Random(seed)
        names = [name for name in operations if name != NONE]
        cells: list[Any] = [
            tuple(
                tuple((generator.choice(names), state) for state in sorted(generator.sample(range(INPUTS + i), INPUTS)))
                for i in range(nodes)
            )
            for _ in range(2)
        ]
        return cls(*cells)


def cell_of(weights: Tensor, operations: tuple[str, ...]) -> Nodes:
    """Reads the nodes of a cell out of its operations' weights.

    An edge is as strong as its strongest operation but ``none``; each node keeps its two strongest edges, each with
    that operation, the strongest first.

    Args:
        weights: nonnegative, shape ``(edges, operations)``, edges node by node, and of each node by state; 14 edges
            for four nodes.
        operations: names of the columns.
    """
    columns = [i for i, name in enumerate(operations) if name != NONE]
    strength, chosen = weights.detach()[:, columns].max(1)
    nodes: list[Any] = []
    first = 0
    while first < len(weights):
        states = INPUTS + len(nodes)
        kept = torch.argsort(strength[first : first + states], descending=True, stable=True)[:INPUTS].tolist()
        nodes.append(tuple((operations[columns[int(chosen[first + j])]], j) for j in kept))
        first += states
    return tuple(nodes)


SEP3, SEP5, DIL3, DIL5 = "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"
SKIP, MAX3, AVG3 = "skip_connect", "max_pool_3x3", "avg_pool_3x3"

PUBLISHED = {
    "DARTS_V1": Genotype(
        (((SEP3, 1), (SEP3, 0)), ((SKIP, 0), (SEP3, 1)), ((SKIP, 0), (SEP3, 1)), ((SEP3, 0), (SKIP, 2))),
        (((MAX3, 0), (MAX3, 1)), ((SKIP, 2), (MAX3, 0)), ((MAX3, 0), (SKIP, 2)), ((SKIP, 2), (AVG3, 0))),
    ),
    "DARTS_V2": Genotype(
        (((SEP3, 0), (SEP3, 1)), ((SEP3, 0), (SEP3, 1)), ((SEP3, 1), (SKIP, 0)), ((SKIP, 0), (DIL3, 2))),
        (((MAX3, 0), (MAX3, 1)), ((SKIP, 2), (MAX3, 1)), ((MAX3, 0), (SKIP, 2)), ((SKIP, 2), (MAX3, 1))),
    ),
    "PDARTS": Genotype(
        (((SKIP, 0), (DIL3, 1)), ((SKIP, 0), (SEP3, 1)), ((SEP3, 1), (SEP3, 3)), ((SEP3, 0), (DIL5, 4))),
        (((AVG3, 0), (SEP5, 1)), ((SEP3, 0), (DIL5, 2)), ((MAX3, 0), (DIL3, 1)), ((DIL3, 1), (DIL5, 3))),
    ),
    "PC_DARTS": Genotype(
        (((SEP3, 1), (SKIP, 0)), ((SEP3, 0), (DIL3, 1)), ((SEP5, 0), (SEP3, 1)), ((AVG3, 0), (DIL3, 1))),
        (((SEP5, 1), (MAX3, 0)), ((SEP5, 1), (SEP5, 2)), ((SEP3, 0), (SEP3, 3)), ((SEP3, 1), (SEP3, 2))),
    ),
    "DARTS_OUR4": Genotype(
        (((SEP3, 0), (DIL5, 1)), ((SKIP, 0), (SEP5, 2)), ((SEP3, 3), (SEP5, 1)), ((SEP5, 3), (SEP5, 2))),
        (((MAX3, 0), (SEP3, 1)), ((SEP5, 2), (AVG3, 1)), ((MAX3, 0), (MAX3, 3)), ((DIL3, 0), (DIL3, 4))),
    ),
}
"""Published genotypes for CIFAR-10: DARTS of first and second order, P-DARTS, PC-DARTS, and MEHA's."""
