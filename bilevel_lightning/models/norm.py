"""Normalisation of few-shot networks, and what it remembers from one evaluation to the next."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive

Norm = Literal["group", "transductive", "frozen", "per_step", "none"]
"""Modes of `normalization`."""


def normalization(norm: Norm, channels: int, steps: int = 1, owner: str = "normalization") -> nn.Module:
    """Returns a normalisation layer for maps of shape ``(batch, channels, height, width)``.

    ``group``: group normalisation, 8 channels a group; a function of one image. Yuxin Wu, Kaiming He. Group
    Normalization. ECCV 2018.

    ``transductive``: batch normalisation by the mean and variance of the batch at hand, in evaluation too; it remembers
    nothing. Predictions on a query set depend on the whole set. Published results of MAML and its relatives are of
    this mode. Sergey Ioffe, Christian Szegedy. Batch Normalization. ICML 2015.

    ``frozen``: batch normalisation by the batch in training mode, and by running statistics in evaluation mode.
    `BilevelModule` advances them once in an upper iteration; evaluation reads them and never changes them.

    ``per_step``: the same with own statistics and own affine parameters for each lower step, `PerStepBatchNorm2d`.

    ``none``: no normalisation.

    Args:
        norm: the mode.
        channels: channels of the maps; with ``group`` a multiple of 8.
        steps: sets of statistics, of ``per_step`` only.
        owner: class that error messages name.

    Raises:
        BilevelError: for a mode that does not exist, or an impossible number of channels or steps.
    """
    positive(f"{owner}.width", channels)
    positive(f"{owner}.steps", steps)
    if norm == "group" and channels % 8:
        raise BilevelError(
            f"{owner}.width must be a multiple of 8, got {channels}: group normalisation has 8 channels a group. "
            "Change the width, or set norm to transductive."
        )
    if norm == "group":
        return nn.GroupNorm(channels // 8, channels)
    if norm == "transductive":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    if norm == "frozen":
        return nn.BatchNorm2d(channels)
    if norm == "per_step":
        return PerStepBatchNorm2d(channels, steps)
    if norm == "none":
        return nn.Identity()
    raise BilevelError(f"{owner}.norm must be one of {', '.join(get_args(Norm))}, got {norm!r}.")


class PerStepBatchNorm2d(_NormBase):
    r"""Batch normalisation with own running statistics and affine parameters for each lower step (MAML++).

    At lower step t, for channel c,

    .. math:: z_c = \gamma_{tc} \, (a_c - \mu_c) / \sqrt{\sigma_c^2 + \epsilon} + \beta_{tc},

    where :math:`\mu_c, \sigma_c^2` are, in training mode, mean and (biased) variance of the batch, which also move the
    running statistics of step t, ``running <- (1 - momentum) running + momentum batch`` (variance: unbiased); in
    evaluation mode they are the running statistics of step t. With ``steps=1`` it is `torch.nn.BatchNorm2d`.

    The paper's published code normalises by the batch in evaluation too; that is mode ``transductive`` but for the
    separate affine parameters.

    Args:
        channels: channels C of the maps, shape ``(batch, C, height, width)``.
        steps: sets S of statistics and parameters. With T lower steps, T + 1 give the upper loss a set of its own; with
            T it shares that of the last lower step, as in the paper's code.
        eps: added to variances. Default 1e-5, torch's.
        momentum: share of the batch in new running statistics. Default 0.1, torch's and the paper's.

    Attributes:
        lower_step: t, a plain number that is set from outside: 0..T-1 in the lower loss, T in the upper loss. Beyond
            the last set, the last is used. Default 0.
        weight: gamma, shape ``(S, C)``, ones at first.
        bias: beta, shape ``(S, C)``, zeros at first.
        running_mean: shape ``(S, C)``, zeros at first.
        running_var: shape ``(S, C)``, ones at first.
        num_batches_tracked: how many batches the statistics have seen, shape ``(S,)``.

    References:
        Antreas Antoniou, Harrison Edwards, Amos Storkey. How to train your MAML. ICLR 2019.
    """

    def __init__(self, channels: int, steps: int = 1, eps: float = 1e-5, momentum: float = 0.1) -> None:
        positive("PerStepBatchNorm2d.steps", steps)
        super().__init__(channels, eps, momentum)
        self.steps, self.lower_step = steps, 0
        self.weight = nn.Parameter(torch.ones(steps, channels))
        self.bias = nn.Parameter(torch.zeros(steps, channels))
        self.running_mean = torch.zeros(steps, channels)
        self.running_var = torch.ones(steps, channels)
        self.num_batches_tracked = torch.zeros(steps, dtype=torch.long)

    @override
    def forward(self, maps: Tensor) -> Tensor:
        """Returns the normalised maps, of the same shape."""
        t = min(self.lower_step, self.steps - 1)
        mean, var = self.get_buffer("running_mean")[t], self.get_buffer("running_var")[t]
        if self.training and self.track_running_stats:
            self.get_buffer("num_batches_tracked")[t] += 1
        known = self.track_running_stats or not self.training  # as in BatchNorm2d; without, `vmap` can map it
        return functional.batch_norm(
            maps,
            mean if known else None,
            var if known else None,
            self.weight[t],
            self.bias[t],
            self.training,
            self.momentum or 0.0,
            self.eps,
        )

    @override
    def extra_repr(self) -> str:
        return f"{self.num_features}, steps={self.steps}, eps={self.eps}, momentum={self.momentum}"
