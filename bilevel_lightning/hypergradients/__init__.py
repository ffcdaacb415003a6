"""Hypergradients dF/dx of F(x) = f(x, y(x)), where y(x) is what the lower dynamics reach, or their resting point."""

from bilevel_lightning.hypergradients.forward import forward, random_forward, slopes
from bilevel_lightning.hypergradients.implicit import LinearSystemWarning, implicit
from bilevel_lightning.hypergradients.unrolled import differentiate, first_order, reverse
from bilevel_lightning.hypergradients.zeroth_order import zeroth_order

__all__ = [
    "LinearSystemWarning",
    "differentiate",
    "first_order",
    "forward",
    "implicit",
    "random_forward",
    "reverse",
    "slopes",
    "zeroth_order",
]
