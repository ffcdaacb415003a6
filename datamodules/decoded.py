"""Images that are decoded once: uint8 in memory, and in a file for the next start."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info

from bilevel_lightning.errors import BilevelError

CACHE = "bilevel_cache"
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # of images; broken PNGs are the third


class Source(NamedTuple):
    """The images of one split, by class, before they are decoded.

    Attributes:
        names: the classes.
        counts: images of each class.
        read: returns all images of class c, uint8 of shape ``(counts[c], channels, height, width)``.
        origin: the file or folder, for messages.
        files: what the decoded images depend on; None: reading needs no decoding, so there is nothing to cache.
    """

    names: list[str]
    counts: list[int]
    read: Callable[[int], np.ndarray]
    origin: Path
    files: Iterable[Path] | None = None


class Images(NamedTuple):
    """Decoded images, sorted by class.

    Attributes:
        pixels: uint8 of shape ``(images, channels, height, width)``, in memory or mapped from a file.
        counts: images of each class.
        names: the classes.
    """

    pixels: np.ndarray
    counts: list[int]
    names: list[str]


def picture(data: bytes | Path, origin: object, mode: str, size: int) -> np.ndarray:
    """Decodes an image file.

    Args:
        data: its content, or where it lies.
        origin: its name, for messages.
        mode: ``L`` for grey, ``RGB`` for colour; others are converted.
        size: height and width in pixels; other sizes are resized with Lanczos' filter, as in the code of Finn et al.,
            ICML 2017.

    Returns:
        The pixels, uint8 of shape ``(channels, size, size)``.

    Raises:
        BilevelError: if it cannot be decoded; the message names the file.
    """
    try:
        with Image.open(BytesIO(data) if isinstance(data, bytes) else data) as opened:
            image = opened.convert(mode)
    except UNREADABLE as error:
        raise BilevelError(f"{origin} cannot be decoded ({error}); replace that file.") from error
    image = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def channels_first(pixels: np.ndarray, size: int) -> np.ndarray:
    """Returns uint8 images ``(n, height, width[, channels])`` as ``(n, channels, size, size)``, resized if need be."""
    if pixels.shape[1:3] != (size, size):
        resized = [Image.fromarray(p).resize((size, size), Image.Resampling.LANCZOS) for p in pixels]
        pixels = np.stack([np.asarray(image) for image in resized])
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def decode(source: Source, shape: tuple[int, ...], root: Path, stem: str, mapped: bool = False) -> Images:
    """Returns the images of a source, from the cache where it holds them.

    The cache is ``root/bilevel_cache/<stem>-<key>.npy``; the key changes with the names, sizes and times of the source
    files. It is written under another name and then renamed, so that other processes never see half of it. Where the
    folder cannot be written, there is none.

    Args:
        source: what to read.
        shape: of one image, ``(channels, height, width)``.
        root: folder of the data.
        stem: says which data and settings these are.
        mapped: read single images from the file when they are needed, for data larger than the memory.
    """

    def fill(pixels: np.ndarray) -> np.ndarray:
        end = 0
        for c, count in enumerate(source.counts):
            end += count
            pixels[end - count : end] = source.read(c)
        return pixels

    whole = (sum(source.counts), *shape)
    if source.files is None:
        return Images(fill(np.empty(whole, np.uint8)), source.counts, source.names)
    path = root / CACHE / f"{stem}-{_key(source, shape, root)}.npy"
    if not path.is_file():
        rank_zero_info(f"Decoding {whole[0]} images of {source.origin} (once, if {path.parent} can be written).")
        unfinished = None
        try:
            path.parent.mkdir(exist_ok=True)
            handle, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
            unfinished = Path(name)
            with os.fdopen(handle, "rb+") as file:
                target = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=whole)
                if hasattr(os, "posix_fallocate"):  # else a full disk would show only as a crash
                    os.posix_fallocate(file.fileno(), 0, unfinished.stat().st_size)
        except OSError as error:
            if unfinished is not None:
                unfinished.unlink()
            rank_zero_info(f"No cache of decoded images: {error}.")
            return Images(fill(np.empty(whole, np.uint8)), source.counts, source.names)
        try:
            fill(target)
            target.flush()
            del target
            unfinished.chmod(0o644)
            for old in path.parent.glob(f"{stem}-*.npy"):  # of files that have changed since
                old.unlink(missing_ok=True)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return Images(np.load(path, mmap_mode="r" if mapped else None), source.counts, source.names)


def _key(source: Source, shape: tuple[int, ...], root: Path) -> str:
    digest = hashlib.sha256(repr((shape, source.names, source.counts)).encode())
    for file in source.files or ():
        status = file.stat()
        digest.update(f"{str(file).removeprefix(str(root))}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
