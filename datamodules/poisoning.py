"""Data poisoning: training images, a part of which may be perturbed (lower level), validation images (upper level)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.datamodules.cifar10 import CIFAR10Files
from bilevel_lightning.datamodules.digits import DigitsFiles
from bilevel_lightning.datamodules.images import ImageData
from bilevel_lightning.datamodules.iterations import Whole
from bilevel_lightning.datamodules.mnist import MNISTFiles
from bilevel_lightning.errors import BilevelError


class PoisoningData(ImageData):
    r"""Base of the poisoning data modules.

    The images of the training file are split, with equal shares of each class, into validation images (upper level) and
    training images (lower level), and those into clean and poisoned ones; labels stay as they are.

    Training batches are ``{"lower": (images, labels, index), "upper": (images, labels)}``. ``index`` is the number of
    the perturbation that an image carries, or -1 for a clean one; the images are the unperturbed ones. The lower part
    of validation and test batches is `poisoned` alone. With several processes each gets every world-size-th sample.

    Args:
        root: as in `ImageData`.
        download: as in `ImageData`.
        samples: number of images taken from the training file, with equal shares of each class; None (default): all.
        val_share: share of those that are validation images. Default 0.25, as in the released code of Grazzi et al.
        poisoned_share: share of the training images that are poisoned. Default 0.2, as there.
        lower_batch_size: as in `TwoLevelData`.
        upper_batch_size: as in `TwoLevelData`.
        epoch_length: as in `TwoLevelData`.
        seed: of the splits and of the minibatches. Default 0.

    Attributes:
        train: images, labels and index of the lower level; the poisoned ones are the first.
        poisoned: the same of the poisoned images alone, with index 0, 1, ...
        val: images and labels of the upper level.
        test: images and labels of the test set.

    Raises:
        BilevelError: if a setting is impossible or the data are missing or damaged.

    References:
        R. Grazzi, M. Pontil, S. Salzo. Bilevel Optimization with a Lower-level Contraction: Optimal Sample Complexity
        without Warm-Start. JMLR 2023.
    """

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        samples: int | None = None,
        val_share: float = 0.25,
        poisoned_share: float = 0.2,
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(root, download, lower_batch_size, upper_batch_size, epoch_length, seed)
        self.save_hyperparameters()
        for name, share in (("val_share", val_share), ("poisoned_share", poisoned_share)):
            if not 0 < share < 1:
                raise BilevelError(f"data.{name} must be above 0 and below 1, got {share}.")
        if samples is not None and samples < 1:
            raise BilevelError(f"data.samples must be at least 1, got {samples}.")
        self.samples, self.val_share, self.poisoned_share = samples, val_share, poisoned_share

    @override
    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "poisoned"):
            return
        source = self.source(train=True)
        chosen, self.test = self._parts(source)
        if self.samples is not None:
            if self.samples > len(chosen):
                raise BilevelError(f"data.samples={self.samples}, but there are {len(chosen)} images; lower it.")
            chosen, _ = self._split(source.labels, chosen, len(chosen) - self.samples)
        train, val = self._split(source.labels, chosen, self.val_share)
        clean, poisoned = self._split(source.labels, train, self.poisoned_share)
        images, labels = self.take(source, [*poisoned, *clean])
        number = len(poisoned)
        index = torch.cat([torch.arange(number), torch.full((len(clean),), -1)])
        self.train = (images, labels, index)
        self.poisoned = (images[:number], labels[:number], index[:number])
        self.val = self.take(source, val)

    def _parts(self, source: Any) -> tuple[Sequence[int], tuple[Tensor, Tensor]]:
        """Returns the numbers of the images that are no test images, and the test set."""
        official = self.source(train=False)
        return range(len(source.labels)), self.take(official, range(len(official.labels)))

    def _split(self, labels: Tensor, index: Sequence[int], second: float) -> tuple[list[int], list[int]]:
        """Splits numbers of images with equal shares of each class; ``second`` is the share or size of the second."""
        from sklearn.model_selection import train_test_split  # takes a second to import, so only where it is needed

        if not second:
            return [*index], []
        try:
            first, rest = train_test_split(
                [*index], test_size=second, random_state=self.seed, stratify=labels[[*index]].numpy()
            )
        except ValueError as error:
            raise BilevelError(
                f"{len(index)} images cannot be split with equal shares of each class ({error}); raise data.samples, "
                "or move data.val_share and data.poisoned_share towards one half."
            ) from error
        return first, rest

    @override
    def val_dataloader(self) -> Whole:
        return Whole({"lower": self.poisoned, "upper": self.val})

    @override
    def test_dataloader(self) -> Whole:
        return Whole({"lower": self.poisoned, "upper": self.test})

    @override
    def predict_dataloader(self) -> Whole:
        return Whole(self.poisoned)


class MNISTPoisoning(MNISTFiles, PoisoningData):
    """Poisoning of MNIST: 36,000 clean, 9,000 poisoned and 15,000 validation images, the official test set of 10,000.

    Read from ``root/MNIST/raw`` (torchvision's layout).
    """


class CIFAR10Poisoning(CIFAR10Files, PoisoningData):
    """Poisoning of CIFAR-10: 30,000 clean, 7,500 poisoned and 12,500 validation images; the official test set.

    Read from ``root/cifar-10-batches-py`` or ``root/cifar10``, see `CIFAR10Files`.
    """


class DigitsPoisoning(DigitsFiles, PoisoningData):
    """Poisoning of scikit-learn's 8x8 digits, which come with that package: 1,797 images, no download.

    A quarter of them, with equal shares of each class, is the test set: 450 images. With the other defaults 808 clean,
    202 poisoned and 337 validation images remain.

    Args:
        samples: as in `PoisoningData`, of the 1,347 images that are no test images.
        val_share: as in `PoisoningData`.
        poisoned_share: as in `PoisoningData`.
        lower_batch_size: as in `TwoLevelData`.
        upper_batch_size: as in `TwoLevelData`.
        epoch_length: as in `TwoLevelData`.
        seed: as in `PoisoningData`; of the test set too.
    """

    def __init__(
        self,
        samples: int | None = None,
        val_share: float = 0.25,
        poisoned_share: float = 0.2,
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(
            samples=samples,
            val_share=val_share,
            poisoned_share=poisoned_share,
            lower_batch_size=lower_batch_size,
            upper_batch_size=upper_batch_size,
            epoch_length=epoch_length,
            seed=seed,
        )

    @override
    def _parts(self, source: Any) -> tuple[Sequence[int], tuple[Tensor, Tensor]]:
        chosen, test = self._split(source.labels, range(len(source.labels)), 0.25)
        return chosen, self.take(source, test)
