import copy

import files
import pytest
import torch
from loops import trainer
from pytorch_lightning import Callback

from bilevel_lightning import DARTS, BilevelError, Momentum
from bilevel_lightning.datamodules import CIFAR10Search, CIFAR10Training, DigitsSearch, DigitsTraining
from bilevel_lightning.datamodules.augmented import Augmentation, Parts
from bilevel_lightning.models import SearchNetwork
from bilevel_lightning.retraining import Retraining
from bilevel_lightning.tasks import ArchitectureSearch


def plain(padding=0, flip=False, cutout=0, channels=1):
    return Augmentation([0.0] * channels, [1.0] * channels, padding, flip, cutout)


# What happens to an image.


def test_without_changes_only_the_normalisation_is_left():
    images = torch.rand(3, 2, 4, 4)
    change = Augmentation((0.5, 0.25), (2.0, 4.0), padding=0, flip=False)
    expected = (images - torch.tensor([0.5, 0.25])[:, None, None]) / torch.tensor([2.0, 4.0])[:, None, None]
    assert torch.equal(change(images, [0]), expected)
    assert torch.equal(change.normalized(images), expected)


def test_crops_are_pieces_of_the_padded_image():
    images = torch.rand(200, 1, 4, 4) + 1
    out = plain(padding=2)(images, [3])
    padded = torch.nn.functional.pad(images, [2] * 4)
    places = set()
    for image, piece in zip(padded, out, strict=True):
        where = [(i, j) for i in range(5) for j in range(5) if torch.equal(image[:, i : i + 4, j : j + 4], piece)]
        assert len(where) == 1
        places.add(where[0])
    assert len(places) == 25  # all of them occur


