import csv
import math

import pytest
import torch
from loops import trainer
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bilevel_lightning import RHG, BilevelError, GradientDescent
from bilevel_lightning.callbacks import PathFigure, SolutionError
from bilevel_lightning.datamodules import NoData
from bilevel_lightning.tasks import GPBGDTrap, GroupLasso, Lasso, PBGDToy, SineSum, SinProblem, StronglyConvex


def module(task, lr=0.05, **settings):
    return RHG(
        task=task,
        lower_steps=2,
        dynamics=GradientDescent(0.1),
        upper_optimizer=lambda params: torch.optim.SGD(params, lr=lr),
        **settings,
    )


def text(table):
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve starts of the toy, ten upper iterations, logged every third."""
    folder = tmp_path_factory.mktemp("run")
    loggers = [TensorBoardLogger(folder, name="", version=""), CSVLogger(folder, name="", version="csv")]
    error, figure = SolutionError(), PathFigure(paths=5)
    loop = trainer(10, folder, logger=loggers, callbacks=[error, figure], precision="64-true", log_every_n_steps=3)
    task = PBGDToy(starts=12)
    start = task.upper["x"].detach().clone(), task.lower["y"].detach().clone()
    loop.fit(module(task), datamodule=NoData(iterations=10))
    return folder, loop, start, error, figure


def rows(file):
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_errors_are_logged_at_logged_steps(run):
    folder, loop, *_ = run
    logged = [row for row in rows(folder / "csv" / "metrics.csv") if row["train/error_x"]]
    assert [int(row["step"]) for row in logged] == [2, 5, 8]
    assert [int(row["step"]) for row in logged] == [
        int(row["step"]) for row in rows(folder / "csv" / "metrics.csv") if row["train/upper_loss"]
    ]
    for name in ("error_x", "error_y", "error_x_max", "error_y_max", "hyper_gap"):
        values = [float(row[f"train/{name}"]) for row in logged]
        assert all(map(math.isfinite, values))
        assert values[-1] < values[0]
    task = loop.lightning_module.task
    worst = task.errors(task.upper["x"], task.lower["y"])["x"].amax().item()
    assert float(loop.callback_metrics["val/error_x_max"]) == pytest.approx(worst)


def test_ends_of_all_starts(run):
    folder, loop, start, *_ = run
    task = loop.lightning_module.task
    found = rows(folder / "ends.csv")
    assert [*found[0]] == ["start_x_1", "start_y_1", "x_1", "y_1", "error_x", "error_y", "upper_loss"]
    errors = task.errors(task.upper["x"], task.lower["y"])
    expected = [*start, task.upper["x"], task.lower["y"], errors["x"][:, None], errors["y"][:, None]]
    expected = torch.cat([*expected, task.f(task.upper["x"], task.lower["y"])[:, None]], dim=1).tolist()
    assert [[float(value) for value in row.values()] for row in found] == expected
    assert found[0]["x_1"] != found[0]["start_x_1"]


def test_table_by_solution_or_by_start(run):
    _, loop, _, error, _ = run
    table = text(error.table(loop.lightning_module, 10))
    task = loop.lightning_module.task
    for shown in ("PBGDToy: 10 upper iterations", "nearest x*", "0.38236", "1.2151", "2.8296", "hyper_gap"):
        assert shown in table
    counts = task.nearest(task.upper["x"], task.lower["y"]).bincount(minlength=3).tolist()
    assert sum(counts) == 12
    lines = [line.split("│") for line in table.splitlines() if line.startswith("│")]
    assert [int(line[3]) for line in lines] == counts
    error.rows = 12
    lines = [line for line in text(error.table(loop.lightning_module, 10)).splitlines() if line.startswith("│")]
    assert len(lines) == 12
    assert f"{task.upper['x'][3].item():.5g}" in lines[3]
    assert f"{error.start[1][3].item():.5g}" in lines[3]


def test_picture(run):
    folder, loop, start, _, figure = run
    with Image.open(folder / "paths.png") as picture:
        assert picture.width == 1440
        assert len(picture.convert("RGB").getcolors(10**6)) > 100
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0})
    accumulator.Reload()
    assert accumulator.Images("paths")[0].step == 10
    drawn = figure.figure(loop.lightning_module)
    left, right = drawn.axes[:2]
    assert {axis.get_xlabel() for axis in (left, right)} == {"x"}
    assert right.get_ylabel() == "y"
    counts = [int(label.get_text()) for label in left.texts]
    assert sum(counts) == 12
    names = [label.get_text() for label in right.get_legend().get_texts()]
    assert names == ["lower solutions", "paths", "known solutions", "starts", "ends"]
    paths = [line for line in right.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 5]
    assert len(paths) == 5  # the start, iterations 3, 6, 9, and the end
    for i, line in enumerate(paths):
        assert line.get_xdata()[0] == start[0][i].item()
        assert line.get_ydata()[-1] == loop.lightning_module.task.lower["y"][i].item()


def test_positions_are_recorded_at_logged_steps(run):
    _, _, start, _, figure = run
    assert len(figure.positions) == 5
    assert torch.equal(figure.positions[0], torch.cat(start, dim=1)[:5].double())


def test_branches_without_a_lower_solution_leave_gaps():
    """The hyper-objective jumps; the infeasible part is not drawn."""
    figure, task = PathFigure(), SinProblem(starts=[(1, 2)]).double()
    holder = module(task)
    figure.record(holder)
    left = figure.figure(holder).axes[0]
    (line,) = [line for line in left.lines if line.get_label().startswith("F(x)")]
    assert int(torch.as_tensor(line.get_ydata()).isnan().sum()) == 3
    assert min(line.get_xdata()) >= 1
    assert max(line.get_xdata()) <= 10


def test_a_range_of_one_point_and_a_start_that_ran_away():
    figure, task = PathFigure(), GPBGDTrap(starts=[(0, 0), (0, 1e9)], ranges=((0, 0), (0, 0))).double()
    holder = module(task)
    figure.record(holder)
    right = figure.figure(holder).axes[1]
    assert right.get_xlim() == pytest.approx((-0.03, 0.03))
    assert right.get_ylim() == pytest.approx((-0.03, 1.03))


def test_long_vectors_are_shortened_and_written_whole(tmp_path):
    task = Lasso(n=6, starts=3).double()
    error = SolutionError(rows=2)
    error.start = (task.upper["x"].detach().clone(), task.lower["y"].detach().clone())
    error.write(module(task), tmp_path)
    assert len(rows(tmp_path / "ends.csv")[0]) == 4 * 6 + 3
    assert "0 .. 0.16667" in text(error.table(module(task), 1))


def test_without_a_known_solution(tmp_path):
    """Starts and ends are listed, as many as there are rows, and the task's own metrics."""
    task = GroupLasso(m=15, groups=3, samples=5, starts=4)
    error = SolutionError(rows=3)
    error.start = (task.upper["x"].detach().clone(), task.lower["y"].detach().clone())
    table = text(error.table(module(task), 7))
    assert "test_error" in table
    assert "error x" not in table
    assert sum(line.startswith("│") for line in table.splitlines()) == 3
    error.write(module(task), tmp_path)
    assert [*rows(tmp_path / "ends.csv")[0]][-2:] == ["y_15", "upper_loss"]


