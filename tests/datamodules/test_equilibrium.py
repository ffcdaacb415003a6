"""Minibatches with the numbers of their samples, and evaluations in chunks."""

import files
import pytest
import torch
from loops import trainer

from bilevel_lightning import BilevelError
from bilevel_lightning.datamodules import DigitsEquilibrium, MNISTEquilibrium


def loaded(data, rank=0, world=1):
    """The data module, set up in a process of some rank."""
    data.prepare_data()
    data.setup()
    data.trainer = Process(trainer(1), rank, world)
    return data


class Process:
    """A trainer in one of several processes."""

    overfit_batches = 0

    def __init__(self, run, rank, world):
        self.strategy, self.fit_loop, self.global_rank, self.world_size = run.strategy, run.fit_loop, rank, world


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own():
    data = loaded(DigitsEquilibrium(epoch_length=20))
    batches = list(data.train_dataloader())
    orders = [torch.cat([b["lower"][1] for b in batches[i : i + 10]]) for i in (0, 10)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(*orders)
    images, index = batches[3]["lower"]
    assert images.shape == (100, 1, 8, 8)
    assert torch.equal(images * 16, data.train[0][index].float())
    assert torch.equal(batches[3]["upper"], data.train[1][index])
    other = next(iter(loaded(DigitsEquilibrium(seed=1)).train_dataloader()))
    assert not torch.equal(other["lower"][1], batches[0]["lower"][1])


def test_batches_go_on_where_a_run_was_left():
    data = loaded(DigitsEquilibrium(epoch_length=14))
    want = list(data.train_dataloader())[12]
    data.trainer.fit_loop.epoch_loop.batch_progress.total.ready = 12
    assert torch.equal(next(iter(data.train_dataloader()))["lower"][1], want["lower"][1])


def test_processes_share_a_minibatch_and_an_evaluation():
    make = lambda rank, world: loaded(DigitsEquilibrium(batch_size=101, evaluation_batch_size=70), rank, world)
    one, parts = make(0, 1), [make(rank, 2) for rank in range(2)]
    whole = next(iter(one.train_dataloader()))["lower"][1]
    halves = [next(iter(p.train_dataloader()))["lower"][1] for p in parts]
    assert torch.equal(torch.stack(halves, 1).flatten(), whole[:100])
    index = [torch.cat([b["lower"][1] for b in p.val_dataloader()]) for p in parts]
    assert torch.equal(torch.cat(index).sort().values, torch.arange(297))
    assert [len(b["upper"]) for b in parts[0].val_dataloader()] == [70, 70, 9]


def test_splits_do_not_overlap():
    data = loaded(DigitsEquilibrium())
    assert [len(part[0]) for part in (data.train, data.val, data.test)] == [1000, 297, 500]
    held, used = ({t.numpy().tobytes() for t in part[0]} for part in (data.val, data.train))
    assert len(held & used) == 0
    everything = loaded(DigitsEquilibrium(val_samples=0))
    assert everything.train_samples == 1297
    assert torch.equal(everything.val[0], everything.train[0])  # all of them, being less than 10,000


def test_mnist_files(tmp_path):
    files.mnist(tmp_path)
    data = loaded(MNISTEquilibrium(str(tmp_path), batch_size=50, val_samples=20))
    assert data.train_samples == 100
    batch = next(iter(data.train_dataloader()))
    assert batch["lower"][0].shape == (50, 1, 28, 28)
    assert 0.9 < batch["lower"][0].max() <= 1
    assert sum(len(b["upper"]) for b in data.test_dataloader()) == 40


@pytest.mark.data
def test_mnist(real_data):
    data = loaded(MNISTEquilibrium(str(real_data("mnist")), download=False))
    assert [len(part[0]) for part in (data.train, data.val, data.test)] == [50_000, 10_000, 10_000]
    assert data.test[1][:5].tolist() == [7, 2, 1, 0, 4]


def test_errors(tmp_path):
    with pytest.raises(BilevelError, match="which are no minibatch of data.batch_size=100"):
        loaded(DigitsEquilibrium(val_samples=1200))
    with pytest.raises(BilevelError, match="less than the 2 processes"):
        loaded(DigitsEquilibrium(batch_size=1), 0, 2).train_dataloader()
    with pytest.raises(BilevelError, match="val_samples must not be negative"):
        DigitsEquilibrium(val_samples=-1)
    with pytest.raises(BilevelError, match="batch_size"):
        DigitsEquilibrium(batch_size=0)
    with pytest.raises(BilevelError, match="BILEVEL_DATA_DIR"):
        loaded(MNISTEquilibrium(str(tmp_path), download=False))
