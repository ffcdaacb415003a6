import hashlib
import io
import json
import os
import pickle
import urllib.request
import zipfile
from collections import OrderedDict

import files
import h5py
import numpy as np
import pytest
import torch
from loops import trainer
from PIL import Image
from torchvision import datasets

from bilevel_lightning import BilevelError
from bilevel_lightning.datamodules import MiniImageNet, Omniglot, TieredImageNet, restricted
from bilevel_lightning.datamodules import decoded as decoded_module
from bilevel_lightning.datamodules.omniglot import vinyals

SMALL = {"ways": 3, "shots": 1, "queries": 2}
NAMES = [
    f"images_{part}/Script_{a}/character{c:02d}"
    for part in ("background", "evaluation")
    for a in "AB"
    for c in (1, 2, 3)
]
PART = {**SMALL, "split": "random", "split_sizes": (5, 4, 3), "image_size": 21}


def ready(data, stage=None):
    data.prepare_data()
    data.setup(stage)
    return data


def held(data):
    """Images of all splits by the name of the class, without order."""
    out = {}
    for episodes in data.episodes.values():
        images = episodes.images
        ends = np.cumsum(images.counts)
        for name, end, count in zip(images.names, ends, images.counts, strict=True):
            out[name] = images.pixels[end - count : end]
    return out


def same(first, second):
    """Whether two arrays hold the same images in any order."""
    return sorted(image.tobytes() for image in first) == sorted(image.tobytes() for image in second)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# Omniglot


@pytest.mark.parametrize("layout", ["folders", "zips", "hdf5"])
def test_omniglot_layouts(tmp_path, layout, offline):
    strokes = files.omniglot(tmp_path, layout, NAMES)
    data = ready(Omniglot(root=str(tmp_path), rotations="none", **PART))
    got = held(data)
    assert sorted(got) == NAMES
    for name, drawn in strokes.items():
        assert np.array_equal(got[name][:, 0], drawn * 255)  # strokes 255, also where the file has them black
    assert [len(data.episodes[split].images.names) for split in ("train", "val", "test")] == [5, 4, 3]
    assert data.image_shape == (1, 21, 21)
    again = ready(Omniglot(root=str(tmp_path), rotations="none", **PART))
    assert all(np.array_equal(images, got[name]) for name, images in held(again).items())


def test_omniglot_in_a_folder_and_a_zip(tmp_path):
    files.omniglot(tmp_path, "zips", NAMES)
    archive = tmp_path / "omniglot-py" / "images_background.zip"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(archive.parent)
    archive.unlink()
    assert sorted(held(ready(Omniglot(root=str(tmp_path), rotations="none", **PART)))) == NAMES


def test_omniglot_is_resized(tmp_path):
    files.omniglot(tmp_path, "zips", NAMES, size=105)
    data = ready(Omniglot(root=str(tmp_path), **{**PART, "image_size": 28}), "fit")
    assert data.episodes["val"].images.pixels.shape == (16, 1, 28, 28)
    assert 0.1 < data.episodes["val"].images.pixels.mean() / 255 < 0.3


