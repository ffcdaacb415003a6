"""Text from several sources: what is in which window, what is damaged, and which minibatches there are."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from loops import trainer

from bilevel_lightning import BilevelError
from bilevel_lightning.datamodules import TextSources
from bilevel_lightning.datamodules.tales import Tales


def ready(**settings):
    data = TextSources(**{"train_bytes": 2000, "val_bytes": 300, "test_bytes": 500, "context": 10, **settings})
    data.setup("fit")
    return data


def test_tales_are_the_same_everywhere():
    """A digest: Python promises the numbers of `random.random` for all versions."""
    text = Tales("0").text(5000)
    assert hashlib.sha256(text).hexdigest()[:16] == "30780723660c4eb1"
    assert len(text) == 5000
    assert Tales("0").text(100) == text[:100]
    assert Tales("1").text(100) != text[:100]
    assert text.decode("ascii").count(".") > 50


def test_windows_predict_each_byte_once():
    data = ready(corrupted={})
    windows, index, source = data.train
    first = windows[source == 0]
    text = Tales("0 sources.first").text(2000)
    assert bytes(first[:, :-1].flatten().tolist()) == text[: 10 * len(first)]
    assert bytes(first[:, 1:].flatten().tolist()) == text[1 : 10 * len(first) + 1]
    assert len(first) == 199  # (2000 - 1) // 10
    assert torch.equal(index, torch.arange(2 * 199))
    inputs, targets, *rest = data.decoded(data.train)
    assert inputs.dtype == targets.dtype == torch.long
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert rest[1] is source
    assert len({bytes(t[:, :-1].flatten().tolist()) for t in (first, windows[source == 1], data.val, data.test)}) == 4


@pytest.mark.parametrize("corruption", ["replace", "shuffle"])
def test_only_the_share_of_the_named_source_is_damaged(corruption):
    settings = {"train_bytes": 20_000, "corruption": corruption, "corrupted": {"second": 0.5}}
    clean, damaged = ready(**{**settings, "corrupted": {}}), ready(**settings)
    same = clean.train[0] == damaged.train[0]
    assert same[damaged.train[2] == 0].all()
    share = 1 - float(same[damaged.train[2] == 1].double().mean())
    before, after = (d.train[0][d.train[2] == 1][:, :-1].flatten() for d in (clean, damaged))
    frequencies = [torch.bincount(t.long(), minlength=256) for t in (before, after)]
    if corruption == "replace":
        assert share == pytest.approx(0.5 * 255 / 256, abs=0.02)
        assert (frequencies[1] > 0).all()
    else:
        assert 0.4 < share < 0.5  # some positions get the byte that they had
        assert (frequencies[0] - frequencies[1]).abs().sum() <= 20  # the end is in no window
    assert torch.equal(damaged.train[0], ready(**settings).train[0])
    assert not torch.equal(damaged.train[0], ready(**settings, seed=1).train[0])
    assert torch.equal(clean.val, damaged.val)


def test_the_default_has_a_clean_and_a_damaged_source():
    data = TextSources()
    data.setup("fit")
    assert data.names == ["first", "second"]
    assert [len(data.val), len(data.test), *torch.bincount(data.train[2])] == [63, 255, 1023, 1023]
    shown, _, source = data.shown
    assert torch.bincount(source).tolist() == [63, 63]
    assert (shown[source == 0] < 128).all()
    assert (shown[source == 1] >= 128).double().mean() > 0.2
    data.setup("test")


def batches(data, first=0, rank=0, world=1):
    run = trainer(5)
    progress = SimpleNamespace(
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(ready=first)))
    )
    data.trainer = SimpleNamespace(
        strategy=run.strategy, global_rank=rank, world_size=world, fit_loop=progress, overfit_batches=0,
        lightning_module=SimpleNamespace(minibatches=lambda k: (2, 1)),
    )  # fmt: skip
    return list(data.train_dataloader())


def test_batches_are_functions_of_seed_and_iteration():
    settings = {"lower_batch_size": 6, "upper_batch_size": 4, "epoch_length": 3}
    data = ready(**settings)
    one, two, three = batches(data)
    assert len(one["lower"]) == 2
    inputs, targets, index, source = one["lower"][1]
    assert inputs.shape == targets.shape == (6, 10)
    assert torch.equal(inputs, data.train[0][index][:, :-1].long())
    assert torch.equal(source, data.train[2][index])
    assert one["upper"][0].shape == (4, 10)
    again, *_ = batches(ready(**settings), first=2)
    assert all(torch.equal(a, b) for a, b in zip(again["lower"][0], three["lower"][0], strict=True))
    assert not torch.equal(one["lower"][0][2], two["lower"][0][2])
    other, *_ = batches(ready(**settings, seed=1))
    assert not torch.equal(one["lower"][0][2], other["lower"][0][2])
    parts = [batches(ready(**settings), rank=rank, world=2)[0]["lower"][1] for rank in (0, 1)]
    assert torch.equal(torch.stack([p[2] for p in parts], 1).flatten(), index)
    assert torch.equal(parts[1][0], inputs[1::2])


def test_validation_and_test_batches():
    data = ready()
    for loader, windows in ((data.val_dataloader(), data.val), (data.test_dataloader(), data.test)):
        (batch,) = loader
        assert torch.equal(batch["upper"][1], windows[:, 1:].long())
        assert torch.equal(batch["lower"][3], data.shown[2])
    (batch,) = data.predict_dataloader()
    assert len(batch[0]) == len(data.train[0])


def test_files_and_folders(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_bytes(b"second book " * 10)
    (tmp_path / "books" / "a.txt").write_bytes(b"first book " * 10)
    (tmp_path / "books" / "notes.md").write_bytes(b"no text")
    (tmp_path / "one").write_bytes("Ümlaut, ".encode() * 20)
    books, one = str(tmp_path / "books"), str(tmp_path / "one")
    settings = {"sources": {"books": books, "one": one}, "validation": one, "test": books}
    data = ready(**settings, train_bytes=None, val_bytes=None, test_bytes=50)
    assert (
        bytes(data.train[0][data.train[2] == 0][:, :-1].flatten().tolist())
        == ((b"first book " * 10 + b"\n" + b"second book " * 10)[:230])
    )
    assert len(data.test) == 4
    assert bytes(data.val[0].tolist()) == ("Ümlaut, ".encode() * 2)[:11]
    cut = ready(**settings, train_bytes=115)
    assert bytes(cut.train[0][cut.train[2] == 0][-1].tolist()).endswith(b"k \n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 0}, "data.context must be at least 1"),
        ({"train_bytes": 10}, "data.train_bytes=10 must be more than data.context=10"),
        ({"sources": {}}, "data.sources is empty"),
        ({"corrupted": {"third": 0.5}}, "data.corrupted names 'third', and the sources are first, second"),
        ({"corrupted": {"first": 1.5}}, r"data.corrupted.first must be in \(0, 1\], got 1.5"),
        ({"corruption": "swap"}, "data.corruption must be replace or shuffle"),
        ({"sources": {"one": "here"}}, "data.validation is needed where all sources are files"),
        (
            {"sources": {"one": "nowhere.txt", "two": None}},
            "data.sources.one: nowhere.txt is neither a file nor a folder",
        ),
        ({"validation": "nowhere.txt"}, "data.validation: nowhere.txt is neither"),
        ({"validation": __file__, "val_bytes": 11, "context": 20}, "must be more than data.context=20"),
        ({"epoch_length": 0}, "data.epoch_length must be at least 1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(BilevelError, match=message):
        ready(**settings)


def test_a_file_that_is_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(BilevelError, match="The text 'test' has 5 bytes, and a window takes 11"):
        ready(test=str(tmp_path / "short.txt"))
