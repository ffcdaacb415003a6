"""Text from several sources, of which some are corrupted: the lower level of a language model's data reweighting."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.datamodules.iterations import Whole
from bilevel_lightning.datamodules.levels import Samples, TwoLevelData
from bilevel_lightning.datamodules.tales import Tales
from bilevel_lightning.errors import BilevelError

Corruption = Literal["replace", "shuffle"]
_GENERATED = {"train_bytes": 65_536, "val_bytes": 4_096, "test_bytes": 16_384}


class TextSources(TwoLevelData):
    r"""Bytes of several named sources of text (lower level), a small clean text (upper level), a held-out test text.

    Each text is cut into windows of ``context + 1`` bytes that share one byte, so that each byte but the first is
    predicted once: inputs are all bytes of a window but the last, targets all but the first.

    Training batches are ``{"lower": (inputs, targets, index, source), "upper": (inputs, targets)}``: integers of shape
    ``(batch, context)``, the numbers of the windows, and those of their sources in the order of ``sources``. Windows of
    all sources are drawn alike, so that a source's share of a minibatch is that of its bytes. Validation and test
    batches hold the validation or test text as ``"upper"``, and as ``"lower"`` the first windows of each source, as
    many as the validation text has.

    Args:
        sources: names and where their text is: a file, a folder, whose ``.txt`` files are read in the order of their
            names, or null: text from a grammar of our own (`Tales`), which needs no file. Default: ``first`` and
            ``second``, both null.
        corrupted: names of corrupted sources, and the share of their bytes that is damaged. Default: half of the bytes
            of ``second``, or none where ``sources`` are given.
        corruption: ``replace`` (default): by bytes drawn uniformly from all 256; ``shuffle``: among each other, so that
            the frequencies stay.
        validation: file or folder of the clean text of the upper level; null (default): generated, allowed where a
            source is.
        test: file or folder of the test text; null (default): as for ``validation``.
        context: bytes of a window's inputs. Default 64.
        train_bytes: most bytes of a source, from its beginning. Default 65 536 where it is generated, else all.
        val_bytes: the same for the validation text. Default 4 096 where it is generated, else all.
        test_bytes: the same for the test text. Default 16 384 where it is generated, else all.
        lower_batch_size: windows of a lower minibatch. Default 32.
        upper_batch_size: windows of an upper minibatch. Default 32.
        epoch_length: as in `TwoLevelData`. Default 50.
        seed: of the minibatches, of the generated text, and of the corruption. Default 0.

    Attributes:
        names: the names of the sources.
        train: windows as bytes, their numbers, their sources.
        shown: the part of ``train`` that is evaluated beside validation and test text.
        val: windows of the validation text.
        test: windows of the test text.

    Raises:
        BilevelError: if a setting is impossible, or a text is missing or too short.
    """

    def __init__(
        self,
        sources: Mapping[str, str | None] | None = None,
        corrupted: Mapping[str, float] | None = None,
        corruption: Corruption = "replace",
        validation: str | None = None,
        test: str | None = None,
        context: int = 64,
        train_bytes: int | None = None,
        val_bytes: int | None = None,
        test_bytes: int | None = None,
        lower_batch_size: int | None = 32,
        upper_batch_size: int | None = 32,
        epoch_length: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(lower_batch_size, upper_batch_size, epoch_length, seed)
        self.save_hyperparameters()
        if corrupted is None:
            corrupted = {"second": 0.5} if sources is None else {}
        self.sources = {"first": None, "second": None} if sources is None else dict(sources)
        self.corrupted, self.corruption = dict(corrupted), corruption
        self.paths = {"validation": validation, "test": test}
        self.context = context
        self.bytes = {"train_bytes": train_bytes, "val_bytes": val_bytes, "test_bytes": test_bytes}
        if context < 1:
            raise BilevelError(f"data.context must be at least 1, got {context}.")
        if not self.sources:
            raise BilevelError("data.sources is empty: name at least one source.")
        for name, value in self.bytes.items():
            if value is not None and value <= context:
                raise BilevelError(f"data.{name}={value} must be more than data.context={context}.")
        for name, rate in self.corrupted.items():
            if name not in self.sources:
                raise BilevelError(f"data.corrupted names {name!r}, and the sources are {', '.join(self.sources)}.")
            if not 0 < rate <= 1:
                raise BilevelError(f"data.corrupted.{name} must be in (0, 1], got {rate}.")
        if corruption not in get_args(Corruption):
            raise BilevelError(f"data.corruption must be replace or shuffle, got {corruption!r}.")
        for name, path in self.paths.items():
            if path is None and all(self.sources.values()):
                raise BilevelError(f"data.{name} is needed where all sources are files: give a file or a folder.")

    @property
    def names(self) -> list[str]:
        """The names of the sources, in the order of their numbers."""
        return [*self.sources]

    @override
    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train"):
            return
        parts = [
            self._windows(self._damaged(i, name, self._text(f"sources.{name}", path, "train_bytes")), name)
            for i, (name, path) in enumerate(self.sources.items())
        ]
        number = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
        windows = torch.cat(parts)
        self.train: Samples = windows, torch.arange(len(windows)), number
        self.val = self._windows(self._text("validation", self.paths["validation"], "val_bytes"), "validation")
        self.test = self._windows(self._text("test", self.paths["test"], "test_bytes"), "test")
        first = torch.cat([(number == i).nonzero().flatten()[: len(self.val)] for i in range(len(parts))])
        self.shown: Samples = tuple(t[first] for t in self.train)

    def _text(self, setting: str, path: str | None, size: str) -> np.ndarray:
        """Returns the bytes of a text."""
        most = self.bytes[size]
        if path is None:
            text = Tales(f"{self.seed} {setting}").text(most or _GENERATED[size])
        else:
            text = _read(setting, Path(path), most)
        return np.frombuffer(text, np.uint8)

    def _damaged(self, i: int, name: str, text: np.ndarray) -> np.ndarray:
        """Returns the text of source ``i`` with the share of damaged bytes that `corrupted` says."""
        if name not in self.corrupted:
            return text
        generator = np.random.default_rng([self.seed, i])
        hit = np.flatnonzero(generator.random(len(text)) < self.corrupted[name])
        damaged = text.copy()
        if self.corruption == "replace":
            damaged[hit] = generator.integers(0, 256, len(hit), dtype=np.uint8)
        else:
            damaged[hit] = text[generator.permutation(hit)]
        return damaged

    def _windows(self, text: np.ndarray, name: str) -> Tensor:
        """Returns the windows of a text, bytes of shape ``(windows, context + 1)``."""
        if len(text) <= self.context:
            raise BilevelError(
                f"The text {name!r} has {len(text)} bytes, and a window takes {self.context + 1}: lower data.context, "
                "or give more."
            )
        return torch.from_numpy(text.copy()).unfold(0, self.context + 1, self.context)

    @override
    def levels(self) -> tuple[Samples, Samples]:
        return self.train, (self.val,)

    @override
    def augment(self, samples: Samples, key: Sequence[int]) -> Samples:
        return self.decoded(samples)

    def decoded(self, samples: Samples) -> Samples:
        """Returns windows as inputs and targets, integers; what else the samples hold stays."""
        windows, *rest = samples
        windows = windows.long()
        return windows[:, :-1], windows[:, 1:], *rest

    @override
    def val_dataloader(self) -> Whole:
        return Whole({"lower": self.decoded(self.shown), "upper": self.decoded((self.val,))})

    @override
    def test_dataloader(self) -> Whole:
        return Whole({"lower": self.decoded(self.shown), "upper": self.decoded((self.test,))})

    @override
    def predict_dataloader(self) -> Whole:
        return Whole(self.decoded(self.train))


def _read(setting: str, path: Path, most: int | None) -> bytes:
    """Returns the first bytes of a file, or of the ``.txt`` files of a folder, joined by line breaks."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise BilevelError(f"data.{setting}: {path} is neither a file nor a folder with .txt files.")
    parts, size = [], 0
    for file in files:
        with file.open("rb") as opened:
            parts.append(opened.read(-1 if most is None else most - size))
        size += len(parts[-1]) + 1
        if most is not None and size >= most:
            break
    return b"\n".join(parts)[:most]
