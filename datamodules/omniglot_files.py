"""The layouts of Omniglot on disk: folders, zips, HDF5."""

import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from bilevel_lightning.datamodules.decoded import channels_first, picture
from bilevel_lightning.errors import BilevelError

PARTS = ("images_background", "images_evaluation")


class Characters(NamedTuple):
    """Characters of one file or folder.

    Attributes:
        counts: drawings of each character, by ``<part>/<alphabet>/<character>``.
        read: returns the drawings of a character, strokes 255, uint8 of shape ``(drawings, 1, size, size)``.
        files: all files that were found.
    """

    counts: dict[str, int]
    read: Callable[[str], np.ndarray]
    files: list[Path]


def find(root: Path) -> list[Path]:
    """Returns what holds the data: a folder or zip for each part, else torchmeta's file, else nothing."""
    base = root / "omniglot-py"
    places = [next((p for p in (base / part, base / f"{part}.zip") if p.exists()), None) for part in PARTS]
    found = [place for place in places if place is not None]
    torchmeta = root / "omniglot" / "data.hdf5"
    return found if len(found) == len(PARTS) else [torchmeta] if torchmeta.is_file() else []


def characters(place: Path, size: int) -> Characters:
    """Returns the characters of a folder, zip or HDF5 file; images are decoded when they are read.

    Args:
        place: as `find` returns it.
        size: height and width in pixels.

    Raises:
        BilevelError: if the file is damaged.
    """
    if place.is_dir():
        return _folder(place, size)
    try:
        return _zip(place, size) if place.suffix == ".zip" else _hdf5(place, size)
    except (OSError, zipfile.BadZipFile) as error:
        raise BilevelError(f"{place} is damaged ({error}); delete it and fetch it again.") from error


def _drawings(files: list[Path], name: Callable[[Path], str], pixels: Callable[[Path], np.ndarray]) -> Characters:
    drawn: dict[str, list[Path]] = {}
    for file in sorted(files, key=str):
        drawn.setdefault(name(file), []).append(file)

    def read(character: str) -> np.ndarray:
        return 255 - np.stack([pixels(file) for file in drawn[character]])  # black on white in the files

    return Characters({character: len(images) for character, images in drawn.items()}, read, files)


def _folder(folder: Path, size: int) -> Characters:
    def pixels(file: Path) -> np.ndarray:
        return picture(file, file, "L", size)

    return _drawings([*folder.glob("*/*/*.png")], lambda f: "/".join(f.parts[-4:-1]), pixels)


def _zip(path: Path, size: int) -> Characters:
    archive = zipfile.ZipFile(path)
    paths = [PurePosixPath(name) for name in archive.namelist()]
    names = [Path(p) for p in paths if len(p.parts) == 4 and p.parts[0] == path.stem and p.suffix == ".png"]

    def pixels(name: Path) -> np.ndarray:
        origin = f"{path}: {name.as_posix()}"
        try:
            data = archive.read(name.as_posix())
        except (OSError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
            raise BilevelError(f"{origin} is damaged ({error}); delete the zip and fetch it again.") from error
        return picture(data, origin, "L", size)

    return _drawings(names, lambda f: f.parent.as_posix(), pixels)._replace(files=[path])


def _hdf5(path: Path, size: int) -> Characters:
    import h5py  # takes a moment to import, so only where it is needed

    file = h5py.File(path, "r")
    counts = {
        f"{part}/{alphabet}/{character}": len(drawings)
        for part in PARTS
        for alphabet, group in file.get(part, {}).items()
        for character, drawings in group.items()
    }

    def read(character: str) -> np.ndarray:
        return channels_first(file[character][()], size)  # inverted already

    return Characters(counts, read, [path])
