import pickle

import numpy as np
import pytest
import torch
from loops import trainer
from pytorch_lightning import LightningModule, Trainer
from torch import nn

from bilevel_lightning import BilevelError
from bilevel_lightning.datamodules import EpisodicDataModule, Sinusoid
from bilevel_lightning.datamodules.decoded import Images
from bilevel_lightning.datamodules.episodes import share
from bilevel_lightning.datamodules.fewshot_images import ImageEpisodes
from bilevel_lightning.datamodules.iterations import Iterations


def numbered(split, classes=8, per_class=10):
    """Images of one pixel column: class, number of the image and split can be read from them."""
    pixels = np.zeros((classes, per_class, 3, 2, 2), np.uint8)
    pixels[:, :, 0] += np.arange(classes, dtype=np.uint8)[:, None, None, None]
    pixels[:, :, 1] += np.arange(per_class, dtype=np.uint8)[None, :, None, None]
    pixels[:, :, 2] += np.uint8(split)
    names = [f"{split}/{c}" for c in range(classes)]
    return Images(pixels.reshape(-1, 3, 2, 2), [per_class] * classes, names)


class Numbered(EpisodicDataModule):
    image_shape = (3, 2, 2)

    def __init__(self, ways=3, shots=2, queries=4, episodes_per_batch=2, epoch_length=5, **settings):
        super().__init__(ways, shots, queries, episodes_per_batch, epoch_length, **settings)

    def split_episodes(self, split):
        number = ("train", "val", "test").index(split)
        return ImageEpisodes(number, self.seed, numbered(number), self.ways, self.shots, self.queries)


