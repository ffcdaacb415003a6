"""What a person sees of a numerical problem: errors, where each start ended, and pictures for one x and one y."""

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.callbacks.figures import due, run_folder, show
from bilevel_lightning.errors import BilevelError, positive

if TYPE_CHECKING:
    from bilevel_lightning.tasks.numerical.base import NumericalTask

# Of the palette of Okabe and Ito, which colour-blind people can tell apart.
BLUE, ORANGE, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
STAR: dict[str, Any] = {"marker": "*", "ls": "", "ms": 16, "mfc": PURPLE, "mec": "black", "zorder": 3}


def _task(pl_module: LightningModule) -> "NumericalTask":
    return pl_module.hooks  # type: ignore[return-value]


def _point(pl_module: LightningModule) -> tuple[Tensor, Tensor]:
    """Returns copies of x and y, on the CPU."""
    task = _task(pl_module)
    return task.upper["x"].detach().cpu().clone(), task.lower["y"].detach().cpu().clone()


class SolutionError(Callback):
    """How far x and y are from the known solution: at every logged step, and at the end of the run for each start.

    The metrics of the task (`NumericalTask`) go to the loggers as ``train/...``, evaluated at the x and the y that the
    iteration ends with. At the end a table is printed, and ``ends.csv`` in the run's folder holds the start, the end,
    the errors and f(x, y) of every start. A table of more than ``rows`` starts sums them up by nearest solution.

    Args:
        rows: most rows of the table. Default 10.
    """

    def __init__(self, rows: int = 10) -> None:
        self.rows = int(positive("SolutionError.rows", rows))
        self.start: tuple[Tensor, Tensor] | None = None
        self.seconds = 0.0
        self.began: float | None = None

    def elapsed(self) -> float:
        """Returns the seconds of training so far, those before a checkpoint included."""
        return self.seconds + (0.0 if self.began is None else time.perf_counter() - self.began)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "seconds": self.elapsed()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start, self.seconds = state_dict["start"], state_dict["seconds"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # before a checkpoint's state is loaded
            self.start, self.seconds = None, 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = self.start or _point(pl_module)
        self.began = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if due(trainer):
            for name, value in _task(pl_module).metrics(batch).items():
                pl_module.log(f"train/{name}", value.float(), prog_bar=name == "error_x", batch_size=1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds, self.began = self.elapsed(), None
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            Console().print(self.table(pl_module, trainer.global_step))
        if folder is not None:
            self.write(pl_module, folder)

    @torch.no_grad()
    def table(self, pl_module: LightningModule, iterations: int) -> Table:
        """Returns the table: one row a start, or, of more than ``rows`` starts, one row a solution."""
        task, (x, y) = _task(pl_module), _point(pl_module)
        assert self.start is not None
        errors = {name: error.cpu() for name, error in task.errors(x, y).items()}
        measured = "   ".join(f"{name} {float(v):.4g}" for name, v in task.metrics(()).items())
        table = Table(
            title=f"{type(task).__name__}: {iterations} upper iterations, {self.elapsed():.3g} s",
            caption=measured if len(x) > 1 or not errors else None,
        )
        known, nearest = task.solutions(), task.nearest(x, y)
        if len(x) <= self.rows or known is None or nearest is None:
            for name in ("start x", "start y", "end x", "end y", *(f"error {name}" for name in errors)):
                table.add_column(name, justify="right")
            for i in range(min(len(x), self.rows)):
                points = (_words(p[i]) for p in (*self.start, x, y))
                table.add_row(*points, *(f"{float(error[i]):.2g}" for error in errors.values()))
            return table
        for name in ("nearest x*", "y*", "starts", "mean x", "mean y", "max error x", "max error y"):
            table.add_column(name, justify="right")
        for j, number in enumerate(nearest.bincount(minlength=len(known[0])).tolist()):
            mine = nearest == j
            ends = (_words(p[mine].mean(0)) if number else "" for p in (x, y))
            worst = (f"{float(error[mine].amax()):.2g}" if number else "" for error in errors.values())
            table.add_row(_words(known[0][j]), _words(known[1][j]), str(number), *ends, *worst)
        return table

    @torch.no_grad()
    def write(self, pl_module: LightningModule, folder: Path) -> None:
        """Writes ``ends.csv``."""
        task, (x, y) = _task(pl_module), _point(pl_module)
        assert self.start is not None
        device = task.upper["x"].device
        values = {f"error_{name}": error for name, error in task.errors(x, y).items()}
        values["upper_loss"] = task.f(x.to(device), y.to(device)).cpu()
        columns = [*self.start, x, y]
        names = [
            f"{name}_{i + 1}"
            for name, p in zip(("start_x", "start_y", "x", "y"), columns, strict=True)
            for i in range(p.shape[1])
        ]
        with (folder / "ends.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, *values])
            writer.writerows(torch.cat([*columns, *(v[:, None] for v in values.values())], dim=1).tolist())


def _words(point: Tensor) -> str:
    """The entries of a vector, or, of a long one, the least and the greatest."""
    if len(point) <= 3:
        return ", ".join(f"{v:.5g}" for v in point.tolist())
    return f"{float(point.amin()):.5g} .. {float(point.amax()):.5g}"


class PathFigure(Callback):
    """A picture for tasks with one x and one y: the hyper-objective with all ends, and the paths over contours of f.

    It is drawn at the end of the run, in TensorBoard and as ``paths.png`` in the run's folder. Positions are recorded
    at logged steps.

    Args:
        paths: most starts whose paths are drawn. Default 20.

    Raises:
        BilevelError: if x or y of the task has several entries.
    """

    def __init__(self, paths: int = 20) -> None:
        self.paths = int(positive("PathFigure.paths", paths))
        self.positions: list[Tensor] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"positions": self.positions}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.positions = list(state_dict["positions"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        sizes = [p.shape[1] for p in _point(pl_module)]
        if sizes != [1, 1]:
            raise BilevelError(
                f"PathFigure draws problems with one x and one y, and this one has {sizes[0]} and {sizes[1]}: leave it "
                "out of trainer.callbacks."
            )
        if stage == "fit":  # before a checkpoint's state is loaded
            self.positions = []

    def record(self, pl_module: LightningModule) -> None:
        """Adds where x and y are, shape ``(paths, 2)``."""
        self.positions.append(torch.cat(_point(pl_module), dim=1)[: self.paths])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.positions:
            self.record(pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if due(trainer):
            self.record(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.record(pl_module)
        show(trainer, lambda: {"paths": self.figure(pl_module)})

    @torch.no_grad()
    def figure(self, pl_module: LightningModule) -> Figure:
        """Draws F(x) with the ends of all starts on the left, and the paths in the plane of x and y on the right."""
        task, ends = _task(pl_module), torch.cat(_point(pl_module), dim=1).double()
        known = task.solutions()
        solutions = torch.empty(0, 2, dtype=torch.float64) if known is None else torch.cat(known, dim=1)
        paths = torch.stack(self.positions).double()
        low, high = torch.tensor(task.ranges, dtype=torch.float64).T
        width = (high - low).clamp(min=1)
        shown = torch.cat([low[None], high[None], ends, paths.flatten(0, 1), solutions])
        shown = shown.clamp(low - width, high + width)  # a few starts that ran away do not spoil the picture
        x_low, y_low = (shown.amin(0) - 0.03 * width).tolist()
        x_high, y_high = (shown.amax(0) + 0.03 * width).tolist()
        xs = torch.linspace(x_low, x_high, 400, dtype=torch.float64)
        ys = torch.linspace(y_low, y_high, 200, dtype=torch.float64)

        figure = Figure(figsize=(12, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        feasible = xs[task.project_upper({"x": xs[:, None]})["x"].squeeze(1) == xs]
        self._draw_objective(left, task, feasible, ends, solutions)
        self._draw_paths(right, task, (xs, ys), feasible, paths, solutions)
        figure.suptitle(f"{type(task).__name__}, {len(ends)} start{'s' * (len(ends) > 1)}")
        return figure

    def _draw_objective(self, axis: Axes, task: "NumericalTask", xs: Tensor, ends: Tensor, solutions: Tensor) -> None:
        values, heights = task.hyper_objective(xs[:, None]), task.f(ends[:, :1], ends[:, 1:])
        if values is not None:
            jumps = torch.cat([values.diff().abs() > 0.05 * (values.amax() - values.amin()), torch.tensor([False])])
            axis.plot(xs, values.masked_fill(jumps, torch.nan), color="black", lw=1.2, label="F(x) = f(x, y*(x))")
            best = task.hyper_objective(solutions[:, :1])
            assert best is not None
            axis.plot(solutions[:, 0], best, **STAR, label="known solutions")
        axis.plot(ends[:, 0], heights, "o", ms=5, mfc=ORANGE, mec="black", label="ends: f(x, y)", zorder=4)
        rug: dict[str, Any] = {"color": BLUE, "alpha": 0.5, "transform": axis.get_xaxis_transform()}
        axis.plot(ends[:, 0], torch.full((len(ends),), 0.025), "|", ms=12, **rug, label="ends: x")
        if len(ends) > 1:
            cells = torch.stack([ends[:, 0] / (xs[-1] - xs[0]), heights / (heights.amax() - heights.amin() + 1)], dim=1)
            _, group = torch.unique((cells / 0.04).round(), dim=0, return_inverse=True)
            for j, number in enumerate(group.bincount().tolist()):
                where = (float(ends[group == j, 0].mean()), float(heights[group == j].mean()))
                axis.annotate(f"{number}", where, (10, -15), textcoords="offset points", size=9, zorder=6)
        axis.set(xlabel="x", ylabel="upper objective", title="Hyper-objective, and how many starts end where")
        axis.margins(x=0.03, y=0.12)
        axis.legend(fontsize=8)

    def _draw_paths(
        self,
        axis: Axes,
        task: "NumericalTask",
        grid: tuple[Tensor, Tensor],
        feasible: Tensor,
        paths: Tensor,
        solutions: Tensor,
    ) -> None:
        xs, ys = grid
        x, y = torch.meshgrid(xs, ys, indexing="ij")
        values = task.f(x.reshape(-1, 1), y.reshape(-1, 1)).view_as(x).numpy()
        levels = np.unique(np.quantile(values, np.linspace(0, 1, 21)))
        drawn = axis.contourf(x, y, values, levels, cmap="cividis", norm=BoundaryNorm(levels, 256))
        ticks: list[float] = levels[::4].tolist()
        span = levels[-1] - levels[0]
        bar = axis.figure.colorbar(drawn, ax=axis, label="f(x, y)")
        bar.set_ticks(ticks, labels=[f"{v:.3g}" if abs(v) > 1e-3 * span else "0" for v in ticks], minor=False)
        minimisers = task.lower_solutions(feasible[:, None])
        if minimisers is not None:
            branches = minimisers.squeeze(-1).T
            axis.plot(feasible[:, None].expand_as(branches).flatten(), branches.flatten(), ".", ms=2, color="white")
            axis.plot([], [], color="white", lw=2, label="lower solutions")
        for i in range(paths.shape[1]):
            axis.plot(*paths[:, i].T, "-", color=ORANGE, lw=1.2, label="paths" if i == 0 else None)
        axis.plot(*solutions.T, **STAR, label="known solutions")
        axis.plot(*paths[0].T, "o", ms=5, mfc="white", mec="black", label="starts", zorder=4)
        axis.plot(*paths[-1].T, "o", ms=5, mfc=ORANGE, mec="black", label="ends", zorder=4)
        axis.set(xlabel="x", ylabel="y", title=f"Paths over the upper objective f (starts: {paths.shape[1]})")
        axis.set(xlim=(float(xs[0]), float(xs[-1])), ylim=(float(ys[0]), float(ys[-1])))
        axis.legend(fontsize=8, facecolor="0.75")
