"""A tiny architecture search on CIFAR-10: is what it finds better than random? And what an upper iteration costs.

    python benchmarks/architecture.py search [--method DARTS1 | DARTS2 | MEHA] [--seed 0] --out runs.csv
    python benchmarks/architecture.py retrain [--seeds 0 1 2] [--random 5] [--published DARTS_V2] --out runs.csv
    python benchmarks/architecture.py report --out runs.csv
    python benchmarks/architecture.py cost [--rounds 5]

``search`` searches with 8 channels and 3 cells on 10,000 training images of CIFAR-10, half of them for each level,
whose pixels are averaged to 16 x 16; minibatches of 64. ``retrain`` trains all genotypes that were found, random and
published ones, from scratch on those 10,000 images, in a network of the same size (8 channels, 3 cells), with the same
settings, and tests each once, on the official 10,000 test images: nothing is selected on them. ``report`` prints the
table.

Each finished run is one more row of the file, and none is done twice, so that a kill loses one run. Data are read from
BILEVEL_DATA_DIR. Seconds are CPU seconds on one thread.

``cost``: CPU seconds of an upper iteration of each algorithm, as a ratio to those of one SGD step on y with the same
minibatch; medians over rounds, in each of which all rows run once, in turn. Peak memory as in hypergradients.py: of one
run in a fresh process, above the resident memory just before it.
"""

import argparse
import csv
import gc
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hypergradients import peak
from pytorch_lightning import Trainer
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from bilevel_lightning import DARTS, F2SA, MEHA, SAMA, VPBGD, Adam, BilevelModule, GradientDescent, Momentum, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.datamodules import CIFAR10Search, CIFAR10Training
from bilevel_lightning.models import Genotype, SearchNetwork
from bilevel_lightning.models.cells import PUBLISHED
from bilevel_lightning.retraining import Retraining
from bilevel_lightning.schedules import Cosine, Linear, Power
from bilevel_lightning.task import Minibatches
from bilevel_lightning.tasks import ArchitectureSearch

SIDE, IMAGES, BATCH = 16, 10_000, 64
ITERATIONS = {"DARTS1": 200, "DARTS2": 100, "MEHA": 67}  # about as many gradients of the network each
TRAINING = 400
FIELDS = ("part", "name", "seed", "cpu_seconds", "accuracy", "parameters", "genotype")
OFF = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def rows(file: Path) -> list[dict[str, str]]:
    """Returns the finished runs."""
    if not file.is_file():
        return []
    with file.open() as lines:
        return list(csv.DictReader(lines))


def add(file: Path, **values: object) -> None:
    """Writes one more row."""
    new = not file.is_file()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(values)
    print(values, flush=True)


def done(file: Path, *key: object) -> bool:
    """Whether the run (part, name, seed) is in the file."""
    return any((row["part"], row["name"], row["seed"]) == tuple(map(str, key)) for row in rows(file))


def task() -> ArchitectureSearch:
    """Returns the problem of all searches."""
    return ArchitectureSearch(SearchNetwork((3, SIDE, SIDE), channels=8, layers=3), upper_l2=5e-4)


