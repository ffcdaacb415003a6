"""Images with random crops, reflections and cutout: for architecture search, and for training what it found."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from bilevel_lightning.datamodules.cifar10 import CIFAR10Files
from bilevel_lightning.datamodules.digits import DigitsFiles
from bilevel_lightning.datamodules.images import ImageData
from bilevel_lightning.datamodules.iterations import Iterations
from bilevel_lightning.datamodules.levels import Samples
from bilevel_lightning.errors import BilevelError


class Augmentation:
    """Crop from a padded image, reflection, normalisation, cutout, each image its own.

    What happens is a function of a key alone, so that a resumed run sees the images that it would have seen.

    Args:
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        padding: black pixels around an image, from which a piece of its own size is cut.
        flip: reflect every other image, on average.
        cutout: side of a square at a random place that is set to the mean, its part outside the image being lost;
            0: none. T. DeVries, G. W. Taylor. Improved Regularization of Convolutional Neural Networks with Cutout.
            arXiv 1708.04552.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], padding: int = 4, flip: bool = True, cutout: int = 0
    ) -> None:
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
        self.padding, self.flip, self.cutout = padding, flip, cutout

    def normalized(self, images: Tensor) -> Tensor:
        """Returns the images without random changes, as evaluations see them."""
        return (images - self.mean.to(images)) / self.std.to(images)

    def __call__(self, images: Tensor, key: Sequence[int]) -> Tensor:
        """Returns changed images, shape ``(batch, channels, height, width)``, values in [0, 1] before."""
        generator = np.random.default_rng([*key])
        n, height, width = len(images), *images.shape[2:]

        def draw(high: int) -> Tensor:
            return torch.from_numpy(generator.integers(0, high, (n, 1))).to(images.device)

        rows = torch.arange(height, device=images.device) + draw(2 * self.padding + 1)
        columns = torch.arange(width, device=images.device) + draw(2 * self.padding + 1)
        if self.flip:
            columns = torch.where(draw(2) == 1, columns.flip(1), columns)
        every = torch.arange(n, device=images.device)[:, None, None]
        padded = functional.pad(images, [self.padding] * 4)
        out = padded.permute(0, 2, 3, 1)[every, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        out = self.normalized(out)
        if self.cutout:
            row, column = draw(height), draw(width)
            down = torch.arange(height, device=images.device) - row + self.cutout // 2
            across = torch.arange(width, device=images.device) - column + self.cutout // 2
            hidden = ((down >= 0) & (down < self.cutout))[:, :, None] & ((across >= 0) & (across < self.cutout))[
                :, None
            ]
            out = out.masked_fill(hidden[:, None], 0.0)
        return out


class Parts:
    """A loader of equal parts of some images, which differ in size by at most one.

    Args:
        data: images and labels.
        size: largest size of a part.
        keys: names that each part is given under; none: it comes as it is.
    """

    def __init__(self, data: Samples, size: int, keys: Sequence[str] = ()) -> None:
        self.data, self.number, self.keys = data, math.ceil(len(data[0]) / size), keys

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Any]:
        for part in zip(*(t.tensor_split(self.number) for t in self.data), strict=True):
            yield dict.fromkeys(self.keys, part) if self.keys else part


