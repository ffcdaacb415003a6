"""Test accuracy of reweighted training beside equal weights, and what an upper iteration costs (docs/reweighting.md).

Runs that are in the CSV file already are not run again. ``BILEVEL_DATA_DIR`` says where MNIST and CIFAR-10 lie.
"""

import argparse
import csv
import logging
import os
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, median, stdev
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from hypergradients import peak, seconds
from pytorch_lightning import Trainer
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from torch import nn

from bilevel_lightning import (
    DARTS,
    F2SA,
    MEHA,
    SAMA,
    TRHG,
    Adam,
    BilevelModule,
    Dynamics,
    GradientDescent,
    Minibatches,
    Momentum,
    tree,
)
from bilevel_lightning.binding import bind
from bilevel_lightning.callbacks import ReweightingReport
from bilevel_lightning.callbacks.reweighting import Equal, trained_equally
from bilevel_lightning.datamodules import CIFAR10Reweighting, MNISTReweighting, ReweightingData
from bilevel_lightning.datamodules.iterations import draw
from bilevel_lightning.models import ConvNet, LossWeights, MLPNet, SampleWeights, SourceWeights
from bilevel_lightning.schedules import Cosine
from bilevel_lightning.tasks import Reweighting

SEEDS = (10, 11, 12)
TUNING_SEED = 100  # of a split of its own, on which step sizes are chosen
HELD = 300  # images of each class on which they are compared there; the meta set has others
COLUMNS = ("case", "training", "seed", "lr", "upper_lr", "accuracy", "cpu_seconds")
ALGORITHMS: dict[str, Callable[..., BilevelModule]] = {
    "TRHG": partial(TRHG, lower_steps=1, truncation=1),
    "DARTS": DARTS,
    "SAMA": SAMA,
    "MEHA": partial(MEHA, lower_lr=0.1, gamma=100.0, c=10.0),
    "F2SA": partial(F2SA, lower_steps=1, gamma=10.0, order=2),
}


class Case(NamedTuple):
    """A data set, a network, weights and algorithm, step sizes, and the grids from which these come."""

    data: Callable[..., ReweightingData]
    meta_per_class: int
    model: Callable[[], nn.Module]
    weights: Callable[[int], nn.Module]
    algorithm: str
    dynamics: Callable[[float], Dynamics]
    iterations: int
    lr: float  # of y in the reweighted run
    upper_lr: float  # of the Adam that moves x
    equal_lr: float  # of y in the controls
    grid: tuple[tuple[float, float], ...]  # of lr and upper_lr
    equal_grid: tuple[float, ...]


def by_class(samples: int) -> nn.Module:
    """Returns one weight a class."""
    return SourceWeights(10)


def annealed(lr: float) -> Dynamics:
    """Returns momentum whose step size falls to zero."""
    return Momentum(Cosine(lr, 0.0, 1000), 0.9)


CASES = {
    "mnist": Case(
        partial(MNISTReweighting, noise_rate=0.4, class_samples=1000, upper_batch_size=100),
        100,
        partial(MLPNet, activation="relu"),
        SampleWeights,
        "TRHG",
        GradientDescent,
        5000,
        lr=0.1,
        upper_lr=0.03,
        equal_lr=0.03,
        grid=((0.05, 0.03), (0.05, 0.1), (0.1, 0.03), (0.1, 0.1), (0.2, 0.03), (0.2, 0.1)),
        equal_grid=(0.005, 0.01, 0.02, 0.03, 0.05, 0.1),
    ),
    "cifar10": Case(
        partial(CIFAR10Reweighting, imbalance_factor=100, class_samples=4000, upper_batch_size=100),
        10,
        partial(ConvNet, (3, 32, 32), width=32, pooling="stride"),
        by_class,
        "DARTS",
        annealed,
        1000,
        lr=0.01,
        upper_lr=0.01,
        equal_lr=0.03,
        grid=((0.01, 0.01), (0.01, 0.03), (0.03, 0.01)),
        equal_grid=(0.01, 0.03, 0.1),
    ),
}


@lru_cache(maxsize=1)
def data_of(name: str, seed: int) -> ReweightingData:
    """Returns the data of a case, set up; of the split for tuning, with images of the training file as test set."""
    case, held = CASES[name], HELD if seed == TUNING_SEED else 0
    data = case.data(meta_per_class=case.meta_per_class + held, seed=seed, epoch_length=case.iterations)
    data.setup()
    if held:
        numbers = torch.arange(len(data.meta[1])).view(10, -1).split((case.meta_per_class, held), 1)
        data.meta, data.test = (tuple(t[i.flatten()] for t in data.meta) for i in numbers)
    return data