@pytest.mark.parametrize(("rotations", "classes"), [("train", [20, 4, 3]), ("all", [20, 16, 12]), ("none", [5, 4, 3])])
def test_rotated_characters_are_classes_of_their_own(tmp_path, rotations, classes):
    files.omniglot(tmp_path, "zips", NAMES)
    data = ready(Omniglot(root=str(tmp_path), rotations=rotations, **PART))
    assert [len(data.episodes[split].images.names) for split in ("train", "val", "test")] == classes
    got = held(data)
    for name, images in got.items():
        base, _, turn = name.partition(", ")
        turned = np.rot90(got[base], int(turn.split()[0]) // 90 if turn else 0, axes=(2, 3))
        assert np.array_equal(images, turned)


def test_the_fixed_split_of_omniglot(tmp_path):
    listed = vinyals()
    assert [len(listed[split]) for split in ("train", "val", "test")] == [1028, 172, 423]
    every = [name for names in listed.values() for name in names]
    assert len(set(every)) == len(every) == 1623
    assert sum(name.startswith("images_background") for name in every) == 964
    assert all(name.startswith("images_background") for name in listed["val"])
    assert all(name.startswith("images_evaluation") for name in listed["test"])
    files.omniglot(tmp_path, "zips", every, drawings=2, size=8)
    small = {**SMALL, "queries": 1, "image_size": 8}
    data = ready(Omniglot(root=str(tmp_path), **small))
    for split, names in listed.items():
        plain = [name for name in data.episodes[split].images.names if "," not in name]
        assert sorted(plain) == sorted(names)
    other = ready(Omniglot(root=str(tmp_path), split="background_evaluation", rotations="none", **small))
    names = {split: set(episodes.images.names) for split, episodes in other.episodes.items()}
    assert [len(names[split]) for split in ("train", "val", "test")] == [792, 172, 659]
    assert len(names["train"] | names["val"] | names["test"]) == 1623
    assert names["val"] == set(listed["val"])


def test_random_splits_depend_on_their_seed(tmp_path):
    files.omniglot(tmp_path, "zips", NAMES)
    splits = []
    for seed in (0, 0, 1):
        data = ready(Omniglot(root=str(tmp_path), rotations="none", split_seed=seed, **PART))
        splits.append([set(data.episodes[split].images.names) for split in ("train", "val", "test")])
    assert splits[0] == splits[1] != splits[2]
    assert set.union(*splits[0]) == set(NAMES)


def test_an_incomplete_omniglot(tmp_path):
    files.omniglot(tmp_path, "zips", NAMES)
    message = (
        r"is not complete: 1623 of 1623 characters are missing, the first is images_background/Alph.*data.split=ran"
    )
    with pytest.raises(BilevelError, match=message):
        ready(Omniglot(root=str(tmp_path)))
    with pytest.raises(BilevelError, match=r"data.split_sizes=\(9, 2, 2\) is more than the 12 characters; lower it"):
        ready(Omniglot(root=str(tmp_path), **{**PART, "split_sizes": (9, 2, 2)}))


def test_missing_omniglot(tmp_path, offline):
    message = (
        rf"Omniglot found no data: looked for {tmp_path}/omniglot-py/images_background, .*/images_evaluation.zip, "
        r".*/omniglot/data.hdf5. Not downloaded: data.download is false. Put both"
    )
    with pytest.raises(BilevelError, match=message):
        Omniglot(root=str(tmp_path), download=False).prepare_data()
    with pytest.raises(BilevelError, match="Not downloaded: prepare_data was not called"):
        Omniglot(root=str(tmp_path)).setup()
    with pytest.raises(BilevelError, match="downloading failed .*no network in this test.*BILEVEL_DATA_DIR"):
        Omniglot(root=str(tmp_path)).prepare_data()


class Server:
    """Stands for urllib.request.urlopen: gives the bytes of a file by its name."""

    def __init__(self, content):
        self.content = content

    def __call__(self, request, *args, **kwargs):
        url = request.full_url
        response = io.BytesIO(self.content[url.rsplit("/", 1)[1]])
        response.url, response.headers, response.length = url, {}, None
        return response


def test_downloads_and_wrong_checksums(tmp_path, monkeypatch, caplog):
    files.omniglot(tmp_path / "server", "zips", NAMES)
    content = {file.name: file.read_bytes() for file in (tmp_path / "server" / "omniglot-py").iterdir()}
    monkeypatch.setattr(urllib.request, "urlopen", Server(content))
    with pytest.raises(BilevelError, match="downloading failed .*expected md5 sum 68d2efa1b9178cc56df9314c21c6e718"):
        Omniglot(root=str(tmp_path), **PART).prepare_data()
    assert not [*(tmp_path / "omniglot-py").iterdir()]  # nothing damaged is left behind
    sums = {name.removesuffix(".zip"): hashlib.md5(data).hexdigest() for name, data in content.items()}
    monkeypatch.setattr(datasets.Omniglot, "zips_md5", sums)
    data = ready(Omniglot(root=str(tmp_path), **PART))
    assert len(data.episodes["train"].images.names) == 20
    assert "other md5 sum" not in caplog.text
    monkeypatch.setattr(datasets.Omniglot, "zips_md5", dict.fromkeys(sums, "0" * 32))
    with caplog.at_level("INFO"):
        ready(Omniglot(root=str(tmp_path), **PART))
    assert caplog.text.count("is not the published zip (other md5 sum); its content is read all the same") == 2


def test_damaged_zips(tmp_path):
    files.omniglot(tmp_path, "zips", NAMES)
    archive = tmp_path / "omniglot-py" / "images_background.zip"
    whole = archive.read_bytes()
    with zipfile.ZipFile(archive) as packed:
        info = packed.infolist()[5]
    broken = bytearray(whole)
    start = info.header_offset + 30 + len(info.filename)
    broken[start + 20 : start + 40] = bytes(20)
    archive.write_bytes(bytes(broken))
    with pytest.raises(
        BilevelError, match=rf"{info.filename} is damaged \(Bad CRC-32.*delete the zip and fetch it again"
    ):
        ready(Omniglot(root=str(tmp_path), **PART))
    archive.write_bytes(whole[:-400])
    with pytest.raises(BilevelError, match=r"images_background.zip is damaged \(File is not a zip file\)"):
        ready(Omniglot(root=str(tmp_path), **PART))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "data.image_size must be at least 1, got 0"),
        ({"split_sizes": (5, 0, 3)}, "data.split_sizes must be positive and data.split_seed not negative, got"),
        ({"split_seed": -1}, "data.split_seed not negative"),
        ({"ways": 5, "rotations": "none"}, "data.ways=5 is more than the 4 val classes of Omniglot; lower it"),
        (
            {"shots": 2, "queries": 3},
            r"data.shots=2 and data.queries=3 are together more than the 4 images of class images_.* \(train\); lower",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, message):
    files.omniglot(tmp_path, "zips", NAMES)
    with pytest.raises(BilevelError, match=message):
        ready(Omniglot(root=str(tmp_path), **{**PART, **settings}))


