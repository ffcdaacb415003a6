import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from loops import Batches, fit, trainer
from problems import Quadratic
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import FSDPStrategy

from bilevel_lightning import RHG, BilevelError
from bilevel_lightning.callbacks import SaveEvery
from bilevel_lightning.checkpoints import AtomicCheckpointIO

KILLED = """
import os, signal, sys
import torch
from bilevel_lightning.checkpoints import AtomicCheckpointIO

io, path = AtomicCheckpointIO(), sys.argv[1]
io.save_checkpoint({"values": torch.ones(1000)}, path)
save = torch.save

def half(checkpoint, file):
    save(checkpoint, file)
    file.flush()
    file.truncate(2000)
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
io.save_checkpoint({"values": torch.zeros(1000)}, path)
"""


def test_a_kill_during_a_write_leaves_the_file_before(tmp_path):
    path = tmp_path / "run.ckpt"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["values"].sum() == 1000
    assert {p.name for p in tmp_path.iterdir()} == {"run.ckpt", ".run.ckpt.unfinished"}
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / ".run.ckpt.unfinished", weights_only=True)
    AtomicCheckpointIO().save_checkpoint({"values": torch.zeros(1000)}, path)
    assert torch.load(path, weights_only=True)["values"].sum() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]


def test_a_write_that_fails_leaves_the_file_before_and_nothing_else(tmp_path, monkeypatch):
    def full(checkpoint, file):
        file.write(b"half")
        raise OSError("No space left on device")

    path = tmp_path / "folder" / "run.ckpt"
    AtomicCheckpointIO().save_checkpoint({"values": 1}, str(path))
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"values": 2}, str(path))
    assert torch.load(path, weights_only=True) == {"values": 1}
    assert [p.name for p in path.parent.iterdir()] == ["run.ckpt"]


def test_every_run_writes_so(tmp_path):
    run = fit(RHG(task=Quadratic()), 2, folder=tmp_path, enable_checkpointing=True)
    assert type(run.strategy.checkpoint_io) is AtomicCheckpointIO
    assert len([*tmp_path.rglob("*.ckpt")]) == 1


class Clock(Callback):
    """Each upper iteration takes 25 seconds."""

    def __init__(self, monkeypatch):
        self.now, self.saved = 0.0, []
        monkeypatch.setattr("bilevel_lightning.callbacks.saving.time.monotonic", lambda: self.now)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.now += 25

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.saved.append((trainer.global_step, checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]))


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    fit(RHG(task=Quadratic()), 11, folder=tmp_path, callbacks=[clock, SaveEvery(60)])
    assert [step for step, _ in clock.saved] == [3, 6, 9]  # 75, 150 and 225 seconds
    assert [p.name for p in tmp_path.rglob("*.ckpt")] == ["latest.ckpt"]
    state = torch.load(tmp_path / "checkpoints" / "latest.ckpt", weights_only=True)
    assert state["global_step"] == 9


def test_checkpoints_by_the_clock_lie_with_the_others(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    callbacks = [clock, SaveEvery(60), ModelCheckpoint(tmp_path / "mine", filename="best")]
    fit(RHG(task=Quadratic()), 4, folder=tmp_path, callbacks=callbacks, enable_checkpointing=True)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.ckpt")} == {"mine/latest.ckpt", "mine/best.ckpt"}


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_all_digits_come_back(tmp_path, precision):
    """Also where the module is made in float32 and Lightning makes it float64 for the run."""

    class Cast(Quadratic):
        def __init__(self):
            super().__init__()
            self.float()
            self.constants = [self.A, self.B, self.c]

        def upper_loss(self, batch):
            self.A, self.B, self.c = (t.to(self.upper.x.dtype) for t in self.constants)
            return super().upper_loss(batch)

        def lower_loss(self, batch):
            self.A, self.B, self.c = (t.to(self.upper.x.dtype) for t in self.constants)
            return super().lower_loss(batch)

    run, first = trainer(3, precision=precision), RHG(task=Cast())
    run.fit(first, Batches(9))
    run.save_checkpoint(tmp_path / "run.ckpt")
    second = RHG.load_from_checkpoint(tmp_path / "run.ckpt", task=Cast())
    third = RHG(task=Cast())
    trainer(3, precision=precision).fit(third, Batches(9), ckpt_path=tmp_path / "run.ckpt")
    for name, value in first.state_dict().items():
        assert value.dtype in (torch.int64, torch.float64 if precision == "64-true" else torch.float32)
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, third.state_dict()[name])


def test_a_setting_of_lightning_that_does_nothing_is_refused(tmp_path):
    callback = ModelCheckpoint(tmp_path, train_time_interval=timedelta(seconds=1))
    with pytest.raises(BilevelError) as error:
        fit(RHG(task=Quadratic()), 1, callbacks=[callback], enable_checkpointing=True)
    assert str(error.value) == (
        "ModelCheckpoint.train_time_interval does nothing in manual optimization: use the callback SaveEvery(seconds) "
        "instead."
    )


def test_strategies_that_part_the_parameters_are_refused():
    module, run = RHG(task=Quadratic()), trainer(1)
    strategy = FSDPStrategy()
    strategy._lightning_module = module
    run._accelerator_connector.strategy = strategy
    module.trainer = run
    with pytest.raises(BilevelError) as error:
        module.setup("fit")
    assert str(error.value) == (
        "FSDPStrategy keeps a part of the parameters on each process, and hypergradients read all of them: set "
        "trainer.strategy to ddp, or for a method of first derivatives to sharded, which divides y alone."
    )


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_seconds_are_positive(seconds):
    with pytest.raises(BilevelError, match=f"SaveEvery.seconds must be a positive number, got {seconds}."):
        SaveEvery(seconds)