def module_of(algorithm: str, task: Reweighting, dynamics: Dynamics, upper_lr: float) -> BilevelModule:
    """Returns an algorithm with Adam for x."""
    upper = partial(torch.optim.Adam, lr=upper_lr)
    return ALGORITHMS[algorithm](task=task, dynamics=dynamics, upper_optimizer=upper)


class Runs:
    """The CSV file of what was run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open() as file:
                self.rows = list(csv.DictReader(file))

    def has(self, *key: object) -> bool:
        """Whether this case, training, seed and step sizes were run."""
        return [*map(str, key)] in [[row[column] for column in COLUMNS[:5]] for row in self.rows]

    def add(self, *values: object) -> None:
        """Appends a row, at once on disk."""
        row = dict(zip(COLUMNS, map(str, values), strict=True))
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)
        print(", ".join(row.values()), flush=True)


def reweighted(runs: Runs, name: str, seed: int, lr: float, upper_lr: float) -> None:
    """Learns the weights of a case with one seed."""
    key = (name, "reweighted", seed, lr, upper_lr)
    if runs.has(*key):
        return
    case, data = CASES[name], data_of(name, seed)
    torch.manual_seed(seed)
    task = Reweighting(case.model(), case.weights(len(data.train[1])), normalize=True)
    report = ReweightingReport(controls=False)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    loop = Trainer(
        accelerator="cpu",
        max_steps=case.iterations,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[report],
        default_root_dir=runs.path.parent,  # where the figure goes
        **off,
    )
    start = time.process_time()
    loop.fit(module_of(case.algorithm, task, case.dynamics(lr), upper_lr), datamodule=data)
    taken = time.process_time() - start
    (row,) = report.rows.values()
    runs.add(*key, row["accuracy"], taken)


def equal(runs: Runs, name: str, seed: int, lr: float, *, meta: bool = False) -> None:
    """Trains with equal weights, from the same network on the same minibatches; with ``meta`` on the meta set too."""
    key = (name, "equal weights, meta set too" if meta else "equal weights", seed, lr, "")
    if runs.has(*key):
        return
    case, data = CASES[name], data_of(name, seed)
    lower, upper = data.levels()

    def batch(k: int) -> dict[str, Any]:
        index = [draw(seed, k, i, 0, len(part[0]), 100) for i, part in enumerate((lower, upper))]
        parts = [tuple(t[i] for t in part) for i, part in zip(index, (lower, upper), strict=True)]
        return {"lower": parts[0], "upper": parts[1]}

    torch.manual_seed(seed)
    start, share = time.process_time(), len(upper[0]) / (len(lower[0]) + len(upper[0])) if meta else 0.0
    task = Reweighting(case.model(), Equal())
    control = trained_equally(task, task.lower, case.dynamics(lr), batch, range(case.iterations), 1, share).eval()
    with torch.no_grad():
        found = control.metrics({"lower": lower, "upper": data.test})
    runs.add(*key, float(found["accuracy"]), time.process_time() - start)


def tune(runs: Runs, name: str) -> None:
    """Tries all step sizes of a case, on the split for tuning."""
    case = CASES[name]
    for lr in case.equal_grid:
        equal(runs, name, TUNING_SEED, lr)
    for lr, upper_lr in case.grid:
        reweighted(runs, name, TUNING_SEED, lr, upper_lr)


def interval(values: list[float]) -> str:
    """Returns mean and half the width of the 95 % interval (Student's t)."""
    n = len(values)
    if n < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{mean(values):.2f} ± {student.ppf(0.975, n - 1) * stdev(values) / n**0.5:.2f}"


def summary(runs: Runs, seeds: Sequence[int]) -> Table:
    """Returns means over the seeds with their intervals, and of the differences to equal weights with the same seed."""
    groups: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in runs.rows:
        if int(row["seed"]) in seeds:
            groups[tuple(row[c] for c in COLUMNS if c in ("case", "training", "lr", "upper_lr"))][row["seed"]] = (
                100 * float(row["accuracy"])
            )
    table = Table("case", "training", "lr", "upper lr", "seeds", "accuracy %", "above equal weights")
    for (name, training, lr, upper_lr), found in groups.items():
        peers = groups.get((name, "equal weights", str(CASES[name].equal_lr), ""), {})
        above = [value - peers[seed] for seed, value in found.items() if seed in peers]
        table.add_row(name, training, lr, upper_lr, str(len(found)), interval([*found.values()]), interval(above))
    return table


# What an upper iteration costs.


class Iterated:
    """Upper iterations of one algorithm on random data, without a trainer; of ``plain`` steps of y alone."""

    def __init__(self, name: str, weights: str, algorithm: str) -> None:
        torch.manual_seed(0)
        model = CASES[name].model()
        shape = (1, 28, 28) if name == "mnist" else (3, 32, 32)

        def samples() -> tuple[torch.Tensor, ...]:
            labels = torch.randint(10, (100,))
            return torch.rand(100, *shape), labels, torch.arange(100), labels

        made = {"loss": LossWeights, "class": partial(SourceWeights, 10), "sample": partial(SampleWeights, 5000)}
        self.task = Reweighting(model, Equal() if algorithm == "plain" else made[weights](), normalize=True)
        self.module, number = None, 1
        if algorithm != "plain":
            dynamics = Adam(0.001) if algorithm == "SAMA" else GradientDescent(0.1)
            self.module = module_of(algorithm, self.task, dynamics, 0.001)
            self.module.configure_model()
            number = self.module.minibatches(0)[0]
        self.batch = {"lower": Minibatches(samples() for _ in range(number)), "upper": samples()[:2]}

    def run(self, number: int) -> None:
        """Runs some iterations; x does not move."""
        for _ in range(number):
            x, y = tree.detach(tree.of(self.task.upper)), tree.detach(tree.of(self.task.lower))
            problem, x, pull_back = bind(self.task, self.batch, x)
            if self.module is None:
                tree.assign(self.task.lower, GradientDescent(0.01).step(problem, x, (y,), 0)[0])
                continue
            step = self.module.bilevel_step(problem, x, y)
            pull_back(step.upper_grad)
            lower = step.lower
            if callable(lower):
                problem, x, _ = bind(self.task, self.batch, x)
                lower = lower(problem, x)
            tree.assign(self.task.lower, lower)
            for key, values in step.state.items():
                self.module.states[key].set(values)


def costs(rounds: int) -> Table:
    """Measures processor time and peak memory of an upper iteration beside a plain step of y."""
    table = Table("network", "weights", "algorithm", "ms", "/ plain step", "peak MiB", "/ plain step")
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name, weights in (("mnist", "sample"), ("mnist", "loss"), ("cifar10", "class"), ("cifar10", "loss")):
        kinds = {a: Iterated(name, weights, a) for a in ("plain", *ALGORITHMS)}
        for kind in kinds.values():
            kind.run(2)
        times = [{a: seconds(time.process_time, k.run, 5) / 5 for a, k in kinds.items()} for _ in range(rounds)]
        command = [sys.executable, __file__, "--measure", name, weights]
        lines = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        memory = dict(zip(kinds, map(float, lines), strict=True))
        for a in kinds:
            taken, ratio = median(t[a] for t in times), median(t[a] / t["plain"] for t in times)
            cells = f"{1000 * taken:.1f}", f"{ratio:.1f}", f"{memory[a]:.1f}", f"{memory[a] / memory['plain']:.1f}"
            table.add_row(name, weights if a != "plain" else "-", a, *cells)
    return table


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reweighting.csv"), help="file of the runs")
    parser.add_argument("--case", choices=[*CASES], action="append", help="only this case (may be repeated)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default 10 11 12")
    parser.add_argument("--tune", action="store_true", help="try the grids of step sizes instead, on another split")
    parser.add_argument("--cost", type=int, metavar="ROUNDS", help="measure time and memory instead")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if args.measure:
        for algorithm in ("plain", *ALGORITHMS):
            iterated = Iterated(*args.measure, algorithm)
            print(peak(SimpleNamespace(steps=2), lambda _, number, i=iterated: i.run(number)))
    elif args.cost:
        Console(width=120).print(costs(args.cost))
    else:
        runs = Runs(args.out)
        for name in args.case or CASES:
            case = CASES[name]
            if args.tune:
                tune(runs, name)
                continue
            for seed in args.seeds:
                reweighted(runs, name, seed, case.lr, case.upper_lr)
                equal(runs, name, seed, case.equal_lr)
            for seed in args.seeds:
                equal(runs, name, seed, case.equal_lr, meta=True)
        Console(width=120).print(summary(runs, [TUNING_SEED] if args.tune else args.seeds))


if __name__ == "__main__":
    main()
