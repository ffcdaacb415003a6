"""Data reweighting: a long-tailed or wrongly labelled training set, a small clean balanced meta set, a test set."""

import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision import datasets
from typing_extensions import override

from bilevel_lightning.datamodules.cifar10 import CIFAR10Files
from bilevel_lightning.datamodules.digits import DigitsFiles
from bilevel_lightning.datamodules.images import ImageData, Source
from bilevel_lightning.datamodules.iterations import Whole
from bilevel_lightning.datamodules.levels import Samples
from bilevel_lightning.datamodules.mnist import MNISTFiles
from bilevel_lightning.errors import BilevelError

Noise = Literal["symmetric", "asymmetric"]
DIGITS = MappingProxyType({2: 7, 3: 8, 5: 6, 6: 5, 7: 1})
SHOWN = 1000  # training samples of which validation and test batches tell the weights


def long_tail(largest: int, classes: int, imbalance_factor: float) -> list[int]:
    """Returns the number of samples of each class, ``largest * imbalance_factor^(-c / (classes - 1))`` rounded down.

    The exponential profile of Y. Cui, M. Jia, T.-Y. Lin, Y. Song, S. Belongie. Class-Balanced Loss Based on Effective
    Number of Samples. CVPR 2019.

    Args:
        largest: samples of class 0.
        classes: number of classes, at least 2.
        imbalance_factor: samples of class 0 over those of the last class.
    """
    exact = [largest * imbalance_factor ** (-c / (classes - 1)) for c in range(classes)]
    return [int(n + 1e-9) for n in exact]  # 100 * 10^-1 is 10, whatever rounding makes of it


