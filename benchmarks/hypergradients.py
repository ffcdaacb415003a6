"""Time and memory of the reverse hypergradient beside peers, in the same run and on one thread.

    python benchmarks/hypergradients.py [--rounds 7] [--skip-memory] [--skip-lightning]

Two hyper-cleaning problems on synthetic images (only sizes matter) with gradient descent of step size 0.1, full unroll:
multinomial logistic regression on 5000 + 5000 images with T = 100, and ConvNet-4 on 25 + 75 images with T = 20. Rows:

* ``plain``: the T lower steps alone, hand-written without a graph across steps; the unit of time;
* ``loop``: hand-written unrolling with ``create_graph=True`` and one `torch.autograd.grad` at the end;
* ``higher``: the same with the library `higher`;
* ``graph``, ``recompute``: `bilevel_lightning.hypergradients.reverse` in its two memory modes.

The script first checks that the four hypergradients are equal (relative difference below 1e-4, float32), which is also
the warm-up. Then each round runs all rows once, in turn; seconds are medians over rounds, ratios are medians of each
round's ratio to ``plain`` of the same round, which cancels slow changes of the machine's speed.

Peak memory: each row runs once in a fresh process, after a warm-up with T = 1. It is the high-water mark of resident
memory (``VmHWM``, reset by writing 5 to ``/proc/self/clear_refs``; Linux only) above the resident memory just before.
In those processes MALLOC_MMAP_THRESHOLD_ = MALLOC_TRIM_THRESHOLD_ = 64 KiB makes the C allocator give each freed block
back at once and `malloc_trim` returns the warm-up's rest, so that the mark counts live memory, not the allocator's cache.

Lightning's share: upper iterations of the first problem through ``Trainer.fit``, each followed by a bare ``reverse`` in
the same process; the median difference of such neighbours as a share of the iteration. Targets are printed, not asserted.
"""

import argparse
import ctypes
import gc
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import higher
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from bilevel_lightning import tree
from bilevel_lightning.algorithms.rhg import RHG
from bilevel_lightning.dynamics import GradientDescent
from bilevel_lightning.hypergradients import reverse
from bilevel_lightning.models import ConvNet, LinearNet
from bilevel_lightning.problem import bind
from bilevel_lightning.tasks.hyper_cleaning import HyperCleaning

LR = 0.1
TIME_TARGETS = {"linear": {"graph": 1.85, "recompute": 2.7}}
"""Largest seconds as a multiple of ``plain``, by case and row."""
MEMORY_TARGETS = {"convnet": {"recompute": 1 / 5}}
"""Largest peak memory as a multiple of ``graph``, by case and row."""


@dataclass
class Case:
    """One problem; ``forward`` is the hand-written network, ``forward(parameters, images) -> logits``."""

    title: str
    model: nn.Module
    forward: Callable[[list[Tensor], Tensor], Tensor]
    samples: tuple[int, int]
    steps: int

    def __post_init__(self) -> None:
        """Draws the data."""
        images, labels = torch.rand(sum(self.samples), 1, 28, 28), torch.randint(10, (sum(self.samples),))
        n = self.samples[0]
        self.lower, self.upper = (images[:n].clone(), labels[:n], torch.arange(n)), (images[n:].clone(), labels[n:])
        self.task = HyperCleaning(self.model, samples=n)
        self.x = torch.zeros(n, requires_grad=True)
        self.y = [p.detach().clone() for p in self.model.parameters()]

    def lower_loss(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Returns g for the network ``forward(images)``."""
        images, labels, index = self.lower
        return (torch.sigmoid(x[index]) * functional.cross_entropy(forward(images), labels, reduction="none")).mean()

    def upper_loss(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns f for the network ``forward(images)``."""
        return functional.cross_entropy(forward(self.upper[0]), self.upper[1])


def linear(y: list[Tensor], images: Tensor) -> Tensor:
    """Returns the logits of `LinearNet` with parameters y."""
    return functional.linear(images.flatten(1), *y)


def convnet(y: list[Tensor], images: Tensor) -> Tensor:
    """Returns the logits of `ConvNet` (width 32) with parameters y."""
    for i in range(0, len(y) - 2, 4):
        images = functional.group_norm(functional.conv2d(images, y[i], y[i + 1], padding=1), 4, y[i + 2], y[i + 3])
        images = functional.max_pool2d(functional.relu(images), 2)
    return linear(y[-2:], images)


def plain(case: Case, steps: int) -> None:
    """Runs the lower steps alone."""
    x, y = case.x.detach(), [t.clone().requires_grad_() for t in case.y]
    for _ in range(steps):
        gradient = torch.autograd.grad(case.lower_loss(lambda images: case.forward(y, images), x), y)
        with torch.no_grad():
            for t, g in zip(y, gradient, strict=True):
                t.sub_(g, alpha=LR)


def loop(case: Case, steps: int) -> Tensor:
    """Unrolls by hand."""
    y = [t.clone().requires_grad_() for t in case.y]
    for _ in range(steps):
        loss = case.lower_loss(lambda images, y=y: case.forward(y, images), case.x)
        gradient = torch.autograd.grad(loss, y, create_graph=True)
        y = [torch.sub(t, g, alpha=LR) for t, g in zip(y, gradient, strict=True)]
    return torch.autograd.grad(case.upper_loss(lambda images: case.forward(y, images)), case.x)[0]


def with_higher(case: Case, steps: int) -> Tensor:
    """Unrolls with the library `higher`."""
    sgd = torch.optim.SGD(case.model.parameters(), lr=LR)
    with higher.innerloop_ctx(case.model, sgd, copy_initial_weights=False, track_higher_grads=True) as (net, optimizer):
        for _ in range(steps):
            optimizer.step(case.lower_loss(net, case.x))
        return torch.autograd.grad(case.upper_loss(net), case.x)[0]


def ours(memory: str) -> Callable[[Case, int], Tensor]:
    """Returns the row of our `reverse` with this memory mode."""

    def row(case: Case, steps: int) -> Tensor:
        batch, y = {"lower": case.lower, "upper": case.upper}, tree.detach(tree.of(case.task.lower))
        problem, x, pull_back = bind(case.task, batch, tree.detach(tree.of(case.task.upper)), lambda v: v)
        return pull_back(reverse(problem, GradientDescent(LR), x, y, steps, memory=memory)[0])["logits"]

    return row


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: Case("MNIST linear, 5000 + 5000 images, T = 100", LinearNet(), linear, (5000, 5000), 100),
    "convnet": lambda: Case("ConvNet-4, 25 + 75 images, T = 20", ConvNet(width=32, blocks=4), convnet, (25, 75), 20),
}
ROWS = {"plain": plain, "loop": loop, "higher": with_higher, "graph": ours("graph"), "recompute": ours("recompute")}


