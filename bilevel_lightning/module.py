"""The one training loop of all algorithms."""

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import Callback
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.core.mixins.hparams_mixin import _given_hyperparameters
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from bilevel_lightning import randomness, tree
from bilevel_lightning.binding import Functional, rows, running_norms, split, unstack
from bilevel_lightning.checkpoints import AtomicCheckpointIO
from bilevel_lightning.checks import (
    check_automatic,
    check_batch,
    check_levels,
    check_losses,
    check_settings,
    check_task,
    check_trainer,
    diagnose,
    plain,
    watched,
)
from bilevel_lightning.compiled import Compiled
from bilevel_lightning.distributed import (
    gather,
    mean_over_processes,
    merge_statistics,
    statistics,
    total_over_processes,
)
from bilevel_lightning.dynamics import Dynamics, GradientDescent
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.evaluation import Evaluation
from bilevel_lightning.flow import GradientFlow
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Schedule
from bilevel_lightning.sharding import whole
from bilevel_lightning.state import Row, State
from bilevel_lightning.task import Bilevel, BilevelTask, Draws, Minibatches
from bilevel_lightning.tree import Params

ORACLES = (
    "upper_gradients",
    "lower_gradients",
    "upper_values",
    "lower_values",
    "hessian_products",
    "cross_products",
    "fixed_point_maps",
    "samples",
)
EXPLODED = 1e8  # growth of a norm over the run that counts as divergence


class Step(NamedTuple):
    """What an algorithm returns for one upper iteration.

    Attributes:
        upper_grad: the direction for x, an estimate of the hypergradient.
        lower: the new y; or, for a method whose y follows the new x, what gives it from the problem and that x.
        logs: scalars to log, such as ``train/residual``; or one value for each episode side by side.
        state: new values of what the algorithm keeps (`BilevelModule.initial_state`).
    """

    upper_grad: Params
    lower: Params | Callable[[BilevelProblem, Params], Params]
    logs: Mapping[str, Tensor] = MappingProxyType({})
    state: Mapping[str, Params | Row] = MappingProxyType({})


