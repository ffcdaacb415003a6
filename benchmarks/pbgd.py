"""V-PBGD and G-PBGD on linear MNIST for as long as their published experiments, with the released code's steps.

    python benchmarks/pbgd.py [--only V control G] [--seed 2424] [--root DIR]

Every 100 upper iterations, accuracy of y on the test images and F1 of "clean" (x_i >= 0), both for reporting only: the
published numbers are the best along the way, so the table has both ends. ``control`` is V-PBGD without its lower level
(gamma 1e-9): plain training on the clean validation samples. On one core, V takes about half an hour, G a quarter.
"""

import argparse
import os

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bilevel_lightning import GPBGD, VPBGD, GradientDescent
from bilevel_lightning.datamodules import MNISTCleaning
from bilevel_lightning.models import LinearNet
from bilevel_lightning.schedules import Linear
from bilevel_lightning.tasks import HyperCleaning

V = {"lower_lr": 0.1, "dynamics": GradientDescent(0.01), "lower_steps": 1, "twin": "persistent"}
RUNS = {
    "V": (VPBGD, 0.1, 40_000, {**V, "gamma": Linear(0, 0.2, 30_000)}),
    "control": (VPBGD, 0.1, 6_000, {**V, "gamma": 1e-9}),
    "G": (GPBGD, 0.3, 20_000, {"lower_lr": 0.5, "gamma": Linear(0, 37, 5_000)}),
}
EVERY = 100


class Cleaning(HyperCleaning):
    """The task without its report, which retrains."""

    def callbacks(self) -> list[Callback]:
        """Returns none."""
        return []


class Path(Callback):
    """Accuracy and F1 along the way, in %, by upper iteration."""

    def __init__(self, data: MNISTCleaning) -> None:
        self.data = data
        self.found: dict[int, tuple[float, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: object) -> None:
        """Evaluates every 100 upper iterations."""
        k = trainer.global_step
        if k % EVERY:
            return
        task: Cleaning = module.task  # type: ignore[assignment]
        with torch.no_grad():
            found = task.metrics({"lower": self.data.train, "upper": self.data.test, "clean": self.data.clean})
        self.found[k] = 100 * float(found["accuracy"]), 100 * float(found["f1"])


def run(name: str, seed: int, root: str | None) -> list[str]:
    """Returns a row of the table."""
    algorithm, lr, steps, settings = RUNS[name]
    data = MNISTCleaning(root=root, seed=seed, label_noise="any", test_split="train", epoch_length=1000)
    seed_everything(seed)
    task, path = Cleaning(LinearNet()), Path(data)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, callbacks=[path], **off)
    trainer.fit(algorithm(task=task, upper_optimizer=lambda p: torch.optim.SGD(p, lr=lr), **settings), datamodule=data)
    found = path.found
    best = max(found, key=lambda k: found[k][0])
    clearest = max(found, key=lambda k: found[k][1])
    logits: Tensor = task.upper.logits.detach()
    return [
        name,
        str(steps),
        f"{found[best][0]:.2f} at {best} ({found[best][1]:.2f})",
        f"{found[clearest][1]:.2f} at {clearest}",
        f"{found[steps][0]:.2f}, {found[steps][1]:.2f}",
        f"{float(logits.abs().max()):.3f}",
    ]


def main() -> None:
    """Runs what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seed", type=int, default=2424)
    parser.add_argument("--root", default=os.environ.get("BILEVEL_DATA_DIR"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("run", "iterations", "best accuracy % (F1)", "best F1 %", "accuracy, F1 at the end", "largest |x_i|")
    for name in args.only:
        table.add_row(*run(name, args.seed, args.root))
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