def test_every_other_image_is_reflected_on_average():
    images = torch.rand(400, 2, 3, 4)
    out = plain(flip=True, channels=2)(images, [1])
    reflected = torch.tensor([torch.equal(a.flip(-1), b) for a, b in zip(images, out, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(images, out, strict=True)])
    assert bool((reflected ^ kept).all())
    assert 160 < int(reflected.sum()) < 240


def test_cutout_hides_a_square_that_the_edge_may_cut():
    images = torch.ones(500, 1, 8, 8)
    hidden = plain(cutout=4)(images, [2]) == 0
    sizes = set()
    for mask in hidden[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert int(mask.sum()) == len(rows) * len(columns)  # a rectangle
        assert rows[-1] - rows[0] + 1 == len(rows) <= 4
        sizes.add((len(rows), len(columns)))
    assert max(sizes) == (4, 4)
    assert min(sizes) == (2, 2)
    # the mean is what is put there
    change = Augmentation([0.5], [0.25], 0, False, 4)
    assert {*change(images, [2]).unique().tolist()} == {0.0, 2.0}


def test_changes_are_a_function_of_the_key():
    images, change = torch.rand(5, 1, 8, 8), plain(padding=2, flip=True, cutout=3)
    state = torch.get_rng_state()
    assert torch.equal(change(images, [0, 1, 2]), change(images, [0, 1, 2]))
    assert not torch.equal(change(images, [0, 1, 2]), change(images, [0, 1, 3]))
    assert torch.equal(state, torch.get_rng_state())


def test_parts_are_equal_and_complete():
    parts = Parts((torch.arange(10), torch.arange(10)), 4, ("lower", "upper"))
    assert [len(part["upper"][0]) for part in parts] == [4, 3, 3]
    assert len(parts) == 3
    assert torch.equal(torch.cat([part["lower"][1] for part in parts]), torch.arange(10))
    assert [len(images) for images, _ in Parts((torch.arange(4), torch.arange(4)), 2)] == [2, 2]


# The data of a search and of a training.


def test_the_levels_share_the_images():
    data = DigitsSearch(samples=100, lower_share=0.3)
    data.setup()
    (lower, _), (upper, _) = data.levels()
    assert (len(lower), len(upper), len(data.test[0])) == (30, 70, 1697)
    rows = [image.numpy().tobytes() for part in (lower, upper, data.test[0]) for image in part]
    assert len({*rows}) == len(rows)  # all 1797 digits differ
    other = DigitsSearch(samples=100, lower_share=0.3, seed=1)
    other.setup()
    assert not torch.equal(other.train[0], lower)


def test_statistics_are_those_of_the_digits():
    data = DigitsTraining(train_samples=1700, val_samples=0)
    data.setup()
    images = data.augmentation.normalized(data.train[0])
    assert float(images.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(images.std()) == pytest.approx(1.0, abs=0.01)


def test_cifar10_and_smaller_images(tmp_path):
    files.cifar_folders(tmp_path, train=40, test=20)
    whole, small = (CIFAR10Search(str(tmp_path), samples=20, image_size=size) for size in (None, 16))
    whole.setup()
    small.setup()
    assert (whole.image_shape, small.image_shape) == ((3, 32, 32), (3, 16, 16))
    blocks = whole.test[0].unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    assert torch.allclose(small.test[0], blocks, atol=1e-6)
    assert len(small.test[0]) == 20
    data = CIFAR10Training(str(tmp_path), val_samples=4)
    data.setup()
    assert (len(data.train[0]), len(data.val[0]), len(data.test[0])) == (36, 4, 20)


@pytest.mark.data
def test_real_cifar10(real_data):
    data = CIFAR10Search(str(real_data("cifar10")))
    source = data.source(train=True)
    assert len(source.labels) == 50_000
    images = data.augmentation.normalized(data.take(source, range(0, 50_000, 100))[0])
    assert images.mean((0, 2, 3)).abs().max() < 0.1
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DigitsSearch(samples=1), "data.samples must be at least 2"),
        (lambda: DigitsSearch(lower_share=1.0), "data.lower_share must be above 0 and below 1"),
        (lambda: DigitsSearch(padding=-1), "data.padding must not be negative"),
        (lambda: DigitsSearch(cutout=-1), "data.cutout must not be negative"),
        (lambda: DigitsSearch(evaluation_batch_size=0), "data.evaluation_batch_size must be at least 1"),
        (lambda: CIFAR10Search(image_size=15), "data.image_size must divide the 32 pixels"),
        (lambda: DigitsSearch(samples=1797).setup(), "data.samples=1797 must not exceed the 1797 images and leave"),
        (lambda: DigitsTraining(train_samples=0), "data.train_samples must be at least 1"),
        (lambda: DigitsTraining(val_samples=-1), "data.val_samples must be at least 0"),
        (lambda: DigitsTraining(train_samples=1800).setup(), "data.train_samples=1800 and data.val_samples=200"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(BilevelError, match=message):
        make()


# What a run sees.


class Seen(Callback):
    """Copies of the batches."""

    def __init__(self, save=None):
        self.batches, self.save = [], save

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append(copy.deepcopy(batch))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.save is not None and len(self.batches) == 5:
            trainer.save_checkpoint(self.save)


def flat(batch):
    """The tensors of a batch."""
    levels = batch.values() if isinstance(batch, dict) else [batch]
    parts = [p for level in levels for p in (level if isinstance(level, list) else [level])]
    return [t for part in parts for t in part]


def searching():
    torch.manual_seed(0)
    network = SearchNetwork((1, 8, 8), channels=2, layers=3, nodes=1)
    module = DARTS(task=ArchitectureSearch(network), dynamics=Momentum(0.05))
    module.task.callbacks = list
    return module, DigitsSearch(samples=60, lower_batch_size=8, upper_batch_size=6, epoch_length=3, cutout=3)


def retraining():
    torch.manual_seed(0)
    settings = {"image_shape": (1, 8, 8), "channels": 2, "layers": 3, "auxiliary_weight": 0.0}
    return Retraining("random", **settings), DigitsTraining(train_samples=60, val_samples=20, batch_size=20, cutout=3)


@pytest.mark.parametrize("make", [searching, retraining])
def test_a_resumed_run_is_the_undisturbed_one(make, tmp_path):
    whole, path = Seen(str(tmp_path / "middle.ckpt")), str(tmp_path / "middle.ckpt")
    module, data = make()
    trainer(8, callbacks=[whole], limit_val_batches=0).fit(module, datamodule=data)
    resumed = Seen()
    again, data = make()
    trainer(8, callbacks=[resumed], limit_val_batches=0).fit(again, datamodule=data, ckpt_path=path)
    assert len(resumed.batches) == 3
    for expected, batch in zip(whole.batches[5:], resumed.batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(flat(expected), flat(batch), strict=True))
    state = again.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items() if "accuracies" not in name)


def test_an_epoch_goes_once_through_the_training_images():
    seen = Seen()
    module, data = retraining()
    data.augmentation = plain()
    trainer(6, callbacks=[seen]).fit(module, datamodule=data)
    images = data.train[0]
    epochs = [torch.cat([batch[0] for batch in seen.batches[i : i + 3]]) for i in (0, 3)]
    numbers = [[int((images == one).flatten(1).all(1).nonzero()) for one in epoch] for epoch in epochs]
    assert sorted(numbers[0]) == sorted(numbers[1]) == list(range(60))
    assert numbers[0] != numbers[1]


def test_a_batch_must_not_be_larger_than_the_data():
    module, _ = retraining()
    with pytest.raises(BilevelError, match="data.batch_size=50 is more than the 40 training images"):
        trainer(1).fit(module, datamodule=DigitsTraining(train_samples=40))