# MiniImageNet


@pytest.mark.parametrize("layout", ["pickle", "hdf5", "images", "folders"])
@pytest.mark.parametrize("folder", [None, "stand-in"])
def test_mini_imagenet_layouts(tmp_path, layout, folder):
    written = files.mini_imagenet(tmp_path / (folder or "mini-imagenet"), layout)
    data = ready(MiniImageNet(root=str(tmp_path), folder=folder, image_size=12, **SMALL))
    assert data.name == (folder or "MiniImageNet")
    assert data.image_shape == (3, 12, 12)
    for split, content in written.items():
        assert data.episodes[split].images.names == sorted(content)
        for name, images in content.items():
            assert same(held(data)[name], np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    resized = ready(MiniImageNet(root=str(tmp_path), folder=folder, image_size=20, **SMALL), "fit")
    for name, images in held(resized).items():
        assert images.shape[1:] == (3, 20, 20)
        want = {**written["train"], **written["val"]}[name]
        assert np.allclose(np.sort(images.mean((2, 3)), 0), np.sort(want.mean((1, 2)), 0), atol=1)


def test_batches_of_grey_and_coloured_files(tmp_path):
    """Grey files among the coloured ones; batches as a training step gets them, normalised by channel."""
    written = files.mini_imagenet(tmp_path, "folders")
    name = next(iter(written["train"]))
    Image.new("L", (12, 12), 99).save(tmp_path / "train" / name / f"{name}_0.png")
    data = MiniImageNet(root=str(tmp_path), image_size=12, mean=[0.5] * 3, std=[0.25] * 3, **SMALL)
    data.trainer = trainer(1)
    batch = data.on_after_batch_transfer(next(iter(ready(data, "fit").train_dataloader())))
    assert (held(data)[name][0] == 99).all()
    assert batch["support"][0].shape == (4, 3, 3, 12, 12)
    assert -2 <= batch["support"][0].min() < -0.5
    assert 0.5 < batch["support"][0].max() <= 2


def test_missing_splits(tmp_path):
    with pytest.raises(BilevelError) as error:
        MiniImageNet(root=str(tmp_path)).setup("fit")
    for name in ("mini-imagenet-cache-train.pkl", "miniimagenet/train_data.hdf5", "mini_imagenet/train.csv"):
        assert f"{tmp_path}/{name}" in str(error.value)
    assert "Put the files of the train split there; they are not downloaded" in str(error.value)
    files.mini_imagenet(tmp_path, "folders")
    (tmp_path / "val.csv").unlink()
    with pytest.raises(BilevelError, match=r"looked for .*cache-validation.pkl, .*val.csv.* the val split there"):
        MiniImageNet(root=str(tmp_path), **SMALL).setup("fit")
    files.tiered_imagenet(tmp_path / "tiered", "pickle")
    (tmp_path / "tiered" / "test_labels.pkl").unlink()
    with pytest.raises(BilevelError, match=r"tiered found no data: looked for .*test_labels.pkl"):
        TieredImageNet(root=str(tmp_path), folder="tiered", **SMALL).setup("test")


def test_wrong_lists(tmp_path):
    files.mini_imagenet(tmp_path, "images")
    settings = {"root": str(tmp_path), "image_size": 12, **SMALL}
    table = tmp_path / "train.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, "gone.png,n00000000"]))
    with pytest.raises(
        BilevelError, match=r"train.csv lists 1 images that do not exist, the first is .*images/gone.png"
    ):
        MiniImageNet(**settings).setup("fit")
    table.write_text("\n".join(lines[1:]))
    with pytest.raises(BilevelError, match=r"train.csv needs the first line filename,label; got"):
        MiniImageNet(**settings).setup("fit")
    table.write_text((tmp_path / "val.csv").read_text())
    with pytest.raises(BilevelError, match="class n10000000 is in the train and in the val split; every class belongs"):
        MiniImageNet(**settings).setup("fit")


@pytest.mark.parametrize("content", [b"not an image", None])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, content):
    files.mini_imagenet(tmp_path, "folders", size=40)
    file = sorted((tmp_path / "val").rglob("*.png"))[8]
    file.write_bytes(content or file.read_bytes()[:-60])
    with pytest.raises(BilevelError, match=rf"{file} cannot be decoded \(.*\); replace that file"):
        ready(MiniImageNet(root=str(tmp_path), image_size=12, **SMALL))
    assert not [*(tmp_path / decoded_module.CACHE).glob("*.tmp")]


