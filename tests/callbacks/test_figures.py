"""Where a run's figures and files go."""

import pytest
import torch
from loops import trainer
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bilevel_lightning import DARTS, RHG, GradientDescent
from bilevel_lightning.callbacks.figures import Figures
from bilevel_lightning.datamodules import DigitsSearch, NoData
from bilevel_lightning.models import SearchNetwork
from bilevel_lightning.tasks import ArchitectureSearch, PBGDToy


class Counted(Figures):
    """Draws nothing particular, and notes when."""

    def __init__(self):
        self.drawn = []

    def figures(self, trainer, pl_module):
        self.drawn.append(trainer.global_step)
        return {"first": Figure(), "second": Figure()}


def toy():
    return RHG(
        task=PBGDToy(starts=3),
        lower_steps=1,
        dynamics=GradientDescent(0.1),
        upper_optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
    )


def search():
    task = ArchitectureSearch(SearchNetwork((1, 8, 8), channels=2, layers=3, nodes=1))
    return DARTS(task=task, order=1, dynamics=GradientDescent(0.05))


RUNS = {
    "numerical": (toy, lambda: NoData(iterations=2), {"ends.csv", "paths.png"}),
    "architecture": (
        search,
        lambda: DigitsSearch(samples=20, lower_batch_size=4, upper_batch_size=4, epoch_length=2),
        {"architecture.png", "genotype.json", "genotype.png"},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_without_a_logger_writes_nothing_into_the_working_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, data, files = RUNS[name]
    trainer(2, limit_val_batches=0).fit(make(), datamodule=data())
    assert not list(tmp_path.iterdir())
    logger = CSVLogger(tmp_path, name="", version="log")
    trainer(2, limit_val_batches=0, logger=logger).fit(make(), datamodule=data())
    assert {file.name for file in tmp_path.iterdir()} == {"log"}
    assert files <= {file.name for file in (tmp_path / "log").iterdir()}


@pytest.mark.parametrize("board", [True, False])
def test_figures_are_drawn_where_they_are_seen(board, tmp_path):
    """In TensorBoard after each validation but the sanity check, as files at the end; else they are not drawn."""
    callback = Counted()
    logger = (TensorBoardLogger if board else CSVLogger)(tmp_path, name="", version="")
    loop = trainer(4, callbacks=[callback], logger=logger, num_sanity_val_steps=1)
    loop.fit(toy(), datamodule=NoData(iterations=2))
    assert callback.drawn == ([2, 4, 4] if board else [4])
    assert {"first.png", "second.png"} <= {file.name for file in tmp_path.iterdir()}
    if board:
        found = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
        assert [event.step for event in found.Images("second")] == [2, 4]
