"""What bfloat16 would do to hypergradients: error, time and memory of a whole upper iteration under autocast.

    python benchmarks/precision.py --root DATA [--rounds 5]     # DATA holds Omniglot

One episode of Omniglot, 5 ways, 1 shot, 15 queries (25 and 75 images for hyper-cleaning), ConvNet-4 of width 32 at its
initial weights, T = 5 lower steps (MAML: its default, 1), on the CPU and one thread. `bf16-mixed` does not do this:
docs/trust.md. Seconds are CPU seconds, medians over the rounds, in which both take turns; peak memory is measured as in
hypergradients.py, in a process of its own.
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median
from types import SimpleNamespace

import torch
from hypergradients import peak, seconds
from rich.console import Console
from rich.table import Table
from torch import nn

from bilevel_lightning import algorithms, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.datamodules import Omniglot
from bilevel_lightning.models import ConvNetBody, LinearHead
from bilevel_lightning.tasks import FewShot, HyperCleaning

STRUCTURES = {
    "head": ("RHG", "AIDCG", "F2SA", "DARTS", "MAML", "FOMAML"),
    "all": ("RHG", "MAML", "FOMAML"),
    "cleaning": ("RHG", "AIDCG", "F2SA", "GPBGD", "MEHA"),
}


def direction(name: str, structure: str, parts: dict, autocast: bool) -> torch.Tensor:
    """Returns the direction of the first upper iteration as one vector."""
    torch.manual_seed(0)
    body = ConvNetBody((1, 28, 28), width=32, norm="group" if structure == "cleaning" else "transductive")
    head = LinearHead(body.features, 5)
    if structure == "cleaning":
        task = HyperCleaning(nn.Sequential(body, head), samples=25, l2=0.01)
        batch = {"lower": (*parts["support"], torch.arange(25)), "upper": parts["query"]}
    else:
        task, batch = FewShot(body, head, adapt=structure, regularizer="ridge", regularization=0.05), parts
    module = getattr(algorithms, name)(task=task, **({} if "MAML" in name or name == "GPBGD" else {"lower_steps": 5}))
    module.configure_model()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        problem, x, pull_back = bind(task, batch, tree.detach(module.upper_parameters()), lambda values: values)
        step = module.bilevel_step(problem, x, module.start_lower(x, batch))
        return torch.cat([t.flatten().float() for t in pull_back(step.upper_grad).values()])


def data_of(structure: str, root: str) -> dict:
    """Returns an episode."""
    data = Omniglot(root=root, ways=5, shots=5 if structure == "cleaning" else 1, queries=15, episodes_per_batch=1)
    data.setup("fit")
    drawn = data.episodes["train"].batch(range(1))
    return {part: (images[0].float() / 255, labels[0]) for part, (images, labels) in drawn.items()}


def memory(*command: str) -> float:
    """Returns the peak memory of `direction` with these arguments, in MiB."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    again = [sys.executable, __file__, "--measure", *command]
    return float(subprocess.run(again, env=env, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the data")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each row (default 5)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure:
        name, structure, kind = given.measure
        parts = data_of(structure, given.root)
        print(peak(SimpleNamespace(steps=0), lambda case, steps: direction(name, structure, parts, kind == "bfloat16")))
        return
    columns = ("structure", "algorithm", "relative error %", "cosine", "float32 s", "bfloat16 /", "float32 MiB")
    table = Table(*columns, "bfloat16 /")
    for structure, names in STRUCTURES.items():
        parts = data_of(structure, given.root)
        for name in names:
            want, found = (direction(name, structure, parts, autocast) for autocast in (False, True))
            error = 100 * (found - want).norm() / want.norm()
            cells = [f"{error:.1f}", f"{torch.cosine_similarity(want, found, 0):.3f}"]
            times = [
                [seconds(time.process_time, direction, name, structure, parts, autocast) for autocast in (False, True)]
                for _ in range(given.rounds)
            ]
            cells += [f"{median(t for t, _ in times):.3f}", f"{median(u / t for t, u in times):.2f}"]
            whole, half = (memory(name, structure, kind, "--root", given.root) for kind in ("float32", "bfloat16"))
            table.add_row(structure, name, *cells, f"{whole:.1f}", f"{half / whole:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
