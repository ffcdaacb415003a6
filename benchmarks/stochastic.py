"""Stochastic methods on the MNIST cleaning problem of benchmark_bilevel: test error against oracle calls.

    python benchmarks/stochastic.py [--seconds 60] [--seed 0] [--only SABA SOBA ...] [--root DIR]

The setting of that benchmark (M. Dagréou, P. Ablin, S. Vaiter, T. Moreau, "A framework for bilevel optimization that
enables stochastic and global variance reduction algorithms", NeurIPS 2022): 20,000 training images of which half get a
label drawn from all classes, 5,000 clean validation images, a linear model, g = mean of sigmoid(x_i) CE_i + 0.2 |y|^2,
minibatches of 64 at both levels, plain SGD on x. Pixels are standardised over the training images: with pixels in
[0, 1] (``--pixels unit``) and that penalty even the solution on the clean samples alone, printed first, is worse than
what that benchmark reports. An oracle call is one gradient or one product on a minibatch. Each row runs for the same
CPU seconds; printed is the error of y on the 10,000 official test images, for reporting only, at equal numbers of
oracle calls. Step sizes: ``ROWS``; they were chosen by validation error over few runs.
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
from torch.nn.functional import cross_entropy

from bilevel_lightning import MRBO, SABA, SOBA, AmIGO, BilevelModule, GradientDescent, StocBiO
from bilevel_lightning.datamodules import MNISTCleaning
from bilevel_lightning.models import LinearNet
from bilevel_lightning.module import ORACLES
from bilevel_lightning.schedules import Power
from bilevel_lightning.tasks import HyperCleaning

L2 = 0.2
CALLS = (300, 1_000, 3_000, 10_000, 30_000, 100_000)
"""Oracle calls at which the test error is taken."""

ROWS: dict[str, tuple[type[BilevelModule], dict[str, Any], float, float]] = {
    # algorithm, its settings, step size of x, exponent with which that falls
    "SABA": (SABA, {"lower_lr": 0.01}, 1e2, 0.0),
    "SOBA": (SOBA, {"lower_lr": Power(0.05, -0.4)}, 1e3, -0.4),
    "AmIGO": (AmIGO, {"dynamics": GradientDescent(0.01)}, 1e3, 0.0),
    "StocBiO": (StocBiO, {"dynamics": GradientDescent(0.01), "linear_steps": 20}, 1e3, 0.0),
    "MRBO": (MRBO, {"lower_lr": Power(0.1, -0.4), "linear_lr": 0.1}, 6e3, -0.4),
}


class Curve(Callback):
    """The test error and validation error whenever a number of oracle calls is reached; ends after some CPU seconds."""

    def __init__(self, task: HyperCleaning, data: MNISTCleaning, seconds: float) -> None:
        self.task, self.data, self.seconds = task, data, seconds
        self.points: dict[int, tuple[float, float]] = {}
        self.used, self.last, self.calls = 0.0, time.process_time(), 0

    @torch.no_grad()
    def errors(self) -> tuple[float, float]:
        """Returns the errors on the test and on the validation images, in percent."""
        found = [
            100 * float((self.task.lower(images).argmax(1) != labels).float().mean())
            for images, labels in (self.data.test, self.data.val)
        ]
        return found[0], found[1]

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        """Counts, evaluates where it is time to, and stops."""
        self.used += time.process_time() - self.last
        self.calls = int(module.oracles.sum() - module.oracles[ORACLES.index("samples")])
        for due in [n for n in CALLS if n <= self.calls and n not in self.points]:
            self.points[due] = self.errors()
        trainer.should_stop |= self.used > self.seconds or self.calls >= CALLS[-1]
        self.last = time.process_time()


class Cleaning(HyperCleaning):
    """The task without its figures and its retraining."""

    def callbacks(self) -> list[Callback]:
        """Returns none."""
        return []


def clean_only(data: MNISTCleaning) -> float:
    """Returns the test error of the lower solution that weighs right labels 1 and wrong ones 0, in percent."""
    net, weights = LinearNet(), data.clean.float()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weights * cross_entropy(net(data.train[0]), data.train[1], reduction="none")).mean()
        loss = loss + L2 * torch.stack([p.square().sum() for p in net.parameters()]).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return 100 * float((net(data.test[0]).argmax(1) != data.test[1]).float().mean())


def main() -> None:
    """Runs the rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root")
    parser.add_argument("--pixels", choices=["standardised", "unit"], default="standardised")
    parser.add_argument("--only", nargs="*", default=[*ROWS])
    args = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = MNISTCleaning(
        root=args.root, train_samples=20_000, val_samples=5_000, noise_rate=0.5, label_noise="any", seed=args.seed,
        lower_batch_size=64, upper_batch_size=64, epoch_length=1_000_000,
    )  # fmt: skip
    data.setup()
    if args.pixels == "standardised":
        mean, std = data.train[0].mean(), data.train[0].std()
        data.train, data.val, data.test = (((t[0] - mean) / std, *t[1:]) for t in (data.train, data.val, data.test))
    print(f"solution on the clean samples alone: {clean_only(data):.1f} % test error", flush=True)
    table = Table("row", *(f"{n:,}" for n in CALLS), "last", "calls", "iterations", "CPU s", title="test error, %")
    for name in args.only:
        algorithm, settings, lr, exponent = ROWS[name]
        torch.manual_seed(args.seed)
        task = Cleaning(LinearNet(), 20_000, l2=L2)
        module = algorithm(
            task=task,
            upper_optimizer=lambda params, lr=lr: torch.optim.SGD(params, lr=lr),
            upper_scheduler=Power(1.0, exponent),
            **settings,
        )
        curve = Curve(task, data, args.seconds)
        trainer = Trainer(
            max_epochs=-1, max_steps=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, log_every_n_steps=0, num_sanity_val_steps=0, limit_val_batches=0,
            accelerator="cpu", devices=1, callbacks=[curve],
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        test, val = curve.errors()
        with torch.no_grad():
            weights, clean = torch.sigmoid(task.upper.logits), data.clean
            loss = float(cross_entropy(task.lower(data.val[0]), data.val[1]))
        row = [f"{curve.points[n][0]:.1f}" if n in curve.points else "" for n in CALLS]
        validation = [round(v, 1) for _, v in curve.points.values()]
        table.add_row(name, *row, f"{test:.1f}", f"{curve.calls:,}", f"{trainer.global_step:,}", f"{curve.used:.0f}")
        print(
            f"{name}: validation error {val:.1f} %, loss {loss:.3f}; mean weight clean {weights[clean].mean():.2f}, "
            f"corrupted {weights[~clean].mean():.2f}; validation errors {validation}",
            flush=True,
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
