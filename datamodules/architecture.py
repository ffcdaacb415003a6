"""Data of architecture search: one part for the weights of the network, one for its architecture."""

from typing_extensions import override

from bilevel_lightning.datamodules.augmented import AugmentedImages, CIFAR10Statistics, DigitsStatistics, Parts
from bilevel_lightning.datamodules.cifar10 import CIFAR10Files
from bilevel_lightning.datamodules.digits import DigitsFiles
from bilevel_lightning.errors import BilevelError


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
    def val_dataloader(self) -> Parts:
        return self.parts_of(self.val, "lower", "upper")

    @override
    def test_dataloader(self) -> Parts:
        return self.parts_of(self.test, "lower", "upper")

    @override
    def predict_dataloader(self) -> Parts:
        return self.parts_of(self.test)


class CIFAR10Search(CIFAR10Statistics, CIFAR10Files, SearchData):
    """Architecture search on CIFAR-10, from ``root/cifar-10-batches-py`` or ``root/cifar10`` (`CIFAR10Files`)."""


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
