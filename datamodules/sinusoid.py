"""Regression of sine waves: episodes without files."""

from typing import Any

import numpy as np
from typing_extensions import override

from bilevel_lightning.datamodules.episodes import SPLITS, Episode, Episodes, EpisodicDataModule, Split


class SinusoidEpisodes(Episodes):
    """Draws A, the phase and the points x of an episode.

    Args:
        split: number of the split.
        seed: of the episodes.
        shots: support points.
        queries: query points.
    """

    def __init__(self, split: int, seed: int, shots: int, queries: int) -> None:
        super().__init__(split, seed)
        self.shots, self.queries = shots, queries

    @override
    def episode(self, rng: np.random.Generator) -> Episode:
        amplitude, phase = rng.uniform(0.1, 5.0), rng.uniform(0.0, np.pi)
        x = rng.uniform(-5.0, 5.0, (self.shots + self.queries, 1))
        y = (amplitude * np.sin(x - phase)).astype(np.float32)
        x = x.astype(np.float32)
        return x[: self.shots], y[: self.shots], x[self.shots :], y[self.shots :]


class Sinusoid(EpisodicDataModule):
    r"""Sine waves ``y = A sin(x - phase)``: A from U[0.1, 5], phase from U[0, pi], x from U[-5, 5].

    The regression problem of C. Finn, P. Abbeel and S. Levine, "Model-agnostic meta-learning for fast adaptation of
    deep networks", ICML 2017, section 5.1. An episode is one wave: ``ways`` is 1, x and y have shape ``(E, shots, 1)``
    in the support set and ``(E, queries, 1)`` in the query set, without noise. Nothing is downloaded.

    Args:
        shots: support points K. Default 5.
        episodes_per_batch: as in `EpisodicDataModule`. Default 25, as in the paper's code.
        **settings: of `EpisodicDataModule`, but for ``ways``.
    """

    image_shape = (1,)

    def __init__(self, shots: int = 5, episodes_per_batch: int = 25, **settings: Any) -> None:
        super().__init__(ways=1, shots=shots, episodes_per_batch=episodes_per_batch, **settings)

    @override
    def split_episodes(self, split: Split) -> SinusoidEpisodes:
        return SinusoidEpisodes(SPLITS.index(split), self.seed, self.shots, self.queries)
