"""The command line."""

from bilevel_lightning.cli.arguments import shipped_configs
from bilevel_lightning.cli.check import check
from bilevel_lightning.cli.main import BilevelCLI, fit

__all__ = ["BilevelCLI", "check", "fit", "shipped_configs"]
