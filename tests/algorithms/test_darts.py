"""DARTS: what its dynamics see over a run."""

import pytest
import torch
from problems import Quadratic
from pytorch_lightning import Trainer

from bilevel_lightning import DARTS, GradientDescent, Momentum, tree
from bilevel_lightning.datamodules import NoData
from bilevel_lightning.schedules import InverseTime

RATE = InverseTime(0.2, 3.0)


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("dynamics", [GradientDescent(RATE), Momentum(RATE, 0.5)])
def test_schedules_count_through_the_run_where_y_goes_on(dynamics, warm_start, tmp_path):
    task = Quadratic()
    x, y = task.upper.x.detach().clone(), task.y().detach()
    factor = getattr(dynamics, "momentum", 0.0)
    module = DARTS(
        task=task,
        dynamics=dynamics,
        lower_steps=2,
        warm_start=warm_start,
        upper_optimizer=lambda p: torch.optim.SGD(p, lr=1e-12),
    )
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", max_steps=3, max_epochs=-1, precision="64-true", default_root_dir=tmp_path, **off).fit(
        module, NoData(iterations=3)
    )
    memory = torch.zeros_like(y)
    for t in range(6) if warm_start else range(2):
        memory = factor * memory + task.A @ y - task.B @ x
        y = y - RATE(t) * memory
    torch.testing.assert_close(torch.cat([p.flatten() for p in tree.of(task.lower).values()]), y, rtol=1e-9, atol=0)
