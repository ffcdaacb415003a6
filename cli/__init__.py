"""The command line."""

from bilevel_lightning.cli.main import BilevelCLI, fit, shipped_configs

__all__ = ["BilevelCLI", "fit", "shipped_configs"]
