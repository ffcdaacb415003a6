"""The command line."""

from bilevel_lightning.cli.arguments import shipped_configs
from bilevel_lightning.cli.check import check
from bilevel_lightning.cli.main import BilevelCLI, fit
from bilevel_lightning.cli.plot import plot
from bilevel_lightning.cli.search import search

__all__ = ["BilevelCLI", "check", "fit", "plot", "search", "shipped_configs"]
