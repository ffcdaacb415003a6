"""Few-shot learning: batches of episodes, each a function of the seed, the split and the episode's number."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils._pytree import tree_map
from typing_extensions import override

from bilevel_lightning.datamodules.iterations import Iterations
from bilevel_lightning.errors import BilevelError

Split: TypeAlias = Literal["train", "val", "test"]
Episode: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Support x, support y, query x, query y."""

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def needed(stage: str | None) -> tuple[Split, ...]:
    """Returns the splits that a stage of Lightning reads; None: all."""
    splits: dict[str | None, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), None: SPLITS}
    return splits.get(stage, ("test",))


class Episodes(ABC):
    """The episodes of one split. Worker processes get a copy, so it must be picklable.

    Args:
        split: number of the split, part of the random numbers' key.
        seed: of the episodes.
    """

    def __init__(self, split: int, seed: int) -> None:
        self.split, self.seed = split, seed

    @abstractmethod
    def episode(self, rng: np.random.Generator) -> Episode:
        """Returns one episode, drawn with ``rng`` alone."""

    def batch(self, numbers: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the episodes of these numbers, stacked."""
        drawn = [self.episode(np.random.default_rng([self.seed, self.split, number])) for number in numbers]
        x_s, y_s, x_q, y_q = (np.stack(part) for part in zip(*drawn, strict=True))
        parts = [torch.from_numpy(part) for part in (self.samples(x_s), y_s, self.samples(x_q), y_q)]
        return {"support": (parts[0], parts[1]), "query": (parts[2], parts[3])}

    def samples(self, x: np.ndarray) -> np.ndarray:
        """Returns the samples that the x of `episode` stand for; default: they are the samples."""
        return x


def share(b: int, size: int, rank: int, world: int, total: int | None = None) -> range:
    """Returns the numbers of the episodes in batch ``b`` of process ``rank``.

    The processes' batches are consecutive parts of the batch that one process would get with ``world`` times the size.

    Args:
        b: number of the batch.
        size: episodes in a batch of one process.
        rank: number of the process.
        world: how many processes there are.
        total: how many episodes there are, a multiple of ``world``; the last batches are smaller. None: no end.
    """
    start = b * size * world
    count = size if total is None else min(size, (total - start) // world)
    return range(start + rank * count, start + (rank + 1) * count)


def numbered_batch(
    episodes: Episodes, size: int, rank: int, world: int, total: int | None, tasks: int | None, b: int
) -> dict[str, Any]:
    """Returns batch ``b`` of a process; with ``tasks``, of so many episodes visited again, and their numbers."""
    numbers = share(b, size, rank, world, total)
    if tasks is None:
        return episodes.batch(numbers)
    again = [n % tasks for n in numbers]
    return {**episodes.batch(again), "episode": torch.tensor(again)}


class EpisodicDataModule(LightningDataModule, ABC):
    r"""Base of the few-shot data modules.

    A batch holds E = ``episodes_per_batch`` episodes: ``{"support": (x, y), "query": (x, y)}`` with x of shape
    ``(E, ways * shots, *image_shape)`` for the support set, ``(E, ways * queries, *image_shape)`` for the query set.
    The labels y, of shape ``(E, ways * shots)`` and ``(E, ways * queries)``, are 0 to ``ways - 1``, assigned to the
    drawn classes at random; samples are sorted by label. Images leave the loader as uint8 and become floats in [0, 1]
    on the device, in the type of the module's parameters.

    Episode n of a split is a function of ``(seed, split, n)`` and nothing else, so that runs with any number of workers
    or processes, and resumed runs, see the same episodes. Training batch b of process r of W has the episodes from
    ``(b W + r) E`` on; validation and test use the fixed episodes 0 to ``val_episodes - 1`` and ``test_episodes - 1``
    of their split, each once, shared by the processes.

    Args:
        ways: classes N of an episode. Default 5.
        shots: support samples K of each class. Default 1.
        queries: query samples of each class. Default 15, as in Ravi and Larochelle, "Optimization as a model for
            few-shot learning", ICLR 2017, and most work since.
        episodes_per_batch: episodes of an upper iteration, for each process. Default 4, the meta-batch of Finn, Abbeel
            and Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017, on MiniImageNet.
        epoch_length: upper iterations an epoch, after which validation runs. Default 100.
        val_episodes: fixed episodes of a validation. Default 200.
        test_episodes: fixed episodes of a test. Default 600, as in Finn et al. 2017.
        num_workers: processes that make batches ahead. Default 0: batches are gathered from memory in far less time
            than a step takes (``docs/few_shot_data.md``).
        seed: of the episodes. Default 0.
        train_episodes: number N of training episodes that are visited again and again, in order, a multiple of the
            episodes of a batch on all processes. Training batches then hold their numbers 0 to N - 1 too, ``"episode"``
            of shape ``(E,)``. None (default): each episode is drawn once, without end.

    Attributes:
        image_shape: shape of one sample, ``(channels, height, width)`` for images.
        name: what the data are called in logs and reports.
        episodes: the episodes of the splits that were set up.

    Raises:
        BilevelError: if a setting is impossible, or does not fit the data or the number of processes.
    """

    image_shape: tuple[int, ...]
    mean: list[float] | None = None
    std: list[float] | None = None

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        episodes_per_batch: int = 4,
        epoch_length: int = 100,
        val_episodes: int = 200,
        test_episodes: int = 600,
        num_workers: int = 0,
        seed: int = 0,
        train_episodes: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.name: str = type(self).__name__
        self.ways, self.shots, self.queries = ways, shots, queries
        self.episodes_per_batch, self.epoch_length = episodes_per_batch, epoch_length
        self.val_episodes, self.test_episodes = val_episodes, test_episodes
        self.num_workers, self.seed, self.train_episodes = num_workers, seed, train_episodes
        self.episodes: dict[Split, Episodes] = {}
        self._loaders: list[Iterations] = []
        for name in ("ways", "shots", "queries", "episodes_per_batch", "epoch_length", "val_episodes", "test_episodes"):
            if getattr(self, name) < 1:
                raise BilevelError(f"data.{name} must be at least 1, got {getattr(self, name)}.")
        if train_episodes is not None and train_episodes < 1:
            raise BilevelError(f"data.train_episodes must be at least 1, got {train_episodes}; or leave it out.")
        for name in ("num_workers", "seed"):
            if getattr(self, name) < 0:
                raise BilevelError(f"data.{name} must not be negative, got {getattr(self, name)}.")

    @abstractmethod
    def split_episodes(self, split: Split) -> Episodes:
        """Returns the episodes of a split; called once for each split that a run needs."""

    @override
    def setup(self, stage: str | None = None) -> None:
        _, world = self._process()
        size = self.episodes_per_batch * world
        if "train" in needed(stage) and (self.train_episodes or 0) % size:
            raise BilevelError(
                f"data.train_episodes={self.train_episodes} must be a multiple of the {size} episodes of a batch on "
                "all processes: change it or data.episodes_per_batch."
            )
        for split in needed(stage):
            total = 0 if split == "train" else getattr(self, f"{split}_episodes")
            if total % world:
                raise BilevelError(
                    f"data.{split}_episodes={total} cannot be shared equally by {world} processes; make it a multiple."
                )
            if split not in self.episodes:
                self.episodes[split] = self.split_episodes(split)

    def _process(self) -> tuple[int, int]:
        """Returns the number of this process and how many there are."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, split: Split, total: int | None = None) -> Iterations:
        (rank, world), size = self._process(), self.episodes_per_batch
        tasks = self.train_episodes if split == "train" else None
        batch: Callable[[int], Any] = partial(numbered_batch, self.episodes[split], size, rank, world, total, tasks)
        if total is None:
            loader = Iterations(batch, self.epoch_length, self.trainer, self.num_workers)
        else:
            loader = Iterations(batch, -(-total // (size * world)), None, self.num_workers)
        self._loaders.append(loader)
        return loader

    @override
    def train_dataloader(self) -> Iterations:
        return self._loader("train")

    @override
    def val_dataloader(self) -> Iterations:
        return self._loader("val", self.val_episodes)

    @override
    def test_dataloader(self) -> Iterations:
        return self._loader("test", self.test_episodes)

    @override
    def predict_dataloader(self) -> Iterations:
        return self.test_dataloader()

    @override
    def teardown(self, stage: str) -> None:
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        dtypes = [p.dtype for p in module.parameters() if p.is_floating_point()] if module is not None else []
        dtype = dtypes[0] if dtypes else torch.get_default_dtype()

        def convert(t: Any) -> Any:
            if isinstance(t, Tensor) and t.dtype == torch.uint8:
                return self._normalise(t.to(torch.promote_types(dtype, torch.float32)) / 255).to(dtype)
            return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

        return tree_map(convert, batch)

    def _normalise(self, images: Tensor) -> Tensor:
        """Subtracts ``mean`` and divides by ``std``, by channel, where they are given."""
        for values, apply in ((self.mean, Tensor.sub), (self.std, Tensor.div)):
            if values is not None:
                images = apply(images, images.new_tensor(values)[:, None, None])
        return images
