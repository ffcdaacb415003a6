"""``bilevel-search``: looks for good settings of what a config describes."""

import io
import sys
import time
import traceback
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import optuna
from lightning_fabric.utilities.exceptions import MisconfigurationException
from optuna.trial import FrozenTrial, Trial
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers.logger import Logger
from rich.console import Console
from typing_extensions import override

from bilevel_lightning.cli.arguments import config_path, explain
from bilevel_lightning.cli.main import BilevelCLI, silent, start
from bilevel_lightning.errors import BilevelError, Diverged
from bilevel_lightning.module import ORACLES
from bilevel_lightning.search import Results, Space, Unusable, open_study, shipped_spaces, work
from bilevel_lightning.search.space import arguments
from bilevel_lightning.search.study import PRUNERS, SAMPLERS, folder, origin, shown

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.devices=1"]
# Where and on what a trial runs, which may differ between the workers of one study.
OF_THE_MACHINE = (
    "config",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.default_root_dir",
    "trainer.logger",
    "trainer.enable_",
    "data.init_args.root",
    "data.init_args.download",
    "data.init_args.num_workers",
)


class Watch(Callback):
    """Reports a run's metric to the study after each validation, and ends the run where it is pruned or diverged.

    Args:
        trial: the trial.
        metric: name of the metric.
    """

    def __init__(self, trial: Trial, metric: str) -> None:
        self.trial, self.metric, self.last = trial, metric, Last()

    def missing(self, names: Mapping[str, Any]) -> Unusable:
        """Returns the error that says what is logged instead."""
        return Unusable(
            f"objective.metric {self.metric} is not logged by this run; logged are {', '.join(sorted(names))}."
        )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.loggers = [*trainer.loggers, self.last]
        self.trial.set_user_attr("folder", trainer.log_dir)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.metric not in found:
            if self.metric.startswith("val/"):
                raise self.missing(found)
            return
        value = float(found[self.metric])
        if not abs(value) < float("inf"):
            raise Diverged(f"{self.metric} is {value} after {trainer.global_step} upper iterations.")
        self.trial.report(value, trainer.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trial.set_user_attr("iterations", trainer.global_step)
        samples: Any = pl_module.oracles
        self.trial.set_user_attr("samples", int(samples[ORACLES.index("samples")]))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def value(self) -> float:
        """Returns the last value that was logged."""
        if self.metric not in self.last.values:
            raise self.missing(self.last.values)
        value = self.last.values[self.metric]
        if not abs(value) < float("inf"):
            raise Diverged(f"{self.metric} is {value} at the end of the run.")
        return value


class Last(Logger):
    """Keeps the last value of everything that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    name, version = "last", 0

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.values.update({name: float(value) for name, value in metrics.items()})

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Settings are kept by the study."""


class TrialCLI(BilevelCLI):
    """The command line of ``bilevel-fit`` for one trial; without one, the arguments are parsed and nothing is run.

    Args:
        watch: the trial's callback, or None.
        study: name of the study.
        version: number of the trial's folder.
    """

    def __init__(self, *args: Any, watch: Watch | None, study: str, version: int, **settings: Any) -> None:
        self.watch, self.study, self.version = watch, study, version
        super().__init__(*args, **settings)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"]}

    @override
    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        self.run_name = f"search/{self.study}"

    @override
    def instantiate_classes(self) -> None:
        if self.watch is not None:
            super().instantiate_classes()

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        if self.watch is not None:
            super()._run_subcommand(subcommand)

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        trainer = super()._instantiate_trainer(config, [*callbacks, self.watch])  # type: ignore[list-item]
        if trainer.world_size > 1:
            raise Unusable(
                f"Each trial runs in one process, and here are {trainer.world_size}: set trainer.devices=1, and start "
                "one worker for each device (docs/search.md)."
            )
        return trainer


class Search:
    """One worker: what its trials have in common.

    Args:
        given: the options of ``bilevel-search``.
        settings: further arguments, those of ``bilevel-fit``.

    Raises:
        BilevelError: if the space or a setting is wrong.
    """

    def __init__(self, given: Namespace, settings: list[str]) -> None:
        if given.space is None:
            raise BilevelError(f"--space is missing: a file or a shipped space: {', '.join(shipped_spaces())}.")
        self.space = Space.load(given.space)
        configs = given.config or ([self.space.config] if self.space.config else [])
        if not configs:
            raise BilevelError(f"--config is missing, and the space {given.space} names none.")
        self.name = given.study or f"{Path(configs[0]).stem}_{self.space.name}"
        named = [part for config in configs for part in ("--config", config_path(config))]
        self.args = ["fit", *QUIET, *named, *arguments(self.space.fixed), *settings]
        self.own_seeds = given.own_seeds
        clash = {_plain(arg.lstrip("-").partition("=")[0]) for arg in settings if arg.startswith("--")}
        for name in self.space.settings:
            if _plain(name) in clash:
                raise BilevelError(
                    f"--{name} is searched by the space {given.space}: leave it out, or use another space."
                )
        common = self.parse([*self.args, *arguments(self.space.example())])
        self.folder = folder(common["trainer"]["default_root_dir"], self.name)
        flat = {key: value for key, value in _flat(common).items() if not key.startswith(OF_THE_MACHINE)}
        of_space = {f"the space's {key}": value for key, value in _flat(self.space.describe()).items()}
        self.description = {**of_space, **flat, "--own_seeds": self.own_seeds}

    def parse(self, args: list[str]) -> dict[str, Any]:
        """Returns all settings as plain values, and runs nothing."""
        try:
            with silent():
                cli: Any = start(TrialCLI, args, watch=None, study=self.name, version=0)
        except (ValueError, ArgumentError) as error:
            raise BilevelError(explain(error) or str(error)) from error
        plain: dict[str, Any] = cli.config["fit"].as_dict()
        return plain

    def run(self, trial: Trial) -> float:
        """Runs one trial as ``bilevel-fit`` would, and returns its value."""
        args = [*self.args, *arguments(self.space.suggest(trial))]
        if self.own_seeds:
            args.append(f"--seed_everything={origin(trial)}")
        watch, output, begun = Watch(trial, self.space.metric), io.StringIO(), time.perf_counter()
        try:
            with silent(), redirect_stdout(output), redirect_stderr(output):
                start(TrialCLI, args, watch=watch, study=self.name, version=trial.number)
            return watch.value()
        except BilevelError:
            raise
        except (ArgumentError, MisconfigurationException, ValueError) as error:
            reason = explain(error)
            if reason is None:
                traceback.print_exc(file=output)
                raise
            raise BilevelError(reason) from error
        except Exception:
            traceback.print_exc(file=output)
            raise
        finally:
            logged = {name: watch.last.values[name] for name in self.space.report if name in watch.last.values}
            trial.set_user_attr("logged", logged)
            if trial.user_attrs.get("folder") and output.getvalue():
                (Path(trial.user_attrs["folder"]) / "output.txt").write_text(output.getvalue())
            trial.set_user_attr("seconds", round(time.perf_counter() - begun, 3))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by dotted names."""
    if not isinstance(values, Mapping) or not values:
        return {prefix: values}
    return {
        name: value
        for key, part in values.items()
        for name, value in _flat(part, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _plain(name: str) -> str:
    """Returns a setting's name without what may be left out of it."""
    return name.replace(".init_args.", ".")


def parser() -> ArgumentParser:
    """Returns the parser of ``bilevel-search``'s own options."""
    found = ArgumentParser(
        prog="bilevel-search",
        usage="bilevel-search [--config CONFIG] --space SPACE [options] [settings of bilevel-fit]",
        description=(
            "Searches for good settings: each trial is one run of bilevel-fit. The same command joins the study from "
            "another process or machine, and goes on after an interruption. Results: a table, results.csv and "
            "pictures in runs/search/<study>, and each trial's run in version_<trial> there."
        ),
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = found.add_argument
    add("--config", "-c", action="append", help="as for bilevel-fit; default: the space's config")
    add("--space", help=f"what is varied: a file, or a shipped space: {', '.join(shipped_spaces())}")
    add("--trials", type=int, default=20, help="trials of the study, over all its workers (default: %(default)s)")
    add("--study", help="name of the study and its folder; default: <config>_<space>")
    add(
        "--storage",
        metavar="URL",
        help="where the study is kept: a data base's URL, such as postgresql://user:password@host/name, or "
        "journal:PATH, a file that all machines see; default: SQLite, study.db in the study's folder",
    )
    add("--sampler", choices=[*SAMPLERS], default="tpe", help="default: %(default)s")
    add("--pruner", choices=[*PRUNERS], default="median", help="ends runs that validate badly (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the sampler (default: %(default)s)")
    add(
        "--own_seeds",
        action="store_true",
        help="seed_everything is the trial's number, instead of the config's value for all trials",
    )
    add(
        "--grace",
        type=float,
        default=60,
        metavar="SECONDS",
        help="a trial without a sign of life for so long was lost with its process, and is done again (default: 60)",
    )
    return found


def search(args: list[str] | None = None) -> None:
    """Runs ``bilevel-search``; ends the process with status 2 and one message where a person has to mend something.

    Args:
        args: arguments; None: those of the process.
    """
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    def ended(trial: FrozenTrial) -> None:
        value = "" if trial.value is None else f" {trial.value:.6g}"
        where = " ".join(
            f"{name}={v:.4g}" if isinstance(v, float) else f"{name}={v}" for name, v in trial.params.items()
        )
        say(f"trial {trial.number}: {trial.state.name.lower()}{value}, {trial.user_attrs.get('reason', where)}")

    try:
        given, settings = parser().parse_known_args(args)
        if given.trials < 1 or not 1 <= given.grace < float("inf"):
            raise BilevelError(f"--trials and --grace must be at least 1, got {given.trials} and {given.grace}.")
        this = Search(given, settings)
        this.folder.mkdir(parents=True, exist_ok=True)
        url = given.storage or f"sqlite:///{this.folder / 'study.db'}"
        study = open_study(
            this.name, url, this.space.direction, this.description, given.sampler, given.pruner, given.seed
        )
        say(f"Study {this.name} in {shown(url)}; trials and results: {this.folder}")
        work(
            study, given.trials, this.run, given.grace, ended, lambda n: say(f"waiting for {n} trials of other workers")
        )
    except KeyboardInterrupt:
        say("Interrupted; the same command goes on.")
        sys.exit(130)
    except (BilevelError, ArgumentError) as error:
        print(f"bilevel-search: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    results = Results(study, this.space)
    left = results.write(this.folder)
    console.print(results.table())
    for text in left:
        say(text)
    say(f"Table and pictures: {this.folder / 'results.csv'}, *.png")
