"""What compiling a whole hypergradient gains: eager and compiled RHG in the same run, on one thread.

    python benchmarks/compiled.py

Hyper-cleaning with a linear model on random images (only sizes matter). Seconds are CPU seconds, medians over 9 calls;
compiling is on the clock and happens once for a set of shapes.
"""

import time
import warnings
from collections.abc import Callable
from statistics import median

import torch

from bilevel_lightning import RHG, GradientDescent, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.compiled import Compiled
from bilevel_lightning.models import LinearNet
from bilevel_lightning.tasks.hyper_cleaning import HyperCleaning


def seconds(function: Callable[[], object]) -> float:
    """Returns the median CPU time of a call."""
    times = []
    for _ in range(9):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return median(times)


def measure(samples: int, shape: tuple[int, int, int], steps: int) -> None:
    """Prints one line."""
    task = HyperCleaning(LinearNet(shape), samples)
    images, labels = torch.rand(samples, *shape), torch.randint(10, (samples,))
    batch = {"lower": (images, labels, torch.arange(samples)), "upper": (images.flip(0), labels.flip(0))}
    module = RHG(dynamics=GradientDescent(0.1), lower_steps=steps)

    def iterate(x: tree.Params, y: tree.Params, batch: object) -> tuple:
        problem, z, _ = bind(task, batch, x)
        step = module.bilevel_step(problem, z, y)
        return (step.upper_grad, step.lower), problem.counts

    x, y, compiled = tree.detach(tree.of(task.upper)), tree.detach(tree.of(task.lower)), Compiled(iterate)
    start = time.perf_counter()
    found = compiled(x, y, batch)[0][0]["logits"]
    taken = time.perf_counter() - start
    expected = iterate(x, y, batch)[0][0]["logits"]
    eager, fast = seconds(lambda: iterate(x, y, batch)), seconds(lambda: compiled(x, y, batch))
    error = float((found - expected).norm() / expected.norm())
    print(
        f"{samples} images of {shape}, T = {steps}: eager {1e3 * eager:.1f} ms, compiled {1e3 * fast:.1f} ms, "
        f"ratio {fast / eager:.2f}, compiling {taken:.0f} s, relative difference {error:.0e}"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure(600, (1, 8, 8), 5)
    measure(600, (1, 8, 8), 20)
    measure(5000, (1, 28, 28), 5)
