"""When to end training: by the iterates alone, since solutions are not known outside experiments."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.schedules import at
from bilevel_lightning.sharding import whole
from bilevel_lightning.tree import Params

Measure = Literal["mapping", "relative"]


class Iterate(NamedTuple):
    """What an upper iteration starts from: x, and y where it counts, each with the step size of the iteration."""

    variables: list[Params]
    rates: list[float]


class ResidualStopping(Callback):
    r"""Ends training when an upper iteration hardly moves x and y any more.

    The iteration from (x_{k-1}, y_{k-1}) to (x_k, y_k) has the residual

    * ``mapping``: ``|((x_{k-1} - x_k) / a, (y_{k-1} - y_k) / b)|``, where a is the step size of ``upper_optimizer`` and
      b that of ``lower_lr``. Where x moves by plain SGD it is the norm of the projected gradient mapping, zero at
      stationary points only, and the stopping rule of V-PBGD's released code (Shen and Chen, "On Penalty-based Bilevel
      Gradient Descent Method", ICML 2023). With momentum, Adam or ``upper_clip_norm`` it measures a movement, not a
      gradient. Without a ``lower_lr`` (algorithms that solve the lower level by ``dynamics``) only x counts.
    * ``relative``: ``|x_{k-1} - x_k| / |x_k|``, which small step sizes make small anywhere.

    Norms are Euclidean. A task whose variables hold many starts, each of shape ``(starts, ...)`` with the task's
    attribute ``starts``, has one residual for each: training ends when every start has met the rule once, and all move
    on until then. Logged: ``train/residual_mapping`` or ``train/residual_relative``, the largest over the starts, and
    ``train/unfinished_starts``. The state lies in checkpoints; a run resumed after its end stays ended.

    With ``upper_iterations`` above 1 a hit inside a batch is seen just before the next step, which is still taken.

    Args:
        tol: largest residual of a solution. Default 1e-5, V-PBGD's.
        measure: ``mapping`` (default) or ``relative``.
        patience: number of upper iterations in a row with a residual of at most ``tol``. Default 1.

    Attributes:
        steps: the upper iteration k at which each start met the rule, or -1; integers of shape ``(starts,)``.

    Raises:
        BilevelError: if a setting is impossible, or a variable has not the shape ``(starts, ...)``.
    """

    def __init__(self, tol: float = 1e-5, measure: Measure = "mapping", patience: int = 1) -> None:
        self.tol, self.measure, self.patience = positive("ResidualStopping.tol", tol), measure, patience
        if measure not in get_args(Measure):
            raise BilevelError(f"ResidualStopping.measure must be mapping or relative, got {measure}.")
        if patience < 1:
            raise BilevelError(f"ResidualStopping.patience must be at least 1, got {patience}.")
        self.steps = torch.full((1,), -1)
        self.hits = torch.zeros(1, dtype=torch.long)
        self.last: Iterate | None = None
        self.residual = float("nan")

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(tol=self.tol, measure=self.measure, patience=self.patience)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "hits": self.hits}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.hits = state_dict["steps"], state_dict["hits"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            starts = getattr(pl_module.hooks, "starts", 1)
            self.steps, self.hits, self.last = torch.full((starts,), -1), torch.zeros(starts, dtype=torch.long), None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        starts = len(self.steps)
        for variables in self._variables(pl_module) if starts > 1 else []:
            for name, value in variables.items():
                if value.shape[:1] != (starts,):
                    raise BilevelError(
                        f"The task has {starts} starts, but {name} the shape {tuple(value.shape)}: ResidualStopping "
                        f"needs ({starts}, ...). Leave it off, or the task's attribute starts."
                    )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop |= self.finished

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._test(trainer, pl_module)
        variables = [tree.clone(part) for part in self._variables(pl_module)]
        rates = [float(optimizer.param_groups[0]["lr"])]
        if len(variables) == 2:
            rates.append(at(pl_module.lower_lr, trainer.global_step))  # type: ignore[arg-type]
        self.last = Iterate(variables, rates)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._test(trainer, pl_module)
        if trainer.log_every_n_steps:  # type: ignore[attr-defined]
            logs = {f"train/residual_{self.measure}": self.residual}
            if len(self.steps) > 1:
                logs["train/unfinished_starts"] = float((self.steps < 0).sum())
            pl_module.log_dict(logs, batch_size=1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        n, left = len(self.steps), int((self.steps < 0).sum())
        if left == 0:
            whose = "" if n == 1 else f"each of {n} starts, the last one "
            rank_zero_info(
                f"ResidualStopping: {whose}at upper iteration {int(self.steps.max())} the {self.measure} residual was "
                f"at most {self.tol:g}."
            )
        else:
            whose = "" if n == 1 else f" by {left} of {n} starts"
            rank_zero_info(
                f"ResidualStopping: tolerance {self.tol:g} not reached{whose} in {trainer.global_step} upper "
                f"iterations; {self.measure} residual {self.residual:.3g}."
            )

    @property
    def finished(self) -> bool:
        """Whether every start has met the rule."""
        return bool((self.steps >= 0).all())

    def _variables(self, module: Any) -> list[Params]:
        """Returns x, and y where it counts."""
        both = self.measure == "mapping" and hasattr(module, "lower_lr")
        return [module.upper_parameters(), whole(tree.of(module.hooks.lower))] if both else [module.upper_parameters()]

    @torch.no_grad()
    def _test(self, trainer: Trainer, module: LightningModule) -> None:
        """Tests the iteration from `last` to the present variables, once."""
        if self.last is None:
            return
        now = self._variables(module)
        moves = [self._norms(tree.axpy(-1.0, old, new)) for old, new in zip(self.last.variables, now, strict=True)]
        if self.measure == "mapping":
            rates = zip(moves, self.last.rates, strict=True)
            residual = torch.linalg.vector_norm(torch.stack([move / rate for move, rate in rates]), dim=0)
        else:
            residual = torch.where(moves[0] == 0, moves[0], moves[0] / self._norms(now[0]))
        self.last, self.residual = None, float(residual.max())
        self.hits = torch.where(residual.cpu() <= self.tol, self.hits + 1, 0)
        self.steps = torch.where((self.steps < 0) & (self.hits >= self.patience), trainer.global_step, self.steps)
        trainer.should_stop |= self.finished

    def _norms(self, values: Params) -> Tensor:
        """Returns the Euclidean norm of each start's part, of shape ``(starts,)``."""
        parts = [torch.linalg.vector_norm(t.reshape(len(self.steps), -1), dim=1) for t in values.values()]
        norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return norms