def searching(method: str) -> BilevelModule:
    """Returns the algorithm of a search, with the schedules of its length."""
    number = ITERATIONS[method]
    settings = {
        "task": task(),
        "upper_optimizer": lambda params: torch.optim.Adam(params, lr=0.005, betas=(0.5, 0.999)),
        "upper_scheduler": Linear(0.0, 1.0, number // 3),  # the weights first
    }
    lr = Cosine(0.05, 0.001, number)
    if method == "MEHA":
        theta = GradientDescent(0.05)
        return MEHA(gamma=200.0, c=Power(2.0, 0.49), lower_lr=lr, dynamics=theta, **settings)
    return DARTS(order=int(method[-1]), dynamics=Momentum(lr, 0.9), **settings)


def search(method: str, seed: int, file: Path) -> None:
    """Searches."""
    if done(file, "search", method, seed):
        return
    data = CIFAR10Search(samples=IMAGES, image_size=SIDE, epoch_length=ITERATIONS[method], padding=2, seed=0)
    data.setup()
    data.seed = seed  # of the minibatches; which images there are stays the same
    torch.manual_seed(seed)
    module = searching(method)
    trainer = Trainer(accelerator="cpu", max_steps=ITERATIONS[method], limit_val_batches=4, **OFF, callbacks=[])
    module.configure_callbacks = list
    start = time.process_time()
    trainer.fit(module, datamodule=data)
    seconds, accuracy = time.process_time() - start, float(trainer.callback_metrics["val/accuracy"])
    size = sum(p.numel() for p in module.task.lower.parameters())
    add(
        file, part="search", name=method, seed=seed, cpu_seconds=round(seconds, 1), accuracy=accuracy, parameters=size,
        genotype=module.task.upper.genotype(),
    )  # fmt: skip


def retrain(seeds: list[int], number: int, published: list[str], share: tuple[int, int], file: Path) -> None:
    """Trains what was found, random and published genotypes; of all those runs every n-th, from the i-th."""
    found = {f"{row['name']} {row['seed']}": row["genotype"] for row in rows(file) if row["part"] == "search"}
    chosen = found | {f"random {i}": str(Genotype.random(i)) for i in range(number)}
    chosen |= {name: str(PUBLISHED[name]) for name in published}
    runs = [(seed, name) for seed in seeds for name in chosen][share[0] :: share[1]]
    data = CIFAR10Training(
        train_samples=IMAGES, batch_size=BATCH, image_size=SIDE, padding=2, cutout=0, evaluation_batch_size=1000
    )
    data.setup()
    for seed, name in runs:
        if done(file, "retrain", name, seed):
            continue
        data.seed = seed  # of shuffles and crops; which images there are stays the same
        torch.manual_seed(seed)
        module = Retraining(
            chosen[name],
            image_shape=(3, SIDE, SIDE),
            channels=8,
            layers=3,
            auxiliary_weight=0.0,
            drop_path=0.0,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=3e-4),
        )
        trainer = Trainer(accelerator="cpu", max_steps=TRAINING, gradient_clip_val=5.0, **OFF)
        start = time.process_time()
        trainer.fit(module, datamodule=data)
        seconds = time.process_time() - start
        (tested,) = trainer.test(module, datamodule=data, verbose=False)
        size = sum(p.numel() for p in module.network.parameters())
        add(
            file, part="retrain", name=name, seed=seed, cpu_seconds=round(seconds, 1),
            accuracy=round(tested["test/accuracy"], 4), parameters=size, genotype=chosen[name],
        )  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean and half of its 95 % interval by Student's t."""
    n = len(values)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5 if n > 1 else float("nan")
    return statistics.mean(values), half


def report(file: Path) -> None:
    """Prints each genotype over its seeds, the random ones together, and what was found beside these, seed by seed."""
    found = [row for row in rows(file) if row["part"] == "retrain"]
    names = sorted({row["name"] for row in found})
    scores = {n: {int(r["seed"]): 100 * float(r["accuracy"]) for r in found if r["name"] == n} for n in names}
    table = Table("genotype", "parameters", "runs", "test accuracy, %", "CPU s a run", title="Retrained alike")
    for name in names:
        mean, half = interval([*scores[name].values()])
        own = [row for row in found if row["name"] == name]
        seconds = statistics.mean(float(row["cpu_seconds"]) for row in own)
        table.add_row(name, own[0]["parameters"], str(len(own)), f"{mean:.2f} ± {half:.2f}", f"{seconds:.0f}")
    Console(width=110).print(table)
    controls = [name for name in names if name.startswith("random")]
    means = [statistics.mean(scores[name].values()) for name in controls]
    mean, half = interval(means)
    print(f"{len(controls)} random genotypes: {mean:.2f} ± {half:.2f} % (95 % over the genotypes' means)")
    for name in (n for n in names if n not in controls):
        seeds = sorted(scores[name])
        gaps = [scores[name][s] - statistics.mean(scores[c][s] for c in controls if s in scores[c]) for s in seeds]
        gap, half = interval(gaps)
        print(f"{name} minus the mean of the random ones, by seed: {gap:+.2f} ± {half:.2f} (95 %, {len(seeds)} seeds)")
        below = sum(statistics.mean(scores[name].values()) > m for m in means)
        print(f"{name} is better than {below} of the {len(means)} random ones")


