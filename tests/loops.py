"""A trainer for tests: CPU, silent, nothing written unless asked for."""

from pathlib import Path

import torch
from pytorch_lightning import Trainer


class Batches:
    """A loader that repeats one batch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __iter__(self):
        return iter([{"lower": torch.zeros(1), "upper": torch.zeros(1)}] * self.number)

    def state_dict(self):
        """Says to Lightning that resuming in the middle is fine: all batches are equal."""
        return {}

    def load_state_dict(self, state):
        pass


def trainer(steps: int, folder: Path | None = None, **settings) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return Trainer(**{**quiet, **settings})


def fit(module, steps: int, **settings):
    """Trains for ``steps`` upper iterations on a problem that needs no data; returns the trainer."""
    run = trainer(steps, **settings)
    run.fit(module, Batches(100))
    return run
