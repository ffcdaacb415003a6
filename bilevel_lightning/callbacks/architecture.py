"""What a person sees of an architecture search: the weights of the operations, and the cells that they stand for."""

from typing import Any, TypeAlias

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path as Curve
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override

from bilevel_lightning.callbacks.figures import Figures, run_folder
from bilevel_lightning.models.cells import OPERATIONS, Genotype
from bilevel_lightning.models.cells.genotype import INPUTS, Nodes

KINDS = ("normal", "reduction")
COLORS = dict(
    zip(OPERATIONS[1:], ("#c1272d", "#e07b39", "#6b6b6b", "#1f5fa8", "#5aa0dc", "#1b7a4b", "#6cbf84"), strict=True)
)
Point: TypeAlias = tuple[float, float]


def draw_genotype(genotype: Genotype, title: str) -> Figure:
    """Draws both cells as graphs, from the two inputs on the left to the last node on the right.

    Args:
        genotype: the cells.
        title: one line above all.
    """
    widest = max(len(genotype.normal), len(genotype.reduction))
    figure = Figure(figsize=(2.3 * widest + 1.2, 7.6), layout="constrained")
    figure.suptitle(title, size=11)
    for axes, kind in zip(figure.subplots(2, 1), KINDS, strict=True):
        _draw_cell(axes, getattr(genotype, kind), kind)
    return figure


def _draw_cell(axes: Any, nodes: Nodes, kind: str) -> None:
    """Draws one cell: a column for each node, its two operations to the left of it, one above the other."""
    column, side, height = 2.3, 1.1, 0.75
    places = {0: (0.0, height), 1: (0.0, -height)}
    names = {0: "cell k-2\n(0)", 1: "cell k-1\n(1)"}
    for i in range(len(nodes)):
        places[INPUTS + i], names[INPUTS + i] = (column * (i + 1), 0.0), f"{INPUTS + i}"
    for state, place in places.items():
        box = {"boxstyle": "round,pad=0.4", "fc": "#f3f1ea", "ec": "#444444"}
        axes.text(*place, names[state], ha="center", va="center", size=9, bbox=box, zorder=4)
    for i, edges in enumerate(nodes):
        node = places[INPUTS + i]
        order = sorted(edges, key=lambda edge: (edge[1] == 1, edge[1]))  # input 1 lies below
        for sign, (name, state) in zip((1, -1), order, strict=True):
            middle = node[0] - side, sign * height
            passed = max(INPUTS - 1 + i - max(state, 1), 0)  # columns between both
            bow = sign * (height + 1.1 + 0.6 * passed) if passed else (places[state][1] + middle[1]) / 2
            _line(axes, places[state], bow, middle, COLORS[name], "-")
            _line(axes, middle, middle[1] / 2, (node[0] - 0.13, sign * 0.08), COLORS[name], "-|>")
            box = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": COLORS[name]}
            text = name.replace("_", " ", 1).replace("_", "\n")
            axes.text(*middle, text, size=8, color=COLORS[name], ha="center", va="center", zorder=5, bbox=box)
    axes.set(xlim=(-0.6, column * len(nodes) + 0.5), ylim=(-2.6, 2.6))
    last = INPUTS + len(nodes) - 1
    axes.set_title(f"{kind} cell; its output is the concatenation of nodes {INPUTS} to {last}", size=10, loc="left")
    axes.axis("off")


def _line(axes: Any, start: Point, bow: float, end: Point, color: str, style: str) -> None:
    """Draws a curve whose middle is drawn to the height ``bow``."""
    points = [start, ((start[0] + end[0]) / 2, bow), end]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3])
    axes.add_patch(FancyArrowPatch(path=curve, arrowstyle=style, mutation_scale=10, color=color, lw=1.4, zorder=2))


def draw_weights(module: Any, title: str) -> Figure:
    """Draws the weights of both kinds of cells: a row for each edge, a column for each operation.

    Args:
        module: the task's upper module, `ArchitectureWeights`.
        title: one line above all.
    """
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    figure.suptitle(title, size=11)
    names = [name.replace("_", " ") for name in module.operations]
    labels = [f"{state} → {INPUTS + i}" for i, states in enumerate(module.inputs) for state in range(states)]
    for axes, (kind, weights) in zip(figure.subplots(1, 2), module().items(), strict=True):
        total = weights.total().detach().float().cpu().numpy()
        image = axes.imshow(total, aspect="auto", cmap="viridis", vmin=0)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", size=8)
        axes.set_yticks(range(len(labels)), labels, size=8)
        axes.set_title(f"{kind} cells", size=10, loc="left")
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


class ArchitectureFigures(Figures):
    """The weights of the operations as heat maps, and the cells that they stand for as graphs.

    Both go to TensorBoard after each validation, with the entropy of the weights, ``architecture/entropy_normal`` and
    ``..._reduction``: the mean over the edges, in nats; log 8 = 2.08 for eight equal weights, 0 for a choice that is
    made. At the end both are written into the run's folder, ``architecture.png`` and ``genotype.png``.
    """

    @override
    @torch.no_grad()
    def figures(self, trainer: Trainer, pl_module: Any) -> dict[str, Figure]:
        """Draws both."""
        weights = pl_module.hooks.upper
        after = f"after {trainer.global_step} upper iterations"
        return {
            "architecture": draw_weights(weights, f"Weights of the operations {after}"),
            "genotype": draw_genotype(weights.genotype(), f"Cells {after}"),
        }

    @override
    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking:
            return
        entropy = pl_module.hooks.upper.entropy()  # type: ignore[union-attr, operator]
        logs = {f"architecture/entropy_{kind}": float(value) for kind, value in entropy.items()}
        for logger in trainer.loggers:
            logger.log_metrics(logs, step=trainer.global_step)


class GenotypeReport(Callback):
    """Prints the genotype at the end of a search, and saves it as ``genotype.json`` in the run's folder."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        genotype: Genotype = pl_module.hooks.upper.genotype()  # type: ignore[union-attr, operator]
        rank_zero_info(f"Genotype: {genotype}")
        if folder is not None:
            genotype.save(folder / "genotype.json")
            rank_zero_info(
                f"To retrain it: --model.genotype {folder}/genotype.json with the config nas/cifar10_retrain or "
                "nas/digits_retrain."
            )
