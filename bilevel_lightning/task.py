"""What a user writes to state a bilevel problem: two losses over two groups of parameters."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from pytorch_lightning import Callback, LightningDataModule
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from bilevel_lightning import tree
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.tree import Params

Draws: TypeAlias = int | Sequence[int]
"""How many minibatches, or the size of each in batch sizes, 0 for all samples."""


class Minibatches(list[Any]):
    """Several minibatches of one level in one upper iteration.

    Lower step ``t`` uses entry ``t mod len``; the upper loss is the mean over the upper entries.
    """


register_pytree_node(
    Minibatches,
    lambda parts: (list(parts), None),
    lambda parts, _: Minibatches(parts),
    serialized_type_name="bilevel_lightning.Minibatches",
)


class Bilevel:
    r"""The members that state ``min_x f(x, y*(x))  s.t.  y*(x) in argmin_y g(x, y)``.

    They can be defined on a `BilevelTask`, which any algorithm accepts as ``task=``, or on a subclass of an
    algorithm. Losses are plain PyTorch that reads parameters through ``self.upper`` and ``self.lower``; the engine
    evaluates them at other values by swapping the parameters (`torch.func.functional_call`).

    Attributes:
        upper: module whose trainable parameters are the upper variables x.
        lower: module whose trainable parameters are the lower variables y.
        persistent_lower: True (default): one y for the whole run, shared by all processes. False: y is solved anew
            for each episode, from `episode_lower`.
        stored_lowers: number N of episodes whose y the task stores (`keep_lower`). What an algorithm keeps beside y
            (twins, solutions of linear systems) is then kept N times too, and read and written at `stored_row`. Methods
            that step y once in an upper iteration need that where y does not persist. Default 0: none.
    """

    upper: nn.Module
    lower: nn.Module
    persistent_lower: bool = True
    stored_lowers: int = 0

    def upper_loss(self, batch: Any) -> Tensor:
        """Returns f(x, y), a scalar, on the upper part of a batch."""
        raise BilevelError(f"{type(self).__name__} does not define upper_loss(batch); pass task=... or define it.")

    def lower_loss(self, batch: Any) -> Tensor:
        """Returns g(x, y), a scalar, on the lower part of a batch (one minibatch).

        Default, where `fixed_point_map` is defined: half the squared residual ``|Phi(x, y) - y|^2 / 2``.
        """
        if type(self).fixed_point_map is not Bilevel.fixed_point_map:
            image = self.fixed_point_map(batch)
            residuals = [(image[name] - p).square().sum() for name, p in self.lower.named_parameters()]
            return 0.5 * torch.stack(residuals).sum()
        raise BilevelError(f"{type(self).__name__} does not define lower_loss(batch); pass task=... or define it.")

    def initial_lower(self, upper: Params) -> Params:
        """Returns y_0(x) by the names of ``self.lower``; default: the current y. MAML returns ``upper`` itself."""
        return tree.of(self.lower)

    def episode_lower(self, upper: Params, episode: Any) -> Params:
        """Returns y_0 of one episode, where y does not persist; default: `initial_lower`, equal for all episodes.

        For a y that has one row for each sample of the episode (equilibrium models), and for stored solutions
        (`keep_lower`). Only its values are used: where derivatives flow through y_0(x), it is `initial_lower`'s. It is
        also called at validation and test, when ``self.training`` is false.
        """
        return self.initial_lower(upper)

    def keep_lower(self, episode: Any, lower: Params) -> None:
        """Called after an upper iteration with each episode and its solved y, where y does not persist.

        A task that stores y for the next visit of the same data writes it into a buffer, so that it lies in the
        checkpoint. Default: nothing.
        """

    def stored_row(self, episode: Any) -> Tensor:
        """Returns which of the ``stored_lowers`` an episode's y is: an integer, or one for each of those in a stack."""
        raise BilevelError(f"{type(self).__name__} stores lower variables and does not define stored_row(episode).")

    def episodes(self, batch: Any) -> Sequence[Any]:
        """Splits a batch into independent lower problems, whose hypergradients are averaged; default: one."""
        return [batch]

    def at_lower_step(self, t: int) -> None:
        """Called before g is evaluated for lower step ``t``, and with the number of steps taken before f is.

        For layers that differ from step to step, such as the batch normalisation of MAML++. Where f is evaluated at
        several iterates after all steps were taken (MAML's ``multi_step``, IAPTT-GM), it is called with their number T.
        Default: nothing.
        """

    def prepare(self, batch: Any) -> Any:
        """Returns the batch with whatever depends on x but not on y computed once per upper iteration.

        Tensors that require gradients in the result (such as a backbone's features) become upper variables of that
        problem, and their gradient is pulled back to x with one vector-Jacobian product, so every algorithm stays
        exact. Neither this nor the pull-back counts as an oracle, also where it evaluates a network.
        """
        return batch

    def project_upper(self, upper: Params) -> Params:
        """Projects x on its feasible set after each upper step; default: none."""
        return upper

    def project_lower(self, upper: Params, lower: Params) -> Params:
        """Projects y on its feasible set after each lower step; default: none."""
        return lower

    def prox_lower(self, upper: Params, lower: Params, step: float | Tensor) -> Params:
        """Proximal map of a nonsmooth lower term with step size ``step``; default: `project_lower`."""
        return self.project_lower(upper, lower)

    def nonsmooth_lower(self, upper: Params, lower: Params) -> Tensor:
        """Returns the nonsmooth lower term h(x, y) whose proximal map `prox_lower` is; default: none.

        `lower_loss` is then the smooth part of the lower level alone. Methods that compare lower values (V-PBGD, MEHA)
        need h and its derivative in x; a projection needs none, since h is zero on the feasible set.
        """
        raise BilevelError(f"{type(self).__name__} does not define nonsmooth_lower(upper, lower).")

    def fixed_point_map(self, batch: Any) -> Params:
        """Returns Phi(x, y), the next y, for `dynamics.FixedPoint` (equilibrium models)."""
        raise BilevelError(f"{type(self).__name__} does not define fixed_point_map(batch), which FixedPoint needs.")

    def metrics(self, batch: Any) -> dict[str, Tensor]:
        """Returns scalars to log at validation and test, ``val/...`` and ``test/...``, at the solved y; default: none.

        Args:
            batch: what the data module's ``val_dataloader`` or ``test_dataloader`` gives; where y does not persist, one
                of its `episodes`, both levels included. `upper_loss`, which is logged besides, gets the upper part of
                a dictionary with two levels, and all of any other batch.
        """
        return {}

    def predict(self, batch: Any) -> Any:
        """Returns what ``bilevel-fit predict`` gives for a batch; default: the lower module's output."""
        return self.lower(batch)

    def check_data(self, datamodule: LightningDataModule) -> None:
        """Called before a run, after the data are set up: raise `BilevelError` if they do not fit; default: nothing."""

    def callbacks(self) -> list[Callback]:
        """Returns the figures and reports of this task; a callback of the same class in the trainer replaces one."""
        return []


class BilevelTask(Bilevel, nn.Module):
    """A bilevel problem that any algorithm can solve: subclass, set ``upper`` and ``lower``, define the two losses."""
