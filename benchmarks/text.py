"""Sources of text: steps until the damaged one is found, what the weights are worth, and what an iteration costs.

    python benchmarks/text.py [--case weights | cost] [--seeds 3] [--config text_sama] [--rounds 7]

``weights`` runs the shipped configs ``reweighting/text_*`` with seeds 0, 1, ... and prints the first upper iteration
after which the damaged source's weight is below 0.2, and the weight at the end. Then networks are trained from
scratch by Adam (300 steps of 32 windows, step size from 0.003 linearly to 0, gradients clipped to norm 1) with these
weights held fixed, with equal weights, on the clean source alone (which nobody knows outside experiments), and on the
validation text alone, all from the same initial weights and, but for the last, on the same minibatches; printed are
the bits per byte of the test text at the end, and half the width of the 95 % confidence interval over the seeds
(Student). Nothing is selected on it.

``cost`` runs one upper iteration of each method on the default network and 32 windows a minibatch, beside ``plain``:
one step of Adam on y by hand. Seconds are CPU seconds, and the peak memory is measured in a fresh process, both as in
``hypergradients.py``.
"""

import argparse
import csv
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

import torch
from hypergradients import peak, seconds
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from bilevel_lightning import Adam, BilevelModule, GradientDescent, algorithms, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.cli import fit
from bilevel_lightning.datamodules import TextSources
from bilevel_lightning.datamodules.iterations import draw
from bilevel_lightning.models import GPT, Autocast, SourceWeights
from bilevel_lightning.task import Minibatches
from bilevel_lightning.tasks import TextReweighting

CONFIGS = ["text_sama", "text_f2sa", "text_meha", "text_lora", "text_bf16"]
RETRAINED = CONFIGS[:3]
STEPS = 300


def learnt(config: str, seed: int) -> list[float]:
    """Returns the damaged source's weight after each upper iteration of a shipped config."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["progress_bar", "model_summary", "checkpointing"]
        fit(
            [
                *("--config", f"reweighting/{config}", f"--seed_everything={seed}", f"--data.seed={seed}"),
                *(f"--trainer.enable_{name}=false" for name in quiet),
                *("--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--trainer.default_root_dir", folder),
            ]
        )
        (path,) = Path(folder).rglob("metrics.csv")
        with path.open() as file:
            rows = [*csv.DictReader(file)]
    return [float(row["train/source_weight/second"]) for row in rows if row["train/source_weight/second"]]


def scratch(data: TextSources, seed: int, weights: list[float] | None) -> float:
    """Returns the bits per byte of a network trained with fixed weights of the sources, or on validation text."""
    torch.manual_seed(seed)
    task = TextReweighting(GPT(), SourceWeights(2))
    optimizer = torch.optim.Adam(task.lower.parameters(), lr=0.003)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / STEPS, STEPS)
    shares = torch.tensor(weights or [1.0])
    samples = (data.val, *(torch.zeros(len(data.val)).long(),) * 2) if weights is None else data.train
    for k in range(STEPS):
        index = draw(seed, k, 0, 0, len(samples[0]), 32)
        inputs, targets, _, source = data.decoded(tuple(t[index] for t in samples))
        loss = (shares[source] * task.losses(inputs, targets)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.lower.parameters(), 1.0)
        optimizer.step()
        decay.step()
    bits, _ = task.scores(*data.decoded((data.test,)))
    return float(bits.mean())


def spread(values: list[float]) -> str:
    """Returns mean and half the width of the 95 % interval."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    width = student.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.3f} ± {width:.3f}"


def weights(seeds: int, configs: list[str], rounds: int) -> None:
    """The first two tables."""
    found = Table("config", "first iteration below .2", "weight at the end", "CPU seconds of a run", title="Weights")
    ends: dict[str, list[float]] = {}
    for config in configs:
        start = time.process_time()
        curves = [learnt(config, seed) for seed in range(seeds)]
        taken = (time.process_time() - start) / seeds
        below = [next((k for k, w in enumerate(curve, 1) if w < 0.2), None) for curve in curves]
        ends[config] = [round(curve[-1], 3) for curve in curves]
        found.add_row(config, ", ".join(map(str, below)), ", ".join(f"{w:.3f}" for w in ends[config]), f"{taken:.0f}")
    Console(width=110).print(found)
    rows = {f"weights of {c}": [[1 - w, w] for w in ends[c]] for c in configs if c in RETRAINED}
    if configs == CONFIGS:
        rows["equal weights"] = [[0.5, 0.5]] * seeds
        rows["clean source alone (oracle)"] = [[1.0, 0.0]] * seeds
        rows["validation text alone"] = [None] * seeds
    result = Table("trained from scratch on", "bits per byte of the test text", "mean ± 95 %", title="Their worth")
    for name, each in rows.items():
        bits = []
        for seed, fixed in enumerate(each):
            data = TextSources(seed=seed)
            data.setup()
            bits.append(scratch(data, seed, fixed))
        result.add_row(name, ", ".join(f"{b:.3f}" for b in bits), spread(bits))
    Console(width=110).print(result)


