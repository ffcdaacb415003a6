"""``python -m bilevel_lightning`` is ``bilevel-fit``."""

from bilevel_lightning.cli import fit

if __name__ == "__main__":
    fit()
