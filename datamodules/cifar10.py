"""CIFAR-10 in torchvision's layout or in class folders."""

import torch
from torchvision import datasets
from typing_extensions import override

from bilevel_lightning.datamodules.cleaning import CleaningData
from bilevel_lightning.datamodules.images import ImageData, Source


class CIFAR10Files(ImageData):
    """CIFAR-10.

    Read from ``root/cifar-10-batches-py`` (torchvision's layout), else from the class folders
    ``root/cifar10/{train,test}/<class>/*`` with any image files; only the selected images are decoded.
    """

    image_shape = (3, 32, 32)

    @override
    def prepare_data(self) -> None:
        self.source(train=True)

    @override
    def source(self, train: bool) -> Source:
        folder = self.root / "cifar10" / ("train" if train else "test")
        batches = self.root / datasets.CIFAR10.base_folder
        try:
            if folder.is_dir() and not batches.is_dir():
                files = datasets.ImageFolder(str(folder))
                return Source([name for name, _ in files.samples], torch.tensor(files.targets))
            data = datasets.CIFAR10(str(self.root), train=train, download=self.download)
        except Exception as error:
            names = f"{datasets.CIFAR10.filename} unpacked, or class folders in {folder}"
            raise self.missing(batches, names, error) from error
        return Source(data.data, torch.tensor(data.targets))


class CIFAR10Cleaning(CIFAR10Files, CleaningData):
    """Hyper-cleaning of CIFAR-10, from ``root/cifar-10-batches-py`` or ``root/cifar10`` (`CIFAR10Files`)."""