@pytest.mark.parametrize(("name", "values"), [("mean", [0.5]), ("std", [1.0, 0.0, 1.0])])
def test_wrong_normalisation(name, values):
    with pytest.raises(BilevelError, match=rf"data.{name} must be three .*one for each channel, got \["):
        MiniImageNet(**{name: values})


class Foreign:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickles_with_foreign_code_are_not_run(tmp_path):
    witness = tmp_path / "witness"
    code = pickle.dumps({"image_data": Foreign(f"touch {witness}"), "class_dict": {}})
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(code)
    message = r"cache-train.pkl was not read: it names posix.system, which is not an array.* source that you trust"
    with pytest.raises(BilevelError, match=message):
        MiniImageNet(root=str(tmp_path), **SMALL).setup("fit")
    files.tiered_imagenet(tmp_path, "pickle")
    for name in ("train_labels.pkl", "val_images_png.pkl"):
        (tmp_path / name).write_bytes(code)
        with pytest.raises(BilevelError, match=rf"{name} was not read: it names posix.system"):
            TieredImageNet(root=str(tmp_path), **SMALL).setup("fit" if name.startswith("train") else "validate")
    assert not witness.exists()
    pickle.loads(code)  # the careless reader
    assert witness.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_restricted_pickles(tmp_path, protocol):
    file = tmp_path / "data.pkl"
    content = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": [1, 2.5, "c", b"d", None, True], "c": np.int64(7)}
    content["e"] = np.array(["x", "yz"], dtype=object)
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    out = restricted.load(file)
    assert np.array_equal(out["a"], content["a"])
    assert out["b"] == content["b"]
    assert out["c"] == 7
    assert out["e"].tolist() == ["x", "yz"]
    file.write_bytes(pickle.dumps(OrderedDict(content), protocol=protocol)[:-3])
    with pytest.raises(BilevelError, match="data.pkl was not read"):
        restricted.load(file)
    for value, name in ((np.load, "load"), (OrderedDict(), "collections.OrderedDict"), (eval, "eval")):
        file.write_bytes(pickle.dumps(value, protocol=protocol))
        with pytest.raises(BilevelError, match=rf"it names .*{name}"):
            restricted.load(file)


def test_pickles_of_python_2_and_codecs(tmp_path):
    """Strings of bytes are latin1; no other codec is run."""
    file = tmp_path / "data.pkl"
    file.write_bytes(b"\x80\x02U\x03\x89PNq\x00.")
    assert restricted.load(file).encode("latin1") == b"\x89PN"
    file.write_bytes(b"c_codecs\nencode\n(Vx\nVrot13\ntR.")
    with pytest.raises(BilevelError, match="bytes in the encoding 'rot13'"):
        restricted.load(file)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"image_data": np.zeros((3, 4, 4, 3), np.uint8)},
        {"image_data": np.zeros((3, 4, 4, 3), np.float32), "class_dict": {"a": [0, 1, 2]}},
        {"image_data": np.zeros((3, 4, 4, 3), np.uint8), "class_dict": {"a": [0, 1, 3]}},
        {"image_data": np.zeros((3, 4, 4), np.uint8), "class_dict": {"a": [0, 1, 2]}},
    ],
)
def test_other_pickles_are_refused(tmp_path, content):
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(BilevelError, match="cache-train.pkl is (damaged|not a mini-imagenet-cache file)"):
        MiniImageNet(root=str(tmp_path), **SMALL).setup("fit")


