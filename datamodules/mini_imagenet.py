"""MiniImageNet, and other sets in its layouts."""

import csv
from pathlib import Path

import numpy as np
from typing_extensions import override

from bilevel_lightning.datamodules import restricted
from bilevel_lightning.datamodules.decoded import Source, channels_first, picture
from bilevel_lightning.datamodules.episodes import Split
from bilevel_lightning.datamodules.imagenet import ImageNetSubset, torchmeta
from bilevel_lightning.errors import BilevelError


class MiniImageNet(ImageNetSubset):
    r"""Few-shot classification of MiniImageNet: 64, 16 and 20 classes of 600 images of 84x84 pixels.

    Introduced by O. Vinyals et al., "Matching networks for one shot learning", NeurIPS 2016; the fixed split by S. Ravi
    and H. Larochelle, "Optimization as a model for few-shot learning", ICLR 2017. It comes with the files, one for each
    split. Read from the first of these that is found in a folder: ``mini-imagenet-cache-{train,val,test}.pkl`` (or
    ``validation``; without running code from the pickle), torchmeta's ``{train,val,test}_data.hdf5``,
    ``{train,val,test}.csv`` with the columns ``filename,label`` beside images in ``images/<filename>`` or
    ``<split>/<label>/<filename>``. It is not downloaded: the terms of ImageNet do not permit to pass it on.

    Args:
        **settings: of `ImageNetSubset`. Without ``folder``, files are looked for in ``root`` itself and in
            ``mini-imagenet``, ``miniimagenet`` and ``mini_imagenet`` below it.
    """

    folders = ("mini-imagenet", "miniimagenet", "mini_imagenet")

    @override
    def source(self, split: Split) -> Source:
        looked: list[Path] = []
        for folder in self.places:
            pickles = [
                folder / f"mini-imagenet-cache-{name}.pkl" for name in (split, *["validation"][split != "val" :])
            ]
            readers = [
                *((path, self._pickle) for path in pickles),
                (folder / f"{split}_data.hdf5", self._hdf5),
                (folder / f"{split}.csv", self._csv),
            ]
            for path, reader in readers:
                if path.is_file():
                    return reader(path, split)
            looked += [path for path, _ in readers]
        raise self.missing_split(split, looked)

    def _pickle(self, path: Path, split: Split) -> Source:
        content = restricted.load(path)
        try:
            pixels, classes = np.asarray(content["image_data"]), content["class_dict"]
            index = {str(name): np.asarray(numbers, dtype=np.int64) for name, numbers in classes.items()}
            used = np.concatenate([*index.values()])
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise BilevelError(
                f"{path} is not a mini-imagenet-cache file ({error!r}): it needs a dict with image_data and "
                "class_dict. Fetch it again."
            ) from error
        fits = pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[3] == 3
        if not fits or used.min() < 0 or used.max() >= len(pixels):
            raise BilevelError(
                f"{path} is damaged: image_data must be uint8 of shape (N, height, width, 3), got {pixels.dtype} "
                f"{pixels.shape}, and the indices of class_dict below N. Fetch it again."
            )
        names = sorted(index)
        counts = [len(index[name]) for name in names]
        return Source(names, counts, lambda c: channels_first(pixels[index[names[c]]], self.image_size), path)

    def _hdf5(self, path: Path, split: Split) -> Source:
        data, names = torchmeta(path, split)
        counts = [len(data[name]) for name in names]
        return Source(names, counts, lambda c: channels_first(data[names[c]][()], self.image_size), path)

    def _csv(self, path: Path, split: Split) -> Source:
        together = (path.parent / "images").is_dir()
        files: dict[str, list[Path]] = {}
        with path.open(newline="") as lines:
            table = csv.DictReader(lines)
            if not {"filename", "label"} <= set(table.fieldnames or ()):
                raise BilevelError(f"{path} needs the first line filename,label; got {table.fieldnames}.")
            for row in table:
                folder = path.parent / ("images" if together else f"{split}/{row['label']}")
                files.setdefault(row["label"], []).append(folder / row["filename"])
        absent = [file for images in files.values() for file in images if not file.is_file()]
        if absent:
            raise BilevelError(
                f"{path} lists {len(absent)} images that do not exist, the first is {absent[0]}; complete them."
            )
        names = sorted(files)

        def read(c: int) -> np.ndarray:
            return np.stack([picture(file, file, "RGB", self.image_size) for file in files[names[c]]])

        counts = [len(files[name]) for name in names]
        return Source(names, counts, read, path, [path, *(file for name in names for file in files[name])])
