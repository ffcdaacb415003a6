"""The one training loop of all algorithms."""

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor, nn
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.checks import check_levels, check_losses, diagnose, plain
from bilevel_lightning.compiled import Compiled
from bilevel_lightning.distributed import agree, mean_over_processes, total_over_processes
from bilevel_lightning.dynamics import Dynamics, GradientDescent
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.problem import BilevelProblem, Functional, Operator, bind, running_norms, split
from bilevel_lightning.state import State
from bilevel_lightning.task import Bilevel, BilevelTask, Minibatches
from bilevel_lightning.tree import Params

ORACLES = (
    "upper_gradients",
    "lower_gradients",
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
        logs: scalars to log, such as ``train/residual``.
        state: new values of what the algorithm keeps (`BilevelModule.initial_state`).
    """

    upper_grad: Params
    lower: Params | Callable[[BilevelProblem, Params], Params]
    logs: Mapping[str, Tensor] = MappingProxyType({})
    state: Mapping[str, Params] = MappingProxyType({})


class BilevelModule(LightningModule, Bilevel, ABC):
    r"""Base of all algorithms; a subclass implements `bilevel_step` and its own settings, nothing else.

    State the problem either with ``task=`` or by defining the members of `Bilevel` on a subclass of an algorithm. One
    batch ``{"lower": ..., "upper": ...}`` is one upper iteration, or ``upper_iterations`` of them, and only upper
    iterations advance ``global_step``. Logged at every ``log_every_n_steps`` batches: ``train/upper_loss``
    f(x_k, y_{k+1}), ``train/lower_loss`` g(x_k, y_{k+1}), ``train/stationarity`` ``|g_y(x_k, y_{k+1})|``,
    ``train/hypergradient_norm``, and the oracles evaluated so far: gradients, products, lower values alone, and the
    samples that all of them touched.

    A run whose direction or y grows beyond 1e8 times its first norm, or is NaN, ends with a message that names the step
    size to lower, before x or y takes the value.

    Losses may contain dropout and batch normalisation. Running statistics are not changed by the many evaluations of
    an iteration; they advance once, on the lower batch at (x_{k+1}, y_{k+1}).

    Args:
        task: the bilevel problem; None if the subclass states it.
        upper_optimizer: optimizer of x: any of torch's that needs no closure. Default Adam with step size 0.01.
        upper_scheduler: its step-size schedule, stepped once per upper iteration. Default none.
        upper_clip_norm: bound on the Euclidean norm of the hypergradient. Default none.
        dynamics: one step of the lower level. Default gradient descent with step size 0.1.
        lower_steps: number T of lower steps in one upper iteration. Default 20.
        warm_start: start the lower level at the last iteration's y (True, default) or at the y of the beginning.
        upper_iterations: number of upper iterations on each batch. More than one saves the trainer's own time, about
            a millisecond a batch, where an iteration takes less (docs/benchmarks.md); logs and validations count
            batches, `max_steps` and schedules upper iterations. For tasks whose batch is all their data. Default 1.
        compile: record the whole hypergradient, derivatives included, at the first batch and run it compiled; for
            batches of equal shapes, one process, losses without random numbers, and algorithms that do not branch on
            values. It can be several times faster for small problems, after minutes of compiling that grow with
            lower_steps (docs/benchmarks.md). Default False.

    Raises:
        BilevelError: if a setting is impossible, or the losses do not fit it; the message names the remedy.
    """

    least_lower_steps = 1
    compilable = False
    estimates_hypergradient = True
    """Whether one `bilevel_step` at a fixed x gives it; not where y or a twin is solved across iterations."""

    upper_rates, lower_rates = "upper_optimizer.lr or dynamics.lr", "dynamics.lr"
    """Names of the step sizes to lower where x's direction, or y, diverges."""

    def __init__(
        self,
        task: BilevelTask | None = None,
        upper_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=0.01),
        upper_scheduler: LRSchedulerCallable | None = None,
        upper_clip_norm: float | None = None,
        dynamics: Dynamics = GradientDescent(lr=0.1),  # noqa: B008 (a value: it has no state)
        lower_steps: int = 20,
        warm_start: bool = True,
        upper_iterations: int = 1,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # From Python, objects are the caller's to give again; from the command line their configs are stored.
        objects = ["task", "dynamics", "upper_optimizer", "upper_scheduler"]
        self.save_hyperparameters(ignore=[] if _given_hyperparameters.get() else objects)
        for name in [k for k, v in self.hparams.items() if not plain(v)]:
            del self.hparams[name]
        self.task = task
        self.upper_optimizer, self.upper_scheduler = upper_optimizer, upper_scheduler
        if upper_clip_norm is not None:
            positive("upper_clip_norm", upper_clip_norm)
        if lower_steps < self.least_lower_steps:
            raise BilevelError(f"lower_steps must be at least {self.least_lower_steps}, got {lower_steps}.")
        self.upper_clip_norm = upper_clip_norm
        self.dynamics, self.lower_steps, self.warm_start = dynamics, lower_steps, warm_start
        self.upper_iterations = int(positive("upper_iterations", upper_iterations))
        self.learnable = nn.ParameterDict()
        self.cold_start: State | None = None
        self.states = nn.ModuleDict()
        if compile and not self.compilable:
            raise BilevelError(
                f"compile does not apply to {type(self).__name__}, which branches on values: leave it off, or use RHG."
            )
        self.compiled = Compiled(self._iterate) if compile else None
        self.scale: dict[str, float] = {}
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

    def initial_state(self, y: Params) -> dict[str, Params]:
        """Returns what the algorithm keeps from one upper iteration to the next besides y, by name; default: nothing.

        It is asked only where one y persists. `kept` reads it; what `Step.state` holds replaces it after the iteration.
        """
        return {}

    def kept(self, name: str) -> Params | None:
        """Returns the kept tensors of that name, or None where nothing is kept."""
        if name not in self.states:
            return None
        values: Params = self.states[name].get()  # type: ignore[operator]
        return values

    def minibatches(self, k: int) -> tuple[int, int]:
        """Returns how many lower and upper minibatches upper iteration ``k`` takes, where data come in minibatches."""
        return self.lower_steps, 1

    def solve_lower(self, problem: BilevelProblem, x: Params, y: Params) -> Params:
        """Returns y after ``lower_steps`` lower steps, without a graph."""
        state = self.dynamics.start(y)
        for t in range(self.lower_steps):
            state = self.dynamics.step(problem, x, state, t)
        return state[0]

    # The Lightning side. Nothing below is meant to be overridden.

    @property
    def hooks(self) -> Bilevel:
        """Who states the problem: the task, or this module itself."""
        return self if self.task is None else self.task

    def upper_parameters(self) -> Params:
        """Returns x: the trainable parameters of ``upper`` and the learnable settings of the dynamics."""
        learnable = {f"dynamics/{name}": p for name, p in self.learnable.items()}
        return {**tree.of(self.hooks.upper), **learnable}

    @override
    def configure_model(self) -> None:
        if self._checked is not None:
            return
        x, y = check_levels(self.hooks)
        device = next(iter(x.values()))
        for name, value in self.dynamics.learnable(self.lower_steps).items():
            self.learnable[name.removeprefix("dynamics/")] = nn.Parameter(value.to(device))
        if not self.warm_start and self.hooks.persistent_lower:
            self.cold_start = State(y)
        if self.hooks.persistent_lower:
            self.states.update({name: State(values) for name, values in self.initial_state(tree.detach(y)).items()})
        self._checked = False

    @override
    def setup(self, stage: str) -> None:
        if self.compiled is not None and self.trainer.world_size > 1:
            raise BilevelError("compile works in one process: set trainer.devices to 1, or leave compile off.")
        if self.trainer.precision in ("16-mixed", "16-true"):
            raise BilevelError(
                f"precision {self.trainer.precision} cannot be used: its loss scaling does not reach hypergradients. "
                "Choose 32-true, 64-true or bf16-mixed."
            )
        # Its advice, to save the state before the optimizer's step, would not resume a bilevel run.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            self.hooks.check_data(datamodule)

    @override
    def configure_callbacks(self) -> list[Callback]:
        given = {type(c) for c in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [c for c in self.hooks.callbacks() if type(c) not in given]

    @override
    def configure_optimizers(self) -> Any:
        try:
            optimizer = self.upper_optimizer(self.upper_parameters().values())
        except ValueError as error:
            raise BilevelError(f"upper_optimizer: {error}.") from error
        if isinstance(optimizer, torch.optim.LBFGS):
            raise BilevelError("upper_optimizer LBFGS needs a closure, which a hypergradient has not; use SGD or Adam.")
        return [optimizer], [] if self.upper_scheduler is None else [self.upper_scheduler(optimizer)]

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        last: int = self.trainer.max_steps
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = bool(every) and (self.global_step // self.upper_iterations + 1) % every == 0
        left = self.upper_iterations if last < 0 else min(self.upper_iterations, last - self.global_step)
        for i in range(left):
            self._upper_iteration(batch, due and i == left - 1)
            if self.trainer.should_stop:
                break

    def _upper_iteration(self, batch: Any, due: bool) -> None:
        """Steps x and y once."""
        x = tree.detach(self.upper_parameters())
        gradients, logs, moves, problems = [], [], [], []
        counts: Counter[str] = Counter()
        state: Mapping[str, Params] = {}
        episodes = self.hooks.episodes(batch)
        if self.hooks.persistent_lower and len(episodes) != 1:
            raise BilevelError(
                f"episodes(batch) returned {len(episodes)} problems, but one y persists; set persistent_lower = False."
            )
        for episode in episodes:
            problem, z, pull_back = bind(self.hooks, episode, x, mean_over_processes, agree)
            y = self._start(x)
            if not self._checked:
                with self._aside():
                    check_losses(problem, z, y)
                self._checked = True
            if self.compiled is None:
                step, taken = self._solve(problem, z, y, pull_back)
            else:
                step, taken = self.compiled(x, y, episode)
            counts.update(taken)
            state = step.state
            gradients.append(step.upper_grad)
            logs.append(dict(step.logs))
            moves.append(step.lower)
            problems.append((problem, tree.clone(z) if due else z))
        gradient = mean_over_processes(tree.mean(gradients))
        norm = tree.norm(gradient)
        self._guard("The hypergradient", norm, self.upper_rates)
        for move in moves:
            if not callable(move):
                self._guard("y", tree.norm(move), self.lower_rates)
        self._step_upper(gradient, norm)
        lowers = [self._follow(m, e, counts) if callable(m) else m for m, e in zip(moves, episodes, strict=True)]
        if self.hooks.persistent_lower:
            tree.assign(self.hooks.lower, lowers[0])
            for name, values in state.items():
                self.states[name].set(values)  # type: ignore[operator]
        self._count(counts)
        self._advance_statistics(episodes)
        if due:
            with self._aside():
                for log, (problem, z), y in zip(logs, problems, lowers, strict=True):
                    log.update(diagnose(problem, z, y))
            self._log_step(tree.mean(logs), norm)

    def _follow(self, move: Callable[[BilevelProblem, Params], Params], episode: Any, counts: Counter[str]) -> Params:
        """Returns the new y of a method whose lower step is taken at the new x, and adds its oracles to ``counts``."""
        problem, z, _ = bind(self.hooks, episode, tree.detach(self.upper_parameters()), mean_over_processes, agree)
        y = move(problem, z)
        self._guard("y", tree.norm(y), self.lower_rates)
        counts.update(problem.counts)
        return y

    def _count(self, counts: Counter[str]) -> None:
        """Adds to the oracles evaluated so far."""
        samples = total_over_processes(counts["samples"], self.device)
        numbers = [samples if name == "samples" else counts[name] for name in ORACLES]
        self.oracles += torch.tensor(numbers, device=self.oracles.device)

    def _guard(self, name: str, norm: Tensor, rates: str) -> None:
        """Ends a run that has diverged, before ``name`` is used."""
        size = float(norm)
        if not size <= EXPLODED * self.scale.setdefault(name, 1.0 + size):
            raise BilevelError(
                f"{name} is {size:.3g} in norm at upper iteration {self.global_step}: the run has diverged. Lower "
                f"{rates}; the last checkpoint is as it was."
            )

    def _iterate(self, x: Params, y: Params, episode: Any) -> tuple[Step, Counter[str]]:
        """The same from the episode, for `Compiled`."""
        problem, z, pull_back = bind(self.hooks, episode, x, mean_over_processes, agree)
        return self._solve(problem, z, y, pull_back)

    def _solve(self, problem: BilevelProblem, x: Params, y: Params, pull_back: Operator) -> tuple[Step, Counter[str]]:
        """Returns the step on one episode, its direction pulled back to x, and the oracles that it took."""
        step = self.bilevel_step(problem, x, y)
        return Step(pull_back(step.upper_grad), step.lower, dict(step.logs), dict(step.state)), problem.counts

    def _advance_statistics(self, episodes: Sequence[Any]) -> None:
        """Adds the lower data, once an upper iteration, to the running statistics of normalisation layers."""
        if not any(running_norms(level) for level in (self.hooks.upper, self.hooks.lower)):
            return
        with torch.no_grad(), self._aside():
            for episode in episodes:
                lower = split(episode)[0]
                self.hooks.lower_loss(lower[0] if isinstance(lower, Minibatches) else lower)

    def _aside(self) -> Any:
        """A context for what must not change the random numbers of training."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def _start(self, x: Params) -> Params:
        if self.cold_start is not None:
            return self.cold_start.get()
        return tree.detach(self.hooks.initial_lower({name: t for name, t in x.items() if "/" not in name}))

    def _step_upper(self, gradient: Params, norm: Tensor) -> None:
        """Steps, projects and schedules x."""
        optimizer = self.optimizers()
        scale = 1.0 if self.upper_clip_norm is None else (self.upper_clip_norm / norm).clamp(max=1.0)
        for name, p in self.upper_parameters().items():
            p.grad = gradient[name] * scale
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        upper = self.hooks.upper
        with torch.no_grad():
            tree.assign(upper, self.hooks.project_upper(tree.clone(tree.of(upper))))
        scheduler = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()  # type: ignore[union-attr]

    def _log_step(self, logs: Params, norm: Tensor) -> None:
        logs["train/hypergradient_norm"] = norm
        logs = mean_over_processes(logs)
        for name, p in self.learnable.items():
            logs[f"train/{name}"] = p.detach()
        bar = ("train/upper_loss", "train/lower_loss", "train/hypergradient_norm")
        for name, value in logs.items():
            self.log(name, value.float(), prog_bar=name in bar, batch_size=1)
        counts = {f"oracle/{n}": c.float() for n, c in zip(ORACLES, self.oracles, strict=True) if c > 0}
        self.log_dict(counts, batch_size=1)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, stage: str) -> None:
        """Logs the task's metrics at the current y, or at the y solved for each episode where y does not persist."""
        with self._aside(), torch.inference_mode(False), torch.enable_grad():
            batch = apply_to_collection(batch, Tensor, torch.clone)
            x = tree.clone(self.upper_parameters())
            results = []
            for episode in self.hooks.episodes(batch):
                problem, z, _ = bind(self.hooks, episode, x, mean_over_processes, agree)
                y = tree.clone(self.hooks.initial_lower({n: t for n, t in x.items() if "/" not in n}))
                if not self.hooks.persistent_lower:
                    y = self.solve_lower(problem, z, y)
                with torch.no_grad():
                    metrics = Functional(self.hooks).at(x, y, "metrics", episode)
                    results.append({"upper_loss": problem.f(z, y), **metrics})
        for name, value in tree.mean(results).items():
            self.log(
                f"{stage}/{name}", value.float(), sync_dist=True, batch_size=len(results), prog_bar=name == "accuracy"
            )

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.hooks.predict(batch)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        checkpoint["random_state"] = {"torch": torch.get_rng_state(), "cuda": cuda}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and self._trainer.training and "random_state" in checkpoint:
            torch.set_rng_state(checkpoint["random_state"]["torch"].cpu())
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all([s.cpu() for s in checkpoint["random_state"]["cuda"]])
