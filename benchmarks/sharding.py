"""Memory of a process with y divided between two of them (``sharded``), beside ``ddp``.

    MALLOC_MMAP_THRESHOLD_=1000000 python benchmarks/sharding.py [--width 2000] [--layers 4]

A linear network without bias of ``layers`` times ``width x width`` weights is y; two samples a loss, so that
activations weigh nothing; two lower steps of momentum. Between iterations: the bytes of y and of what the algorithm
keeps. Within: what the resident memory grows by at most in an iteration, by the system's own high-water mark (Linux),
which needs the variable above, so that freed memory goes back to the system at once.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bilevel_lightning import BilevelTask, Momentum, algorithms, tree
from bilevel_lightning.datamodules.iterations import Iterations

METHODS = ("F2SA", "MEHA")


class Wide(BilevelTask):
    """A linear network whose output is to have one size on the lower data, and another on the upper data."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.upper = nn.Linear(1, 1)
        self.lower = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    def lower_loss(self, inputs: Tensor) -> Tensor:
        """Returns g."""
        return (self.lower(0.1 * inputs).square().mean() - 1).square() * self.upper.weight.exp().sum()

    def upper_loss(self, inputs: Tensor) -> Tensor:
        """Returns f."""
        return (self.lower(0.2 * inputs).square().mean() - 2).square()


def resident(kind: str) -> int:
    """Returns the process's resident memory, now (RSS) or at most (HWM), in bytes."""
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"Vm{kind}"))
    return 1024 * int(line.split()[1])


class Memory(Callback):
    """What is held between iterations, and what comes on top of it within the last one."""

    def on_train_batch_start(self, *args) -> None:
        """Sets the high-water mark back."""
        Path("/proc/self/clear_refs").write_text("5")
        self.before = resident("RSS")

    def on_train_batch_end(self, trainer, module, *args) -> None:
        """Reads it."""
        self.within = resident("HWM") - self.before
        kept = [*tree.of(module.hooks.lower).values(), *module.states.buffers()]
        local = [t.to_local() if tree.divided(t) else t for t in kept]
        self.between = sum(t.untyped_storage().nbytes() for t in local)


def work(rank: int, folder: str, strategy: str, method: str, given: argparse.Namespace) -> None:
    """Trains as one of two processes."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    memory, inputs = Memory(), torch.ones(2, given.width)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=3, callbacks=[memory], log_every_n_steps=100, **quiet
    )
    task = Wide(given.width, given.layers)
    model = getattr(algorithms, method)(task=task, dynamics=Momentum(0.01), lower_steps=2)
    trainer.fit(model, Iterations(lambda k: {"lower": inputs, "upper": inputs}, 3, trainer))
    torch.save((memory.between, memory.within), Path(folder) / str(rank))


def main() -> None:
    """Prints the larger of both processes' numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    size = 4 * given.layers * given.width**2
    table = Table("algorithm", "strategy", "between", "within", title=f"in sizes of y, {size / 2**20:.0f} MiB")
    for method in METHODS:
        for strategy in ("ddp", "sharded"):
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(work, (folder, strategy, method, given), nprocs=2)
                found = [torch.load(Path(folder) / str(rank)) for rank in (0, 1)]
            between, within = (max(values) / size for values in zip(*found, strict=True))
            table.add_row(method, strategy, f"{between:.2f}", f"{within:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
