"""MNIST and Fashion-MNIST in torchvision's layout."""

from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from typing_extensions import override

from bilevel_lightning.datamodules.cleaning import CleaningData
from bilevel_lightning.datamodules.images import ImageData, Source
from bilevel_lightning.errors import BilevelError


class MNISTFiles(ImageData):
    """MNIST, or a set of the same form, in ``root/<name>/raw`` (torchvision's layout)."""

    image_shape = (1, 28, 28)
    dataset: type[datasets.MNIST] = datasets.MNIST

    @override
    def prepare_data(self) -> None:
        self.source(train=True)

    @override
    def source(self, train: bool) -> Source:
        folder = self.root / self.dataset.__name__ / "raw"
        for name, md5 in self.dataset.resources:
            if (folder / name).exists() and not check_integrity(str(folder / name), md5):
                raise BilevelError(f"{folder / name} is damaged (its md5 sum is not {md5}); delete it and start again.")
        try:
            data = self.dataset(str(self.root), train=train, download=self.download)
        except Exception as error:
            names = ", ".join(name for name, _ in self.dataset.resources)
            raise self.missing(folder, names, error) from error
        return Source(data.data, data.targets)


class MNISTCleaning(MNISTFiles, CleaningData):
    """Hyper-cleaning of MNIST, read from ``root/MNIST/raw`` (torchvision's layout)."""


class FashionMNISTCleaning(MNISTCleaning):
    """Hyper-cleaning of Fashion-MNIST, read from ``root/FashionMNIST/raw`` (torchvision's layout)."""

    dataset = datasets.FashionMNIST
