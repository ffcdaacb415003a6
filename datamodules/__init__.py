"""The data modules."""

from bilevel_lightning.datamodules.cifar10 import CIFAR10Cleaning
from bilevel_lightning.datamodules.cleaning import CleaningData
from bilevel_lightning.datamodules.digits import DigitsCleaning
from bilevel_lightning.datamodules.mnist import FashionMNISTCleaning, MNISTCleaning
from bilevel_lightning.datamodules.nothing import NoData

__all__ = ["CIFAR10Cleaning", "CleaningData", "DigitsCleaning", "FashionMNISTCleaning", "MNISTCleaning", "NoData"]
