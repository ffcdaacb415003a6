from types import SimpleNamespace

import pytest
import torch
from loops import trainer
from torch.utils._pytree import tree_flatten, tree_unflatten

from bilevel_lightning import BilevelError, Minibatches
from bilevel_lightning.datamodules import TwoLevelData


class Numbers(TwoLevelData):
    """23 lower samples and 10 upper ones: their numbers, and twice these."""

    def levels(self):
        return (torch.arange(23), 2 * torch.arange(23)), (torch.arange(10),)


def batches(data, draws, partitioned=False, rank=0, world=1):
    """The batches of an epoch that one process of several sees."""
    run = trainer(5)
    data.trainer = SimpleNamespace(
        strategy=run.strategy, global_rank=rank, world_size=world, fit_loop=run.fit_loop, overfit_batches=0,
        lightning_module=SimpleNamespace(minibatches=lambda k: draws, partitioned=partitioned),
    )  # fmt: skip
    return list(data.train_dataloader())


def test_sizes_are_multiples_of_the_batch_size_or_everything():
    (batch,) = batches(Numbers(4, 3, epoch_length=1), ([1, 3, 0], [2]))
    lower = batch["lower"]
    assert [len(part[0]) for part in lower] == [4, 12, 23]
    assert torch.equal(lower[2][0], torch.arange(23))
    assert all(torch.equal(2 * part[0], part[1]) for part in lower)
    assert len(batch["upper"][0]) == 6  # a single upper minibatch comes as it is
    assert "parts" not in batch


def test_a_multiple_is_several_draws():
    (one,) = batches(Numbers(4, 3, epoch_length=1), (4, 1))
    (two,) = batches(Numbers(4, 3, epoch_length=1), ([1, 3], 1))
    assert torch.equal(torch.cat([part[0] for part in one["lower"][1:]]), two["lower"][1][0])


def test_draws_of_one_iteration_differ():
    (batch,) = batches(Numbers(4, 3, epoch_length=1), ([3, 1, 1], 1))
    large, *small = (part[0] for part in batch["lower"])
    assert not any(torch.equal(part, large[i : i + 4]) for part in small for i in (0, 4, 8))
    assert not torch.equal(*small)


def test_a_level_without_batch_size_comes_whole():
    (batch,) = batches(Numbers(None, 3, epoch_length=1), (5, 2))
    assert torch.equal(batch["lower"][0], torch.arange(23))
    assert isinstance(batch["upper"], Minibatches)
    assert [len(part[0]) for part in batch["upper"]] == [3, 3]


def test_parts_of_a_partition():
    data = Numbers(4, None, epoch_length=2000)
    assert data.parts() == {"lower": 6, "upper": 1}
    seen, drawn = {}, torch.zeros(6)
    for batch in batches(data, (1, 1), partitioned=True):
        (number,), shares = batch["parts"]["lower"]
        assert list(batch["parts"]) == ["lower"]
        samples = batch["lower"][0][0]
        assert torch.equal(seen.setdefault(number, samples), samples)
        assert shares[number] == len(samples) / 23
        drawn[number] += 1
    assert sorted(torch.cat([*seen.values()]).tolist()) == list(range(23))
    assert sorted(len(samples) for samples in seen.values()) == [3, 4, 4, 4, 4, 4]
    expected = 2000 * torch.tensor(shares)
    assert (drawn - expected).abs().max() < 5 * 18  # 18: the standard deviation of a count


def test_processes_share_each_minibatch():
    whole = batches(Numbers(4, 3, epoch_length=3), ([1, 2, 0], 1))
    halves = [batches(Numbers(4, 2, epoch_length=3), ([1, 2, 0], 1), rank=rank, world=2) for rank in (0, 1)]
    for k in range(3):
        for i in range(3):
            parts = [half[k]["lower"][i][0] for half in halves]
            assert len(parts[0]) == len(parts[1])
            want = whole[k]["lower"][i][0][: len(parts[0]) * 2]
            assert sorted(torch.cat(parts).tolist()) == sorted(want.tolist())


def test_minibatches_are_nested_data():
    values = {"lower": Minibatches([torch.zeros(2), torch.ones(3)])}
    leaves, spec = tree_flatten(values)
    assert [len(leaf) for leaf in leaves] == [2, 3]
    assert isinstance(tree_unflatten(leaves, spec)["lower"], Minibatches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lower_batch_size": 0}, "data.lower_batch_size must be at least 1, got 0"),
        ({"epoch_length": 0}, "data.epoch_length must be at least 1, got 0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BilevelError, match=message):
        Numbers(**settings)


def test_batch_sizes_must_fit_the_samples_and_the_processes():
    with pytest.raises(
        BilevelError, match="data.upper_batch_size=11 is more than the 10 samples of its level; lower it"
    ):
        batches(Numbers(4, 11), (1, 1))
    with pytest.raises(BilevelError, match="data.upper_batch_size=1 is less than the 2 processes that share it"):
        batches(Numbers(4, 1), (1, 1), world=2)
