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
from collections.abc import Callable
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

from bilevel_lightning import DARTS, F2SA, MEHA, SAMA, TRHG, Adam, BilevelModule, GradientDescent, Minibatches, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.callbacks import ReweightingReport
from bilevel_lightning.callbacks.reweighting import Equal, trained_equally
from bilevel_lightning.datamodules import CIFAR10Reweighting, MNISTReweighting, ReweightingData
from bilevel_lightning.datamodules.iterations import draw
from bilevel_lightning.models import ConvNet, LossWeights, MLPNet, SampleWeights, SourceWeights
from bilevel_lightning.tasks import Reweighting

TUNING_SEED = 100  # of a split of its own, on whose meta set, 1000 images, the control's step size is chosen
COLUMNS = ("case", "method", "seed", "lr", "iterations", "accuracy", "balanced_accuracy", "cpu_seconds")
ALGORITHMS: dict[str, Callable[..., BilevelModule]] = {
    "TRHG": partial(TRHG, lower_steps=1, truncation=1),
    "DARTS": DARTS,
    "SAMA": SAMA,
    "MEHA": partial(MEHA, gamma=100.0, c=10.0),
    "F2SA": partial(F2SA, lower_steps=1, gamma=10.0, order=2),
}


class Method(NamedTuple):
    """How x is learnt: weights, algorithm, step size of the Adam that moves x, and of y."""

    weights: Callable[[int], nn.Module]
    algorithm: str
    upper_lr: float
    lr: float = 0.1


class Case(NamedTuple):
    """A data set, a network, and the methods that are run on it."""

    data: Callable[..., ReweightingData]
    meta_per_class: int
    model: Callable[[], nn.Module]
    iterations: int
    rates: tuple[float, ...]
    methods: dict[str, Method]


def by_sample(samples: int) -> nn.Module:
    """Returns one weight a sample."""
    return SampleWeights(samples)


def by_class(samples: int) -> nn.Module:
    """Returns one weight a class."""
    return SourceWeights(10)


def by_loss(samples: int) -> nn.Module:
    """Returns Meta-Weight-Net's function."""
    return LossWeights()


CASES = {
    "mnist": Case(
        partial(MNISTReweighting, noise_rate=0.4, class_samples=500, upper_batch_size=100),
        100,
        partial(MLPNet, activation="relu"),
        2000,
        (0.01, 0.03, 0.1, 0.3),
        {
            "sample weights, T-RHG(1)": Method(by_sample, "TRHG", 0.05),
            "loss, T-RHG(1)": Method(by_loss, "TRHG", 0.0005),
            "sample weights, SAMA": Method(by_sample, "SAMA", 0.05),
            "sample weights, MEHA": Method(by_sample, "MEHA", 0.05),
            "sample weights, F2SA-2": Method(by_sample, "F2SA", 0.05),
        },
    ),
    "cifar10": Case(
        partial(CIFAR10Reweighting, imbalance_factor=100, class_samples=4000, upper_batch_size=100),
        10,
        partial(ConvNet, (3, 32, 32), width=32, pooling="stride"),
        800,
        (0.03, 0.1, 0.3),
        {
            "class weights, DARTS": Method(by_class, "DARTS", 0.03),
            "loss, DARTS": Method(by_loss, "DARTS", 0.0005),
            "class weights, SAMA": Method(by_class, "SAMA", 0.03),
            "class weights, MEHA": Method(by_class, "MEHA", 0.03),
            "class weights, F2SA-2": Method(by_class, "F2SA", 0.03),
        },
    ),
}


@lru_cache(maxsize=1)
def data_of(name: str, seed: int) -> ReweightingData:
    """Returns the data of a case, set up."""
    case = CASES[name]
    meta = 100 if seed == TUNING_SEED else case.meta_per_class
    data = case.data(meta_per_class=meta, seed=seed, epoch_length=case.iterations)
    data.setup()
    return data


def module_of(method: Method, task: Reweighting) -> BilevelModule:
    """Returns the algorithm; SAMA's Adam has a hundredth of the others' step size."""
    settings: dict[str, Any] = {"dynamics": GradientDescent(method.lr)}
    if method.algorithm == "SAMA":
        settings = {"dynamics": Adam(method.lr / 100)}
    if method.algorithm == "MEHA":
        settings["lower_lr"] = method.lr
    upper = partial(torch.optim.Adam, lr=method.upper_lr)
    return ALGORITHMS[method.algorithm](task=task, upper_optimizer=upper, **settings)


