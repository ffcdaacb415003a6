"""The trainer's own time: MEHA on the lasso problem with 1, 10 and 100 upper iterations a batch, beside plain code.

    python benchmarks/trainer.py [--n 1000] [--iterations 2000] [--rounds 5]

The plain loop is the same algorithm written with its derivatives by hand, without autograd and without a task: what no
general library can reach. Milliseconds an upper iteration are CPU time on one thread, medians over rounds in which all
take turns; a run of few iterations, for what starting costs, is subtracted.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from pytorch_lightning import Trainer

from bilevel_lightning import MEHA, GradientDescent
from bilevel_lightning.datamodules import NoData
from bilevel_lightning.module import Step
from bilevel_lightning.schedules import Power
from bilevel_lightning.tasks import Lasso


class Timed(MEHA):
    """MEHA with a clock around what the algorithm does."""

    spent = 0.0

    def bilevel_step(self, *args: Any) -> Step:
        """Notes its own time and that of the step of y."""

        def timed(function: Callable[..., Any], *args: Any) -> Any:
            start = time.process_time()
            result = function(*args)
            Timed.spent += time.process_time() - start
            return result

        step = timed(super().bilevel_step, *args)
        return step._replace(lower=partial(timed, step.lower))


def ours(n: int, upper_iterations: int) -> Callable[[int], torch.Tensor]:
    """Returns a function that runs some upper iterations and returns x."""

    def run(iterations: int) -> torch.Tensor:
        task = Lasso(n=n)
        task.callbacks = list  # type: ignore[method-assign]  # no reports
        module = Timed(
            task=task,
            gamma=2.0,
            c=Power(5.0 * n, 0.25),
            lower_lr=0.5,
            dynamics=GradientDescent(0.5),
            upper_optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
            upper_iterations=upper_iterations,
        )
        trainer = Trainer(
            accelerator="cpu", max_steps=iterations, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=0, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, NoData(iterations=iterations))
        return task.upper["x"].detach()[0]

    return run


def by_hand(n: int) -> Callable[[int], torch.Tensor]:
    """Returns the same algorithm without autograd."""
    v = torch.full((n,), 1.0 / n)
    v[n // 2 :] *= -1

    def soft(point: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        return point.sign() * (point.abs() - threshold).clamp(min=0)

    def run(iterations: int) -> torch.Tensor:
        x, y, theta = torch.ones(n), torch.ones(n), torch.ones(n)
        for k in range(iterations):
            weight = 1 / (5 * n * (k + 1) ** 0.25)
            theta = soft(theta - 0.5 * (theta - v + (theta - y) / 2), 0.5 * x)
            x = (x - (y.abs() - theta.abs())).clamp(0, 1)
            y = soft(y - 0.5 * (weight + y - v - (y - theta) / 2), 0.5 * x)
        return x

    return run


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runs = {f"upper_iterations={r}": ours(args.n, r) for r in (1, 10, 100)} | {"by hand": by_hand(args.n)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    ends = {}
    for _ in range(args.rounds):
        for name, run in runs.items():
            spent = []
            for iterations in (100, args.iterations):
                start, Timed.spent = time.process_time(), 0.0
                ends[name] = run(iterations)
                spent.append((time.process_time() - start, Timed.spent))
            each = [1000 * (b - a) / (args.iterations - 100) for a, b in zip(*spent, strict=True)]
            times[name].append((each[0], each[1]))
    for name in runs:
        torch.testing.assert_close(ends[name], ends["by hand"], rtol=1e-4, atol=1e-6)
        whole, algorithm = (median(column) for column in zip(*times[name], strict=True))
        part = f", of which the algorithm {algorithm:.3f}" if algorithm else ""
        print(f"{name:24s} {whole:8.3f} ms an upper iteration{part}")


if __name__ == "__main__":
    main()
