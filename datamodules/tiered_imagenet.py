"""TieredImageNet: 608 classes of ImageNet, split by their superclasses."""

from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from bilevel_lightning.datamodules import restricted
from bilevel_lightning.datamodules.decoded import Source, picture
from bilevel_lightning.datamodules.episodes import Split
from bilevel_lightning.datamodules.imagenet import ImageNetSubset, torchmeta
from bilevel_lightning.errors import BilevelError


class TieredImageNet(ImageNetSubset):
    r"""Few-shot classification of TieredImageNet: 351, 97 and 160 classes, 779,165 images of 84x84 pixels.

    M. Ren, E. Triantafillou, S. Ravi, J. Snell, K. Swersky, J. B. Tenenbaum, H. Larochelle, R. S. Zemel, "Meta-learning
    for semi-supervised few-shot classification", ICLR 2018. Read from the first of these that is found in a folder:
    ``{train,val,test}_images_png.pkl`` with ``{train,val,test}_labels.pkl`` (without running code from the pickles),
    torchmeta's ``{train,val,test}_data.hdf5``. It is not downloaded: the terms of ImageNet do not permit to pass it on.

    The PNG images are decoded once to a file in ``root/bilevel_cache`` that is mapped into memory (9.5 GB for training,
    2.6 for validation, 4.4 for test): decoding the 1,280 images of a batch anew would take longer than a step, and the
    decoded images need not fit into memory. Without that file, where the folder cannot be written, they are decoded
    into memory at every start.

    Args:
        **settings: of `ImageNetSubset`. Without ``folder``, files are looked for in ``root`` itself and in
            ``tiered-imagenet``, ``tieredimagenet`` and ``tiered_imagenet`` below it.
    """

    folders = ("tiered-imagenet", "tieredimagenet", "tiered_imagenet")
    mapped = True

    @override
    def source(self, split: Split) -> Source:
        looked: list[Path] = []
        for folder in self.places:
            images, labels = folder / f"{split}_images_png.pkl", folder / f"{split}_labels.pkl"
            torchmetas = folder / f"{split}_data.hdf5"
            if images.is_file() and labels.is_file():
                return self._pickles(images, labels, split)
            if torchmetas.is_file():
                return self._hdf5(torchmetas, split)
            looked += [images, labels, torchmetas]
        raise self.missing_split(split, looked)

    def _pickles(self, images: Path, labels: Path, split: Split) -> Source:
        content = restricted.load(labels)
        try:
            given = np.asarray(content["label_specific"]).reshape(-1).astype(np.int64)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise BilevelError(
                f"{labels} is not a tiered-imagenet file ({error!r}): it needs a dict with label_specific. "
                "Fetch it again."
            ) from error
        order = np.argsort(given, kind="stable")
        classes, counts = np.unique(given, return_counts=True)
        index = np.split(order, np.cumsum(counts)[:-1])
        words = content.get("label_specific_str", [])
        # numbers and words can stand for different classes in different splits
        names = [f"{split}/{words[c]}" if 0 <= c < len(words) else f"{split}/{c}" for c in classes.tolist()]
        encoded: list[Any] = []

        def read(c: int) -> np.ndarray:
            if not encoded:  # several GB, needed only if there is no cache
                encoded.extend(restricted.load(images))
            if len(encoded) != len(given):
                raise BilevelError(
                    f"{images} holds {len(encoded)} images, {labels} {len(given)} labels; fetch both again."
                )
            pngs = [(png(encoded[i]), f"{images}, image {i}") for i in index[c].tolist()]
            return np.stack([picture(data, origin, "RGB", self.image_size) for data, origin in pngs])

        return Source(names, counts.tolist(), read, images, [images, labels])

    def _hdf5(self, path: Path, split: Split) -> Source:
        data, names = torchmeta(path, split)

        def read(c: int) -> np.ndarray:
            pngs = [(png(image), f"{path}, {names[c]}, image {i}") for i, image in enumerate(data[names[c]])]
            return np.stack([picture(content, origin, "RGB", self.image_size) for content, origin in pngs])

        counts = [len(data[name]) for name in names]
        return Source([f"{split}/{name}" for name in names], counts, read, path, [path])


def png(data: Any) -> bytes:
    """Returns the bytes of an encoded image: an array of uint8, or a string of Python 2 or 3."""
    if isinstance(data, str):
        return data.encode("latin1")
    return data if isinstance(data, bytes) else np.asarray(data, dtype=np.uint8).tobytes()
