"""Hypergradients dF/dx of F(x) = f(x, y(x)), where y(x) is what the lower dynamics reach."""

from bilevel_lightning.hypergradients.unrolled import reverse

__all__ = ["reverse"]
