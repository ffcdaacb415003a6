"""Episodes of images: classes and their images, drawn without replacement."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from bilevel_lightning.datamodules.decoded import Images, Source, decode
from bilevel_lightning.datamodules.episodes import SPLITS, Episode, Episodes, EpisodicDataModule, Split, needed
from bilevel_lightning.datamodules.images import data_folder
from bilevel_lightning.errors import BilevelError


class ImageEpisodes(Episodes):
    """Draws the classes of an episode, and of each class its support and query images.

    Args:
        split: number of the split.
        seed: of the episodes.
        images: decoded images of the split.
        ways: classes of an episode.
        shots: support images of each class.
        queries: query images of each class.
    """

    def __init__(self, split: int, seed: int, images: Images, ways: int, shots: int, queries: int) -> None:
        super().__init__(split, seed)
        self.images, self.ways, self.shots, self.queries = images, ways, shots, queries
        counts = np.array(images.counts)
        self.first = np.cumsum(counts) - counts
        self.absent = np.arange(counts.max()) >= counts[:, None]

    @override
    def episode(self, rng: np.random.Generator) -> Episode:
        n, k, q = self.ways, self.shots, self.queries
        classes = rng.choice(len(self.first), n, replace=False)
        keys = rng.random((n, self.absent.shape[1]))  # the order of random keys: all classes drawn with one call
        keys[self.absent[classes]] = 2
        index = self.first[classes, None] + keys.argsort(axis=1)[:, : k + q]
        labels = np.arange(n)
        return index[:, :k].reshape(-1), labels.repeat(k), index[:, k:].reshape(-1), labels.repeat(q)

    @override
    def samples(self, x: np.ndarray) -> np.ndarray:
        return np.take(self.images.pixels, x, axis=0)

    def __getstate__(self) -> dict[str, Any]:
        """Of mapped images only the file's name goes to a worker process."""
        pixels = self.images.pixels
        file = pixels.filename if isinstance(pixels, np.memmap) else None
        return {**self.__dict__, "file": file, "images": self.images if file is None else self.images[1:]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file = state.pop("file")
        self.__dict__.update(state)
        if file is not None:
            self.images = Images(np.load(file, mmap_mode="r"), *state["images"])


class FewShotImages(EpisodicDataModule):
    """Base of the few-shot data modules that read images.

    Images are decoded once and kept as uint8; decoded images are also kept in ``root/bilevel_cache``, where that folder
    can be written and decoding takes time.

    Args:
        root: folder of the data; default: the environment variable ``BILEVEL_DATA_DIR``, else ``data``.
        download: fetch missing files where that is possible (Omniglot). Default True.
        image_size: height and width in pixels, to which other sizes are resized.
        **settings: of `EpisodicDataModule`.

    Raises:
        BilevelError: if a setting is impossible, or the data are missing, damaged or too few for it.
    """

    channels = 3
    mapped = False

    def __init__(self, root: str | None = None, download: bool = True, image_size: int = 84, **settings: Any) -> None:
        super().__init__(**settings)
        if image_size < 1:
            raise BilevelError(f"data.image_size must be at least 1, got {image_size}.")
        self.root = data_folder(root)
        self.download, self.image_size = download, image_size
        self.image_shape = (self.channels, image_size, image_size)

    @abstractmethod
    def source(self, split: Split) -> Source:
        """Returns the classes and images of a split."""

    def images(self, split: Split) -> Images:
        """Returns the decoded images of a split."""
        return self.decoded(self.source(split), split)

    def decoded(self, source: Source, split: str) -> Images:
        """Returns the decoded images of a source."""
        stem = f"{self.name.lower()}-{split}-{self.image_size}"
        return decode(source, self.image_shape, self.root, stem, self.mapped)

    @override
    def prepare_data(self) -> None:
        """Writes the cache where there is one to write: one process of each machine does this, before the others read.

        Raises:
            BilevelError: if the data are missing or damaged.
        """
        for split in needed(None if self.trainer is None else self.trainer.state.fn):
            source = self.source(split)
            if source.files is not None:
                self.decoded(source, split)

    @override
    def split_episodes(self, split: Split) -> ImageEpisodes:
        images = self.images(split)
        self._check(split, images)
        rank_zero_info(f"{self.name}, {split}: {len(images.names)} classes, {sum(images.counts)} images.")
        return ImageEpisodes(SPLITS.index(split), self.seed, images, self.ways, self.shots, self.queries)

    def _check(self, split: Split, images: Images) -> None:
        if self.ways > len(images.names):
            raise BilevelError(
                f"data.ways={self.ways} is more than the {len(images.names)} {split} classes of {self.name}; lower it."
            )
        fewest = min(range(len(images.counts)), key=images.counts.__getitem__)
        if self.shots + self.queries > images.counts[fewest]:
            raise BilevelError(
                f"data.shots={self.shots} and data.queries={self.queries} are together more than the "
                f"{images.counts[fewest]} images of class {images.names[fewest]} ({split}); lower one of them."
            )
        for other, episodes in self.episodes.items():
            assert isinstance(episodes, ImageEpisodes)
            both = set(episodes.images.names) & set(images.names)
            if both:
                raise BilevelError(
                    f"{self.name}: class {min(both)} is in the {other} and in the {split} split; every class belongs "
                    "to one of them. Repair the split files."
                )

    def missing(self, looked: list[Path], remedy: str) -> BilevelError:
        """Returns the error that says where files were looked for, and how to get them."""
        places = ", ".join(str(path) for path in looked)
        return BilevelError(
            f"{self.name} found no data: looked for {places}. {remedy} Or set data.root or the environment variable "
            "BILEVEL_DATA_DIR to the folder that holds them."
        )
