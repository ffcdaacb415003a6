import pytest
from loops import trainer
from problems import ScalarStronglyConvex

from bilevel_lightning import RHG, BilevelError
from bilevel_lightning.binding import size, split
from bilevel_lightning.datamodules import NoData
from bilevel_lightning.module import ORACLES


class Recorded(NoData):
    """Keeps the numbers of the batches that were asked for."""

    def __init__(self, iterations):
        super().__init__(iterations)
        self.numbers = []

    def train_dataloader(self):
        loader = super().train_dataloader()
        original = loader.batch

        def batch(k):
            self.numbers.append(k)
            return original(k)

        loader.batch = batch
        return loader


def test_batches_are_empty_but_not_skipped():
    batch = NoData().batch(0)
    assert split(batch) == ((), ())
    assert size(split(batch)[0]) == 0
    module, data = RHG(task=ScalarStronglyConvex()), Recorded(4)
    loop = trainer(10)
    loop.fit(module, datamodule=data)
    assert loop.global_step == 10
    assert data.numbers[:10] == list(range(10))
    assert dict(zip(ORACLES, module.oracles.tolist(), strict=True))["samples"] == 0


def test_validation_runs_after_each_epoch():
    loop = trainer(8)
    loop.fit(RHG(task=ScalarStronglyConvex()), datamodule=NoData(iterations=4))
    assert loop.val_dataloaders is not None
    before = float(loop.callback_metrics["val/upper_loss"])
    loop.validate(loop.lightning_module, datamodule=loop.datamodule, verbose=False)
    assert float(loop.callback_metrics["val/upper_loss"]) == before
    loop.test(loop.lightning_module, datamodule=loop.datamodule, verbose=False)
    assert float(loop.callback_metrics["test/upper_loss"]) == before


@pytest.mark.parametrize("stop", [7, 10])
def test_a_resumed_run_goes_on_with_the_next_number(stop, tmp_path):
    """Stopped in the middle of an epoch and at its end; the second run ends at the x of an uninterrupted one."""
    whole = RHG(task=ScalarStronglyConvex())
    trainer(13).fit(whole, datamodule=NoData(iterations=10))
    first, module = Recorded(10), RHG(task=ScalarStronglyConvex())
    loop = trainer(stop)
    loop.fit(module, datamodule=first)
    loop.save_checkpoint(tmp_path / "stopped.ckpt")
    second, resumed = Recorded(10), RHG(task=ScalarStronglyConvex())
    loop = trainer(13)
    loop.fit(resumed, datamodule=second, ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert first.numbers[:stop] == list(range(stop))
    assert second.numbers[: 13 - stop] == list(range(stop, 13))
    assert loop.global_step == 13
    assert resumed.task.upper.x.item() == whole.task.upper.x.item()


@pytest.mark.parametrize("iterations", [0, -3])
def test_wrong_settings(iterations):
    with pytest.raises(BilevelError, match=r"data.iterations must be a positive number"):
        NoData(iterations)
