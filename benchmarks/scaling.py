"""Strong scaling of few-shot learning over processes, and the share of communication.

    python benchmarks/scaling.py [--width 32] [--episodes 8] [--iterations 6]

One process solves all episodes of an upper iteration, two solve half of them each, on one thread each; MAML on
ConvNet-4 with random images of 28 x 28 pixels, 5 ways, 1 shot, 15 queries. Seconds are those of the clock, so run it on
a machine that does nothing else; the CPU seconds beside them say how much of it was waiting.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, Trainer
from rich.console import Console
from rich.table import Table

from bilevel_lightning import MAML, GradientDescent, distributed
from bilevel_lightning.datamodules.iterations import Iterations
from bilevel_lightning.models import ConvNetBody, LinearHead
from bilevel_lightning.tasks import FewShot


class Clock(Callback):
    """Seconds of each upper iteration, by the clock and of this process, and those inside collectives."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float, float]] = []
        self.inside, self.bytes = 0.0, 0
        reduce = dist.all_reduce

        def timed(t, *args, **kwargs):
            start = time.perf_counter()
            out = reduce(t, *args, **kwargs)
            self.inside += time.perf_counter() - start
            self.bytes += t.numel() * t.element_size()
            return out

        distributed.dist.all_reduce = timed

    def on_train_batch_start(self, *args) -> None:
        """Starts the clock."""
        self.start, self.inside, self.bytes = (time.perf_counter(), time.process_time()), 0.0, 0

    def on_train_batch_end(self, *args) -> None:
        """Stops it."""
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        self.seconds.append((wall, cpu, self.inside))


def work(rank: int, world: int, folder: str, given: argparse.Namespace) -> None:
    """Trains as one of ``world`` processes."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    number = given.episodes // world
    generator = torch.Generator().manual_seed(rank)
    batch = {
        part: (
            torch.rand(number, 5 * shots, 1, 28, 28, generator=generator),
            torch.arange(5).repeat_interleave(shots).expand(number, -1).contiguous(),
        )
        for part, shots in (("support", 1), ("query", 15))
    }
    torch.manual_seed(0)
    body = ConvNetBody((1, 28, 28), width=given.width, norm="transductive")
    task = FewShot(body, LinearHead(body.features, 5), adapt="all")
    task.callbacks = list
    clock = Clock()
    strategy = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", max_steps=given.iterations, callbacks=[clock], log_every_n_steps=10**9, **quiet, **strategy
    )  # fmt: skip
    model = MAML(task=task, dynamics=GradientDescent(0.1), lower_steps=5)
    trainer.fit(model, Iterations(lambda k: batch, given.iterations, trainer))
    torch.save((clock.seconds[1:], clock.bytes), Path(folder) / f"{world} {rank}.pt")


def main() -> None:
    """Runs both, and prints medians over the iterations but the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=6)
    given = parser.parse_args()
    table = Table("processes", "seconds", "speed-up", "CPU seconds of one", "in collectives", "bytes averaged")
    first = 0.0
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(work, (world, folder, given), nprocs=world)
            found = [torch.load(Path(folder) / f"{world} {rank}.pt") for rank in range(world)]
        wall, cpu, inside = (statistics.median(row[i] for rows, _ in found for row in rows) for i in range(3))
        first = first or wall
        table.add_row(
            str(world), f"{wall:.3f}", f"{first / wall:.2f}", f"{cpu:.3f}", f"{100 * inside / wall:.1f} %",
            str(found[0][1]),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
