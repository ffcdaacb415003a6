"""``bilevel-check``: says whether the hypergradient of what a config describes can be trusted."""

import sys
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from rich.console import Console
from typing_extensions import override

from bilevel_lightning import diagnosis
from bilevel_lightning.cli.arguments import DEFAULT, shipped_configs
from bilevel_lightning.cli.main import BilevelCLI, launch, silent
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.module import BilevelModule

DESCRIPTION = (
    "Compares the hypergradient at the first iteration, or at that of --ckpt_path, with finite differences and with "
    "that of a lower level solved by many steps; says in words whether it can be trusted, and which T and K would do. "
    "Nothing is trained or written. The arguments are those of bilevel-fit: --config takes a file or a shipped config: "
    f"{', '.join(shipped_configs())} (default: {DEFAULT}). Exit status: 0 trusted, 1 not, 2 wrong arguments."
)


class CheckCLI(BilevelCLI):
    """The command line of ``bilevel-fit`` with a run that ends in the check of its first batch."""

    report: diagnosis.Report | None = None

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"]}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_function_arguments(diagnosis.check, "check", skip={"module", "batch"})

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        command = self._subcommand_parsers["fit"]
        command.prog, command.description = "bilevel-check", DESCRIPTION
        super().parse_arguments(parser, args)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        one = {"devices": 1, "num_nodes": 1, "strategy": "auto", "max_steps": -1, "max_epochs": -1, "max_time": None}
        off = {"callbacks": None, "profiler": None, "fast_dev_run": False, "barebones": False, "limit_val_batches": 0}
        if torch.backends.mps.is_available():
            one["accelerator"] = "cpu"  # MPS has no float64
        return LightningCLI.instantiate_trainer(self, **{**silent, **one, **off})

    @override
    def before_fit(self) -> None:
        """Nothing is written, so there is nothing to say."""

    def fit(self, model: BilevelModule, **settings: Any) -> None:
        """Starts a run as ``bilevel-fit`` does, and ends it with the check of its first batch."""
        options = self._get(self.config, "check")

        def look(batch: Any, batch_idx: int) -> int:
            self.report = diagnosis.check(model, batch, **options)
            self.trainer.should_stop = True
            return -1

        model.on_train_batch_start, model.configure_callbacks = look, list  # type: ignore[assignment,method-assign]
        self.trainer.fit(model, **settings)
        if self.report is None:
            raise BilevelError("The data module gives no training batch to check.")


def check(args: list[str] | None = None) -> None:
    """Runs ``bilevel-check``; ends the process with status 0 (trusted), 1 (not) or 2 (a person has to mend something).

    Args:
        args: arguments; None: those of the process.
    """
    console = Console(highlight=False)
    with silent(), console.status("The longest part takes --check.reference_steps lower steps."):
        words = ["fit", *(sys.argv[1:] if args is None else args)]
        cli: Any = launch(CheckCLI, "bilevel-check", words, save_config_callback=None)
    console.print(cli.report.table())
    for sentence in cli.report.words():
        console.print(sentence, markup=False)
    sys.exit(0 if cli.report.trusted else 1)
