"""What a person sees of an architecture search: the weights of the operations, and the cells that they stand for."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override

from bilevel_lightning.models.cells import OPERATIONS, Genotype

KINDS = ("normal", "reduction")
COLORS = dict(
    zip(
        OPERATIONS[1:], ("#c1272d", "#e07b39", "#6b6b6b", "#1f5fa8", "#5aa0dc", "#1b7a4b", "#6cbf84"), strict=True
    )
)
INPUTS = 2


def draw_genotype(genotype: Genotype, title: str) -> Figure:
    """Draws both cells as graphs, from the two inputs on the left to the output on the right.

    Args:
        genotype: the cells.
        title: one line above all.
    """
    figure = Figure(figsize=(10, 8.4), layout="constrained")
    figure.suptitle(title, size=11)
    for axes, kind in zip(figure.subplots(2, 1), KINDS, strict=True):
        _draw_cell(axes, getattr(genotype, kind), kind)
    return figure


def _draw_cell(axes: Any, nodes: Any, kind: str) -> None:
    """Draws one cell: nodes from left to right, the edges to each as arcs, above and below in turn."""
    number = len(nodes)
    places = {0: (0.0, 0.9), 1: (0.0, -0.9)}
    places |= {INPUTS + i: (1.7 * (i + 1), 0.5 * (-1) ** i) for i in range(number)}
    end = (1.7 * (number + 1), 0.0)
    names = {0: "cell\nk-2", 1: "cell\nk-1"} | {INPUTS + i: f"{INPUTS + i}" for i in range(number)}
    box = {"boxstyle": "round,pad=0.35", "fc": "#f3f1ea", "ec": "#444444"}
    for state, place in places.items():
        axes.text(*place, names[state], ha="center", va="center", size=9, bbox=box, zorder=4)
    axes.text(*end, "output", ha="center", va="center", size=9, bbox=box, zorder=4)
    for i, edges in enumerate(nodes):
        target = places[INPUTS + i]
        for j, (name, state) in enumerate(edges):
            source = places[state]
            span = (target[0] - source[0]) / 1.7
            up = 1 if (source[1] + target[1], -j) >= (0.0, 0) else -1
            height = up * (0.0 if span <= 1 else 0.42 * span)
            middle = (source[0] + target[0]) / 2, (source[1] + target[1]) / 2 + height
            _arrow(axes, source, target, middle, COLORS[name])
            share = 0.5 if j == 0 else 0.62  # so that two labels of a node do not lie on each other
            axes.text(
                *_on_curve(source, target, middle, share), name.replace("_", " "), size=8, color=COLORS[name],
                ha="center", va="center", zorder=5, bbox={"fc": "white", "ec": "none", "pad": 0.6},
            )  # fmt: skip
        _arrow(axes, target, end, ((target[0] + end[0]) / 2, target[1] * 1.2), "#bbbbbb")
    axes.set(xlim=(-0.6, end[0] + 0.7), ylim=(-2.5, 2.5))
    axes.set_title(f"{kind} cell", size=10, loc="left")
    axes.axis("off")


Point = tuple[float, float]


def _control(source: Point, target: Point, middle: Point) -> Point:
    """Returns the control point of the parabola through the three points."""
    return 2 * middle[0] - (source[0] + target[0]) / 2, 2 * middle[1] - (source[1] + target[1]) / 2


def _on_curve(source: Point, target: Point, middle: Point, share: float) -> Point:
    """Returns the point of that parabola at this share of its way."""
    control, rest = _control(source, target, middle), 1 - share
    x, y = (rest**2 * source[i] + 2 * rest * share * control[i] + share**2 * target[i] for i in range(2))
    return x, y


def _arrow(axes: Any, source: Point, target: Point, middle: Point, color: str) -> None:
    from matplotlib.path import Path as Curve

    points = [source, _control(source, target, middle), target]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3])
    axes.add_patch(
        FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=11, color=color, lw=1.4, shrinkA=0, zorder=2)
    )


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


class ArchitectureFigures(Callback):
    """The weights of the operations as heat maps, and the cells that they stand for as graphs.

    Both go to TensorBoard after each validation, with the entropy of the weights, ``architecture/entropy_normal`` and
    ``..._reduction``: the mean over the edges, in nats; log 8 = 2.08 for eight equal weights, 0 for a choice that is
    made. At the end both are written into the run's folder, ``architecture.png`` and ``genotype.png``.
    """

    @torch.no_grad()
    def figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Figure]:
        """Draws both."""
        weights: Any = pl_module.hooks.upper  # type: ignore[union-attr]
        after = f"after {trainer.global_step} upper iterations"
        return {
            "architecture": draw_weights(weights, f"Weights of the operations {after}"),
            "genotype": draw_genotype(weights.genotype(), f"Cells {after}"),
        }

    @override
    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        entropy = pl_module.hooks.upper.entropy()  # type: ignore[union-attr, operator]
        logs = {f"architecture/entropy_{kind}": float(value) for kind, value in entropy.items()}
        for logger in trainer.loggers:
            logger.log_metrics(logs, step=trainer.global_step)
        for writer in (logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)):
            for name, figure in self.figures(trainer, pl_module).items():
                writer.add_figure(name, figure, trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir  # all processes take part in agreeing on it
        if folder is None or not trainer.is_global_zero:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, figure in self.figures(trainer, pl_module).items():
            figure.savefig(Path(folder) / f"{name}.png", dpi=120)


class GenotypeReport(Callback):
    """Prints the genotype at the end of a search, and saves it as ``genotype.json`` in the run's folder."""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir  # all processes take part in agreeing on it
        if not trainer.is_global_zero:
            return
        genotype: Genotype = pl_module.hooks.upper.genotype()  # type: ignore[union-attr, operator]
        rank_zero_info(f"Genotype: {genotype}")
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            genotype.save(Path(folder) / "genotype.json")
            rank_zero_info(f"Retrain it: bilevel-fit --config nas/cifar10_retrain --model.genotype {folder}/genotype.json")
