"""Training that ends before the minimum: many steps of gradient descent, the gradient flow of the same time, L-BFGS.

    python benchmarks/flow.py [--root DIR]

The linear model of the poisoning experiment on its 45,000 clean training images of MNIST (``BILEVEL_DATA_DIR``), from
zero: 1000 steps with step size 0.1 and momentum 0.5, as published, are a time of 200. `GradientFlow` follows it with
several tolerances; L-BFGS goes to the minimum. Distances are relative to the end of gradient descent; seconds are CPU
seconds on one thread.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from time import process_time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bilevel_lightning.datamodules import MNISTPoisoning
from bilevel_lightning.flow import GradientFlow
from bilevel_lightning.models import LinearNet
from bilevel_lightning.tasks import Poisoning

LBFGS = partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", tolerance_grad=1e-6, tolerance_change=0.0)
TRAININGS: dict[str, tuple[Callable[..., torch.optim.Optimizer], int]] = {
    "gradient descent, 1000 steps": (partial(torch.optim.SGD, lr=0.1, momentum=0.5), 1000),
    **{
        f"GradientFlow, tol {tol}": (partial(GradientFlow, lr=200.0, tol=tol), 1)
        for tol in (0.3, 0.1, 0.03, 0.01, 0.001)
    },
    "L-BFGS, 60 iterations": (LBFGS, 3),
}


def train(data: MNISTPoisoning, make: Callable[..., torch.optim.Optimizer], steps: int) -> tuple[Tensor, list[str]]:
    """Returns the trained weights, and the cells of a row: gradients, seconds, loss and accuracies."""
    images, labels, _ = data.train
    task = Poisoning(LinearNet((1, 28, 28), bias=False, init="zero"))
    optimizer, losses = make(task.lower.parameters()), []

    def closure() -> float:
        optimizer.zero_grad()
        loss = task.training_loss(task.lower, images, labels)
        loss.backward()
        losses.append(float(loss.detach()))
        return losses[-1]

    start = process_time()
    for _ in range(steps):
        optimizer.step(closure)
    seconds = process_time() - start
    with torch.no_grad():
        loss = float(task.training_loss(task.lower, images, labels))
        parts = ((images, labels), data.val, data.test)
        found = [float((task.lower(x).argmax(1) == y).double().mean()) for x, y in parts]
    weights = torch.cat([p.detach().flatten() for p in task.lower.parameters()])
    return weights, [str(len(losses)), f"{seconds:.1f}", f"{loss:.4f}", *(f"{100 * value:.2f}" for value in found)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=os.environ.get("BILEVEL_DATA_DIR"), help="folder of the data")
    torch.set_num_threads(1)
    data = MNISTPoisoning(parser.parse_args().root, seed=1)
    data.prepare_data()
    data.setup()
    table = Table("training", "gradients", "seconds", "loss", "train %", "validation %", "test %", "distance")
    reference = None
    for name, (make, steps) in TRAININGS.items():
        weights, cells = train(data, make, steps)
        reference = weights if reference is None else reference
        table.add_row(name, *cells, f"{float((weights - reference).norm() / reference.norm()):.4f}")
    Console(width=120).print(table)
