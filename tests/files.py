"""Writes tiny data sets in the real formats on disk."""

import bz2
import codecs
import gzip
import hashlib
import json
import pickle
import struct
import zipfile
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import dump_svmlight_file
from sklearn.utils import Bunch
from torchvision import datasets


def idx(array: np.ndarray) -> bytes:
    """The IDX format of MNIST."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def images(n: int, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images whose class can be seen: class c has a bright stripe at row 2 c."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    pixels = rng.integers(0, 90, (n, *shape))
    for image, label in zip(pixels, labels, strict=True):
        image[2 * label : 2 * label + 2] += 150
    return pixels.astype(np.uint8), labels


def mnist(root: Path, name: str = "MNIST", train: int = 120, test: int = 40, packed: bool = False) -> Path:
    """``root/MNIST/raw`` in torchvision's layout, unpacked or gzipped."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for prefix, n, seed in (("train", train, 0), ("t10k", test, 1)):
        pixels, labels = images(n, (28, 28), seed)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            file = raw / f"{prefix}-{kind}-ubyte"
            if packed:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                file.write_bytes(idx(array))
    return root


def cifar_folders(root: Path, train: int = 60, test: int = 20) -> Path:
    """``root/cifar10/{train,test}/<class>/NNNN.png``."""
    for split, n, seed in (("train", train, 0), ("test", test, 1)):
        for i, (pixels, label) in enumerate(zip(*images(n, (32, 32, 3), seed), strict=True)):
            folder = root / "cifar10" / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


def cifar_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``root/cifar-10-batches-py`` in torchvision's layout, with its checksums set to those of the written files."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    parts = []
    for i in range(6):
        pixels, labels = images(20, (32, 32, 3), i)
        content = {"data": pixels.transpose(0, 3, 1, 2).reshape(20, -1), "labels": labels.tolist()}
        parts.append(write("test_batch" if i == 5 else f"data_batch_{i + 1}", content))
    meta = write("batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", parts[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", parts[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": meta[1]})
    return root


def coloured(counts: list[int], size: int, seed: int = 0) -> list[np.ndarray]:
    """Images of one class each: smooth, so that resizing keeps their mean; class c of split s has its own colour."""
    rng = np.random.default_rng(seed)
    return [
        np.broadcast_to(rng.integers(0, 256, (n, 1, 1, 3)), (n, size, size, 3)).astype(np.uint8).copy() for n in counts
    ]


SPLIT_CLASSES = {"train": 6, "val": 5, "test": 5}


