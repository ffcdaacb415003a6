"""What the few-shot sets made of ImageNet have in common."""

import json
from pathlib import Path
from typing import Any

from bilevel_lightning.datamodules.episodes import Split
from bilevel_lightning.datamodules.fewshot_images import FewShotImages
from bilevel_lightning.errors import BilevelError


class ImageNetSubset(FewShotImages):
    """Base of `MiniImageNet` and `TieredImageNet`: colour images in one folder, split by the files.

    Args:
        root: as in `FewShotImages`.
        folder: folder below ``root``; default: ``root`` itself or one of ``folders``. Logs and reports call the data by
            the name of a folder given here, since they may be others in the same layout.
        image_size: height and width in pixels. Default 84.
        mean: subtracted from the images in [0, 1], by channel. Default: nothing.
        std: by which they are then divided. Default: nothing.
        **settings: of `EpisodicDataModule`.

    Raises:
        BilevelError: as in `FewShotImages`; for ``mean`` or ``std`` of other than three numbers.
    """

    folders: tuple[str, ...] = ()

    def __init__(
        self,
        root: str | None = None,
        folder: str | None = None,
        image_size: int = 84,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(root=root, image_size=image_size, **settings)
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and (len(values) != 3 or (name == "std" and min(values) <= 0)):
                what = "three positive numbers" if name == "std" else "three numbers"
                raise BilevelError(f"data.{name} must be {what}, one for each channel, got {values}.")
        self.mean, self.std = mean, std
        self.places = [self.root, *(self.root / name for name in self.folders)]
        if folder is not None:
            self.name, self.places = Path(folder).name, [self.root / folder]

    def missing_split(self, split: Split, looked: list[Path]) -> BilevelError:
        """Returns the error for a split whose files are in none of the places."""
        return self.missing(
            looked, f"Put the files of the {split} split there; they are not downloaded (docs/few_shot_data.md)."
        )


def torchmeta(path: Path, split: Split) -> tuple[Any, list[str]]:
    """Opens ``{split}_data.hdf5`` of torchmeta.

    Returns:
        Its images by class, and the classes that ``{split}_labels.json`` lists, else all in the file, sorted.

    Raises:
        BilevelError: if it is damaged or does not hold the listed classes.
    """
    import h5py  # takes a moment to import, so only where it is needed

    try:
        held = h5py.File(path, "r")["datasets"]
    except (OSError, KeyError) as error:
        raise BilevelError(f"{path} is damaged ({error}); fetch it again.") from error
    listing = path.with_name(f"{split}_labels.json")
    try:
        labels = sorted(json.loads(listing.read_text()) if listing.is_file() else held)
        absent = [label for label in labels if label not in held]
    except (ValueError, TypeError) as error:
        raise BilevelError(f"{listing} must hold a list of class names ({error}); fetch it again.") from error
    if absent:
        raise BilevelError(f"{path} does not hold class {absent[0]} of {listing.name}; fetch both again.")
    return held, labels
