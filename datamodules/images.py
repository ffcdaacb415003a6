"""Where images come from: file sets that are decoded only as far as they are needed."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import default_loader

from bilevel_lightning.datamodules.levels import TwoLevelData
from bilevel_lightning.errors import BilevelError


class Source(NamedTuple):
    """Images and labels of one file set: images are uint8 arrays or file names, decoded only when selected."""

    images: Any
    labels: Tensor


def data_folder(root: str | None) -> Path:
    """Returns the folder of the data: ``root``, or the environment variable ``BILEVEL_DATA_DIR``, or ``data``."""
    return Path(root or os.environ.get("BILEVEL_DATA_DIR", "data")).expanduser()


class ImageData(TwoLevelData):
    """Base of data modules on classified images, floats in [0, 1] of shape ``(samples, channels, height, width)``.

    Args:
        root: folder of the data; default: the environment variable ``BILEVEL_DATA_DIR``, else ``data``.
        download: fetch missing files, with checksums. Default True.
        lower_batch_size: as in `TwoLevelData`.
        upper_batch_size: as in `TwoLevelData`.
        epoch_length: as in `TwoLevelData`.
        seed: as in `TwoLevelData`.

    Attributes:
        image_shape: channels, height, width.
        classes: their number.
        grey_levels: what a pixel's value is divided by.
    """

    image_shape: tuple[int, int, int]
    classes = 10
    grey_levels = 255.0

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(lower_batch_size, upper_batch_size, epoch_length, seed)
        self.root = data_folder(root)
        self.download = download

    @abstractmethod
    def source(self, train: bool) -> Source:
        """Returns the training or the official test file set."""

    def take(self, source: Source, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns images and labels of these numbers.

        Raises:
            BilevelError: if a pixel is NaN or infinite.
        """
        if isinstance(source.images[0], str):
            images = torch.from_numpy(np.stack([np.asarray(default_loader(source.images[i])) for i in index]))
        else:
            images = torch.as_tensor(source.images)[[*index]]
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        images = images.contiguous().float() / self.grey_levels
        broken = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten()
        if len(broken):
            raise BilevelError(
                f"{type(self).__name__}: {len(broken)} images hold NaN or Inf, the first is number "
                f"{index[int(broken[0])]} of its file; repair or remove them."
            )
        return images, source.labels[list(index)]

    def missing(self, folder: Path, names: str, error: Exception) -> BilevelError:
        """Returns the error that says which files are expected where."""
        reason = f"downloading failed ({error})" if self.download else "data.download is false"
        return BilevelError(
            f"{type(self).__name__} found no complete data in {folder}, and {reason}. Put {names} there, set data.root "
            "or the environment variable BILEVEL_DATA_DIR, or allow data.download."
        )
