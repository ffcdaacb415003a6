"""The embedded data set: scikit-learn's digits."""

from typing import Literal

import torch
from typing_extensions import override

from bilevel_lightning.datamodules.cleaning import CleaningData, Source


class DigitsCleaning(CleaningData):
    """Hyper-cleaning of scikit-learn's 8x8 digits, which come with that package: 1,797 images, no download.

    Images that belong to neither level are the test set (597 with the defaults).

    Args:
        train_samples: as in `CleaningData`. Default 600.
        val_samples: as in `CleaningData`. Default 600.
        noise_rate: as in `CleaningData`.
        lower_batch_size: as in `CleaningData`.
        upper_batch_size: as in `CleaningData`.
        epoch_length: as in `CleaningData`.
        seed: as in `CleaningData`.
        label_noise: as in `CleaningData`.
    """

    image_shape = (1, 8, 8)
    grey_levels = 16.0

    def __init__(
        self,
        train_samples: int = 600,
        val_samples: int = 600,
        noise_rate: float = 0.5,
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 0,
        label_noise: Literal["different", "any"] = "different",
    ) -> None:
        super().__init__(
            train_samples=train_samples,
            val_samples=val_samples,
            noise_rate=noise_rate,
            lower_batch_size=lower_batch_size,
            upper_batch_size=upper_batch_size,
            epoch_length=epoch_length,
            seed=seed,
            label_noise=label_noise,
            test_split="train",
        )

    @override
    def source(self, train: bool) -> Source:
        from sklearn.datasets import load_digits  # takes a second to import, so only where it is needed

        digits = load_digits()
        return Source(digits.images, torch.from_numpy(digits.target))
