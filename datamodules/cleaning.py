"""Data hyper-cleaning: a training set with wrong labels (lower level), a small clean set (upper level), a test set."""

import random
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.datamodules.images import ImageData
from bilevel_lightning.datamodules.iterations import Whole
from bilevel_lightning.errors import BilevelError


class CleaningData(ImageData):
    r"""Base of the hyper-cleaning data modules.

    A shuffle with ``seed`` gives the first ``train_samples`` images to the lower level, the next ``val_samples`` to the
    upper level. Of the training labels exactly ``round(noise_rate * train_samples)`` are replaced by a different class,
    uniformly. Images are floats in [0, 1] without further normalisation, shape ``(samples, channels, height, width)``.

    Training batches are ``{"lower": (images, labels, index), "upper": (images, labels)}``, ``index`` being the numbers
    of the training samples. Validation and test batches also hold ``"clean"``, which says for each training sample
    whether its label is right; the losses never see it. With several processes each gets every world-size-th sample.

    Args:
        root: folder of the data; default: the environment variable ``BILEVEL_DATA_DIR``, else ``data``.
        download: fetch missing files, with checksums. Default True.
        train_samples: number of training samples, lower level. Default 5000.
        val_samples: number of clean validation samples, upper level. Default 5000.
        noise_rate: share rho of replaced training labels, 0 <= rho < 1. Default 0.5.
        lower_batch_size: minibatch size of the lower level; None (default): all samples at once.
        upper_batch_size: minibatch size of the upper level; None (default): all samples at once.
        epoch_length: upper iterations an epoch, after which validation runs. Default 10.
        seed: of the split, of the label noise and of the minibatches. Default 0. Split and noise use Python's generator
            in the order of the released code of PBGD, so that with both options below seed 2424 gives its data.
        label_noise: ``different`` (default): a replaced label is always wrong. ``any``: drawn from all classes, so that
            one in ten stays right, as in the released code of IAPTT-GM and PBGD.
        test_split: ``official`` (default): the official test set. ``train``: 10,000 further images of the training
            file, as in the same codes.

    Attributes:
        train: images, labels given, indices.
        clean: whether each training label is right, shape ``(train_samples,)``. Samples that were drawn for
            replacement count as not clean even where ``label_noise: any`` kept their label, as in those codes.
        val: images and labels of the upper level.
        test: images and labels of the test set.
        true_labels: the training labels before the noise.

    Raises:
        BilevelError: if a setting is impossible or the data are missing or damaged.
    """

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        train_samples: int = 5000,
        val_samples: int = 5000,
        noise_rate: float = 0.5,
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 0,
        label_noise: Literal["different", "any"] = "different",
        test_split: Literal["official", "train"] = "official",
    ) -> None:
        sizes = {"train_samples": train_samples, "val_samples": val_samples}
        batches = {
            "lower_batch_size": (lower_batch_size, train_samples),
            "upper_batch_size": (upper_batch_size, val_samples),
        }
        for name, value in sizes.items():
            if value < 1:
                raise BilevelError(f"data.{name} must be at least 1, got {value}.")
        for name, (size, samples) in batches.items():
            if size is not None and not 1 <= size <= samples:
                raise BilevelError(f"data.{name} must be between 1 and the {samples} samples of its level, got {size}.")
        if not 0 <= noise_rate < 1:
            raise BilevelError(f"data.noise_rate must be in [0, 1), got {noise_rate}.")
        if round(noise_rate * train_samples) == train_samples > 0:
            raise BilevelError(f"data.noise_rate={noise_rate} leaves no right label of {train_samples}; lower it.")
        super().__init__(root, download, lower_batch_size, upper_batch_size, epoch_length, seed)
        self.save_hyperparameters()
        self.train_samples, self.val_samples, self.noise_rate = train_samples, val_samples, noise_rate
        self.label_noise, self.test_split = label_noise, test_split

    @override
    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "clean"):
            return
        source = self.source(train=True)
        rng = random.Random(self.seed)
        order = list(range(len(source.labels)))
        rng.shuffle(order)
        n, m = self.train_samples, self.val_samples
        rest = order[n + m :][:10_000]
        if n + m > len(order) or (self.test_split == "train" and len(rest) == 0):
            raise BilevelError(
                f"data.train_samples={n} and data.val_samples={m} leave no test image of the {len(order)} images that "
                f"{type(self).__name__} has; lower them."
            )
        images, self.true_labels = self.take(source, order[:n])
        labels, self.clean = self._corrupt(rng, self.true_labels)
        self.train = (images, labels, torch.arange(n))
        self.val = self.take(source, order[n : n + m])
        if self.test_split == "train":
            self.test = self.take(source, rest)
        else:
            official = self.source(train=False)
            self.test = self.take(official, range(len(official.labels)))

    def _corrupt(self, rng: random.Random, labels: Tensor) -> tuple[Tensor, Tensor]:
        n = len(labels)
        chosen = list(range(n))
        rng.shuffle(chosen)
        given, clean = labels.clone(), torch.ones(n, dtype=torch.bool)
        for i in chosen[: round(self.noise_rate * n)]:
            if self.label_noise == "any":
                given[i] = rng.randint(0, self.classes - 1)
            else:
                given[i] = (labels[i] + rng.randint(1, self.classes - 1)) % self.classes
            clean[i] = False
        return given, clean

    @override
    def val_dataloader(self) -> Whole:
        return Whole({"lower": self.train, "upper": self.val, "clean": self.clean})

    @override
    def test_dataloader(self) -> Whole:
        return Whole({"lower": self.train, "upper": self.test, "clean": self.clean})

    @override
    def predict_dataloader(self) -> Whole:
        return Whole(self.train)