def mini_imagenet(root: Path, layout: str, per_class: int = 7, size: int = 12) -> dict[str, dict[str, np.ndarray]]:
    """MiniImageNet in one of its layouts (``pickle``, ``hdf5``, ``images``, ``folders``); returns what was written."""
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, (split, classes) in enumerate(SPLIT_CLASSES.items()):
        names = [f"n{seed}{c:07d}" for c in range(classes)]
        content = dict(zip(names, coloured([per_class] * classes, size, seed), strict=True))
        written[split] = content
        if layout == "pickle":
            order = np.random.default_rng(seed).permutation(classes * per_class)  # classes are mixed in the file
            index = {name: order[c * per_class : (c + 1) * per_class].tolist() for c, name in enumerate(names)}
            data = np.zeros((classes * per_class, size, size, 3), np.uint8)
            for name in names:
                data[index[name]] = content[name]
            file = root / f"mini-imagenet-cache-{'validation' if split == 'val' else split}.pkl"
            file.write_bytes(pickle.dumps({"image_data": data, "class_dict": index}, protocol=2))
        elif layout == "hdf5":
            with h5py.File(root / f"{split}_data.hdf5", "w") as file:
                for name in names:
                    file.create_dataset(f"datasets/{name}", data=content[name])
            (root / f"{split}_labels.json").write_text(json.dumps(names))
        else:
            rows = ["filename,label"]
            for name in names:
                folder = root / "images" if layout == "images" else root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for i, pixels in enumerate(content[name]):
                    Image.fromarray(pixels).save(folder / f"{name}_{i}.png")
                    rows.append(f"{name}_{i}.png,{name}")
            (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return written


def encoded(pixels: np.ndarray) -> np.ndarray:
    """A PNG file as tiered-imagenet holds it: a column of uint8."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)[:, None]


def tiered_imagenet(root: Path, layout: str, per_class: int = 7, size: int = 12) -> dict[str, dict[str, np.ndarray]]:
    """TieredImageNet as ``pickle`` or ``hdf5``; returns what was written. Classes differ in their number of images."""
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, (split, classes) in enumerate(SPLIT_CLASSES.items()):
        names = [f"animal {c}, of many names" for c in range(classes)]  # the same words in every split
        content = dict(zip(names, coloured([per_class + c for c in range(classes)], size, seed), strict=True))
        written[split] = {f"{split}/{name}": pixels for name, pixels in content.items()}
        if layout == "pickle":
            labels = np.concatenate([np.full(len(pixels), c) for c, pixels in enumerate(content.values())])
            order = np.random.default_rng(seed).permutation(len(labels))
            images_ = [encoded(pixels) for pixels in np.concatenate([*content.values()])[order]]
            (root / f"{split}_images_png.pkl").write_bytes(pickle.dumps(images_, protocol=2))
            table = {"label_specific": labels[order], "label_specific_str": names, "label_general_str": ["animal"]}
            (root / f"{split}_labels.pkl").write_bytes(pickle.dumps(table, protocol=2))
        else:
            with h5py.File(root / f"{split}_data.hdf5", "w") as file:
                for name, pixels in content.items():
                    data = file.create_dataset(
                        f"datasets/{name}", (len(pixels),), dtype=h5py.special_dtype(vlen=np.uint8)
                    )
                    for i, image in enumerate(pixels):
                        data[i] = encoded(image)[:, 0]
            (root / f"{split}_labels.json").write_text(json.dumps(names))
    return written


def omniglot(root: Path, layout: str, names: list[str], drawings: int = 4, size: int = 21) -> dict[str, np.ndarray]:
    """Omniglot as ``folders``, ``zips`` or ``hdf5``; returns the strokes, ``(drawings, size, size)`` of bool."""
    rng = np.random.default_rng(0)
    strokes = {name: rng.random((drawings, size, size)) < 0.2 for name in names}
    base = root / "omniglot-py"
    if layout == "hdf5":
        (root / "omniglot").mkdir(parents=True)
        with h5py.File(root / "omniglot" / "data.hdf5", "w") as file:
            for name, drawn in strokes.items():
                file.create_dataset(name, data=drawn.astype(np.uint8) * 255)
        return strokes
    base.mkdir(parents=True)
    archives = {p: zipfile.ZipFile(base / f"{p}.zip", "w") for p in ("images_background", "images_evaluation")}
    for name, drawn in strokes.items():
        for i, stroke in enumerate(drawn):
            buffer = BytesIO()
            Image.fromarray(~stroke).save(buffer, format="PNG")  # 1-bit, black on white
            archives[name.split("/")[0]].writestr(f"{name}/0001_{i + 1:02d}.png", buffer.getvalue())
    for part, archive in archives.items():
        archive.close()
        if layout == "folders":
            with zipfile.ZipFile(base / f"{part}.zip") as packed:
                packed.extractall(base)
            (base / f"{part}.zip").unlink()
    return strokes


def random_samples(n, d, classes, seed=0):
    """Inputs of which six in ten entries are not zero, and labels in turn."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(2.0, 3.0, (n, d)) * (rng.random((n, d)) < 0.6)
    inputs[0] = 1.0  # so that the last feature is there
    return inputs, np.asarray(classes)[np.arange(n) % len(classes)]


def write_libsvm(path, inputs, labels):
    """A file in the LIBSVM format, packed as its name says."""
    content = BytesIO()
    dump_svmlight_file(inputs, labels, content, zero_based=False)
    packed = {".bz2": bz2.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(packed(content.getvalue()))


def libsvm(path, n, d, classes, seed=0):
    write_libsvm(path, *random_samples(n, d, classes, seed))


def newsgroups(folder, classes=3, documents=12):
    """Scikit-learn's file of the newsgroups: a pickle of posts, zlib-packed."""
    rng = np.random.default_rng(0)

    def posts(n):
        labels = np.arange(n) % classes
        common = [f"common{i}" for i in range(60)]
        texts = []
        for label in labels:
            words = [*rng.choice(common, 6), *(f"topic{label}word{i}" for i in rng.choice(20, 4))]
            texts.append(f"From: someone{label}@somewhere\nSubject: secret{label}\n\n" + " ".join(words) + "\n")
        names = np.array([f"{i}" for i in range(n)])
        return Bunch(data=texts, target=labels, filenames=names, target_names=[f"group{c}" for c in range(classes)])

    cache = {"train": posts(documents), "test": posts(documents // 2)}
    (folder / "20news-bydate_py3.pkz").write_bytes(codecs.encode(pickle.dumps(cache), "zlib_codec"))
