"""How far an upper level with constraints is from being stationary."""

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.binding import bind, own, size, split
from bilevel_lightning.distributed import mean_over_processes
from bilevel_lightning.hypergradients import implicit
from bilevel_lightning.linear_solvers import LinearSolver, Neumann
from bilevel_lightning.tree import Params


class UpperStationarity(Callback):
    r"""Logs, at validation, squared norms that vanish where x is stationary, with the implicit hypergradient dF.

    ``val/hg_norm`` is ``|dF|^2``, and ``val/prox_map_norm`` is ``|x - P(x - dF)|^2`` with `Bilevel.project_upper` P,
    the measure of a constrained upper level. dF is the mean over all validation samples, y solved as there.

    Args:
        linear_solver: of dF. Default the Neumann series with 20 products, as in the paper's code.

    References:
        R. Grazzi, M. Pontil, S. Salzo. Bilevel Optimization with a Lower-level Contraction: Optimal Sample Complexity
        without Warm-Start. JMLR 2023.
    """

    def __init__(self, linear_solver: LinearSolver | None = None) -> None:
        self.linear_solver = linear_solver or Neumann(20)
        self.found: list[tuple[Params, int]] = []

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found = []

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        module: Any = pl_module
        with module.aside(), torch.inference_mode(False), torch.enable_grad():
            for episode in module.hooks.episodes(apply_to_collection(batch, Tensor, torch.clone)):
                _, _, path = module.solved(episode)
                *_, y = path
                problem, z, pull_back = bind(module.hooks, episode, tree.clone(module.upper_parameters()))
                gradient, _ = implicit(problem, module.evaluation_dynamics, z, tree.clone(y), self.linear_solver)
                self.found.append((pull_back(gradient), size(split(episode)[1])))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        gradients, samples = zip(*self.found, strict=True)
        with torch.inference_mode(False), torch.no_grad():
            gradient = own(mean_over_processes(tree.mean(gradients, samples), sum(samples)))
            x = own(tree.clone(module.upper_parameters()))
            moved = module.hooks.project_upper(tree.axpy(-1.0, gradient, x))
            squares = {"hg_norm": tree.norm(gradient) ** 2, "prox_map_norm": tree.norm(tree.axpy(-1.0, moved, x)) ** 2}
        module.log_dict({f"val/{name}": value.float() for name, value in squares.items()})
        self.found = []