class AugmentedImages(ImageData):
    """Base of the two kinds of data modules below.

    Args:
        settings: of `ImageData`.
        image_size: side of the images in pixels, where it is smaller than theirs: the means of blocks. None: theirs.
        padding: see `Augmentation`.
        flip: see `Augmentation`.
        cutout: see `Augmentation`.
        evaluation_batch_size: largest number of images at once in an evaluation.

    Attributes:
        image_shape: channels, height, width, as the settings make them.
        mean: of each channel.
        std: of each channel.
        official_test: whether there is an official test set; else it is what the selection leaves.

    Raises:
        BilevelError: if a setting is impossible.
    """

    mean: Sequence[float]
    std: Sequence[float]
    official_test = True

    def __init__(
        self,
        *,
        image_size: int | None,
        padding: int,
        flip: bool,
        cutout: int,
        evaluation_batch_size: int,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        for name, value in (("padding", padding), ("cutout", cutout)):
            if value < 0:
                raise BilevelError(f"data.{name} must not be negative, got {value}.")
        if evaluation_batch_size < 1:
            raise BilevelError(f"data.evaluation_batch_size must be at least 1, got {evaluation_batch_size}.")
        side = self.image_shape[1]
        if image_size is not None:
            if not (1 <= image_size <= side and side % image_size == 0):
                raise BilevelError(f"data.image_size must divide the {side} pixels of an image, got {image_size}.")
            self.image_shape = (self.image_shape[0], image_size, image_size)
        self.block = side // self.image_shape[1]
        self.augmentation = Augmentation(self.mean, self.std, padding, flip, cutout)
        self.evaluation_batch_size = evaluation_batch_size

    @override
    def take(self, source: Any, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, labels = super().take(source, index)
        return (images if self.block == 1 else functional.avg_pool2d(images, self.block)), labels

    @override
    def augment(self, samples: Samples, key: Sequence[int]) -> Samples:
        """Returns changed images and their labels."""
        images, labels = samples
        return self.augmentation(images, key), labels

    def select(self, sizes: Sequence[int], names: str) -> list[tuple[Tensor, Tensor]]:
        """Returns parts of these sizes of the training images, in a shuffle with ``seed``, and the test images.

        Raises:
            BilevelError: if there are too few images; the message speaks of the settings ``names``.
        """
        source = self.source(train=True)
        order = np.random.default_rng(self.seed).permutation(len(source.labels)).tolist()
        if sum(sizes) + (not self.official_test) > len(order):
            rest = "" if self.official_test else " and leave at least one for the test"
            raise BilevelError(f"{names} must not exceed the {len(order)} images{rest}; lower them.")
        parts, first = [], 0
        for size in sizes:
            parts.append(self.take(source, order[first : first + size]) if size else None)
            first += size
        if self.official_test:
            official = self.source(train=False)
            parts.append(self.take(official, range(len(official.labels))))
        else:
            parts.append(self.take(source, order[first:]))
        empty = torch.zeros(0, *self.image_shape), torch.zeros(0, dtype=torch.long)
        return [empty if part is None else part for part in parts]

    def parts_of(self, data: Samples, *keys: str) -> Parts:
        """Returns a loader of the data without random changes."""
        return Parts((self.augmentation.normalized(data[0]), data[1]), self.evaluation_batch_size, keys)


class SearchData(AugmentedImages):
    r"""Base of the data modules of architecture search: the training images, divided between the levels.

    A shuffle with ``seed`` gives ``round(lower_share * samples)`` images to the lower level, which trains the network,
    and the rest of the ``samples`` to the upper level, which chooses the architecture. Training batches are
    ``{"lower": (images, labels), "upper": (images, labels)}``, with random changes that are a function of (seed,
    iteration, level, number, process). Validation is on the upper level's images, which the search fits; test on images
    of neither level. Both are in parts, without random changes.

    Args:
        root: folder of the data; default: the environment variable ``BILEVEL_DATA_DIR``, else ``data``.
        download: fetch missing files, with checksums. Default True.
        samples: number of training images of both levels; None (default): all.
        lower_share: share of the lower level. Default 0.5, DARTS's.
        lower_batch_size: as in `TwoLevelData`. Default 64, DARTS's.
        upper_batch_size: as in `TwoLevelData`. Default 64, DARTS's.
        epoch_length: as in `TwoLevelData`. Default 390, once the lower level of CIFAR-10.
        image_size: side of the images, see `AugmentedImages`. Default: as they are.
        padding: of random crops. Default 4, DARTS's.
        flip: random reflections. Default True, DARTS's.
        cutout: side of the square. Default 0, none, DARTS's in searching.
        evaluation_batch_size: largest number of images at once in an evaluation. Default 500.
        seed: as in `TwoLevelData`, and of the selection. Default 0.

    Attributes:
        train: images and labels of the lower level.
        val: images and labels of the upper level.
        test: images and labels of the test set.

    Raises:
        BilevelError: if a setting is impossible, or the data are missing or damaged.
    """

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        samples: int | None = None,
        lower_share: float = 0.5,
        lower_batch_size: int | None = 64,
        upper_batch_size: int | None = 64,
        epoch_length: int = 390,
        image_size: int | None = None,
        padding: int = 4,
        flip: bool = True,
        cutout: int = 0,
        evaluation_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root=root,
            download=download,
            lower_batch_size=lower_batch_size,
            upper_batch_size=upper_batch_size,
            epoch_length=epoch_length,
            seed=seed,
            image_size=image_size,
            padding=padding,
            flip=flip,
            cutout=cutout,
            evaluation_batch_size=evaluation_batch_size,
        )
        self.save_hyperparameters()
        if samples is not None and samples < 2:
            raise BilevelError(f"data.samples must be at least 2, got {samples}.")
        if not 0 < lower_share < 1:
            raise BilevelError(f"data.lower_share must be above 0 and below 1, got {lower_share}.")
        self.samples, self.lower_share = samples, lower_share

    @override
    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "test"):
            return
        samples = len(self.source(train=True).labels) if self.samples is None else self.samples
        lower = min(max(round(self.lower_share * samples), 1), samples - 1)
        self.train, self.val, self.test = self.select([lower, samples - lower], f"data.samples={samples}")

    @override
    def levels(self) -> tuple[Samples, Samples]:
        return self.train, self.val

    @override
    def val_dataloader(self) -> Parts:
        return self.parts_of(self.val, "lower", "upper")

    @override
    def test_dataloader(self) -> Parts:
        return self.parts_of(self.test, "lower", "upper")

    @override
    def predict_dataloader(self) -> Parts:
        return self.parts_of(self.test)


