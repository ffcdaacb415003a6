"""The two orders of a product with many samples: ``z W^T`` and ``(W z^T)^T``, and when the second is the quick one.

    python benchmarks/order.py [--rounds 25]

Milliseconds of CPU time, medians over the rounds, in which both take turns, on one thread and in single precision. The
second one includes the copy that gives the result rows in memory again.
"""

import argparse
import time
from statistics import median

import torch
from hypergradients import seconds
from rich.console import Console
from rich.table import Table

SHAPES = [(5000, 784, outputs) for outputs in (2, 4, 8, 10, 12, 16, 20, 32, 64)]
SHAPES += [(samples, inputs, 10) for samples in (500, 2000, 20_000) for inputs in (64, 256, 784, 3072)]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help="timed runs (default 25)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    table = Table("samples", "inputs", "outputs", "z W^T", "(W z^T)^T", "ratio")
    for samples, inputs, outputs in SHAPES:
        z, w = torch.rand(samples, inputs), torch.randn(outputs, inputs)
        ways = (lambda z=z, w=w: z @ w.T, lambda z=z, w=w: (w @ z.T).T.contiguous())
        times = [[1e3 * seconds(time.process_time, way) for way in ways] for _ in range(rounds)]
        straight, turned = (median(t[i] for t in times) for i in (0, 1))
        ratio = median(b / a for a, b in times)
        table.add_row(*map(str, (samples, inputs, outputs)), f"{straight:.3f}", f"{turned:.3f}", f"{ratio:.2f}")
    Console().print(table)