class Iteration:
    """One upper iteration of a method at fixed variables; `peak` runs it ``steps`` times, after once to warm up."""

    steps = 3

    def __init__(self, name: str | None, samples_at_once: int | None = None, bf16: bool = False, **settings: object):
        torch.manual_seed(0)
        model = Autocast(GPT()) if bf16 else GPT()
        self.task, data = TextReweighting(model, SourceWeights(2)), TextSources()
        data.setup()
        lower, upper = (data.decoded(tuple(t[:32] for t in level)) for level in data.levels())
        self.batch = {"lower": Minibatches([lower] * 3), "upper": upper}
        self.name, self.samples_at_once = name, samples_at_once
        self.module: BilevelModule | None = None
        if name is not None:
            self.module = getattr(algorithms, name)(task=self.task, **settings)
            self.module.configure_model()
        else:
            self.state = Adam(0.003).start(tree.clone(tree.of(self.task.lower)))

    def __call__(self) -> None:
        """Runs it."""
        x, y = tree.detach(tree.of(self.task.upper)), tree.detach(tree.of(self.task.lower))
        problem, x, _ = bind(self.task, self.batch, x, samples_at_once=self.samples_at_once)
        if self.module is None:
            Adam(0.003).step(problem, x, self.state, 0)
            return
        step = self.module.bilevel_step(problem, x, y)
        if callable(step.lower):
            step.lower(problem, x)


def repeated(iteration: Iteration, steps: int) -> None:
    """Runs an iteration several times, for `peak`."""
    for _ in range(steps):
        iteration()


SGD = {"dynamics": GradientDescent(0.5)}
ROWS: dict[str, Callable[[], Iteration]] = {
    "plain": partial(Iteration, None),
    "SAMA": partial(Iteration, "SAMA", dynamics=Adam(0.003)),
    "SAMA, 8 windows at once": partial(Iteration, "SAMA", 8, dynamics=Adam(0.003)),
    "SAMA, bfloat16": partial(Iteration, "SAMA", None, True, dynamics=Adam(0.003)),
    "MEHA": partial(Iteration, "MEHA", **SGD),
    "MEHA, 8 windows at once": partial(Iteration, "MEHA", 8, **SGD),
    "F2SA-2, T = 1": partial(Iteration, "F2SA", lower_steps=1, **SGD),
    "F2SA-2, T = 2": partial(Iteration, "F2SA", lower_steps=2, **SGD),
    "F2SA-2, T = 2, 8 windows at once": partial(Iteration, "F2SA", 8, lower_steps=2, **SGD),
    "VPBGD, T = 1": partial(Iteration, "VPBGD", lower_steps=1, **SGD),
    "RHG, T = 1 (second derivatives)": partial(Iteration, "RHG", lower_steps=1, **SGD),
}


def cost(seeds: int, configs: list[str], rounds: int) -> None:
    """The third table."""
    made = {row: make() for row, make in ROWS.items()}
    for iteration in made.values():
        iteration()
    times = [{row: seconds(time.process_time, one) for row, one in made.items()} for _ in range(rounds)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    again = [sys.executable, __file__, "--measure"]
    measured = {row: subprocess.run([*again, row], env=env, check=True, stdout=subprocess.PIPE).stdout for row in ROWS}
    peaks = {row: float(out) for row, out in measured.items()}
    result = Table("upper iteration", "CPU seconds", "/ plain", "peak MiB", "/ plain", title="Cost")
    for row in ROWS:
        ratio = median(t[row] / t["plain"] for t in times)
        taken = median(t[row] for t in times)
        result.add_row(row, f"{taken:.3f}", f"{ratio:.2f}", f"{peaks[row]:.1f}", f"{peaks[row] / peaks['plain']:.2f}")
    Console(width=110).print(result)


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = {"weights": weights, "cost": cost}
    parser.add_argument("--case", choices=[*cases], help="default: both")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", choices=CONFIGS, help="only this one, without the controls")
    parser.add_argument("--rounds", type=int, default=7, help="timed iterations of each row (default 7)")
    parser.add_argument("--measure", choices=[*ROWS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.measure:
        print(peak(ROWS[arguments.measure](), repeated))
        return
    for name, case in cases.items():
        if arguments.case in (None, name):
            case(arguments.seeds, [arguments.config] if arguments.config else CONFIGS, arguments.rounds)


if __name__ == "__main__":
    main()