class BilevelModule(Evaluation, ABC):
    r"""Base of all algorithms; a subclass implements `bilevel_step` and its own settings, nothing else.

    State the problem either with ``task=`` or by defining the members of `Bilevel` on a subclass of an algorithm. One
    batch ``{"lower": ..., "upper": ...}`` is one upper iteration, or ``upper_iterations`` of them, and only upper
    iterations advance ``global_step``. Logged at every ``log_every_n_steps`` batches: ``train/upper_loss``
    f(x_k, y_{k+1}), ``train/lower_loss`` g(x_k, y_{k+1}), ``train/stationarity`` ``|g_y(x_k, y_{k+1})|``,
    ``train/hypergradient_norm``, and the oracles evaluated so far: gradients, products, lower values alone, and the
    samples that all of them touched.

    A run whose direction or y grows beyond 1e8 times its first norm, or is NaN, ends with a message that names the step
    size to lower, before x or y takes the value.

    With ``bf16-mixed``, upper iterations are computed in float32; validation, test and prediction in bfloat16. A loss
    that is to be cheaper than it is exact opens `torch.autocast` itself, around the part in question.

    Losses may contain dropout and batch normalisation. Running statistics are not changed by the many evaluations of
    an iteration; they advance once, on the lower batch at (x_{k+1}, y_{k+1}).

    Args:
        task: the bilevel problem; None if the subclass states it.
        upper_optimizer: optimizer of x: any of torch's that needs no closure. Default Adam with step size 0.01.
        upper_scheduler: its step-size schedule, stepped once per upper iteration: any of torch's, or one of
            `bilevel_lightning.schedules`, whose values multiply the step size. Default none.
        upper_clip_norm: bound on the Euclidean norm of the hypergradient. Default none.
        upper_clip_value: bound on each entry's absolute value, applied before that on the norm. Default none.
        accumulate: number n of batches whose hypergradients are averaged before x steps once, for more episodes than
            memory holds. A persistent y moves with each batch. What was gathered survives validations and epochs and
            lies in the checkpoint; what the end of a run leaves of a window is not used. Default 1.
        dynamics: one step of the lower level. Default gradient descent with step size 0.1.
        lower_steps: number T of lower steps in one upper iteration. Default 20.
        warm_start: start the lower level at the last iteration's y (True, default) or at the y of the beginning.
        upper_iterations: number of upper iterations on each batch. More than one saves the trainer's own time, about
            a millisecond a batch, where an iteration takes less (docs/benchmarks.md); logs and validations count
            batches, `max_steps` and schedules upper iterations. For tasks whose batch is all their data. Default 1.
        episodes_at_once: how many episodes of a batch are solved side by side (`torch.func.vmap`): equal results, other
            time and memory (docs/few_shot.md); for algorithms that treat them independently. Default: one after the
            other on a CPU, all on other devices.
        samples_at_once: how many samples of a minibatch a loss gets at once, at either level. The gradient of a larger
            minibatch is the mean of those of its parts, computed one after the other in the memory of one part, where
            its loss is a mean over samples: tensors whose length is that of the first are cut, others are not. For
            algorithms without second derivatives, and one y that persists. Default: all.
        evaluation_steps: lower steps at validation and test, where y is solved for each episode. Default lower_steps.
        evaluation_dynamics: one lower step there, without its share of the upper loss if it has one. Default
            ``dynamics``.
        compile: record the whole hypergradient, derivatives included, at the first batch and run it compiled; for
            batches of equal shapes, one process, losses without random numbers, and algorithms that do not branch on
            values. It can be several times faster for small problems, after minutes of compiling that grow with
            lower_steps (docs/benchmarks.md). Default False.

    Raises:
        BilevelError: if a setting is impossible, or the losses do not fit it; the message names the remedy.
    """

    least_lower_steps = 1
    compilable = False
    divisible = False
    """Whether y may be divided among processes (`sharding`), since no second derivatives are taken."""
    partitioned = False
    """Whether minibatches must be parts of a fixed partition of the samples, each part being remembered."""
    lower_loop = True
    """Whether there is one, of ``lower_steps``: what to raise where the lower level is not solved."""
    estimates_hypergradient = True
    """Whether one `bilevel_step` at a fixed x gives it; not where y or a twin is solved across iterations."""

    upper_rates, lower_rates = "upper_optimizer.lr or dynamics.lr", "dynamics.lr"
    """Names of the step sizes to lower where x's direction, or y, diverges."""

    def __init__(
        self,
        task: BilevelTask | None = None,
        upper_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=0.01),
        upper_scheduler: Schedule | LRSchedulerCallable | None = None,
        upper_clip_norm: float | None = None,
        upper_clip_value: float | None = None,
        accumulate: int = 1,
        dynamics: Dynamics = GradientDescent(lr=0.1),  # noqa: B008 (a value: it has no state)
        lower_steps: int = 20,
        warm_start: bool = True,
        upper_iterations: int = 1,
        episodes_at_once: int | None = None,
        samples_at_once: int | None = None,
        evaluation_steps: int | None = None,
        evaluation_dynamics: Dynamics | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # From Python, objects are the caller's to give again; from the command line their configs are stored.
        objects = ["task", "dynamics", "evaluation_dynamics", "upper_optimizer", "upper_scheduler"]
        self.save_hyperparameters(ignore=[] if _given_hyperparameters.get() else objects)
        for name in [k for k, v in self.hparams.items() if not plain(v)]:
            del self.hparams[name]
        self.task = task
        self.upper_optimizer, self.upper_scheduler = upper_optimizer, upper_scheduler
        for name, bound in (("upper_clip_norm", upper_clip_norm), ("upper_clip_value", upper_clip_value)):
            if bound is not None:
                positive(name, bound)
        check_settings(task, dynamics, evaluation_dynamics, upper_optimizer, lower_steps)
        if lower_steps < self.least_lower_steps:
            raise BilevelError(f"lower_steps must be at least {self.least_lower_steps}, got {lower_steps}.")
        self.upper_clip_norm, self.upper_clip_value = upper_clip_norm, upper_clip_value
        self.accumulate = int(positive("accumulate", accumulate))
        if self.accumulate > 1 and upper_iterations > 1:
            raise BilevelError(
                "accumulate gathers several batches for one upper iteration, upper_iterations takes several on one "
                "batch: leave one of them out."
            )
        self._gathered: tuple[int, Params] = (0, {})  # batches since x stepped, and their hypergradients' sum
        self.dynamics, self.lower_steps, self.warm_start = dynamics, lower_steps, warm_start
        self.upper_iterations = int(positive("upper_iterations", upper_iterations))
        several = episodes_at_once is not None and int(positive("episodes_at_once", episodes_at_once)) > 1
        if several and not self.side_by_side:
            raise BilevelError(f"{type(self).__name__} solves one episode after the other: leave episodes_at_once out.")
        self.episodes_at_once = episodes_at_once
        self.samples_at_once = samples_at_once
        if samples_at_once is not None:
            self.samples_at_once = int(positive("samples_at_once", samples_at_once))
        self.evaluation_steps = lower_steps if evaluation_steps is None else evaluation_steps
        if self.evaluation_steps < 0:
            raise BilevelError(f"evaluation_steps must not be negative, got {evaluation_steps}.")
        self.evaluation_dynamics = (evaluation_dynamics or dynamics).adaptation()
        episodic = {
            "episodes_at_once": episodes_at_once,
            "evaluation_steps": evaluation_steps,
            "evaluation_dynamics": evaluation_dynamics,
        }
        self.episodic = [name for name, value in episodic.items() if value is not None]
        self.learnable = nn.ParameterDict()
        self.cold_start: State | None = None
        self.states = nn.ModuleDict()
        self._rows: Tensor | None = None  # of the states, that the episodes at hand have
        if compile and not self.compilable:
            raise BilevelError(
                f"compile does not apply to {type(self).__name__}, which branches on values: leave it off, or use RHG."
            )
        self.compiled = Compiled(self._recorded) if compile else None
        self.scale: dict[str, float] = {}
        self.statistics = nn.ModuleDict()  # of evaluations
        self._random_state: dict[str, Any] | None = None  # of the checkpoint, until the resumed epoch has begun
        self._checked: bool | None = None  # None: not configured; False: losses not looked at yet
        self.register_buffer("oracles", torch.zeros(len(ORACLES), dtype=torch.long))
        self.oracles: Tensor

    @abstractmethod
    def bilevel_step(self, problem: BilevelProblem, x: Params, y: Params) -> Step:
        """Computes one upper iteration.

        Args:
            problem: the oracles.
            x: upper variables, detached.
            y: start of the lower level, detached.

        Returns:
            The direction for x, an estimate of the hypergradient, by the names of x; and the new y.
        """

    def initial_state(self, x: Params, y: Params) -> dict[str, Params]:
        """Returns what the algorithm keeps from one upper iteration to the next besides y, by name; default: nothing.

        It is asked only where one y persists, or the task stores those of its episodes (`Bilevel.stored_lowers`), each
        of which then has its own. `kept` reads it; what `Step.state` holds replaces it after the iteration.
        """
        return {}

    def kept(self, name: str) -> Params | None:
        """Returns the kept tensors of that name, of the episodes at hand, or None where nothing is kept."""
        if name not in self.states:
            return None
        values: Params = self.states[name].get()  # type: ignore[operator]
        if not self.hooks.stored_lowers:
            return values
        return None if self._rows is None else {n: t[self._rows] for n, t in values.items()}

    def added_upper(self, y: Params) -> Params:
        """Returns initial values of the upper variables that the algorithm adds to the task's.

        Their names have a slash. Default: the learnt settings of the dynamics.

        Args:
            y: the start of the lower level.
        """
        return self.dynamics.learnable(self.lower_steps, y)

    def upper_groups(self) -> Iterable[Any]:
        """Returns what the upper optimizer is made for: the parameters x, or groups of them with their settings."""
        return self.upper_parameters().values()

    def project_added(self) -> None:
        """Projects the upper variables of `added_upper` after the upper step; default: nothing."""

    def minibatches(self, k: int) -> tuple[Draws, Draws]:
        """Returns which lower and upper minibatches upper iteration ``k`` takes, where data come in minibatches.

        For each level their number, or a list with the size of each in batch sizes, 0 for all samples of the level.
        """
        return self.lower_steps, 1

    def first_lower_step(self, k: int) -> int:
        """Returns the number t of the first lower step of batch ``k``, for schedules of the dynamics.

        Default 0: they begin anew in each upper iteration.
        """
        return 0

    def solve_lower(self, problem: BilevelProblem, x: Params, y: Params, steps: int | None = None) -> Params:
        """Returns y after ``steps`` lower steps, default ``lower_steps``, without a graph."""
        state = self.dynamics.start(y)
        for t in range(self.lower_steps if steps is None else steps):
            state = self.dynamics.step(problem, x, state, t)
        return state[0]

    # The Lightning side. Nothing below is meant to be overridden.

    @override
    def configure_model(self) -> None:
        if self._checked is not None:
            return
        check_task(self.hooks)
        x, y = check_levels(self.hooks)
        if self.hooks.persistent_lower and self.episodic:
            raise BilevelError(
                f"{', '.join(self.episodic)}: these settings are for tasks whose y is solved for each episode, and "
                "here one y persists: leave them out, or set persistent_lower = False."
            )
        if not self.hooks.persistent_lower and self.samples_at_once is not None:
            raise BilevelError(
                "samples_at_once divides minibatches of a y that persists, and here y is solved for each episode: set "
                "episodes_at_once instead."
            )
        like = next(iter(x.values()))
        for name, value in self.added_upper(tree.detach(self.hooks.initial_lower(x))).items():
            self.learnable[name.replace(".", ":")] = nn.Parameter(value.detach().clone().to(like))
        if not self.warm_start and self.hooks.persistent_lower:
            self.cold_start = State(y)
        rows = self.hooks.stored_lowers or None
        if self.hooks.persistent_lower or rows:
            kept = self.initial_state(tree.detach(self.upper_parameters()), tree.detach(y))
            self.states.update({name: State(tree.repeat(values, rows)) for name, values in kept.items()})
        self._checked = False

    @override
    def setup(self, stage: str) -> None:
        if self.compiled is not None and self.trainer.world_size > 1:
            raise BilevelError("compile works in one process: set trainer.devices to 1, or leave compile off.")
        check_trainer(self.trainer)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        # Its advice, to save the state before the optimizer's step, would not resume a bilevel run.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            self.hooks.check_data(datamodule)

    @override
    def configure_callbacks(self) -> list[Callback]:
        check_automatic(self.trainer)
        given = {type(c) for c in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [c for c in self.hooks.callbacks() if type(c) not in given]

    @override
    def configure_optimizers(self) -> Any:
        try:
            optimizer = self.upper_optimizer(self.upper_groups())
        except ValueError as error:
            raise BilevelError(f"upper_optimizer: {error}.") from error
        if isinstance(optimizer, torch.optim.LBFGS | GradientFlow):
            name = type(optimizer).__name__
            raise BilevelError(
                f"upper_optimizer {name} needs a closure, which a hypergradient has not; use SGD or Adam."
            )
        rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if not all(rate < float("inf") for rate in rates):
            raise BilevelError(f"upper_optimizer: its lr must be a finite number, got {rates[0]}.")
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not optimized & {id(p) for p in self.upper_parameters().values()}:
            raise BilevelError("upper_optimizer must be made for the parameters that it is given; it has none of them.")
        given = self.upper_scheduler
        if given is None:
            return optimizer
        return [optimizer], [LambdaLR(optimizer, given) if isinstance(given, Schedule) else given(optimizer)]

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        last: int = self.trainer.max_steps
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = bool(every) and (self.global_step // self.upper_iterations + 1) % every == 0
        left = self.upper_iterations if last < 0 else min(self.upper_iterations, last - self.global_step)
        # bfloat16 would change hypergradients by 2.5 to 67 % (docs/trust.md); evaluations keep it.
        with torch.autocast(self.device.type, enabled=False):
            for i in range(left):
                self._upper_iteration(batch, due and i == left - 1)
                if self.trainer.should_stop:
                    break

    def _upper_iteration(self, batch: Any, due: bool) -> None:
        """Steps x and y once."""
        x = tree.detach(self.upper_parameters())
        counts: Counter[str] = Counter()
        episodes = self.hooks.episodes(batch)
        if self.hooks.persistent_lower and len(episodes) != 1:
            raise BilevelError(
                f"episodes(batch) returned {len(episodes)} problems, but one y persists; set persistent_lower = False."
            )
        if not episodes:
            raise BilevelError("episodes(batch) returned no problem: every batch must hold one, on every process.")
        if not self._checked:
            self._check(episodes[0], x)
        weight = None if self.hooks.persistent_lower else len(episodes)  # processes may hold different numbers
        steps, problems = [], []
        groups = self._groups(episodes)
        for episode, number in groups:
            if self.compiled is None:
                problem, z, step = self._iterate(x, self._starts(x, episode, number), episode, number)
                taken = problem.counts
            else:
                problem, z, _ = self._bind(episode, x, number)
                step, taken = self.compiled(x, self._starts(x, episode, number), episode, number)
            counts.update(taken)
            steps.append(step)
            problems.append((problem, tree.clone(z) if due else z))
        gradient = mean_over_processes(tree.mean([s.upper_grad for s in steps], [n or 1 for _, n in groups]), weight)
        norm = tree.norm(gradient)
        sizes = [tree.norm(step.lower) for step in steps if not callable(step.lower)]
        try:
            self._guard_lower(sizes)
            self._guard("The hypergradient", norm, self.upper_rates)
        except BilevelError:
            self._check(episodes[0], x, f"at upper iteration {self.global_step}")  # a batch may be the reason
            raise
        full = self._gather(gradient)
        if full is not None:
            norm = tree.norm(full)
            self._step_upper(full, norm)
        lowers = [
            self._follow(step.lower, group, counts) if callable(step.lower) else step.lower
            for step, group in zip(steps, groups, strict=True)
        ]
        self._guard_lower([tree.norm(y) for step, y in zip(steps, lowers, strict=True) if callable(step.lower)])
        if self.hooks.persistent_lower:
            tree.assign(self.hooks.lower, lowers[0])
            for name, values in steps[0].state.items():
                self.states[name].set(values)  # type: ignore[operator]
        elif type(self.hooks).keep_lower is not Bilevel.keep_lower:
            for (episode, number), step, y in zip(groups, steps, lowers, strict=True):
                for one, solved in zip(unstack(episode, number), unstack(y, number), strict=True):
                    self.hooks.keep_lower(one, solved)
                for name, values in step.state.items():
                    self._keep(name, episode, number, values)
        self._count(counts)
        self._advance_statistics(episodes)
        if due and full is not None:
            with self.aside():
                logs = [
                    {**step.logs, **diagnose(problem, z, whole(y))}
                    for step, (problem, z), y in zip(steps, problems, lowers, strict=True)
                ]
            means = {name: torch.cat([log[name].reshape(-1) for log in logs]).mean() for name in logs[0]}
            means = mean_over_processes(means, weight)
            self._log_step(means, norm)
            self._warn(float(means["train/stationarity"]))

    def _check(self, episode: Any, x: Params, where: str = "on the first batch") -> None:
        """Looks at the losses: once, and again where an iteration ends in what is not finite."""
        with self.aside():  # a start may be random
            y = whole(self.start_lower(x, episode))
        try:
            with self.aside(), watched(self.hooks):
                problem, z, _ = self._bind(episode if self._checked else self._beginning(episode), x)
                size = check_losses(problem, z, y, where, self.hooks)
        except RuntimeError as error:
            if hint := check_batch(episode, next(iter(y.values()))):
                raise BilevelError(f"A loss fails {where}. {hint}: convert in the data module. ({error})") from error
            raise
        self.scale.setdefault("stationarity", size)
        self._checked = True

    def _beginning(self, episode: Any) -> Any:
        """Returns the episode, or with ``samples_at_once`` the first samples of each level, whose losses are plain."""
        if self.samples_at_once is None:
            return episode
        lower, upper = (part[0] if isinstance(part, Minibatches) else part for part in split(episode))
        both = {"lower": rows(lower, 0, self.samples_at_once), "upper": rows(upper, 0, self.samples_at_once)}
        return {**(episode if isinstance(episode, dict) else {}), **both}

    def _keep(self, name: str, episode: Any, number: int | None, values: Params | Row) -> None:
        """Writes what is kept of one episode, or of several side by side, of all processes."""
        assert not isinstance(values, Row)  # of estimators that remember parts of one y's data
        rows = gather(self.hooks.stored_row(episode).reshape(-1))
        new = {n: gather(t if number else t[None]) for n, t in values.items()}
        self.states[name].set(Row(rows, new))  # type: ignore[operator]

    def _follow(
        self,
        move: Callable[[BilevelProblem, Params], Params],
        group: tuple[Any, int | None],
        counts: Counter[str],
    ) -> Params:
        """Returns the new y of a method whose lower step is taken at the new x, and adds its oracles to ``counts``."""
        episode, number = group
        problem, z, _ = self._bind(episode, tree.detach(self.upper_parameters()), number)
        y = move(problem, z)
        counts.update(problem.counts)
        return y

    def _count(self, counts: Counter[str]) -> None:
        """Adds to the oracles evaluated so far."""
        apart = () if self.hooks.persistent_lower else ORACLES  # processes with their own episodes add up
        totals = {
            name: total_over_processes(counts[name], self.device)
            if name == "samples" or name in apart
            else counts[name]
            for name in ORACLES
        }
        numbers = [*totals.values()]
        self.oracles += torch.tensor(numbers, device=self.oracles.device)

    def _guard(self, name: str, norm: Tensor, rates: str) -> None:
        """Ends a run that has diverged, before ``name`` is used."""
        size = float(norm)
        if not size <= EXPLODED * self.scale.setdefault(name, 1.0 + size):
            raise BilevelError(
                f"{name} is {size:.3g} in norm at upper iteration {self.global_step}: the run has diverged. Lower "
                f"{rates}; the last checkpoint is as it was."
            )

    def _guard_lower(self, sizes: Sequence[Tensor]) -> None:
        """Ends a run whose y, of these norms, have diverged: on all processes, since their mean is looked at."""
        if sizes:
            self._guard("y", mean_over_processes({"": torch.stack([*sizes]).mean()})[""], self.lower_rates)

    def _warn(self, stationarity: float) -> None:
        """Says once when the lower level is further from being solved than where the run began."""
        first = self.scale.get("stationarity", 0.0)
        if 0 < 10 * first < stationarity:
            self.scale["stationarity"] = float("inf")
            rank_zero_warn(
                f"|g_y| is {stationarity:.3g} at upper iteration {self.global_step} and was {first:.3g} when the run "
                f"began: the lower level is not solved, and its hypergradient cannot be trusted. Lower "
                f"{self.lower_rates}{', or raise lower_steps' if self.lower_loop else ''}; bilevel-check tells more."
            )

    def _iterate(self, x: Params, y: Params, episode: Any, number: int | None) -> tuple[BilevelProblem, Params, Step]:
        """Returns the problem on one episode or stack, its x, and the step, whose direction is pulled back to x.

        The direction of a stack, whose losses are sums, is divided by the number of its episodes.
        """
        problem, z, pull_back = self._bind(episode, x, number)
        self._rows = self.hooks.stored_row(episode) if self.hooks.stored_lowers else None
        step = self.bilevel_step(problem, z, y)
        self._rows = None
        gradient = pull_back(step.upper_grad)
        if number is not None:
            gradient = {name: t / number for name, t in gradient.items()}
        return problem, z, Step(gradient, step.lower, dict(step.logs), dict(step.state))

    def _recorded(self, *args: Any) -> tuple[Step, Counter[str]]:
        """The step and the oracles taken, for `Compiled`."""
        problem, _, step = self._iterate(*args)
        return step, problem.counts

    def _advance_statistics(self, episodes: Sequence[Any]) -> None:
        """Adds the lower data, once an upper iteration, to the running statistics of normalisation layers.

        Where y is solved for each episode, they are those along its steps, of the episodes of all processes.
        """
        layers = [layer for level in (self.hooks.upper, self.hooks.lower) for _, layer in running_norms(level)]
        if not layers:
            return
        before = statistics(layers)
        call = Functional(self.hooks, advance=True)
        with self.aside(), torch.no_grad():
            for episode in episodes:
                if self.hooks.persistent_lower:
                    lower, y = split(episode)[0], whole(tree.of(self.hooks.lower))
                    call.at({}, y, "lower_loss", lower[0] if isinstance(lower, Minibatches) else lower)
                    continue
                _, _, path = self.solved(episode)
                x = tree.detach(self.upper_parameters())
                lower = split(call.at(x, {}, "prepare", episode))[0]
                for t, y in enumerate(path):
                    self.hooks.at_lower_step(t)
                    call.at(x, y, "lower_loss", lower)
            if not self.hooks.persistent_lower:
                merge_statistics(layers, before)

    @property
    def batches(self) -> int:
        """Upper iterations so far, or with ``accumulate`` batches."""
        return self.global_step * self.accumulate + self._gathered[0]

    def _gather(self, gradient: Params) -> Params | None:
        """Returns the mean of the last ``accumulate`` hypergradients where x is due to step, else None."""
        if self.accumulate == 1:
            return gradient
        number, total = self._gathered
        total = {name: t + total[name].to(t) for name, t in gradient.items()} if number else gradient
        number += 1
        full = number >= self.accumulate
        self._gathered = (0, {}) if full else (number, total)
        return {name: t / number for name, t in total.items()} if full else None

    def _step_upper(self, gradient: Params, norm: Tensor) -> None:
        """Steps, projects and schedules x."""
        optimizer = self.optimizers()
        if self.upper_clip_value is not None:
            gradient = {name: t.clamp(-self.upper_clip_value, self.upper_clip_value) for name, t in gradient.items()}
            norm = tree.norm(gradient)
        scale = 1.0 if self.upper_clip_norm is None else (self.upper_clip_norm / norm).clamp(max=1.0)
        for name, p in self.upper_parameters().items():
            p.grad = gradient[name] * scale
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        upper = self.hooks.upper
        with torch.no_grad():
            tree.assign(upper, self.hooks.project_upper(tree.clone(tree.of(upper))))
            self.project_added()
        scheduler = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]

    def _log_step(self, logs: Params, norm: Tensor) -> None:
        logs["train/hypergradient_norm"] = norm  # the same on all processes
        for name, p in self.learnable.items():
            kind, _, label = name.partition("/")
            if kind == "dynamics" and p.ndim == 0:
                logs[f"train/{label}"] = p.detach()
            elif kind == "dynamics" and p.ndim == 1 and label == "log_lr_factor":
                logs.update({f"train/{label}/{t}": value for t, value in enumerate(p.detach())})
            elif kind == "dynamics" and label.startswith("log_lr_factors/"):  # of each entry: their mean over a tensor
                logs[f"train/{label}".replace(":", ".")] = p.detach().mean()
        bar = ("train/upper_loss", "train/lower_loss", "train/hypergradient_norm")
        for name, value in logs.items():
            self.log(name, value.float(), prog_bar=name in bar, batch_size=1)
        counts = {f"oracle/{n}": c.float() for n, c in zip(ORACLES, self.oracles, strict=True) if c > 0}
        self.log_dict(counts, batch_size=1)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = randomness.saved()
        checkpoint["accumulated"], checkpoint["scale"] = self._gathered, self.scale

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning converts a module to float64 after it has loaded it, when half of the digits are lost.
        if self._trainer is not None:
            self._trainer.precision_plugin.convert_module(self)
        else:
            self.to(next(t.dtype for t in checkpoint["state_dict"].values() if t.is_floating_point()))
        self._gathered, self.scale = checkpoint.get("accumulated", (0, {})), dict(checkpoint.get("scale", {}))
        if self._trainer is not None and self._trainer.training and "random_state" in checkpoint:
            self._random_state = checkpoint["random_state"]
            randomness.restore(self._random_state)

    def _restore_random_state(self) -> None:
        """Sets the generators once more, after the loader of the resumed epoch has drawn the seed of its workers."""
        if self._random_state is not None:
            randomness.restore(self._random_state)
            self._random_state = None

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._random_state = None  # saved between epochs: the undisturbed run, too, made the loader after that
        self._restore_random_state()

    @override
    def on_train_epoch_end(self) -> None:
        self._restore_random_state()  # saved by the last validation of an epoch, of which no batch is left
