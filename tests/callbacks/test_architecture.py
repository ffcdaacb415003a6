import pytest
import torch
from loops import trainer
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bilevel_lightning import DARTS, GradientDescent
from bilevel_lightning.callbacks.architecture import draw_genotype, draw_weights
from bilevel_lightning.datamodules import DigitsSearch
from bilevel_lightning.models import PUBLISHED, Genotype, SearchNetwork
from bilevel_lightning.tasks import ArchitectureSearch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short search on digits that logs everything."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    task = ArchitectureSearch(SearchNetwork((1, 8, 8), channels=2, layers=3, nodes=2))
    module = DARTS(
        task=task,
        order=1,
        dynamics=GradientDescent(0.05),
        upper_optimizer=lambda params: torch.optim.Adam(params, lr=0.2),
    )
    loggers = [TensorBoardLogger(folder, name="", version=""), CSVLogger(folder, name="", version="csv")]
    data = DigitsSearch(samples=60, lower_batch_size=8, upper_batch_size=8, epoch_length=2)
    trainer(4, folder, logger=loggers, limit_val_batches=1).fit(module, datamodule=data)
    return folder, task


def test_pictures_and_entropy_of_the_event_file(run):
    folder, task = run
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    for name in ("architecture", "genotype"):
        assert len(found.Images(name)) == 2
    for kind, last in task.upper.entropy().items():
        values = [event.value for event in found.Scalars(f"architecture/entropy_{kind}")]
        assert len(values) == 2
        assert values[1] == pytest.approx(float(last), abs=1e-5)
        assert values[1] < values[0] < 2.08


def test_files_of_the_run(run, caplog):
    folder, task = run
    for name in ("architecture", "genotype"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.size[0] > 500
    assert Genotype.load(folder / "genotype.json") == task.upper.genotype()


def texts(figure):
    return [[t.get_text().replace("\n", " ") for t in axes.texts] for axes in figure.axes]


def test_the_drawing_names_every_operation():
    genotype = PUBLISHED["DARTS_OUR4"]
    normal, reduction = texts(draw_genotype(genotype, "title"))
    for drawn, cell in ((normal, genotype.normal), (reduction, genotype.reduction)):
        for name in {name for edges in cell for name, _ in edges}:
            number = sum(name == one for edges in cell for one, _ in edges)
            assert drawn.count(name.replace("_", " ")) == number
        assert all(str(state) in drawn for state in (2, 3, 4, 5))
    assert len(draw_genotype(genotype, "title").axes[0].patches) == 2 * 8


def test_the_heat_map_holds_the_weights():
    task = ArchitectureSearch(SearchNetwork((1, 8, 8), channels=2, layers=3, nodes=2), scale=1.0)
    figure = draw_weights(task.upper, "title")
    shown = torch.as_tensor(figure.axes[0].images[0].get_array().data.copy())
    assert torch.allclose(shown, task.upper()["normal"].operations.detach())
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["0 → 2", "1 → 2", "0 → 3", "1 → 3", "2 → 3"]
