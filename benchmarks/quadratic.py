"""Stochastic methods on the quadratic of benchmark_bilevel, whose solution is known: how far from it at equal samples.

    python benchmarks/quadratic.py [--samples 1e6] [--seed 0] [--only SABA SOBA ...]

32,768 lower and 1,024 upper samples, y of 100 and x of 10 entries, minibatches of 64, float64 (`QuadraticSum`). Printed
is the relative gap (F(x) - F*) / (F(x_0) - F*), F(x) = f(x, y*(x)) from the closed form, whenever the oracles have
touched so many samples: 64 for each gradient or product on a minibatch, all of a level where a method passes over all.
Step sizes: ``ROWS``. They fall but where variance is reduced over all samples, and were chosen over one to six runs of
each row by the gap itself, which only a problem with a known solution allows.
"""

import argparse
import logging
import time
import warnings
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from rich.console import Console
from rich.table import Table

from bilevel_lightning import (
    ALSET,
    BSA,
    BSGM,
    FSLA,
    MASOBA,
    MRBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    VRBO,
    AmIGO,
    BilevelModule,
    GradientDescent,
    StocBiO,
)
from bilevel_lightning.callbacks import SampleBudget
from bilevel_lightning.datamodules import SampleIndices
from bilevel_lightning.estimators import SARAH
from bilevel_lightning.module import ORACLES
from bilevel_lightning.schedules import InverseTime, Power, Schedule
from bilevel_lightning.tasks import QuadraticSum

SAMPLES = (100_000, 300_000, 1_000_000, 3_000_000)
"""Samples touched at which the gap is taken."""


class Row:
    """A method with its settings, and the step size of x with the factor by which it changes."""

    def __init__(
        self, algorithm: type[BilevelModule], lr: float, fall: Schedule | None = None, **settings: Any
    ) -> None:
        self.algorithm, self.lr, self.fall, self.settings = algorithm, lr, fall, settings

    def module(self, task: QuadraticSum) -> BilevelModule:
        """Returns the method on a task, x moved by SGD."""
        sgd = lambda params: torch.optim.SGD(params, lr=self.lr)  # noqa: E731
        return self.algorithm(task=task, upper_optimizer=sgd, upper_scheduler=self.fall, **self.settings)


SHORT, LONG = InverseTime(1.0, 100), InverseTime(1.0, 300)
DECAY = Power(1.0, -0.3)
ROWS = {
    "BSGM": Row(BSGM, 1.0, InverseTime(1.0, 30), dynamics=GradientDescent(InverseTime(1.0, 50)), lower_steps=100),
    "StocBiO": Row(
        StocBiO, 0.5, SHORT, dynamics=GradientDescent(0.2), lower_decay=DECAY, linear_steps=30, linear_lr=0.3
    ),
    "AmIGO": Row(AmIGO, 0.5, SHORT, dynamics=GradientDescent(0.1), lower_decay=DECAY),
    "ALSET": Row(ALSET, 0.5, SHORT, dynamics=GradientDescent(0.3), lower_decay=DECAY, linear_steps=20, linear_lr=0.3),
    "BSA": Row(BSA, 0.5, SHORT, dynamics=GradientDescent(0.2), lower_decay=DECAY, linear_steps=30, linear_lr=0.2),
    "TTSA": Row(TTSA, 0.5, SHORT, dynamics=GradientDescent(0.5), linear_steps=30, linear_lr=0.3),
    "SOBA": Row(SOBA, 0.2, LONG, lower_lr=Power(0.3, -0.3)),
    "MASOBA": Row(MASOBA, 0.2, LONG, lower_lr=Power(0.3, -0.3)),
    "FSLA": Row(FSLA, 0.2, LONG, lower_lr=Power(0.3, -0.3)),
    "SABA": Row(SABA, 0.2, None, lower_lr=0.2),
    "SRBA": Row(SRBA, 0.2, None, lower_lr=0.2, estimator=SARAH(200)),
    "MRBO": Row(MRBO, 0.3, LONG, lower_lr=Power(0.3, -0.2), linear_steps=20, linear_lr=0.3),
    "SUSTAIN": Row(SUSTAIN, 0.3, LONG, lower_lr=Power(0.3, -0.2), linear_steps=20, linear_lr=0.3),
    "VRBO": Row(VRBO, 0.3, None, lower_lr=0.2, linear_lr=0.3, estimator=SARAH(100)),
}


class Curve(Callback):
    """The relative gap whenever a number of samples is reached."""

    def __init__(self, task: QuadraticSum) -> None:
        self.task, self.used = task, -time.process_time()
        self.points: dict[int, float] = {}
        self.first = self.gap()

    def gap(self) -> float:
        """Returns F(x) - F*."""
        return float(self.task.metrics(())["value_gap"])

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        """Evaluates where it is time to."""
        samples = int(module.oracles[ORACLES.index("samples")])
        for due in [n for n in SAMPLES if n <= samples and n not in self.points]:
            self.points[due] = self.gap() / self.first


def run(row: Row, samples: float, seed: int = 0, **size: int) -> Curve:
    """Trains until that many samples are touched; ``size``: sizes other than the benchmark's."""
    torch.manual_seed(seed)
    task = QuadraticSum(**size).double()
    curve = Curve(task)
    numbers = dict(zip(("lower_samples", "upper_samples"), task.samples, strict=True))
    data = SampleIndices(**numbers, lower_batch_size=64, upper_batch_size=64, epoch_length=1_000_000, seed=seed)
    trainer = Trainer(
        max_epochs=-1, max_steps=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=0, num_sanity_val_steps=0, limit_val_batches=0,
        accelerator="cpu", devices=1, precision="64-true", callbacks=[curve, SampleBudget(samples)],
    )  # fmt: skip
    trainer.fit(row.module(task), datamodule=data)
    curve.used += time.process_time()
    curve.last, curve.steps = curve.gap() / curve.first, trainer.global_step
    return curve


def main() -> None:
    """Runs the rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=1e6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[*ROWS])
    args = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    due = [n for n in SAMPLES if n <= args.samples]
    table = Table("row", *(f"{n:,}" for n in due), "iterations", "CPU s", title="relative gap after so many samples")
    for name in args.only:
        curve = run(ROWS[name], args.samples, args.seed)
        row = [name, *(f"{curve.points[n]:.1e}" for n in due), f"{curve.steps:,}", f"{curve.used:.0f}"]
        table.add_row(*row)
        print(*row, flush=True)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
