"""What the processes of the distributed tests run."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from episodic import body, head, images
from problems import Nonlinear

from bilevel_lightning import ANIL, MAML, Momentum, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.cli import fit
from bilevel_lightning.distributed import agree, mean_over_processes
from bilevel_lightning.hypergradients import random_forward, reverse
from bilevel_lightning.tasks import FewShot


class Rows(Nonlinear):
    """The problem on the rows that a batch names; means over equal parts average to the mean over all."""

    def upper_loss(self, rows):
        return self.residual(0.05 * self.upper.shift)[rows].square().mean() + 0.01 * self.upper.log_ridge.square().sum()

    def lower_loss(self, rows):
        ridge = (self.upper.log_ridge.exp() * self.lower.w.square()).sum()
        return self.residual(0.1 * self.upper.shift)[rows].square().mean() + 0.1 * ridge


def hypergradients(rows):
    """The hypergradient and y_T in both memory modes, a product with the Hessian and one with the cross derivative."""
    task, dynamics = Rows(), Momentum(0.2, 0.7)
    x, y = tree.detach(tree.of(task.upper)), tree.detach(tree.of(task.lower))
    problem, _, _ = bind(task, rows, x, mean_over_processes, agree)
    out = []
    for memory in ("graph", "recompute"):
        gradient, y_end = reverse(problem, dynamics, x, y, 12, truncation=9, memory=memory)
        out += [mean_over_processes(gradient), y_end]
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # all take the first process's directions
    gradient, y_end = random_forward(problem, dynamics, x, y, 4, 3)
    out += [mean_over_processes(gradient), y_end]
    out += [product(y) for product in problem.map_products(dynamics.contraction, x, y)]
    g_yy, g_xy = problem.hessian_products(x, y)
    value, *gradients = problem.values_and_gradients(x, y)
    out += [{"value": value}, *gradients, {"value": problem.value(x, y)}, *problem.stationarity_gradients(x, y)]
    out += [problem.blend(0.3, 0.7, center=tree.zeros_like(y), weight=0.2).grad_g(x, y), problem.grad_f_x(x, y)]
    return [*out, g_yy(y), g_xy(y), *problem.grad_f(x, y)]


def running_statistics(first, last):
    """Buffers of few-shot networks after three iterations, in each with the episodes ``first`` to ``last`` of six."""
    out = []
    for algorithm, norm, adapt in ((MAML, "frozen", "all"), (ANIL, "frozen", "head"), (MAML, "per_step", "all")):
        part = body(norm, steps=2)
        module = algorithm(task=FewShot(part, head(part.features), adapt=adapt), lower_steps=2)
        module.configure_model()
        for k in range(3):
            module._advance_statistics(module.task.episodes(images(6, k))[first:last])
        out.append(dict(module.task.named_buffers()))
    return out


def worker(rank: int, folder: str) -> None:
    """One of two processes, with half of the twelve rows and of the six episodes."""
    torch.set_num_threads(1)
    group = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": 2, "timeout": timedelta(minutes=2)}
    dist.init_process_group("gloo", **group)
    try:
        torch.save(hypergradients(torch.arange(12)[rank::2]), Path(folder) / f"{rank}.pt")
        torch.save(running_statistics(3 * rank, 3 * rank + 3), Path(folder) / f"statistics{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":  # several command lines one after the other; Lightning starts the second process with it
    for args in json.loads(sys.argv[1]):
        fit(args)
