"""A stream of upper iterations, each a function of its number: resumable anywhere, equal for all processes."""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override


class Iterations:
    """The batches ``batch(k)`` of one epoch, k counting the upper iterations from the start of the run.

    Lightning takes any sized iterable as a loader, and leaves its sampler alone where there are several processes. When
    a run is resumed in the middle of an epoch, the numbers go on where the checkpoint was written.

    Args:
        batch: makes the batch of upper iteration k.
        length: upper iterations an epoch.
        trainer: whose progress says which number comes next; None: every epoch starts with number 0 (evaluation).
        num_workers: processes that make batches ahead of their use, in order; they live as long as this object. 0
            (default): each batch is made when it is asked for.
    """

    def __init__(
        self, batch: Callable[[int], Any], length: int, trainer: Trainer | None = None, num_workers: int = 0
    ) -> None:
        self.batch, self.length, self.trainer, self.num_workers = batch, length, trainer, num_workers
        self._numbers: list[int] = []
        self._workers: DataLoader[Any] | None = None
        self._running: Generator[Any, None, None] | None = None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        first = 0
        if self.trainer is not None and not self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            first = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._numbers[:] = range(first, first + self.length)
        if not self.num_workers:
            return (self.batch(k) for k in [*self._numbers])
        if self._workers is None:
            self._workers = DataLoader(
                _Numbered(self.batch),
                batch_size=None,
                sampler=self._numbers,
                num_workers=self.num_workers,
                persistent_workers=True,
                generator=torch.Generator(),  # else it would draw from the global one, which no workers leave alone
            )
        self._running = _started_late(self._workers)
        return self._running

    def close(self) -> None:
        """Ends the workers. Those that garbage collection finds in a cycle wait for five seconds each instead."""
        if self._running is not None:
            self._running.close()
        self._running = self._workers = None

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the trainer's progress is all the state. Lightning takes its presence as "resumable"."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""


def _started_late(loader: Iterable[Any]) -> Generator[Any, None, None]:
    """Starts the workers with the first batch, not when Lightning tries whether this is iterable."""
    yield from loader


class _Numbered(Dataset[Any]):
    """Batches by number, as workers ask for them."""

    def __init__(self, batch: Callable[[int], Any]) -> None:
        self.batch = batch

    @override
    def __getitem__(self, k: int) -> Any:
        return self.batch(k)


def draw(seed: int, k: int, level: int, number: int, samples: int, size: int) -> Tensor:
    """Returns the indices of minibatch ``number`` of a level in upper iteration ``k``, shape ``(size,)``.

    Drawn without replacement inside a minibatch, independently between minibatches, levels and iterations.
    """
    generator = np.random.default_rng([seed, k, level, number])
    return torch.from_numpy(generator.choice(samples, size, replace=False))


class Whole:
    """A loader of a single batch: an evaluation over everything at once.

    Args:
        batch: the batch.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        yield self.batch
