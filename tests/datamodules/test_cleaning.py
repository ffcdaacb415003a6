import urllib.request

import files
import pytest
import torch
from loops import trainer
from pytorch_lightning import Trainer

from bilevel_lightning import BilevelError, Minibatches
from bilevel_lightning.datamodules import CIFAR10Cleaning, DigitsCleaning, FashionMNISTCleaning, MNISTCleaning
from bilevel_lightning.datamodules.iterations import draw


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize(("rate", "samples"), [(0.5, 600), (0.3, 333), (0.0, 100), (0.99, 70)])
def test_exactly_rho_n_labels_become_a_different_class(rate, samples):
    data = ready(DigitsCleaning(train_samples=samples, noise_rate=rate, seed=3))
    wrong = data.train[1] != data.true_labels
    assert int(wrong.sum()) == round(rate * samples)
    assert torch.equal(wrong, ~data.clean)
    assert set(data.train[1].tolist()) <= set(range(10))


def test_noise_is_uniform_over_the_other_classes():
    data = ready(DigitsCleaning(train_samples=1500, val_samples=100, noise_rate=0.9))
    shift = (data.train[1] - data.true_labels)[~data.clean] % 10
    counts = torch.bincount(shift, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 110
    assert counts[1:].max() < 190  # 150 expected, 12 the standard deviation


def test_noise_from_all_classes_keeps_one_in_ten():
    data = ready(DigitsCleaning(train_samples=1500, val_samples=100, label_noise="any"))
    assert int((~data.clean).sum()) == 750
    kept = int((data.train[1] == data.true_labels)[~data.clean].sum())
    assert 45 < kept < 105


def test_parts_are_disjoint_and_depend_on_the_seed():
    data, same, other = (ready(DigitsCleaning(seed=seed)) for seed in (1, 1, 2))
    assert [len(part[1]) for part in (data.train, data.val, data.test)] == [600, 600, 597]
    assert data.train[0].shape == (600, 1, 8, 8)
    assert data.train[0].min() == 0
    assert data.train[0].max() == 1
    everything = torch.cat([part[0].flatten(1) for part in (data.train, data.val, data.test)])
    assert len(torch.unique(everything, dim=0)) == len(everything) == 1797
    for mine, equal, different in zip(data.train[:2], same.train[:2], other.train[:2], strict=True):
        assert torch.equal(mine, equal)
        assert not torch.equal(mine, different)


def batches(data, minibatches=(3, 1), epochs=1, ready_first=0):
    """The batches that a trainer would see, by number of upper iteration."""
    run = trainer(5)

    class Module:
        def minibatches(self, k):
            return minibatches

    run.strategy._lightning_module = Module()
    run.fit_loop.epoch_loop.batch_progress.total.ready = ready_first
    data.trainer = run
    return list(data.train_dataloader())


def test_full_batches():
    data = ready(DigitsCleaning(epoch_length=4))
    seen = batches(data)
    assert len(seen) == 4
    for batch in seen:
        for got, want in zip(batch["lower"], data.train, strict=True):
            assert torch.equal(got, want)
        assert len(batch["upper"][1]) == 600
        assert "clean" not in batch


def test_minibatches_are_a_function_of_the_iteration():
    def data():
        return ready(DigitsCleaning(lower_batch_size=32, upper_batch_size=16, epoch_length=6))

    whole, tail = batches(data()), batches(data(), ready_first=4)
    assert isinstance(whole[0]["lower"], Minibatches)
    assert len(whole[0]["lower"]) == 3
    images, labels, index = whole[0]["lower"][0]
    assert images.shape == (32, 1, 8, 8)
    source = data()
    assert torch.equal(images, source.train[0][index])
    assert torch.equal(labels, source.train[1][index])
    assert len(whole[0]["upper"][1]) == 16
    assert torch.equal(whole[4]["lower"][2][2], tail[0]["lower"][2][2])
    assert torch.equal(whole[5]["upper"][0], tail[1]["upper"][0])
    assert not torch.equal(whole[0]["lower"][0][2], whole[1]["lower"][0][2])
    assert not torch.equal(whole[0]["lower"][0][2], whole[0]["lower"][1][2])


def test_draws_are_uniform_without_replacement():
    counts = torch.zeros(20)
    for k in range(500):
        index = draw(0, k, 0, 0, 20, 5)
        assert len(set(index.tolist())) == 5
        counts[index] += 1
    assert counts.min() > 90
    assert counts.max() < 165  # 125 expected, 9.7 the standard deviation


@pytest.mark.parametrize(("cls", "name"), [(MNISTCleaning, "MNIST"), (FashionMNISTCleaning, "FashionMNIST")])
def test_mnist_files(tmp_path, cls, name, offline):
    root = files.mnist(tmp_path, name)
    data = ready(cls(root=str(root), train_samples=50, val_samples=40))
    assert data.train[0].shape == (50, 1, 28, 28)
    assert len(data.test[1]) == 40
    assert torch.equal(data.test[1], torch.arange(40) % 10)  # the official test set in its order
    reserved = ready(cls(root=str(root), train_samples=50, val_samples=40, test_split="train"))
    assert len(reserved.test[1]) == 30


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA_DIR", str(files.mnist(tmp_path)))
    assert len(ready(MNISTCleaning(train_samples=5, val_samples=5)).val[1]) == 5


def test_cifar_in_folders_and_in_batches(tmp_path, monkeypatch, offline):
    folders = ready(CIFAR10Cleaning(root=str(files.cifar_folders(tmp_path)), train_samples=30, val_samples=30))
    assert folders.train[0].shape == (30, 3, 32, 32)
    assert len(folders.test[1]) == 20
    stripe = folders.val[0].mean((1, 3))  # class c is bright in rows 2 c and 2 c + 1
    assert torch.equal(stripe.argmax(1) // 2, folders.val[1])
    batches_ = ready(
        CIFAR10Cleaning(root=str(files.cifar_batches(tmp_path, monkeypatch)), train_samples=50, val_samples=50)
    )
    assert len(batches_.test[1]) == 20
    assert torch.equal(batches_.val[0].mean((1, 3)).argmax(1) // 2, batches_.val[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_rate": 1.0}, r"data.noise_rate must be in \[0, 1\), got 1.0"),
        ({"noise_rate": -0.1}, "data.noise_rate must be in"),
        ({"train_samples": 0}, "data.train_samples must be at least 1, got 0"),
        ({"epoch_length": 0}, "data.epoch_length must be at least 1"),
        (
            {"lower_batch_size": 601},
            "data.lower_batch_size must be between 1 and the 600 samples of its level, got 601",
        ),
        ({"upper_batch_size": 0}, "data.upper_batch_size must be between 1 and the 600"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BilevelError, match=message):
        DigitsCleaning(**settings)


def test_a_minibatch_smaller_than_the_number_of_processes(monkeypatch):
    data = ready(DigitsCleaning(lower_batch_size=1))
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(BilevelError, match="data.lower_batch_size=1 is less than the 2 processes that share it"):
        batches(data)


def test_more_samples_than_there_are(tmp_path):
    with pytest.raises(
        BilevelError, match="train_samples=1500 and data.val_samples=600 leave no test image of the 1797"
    ):
        ready(DigitsCleaning(train_samples=1500))
    with pytest.raises(BilevelError, match="leave no test image of the 120 images that MNISTCleaning has"):
        ready(MNISTCleaning(root=str(files.mnist(tmp_path)), train_samples=100, val_samples=21))


def test_missing_data_offline(tmp_path, offline):
    with pytest.raises(BilevelError) as error:
        ready(MNISTCleaning(root=str(tmp_path)))
    message = str(error.value)
    assert f"no complete data in {tmp_path}/MNIST/raw, and downloading failed" in message
    assert "Put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz" in message
    with pytest.raises(BilevelError, match="data.download is false"):
        ready(MNISTCleaning(root=str(tmp_path / "empty"), download=False))
    with pytest.raises(BilevelError, match=r"cifar-10-python.tar.gz unpacked, or class folders in .*cifar10/train"):
        ready(CIFAR10Cleaning(root=str(tmp_path)))


def test_damaged_downloads(tmp_path, offline):
    root = files.mnist(tmp_path, packed=True)  # whole gzip files, but not MNIST's: their md5 sums differ
    with pytest.raises(BilevelError, match=r"train-images-idx3-ubyte.gz is damaged .*f68b3c2dcbeaaa9fbdd348bbdeb94873"):
        ready(MNISTCleaning(root=str(root)))
    unpacked = files.mnist(tmp_path / "unpacked")
    image_file = unpacked / "MNIST" / "raw" / "train-images-idx3-ubyte"
    image_file.write_bytes(image_file.read_bytes()[:-100])
    with pytest.raises(BilevelError, match="found no complete data"):
        ready(MNISTCleaning(root=str(unpacked)))


def test_nan_in_the_data(monkeypatch):
    data = DigitsCleaning()
    source = data.source(True)
    source.images[17, 2, 2] = float("nan")
    monkeypatch.setattr(data, "source", lambda train: source)
    with pytest.raises(
        BilevelError, match="DigitsCleaning: 1 images hold NaN or Inf, the first is number 17 of its file"
    ):
        ready(data)


@pytest.mark.data
def test_seed_2424_gives_the_data_of_the_released_code(real_data):
    """Share of right labels 0.5478, measured in the original (half are drawn anew, one in ten of those stays right)."""
    data = ready(MNISTCleaning(root=str(real_data("mnist")), label_noise="any", test_split="train", seed=2424))
    assert float((data.train[1] == data.true_labels).float().mean()) == pytest.approx(0.5478, abs=1e-6)
    assert [len(part[1]) for part in (data.train, data.val, data.test)] == [5000, 5000, 10000]


@pytest.mark.data
def test_real_sets(real_data):
    for cls, name, test in ((MNISTCleaning, "mnist", 10_000), (FashionMNISTCleaning, "fashionmnist", 10_000)):
        data = ready(cls(root=str(real_data(name))))
        assert int((data.train[1] != data.true_labels).sum()) == 2500
        assert len(data.test[1]) == test


@pytest.mark.data
@pytest.mark.slow
def test_real_cifar(real_data):
    data = ready(CIFAR10Cleaning(root=str(real_data("cifar10")), train_samples=500, val_samples=500))
    assert data.test[0].shape == (10_000, 3, 32, 32)
    assert torch.bincount(data.test[1]).tolist() == [1000] * 10
    assert 0.4 < data.train[0].mean() < 0.55
