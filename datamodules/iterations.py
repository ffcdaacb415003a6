"""A stream of upper iterations, each a function of its number: resumable anywhere, equal for all processes."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from torch import Tensor


class Iterations:
    """The batches ``batch(k)`` of one epoch, k counting the upper iterations from the start of the run.

    Lightning takes any sized iterable as a loader. When a run is resumed in the middle of an epoch, the numbers go on
    where the checkpoint was written.

    Args:
        batch: makes the batch of upper iteration k.
        length: upper iterations an epoch.
        trainer: whose progress says which number comes next.
    """

    def __init__(self, batch: Callable[[int], Any], length: int, trainer: Trainer) -> None:
        self.batch, self.length, self.trainer = batch, length, trainer

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        first = 0 if overfit else self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return (self.batch(k) for k in range(first, first + self.length))

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the trainer's progress is all the state. Lightning takes its presence as "resumable"."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""


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
