"""``bilevel-fit``: trains, tests and applies what a config describes."""

import csv
import itertools
import logging
import sys
import tempfile
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar, TQDMProgressBar
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.model_helpers import is_overridden
from typing_extensions import override

# Importing the parts is what lets a config name them by class name alone.
from bilevel_lightning import (  # noqa: F401
    BilevelError,
    algorithms,
    callbacks,
    datamodules,
    dynamics,
    estimators,
    models,
    schedules,
    tasks,
)
from bilevel_lightning.checks import check_strategy, plain
from bilevel_lightning.cli.arguments import CONFIGS, DEFAULT, complete, explain, newest, restrict, shipped_configs
from bilevel_lightning.cli.resuming import GivenSettings
from bilevel_lightning.module import BilevelModule
from bilevel_lightning.retraining import Retraining  # noqa: F401


class BilevelCLI(LightningCLI):
    """Lightning's command line, with shipped configs by name, ``fit`` implied, and errors in one line."""

    version: int | None = None
    """Number of the run's folder; None: the next that is free."""

    accepted: type[LightningModule] = BilevelModule
    """What ``--model`` may be."""

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        parser.description = (
            f"{parser.description or ''} Bilevel optimization: min_x f(x, y*(x)) s.t. y*(x) in argmin_y g(x, y). "
            f"Without arguments: --config {DEFAULT}. --config takes a file or a shipped config: "
            f"{', '.join(shipped_configs())}. Classes go by name (--model RHG --model.task HyperCleaning); their "
            "settings are listed by --model.help RHG, --data.help MNISTCleaning. --print_config shows all."
        )
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if args is None or isinstance(args, list):
            args = complete(sys.argv[1:] if args is None else args)
            self.config = parser.parse_args(args)
            self.run_name = self._name(args)
        else:
            self.config, self.run_name = parser.parse_object(args), "run"
        settings = self.config.get(self.config.get("subcommand"), {})
        if settings.get("ckpt_path") == "last":
            settings["ckpt_path"] = self._last(settings["trainer"])

    def _last(self, trainer: Any) -> str | None:
        """Returns the newest checkpoint of this config's runs; None, and training starts anew, where there is none.

        Raises:
            BilevelError: if there is none to evaluate.
        """
        root = Path(trainer["default_root_dir"]) / self.run_name
        given = trainer["callbacks"] if isinstance(trainer["callbacks"], list) else [trainer["callbacks"]]
        folders = [Path(args["dirpath"]) for c in given if c and (args := c.get("init_args", {})).get("dirpath")]
        found = newest([path for f in (*root.glob("version_*/checkpoints"), *folders) for path in f.glob("*.ckpt")])
        if found is None and self.config["subcommand"] != "fit":
            raise BilevelError(f"--ckpt_path last: there is no checkpoint in {root}/version_*/checkpoints.")
        rank_zero_info(f"--ckpt_path last: {found or f'no checkpoint in {root}, so the run begins'}")
        return None if found is None else str(found)

    @staticmethod
    def _name(args: list[str]) -> str:
        named = [value for option, value in itertools.pairwise(args) if option in ("--config", "-c")]
        if not named:
            return "run"
        path = Path(named[0]).resolve().with_suffix("")
        return path.relative_to(CONFIGS).as_posix() if path.is_relative_to(CONFIGS) else path.name

    @override
    def _parse_ckpt_path(self) -> None:
        """A checkpoint's settings are read before the user's (see `complete`), so that they never replace them."""

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        given = self._get(self.config, "data")
        if given is None or self.datamodule.hparams:
            return
        settings = given["init_args"].as_dict() if "init_args" in given else {}
        if plain(settings):  # a class of one's own need not say `save_hyperparameters` for them to be in checkpoints
            self.datamodule._set_hparams({"_class_path": given["class_path"], **settings})

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        if isinstance(self.model, BilevelModule):
            check_strategy(settings["strategy"])
        if settings["barebones"]:
            kwargs["log_every_n_steps"] = None  # nothing may be logged
        elif not settings["fast_dev_run"]:
            kwargs |= self._what_is_shown_and_kept(settings)
        return super().instantiate_trainer(**kwargs)

    def _what_is_shown_and_kept(self, settings: Any) -> dict[str, Any]:
        """Returns the loggers and callbacks of a run, whose folder can be written to.

        Raises:
            BilevelError: if it cannot.
        """
        root = Path(settings["default_root_dir"])
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            raise BilevelError(
                f"Cannot write to trainer.default_root_dir {root}: {error.strerror}. Name another."
            ) from error
        found: dict[str, Any] = {}
        if settings["logger"] in (None, True):
            tensorboard = TensorBoardLogger(str(root), self.run_name, self.version, default_hp_metric=False)
            found["logger"] = [tensorboard, CSVLogger(str(root), name=self.run_name, version=tensorboard.version)]
        given = settings["callbacks"] if isinstance(settings["callbacks"], list) else [settings["callbacks"]]
        given = [callback for callback in given if callback is not None]
        if settings["enable_progress_bar"] in (None, True) and not any(isinstance(c, ProgressBar) for c in given):
            given.append(TQDMProgressBar())
        return {**found, "callbacks": given}

    def before_fit(self) -> None:
        """Says where the run is written, and lets its settings count beside a checkpoint's."""
        self.trainer.callbacks.append(GivenSettings())  # type: ignore[attr-defined]
        if self.trainer.log_dir is not None:
            rank_zero_info(
                f"Logs, checkpoints and figures: {self.trainer.log_dir} (tensorboard --logdir {self.trainer.log_dir})"
            )

    def after_fit(self) -> None:
        """Tests episodic tasks, once, with the checkpoint that was best on validation episodes, or else the last y.

        What solves no bilevel problem is tested too, where model and data say how.
        """
        trainer, model = self.trainer, self.model
        quick = getattr(trainer, "fast_dev_run", False) or trainer.barebones
        if isinstance(model, BilevelModule):
            tested = not model.hooks.persistent_lower
        else:
            tested = is_overridden("test_step", model) and is_overridden("test_dataloader", self.datamodule)
        if not tested or trainer.interrupted or quick:
            return
        chosen: Any = trainer.checkpoint_callback
        best = "best" if getattr(chosen, "monitor", None) and chosen.best_model_path else None
        trainer.test(model, datamodule=self.datamodule, ckpt_path=best, verbose=not isinstance(model, BilevelModule))

    def after_predict(self) -> None:
        """Writes what the task predicts, a dictionary of columns, as ``predictions.csv`` beside the logs."""
        batches: Any = self.trainer.predict_loop.predictions
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # all processes agree on it
        if not self.trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "predictions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            for i, batch in enumerate(batches):
                columns = batch if isinstance(batch, dict) else {"output": batch}
                if i == 0:
                    writer.writerow(columns)
                writer.writerows(zip(*(c.tolist() for c in columns.values()), strict=True))
        rank_zero_info(f"Predictions: {folder / 'predictions.csv'}")