class Runs:
    """The CSV file of what was run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open() as file:
                self.rows = list(csv.DictReader(file))

    def has(self, case: str, method: str, seed: int, lr: float) -> bool:
        """Whether this was run."""
        key = (case, method, str(seed), str(lr))
        return key in {(r["case"], r["method"], r["seed"], r["lr"]) for r in self.rows}

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


def reweighted(runs: Runs, name: str, label: str, seed: int) -> None:
    """Runs a method of a case with one seed."""
    case, method = CASES[name], CASES[name].methods[label]
    if runs.has(name, label, seed, method.lr):
        return
    data = data_of(name, seed)
    torch.manual_seed(seed)
    task = Reweighting(case.model(), method.weights(len(data.train[1])), normalize=True)
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
    loop.fit(module_of(method, task), datamodule=data)
    taken = time.process_time() - start
    (row,) = report.rows.values()
    runs.add(name, label, seed, method.lr, case.iterations, row["accuracy"], row["balanced_accuracy"], taken)


def equal(runs: Runs, name: str, seed: int, lr: float, *, meta: bool = False, tuning: bool = False) -> None:
    """Trains with equal weights; for tuning on a split of its own, tested on its meta set."""
    label = "tuning" if tuning else "equal weights, meta set too" if meta else "equal weights"
    if runs.has(name, label, seed, lr):
        return
    case = CASES[name]
    data = data_of(name, seed)
    lower, upper = data.levels()

    def batch(k: int) -> dict[str, Any]:
        index = [draw(seed, k, i, 0, len(part[0]), 100) for i, part in enumerate((lower, upper))]
        parts = [tuple(t[i] for t in part) for i, part in zip(index, (lower, upper), strict=True)]
        return {"lower": parts[0], "upper": parts[1]}

    torch.manual_seed(seed)
    start, share = time.process_time(), len(upper[0]) / (len(lower[0]) + len(upper[0])) if meta else 0.0
    task = Reweighting(case.model(), SourceWeights(10))
    control = trained_equally(task, task.lower, GradientDescent(lr), batch, case.iterations, 1, share).eval()
    with torch.no_grad():
        found = control.metrics({"lower": lower, "upper": data.meta if tuning else data.test})
    values = [float(found[key]) for key in ("accuracy", "balanced_accuracy")]
    runs.add(name, label, seed, lr, case.iterations, *values, time.process_time() - start)


def tuned(runs: Runs, name: str) -> float:
    """Returns the step size with which equal weights do best on the split for tuning."""
    for lr in CASES[name].rates:
        equal(runs, name, TUNING_SEED, lr, tuning=True)
    found = {r["lr"]: float(r["accuracy"]) for r in runs.rows if (r["case"], r["method"]) == (name, "tuning")}
    return float(max(found, key=lambda lr: found[lr]))


def interval(values: list[float]) -> str:
    """Returns mean and half the width of the 95 % interval (Student's t)."""
    n = len(values)
    if n < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{mean(values):.2f} ± {student.ppf(0.975, n - 1) * stdev(values) / n**0.5:.2f}"


def summary(runs: Runs) -> Table:
    """Returns means over the seeds with their intervals, and of the differences to equal weights with the same seed."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for row in runs.rows:
        groups[row["case"], row["method"], row["lr"]].append(row)
    table = Table("case", "method", "lr", "seeds", "accuracy %", "balanced accuracy %", "above equal weights")
    for (case, method, lr), rows in groups.items():
        cells = [interval([100 * float(row[column]) for row in rows]) for column in ("accuracy", "balanced_accuracy")]
        peers = {r["seed"]: r for r in runs.rows if (r["case"], r["method"]) == (case, "equal weights")}
        pairs = [(row, peers[row["seed"]]) for row in rows if row["seed"] in peers]
        above = [100 * (float(row["accuracy"]) - float(peer["accuracy"])) for row, peer in pairs]
        table.add_row(case, method, lr, str(len(rows)), *cells, interval(above))
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
            self.module = module_of(Method(by_loss, algorithm, 0.001), self.task)
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
    parser.add_argument("--method", action="append", help="only this method besides the controls (may be repeated)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
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
            lr = tuned(runs, name)
            for seed in range(args.seeds):
                for label in args.method or CASES[name].methods:
                    if label in CASES[name].methods:
                        reweighted(runs, name, label, seed)
                equal(runs, name, seed, lr)
                equal(runs, name, seed, lr, meta=True)
        Console(width=120).print(summary(runs))


if __name__ == "__main__":
    main()
