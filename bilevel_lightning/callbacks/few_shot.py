"""What a person sees of few-shot learning: episodes with predictions, accuracy step by step, and the final numbers."""

from abc import abstractmethod
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.binding import split
from bilevel_lightning.callbacks.figures import Figures, show
from bilevel_lightning.callbacks.pictures import Picture, draw
from bilevel_lightning.errors import positive

RED, BLUE, GREY = "#c1272d", "#0072b2", "#777777"


class _EpisodeFigures(Figures):
    """Draws from the first validation batch after each validation; the last figure is also written as a PNG."""

    name: str

    def __init__(self) -> None:
        self.batch: Any = None

    @abstractmethod
    def figure(self, module: Any, batch: Any) -> Figure:
        """Returns the figure of a validation batch."""

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if batch_idx == 0:
            self.batch = batch

    @override
    def figures(self, trainer: Trainer, pl_module: Any) -> dict[str, Figure]:
        if self.batch is None:
            return {}
        with pl_module.aside(), torch.inference_mode(False), torch.enable_grad():
            return {self.name: self.figure(pl_module, apply_to_collection(self.batch, Tensor, torch.clone))}

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            show(trainer, lambda: self.figures(trainer, pl_module))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the last validation has written them."""


class AdaptationCurve(_EpisodeFigures):
    """The task's measure on queries after each lower step, over the episodes of the first validation batch."""

    name = "adaptation"

    @override
    def figure(self, module: Any, batch: Any) -> Figure:
        task, curves = module.hooks, []
        for episode in task.episodes(batch):
            problem, x, path = module.solved(episode)
            with torch.no_grad():
                curves.append([float(problem.evaluate("metrics", x, y)[task.measure]) for y in path])
        values = torch.tensor(curves)
        figure = Figure(figsize=(5.5, 3.6), layout="constrained")
        axis, steps = figure.subplots(), range(values.shape[1])
        axis.plot(steps, values.T, color=GREY, alpha=0.35, linewidth=0.8)
        axis.plot(steps, values.mean(0), color=BLUE, marker="o", linewidth=2, label=f"mean of {len(values)} episodes")
        axis.set_xlabel("lower step")
        axis.set_ylabel(f"{task.measure} on queries")
        axis.set_title(f"Adaptation after {module.global_step} upper iterations", size=10)
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
        return figure


class EpisodeFigure(_EpisodeFigures):
    """An episode: support images with their labels, and queries with predictions; wrong ones in red with a cross.

    Args:
        queries: how many queries of each class are shown. Default 5.
    """

    name = "episode"

    def __init__(self, queries: int = 5) -> None:
        super().__init__()
        self.queries = int(positive("EpisodeFigure.queries", queries))

    @override
    def figure(self, module: Any, batch: Any) -> Figure:
        episode = module.hooks.episodes(batch)[0]
        problem, x, path = module.solved(episode)
        *_, y = path
        with torch.no_grad():
            predicted = problem.evaluate("predict", x, y)["predicted"]
        (images, labels), (queries, targets) = split(episode)
        ways = int(labels.max()) + 1
        rows = []

        def scaled(image: Tensor) -> Tensor:
            image = image.float().cpu()
            return (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)

        for label in range(ways):
            row = [Picture(scaled(images[i]), f"{label}", "black") for i in (labels == label).nonzero().flatten()[:1]]
            for i in (targets == label).nonzero().flatten()[: self.queries]:
                right = int(predicted[i]) == label
                text = f"{int(predicted[i])}" + ("" if right else " ✗")
                row.append(Picture(scaled(queries[i]), text, "black" if right else RED))
            rows.append(row)
        title = f"Label | predictions after {module.global_step} upper iterations"
        return draw(rows, title, cmap="gray_r", size=(1.15, 1.25))


class RegressionFigure(_EpisodeFigures):
    """An episode of regression on one input: the points, the function, and the network before and after adapting."""

    name = "episode"

    @override
    def figure(self, module: Any, batch: Any) -> Figure:
        episode = module.hooks.episodes(batch)[0]
        problem, x, path = module.solved(episode)
        iterates = list(path)
        (inputs, targets), (queries, answers) = split(episode)
        order = queries[:, 0].argsort().cpu()
        figure = Figure(figsize=(5.5, 3.6), layout="constrained")
        axis = figure.subplots()
        axis.plot(queries[:, 0].cpu()[order], answers[:, 0].cpu()[order], color="black", label="queries", marker=".")
        for y, label, style in ((iterates[0], "before", ":"), (iterates[-1], f"after {len(iterates) - 1} steps", "-")):
            with torch.no_grad():
                values = problem.evaluate("predict", x, y)["predicted"].cpu()
            axis.plot(queries[:, 0].cpu()[order], values[order], style, color=BLUE, label=label)
        axis.scatter(inputs[:, 0].cpu(), targets[:, 0].cpu(), color=RED, zorder=3, label="support")
        axis.set_xlabel("input")
        axis.set_ylabel("output")
        axis.set_title(f"An episode after {module.global_step} upper iterations", size=10)
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
        return figure


class FewShotReport(Callback):
    """The table of a test or validation: the measure with its 95 % interval, and the protocol it holds for."""

    @override
    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.show(trainer, pl_module, "test")

    @override
    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.show(trainer, pl_module, "val")

    def show(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Prints the table."""
        task, data, found = module.hooks, getattr(trainer, "datamodule", None), trainer.callback_metrics
        measure, scale, unit = task.measure, *((100.0, " %") if task.measure == "accuracy" else (1.0, ""))
        if f"{stage}/{measure}" not in found:
            return
        value, interval = (float(found.get(f"{stage}/{measure}{end}", float("nan"))) for end in ("", "_ci95"))
        table = Table(title=f"{stage} episodes, {type(module).__name__}", show_header=False)
        table.add_row(measure, f"{scale * value:.2f} ± {scale * interval:.2f}{unit} (95 % interval)")
        if f"{stage}/{measure}_before" in found:
            table.add_row("before adapting", f"{scale * float(found[f'{stage}/{measure}_before']):.2f}{unit}")
        episodes = getattr(data, f"{stage}_episodes", None)
        for name, entry in (
            ("episodes", episodes),
            ("ways, shots", None if data is None else f"{getattr(data, 'ways', '?')}, {getattr(data, 'shots', '?')}"),
            ("queries of a class", getattr(data, "queries", None)),
            ("lower steps", module.evaluation_steps),
            ("batch normalisation", task.normalization),
            ("upper iterations", trainer.global_step or None),
        ):
            if entry is not None:
                table.add_row(name, str(entry))
        Console().print(table)
