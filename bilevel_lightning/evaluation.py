"""Validation, test and prediction, where y persists and where it is solved for each episode."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.binding import bind, own, stack, unstack
from bilevel_lightning.distributed import agree, mean_over_processes
from bilevel_lightning.dynamics import Dynamics
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.interval import Interval
from bilevel_lightning.pickling import Picklable
from bilevel_lightning.problem import BilevelProblem, Operator
from bilevel_lightning.sharding import parts
from bilevel_lightning.state import State
from bilevel_lightning.task import Bilevel, BilevelTask
from bilevel_lightning.tree import Params


class Evaluation(Picklable, LightningModule, Bilevel):
    """What `BilevelModule` does with a batch without learning from it."""

    side_by_side = False
    """Whether `bilevel_step` treats episodes side by side as it would one after the other."""

    task: BilevelTask | None
    learnable: nn.ParameterDict
    cold_start: State | None
    statistics: nn.ModuleDict
    episodes_at_once: int | None
    samples_at_once: int | None
    evaluation_steps: int
    evaluation_dynamics: Dynamics

    @property
    def hooks(self) -> Bilevel:
        """Who states the problem: the task, or this module itself."""
        return self if self.task is None else self.task

    def upper_parameters(self) -> Params:
        """Returns x: the trainable parameters of ``upper``, and those of `added_upper`."""
        return {**tree.of(self.hooks.upper), **{name.replace(":", "."): p for name, p in self.learnable.items()}}

    def start_lower(self, x: Params, episode: Any) -> Params:
        """Returns y_0 of an episode, detached: the task's, or where there is no warm start the y of the beginning."""
        if self.cold_start is not None:
            return self.cold_start.get()
        if self.hooks.persistent_lower:
            return tree.detach(parts(self.hooks.initial_lower(own(x)), tree.of(self.hooks.lower)))
        return tree.detach(self.hooks.episode_lower(own(x), episode))

    def adapt(self, problem: BilevelProblem, x: Params, y: Params) -> Iterator[Params]:
        """Yields y_0, y_1, ... of the lower level as solved at validation and test, without graphs."""
        state = self.evaluation_dynamics.start(y)
        yield state[0]
        for t in range(self.evaluation_steps):
            state = self.evaluation_dynamics.step(problem, x, state, t)
            yield state[0]

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, stage: str) -> None:
        """Logs the task's metrics at the current y, or at the y solved for each episode where y does not persist.

        Then their means are over episodes, and ``..._ci95`` are half the widths of 95 % confidence intervals.
        """
        with self.aside(), torch.inference_mode(False), torch.enable_grad():
            batch = apply_to_collection(batch, Tensor, torch.clone)
            found = [self._evaluated(*group) for group in self._groups(self.hooks.episodes(batch))]
        for name in found[0]:
            values = torch.cat([metrics[name].reshape(-1) for metrics in found]).float()
            bar, key = name == "accuracy", f"{stage}_{name}"
            if self.hooks.persistent_lower:
                self.log(f"{stage}/{name}", values.mean(), sync_dist=True, batch_size=len(values), prog_bar=bar)
                continue
            # Metrics gather sums; Lightning's own mean rounds the number of values where processes differ in it.
            self._add(f"{stage}/{name}", f"{key}_mean", MeanMetric, values, prog_bar=bar)
            if name != "upper_loss":
                self._add(f"{stage}/{name}_ci95", key, Interval, values)

    def _add(self, name: str, key: str, kind: type[Metric], values: Tensor, prog_bar: bool = False) -> None:
        """Updates a metric of the evaluation, kept under ``key``, and logs it."""
        if key not in self.statistics:
            self.statistics[key] = kind().to(self.device)
        metric: Any = self.statistics[key]
        metric(values)
        self.log(name, metric, metric_attribute=f"statistics.{key}", prog_bar=prog_bar)

    def _evaluated(self, episode: Any, number: int | None) -> dict[str, Tensor]:
        """Returns the metrics of one episode or of a stack."""
        problem, x, path = self.solved(episode, number)
        start = y = next(path)
        for y in path:  # noqa: B007 (the last one)
            pass
        with torch.no_grad():
            found = {"upper_loss": problem.each_f(x, y), **self._metrics(problem, x, y)}
            if y is not start:
                before = self._metrics(problem, x, start, 0)
                found.update({f"{name}_before": value for name, value in before.items()})
        return found

    def _metrics(self, problem: BilevelProblem, x: Params, y: Params, *step: int) -> Params:
        found = problem.evaluate("metrics", x, y, *step)
        if not isinstance(found, dict):
            raise BilevelError(f"metrics must return a dictionary of scalars by name, got {type(found).__name__}.")
        return {name: torch.as_tensor(value, device=self.device) for name, value in found.items()}

    def solved(self, episode: Any, number: int | None = None) -> tuple[BilevelProblem, Params, Iterator[Params]]:
        """Returns the problem of an episode, its x, and its y as validation and test solve it, step by step from y_0.

        Where y persists, there is one: the current y.

        Args:
            episode: one of the task's episodes, or several by `binding.stack`.
            number: how many are stacked; None: one.
        """
        x = tree.clone(self.upper_parameters())
        problem, z, _ = self._bind(episode, x, number)
        if self.hooks.persistent_lower:
            return problem, z, iter([tree.clone(tree.of(self.hooks.lower))])
        return problem, z, self.adapt(problem, z, tree.clone(self._starts(x, episode, number)))

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if self.hooks.persistent_lower:
            return self.hooks.predict(batch)
        with self.aside(), torch.inference_mode(False), torch.enable_grad():
            batch = apply_to_collection(batch, Tensor, torch.clone)
            found = []
            for i, episode in enumerate(self.hooks.episodes(batch)):
                problem, x, path = self.solved(episode)
                *_, y = path
                with torch.no_grad():
                    columns = problem.evaluate("predict", x, y)
                number = torch.full_like(next(iter(columns.values())), i, dtype=torch.long)
                found.append({"batch": torch.full_like(number, batch_idx), "episode": number, **columns})
        return {name: torch.cat([columns[name] for columns in found]) for name in found[0]}

    def _groups(self, episodes: Sequence[Any]) -> list[tuple[Any, int | None]]:
        """Returns what is solved at once: single episodes with None, or stacks of several with their number."""
        size = self.episodes_at_once
        if size is None:
            size = len(episodes) if self.side_by_side and self.device.type != "cpu" else 1
        if size == 1 or len(episodes) == 1:
            return [(episode, None) for episode in episodes]
        return [(stack(part), len(part)) for part in (episodes[i : i + size] for i in range(0, len(episodes), size))]

    def _starts(self, x: Params, episode: Any, number: int | None) -> Params:
        """Returns y_0 of an episode, or of several side by side."""
        if number is None or type(self.hooks).episode_lower is Bilevel.episode_lower:
            return tree.repeat(self.start_lower(x, episode), number)
        starts: Params = stack([self.start_lower(x, one) for one in unstack(episode, number)])
        return starts

    def _bind(self, episode: Any, x: Params, number: int | None = None) -> tuple[BilevelProblem, Params, Operator]:
        return bind(self.hooks, episode, x, mean_over_processes, agree, number, self.samples_at_once)

    def aside(self) -> Any:
        """A context for what must not change the random numbers of training."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])
