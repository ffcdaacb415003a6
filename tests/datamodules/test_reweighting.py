import files
import pytest
import torch
from loops import trainer

from bilevel_lightning import TRHG, BilevelError, GradientDescent
from bilevel_lightning.datamodules import (
    CIFAR10Reweighting,
    DigitsReweighting,
    FashionMNISTReweighting,
    MNISTReweighting,
)
from bilevel_lightning.datamodules.reweighting import long_tail
from bilevel_lightning.models import LinearNet, LossWeights
from bilevel_lightning.tasks import Reweighting


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def test_profile_of_the_published_sets():
    """Class-balanced loss, table 1: CIFAR-10 with 5000 images in the largest class, and 500 in CIFAR-100."""
    assert long_tail(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert sum(long_tail(5000, 10, 100)) == 12_406
    assert long_tail(5000, 10, 1) == [5000] * 10
    assert long_tail(100, 10, 10)[-1] == 10
    assert sum(long_tail(500, 100, 100)) == 10_847


@pytest.mark.parametrize("factor", [1, 4, 20])
def test_counts_are_exactly_those_of_the_profile(factor):
    data = ready(DigitsReweighting(class_samples=100, imbalance_factor=factor, seed=3))
    assert torch.bincount(data.train[1]).tolist() == long_tail(100, 10, factor)
    assert torch.bincount(data.meta[1]).tolist() == [10] * 10
    assert torch.bincount(data.test[1]).tolist() == [50] * 10
    assert data.clean.all()
    assert torch.equal(data.train[2], torch.arange(len(data.train[1])))
    assert torch.equal(data.train[3], data.train[1])


@pytest.mark.parametrize(("rate", "factor"), [(0.4, 1), (0.25, 10), (0.0, 1)])
def test_symmetric_noise_replaces_exactly_its_share(rate, factor):
    data = ready(DigitsReweighting(noise_rate=rate, imbalance_factor=factor))
    wrong = data.train[1] != data.true_labels
    assert int(wrong.sum()) == round(rate * len(wrong))
    assert torch.equal(wrong, ~data.clean)
    assert torch.bincount(data.true_labels).tolist() == long_tail(100, 10, factor)
    assert torch.equal(data.train[3], data.train[1])


def test_symmetric_noise_is_uniform_over_the_other_classes():
    data = ready(DigitsReweighting(class_samples=110, noise_rate=0.9))
    shift = torch.bincount((data.train[1] - data.true_labels)[~data.clean] % 10, minlength=10)
    assert shift[0] == 0
    assert shift[1:].min() > 75
    assert shift[1:].max() < 145  # 110 expected, 10 the standard deviation


MAPS = {
    MNISTReweighting: {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
    DigitsReweighting: {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
    CIFAR10Reweighting: {9: 1, 2: 0, 4: 7, 3: 5, 5: 3},
    FashionMNISTReweighting: {9: 7, 7: 5, 2: 6, 4: 3, 3: 4},
}


@pytest.mark.parametrize("cls", MAPS)
def test_asymmetric_noise_is_exact_in_each_class(tmp_path, cls):
    files.mnist(tmp_path)
    files.mnist(tmp_path, "FashionMNIST")
    files.cifar_folders(tmp_path, train=120)
    root = {} if cls is DigitsReweighting else {"root": str(tmp_path)}
    settings = {"noise": "asymmetric", "noise_rate": 0.4, "meta_per_class": 2, "class_samples": 10}
    data = ready(cls(**root, **settings))
    for c in range(10):
        given = data.train[1][data.true_labels == c]
        partner = MAPS[cls].get(c)
        assert int((given != c).sum()) == (0 if partner is None else 4)
        assert set(given.tolist()) <= {c, partner}


def test_parts_are_disjoint_and_depend_on_the_seed():
    data, same, other = (ready(DigitsReweighting(seed=seed, noise_rate=0.4)) for seed in (1, 1, 2))
    everything = torch.cat([part[0].flatten(1) for part in (data.train, data.meta, data.test)])
    assert len(torch.unique(everything, dim=0)) == len(everything) == 1000 + 100 + 500
    for mine, equal, different in zip(data.train[:2], same.train[:2], other.train[:2], strict=True):
        assert torch.equal(mine, equal)
        assert not torch.equal(mine, different)
    assert len(torch.bincount(data.true_labels[:50])) == 10  # classes are mixed


@pytest.mark.parametrize("cls", [MNISTReweighting, FashionMNISTReweighting, CIFAR10Reweighting])
def test_files(tmp_path, cls):
    files.mnist(tmp_path)
    files.mnist(tmp_path, "FashionMNIST")
    files.cifar_folders(tmp_path, train=120)
    data = ready(cls(root=str(tmp_path), meta_per_class=2, imbalance_factor=5))
    assert torch.bincount(data.train[1]).tolist() == long_tail(10, 10, 5)
    assert data.train[0].shape[1:] == cls.image_shape
    assert len(data.meta[1]) == 20
    assert len(data.test[1]) == (20 if cls is CIFAR10Reweighting else 40)
    stripes = data.train[0].mean((1, 3))[:, :20].view(len(data.train[1]), 10, 2).mean(2)
    assert torch.equal(stripes.argmax(1), data.train[1])  # images and labels belong together


def test_evaluations_hold_what_metrics_need():
    data = ready(DigitsReweighting(noise_rate=0.3))
    for loader, upper in ((data.val_dataloader(), data.meta), (data.test_dataloader(), data.test)):
        (batch,) = loader
        assert batch["upper"] is upper
        assert len(batch["clean"]) == len(batch["lower"][1]) == 1000
        assert torch.equal(batch["clean"], batch["lower"][1] == data.true_labels[:1000])
    assert next(iter(data.predict_dataloader())) is data.train


def trained(steps, tmp_path, **settings):
    torch.manual_seed(0)
    task = Reweighting(LinearNet((1, 8, 8)), LossWeights(5))
    module = TRHG(task=task, dynamics=GradientDescent(0.5), lower_steps=2, truncation=1)
    data = DigitsReweighting(noise_rate=0.4, lower_batch_size=20, upper_batch_size=10, epoch_length=5)
    run = trainer(steps, tmp_path)
    run.fit(module, datamodule=data, **settings)
    return run, module


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    """Stopped in the middle of an epoch: minibatches of both levels go on where they were."""
    _, whole = trained(13, tmp_path)
    run, _ = trained(7, tmp_path)
    run.save_checkpoint(tmp_path / "seven.ckpt")
    _, resumed = trained(13, tmp_path, ckpt_path=tmp_path / "seven.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_rate": 1.0}, r"data.noise_rate must be in \[0, 1\), got 1.0"),
        ({"imbalance_factor": 0.5}, "data.imbalance_factor must be at least 1, got 0.5"),
        ({"class_samples": 0}, "data.class_samples must be at least 1, got 0"),
        ({"meta_per_class": 0}, "data.meta_per_class must be at least 1, got 0"),
        ({"noise": "flip"}, "data.noise must be symmetric or asymmetric, got 'flip'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BilevelError, match=message):
        DigitsReweighting(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_samples": 500}, "Class 0 would have 500 training images, and there are"),
        ({"class_samples": 10, "imbalance_factor": 100}, "Class 5 would have 0 training images"),
        ({"meta_per_class": 200}, "data.meta_per_class=200 leaves no training image of the rarest class"),
    ],
)
def test_more_samples_than_there_are(settings, message):
    with pytest.raises(BilevelError, match=message):
        ready(DigitsReweighting(**settings))


@pytest.mark.data
def test_real_mnist(real_data):
    data = ready(
        MNISTReweighting(root=str(real_data("mnist")), imbalance_factor=100, class_samples=5000, noise_rate=0.4)
    )
    assert torch.bincount(data.true_labels).tolist() == long_tail(5000, 10, 100)
    assert int((~data.clean).sum()) == round(0.4 * 12_406)
    assert len(data.test[1]) == 10_000