def _quiet() -> None:
    """Silences advertisements, and Lightning's warnings about its insides and about a run in a new folder."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # torch's own forward mode
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="The dirpath has changed from")


def start(cli: type[BilevelCLI], args: list[str] | None, **settings: Any) -> BilevelCLI:
    """Runs a command."""
    _quiet()
    restrict(sys.argv[1:] if args is None else args)
    raising: dict[str, Any] = {"exit_on_error": False}
    return cli(
        cli.accepted,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_defaults={
            "default_root_dir": "runs",
            "max_epochs": -1,
            "max_steps": 100,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
        },
        parser_kwargs={**raising, **{name: dict(raising) for name in cli.subcommands()}},
        args=args,
        **settings,
    )


def launch(cli: type[BilevelCLI], program: str, args: list[str] | None, **settings: Any) -> BilevelCLI:
    """Runs a command; ends the process with status 2 and one message where a person has to mend something."""
    try:
        return start(cli, args, **settings)
    except (ValueError, TypeError, KeyError, ImportError, MisconfigurationException, ArgumentError) as error:
        message = explain(error)
        if message is None:
            raise
        print(f"{program}: error: {message}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


@contextmanager
def silent() -> Iterator[None]:
    """Keeps Lightning from saying what it does, but for its errors."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class FitCLI(BilevelCLI):
    """The command line of ``bilevel-fit``, which also trains what solves no bilevel problem, such as `Retraining`."""

    accepted = LightningModule


def fit(args: list[str] | None = None) -> None:
    """Runs ``bilevel-fit``; ends the process with status 2 and one message where a person has to mend something.

    Args:
        args: arguments; None: those of the process.
    """
    launch(FitCLI, "bilevel-fit", args, save_config_kwargs={"overwrite": True})
