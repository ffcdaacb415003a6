"""Data of both levels in tensors, all at once or in minibatches."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from typing_extensions import override

from bilevel_lightning.datamodules.iterations import Iterations, draw
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.task import Draws, Minibatches

Samples = tuple[Tensor, ...]
"""Tensors whose first dimension counts samples."""


class TwoLevelData(LightningDataModule):
    r"""Base of data modules whose levels are samples in memory: ``train`` and ``val``, or what `levels` returns.

    Training batches are ``{"lower": samples, "upper": samples}``. A level with a batch size comes as `Minibatches`: as
    many as the algorithm says it takes (`BilevelModule.minibatches`), drawn without replacement inside each, and
    independently between minibatches, levels and iterations; a single upper one comes as it is. Each is a function of
    (seed, iteration, level, number), so that a run can be resumed anywhere. With several processes each gets every
    world-size-th sample.

    Algorithms that remember parts of the data (SAGA) get the parts of a fixed random partition into
    ``ceil(samples / batch size)`` parts, whose sizes differ by at most one; a part is drawn with a probability
    proportional to its size. ``"parts"`` in the batch then holds for each level the numbers of the parts drawn and the
    share of each part.

    Args:
        lower_batch_size: minibatch size of the lower level; None (default): all samples at once.
        upper_batch_size: minibatch size of the upper level; None (default): all samples at once.
        epoch_length: upper iterations an epoch, after which validation runs. Default 10.
        seed: of the minibatches, and of what the subclass draws. Default 0.

    Raises:
        BilevelError: if a size is impossible, or ``upper_iterations`` would take minibatches several times.
    """

    train: Any
    val: Any

    def __init__(
        self,
        lower_batch_size: int | None = None,
        upper_batch_size: int | None = None,
        epoch_length: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if epoch_length < 1:
            raise BilevelError(f"data.epoch_length must be at least 1, got {epoch_length}.")
        for name, size in (("lower_batch_size", lower_batch_size), ("upper_batch_size", upper_batch_size)):
            if size is not None and size < 1:
                raise BilevelError(f"data.{name} must be at least 1, got {size}.")
        self.lower_batch_size, self.upper_batch_size = lower_batch_size, upper_batch_size
        self.epoch_length, self.seed = epoch_length, seed

    def levels(self) -> tuple[Samples, Samples]:
        """Returns the samples of the lower and of the upper level; called after `setup`."""
        return self.train, self.val

    def parts(self) -> dict[str, int]:
        """Returns in how many parts each level is partitioned for algorithms that remember them, by its name."""
        sizes = zip(("lower", "upper"), self.levels(), (self.lower_batch_size, self.upper_batch_size), strict=True)
        return {name: 1 if size is None else -(-len(data[0]) // size) for name, data, size in sizes}

    def augment(self, samples: Samples, key: Sequence[int]) -> Samples:
        """Returns what a minibatch is after random changes, a function of the samples and the key; default: itself.

        Args:
            samples: of one minibatch, or of all samples of a level that has no batch size.
            key: seed, upper iteration, level (0 lower, 1 upper), number of the minibatch, process.
        """
        return samples

    @override
    def train_dataloader(self) -> Iterations:
        assert self.trainer is not None
        device, rank, world = self.trainer.strategy.root_device, self.trainer.global_rank, self.trainer.world_size
        module: Any = self.trainer.lightning_module
        partition = getattr(module, "partitioned", False)
        sources = []
        sizes = {"lower_batch_size": self.lower_batch_size, "upper_batch_size": self.upper_batch_size}
        for i, ((name, size), data) in enumerate(zip(sizes.items(), self.levels(), strict=True)):
            if size is not None and getattr(module, "upper_iterations", 1) > 1:
                raise BilevelError(
                    f"model.upper_iterations would take the same minibatches several times: leave it or data.{name} "
                    "out."
                )
            if size is not None and size > len(data[0]):
                raise BilevelError(
                    f"data.{name}={size} is more than the {len(data[0])} samples of its level; lower it."
                )
            if size is not None and size < world:
                raise BilevelError(f"data.{name}={size} is less than the {world} processes that share it; raise it.")
            on_device = tuple(t.to(device) for t in data)
            parted = partition and size is not None
            sources.append(_Level(on_device, size, self.seed, i, rank, world, parted, self.augment))

        def batch(k: int) -> dict[str, Any]:
            found: dict[str, Any] = {}
            parts: dict[str, Any] = {}
            for name, level, draws in zip(("lower", "upper"), sources, module.minibatches(k), strict=True):
                found[name], numbers = level.take(k, draws)
                if level.parts:
                    parts[name] = (numbers, level.shares)
            upper = found["upper"]
            if isinstance(upper, Minibatches) and len(upper) == 1:
                found["upper"] = upper[0]
            return {**found, "parts": parts} if parts else found

        return Iterations(batch, self.epoch_length, self.trainer)


class _Level:
    """The samples of level ``i`` on the training device, whole or in minibatches of this process."""

    def __init__(
        self,
        data: Samples,
        size: int | None,
        seed: int,
        i: int,
        rank: int,
        world: int,
        partition: bool,
        augment: Callable[[Samples, Sequence[int]], Samples],
    ) -> None:
        self.augment = augment
        self.data, self.size, self.seed, self.i, self.rank, self.world = data, size, seed, i, rank, world
        self.samples = len(data[0])
        self.parts: list[Tensor] = []
        if partition and size is not None:
            order = np.random.default_rng([seed, i]).permutation(self.samples)
            self.parts = [torch.from_numpy(part) for part in np.array_split(order, -(-self.samples // size))]
        self.shares = [len(part) / self.samples for part in self.parts]

    def take(self, k: int, draws: Draws) -> tuple[Samples | Minibatches, list[int]]:
        """Returns what upper iteration ``k`` gets, and the numbers of the parts it is."""
        if self.size is None:
            return self._taken(None, k, 0), []
        found, numbers, drawn = Minibatches(), [], 0
        for multiple in [1] * draws if isinstance(draws, int) else draws:
            if multiple == 0:
                found.append(self._taken(None, k, drawn))
            elif self.parts:
                generator = np.random.default_rng([self.seed, k, self.i, drawn])
                numbers.append(int(generator.choice(len(self.parts), p=self.shares)))
                found.append(self._taken(self.parts[numbers[-1]], k, drawn))
            else:
                units = range(drawn, drawn + multiple)
                index = [self._share(draw(self.seed, k, self.i, unit, self.samples, self.size)) for unit in units]
                found.append(self._taken(torch.cat(index), k, drawn))
            drawn += multiple
        return found, numbers

    def _taken(self, index: Tensor | None, k: int, number: int) -> Samples:
        return self.augment(self._gather(index), [self.seed, k, self.i, number, self.rank])

    def _share(self, index: Tensor) -> Tensor:
        return index[self.rank : len(index) // self.world * self.world : self.world]

    def _gather(self, index: Tensor | None) -> Samples:
        if index is None:
            everything = slice(self.rank, self.samples // self.world * self.world, self.world)
            return tuple(t[everything] for t in self.data)
        index = (self._share(index) if self.parts else index).to(self.data[0].device)
        return tuple(t[index] for t in self.data)