@pytest.mark.parametrize("cls", [MiniImageNet, TieredImageNet])
def test_wrong_hdf5_files(tmp_path, cls):
    settings = {"root": str(tmp_path), "image_size": 12, **SMALL}
    (files.mini_imagenet if cls is MiniImageNet else files.tiered_imagenet)(tmp_path, "hdf5")
    (tmp_path / "train_labels.json").write_text(json.dumps(["n00000000", "unknown"]))
    with pytest.raises(BilevelError, match=r"train_data.hdf5 does not hold class .* of train_labels.json"):
        cls(**settings).setup("fit")
    (tmp_path / "train_labels.json").write_text("{")
    with pytest.raises(BilevelError, match=r"train_labels.json must hold a list of class names"):
        cls(**settings).setup("fit")
    (tmp_path / "train_labels.json").unlink()
    assert len(ready(cls(**settings)).episodes["train"].images.names) == 6
    (tmp_path / "train_data.hdf5").write_bytes(b"damaged")
    with pytest.raises(BilevelError, match=r"train_data.hdf5 is damaged \(.*\); fetch it again"):
        cls(**settings).setup("fit")
    with h5py.File(tmp_path / "train_data.hdf5", "w"):
        pass
    with pytest.raises(BilevelError, match=r"train_data.hdf5 is damaged"):
        cls(**settings).setup("fit")


# TieredImageNet


@pytest.mark.parametrize("layout", ["pickle", "hdf5"])
def test_tiered_imagenet_layouts(tmp_path, layout):
    folder = tmp_path / ("tiered-imagenet" if layout == "pickle" else "tieredimagenet")
    written = files.tiered_imagenet(folder, layout)
    for settings in ({}, {"folder": folder.name}):
        data = ready(TieredImageNet(root=str(tmp_path), image_size=12, **settings, **SMALL))
        for split, content in written.items():
            images = data.episodes[split].images
            assert isinstance(images.pixels, np.memmap)
            assert sorted(images.names) == sorted(content)
            assert sorted(images.counts) == sorted(map(len, content.values()))
        for name, pixels in held(data).items():
            want = {**written["train"], **written["val"], **written["test"]}[name]
            assert same(np.asarray(pixels), np.ascontiguousarray(want.transpose(0, 3, 1, 2)))
    helped = ready(TieredImageNet(root=str(tmp_path), image_size=12, num_workers=2, epoch_length=2, **SMALL))
    alone = ready(TieredImageNet(root=str(tmp_path), image_size=12, epoch_length=2, **SMALL))
    for one, other in zip(helped.train_dataloader(), alone.train_dataloader(), strict=True):
        assert torch.equal(one["query"][0], other["query"][0])
    helped.teardown("fit")


def test_wrong_tiered_pickles(tmp_path):
    settings = {"root": str(tmp_path), "image_size": 12, **SMALL}
    files.tiered_imagenet(tmp_path, "pickle")
    pngs = pickle.loads((tmp_path / "train_images_png.pkl").read_bytes())
    (tmp_path / "train_images_png.pkl").write_bytes(pickle.dumps(pngs[1:]))
    with pytest.raises(
        BilevelError, match=r"train_images_png.pkl holds 56 images, .*train_labels.pkl 57 labels; fetch"
    ):
        TieredImageNet(**settings).setup("fit")
    pngs[3] = pngs[3][:-30]
    (tmp_path / "train_images_png.pkl").write_bytes(pickle.dumps(pngs))
    with pytest.raises(BilevelError, match=r"train_images_png.pkl, image 3 cannot be decoded"):
        TieredImageNet(**settings).setup("fit")
    (tmp_path / "train_labels.pkl").write_bytes(pickle.dumps({"labels": [1]}))
    with pytest.raises(BilevelError, match=r"train_labels.pkl is not a tiered-imagenet file .* label_specific"):
        TieredImageNet(**settings).setup("fit")