class Costs:
    """One problem, and an upper iteration of each algorithm on it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.task, self.steps = task(), 1
        self.x, self.y = tree.detach(tree.of(self.task.upper)), tree.detach(tree.of(self.task.lower))
        self.parts = [(torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(10, (BATCH,))) for _ in range(3)]


def plain(costs: Costs, steps: int) -> None:
    """Steps y once by its loss, hand-written; x is a constant."""
    y = list(costs.task.lower.parameters())
    costs.task.upper.requires_grad_(False)
    for t, g in zip(y, torch.autograd.grad(costs.task.lower_loss(costs.parts[0]), y), strict=True):
        t.data.sub_(g, alpha=1e-3)
    costs.task.upper.requires_grad_(True)


def iteration(costs: Costs, steps: int, make: Callable[[], BilevelModule]) -> None:
    """Computes one upper iteration."""
    module = make()
    module.task = costs.task
    lower = Minibatches(costs.parts[: module.minibatches(0)[0]])
    problem, x, _ = bind(costs.task, {"lower": lower, "upper": costs.parts[2]}, costs.x)
    step = module.bilevel_step(problem, x, costs.y)
    if callable(step.lower):
        step.lower(problem, x)


ALGORITHMS: dict[str, Callable[[], BilevelModule]] = {
    "DARTS, order 1": partial(DARTS, order=1, dynamics=Momentum(0.025)),
    "DARTS, order 2": partial(DARTS, dynamics=Momentum(0.025)),
    "SAMA": partial(SAMA, dynamics=Adam(1e-3)),
    "MEHA": partial(MEHA, gamma=200.0, c=2.0, lower_lr=0.025, dynamics=GradientDescent(0.025)),
    "V-PBGD": partial(VPBGD, lower_lr=0.025, dynamics=GradientDescent(0.025), lower_steps=1),
    "F2SA, order 2": partial(F2SA, dynamics=GradientDescent(0.025), lower_steps=1),
}
ROWS: dict[str, Callable[[Costs, int], None]] = {
    "plain training of y": plain,
    **{name: partial(iteration, make=make) for name, make in ALGORITHMS.items()},
}


def cost(rounds: int) -> None:
    """Prints what an upper iteration costs."""
    costs = Costs()
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    for i in range(rounds + 1):
        for name, row in ROWS.items():
            gc.collect()
            start = time.process_time()
            row(costs, 1)
            if i:  # the first is not counted
                times[name].append(time.process_time() - start)
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    table = Table("method", "CPU s", "/ plain", "peak MiB", "/ plain", title=f"One upper iteration, {BATCH} images")
    peaks = {}
    for name in ROWS:
        again = [sys.executable, __file__, "measure", "--row", name]
        peaks[name] = float(subprocess.run(again, env=env, check=True, stdout=subprocess.PIPE).stdout)
    unit = "plain training of y"
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times[unit], strict=True))
        memory = f"{peaks[name]:.0f}", f"{peaks[name] / peaks[unit]:.2f}"
        table.add_row(name, f"{statistics.median(taken):.2f}", f"{ratio:.2f}", *memory)
    Console(width=100).print(table)


def main() -> None:
    """Runs a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["search", "retrain", "report", "cost", "measure"])
    parser.add_argument("--out", type=Path, default=Path("architecture.csv"), help="file of the finished runs")
    parser.add_argument("--method", choices=[*ITERATIONS], default="DARTS1")
    parser.add_argument("--seed", type=int, default=0, help="of a search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of retraining")
    parser.add_argument("--random", type=int, default=5, help="number of random genotypes")
    parser.add_argument("--published", nargs="*", choices=PUBLISHED, default=[], help="published genotypes as controls")
    parser.add_argument("--share", default="0/1", help="i/n: only every n-th run, from the i-th")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each row")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if args.part == "search":
        search(args.method, args.seed, args.out)
    elif args.part == "retrain":
        first, number = map(int, args.share.split("/"))
        retrain(args.seeds, args.random, args.published, (first, number), args.out)
    elif args.part == "report":
        report(args.out)
    elif args.part == "cost":
        cost(args.rounds)
    else:
        print(peak(Costs(), ROWS[args.row]))


if __name__ == "__main__":
    main()
