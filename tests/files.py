"""Writes tiny data sets in the real formats on disk."""

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
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