class ReweightingData(ImageData):
    r"""Base of the reweighting data modules.

    Of the training file, shuffled with ``seed``, the first ``meta_per_class`` images of each class are the meta set of
    the upper level, with right labels. Of the others, class c gives its next n_c images to the lower level (`long_tail`
    with n_0 = ``class_samples``). Then labels are replaced:

    * ``noise: symmetric``: exactly ``round(noise_rate * n)`` of all n labels, by a different class, uniformly;
    * ``noise: asymmetric``: exactly ``round(noise_rate * n_c)`` of the labels of each class c in `pairs`, by its
      partner there; other classes keep theirs.

    Training batches are ``{"lower": (images, labels, index, source), "upper": (images, labels)}``: labels as given,
    numbers of the training samples, and the given label once more, as the number of the source, so that `SourceWeights`
    weigh classes. Validation is on the meta set, test on the official test set. The lower part of their batches is the
    first 1000 training samples, of all classes; ``"clean"`` says of them whose label is right, which no loss sees.
    Images are floats in [0, 1].

    Args:
        root: as in `ImageData`.
        download: as in `ImageData`.
        class_samples: n_0, training samples of class 0; None (default): as many as the rarest class of the file has
            besides the meta set.
        imbalance_factor: n_0 over the number of samples of the last class, at least 1. Default 1, a balanced set.
            Usual: 10 to 200.
        noise_rate: share of replaced labels, 0 <= rate < 1. Default 0.
        noise: ``symmetric`` (default) or ``asymmetric``.
        meta_per_class: images of each class in the meta set. Default 10, as in Meta-Weight-Net's long-tailed
            experiments; in those with noise 100.
        lower_batch_size: as in `TwoLevelData`. Default 100, Meta-Weight-Net's.
        upper_batch_size: as in `TwoLevelData`. Default None, the whole meta set.
        epoch_length: as in `TwoLevelData`. Default 100.
        seed: of the split, the noise and the minibatches. Default 0.

    Attributes:
        pairs: which class asymmetric noise takes for which.
        train: images, labels given, indices, sources (the labels given).
        true_labels: the training labels before the noise.
        clean: whether each training label is right.
        meta: images and labels of the upper level.
        test: images and labels of the test set.

    Raises:
        BilevelError: if a setting is impossible or the data are missing or damaged.

    References:
        J. Shu, Q. Xie, L. Yi, Q. Zhao, S. Zhou, Z. Xu, D. Meng. Meta-Weight-Net: Learning an Explicit Mapping For
        Sample Weighting. NeurIPS 2019.
    """

    pairs: Mapping[int, int] = DIGITS

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        class_samples: int | None = None,
        imbalance_factor: float = 1.0,
        noise_rate: float = 0.0,
        noise: Noise = "symmetric",
        meta_per_class: int = 10,
        lower_batch_size: int | None = 100,
        upper_batch_size: int | None = None,
        epoch_length: int = 100,
        seed: int = 0,
    ) -> None:
        for name, number in (("class_samples", class_samples), ("meta_per_class", meta_per_class)):
            if number is not None and number < 1:
                raise BilevelError(f"data.{name} must be at least 1, got {number}.")
        if not 1 <= imbalance_factor < float("inf"):
            raise BilevelError(
                f"data.imbalance_factor must be at least 1, got {imbalance_factor}: it is the samples of class 0 over "
                "those of the last class."
            )
        if not 0 <= noise_rate < 1:
            raise BilevelError(f"data.noise_rate must be in [0, 1), got {noise_rate}.")
        if noise not in get_args(Noise):
            raise BilevelError(f"data.noise must be symmetric or asymmetric, got {noise!r}.")
        super().__init__(root, download, lower_batch_size, upper_batch_size, epoch_length, seed)
        self.save_hyperparameters()
        self.class_samples, self.imbalance_factor = class_samples, imbalance_factor
        self.noise_rate, self.noise, self.meta_per_class = noise_rate, noise, meta_per_class

    @override
    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "clean"):
            return
        source = self.source(train=True)
        rng = random.Random(self.seed)
        order = list(range(len(source.labels)))
        rng.shuffle(order)
        labels = source.labels.tolist()
        rest: list[list[int]] = [[] for _ in range(self.classes)]
        for i in order:
            rest[labels[i]].append(i)
        self.test = self._take_test(source, rest)
        m, smallest = self.meta_per_class, min(map(len, rest))
        if m >= smallest:
            raise BilevelError(f"data.meta_per_class={m} leaves no training image of the rarest class; lower it.")
        self.meta = self.take(source, [i for part in rest for i in part[:m]])
        counts = long_tail(self.class_samples or smallest - m, self.classes, self.imbalance_factor)
        for c, (n, part) in enumerate(zip(counts, rest, strict=True)):
            if not 1 <= n <= len(part) - m:
                raise BilevelError(
                    f"Class {c} would have {n} training images, and there are {len(part) - m}: change "
                    "data.class_samples or lower data.imbalance_factor."
                )
        train = [i for n, part in zip(counts, rest, strict=True) for i in part[m : m + n]]
        rng.shuffle(train)
        images, self.true_labels = self.take(source, train)
        given = self._corrupt(rng, self.true_labels)
        self.clean = given == self.true_labels
        self.train = (images, given, torch.arange(len(train)), given)

    def _take_test(self, source: Source, rest: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Returns the test set; one that is taken from the training file is removed from ``rest``."""
        official = self.source(train=False)
        return self.take(official, range(len(official.labels)))

    def _corrupt(self, rng: random.Random, labels: Tensor) -> Tensor:
        given, numbers = labels.clone(), [*range(len(labels))]
        rng.shuffle(numbers)
        if self.noise == "symmetric":
            for i in numbers[: round(self.noise_rate * len(numbers))]:
                given[i] = (labels[i] + rng.randint(1, self.classes - 1)) % self.classes
            return given
        for c, partner in self.pairs.items():
            mine = [i for i in numbers if labels[i] == c]
            given[mine[: round(self.noise_rate * len(mine))]] = partner
        return given

    @override
    def levels(self) -> tuple[Samples, Samples]:
        return self.train, self.meta

    def _evaluation(self, upper: Samples) -> Whole:
        return Whole({"lower": tuple(t[:SHOWN] for t in self.train), "upper": upper, "clean": self.clean[:SHOWN]})

    @override
    def val_dataloader(self) -> Whole:
        return self._evaluation(self.meta)

    @override
    def test_dataloader(self) -> Whole:
        return self._evaluation(self.test)

    @override
    def predict_dataloader(self) -> Whole:
        return Whole(self.train)


class MNISTReweighting(MNISTFiles, ReweightingData):
    """Long-tailed or noisy MNIST, read from ``root/MNIST/raw`` (torchvision's layout).

    Asymmetric noise takes 2 for 7, 3 for 8, 5 for 6, 6 for 5 and 7 for 1, as in G. Patrini, A. Rozza, A. Menon, R.
    Nock, L. Qu. Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach. CVPR 2017.
    """


class FashionMNISTReweighting(MNISTReweighting):
    """Long-tailed or noisy Fashion-MNIST, read from ``root/FashionMNIST/raw`` (torchvision's layout).

    Asymmetric noise takes boots for sneakers, sneakers for sandals, pullovers for shirts, and coats and dresses for one
    another, as in Z. Zhang, M. Sabuncu. Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
    Labels. NeurIPS 2018.
    """

    dataset = datasets.FashionMNIST
    pairs = MappingProxyType({2: 6, 3: 4, 4: 3, 7: 5, 9: 7})


class CIFAR10Reweighting(CIFAR10Files, ReweightingData):
    """Long-tailed or noisy CIFAR-10, from ``root/cifar-10-batches-py`` or ``root/cifar10`` (`CIFAR10Files`).

    Asymmetric noise takes trucks for cars, birds for planes, deer for horses, and cats and dogs for one another, as in
    Patrini et al., CVPR 2017.
    """

    pairs = MappingProxyType({2: 0, 3: 5, 4: 7, 5: 3, 9: 1})


class DigitsReweighting(DigitsFiles, ReweightingData):
    """Long-tailed or noisy 8x8 digits of scikit-learn, which come with that package: 1,797 images, no download.

    The first 50 of each class are the test set. Asymmetric noise is that of `MNISTReweighting`.

    Args:
        class_samples: as in `ReweightingData`. Default 100.
        imbalance_factor: as in `ReweightingData`.
        noise_rate: as in `ReweightingData`.
        noise: as in `ReweightingData`.
        meta_per_class: as in `ReweightingData`.
        lower_batch_size: as in `ReweightingData`.
        upper_batch_size: as in `ReweightingData`.
        epoch_length: as in `ReweightingData`.
        seed: as in `ReweightingData`.
    """

    def __init__(
        self,
        class_samples: int | None = 100,
        imbalance_factor: float = 1.0,
        noise_rate: float = 0.0,
        noise: Noise = "symmetric",
        meta_per_class: int = 10,
        lower_batch_size: int | None = 100,
        upper_batch_size: int | None = None,
        epoch_length: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(
            class_samples=class_samples,
            imbalance_factor=imbalance_factor,
            noise_rate=noise_rate,
            noise=noise,
            meta_per_class=meta_per_class,
            lower_batch_size=lower_batch_size,
            upper_batch_size=upper_batch_size,
            epoch_length=epoch_length,
            seed=seed,
        )

    @override
    def _take_test(self, source: Source, rest: list[list[int]]) -> tuple[Tensor, Tensor]:
        found = self.take(source, [i for part in rest for i in part[:50]])
        rest[:] = [part[50:] for part in rest]
        return found
