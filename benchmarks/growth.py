"""Whether MEHA's iterations grow in time or memory: medians of 20 upper iterations, and resident memory (Linux).

    python benchmarks/growth.py

The settings are those of ``numerical/lasso_meha`` and ``numerical/merely_convex_meha``, one upper iteration a batch.
"""

import logging
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer

from bilevel_lightning import MEHA, GradientDescent
from bilevel_lightning.datamodules import NoData
from bilevel_lightning.schedules import Power
from bilevel_lightning.tasks import Lasso, MerelyConvex

PROBLEMS: dict[str, tuple[Any, float, dict[str, Any]]] = {  # task, step size of x, settings
    "lasso, n = 1000": (
        lambda: Lasso(1000),
        1.0,
        {"gamma": 2.0, "c": Power(5000.0, 0.25), "lower_lr": 0.5, "dynamics": GradientDescent(0.5)},
    ),
    "merely convex, n = 10": (
        lambda: MerelyConvex(10),
        0.2,
        {"gamma": 1.0, "c": 0.167, "lower_lr": 0.3, "dynamics": GradientDescent(0.4)},
    ),
}


class Note(Callback):
    """Notes processor time of each batch, and memory after some."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.memory: list[float] = []
        self.start = 0.0

    def on_train_batch_start(self, *args: object) -> None:
        """Starts the clock."""
        self.start = time.process_time()

    def on_train_batch_end(self, *args: object) -> None:
        """Stops it."""
        self.seconds.append(time.process_time() - self.start)
        if len(self.seconds) in (20, 1000, 2000):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.memory.append(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")))


def main() -> None:
    """Prints a line for each problem."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    for name, (make, lr, settings) in PROBLEMS.items():
        task, note = make(), Note()
        task.callbacks = list  # no reports
        module = MEHA(task=task, upper_optimizer=lambda p, lr=lr: torch.optim.SGD(p, lr=lr), **settings)
        trainer = Trainer(
            accelerator="cpu", precision="64-true", max_steps=2100, log_every_n_steps=0, limit_val_batches=0,
            callbacks=[note], **off,
        )  # fmt: skip
        trainer.fit(module, NoData(iterations=2100))
        times = [1000 * median(note.seconds[first : first + 20]) for first in (10, 990, 1990)]
        memory = ", ".join(f"{m:.1f}" for m in note.memory)
        print(f"{name}: {', '.join(f'{t:.2f}' for t in times)} ms; {memory} MiB")


if __name__ == "__main__":
    main()
