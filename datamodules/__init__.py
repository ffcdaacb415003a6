"""The data modules."""

from bilevel_lightning.datamodules.cleaning import (
    CIFAR10Cleaning,
    CleaningData,
    DigitsCleaning,
    FashionMNISTCleaning,
    MNISTCleaning,
)

__all__ = ["CIFAR10Cleaning", "CleaningData", "DigitsCleaning", "FashionMNISTCleaning", "MNISTCleaning"]