def test_tiered_pickles_as_python_2_wrote_them(tmp_path):
    """PNG files as strings, classes without words."""
    written = files.tiered_imagenet(tmp_path, "pickle")
    pngs = [png.tobytes().decode("latin1") for png in pickle.loads((tmp_path / "test_images_png.pkl").read_bytes())]
    labels = pickle.loads((tmp_path / "test_labels.pkl").read_bytes())["label_specific"].tolist()
    (tmp_path / "test_images_png.pkl").write_bytes(pickle.dumps(pngs))
    (tmp_path / "test_labels.pkl").write_bytes(pickle.dumps({"label_specific": labels}))
    data = ready(TieredImageNet(root=str(tmp_path), image_size=12, **SMALL))
    assert data.episodes["test"].images.names == [f"test/{c}" for c in range(5)]
    for c, want in enumerate(written["test"].values()):
        assert same(np.asarray(held(data)[f"test/{c}"]), np.ascontiguousarray(want.transpose(0, 3, 1, 2)))


# The cache of decoded images


def test_images_are_decoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    written = files.mini_imagenet(tmp_path, "folders")
    settings = {"root": str(tmp_path), "image_size": 12, **SMALL}
    ready(MiniImageNet(**settings))
    cached = sorted((tmp_path / decoded_module.CACHE).iterdir())
    assert [file.name.rsplit("-", 1)[0] for file in cached] == [
        f"miniimagenet-{s}-12" for s in ("test", "train", "val")
    ]
    with monkeypatch.context() as patch:
        patch.setattr(decoded_module.Image, "open", lambda *args: pytest.fail("decoded again"))
        ready(MiniImageNet(**settings))
    name = next(iter(written["train"]))
    file = tmp_path / "train" / name / f"{name}_0.png"
    Image.new("RGB", (12, 12), (1, 2, 3)).save(file)
    os.utime(file, ns=(1, 1))
    data = ready(MiniImageNet(**settings))
    assert held(data)[name][0, :, 5, 5].tolist() == [1, 2, 3]
    now = sorted((tmp_path / decoded_module.CACHE).iterdir())
    assert len(now) == 3  # the old one is gone
    assert now[0] == cached[0]
    assert now[1] != cached[1]


@pytest.mark.parametrize("function", ["mkstemp", "fallocate"])
def test_folders_that_cannot_be_written_have_no_cache(tmp_path, monkeypatch, function):
    written = files.tiered_imagenet(tmp_path, "pickle")

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if function == "mkstemp":
        monkeypatch.setattr(decoded_module.tempfile, "mkstemp", refuse)
    else:
        monkeypatch.setattr(decoded_module.os, "posix_fallocate", refuse, raising=False)
    data = ready(TieredImageNet(root=str(tmp_path), image_size=12, **SMALL))
    assert not [*(tmp_path / decoded_module.CACHE).iterdir()]
    for name, pixels in held(data).items():
        want = {**written["train"], **written["val"], **written["test"]}[name]
        assert same(pixels, np.ascontiguousarray(want.transpose(0, 3, 1, 2)))


# Real data


@pytest.mark.data
def test_real_omniglot(real_data):
    """All 1,623 characters in the fixed split; one character of each alphabet is decoded."""
    data = Omniglot(root=str(real_data("omniglot")))
    source = data.source("train")
    assert set(source.counts) == {20}
    assert len(source.names) == 1623
    assert [len(data.characters(split, source.names)) for split in ("train", "val", "test")] == [1028, 172, 423]
    drawn = np.stack([source.read(c) for c, name in enumerate(source.names) if name.endswith("/character01")])
    assert drawn.shape == (50, 20, 1, 28, 28)
    assert drawn.max() == 255
    assert 0.05 < drawn.mean() / 255 < 0.12  # thin strokes on a background of 0


@pytest.mark.data
def test_real_stand_in_for_mini_imagenet(real_data):
    data = MiniImageNet(root=str(real_data("tiny_miniimagenet")), folder="tiny_miniimagenet", image_size=32)
    assert data.name == "tiny_miniimagenet"
    assert [len(data.source(split).names) for split in ("train", "val", "test")] == [64, 16, 20]
    data.setup("validate")
    assert {images.shape for images in held(data).values()} == {(140, 3, 32, 32)}
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())))
    assert batch["query"][0].shape == (4, 75, 3, 32, 32)
    assert 0.4 < batch["query"][0].mean() < 0.5
