"""Omniglot: handwritten characters of 50 alphabets."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pytorch_lightning.utilities import rank_zero_info
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url
from typing_extensions import override

from bilevel_lightning.datamodules.decoded import Images, Source
from bilevel_lightning.datamodules.episodes import SPLITS, Split
from bilevel_lightning.datamodules.fewshot_images import FewShotImages
from bilevel_lightning.datamodules.omniglot_files import PARTS, characters, find
from bilevel_lightning.errors import BilevelError


class Omniglot(FewShotImages):
    r"""Few-shot classification of Omniglot: 1,623 characters, 20 drawings of each, strokes 1 on a background of 0.

    B. M. Lake, R. Salakhutdinov, J. B. Tenenbaum, "Human-level concept learning through probabilistic program
    induction", Science 2015. Read from the first of these that is found under ``root``: torchvision's folders
    ``omniglot-py/images_background`` and ``omniglot-py/images_evaluation``, the zips of the same names (each part may
    be either), torchmeta's ``omniglot/data.hdf5``. Else the zips are downloaded, with md5 sums. A zip that is already
    there is accepted with any md5 sum (a line says so) if it opens and all characters are in it.

    Args:
        root: as in `FewShotImages`.
        download: as in `FewShotImages`.
        image_size: height and width in pixels. Default 28, from 105.
        rotations: whose characters, turned by 90, 180 and 270 degrees, are classes of their own: of the ``train``
            split (default, as in Santoro et al., "Meta-learning with memory-augmented neural networks", ICML 2016), of
            ``all`` splits (as in torchmeta's helper), or ``none``.
        split: ``vinyals`` (default): the fixed 1028, 172 and 423 characters of O. Vinyals et al., "Matching networks
            for one shot learning", NeurIPS 2016, as in torchmeta. ``background_evaluation``: the 659 characters of the
            evaluation alphabets are the test set, the background's are divided into 792 and the 172 of ``vinyals`` for
            validation. ``random``: ``split_sizes`` characters drawn with ``split_seed``; results with different seeds
            are then not comparable, and a model trained with one has seen the test classes of another.
        split_sizes: characters of the train, validation and test split, for ``random``. Default 1028, 172, 423.
        split_seed: for ``random``. Default 0.
        **settings: of `EpisodicDataModule`.
    """

    channels = 1

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        image_size: int = 28,
        rotations: Literal["train", "all", "none"] = "train",
        split: Literal["vinyals", "background_evaluation", "random"] = "vinyals",
        split_sizes: tuple[int, int, int] = (1028, 172, 423),
        split_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(root=root, download=download, image_size=image_size, **settings)
        self.rotations, self.split = rotations, split
        self.split_sizes, self.split_seed = split_sizes, split_seed
        if min(split_sizes) < 1 or split_seed < 0:
            raise BilevelError(
                f"data.split_sizes must be positive and data.split_seed not negative, got {split_sizes}, {split_seed}."
            )
        self._everything: Images | None = None

    @override
    def prepare_data(self) -> None:
        if not find(self.root):
            self._fetch()
        for place in find(self.root):
            if place.suffix == ".zip" and not check_integrity(str(place), datasets.Omniglot.zips_md5[place.stem]):
                rank_zero_info(f"{place} is not the published zip (other md5 sum); its content is read all the same.")
        self._everything = self.decoded(self.source("train"), "all")  # other processes find it in the cache

    @override
    def source(self, split: Split) -> Source:
        """Returns all characters, whatever the split."""
        found = [characters(place, self.image_size) for place in find(self.root)]
        if not found:
            raise self._missing("data.download is false" if not self.download else "prepare_data was not called")
        where = {name: part for part in found for name in part.counts}
        names = sorted(where)
        return Source(
            names,
            [where[name].counts[name] for name in names],
            lambda c: where[names[c]].read(names[c]),
            self.root,
            [file for part in found for file in part.files],
        )

    @override
    def images(self, split: Split) -> Images:
        if self._everything is None:
            self._everything = self.decoded(self.source(split), "all")
        pixels, counts, names = self._everything
        first = np.cumsum([0, *counts])
        where = {name: c for c, name in enumerate(names)}
        chosen = [where[name] for name in self.characters(split, names)]
        pixels = np.concatenate([pixels[first[c] : first[c + 1]] for c in chosen])
        turns = range(4) if self.rotations in ("all", split) else range(1)
        return Images(
            np.concatenate([np.rot90(pixels, turn, axes=(2, 3)) for turn in turns]),
            [counts[c] for c in chosen] * len(turns),
            [names[c] + (f", {90 * turn} degrees" if turn else "") for turn in turns for c in chosen],
        )

    def characters(self, split: Split, names: list[str]) -> list[str]:
        """Returns the characters of a split, as ``<part>/<alphabet>/<character>``.

        Args:
            split: which one.
            names: all characters that were found, sorted.

        Raises:
            BilevelError: if characters are missing.
        """
        if self.split == "random":
            if sum(self.split_sizes) > len(names):
                raise BilevelError(
                    f"data.split_sizes={tuple(self.split_sizes)} is more than the {len(names)} characters; lower it."
                )
            order = np.random.default_rng(self.split_seed).permutation(len(names))
            ends = np.cumsum([0, *self.split_sizes])
            k = SPLITS.index(split)
            return [names[c] for c in sorted(order[ends[k] : ends[k + 1]])]
        listed = vinyals()
        absent = sorted({name for part in listed.values() for name in part} - set(names))
        if absent:
            raise BilevelError(
                f"Omniglot in {self.root} is not complete: {len(absent)} of 1623 characters are missing, the first is "
                f"{absent[0]}. Fetch it again, or set data.split=random and data.split_sizes for a part of it."
            )
        if self.split == "vinyals" or split == "val":
            return listed[split]
        wanted = PARTS[0 if split == "train" else 1]
        return [name for name in names if name.startswith(wanted) and name not in listed["val"]]

    def _fetch(self) -> None:
        if not self.download:
            raise self._missing("data.download is false")
        folder = self.root / "omniglot-py"
        for part in PARTS:
            target, unfinished = folder / f"{part}.zip", folder / f"{part}.zip.unfinished"
            if target.exists() or (folder / part).exists():
                continue
            md5 = datasets.Omniglot.zips_md5[part]
            try:
                download_url(f"{datasets.Omniglot.download_url_prefix}/{part}.zip", folder, unfinished.name, md5)
                unfinished.replace(target)
            except Exception as error:  # of many kinds
                raise self._missing(f"downloading failed ({error}; expected md5 sum {md5})") from error
            finally:
                unfinished.unlink(missing_ok=True)

    def _missing(self, reason: str) -> BilevelError:
        base = self.root / "omniglot-py"
        looked = [*(base / f"{part}{end}" for part in PARTS for end in ("", ".zip")), self.root / "omniglot/data.hdf5"]
        return self.missing(
            looked, f"Not downloaded: {reason}. Put both parts of Omniglot there, or allow data.download."
        )


def vinyals() -> dict[Split, list[str]]:
    """Returns the characters of each split of Vinyals et al. 2016, as ``<part>/<alphabet>/<character>``."""
    file = Path(__file__).with_name("splits") / "omniglot_vinyals.json"
    return {
        split: [
            f"{part}/{alphabet}/character{number:02d}"
            for part, alphabets in parts.items()
            for alphabet, (first, last) in alphabets.items()
            for number in range(first, last + 1)
        ]
        for split, parts in json.loads(file.read_text()).items()
    }
