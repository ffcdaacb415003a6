"""What bfloat16 would do to hypergradients: the relative error of a whole upper iteration under autocast.

    python benchmarks/precision.py --root DATA     # DATA holds Omniglot

One episode of Omniglot, 5 ways, 1 shot, 15 queries (25 and 75 images for hyper-cleaning), ConvNet-4 of width 32 at its
initial weights, T = 5 lower steps (MAML: its default, 1), on the CPU. `bf16-mixed` does not do this: docs/trust.md.
"""

import argparse

import torch
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


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the data")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("structure", "algorithm", "relative error %", "cosine")
    for structure, names in STRUCTURES.items():
        shots = 5 if structure == "cleaning" else 1
        data = Omniglot(root=given.root, ways=5, shots=shots, queries=15, episodes_per_batch=1)
        data.setup("fit")
        drawn = data.episodes["train"].batch(range(1))
        parts = {part: (images[0].float() / 255, labels[0]) for part, (images, labels) in drawn.items()}
        for name in names:
            want, found = (direction(name, structure, parts, autocast) for autocast in (False, True))
            error = 100 * (found - want).norm() / want.norm()
            table.add_row(structure, name, f"{error:.1f}", f"{torch.cosine_similarity(want, found, 0):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