class Watcher(LightningModule):
    """Keeps the batches that reach the steps."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype))
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, i):
        self.seen["train"].append(batch)
        self.optimizers().step()

    def validation_step(self, batch, i):
        self.seen["val"].append(batch)

    def test_step(self, batch, i):
        self.seen["test"].append(batch)

    def predict_step(self, batch, i):
        self.seen["test"].append(batch)
        return 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


def ready(data):
    data.setup(None)
    return data


def parts(batch):
    return [t for key in ("support", "query") for t in batch[key]]


def equal(first, second):
    assert len(first) == len(second)
    return all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(parts(one), parts(other), strict=True)
    )


def as_process(monkeypatch, data, rank, world):
    data.trainer = trainer(1)
    monkeypatch.setattr(Trainer, "global_rank", rank)
    monkeypatch.setattr(Trainer, "world_size", world)
    return data


def test_an_episode():
    """Shapes, types, labels, no image twice, support and query of the same classes."""
    for batch in ready(Numbered()).train_dataloader():
        (x_s, y_s), (x_q, y_q) = batch["support"], batch["query"]
        assert (x_s.shape, y_s.shape) == ((2, 6, 3, 2, 2), (2, 6))
        assert (x_q.shape, y_q.shape) == ((2, 12, 3, 2, 2), (2, 12))
        assert x_s.dtype == x_q.dtype == torch.uint8
        assert y_s.dtype == y_q.dtype == torch.int64
        for e in range(2):
            assert y_s[e].tolist() == [0, 0, 1, 1, 2, 2]
            assert torch.bincount(y_q[e]).tolist() == [4, 4, 4]
            classes = [x_s[e][y_s[e] == label][0, 0, 0, 0].item() for label in range(3)]
            assert len(set(classes)) == 3
            for label, c in enumerate(classes):
                images = torch.cat([x_s[e][y_s[e] == label], x_q[e][y_q[e] == label]])
                assert images[:, 0].unique().tolist() == [c]
                assert len(images[:, 1, 0, 0].unique()) == 6


def test_every_assignment_of_classes_to_labels_occurs():
    episodes = ImageEpisodes(0, 0, numbered(0, classes=4), ways=4, shots=1, queries=1)
    x, _ = episodes.batch(range(600))["support"]
    orders, counts = np.unique(x[:, :, 0, 0, 0].numpy(), axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 8
    assert counts.max() < 48  # 25 expected, 4.9 the standard deviation


def test_classes_and_images_are_drawn_uniformly():
    x, _ = ImageEpisodes(0, 0, numbered(0), 5, 2, 3).batch(range(400))["query"]
    for channel, kinds in ((0, 8), (1, 10)):
        counts = torch.bincount(x[:, :, channel, 0, 0].flatten().long(), minlength=kinds) / x[:, :, 0, 0, 0].numel()
        assert (counts * kinds - 1).abs().max() < 0.2


def test_classes_may_differ_in_their_number_of_images():
    images = Images(np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1), [3, 5, 4], ["a", "b", "c"])
    batch = ImageEpisodes(0, 0, images, ways=3, shots=1, queries=2).batch(range(300))
    drawn = torch.cat([batch["support"][0], batch["query"][0]], dim=1).flatten(1)
    assert sorted(drawn.unique().tolist()) == list(range(12))
    for episode in drawn.tolist():
        assert len(set(episode)) == 9
        assert {0, 1, 2} <= set(episode)  # all images of the smallest class
        assert sum(3 <= image < 8 for image in episode) == sum(image >= 8 for image in episode) == 3


def test_episodes_depend_on_seed_split_and_number_alone():
    data, same, other = (ready(Numbered(seed=seed)) for seed in (0, 0, 1))
    whole = data.episodes["train"].batch(range(10))
    one = same.episodes["train"].batch(range(7, 8))
    for a, b in zip(parts(whole), parts(one), strict=True):
        assert torch.equal(a[7:8], b)
    assert not torch.equal(whole["query"][0], other.episodes["train"].batch(range(10))["query"][0])
    drawn = [data.episodes[split].batch(range(10))["query"][0][:, :, :2] for split in ("train", "val", "test")]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_two_workers_give_what_none_give():
    alone, helped = ready(Numbered(val_episodes=5)), ready(Numbered(val_episodes=5, num_workers=2))
    torch.manual_seed(0)
    loader, state = helped.train_dataloader(), torch.get_rng_state()
    assert equal(list(alone.train_dataloader()), list(loader))
    assert equal(list(alone.train_dataloader()), list(loader))  # the same workers, a second time
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers change
    assert equal(list(alone.val_dataloader()), list(helped.val_dataloader()))


def test_an_epoch_that_was_left_early_does_not_disturb_the_next():
    loader = Iterations(lambda k: k, 6, num_workers=2)
    assert next(iter(loader)) == 0
    assert list(loader) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 7, 10])
def test_a_resumed_run_sees_the_same_episodes(stop, workers, tmp_path):
    """Stopped at the first and second epoch's middle, and at an end; both through Lightning's own loop."""

    def run(steps, ckpt_path=None):
        module, loop = Watcher(), trainer(steps)
        loop.fit(module, datamodule=Numbered(val_episodes=3, num_workers=workers), ckpt_path=ckpt_path)
        return module.seen, loop

    whole, _ = run(13)
    first, loop = run(stop)
    loop.save_checkpoint(tmp_path / "stopped.ckpt")
    second, _ = run(13, str(tmp_path / "stopped.ckpt"))
    assert equal(first["train"] + second["train"], whole["train"])
    assert len(whole["train"]) == 13
    assert equal(whole["val"][:2], whole["val"][2:])  # after either epoch
    assert equal(first["val"] + second["val"], whole["val"])


def test_shares_cover_what_one_process_sees(monkeypatch):
    """Training and evaluation; two processes of 2 episodes against one of 4."""
    united = list(
        ready(as_process(monkeypatch, Numbered(episodes_per_batch=4, val_episodes=10), 0, 1)).val_dataloader()
    )
    trained = list(ready(as_process(monkeypatch, Numbered(episodes_per_batch=4), 0, 1)).train_dataloader())
    halves = []
    for rank in (0, 1):
        data = ready(as_process(monkeypatch, Numbered(val_episodes=10), rank, 2))
        halves.append((list(data.val_dataloader()), list(data.train_dataloader())))
    for i, whole in ((0, united), (1, trained)):
        (first, second) = (half[i] for half in halves)
        assert len(first) == len(second) == len(whole)
        for one, other, both in zip(first, second, whole, strict=True):
            for a, b, c in zip(parts(one), parts(other), parts(both), strict=True):
                assert len(a) == len(b)
                assert torch.equal(torch.cat([a, b]), c)
    assert [len(batch["query"][1]) for batch in united] == [4, 4, 2]


def test_a_fixed_set_of_training_episodes(monkeypatch):
    """Visited again and again, with their numbers, over one process or two; evaluations have no numbers."""
    endless = list(ready(Numbered(epoch_length=5)).train_dataloader())
    data = ready(Numbered(epoch_length=5, train_episodes=4))
    again = list(data.train_dataloader())
    assert [batch["episode"].tolist() for batch in again] == [[0, 1], [2, 3]] * 2 + [[0, 1]]
    assert equal(again, [endless[b % 2] for b in range(5)])
    assert all("episode" not in batch for batch in [*endless, *data.val_dataloader(), *data.test_dataloader()])
    halves = [
        list(ready(as_process(monkeypatch, Numbered(train_episodes=4, episodes_per_batch=1), r, 2)).train_dataloader())
        for r in (0, 1)
    ]
    numbers = [[int(n) for half in halves for n in half[b]["episode"]] for b in range(5)]
    assert numbers == [batch["episode"].tolist() for batch in again]


def test_training_episodes_that_batches_do_not_divide(monkeypatch):
    data = as_process(monkeypatch, Numbered(train_episodes=6), 0, 2)
    with pytest.raises(BilevelError, match="data.train_episodes=6 must be a multiple of the 4 episodes of a batch"):
        data.setup("fit")
    data.setup("test")


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_evaluation_episode_once(size, world):
    total = 12
    batches = -(-total // (size * world))
    numbers = [n for rank in range(world) for b in range(batches) for n in share(b, size, rank, world, total)]
    assert sorted(numbers) == list(range(total))
    assert all(len(share(b, size, rank, world, total)) > 0 for rank in range(world) for b in range(batches))


def test_floats_are_made_in_the_type_of_the_module():
    for precision, dtype in (("32-true", torch.float32), ("64-true", torch.float64), ("bf16-true", torch.bfloat16)):
        data, module = Numbered(val_episodes=4), Watcher(dtype)
        trainer(1, precision=precision).fit(module, datamodule=data)
        source = next(iter(ready(Numbered(val_episodes=4)).train_dataloader()))
        (batch,) = module.seen["train"]
        for key in ("support", "query"):
            assert batch[key][0].dtype == dtype
            assert batch[key][1].dtype == torch.int64
            assert torch.equal(batch[key][0], (source[key][0].to(torch.float64) / 255).to(dtype))


def test_other_keys_and_types_pass_the_transfer():
    """What a loader of the user's own gives: torchmeta's keys, images that are floats already."""
    images, labels = torch.full((1, 2, 3, 2, 2), 51, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.long)
    batch = {"train": [images, labels], "test": [torch.ones(1, 2, 3, dtype=torch.float64), labels], "name": "mine"}
    out = Numbered().on_after_batch_transfer(batch)
    assert torch.equal(out["train"][0], torch.full((1, 2, 3, 2, 2), 0.2))
    assert out["train"][1].dtype == torch.long
    assert out["test"][0].dtype == torch.float32
    assert out["name"] == "mine"


def test_normalisation_by_channel():
    data = Numbered()
    data.mean, data.std = [0.5, 0.0, 0.1], [1.0, 2.0, 0.5]
    out = data.on_after_batch_transfer(
        {"support": (torch.full((1, 1, 3, 2, 2), 255, dtype=torch.uint8), torch.zeros(1))}
    )
    torch.testing.assert_close(out["support"][0][0, 0, :, 1, 1], torch.tensor([0.5, 0.5, 1.8]))


def test_test_and_predict_see_the_test_split():
    module, loop = Watcher(), trainer(1)
    loop.test(module, datamodule=Numbered(test_episodes=5), verbose=False)
    assert [len(batch["query"][1]) for batch in module.seen["test"]] == [2, 2, 1]
    assert all((batch["query"][0][:, :, 2] * 255).unique().tolist() == [2] for batch in module.seen["test"])
    loop.predict(module, datamodule=Numbered(test_episodes=5), return_predictions=False)
    assert equal(module.seen["test"][:3], module.seen["test"][3:])


def test_sinusoid():
    data = ready(Sinusoid(shots=4, queries=30, episodes_per_batch=50))
    assert (data.ways, data.shots, data.queries, data.image_shape) == (1, 4, 30, (1,))
    batch = next(iter(data.train_dataloader()))
    (x_s, y_s), (x_q, y_q) = batch["support"], batch["query"]
    assert (x_s.shape, y_s.shape, x_q.shape, y_q.shape) == ((50, 4, 1), (50, 4, 1), (50, 30, 1), (50, 30, 1))
    assert {t.dtype for t in parts(batch)} == {torch.float32}
    assert (x_q.abs() <= 5).all()
    for e in range(50):  # y is a combination of sin x and cos x: A and phase from the query points hold for the support
        basis = torch.cat([x_q[e].double().sin(), x_q[e].double().cos()], dim=1)
        a, b = torch.linalg.lstsq(basis, y_q[e].double()).solution.flatten()
        amplitude, phase = torch.hypot(a, b), torch.atan2(-b, a)
        assert 0.1 - 1e-4 <= amplitude <= 5 + 1e-4
        assert -1e-4 <= phase <= torch.pi + 1e-4
        torch.testing.assert_close(y_s[e].double(), amplitude * (x_s[e].double() - phase).sin(), atol=1e-5, rtol=0)


def test_sinusoid_in_double_precision():
    module = Watcher(torch.float64)
    trainer(2, precision="64-true").fit(module, datamodule=Sinusoid())
    assert {t.dtype for batch in module.seen["train"] for t in parts(batch)} == {torch.float64}
    assert module.seen["train"][0]["support"][0].shape == (25, 5, 1)


def test_episodes_go_to_a_process_that_shares_no_memory(tmp_path):
    """Spawned workers: images in memory are copied, mapped ones are opened again."""
    images = numbered(0)
    np.save(tmp_path / "images.npy", images.pixels)
    mapped = images._replace(pixels=np.load(tmp_path / "images.npy", mmap_mode="r"))
    for held in (images, mapped):
        episodes = ImageEpisodes(0, 0, held, 3, 1, 1)
        sent = pickle.dumps(episodes)
        copy = pickle.loads(sent)
        assert equal([episodes.batch(range(3))], [copy.batch(range(3))])
        assert isinstance(copy.images.pixels, np.memmap) == (held is mapped)
    assert len(sent) < images.pixels.nbytes + 2000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 0}, "data.ways must be at least 1, got 0"),
        ({"shots": -1}, "data.shots must be at least 1, got -1"),
        ({"queries": 0}, "data.queries must be at least 1"),
        ({"episodes_per_batch": 0}, "data.episodes_per_batch must be at least 1"),
        ({"epoch_length": 0}, "data.epoch_length must be at least 1"),
        ({"val_episodes": 0}, "data.val_episodes must be at least 1"),
        ({"test_episodes": 0}, "data.test_episodes must be at least 1"),
        ({"num_workers": -1}, "data.num_workers must not be negative, got -1"),
        ({"seed": -2}, "data.seed must not be negative, got -2"),
        ({"train_episodes": 0}, "data.train_episodes must be at least 1, got 0"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BilevelError, match=message):
        Numbered(**settings)


def test_evaluation_episodes_that_processes_cannot_share(monkeypatch):
    data = as_process(monkeypatch, Numbered(val_episodes=9, test_episodes=10), 0, 2)
    with pytest.raises(
        BilevelError, match="data.val_episodes=9 cannot be shared equally by 2 processes; make it a mul"
    ):
        data.setup("fit")
    data.setup("test")
