"""Images with random crops, reflections and cutout."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from bilevel_lightning.datamodules.images import ImageData
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


class CIFAR10Statistics:
    """Mean and standard deviation of the channels of CIFAR-10's training images."""

    mean: Sequence[float] = (0.4914, 0.4822, 0.4465)
    std: Sequence[float] = (0.2470, 0.2435, 0.2616)


class DigitsStatistics:
    """Mean and standard deviation of scikit-learn's digits, which have no official test set."""

    mean: Sequence[float] = (0.3053,)
    std: Sequence[float] = (0.3760,)
    official_test = False