def test_several_upper_iterations_a_batch(tmp_path):
    """Logged steps count batches, as in the module."""
    figure = PathFigure()
    loop = trainer(12, tmp_path, callbacks=[figure], log_every_n_steps=2)
    loop.fit(module(SineSum(), upper_iterations=3), datamodule=NoData(iterations=4))
    assert loop.global_step == 12
    assert len(figure.positions) == 4  # the start, batches 2 and 4, and the end
    assert "train/error_x" in loop.callback_metrics


def test_a_resumed_run_reports_from_its_first_start(tmp_path):
    def fit(steps, **settings):
        callbacks = [SolutionError(), PathFigure()]
        callbacks[1].figure = lambda module: Figure()
        loop = trainer(steps, tmp_path, callbacks=callbacks, log_every_n_steps=2)
        loop.fit(module(PBGDToy(starts=3)), datamodule=NoData(iterations=8), **settings)
        return loop, *callbacks

    _, whole, path = fit(12)
    loop, first, _ = fit(6)
    first.seconds = 1000.0
    loop.save_checkpoint(tmp_path / "stopped.ckpt")
    _, resumed, again = fit(12, ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert all(map(torch.equal, resumed.start, whole.start))
    assert 1000 < resumed.seconds < 1100
    positions = torch.stack(path.positions)
    kept = torch.stack(again.positions)
    assert torch.equal(kept[[0, -1]], positions[[0, -1]])
    assert {tuple(p.flatten().tolist()) for p in positions} == {tuple(p.flatten().tolist()) for p in kept}


def test_a_second_run_starts_anew(tmp_path):
    callbacks = [SolutionError(), PathFigure()]
    callbacks[1].figure = lambda module: Figure()
    for start in (1.0, 2.0):
        loop = trainer(2, tmp_path, callbacks=callbacks)
        loop.fit(module(PBGDToy(starts=[(start, 0.5)])), datamodule=NoData(iterations=8))
        assert callbacks[0].start[0].item() == start
        assert callbacks[1].positions[0].tolist() == [[start, 0.5]]


def test_pictures_need_one_x_and_one_y(tmp_path):
    with pytest.raises(BilevelError, match=r"has 3 and 3: leave it out of trainer.callbacks"):
        trainer(1, tmp_path, callbacks=[PathFigure()]).fit(module(StronglyConvex(n=3)), datamodule=NoData())


def test_a_barebones_run_only_reports(tmp_path, capsys):
    """Nothing may be logged there."""
    features = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet = dict.fromkeys((*features, "log_every_n_steps", "num_sanity_val_steps"))
    trainer(2, tmp_path, **quiet, barebones=True).fit(module(SineSum()), datamodule=NoData(iterations=5))
    assert "SineSum: 2 upper iterations" in capsys.readouterr().out