class TrainingData(AugmentedImages):
    r"""Base of the data modules that train one network in the usual way, such as `Retraining`.

    Training batches are ``(images, labels)``: an epoch goes once through a shuffle of the training images that is a
    function of (seed, epoch), and leaves out the last that fill no batch; random changes are a function of (seed,
    iteration, process). So a run can be resumed anywhere. With several processes each gets every world-size-th sample.

    Args:
        root: folder of the data; default: the environment variable ``BILEVEL_DATA_DIR``, else ``data``.
        download: fetch missing files, with checksums. Default True.
        train_samples: number of training images, of a shuffle with ``seed``; None (default): all but those of
            validation.
        val_samples: number of further images for validation. Default 0: there is none.
        batch_size: minibatch size. Default 96, DARTS's.
        image_size: side of the images, see `AugmentedImages`. Default: as they are.
        padding: of random crops. Default 4, DARTS's.
        flip: random reflections. Default True, DARTS's.
        cutout: side of the square, 0 for none. Default 16, DARTS's.
        evaluation_batch_size: largest number of images at once in an evaluation. Default 500.
        seed: of the selection, the shuffles and the random changes. Default 0.

    Attributes:
        train: images and labels of training.
        val: images and labels of validation.
        test: images and labels of the test set.

    Raises:
        BilevelError: if a setting is impossible, or the data are missing or damaged.
    """

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        train_samples: int | None = None,
        val_samples: int = 0,
        batch_size: int = 96,
        image_size: int | None = None,
        padding: int = 4,
        flip: bool = True,
        cutout: int = 16,
        evaluation_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root=root,
            download=download,
            seed=seed,
            image_size=image_size,
            padding=padding,
            flip=flip,
            cutout=cutout,
            evaluation_batch_size=evaluation_batch_size,
        )
        self.save_hyperparameters()
        for name, value, least in (
            ("train_samples", train_samples, 1),
            ("val_samples", val_samples, 0),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise BilevelError(f"data.{name} must be at least {least}, got {value}.")
        self.train_samples, self.val_samples, self.batch_size = train_samples, val_samples, batch_size

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None and self.val_samples == 0:
            self.trainer.limit_val_batches = 0  # else Lightning warns of an empty loader
        if hasattr(self, "test"):
            return
        train = self.train_samples
        if train is None:
            train = len(self.source(train=True).labels) - self.val_samples
        names = f"data.train_samples={train} and data.val_samples={self.val_samples}"
        self.train, self.val, self.test = self.select([train, self.val_samples], names)

    @override
    def levels(self) -> tuple[Samples, Samples]:
        return self.train, self.val

    @override
    def train_dataloader(self) -> Iterations:
        assert self.trainer is not None
        device, rank, world = self.trainer.strategy.root_device, self.trainer.global_rank, self.trainer.world_size
        images, labels = (t.to(device) for t in self.train)
        size, number = self.batch_size, len(labels) // self.batch_size
        if number == 0:
            raise BilevelError(f"data.batch_size={size} is more than the {len(labels)} training images; lower it.")
        if size < world:
            raise BilevelError(f"data.batch_size={size} is less than the {world} processes that share it; raise it.")

        def batch(k: int) -> Samples:
            epoch, i = divmod(k, number)
            order = np.random.default_rng([self.seed, epoch]).permutation(len(labels))[i * size : (i + 1) * size]
            index = torch.from_numpy(order[rank : size // world * world : world]).to(device)
            return self.augment((images[index], labels[index]), [self.seed, k, rank])

        return Iterations(batch, number, self.trainer)

    @override
    def val_dataloader(self) -> Parts:
        return self.parts_of(self.val)

    @override
    def test_dataloader(self) -> Parts:
        return self.parts_of(self.test)

    @override
    def predict_dataloader(self) -> Parts:
        return self.parts_of(self.test)


class CIFAR10Statistics:
    """Mean and standard deviation of the channels of CIFAR-10's training images."""

    mean: Sequence[float] = (0.4914, 0.4822, 0.4465)
    std: Sequence[float] = (0.2470, 0.2435, 0.2616)


class DigitsStatistics:
    """Mean and standard deviation of scikit-learn's digits, which have no official test set."""

    mean: Sequence[float] = (0.3053,)
    std: Sequence[float] = (0.3760,)
    official_test = False


class CIFAR10Search(CIFAR10Statistics, CIFAR10Files, SearchData):
    """Architecture search on CIFAR-10, from ``root/cifar-10-batches-py`` or ``root/cifar10`` (`CIFAR10Files`)."""


class CIFAR10Training(CIFAR10Statistics, CIFAR10Files, TrainingData):
    """Training on CIFAR-10, from ``root/cifar-10-batches-py`` or ``root/cifar10`` (`CIFAR10Files`)."""


class DigitsSearch(DigitsStatistics, DigitsFiles, SearchData):
    """Architecture search on scikit-learn's 8x8 digits, which come with that package: no download.

    Args:
        samples: as in `SearchData`. Default 1200; the other 597 images are the test set.
        lower_share: as in `SearchData`.
        lower_batch_size: as in `SearchData`. Default 32.
        upper_batch_size: as in `SearchData`. Default 32.
        epoch_length: as in `SearchData`. Default 20.
        padding: as in `SearchData`. Default 1.
        cutout: as in `SearchData`.
        evaluation_batch_size: as in `SearchData`.
        seed: as in `SearchData`.
    """

    def __init__(
        self,
        samples: int = 1200,
        lower_share: float = 0.5,
        lower_batch_size: int | None = 32,
        upper_batch_size: int | None = 32,
        epoch_length: int = 20,
        padding: int = 1,
        cutout: int = 0,
        evaluation_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(
            samples=samples,
            lower_share=lower_share,
            lower_batch_size=lower_batch_size,
            upper_batch_size=upper_batch_size,
            epoch_length=epoch_length,
            padding=padding,
            flip=False,
            cutout=cutout,
            evaluation_batch_size=evaluation_batch_size,
            seed=seed,
        )


class DigitsTraining(DigitsStatistics, DigitsFiles, TrainingData):
    """Training on scikit-learn's 8x8 digits, which come with that package: no download.

    Args:
        train_samples: as in `TrainingData`. Default 1000.
        val_samples: as in `TrainingData`. Default 200; the other images are the test set.
        batch_size: as in `TrainingData`. Default 50.
        padding: as in `TrainingData`. Default 1.
        cutout: as in `TrainingData`. Default 0.
        evaluation_batch_size: as in `TrainingData`.
        seed: as in `TrainingData`.
    """

    def __init__(
        self,
        train_samples: int = 1000,
        val_samples: int = 200,
        batch_size: int = 50,
        padding: int = 1,
        cutout: int = 0,
        evaluation_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_samples=train_samples,
            val_samples=val_samples,
            batch_size=batch_size,
            padding=padding,
            flip=False,
            cutout=cutout,
            evaluation_batch_size=evaluation_batch_size,
            seed=seed,
        )
