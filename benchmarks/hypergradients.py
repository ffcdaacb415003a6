"""Time and memory of every hypergradient beside peers, in the same run and on one thread.

    python benchmarks/hypergradients.py [--rounds 7] [--case linear | convnet | mlp | lightning]

Three hyper-cleaning problems on random images (only sizes matter), gradient descent with step 0.1. Rows:

* ``plain``: the T lower steps alone, hand-written, without a graph across steps; the unit of time;
* ``loop``: hand-written unrolling with ``create_graph=True`` and one `torch.autograd.grad` at the end;
* ``higher``: the same with the library `higher`;
* ``neumann by hand``: the T lower steps, and the Neumann series with 20 products, hand-written;
* the others: `bilevel_step` of the algorithm of that name (``ROWS``). Conjugate gradient, with damping 1, stops
  where g_yy + I is indefinite: on the ConvNet after 4 products. T-RHG keeps K = T / 5 steps. Forward-HG is for few
  upper variables: its row has one weight for each of the ten classes instead of one for each image.

A first, untimed run of each row in float64 checks that the hypergradients that should be equal are (relative
difference below 1e-8; Forward-HG's to the sums over the classes; in float32 the twenty steps on the ConvNet multiply
rounding errors a thousandfold and more).
Then, in float32, each round runs all rows once, in turn. Seconds are CPU seconds, on one thread of an idle machine
the time on the clock, but not counting what other jobs take; they are medians over the rounds. Ratios are medians of
each round's ratio to ``plain`` of the same round, which cancels slow changes of the machine's speed; below a table
are such ratios of our rows to the hand-written ones and to `higher`. Products are those with g_yy, as
`BilevelProblem.counts` has them.

Peak memory: one run of each row in a fresh process, after a warm-up with T = 1. It is the high-water mark of resident
memory (VmHWM, reset by writing 5 to /proc/self/clear_refs; Linux only) above the resident memory just before. In those
processes MALLOC_MMAP_THRESHOLD_ = MALLOC_TRIM_THRESHOLD_ = 64 KiB makes the C allocator give back each freed block at
once, and `malloc_trim` returns the rest of the warm-up: the mark then counts live memory, not the allocator's cache.

Lightning's share: upper iterations of the first problem through ``Trainer.fit``, on the clock, each followed by a bare
``reverse``. Printed are the median difference of such neighbours and, much less noisy, the time of an iteration outside
its own ``reverse``, both as shares of the iteration. Targets are printed, not asserted.
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
from copy import copy
from functools import partial
from pathlib import Path
from statistics import median

import higher
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from bilevel_lightning import (
    AID,
    DARTS,
    FG2U,
    PZOBO,
    RHG,
    SAMA,
    TRHG,
    Adam,
    BilevelModule,
    ForwardHG,
    GradientDescent,
    tree,
)
from bilevel_lightning.binding import bind
from bilevel_lightning.linear_solvers import (
    ConjugateGradient,
    FixedPointIteration,
    LinearSolver,
    Neumann,
    NormalConjugateGradient,
    Nystrom,
    Stochastic,
)
from bilevel_lightning.models import ConvNet, LinearNet, MLPNet
from bilevel_lightning.tasks.hyper_cleaning import HyperCleaning

LR, PRODUCTS, CLASSES = 0.1, 20, 10
TIME_TARGETS = {("linear", "RHG graph"): "<= 1.85", ("linear", "RHG recompute"): "<= 2.7"}
MEMORY_TARGETS = {("convnet", "RHG recompute"): "<= 0.125"}


class Case:
    """One problem: its data, the shipped task, and its losses by hand for a network ``net(images) -> logits``."""

    def __init__(self, title: str, model: nn.Module, by_hand: Callable, samples: tuple[int, int], steps: int) -> None:
        self.title, self.model, self.by_hand, self.steps = title, model, by_hand, steps
        self.products = 0
        self.task, self.x = HyperCleaning(model, samples[0]), torch.zeros(samples[0], requires_grad=True)
        images, labels = ([torch.rand(n, 1, 28, 28) for n in samples], [torch.randint(CLASSES, (n,)) for n in samples])
        self.batch = {"lower": (images[0], labels[0], torch.arange(samples[0])), "upper": (images[1], labels[1])}

    def start(self) -> list[Tensor]:
        """Returns y_0 as fresh leaves."""
        return [p.detach().clone().requires_grad_() for p in self.model.parameters()]

    def lower_loss(self, x: Tensor, net: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns g."""
        images, labels, index = self.batch["lower"]
        return (torch.sigmoid(x[index]) * functional.cross_entropy(net(images), labels, reduction="none")).mean()

    def upper_loss(self, net: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns f."""
        images, labels = self.batch["upper"]
        return functional.cross_entropy(net(images), labels)


def linear(y: list[Tensor], images: Tensor) -> Tensor:
    """Returns the logits of `LinearNet` with parameters y."""
    return functional.linear(images.flatten(1), *y)


def convnet(y: list[Tensor], images: Tensor) -> Tensor:
    """Returns the logits of `ConvNet` (width 32) with parameters y."""
    for i in range(0, len(y) - 2, 4):
        images = functional.group_norm(functional.conv2d(images, y[i], y[i + 1], padding=1), 4, y[i + 2], y[i + 3])
        images = functional.max_pool2d(functional.relu(images), 2)
    return linear(y[-2:], images)


def mlp(y: list[Tensor], images: Tensor) -> Tensor:
    """Returns the logits of `MLPNet` with one hidden layer and parameters y."""
    return functional.linear(functional.relu(functional.linear(images.flatten(1), *y[:2])), *y[2:])


def plain(case: Case, steps: int) -> list[Tensor]:
    """Runs the lower steps alone and returns y."""
    y = case.start()
    for _ in range(steps):
        gradient = torch.autograd.grad(case.lower_loss(case.x.detach(), partial(case.by_hand, y)), y)
        with torch.no_grad():
            for t, g in zip(y, gradient, strict=True):
                t.sub_(g, alpha=LR)
    return y


def loop(case: Case, steps: int) -> Tensor:
    """Unrolls by hand."""
    y = case.start()
    for _ in range(steps):
        gradient = torch.autograd.grad(case.lower_loss(case.x, partial(case.by_hand, y)), y, create_graph=True)
        y = [torch.sub(t, g, alpha=LR) for t, g in zip(y, gradient, strict=True)]
    return torch.autograd.grad(case.upper_loss(partial(case.by_hand, y)), case.x)[0]


def with_higher(case: Case, steps: int) -> Tensor:
    """Unrolls with the library `higher`."""
    sgd = torch.optim.SGD(case.model.parameters(), lr=LR)
    with higher.innerloop_ctx(case.model, sgd, copy_initial_weights=False, track_higher_grads=True) as (net, optimizer):
        for _ in range(steps):
            optimizer.step(case.lower_loss(case.x, net))
        return torch.autograd.grad(case.upper_loss(net), case.x)[0]


def neumann_by_hand(case: Case, steps: int) -> Tensor:
    """Solves the lower level and differentiates it by a Neumann series."""
    y = plain(case, steps)
    term = torch.autograd.grad(case.upper_loss(partial(case.by_hand, y)), y)
    gradient = torch.autograd.grad(case.lower_loss(case.x, partial(case.by_hand, y)), y, create_graph=True)
    total = term
    for _ in range(PRODUCTS):
        image = torch.autograd.grad(gradient, y, term, retain_graph=True)
        term = [torch.sub(t, h, alpha=LR) for t, h in zip(term, image, strict=True)]
        total = [a + t for a, t in zip(total, term, strict=True)]
    return -LR * torch.autograd.grad(gradient, case.x, total)[0]


def ours(case: Case, steps: int, algorithm: type[BilevelModule], **settings: object) -> Tensor:
    """Computes the hypergradient by one of our algorithms."""
    x, y = tree.detach(tree.of(case.task.upper)), tree.detach(tree.of(case.task.lower))
    problem, x, pull_back = bind(case.task, case.batch, x)
    module = algorithm(**{"dynamics": GradientDescent(LR), "lower_steps": steps, **settings})
    gradient = pull_back(module.bilevel_step(problem, x, y).upper_grad)["logits"]
    case.products = problem.counts["hessian_products"]
    return gradient


def truncated(case: Case, steps: int) -> Tensor:
    """Differentiates the last fifth of the lower steps."""
    return ours(case, steps, TRHG, truncation=max(1, steps // 5))


def by_class(case: Case, steps: int) -> Tensor:
    """Computes the derivatives in the weights of the classes, by forward mode."""
    images, labels, _ = case.batch["lower"]
    few = copy(case)
    few.task, few.batch = HyperCleaning(case.model, CLASSES), {**case.batch, "lower": (images, labels, labels)}
    gradient = ours(few, steps, ForwardHG)
    case.products = few.products
    return gradient


def solved(solver: LinearSolver) -> Callable:
    """Returns the row of an implicit method."""
    return partial(ours, algorithm=AID, linear_solver=solver)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: Case("MNIST linear, 5000 + 5000 images, T = 100", LinearNet(), linear, (5000, 5000), 100),
    "convnet": lambda: Case("ConvNet-4, 25 + 75 images, T = 20", ConvNet(width=32, blocks=4), convnet, (25, 75), 20),
    "mlp": lambda: Case(
        "MLP, 202735 parameters, 500 + 500 images, T = 20", MLPNet(hidden=255, activation="relu"), mlp, (500, 500), 20
    ),
}
EQUAL = [
    *((row, "loop") for row in ("higher", "RHG graph", "RHG recompute", "RHG mixed")),
    *((row, "neumann by hand") for row in ("AID Neumann, 20", "AID fixed point, 21")),
    ("Forward-HG, 10 variables", "loop, by class"),
]
BESIDE = [("RHG graph", "loop"), ("RHG graph", "higher"), ("AID Neumann, 20", "neumann by hand")]
ROWS: dict[str, Callable[[Case, int], Tensor | list[Tensor]]] = {
    "plain": plain,
    "loop": loop,
    "higher": with_higher,
    "RHG graph": partial(ours, algorithm=RHG),
    "RHG recompute": partial(ours, algorithm=RHG, memory="recompute"),
    "RHG mixed": partial(ours, algorithm=RHG, memory="mixed"),
    "T-RHG, K = T / 5": truncated,
    "Forward-HG, 10 variables": by_class,
    "FG2U, 1 direction": partial(ours, algorithm=FG2U, directions=1),
    "neumann by hand": neumann_by_hand,
    "AID Neumann, 20": solved(Neumann(PRODUCTS)),
    "AID fixed point, 21": solved(FixedPointIteration(PRODUCTS + 1, tol=0.0)),
    "AID CG, 20": solved(ConjugateGradient(PRODUCTS, tol=0.0, damping=1.0)),
    "AID normal CG, 10": solved(NormalConjugateGradient(PRODUCTS // 2, tol=0.0, damping=1.0)),
    "AID SGD, 20": solved(Stochastic(PRODUCTS, lambda v: torch.optim.SGD(v, lr=LR))),
    "AID Nystroem, 20": solved(Nystrom(PRODUCTS)),
    "DARTS": partial(ours, algorithm=DARTS),
    "SAMA": partial(ours, algorithm=SAMA, dynamics=Adam(0.01)),
    "PZOBO, 1 direction": partial(ours, algorithm=PZOBO, directions=1),
}


def check(case: Case) -> None:
    """Runs every row once, in the precision of the case, and raises if the hypergradients differ."""
    found = {row: function(case, case.steps) for row, function in ROWS.items()}
    found["loop, by class"] = torch.zeros(CLASSES).index_add(0, case.batch["lower"][1], found["loop"])
    for row, peer in EQUAL:
        difference = float((found[row] - found[peer]).norm() / found[peer].norm())
        print(f"{case.title}: relative difference of {row} and {peer}: {difference:.1e}")
        if not difference < 1e-8:
            raise RuntimeError(f"{row} and {peer} give different hypergradients.")


def seconds(clock: Callable[[], float], function: Callable[..., object], *args: object) -> float:
    """Returns the time of one call; earlier garbage is collected before."""
    gc.collect()
    start = clock()
    function(*args)
    return clock() - start


def peak(case: Case, row: Callable[[Case, int], object]) -> float:
    """Returns the peak resident memory of one run of a row above that just before it, in MiB."""

    def resident(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    row(case, 1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    row(case, case.steps)
    return resident("VmHWM") - before


def table(name: str, case: Case, rounds: int) -> Table:
    """Measures all rows of one case."""
    times = [{r: seconds(time.process_time, f, case, case.steps) for r, f in ROWS.items()} for _ in range(rounds)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    again = [sys.executable, __file__, "--measure", name]
    measured = {r: subprocess.run([*again, r], env=env, check=True, stdout=subprocess.PIPE).stdout for r in ROWS}
    beside = [f"{row} / {peer}: {median(t[row] / t[peer] for t in times):.2f}" for row, peer in BESIDE]
    result = Table("row", "seconds", "/ plain", "target", "peak MiB", "/ graph", "target", "products")
    result.title, result.caption = case.title, ", ".join(beside)
    peaks = {row: float(out.split()[0]) for row, out in measured.items()}
    for row in ROWS:
        taken, ratio = median(t[row] for t in times), median(t[row] / t["plain"] for t in times)
        time_cells = f"{taken:.3f}", f"{ratio:.2f}", TIME_TARGETS.get((name, row))
        memory_cells = f"{peaks[row]:.1f}", f"{peaks[row] / peaks['RHG graph']:.3f}", MEMORY_TARGETS.get((name, row))
        result.add_row(row, *time_cells, *memory_cells, measured[row].split()[1].decode())
    return result


class Stopwatch(Callback):
    """Times each upper iteration but the first, the ``reverse`` inside it, and a bare ``reverse`` after it."""

    def __init__(self, bare: Callable[[], object]) -> None:
        self.bare, self.times, self.start, self.inside = bare, [], None, 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Puts a clock around `bilevel_step`, which is one call of ``reverse``."""
        inner = module.bilevel_step

        def timed(*args: object) -> object:
            start = time.perf_counter()
            step = inner(*args)
            self.inside = time.perf_counter() - start
            return step

        module.bilevel_step = timed

    def on_train_batch_end(self, *args: object) -> None:
        """Notes the times; an iteration lasts from the end of the one before to its own end."""
        if self.start is not None:
            self.times.append((time.perf_counter() - self.start, self.inside, seconds(time.perf_counter, self.bare)))
        self.start = time.perf_counter()


def lightning(log_every: int, rounds: int) -> str:
    """Measures Lightning's share and returns a line that says it."""
    case = CASES["linear"]()
    watch = Stopwatch(lambda: ours(case, case.steps, RHG))
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_steps=rounds + 1, log_every_n_steps=log_every, callbacks=[watch], **off)
    module = RHG(task=case.task, dynamics=GradientDescent(LR), lower_steps=case.steps)
    trainer.fit(module, DataLoader([case.batch] * (rounds + 1), batch_size=None))
    whole = median(whole for whole, _, _ in watch.times)
    above = median((whole - bare) / whole for whole, _, bare in watch.times)
    outside = median((whole - inside) / whole for whole, inside, _ in watch.times)
    shares = f"{above:.1%} above a bare reverse, {outside:.1%} outside its own (target <= 5 %)"
    return f"Lightning, log_every_n_steps={log_every}: {whole:.3f} s an iteration, {shares}"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each row (default 7)")
    parser.add_argument("--case", choices=[*CASES, "lightning"], help="only this problem, or only Lightning's share")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.measure:
        case, row = args.measure
        made = CASES[case]()
        print(peak(made, ROWS[row]), made.products)
        return
    for name in CASES:
        if args.case in (None, name):
            torch.set_default_dtype(torch.float64)
            check(CASES[name]())
            torch.set_default_dtype(torch.float32)
            case = CASES[name]()
            for row in ROWS.values():  # not timed
                row(case, 1)
            Console(width=120).print(table(name, case, args.rounds))
    if args.case in (None, "lightning"):
        for log_every in (1, 50):
            print(lightning(log_every, args.rounds))


if __name__ == "__main__":
    main()
