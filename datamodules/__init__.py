"""The data modules."""

from bilevel_lightning.datamodules.architecture import CIFAR10Search, DigitsSearch, SearchData
from bilevel_lightning.datamodules.augmented import AugmentedImages
from bilevel_lightning.datamodules.cifar10 import CIFAR10Cleaning
from bilevel_lightning.datamodules.classification import CIFAR10Training, DigitsTraining, TrainingData
from bilevel_lightning.datamodules.cleaning import CleaningData
from bilevel_lightning.datamodules.digits import DigitsCleaning
from bilevel_lightning.datamodules.episodes import EpisodicDataModule
from bilevel_lightning.datamodules.equilibrium import DigitsEquilibrium, EquilibriumData, MNISTEquilibrium
from bilevel_lightning.datamodules.fewshot_images import FewShotImages
from bilevel_lightning.datamodules.levels import TwoLevelData
from bilevel_lightning.datamodules.mini_imagenet import MiniImageNet
from bilevel_lightning.datamodules.mnist import FashionMNISTCleaning, MNISTCleaning
from bilevel_lightning.datamodules.nothing import NoData
from bilevel_lightning.datamodules.omniglot import Omniglot
from bilevel_lightning.datamodules.poisoning import CIFAR10Poisoning, DigitsPoisoning, MNISTPoisoning, PoisoningData
from bilevel_lightning.datamodules.reweighting import (
    CIFAR10Reweighting,
    DigitsReweighting,
    FashionMNISTReweighting,
    MNISTReweighting,
    ReweightingData,
)
from bilevel_lightning.datamodules.selection import (
    LIBSVMData,
    LinearData,
    Newsgroups,
    SampleIndices,
    SyntheticLinear,
    SyntheticText,
)
from bilevel_lightning.datamodules.sinusoid import Sinusoid
from bilevel_lightning.datamodules.text import TextSources
from bilevel_lightning.datamodules.tiered_imagenet import TieredImageNet

__all__ = [
    "AugmentedImages",
    "CIFAR10Cleaning",
    "CIFAR10Poisoning",
    "CIFAR10Reweighting",
    "CIFAR10Search",
    "CIFAR10Training",
    "CleaningData",
    "DigitsCleaning",
    "DigitsEquilibrium",
    "DigitsPoisoning",
    "DigitsReweighting",
    "DigitsSearch",
    "DigitsTraining",
    "EpisodicDataModule",
    "EquilibriumData",
    "FashionMNISTCleaning",
    "FashionMNISTReweighting",
    "FewShotImages",
    "LIBSVMData",
    "LinearData",
    "MNISTCleaning",
    "MNISTEquilibrium",
    "MNISTPoisoning",
    "MNISTReweighting",
    "MiniImageNet",
    "Newsgroups",
    "NoData",
    "Omniglot",
    "PoisoningData",
    "ReweightingData",
    "SampleIndices",
    "SearchData",
    "Sinusoid",
    "SyntheticLinear",
    "SyntheticText",
    "TextSources",
    "TieredImageNet",
    "TrainingData",
    "TwoLevelData",
]
