"""The two orders of a product with many samples: ``z W^T`` and ``(W z^T)^T``, and when the second is the quick one.

    python benchmarks/order.py [--rounds 25]

Milliseconds of CPU time, medians over the rounds, in which both take turns, on one thread and in single precision. The
second one includes the copy that gives the result rows in memory again.
"""

import argparse
from statistics import median
from time import process_time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

SHAPES = [(5000, 784, outputs) for outputs in (2, 4, 8, 10, 12, 16, 20, 32, 64)]
SHAPES += [(samples, inputs, 10) for samples in (500, 2000, 20_000) for inputs in (64, 256, 784, 3072)]


def straight(z: Tensor, w: Tensor) -> float:
    """Returns the milliseconds of ``z W^T``."""
    start = process_time()
    z @ w.T
    return 1e3 * (process_time() - start)


def turned(z: Tensor, w: Tensor) -> float:
    """Returns those of ``(W z^T)^T``."""
    start = process_time()
    (w @ z.T).T.contiguous()
    return 1e3 * (process_time() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help="timed runs (default 25)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    table = Table("samples", "inputs", "outputs", "z W^T", "(W z^T)^T", "ratio")
    for samples, inputs, outputs in SHAPES:
        z, w = torch.rand(samples, inputs), torch.randn(outputs, inputs)
        times = [(straight(z, w), turned(z, w)) for _ in range(rounds + 1)][1:]
        one, other = (median(t[i] for t in times) for i in (0, 1))
        ratio = median(b / a for a, b in times)
        table.add_row(*map(str, (samples, inputs, outputs)), f"{one:.3f}", f"{other:.3f}", f"{ratio:.2f}")
    Console().print(table)
