import files
import pytest
import torch
from loops import trainer

from bilevel_lightning import BilevelError, Minibatches
from bilevel_lightning.datamodules import CIFAR10Poisoning, DigitsPoisoning, MNISTPoisoning


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def shares(labels):
    return torch.bincount(labels, minlength=10) / len(labels)


def test_digits_are_split_with_equal_shares_of_each_class():
    data = ready(DigitsPoisoning())
    parts = {"train": data.train, "poisoned": data.poisoned, "val": data.val, "test": data.test}
    assert {name: len(part[1]) for name, part in parts.items()} == {
        "train": 1010,
        "poisoned": 202,
        "val": 337,
        "test": 450,
    }
    whole = shares(torch.cat([data.train[1], data.val[1], data.test[1]]))
    for part in parts.values():
        assert float((shares(part[1]) - whole).abs().max()) < 0.5 / len(part[1]) + 1e-3
        assert part[0].shape[1:] == (1, 8, 8)
        assert 0 <= float(part[0].min()) < float(part[0].max()) <= 1
    everything = torch.cat([part[0].flatten(1) for part in (data.train, data.val, data.test)])
    assert len(torch.unique(everything, dim=0)) == len(everything) == 1797


def test_poisoned_images_are_the_first_and_have_numbers():
    data = ready(DigitsPoisoning())
    assert torch.equal(data.train[2][:202], torch.arange(202))
    assert (data.train[2][202:] == -1).all()
    for whole, part in zip(data.train, data.poisoned, strict=True):
        assert torch.equal(whole[:202], part)
    (batch,) = data.val_dataloader()
    assert torch.equal(batch["lower"][0], data.poisoned[0])
    assert torch.equal(batch["upper"][1], data.val[1])
    (batch,) = data.test_dataloader()
    assert torch.equal(batch["upper"][0], data.test[0])
    (batch,) = data.predict_dataloader()
    assert torch.equal(batch[2], torch.arange(202))


def test_splits_are_functions_of_the_seed():
    data, same, other = (ready(DigitsPoisoning(seed=seed)) for seed in (1, 1, 2))
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(data, name)[0], getattr(same, name)[0])
        assert not torch.equal(getattr(data, name)[0], getattr(other, name)[0])


def test_fewer_samples_and_other_shares():
    data = ready(DigitsPoisoning(samples=200, val_share=0.4, poisoned_share=0.5))
    assert [len(part[1]) for part in (data.train, data.poisoned, data.val, data.test)] == [120, 60, 80, 450]
    assert len(ready(DigitsPoisoning(samples=1347)).train[1]) == 1010


def test_minibatches_hold_both_kinds():
    data = ready(DigitsPoisoning(lower_batch_size=50, epoch_length=3))
    run = trainer(3)

    class Module:
        def minibatches(self, k):
            return [1, 1, 4], 1

    run.strategy._lightning_module = Module()
    data.trainer = run
    seen = list(data.train_dataloader())
    assert len(seen) == 3
    for batch in seen:
        assert isinstance(batch["lower"], Minibatches)
        assert [len(part[2]) for part in batch["lower"]] == [50, 50, 200]
        for images, labels, index in batch["lower"]:
            assert 0 < int((index >= 0).sum()) < len(index)
            for image, label, i in zip(images, labels, index.tolist(), strict=True):
                if i >= 0:
                    assert torch.equal(image, data.train[0][i])
                    assert label == data.train[1][i]
        assert len(batch["upper"][1]) == 337


def test_mnist_and_cifar_files(tmp_path):
    data = ready(MNISTPoisoning(root=str(files.mnist(tmp_path)), poisoned_share=0.5))
    assert [len(part[1]) for part in (data.train, data.poisoned, data.val, data.test)] == [90, 45, 30, 40]
    assert torch.equal(data.test[1], torch.arange(40) % 10)  # the official test set in its order
    root = files.cifar_folders(tmp_path, train=120)
    data = ready(CIFAR10Poisoning(root=str(root), samples=100, val_share=0.5, poisoned_share=0.4))
    assert [len(part[1]) for part in (data.train, data.poisoned, data.val, data.test)] == [50, 20, 50, 20]
    assert data.train[0].shape == (50, 3, 32, 32)
    stripe = data.poisoned[0].mean((1, 3))  # class c is bright in rows 2 c and 2 c + 1
    assert torch.equal(stripe.argmax(1) // 2, data.poisoned[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_share": 0.0}, "data.val_share must be above 0 and below 1, got 0.0"),
        ({"poisoned_share": 1.0}, "data.poisoned_share must be above 0 and below 1, got 1.0"),
        ({"samples": 0}, "data.samples must be at least 1, got 0"),
        ({"lower_batch_size": 0}, "data.lower_batch_size must be at least 1, got 0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BilevelError, match=message):
        DigitsPoisoning(**settings)


def test_sizes_that_do_not_fit_the_data():
    with pytest.raises(BilevelError, match="data.samples=1348, but there are 1347 images; lower it"):
        ready(DigitsPoisoning(samples=1348))
    with pytest.raises(BilevelError, match="12 images cannot be split with equal shares .* raise data.samples"):
        ready(DigitsPoisoning(samples=12))


@pytest.mark.data
def test_real_mnist_has_the_sizes_of_the_released_code(real_data):
    data = ready(MNISTPoisoning(root=str(real_data("mnist"))))
    assert [len(part[1]) for part in (data.train, data.poisoned, data.val, data.test)] == [45000, 9000, 15000, 10000]
    for part in (data.poisoned, data.val):
        assert float((shares(part[1]) - shares(data.train[1])).abs().max()) < 2e-4
