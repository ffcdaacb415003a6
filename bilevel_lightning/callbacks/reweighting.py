"""What a person sees of reweighting: the learnt weights drawn, and what they are worth beside equal weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from matplotlib.figure import Figure
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.binding import bind, running_norms
from bilevel_lightning.callbacks.figures import Figures, due
from bilevel_lightning.callbacks.retraining import FromScratch
from bilevel_lightning.datamodules.iterations import Iterations, Whole
from bilevel_lightning.datamodules.levels import TwoLevelData
from bilevel_lightning.dynamics import Dynamics
from bilevel_lightning.models.weights import LossWeights, SourceWeights
from bilevel_lightning.task import Minibatches

SHOWN = 1000  # training samples whose losses are drawn
COLOURS = {"clean": "#2c7fb8", "corrupted": "#c1272d", "all": "#2c7fb8"}


class SourceWeightCurve(Figures):
    """The weight of each source over the upper iterations, where the weights are `SourceWeights`.

    As scalars ``train/source_weight/<name>`` with everything else that is logged; as a figure in TensorBoard after each
    validation, and as ``source_weights.png`` at the end. The names are the data module's ``names``, else numbers.

    Attributes:
        path: upper iterations and the weights there, at the beginning and wherever scalars are logged.
    """

    def __init__(self) -> None:
        self.path: list[tuple[int, list[float]]] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"path": self.path}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.path = [(step, [*weights]) for step, weights in state_dict["path"]]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (weights := _source_weights(pl_module)) is not None and not self.path:
            self.path.append((trainer.global_step, weights.tolist()))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        weights = _source_weights(pl_module)
        if weights is None or not due(trainer):
            return
        for name, weight in zip(_names(trainer, len(weights)), weights, strict=True):
            pl_module.log(f"train/source_weight/{name}", weight, batch_size=1)
        self.path.append((trainer.global_step, weights.tolist()))

    @override
    def figures(self, trainer: Trainer, pl_module: Any) -> dict[str, Figure]:
        """Draws the path."""
        if not self.path:
            return {}
        figure = Figure(figsize=(5.0, 3.2), layout="constrained")
        axes: Any = figure.subplots()
        steps, values = zip(*self.path, strict=True)
        for name, line in zip(_names(trainer, len(values[0])), zip(*values, strict=True), strict=True):
            axes.plot(steps, line, marker=".", label=name)
        axes.set(xlabel="upper iteration", ylabel="weight of the source", ylim=(0, None))
        axes.legend(fontsize=8, ncols=2)
        return {"source_weights": figure}


class WeightFigure(Figures):
    """The weights of samples: in TensorBoard after each validation and, at the end, as ``weights.png``.

    For `LossWeights` the weight as a function of the loss, over a histogram of the losses of the first 1000 training
    samples; for others a histogram of the weights of those samples. Where the data module says which samples are
    `clean`, histograms show both kinds. Beside it, the mean weight of each source's samples.
    """

    @override
    @torch.no_grad()
    def figures(self, trainer: Trainer, pl_module: Any) -> dict[str, Figure]:
        """Draws the weights as they are."""
        task, data = pl_module.hooks, getattr(trainer, "datamodule", None)
        if not isinstance(data, TwoLevelData):
            return {}
        part = _converted(trainer, tuple(t[:SHOWN] for t in data.levels()[0]))
        training = task.training
        task.eval()
        losses = task.losses(*part[:2])
        weights = task.upper(losses, *part[2:4]).float().cpu()
        task.train(training)
        losses, source = losses.float().cpu(), part[3].cpu()
        clean = getattr(data, "clean", None)
        kinds = {"all": torch.ones_like(weights, dtype=torch.bool)}
        if clean is not None and not clean[: len(weights)].all():
            kinds = {"clean": clean[: len(weights)], "corrupted": ~clean[: len(weights)]}
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        figure.suptitle(f"Weights after {trainer.global_step} upper iterations", size=10)
        axes: Any = figure.subplots(1, 2)
        if isinstance(task.upper, LossWeights):
            self._function(axes[0], task.upper, losses, kinds)
        else:
            _histogram(axes[0], weights, kinds, (0.0, 1.0))
            axes[0].set(xlabel="weight", ylabel="training samples")
        sources = source.unique().tolist()
        axes[1].bar(sources, [float(weights[source == s].mean()) for s in sources], color=COLOURS["all"])
        axes[1].set(xlabel="source (class)", ylabel="mean weight")
        axes[1].xaxis.get_major_locator().set_params(integer=True)
        return {"weights": figure}

    def _function(self, axes: Any, weights: LossWeights, losses: Tensor, kinds: dict[str, Tensor]) -> None:
        top = float(losses.max())
        beside = axes.twinx()
        _histogram(beside, losses, kinds, (0.0, top))
        beside.set_ylabel("training samples")
        grid = torch.linspace(0, top, 200).to(next(weights.parameters()))
        axes.plot(grid.float().cpu(), weights(grid).float().cpu(), color="black")
        axes.set(xlabel="loss", ylabel="weight", ylim=(0, None), zorder=1)
        axes.patch.set_visible(False)


class ReweightingReport(FromScratch):
    """Trains the model with equal weights, as controls, and prints the accuracies on the test set beside that of y.

    Both controls start at the weights that the model had before the run and take its lower steps, as many, with its
    `dynamics`, whose memories go on, on the same minibatches:

    * *equal weights*: w_i = 1;
    * *equal weights, meta set too*: the mean over the samples of both levels, of the upper one as the run drew them.

    Everything is evaluated once, at the end: nothing is selected on the test set. The numbers go to the loggers as
    ``report/...``. With several processes the controls see the first one's part of each minibatch.

    Args:
        controls: False leaves them out, which takes as long as plain training of y twice. Default True.

    Attributes:
        rows: what the table says, by the name of its row; empty before the end.
    """

    def __init__(self, controls: bool = True) -> None:
        super().__init__()
        self.controls = controls
        self.rows: dict[str, dict[str, float]] = {}

    @override
    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, stream = getattr(trainer, "datamodule", None), trainer.train_dataloader
        if not isinstance(data, TwoLevelData) or not isinstance(stream, Iterations):
            return
        test = data.test_dataloader()
        if not isinstance(test, Whole):
            return
        module: Any = pl_module
        lower, upper = (len(samples[0]) for samples in data.levels())
        tasks = {"reweighted (y)": module.hooks}
        if self.controls:
            with module.aside(), torch.inference_mode(False):
                for name, share in (("equal weights", 0.0), ("equal weights, meta set too", upper / (lower + upper))):
                    tasks[name] = trained_equally(
                        module.hooks,
                        self.fresh(next(module.parameters())),
                        module.dynamics,
                        lambda k: _converted(trainer, stream.batch(k)),
                        self.counted(module.batches, name),
                        module.lower_steps,
                        share,
                        module.first_lower_step,
                    )
        batch = _converted(trainer, test.batch)
        for name, task in tasks.items():
            training = task.training
            task.eval()
            with torch.no_grad():
                found = task.metrics({"lower": batch["lower"], "upper": batch["upper"]})
            task.train(training)
            self.rows[name] = {key: float(value) for key, value in found.items()}
        self.show(trainer)

    def show(self, trainer: Trainer) -> None:
        """Prints and logs the report."""
        columns: list[str] = [key for key in ("accuracy", "balanced_accuracy") if key in self.rows["reweighted (y)"]]
        names = ["training", *(f"{key.replace('_', ' ')} %" for key in columns)]
        shown = {name: [f"{100 * values[key]:.2f}" for key in columns] for name, values in self.rows.items()}
        self.print_table("What the weights are worth", "test set; same network, steps and minibatches", names, shown)
        for name, values in self.rows.items():
            key = name.replace(" (y)", "").replace(",", "").replace(" ", "_")
            self.report(trainer, {f"{key}/{k}": v for k, v in values.items()})


class Equal(nn.Module):
    """Weights that are all one."""

    @override
    def forward(self, losses: Tensor | None, index: Tensor, source: Tensor | None = None) -> Tensor:
        return torch.ones(index.shape, device=index.device)


def trained_equally(
    task: Any,
    model: nn.Module,
    dynamics: Dynamics,
    batch: Callable[[int], Any],
    iterations: Iterable[int],
    steps: int = 1,
    share: float = 0.0,
    first: Callable[[int], int] | None = None,
) -> Any:
    """Returns a copy of a `Reweighting` task whose model was trained with equal weights.

    Args:
        task: the task.
        model: the network to train, at its start.
        dynamics: one step of training; its memories go on from iteration to iteration.
        batch: the batches of both levels, by the number of the iteration.
        iterations: their numbers, from 0.
        steps: steps in each, on its lower minibatches in turn.
        share: of the samples of both levels that the upper one has, which are trained on too. Default 0: they are not.
        first: number of the first step of an iteration, for schedules. Default: steps are counted through.
    """
    control: Any = type(task)(model, Equal(), task.l2 / (1 - share))
    control.train()
    state = dynamics.start(tree.detach(tree.of(model)))
    for k in iterations:
        both = batch(k)
        problem, _, _ = bind(control, both, {})
        problem = problem.blend(share, 1 - share) if share else problem
        begin = k * steps if first is None else first(k)
        for t in range(begin, begin + steps):
            state = dynamics.step(problem, {}, state, t)
        if running_norms(model):
            tree.assign(model, state[0])
            with torch.no_grad():
                control.lower_loss(both["lower"][0] if isinstance(both["lower"], Minibatches) else both["lower"])
    tree.assign(model, state[0])
    return control


def _source_weights(module: Any) -> Tensor | None:
    """Returns the weights of the sources, or None where x is something else."""
    upper = module.hooks.upper
    return upper.logits.detach().softmax(0) if isinstance(upper, SourceWeights) else None


def _names(trainer: Trainer, number: int) -> list[str]:
    """Returns the names of the sources."""
    data = getattr(trainer, "datamodule", None)
    return getattr(data, "names", None) or [str(s) for s in range(number)]


def _converted(trainer: Trainer, batch: Any) -> Any:
    """Returns a batch on the device and in the precision of the run."""
    return trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))


def _histogram(axes: Any, values: Tensor, kinds: dict[str, Tensor], span: tuple[float, float]) -> None:
    for name, chosen in kinds.items():
        axes.hist(values[chosen].numpy(), bins=40, range=span, color=COLOURS[name], alpha=0.5, label=name)
    if len(kinds) > 1:
        axes.legend(fontsize=7)