def seconds(function: Callable[..., object], *args: object) -> float:
    """Returns the wall time of one call, with the garbage of the calls before collected first."""
    gc.collect()
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def check(case: Case) -> None:
    """Runs every row once and raises if the hypergradients differ."""
    found = {name: row(case, case.steps) for name, row in ROWS.items()}
    for name in ("higher", "graph", "recompute"):
        difference = float((found[name] - found["loop"]).norm() / found["loop"].norm())
        if not difference < 1e-4:
            raise RuntimeError(f"{case.title}: {name} differs from loop by {difference:.1e} (relative).")
        print(f"{case.title}: {name} equals loop up to {difference:.1e}")


def resident(field: str) -> float:
    """Returns ``VmRSS`` or ``VmHWM`` of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak(case: Case, row: Callable[[Case, int], object]) -> float:
    """Returns the peak resident memory in MiB of one run of a row above that just before it."""
    row(case, 1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    row(case, case.steps)
    return resident("VmHWM") - before


def peak_in_new_process(case: str, row: str) -> float:
    """Returns `peak`, measured by this script in a fresh process."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--measure", case, row]
    done = subprocess.run(command, env={**os.environ, **settings}, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


class Stopwatch(Callback):
    """Times each upper iteration (from the end of the last to its own end) and a bare ``reverse`` after it."""

    def __init__(self, bare: Callable[[], object]) -> None:
        self.bare, self.pairs, self.start = bare, [], None

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: object) -> None:
        """Called by Lightning after each upper iteration."""
        now = time.perf_counter()
        if self.start is not None:
            self.pairs.append((now - self.start, seconds(self.bare)))
        self.start = time.perf_counter()


def lightning_share(case: Case, log_every: int, iterations: int) -> tuple[float, float]:
    """Returns the median seconds of an upper iteration, and the median share of it that a bare ``reverse`` has not."""
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    watch = Stopwatch(lambda: ROWS["graph"](case, case.steps))
    trainer = Trainer(
        accelerator="cpu", max_steps=iterations, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=log_every, callbacks=[watch],
    )  # fmt: skip
    module = RHG(task=case.task, dynamics=GradientDescent(LR), lower_steps=case.steps, warm_start=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, [{"lower": case.lower, "upper": case.upper}] * iterations)
    return median(whole for whole, _ in watch.pairs), median((whole - bare) / whole for whole, bare in watch.pairs)


def table(name: str, case: Case, rounds: int, memory: bool) -> Table:
    """Measures all rows of one case."""
    times = [{row: seconds(function, case, case.steps) for row, function in ROWS.items()} for _ in range(rounds)]
    peaks = {row: peak_in_new_process(name, row) for row in ROWS} if memory else {}
    result = Table("row", "seconds", "/ plain", "target", "peak MiB", "/ graph", "target", title=case.title)
    for row in ROWS:
        ratio = median(t[row] / t["plain"] for t in times)
        cells = [row, f"{median(t[row] for t in times):.3f}", f"{ratio:.2f}"]
        target = TIME_TARGETS.get(name, {}).get(row)
        cells.append("" if target is None else f"<= {target:g}")
        cells += [f"{peaks[row]:.1f}", f"{peaks[row] / peaks['graph']:.3f}"] if memory else ["", ""]
        target = MEMORY_TARGETS.get(name, {}).get(row)
        cells.append("" if target is None else f"<= {target:g}")
        result.add_row(*cells)
    return result


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each row (default 7)")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-lightning", action="store_true")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.measure:
        case, row = args.measure
        print(peak(CASES[case](), ROWS[row]))
        return
    console = Console(width=120)
    for name, make in CASES.items():
        case = make()
        check(case)
        console.print(table(name, case, args.rounds, not args.skip_memory))
    if not args.skip_lightning:
        for log_every in (1, 50):
            whole, share = lightning_share(CASES["linear"](), log_every, args.rounds + 2)
            print(f"Lightning, log_every_n_steps={log_every}: {whole:.3f} s an iteration, share {share:.1%} (<= 5 %)")


if __name__ == "__main__":
    main()
