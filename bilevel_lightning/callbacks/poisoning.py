"""What a person sees of poisoning: the images before and after, and what training on them costs."""

from typing import Any

import torch
from matplotlib.figure import Figure
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn.functional import one_hot
from typing_extensions import override

from bilevel_lightning.callbacks.figures import Figures, data_with
from bilevel_lightning.callbacks.retraining import Retraining
from bilevel_lightning.errors import positive

Labelled = tuple[Tensor, Tensor]
CHUNK = 1000  # images at once where only accuracies are computed


class PoisonedImages(Figures):
    """Images that are perturbed most, clean, the difference, poisoned: in TensorBoard and, at the end, as a PNG.

    Of each class the largest perturbation, then of each the second, and so on. The difference is on a scale of its own,
    from blue for darker over white to red for brighter; of colour images its mean over the channels.

    Args:
        images: how many, one column each. Default 10.
    """

    def __init__(self, images: int = 10) -> None:
        self.images = int(positive("PoisonedImages.images", images))

    def chosen(self, norms: Tensor, labels: Tensor) -> Tensor:
        """Returns the numbers of the images that are shown, of all classes in turn, the largest norms first."""
        order = norms.argsort(descending=True, stable=True)
        of_class = one_hot(labels[order])
        rank = (of_class.cumsum(0) * of_class).sum(1)  # 1 for the largest of its class
        return order[rank.argsort(stable=True)[: self.images]]

    @override
    @torch.no_grad()
    def figures(self, trainer: Trainer, pl_module: Any) -> dict[str, Figure]:
        """Draws three rows of images."""
        task, data = pl_module.hooks, data_with(trainer, "poisoned")
        if data is None:
            return {}
        images, labels, _ = data.poisoned
        norms = task.upper.norms().float().cpu()
        order = self.chosen(norms, labels)
        clean, delta = images[order], task.upper.delta.detach()[order.to(task.upper.delta.device)].float().cpu()
        figure = Figure(figsize=(1.2 * len(order) + 0.8, 4.4), layout="constrained")
        figure.suptitle(f"Largest perturbations after {trainer.global_step} upper iterations: label, norm", size=10)
        axes = figure.subplots(3, len(order), squeeze=False)
        shown = delta.mean(1)
        scale = max(float(shown.abs().max()), 1e-6)
        for row, name in enumerate(("clean", "difference", "poisoned")):
            for column, axis in enumerate(axes[row]):
                axis.set_xticks([])
                axis.set_yticks([])
                if name == "difference":
                    axis.imshow(shown[column].numpy(), cmap="bwr", vmin=-scale, vmax=scale)
                else:
                    image = clean[column] + (delta[column] if name == "poisoned" else 0)
                    image = image.clamp(0, 1).permute(1, 2, 0).squeeze(-1)
                    axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
            axes[row][0].set_ylabel(name, size=9)
        for axis, i in zip(axes[0], order, strict=True):
            axis.set_title(f"{int(labels[i])}, {norms[i]:.2f}", size=9)
        return {"poisoned_images": figure}


class PoisoningReport(Retraining):
    """Retrains the model from scratch on the poisoned images and beside two controls, and prints the table.

    All rows start at the weights that the model had before the run, take the same steps on the lower loss, and are
    tested once, at the end: nothing is selected on the test set. The training images are

    * *poisoned images*: those of the run;
    * *clean images*: all without perturbation;
    * *random noise*: the projections of 1000 N(0, 1) as perturbations, which are as large but learnt nothing.

    Accuracies on the training images are on those that the row was trained on. The first line is y itself, the lower
    solution at the end of the run. The numbers go to the loggers as ``report/...`` too.

    Args:
        steps: optimizer steps of each training. Default 1000, as in the released code of Grazzi et al.
        optimizer: any of torch's. Default SGD with step size 0.1 and momentum 0.5, as there. `flow.GradientFlow`, one
            step with ``lr`` 200, ends at the same point in a ninth of the time; where the lower loss is convex,
            ``torch.optim.LBFGS`` comes nearer to its minimum (docs/poisoning.md).
        batch_size: minibatch size, drawn with replacement; None (default, as there): all samples at once.
        controls: whether the two controls are trained too. Default True.
    """

    def __init__(
        self,
        steps: int = 1000,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.5),
        batch_size: int | None = None,
        controls: bool = True,
    ) -> None:
        super().__init__(steps, optimizer, batch_size)
        self.controls = controls

    @override
    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_with(trainer, "poisoned")
        if data is None:
            return
        task: Any = pl_module.hooks
        delta = task.upper.delta.detach()
        images, labels, index = (t.to(delta.device) for t in data.train)
        images, where = images.to(delta), index >= 0
        held_out = [(part[0].to(delta), part[1].to(delta.device)) for part in (data.val, data.test)]

        def poisoned(delta: Tensor) -> Labelled:
            changed = images.clone()
            changed[where] += delta[index[where]]
            return changed, labels

        trainings = {"poisoned images": delta}
        if self.controls:
            trainings |= {"clean images": torch.zeros_like(delta), "random noise": task.upper.noise()}
        rows = {"y at the end of the run": self.accuracies(task.lower, [poisoned(delta), *held_out])}
        norms = {"y at the end of the run": task.upper.norms(delta).mean()}
        for name, perturbation in trainings.items():
            train = poisoned(perturbation)
            rows[name] = self.accuracies(self.retrain(name, task, *train), [train, *held_out])
            norms[name] = task.upper.norms(perturbation).mean()
        self.show(trainer, rows, {name: float(norm) for name, norm in norms.items()})

    def retrain(self, name: str, task: Any, images: Tensor, labels: Tensor) -> nn.Module:
        """Trains a copy of the model from scratch on the lower loss and returns it."""
        return self.trained(name, (images, labels), task.training_loss)

    @torch.no_grad()
    def accuracies(self, model: nn.Module, parts: list[Labelled]) -> list[float]:
        """Returns the accuracy of a model on each part."""
        training = model.training
        model.eval()
        found = []
        for images, labels in parts:
            pairs = zip(torch.split(images, CHUNK), torch.split(labels, CHUNK), strict=True)
            found.append(sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(labels))
        model.train(training)
        return found

    def show(self, trainer: Trainer, rows: dict[str, list[float]], norms: dict[str, float]) -> None:
        """Prints and logs the report."""
        shown = {n: [f"{norms[n]:.3f}", *(f"{100 * value:.2f}" for value in found)] for n, found in rows.items()}
        caption = f"accuracies in %; the last lines from scratch, steps: {self.steps}"
        columns = ("training data", "mean norm", "train", "validation", "test")
        self.print_table("What training on the poisoned images costs", caption, columns, shown)
        logs = {}
        for name, found in rows.items():
            key = name.replace(" ", "_")
            logs[f"{key}/norm"] = norms[name]
            parts = zip(("train_accuracy", "val_accuracy", "test_accuracy"), found, strict=True)
            logs.update({f"{key}/{part}": value for part, value in parts})
        self.report(trainer, logs)
