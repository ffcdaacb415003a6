"""Reports and figures of few-shot learning."""

import copy

import pytest
import torch
from episodic import WAYS, Given, body, curves, head, images
from loops import trainer
from pytorch_lightning import LightningDataModule
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from bilevel_lightning import MAML, BilevelError, GradientDescent
from bilevel_lightning.callbacks import AdaptationCurve, EpisodeFigure, FewShotReport, RegressionFigure
from bilevel_lightning.models import RegressionMLP
from bilevel_lightning.tasks import FewShot, FewShotRegression


class Data(LightningDataModule):
    ways, shots, queries, image_shape = WAYS, 2, 3, (1, 8, 8)
    val_episodes, test_episodes = 4, 6

    def __init__(self, make=images):
        super().__init__()
        self.make = make
        if make is curves:
            self.ways, self.shots, self.queries, self.image_shape = 1, 4, 6, (1,)

    def train_dataloader(self):
        return Given([self.make(2, seed) for seed in range(2)])

    def val_dataloader(self):
        return Given([self.make(2, seed) for seed in (5, 6)])

    def test_dataloader(self):
        return Given([self.make(2, seed) for seed in (7, 8, 9)])


def classification(norm="frozen", **settings):
    part = body(norm)
    return MAML(task=FewShot(part, head(part.features), adapt="all"), dynamics=GradientDescent(0.3), **settings)


def regression(**settings):
    torch.manual_seed(0)
    return MAML(
        task=FewShotRegression(RegressionMLP(hidden=(8, 8)).double()), dynamics=GradientDescent(0.05), **settings
    )


def rows(text):
    return [[cell.strip() for cell in line.split("│")[1:3]] for line in text.splitlines() if line.startswith("│")]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_report_names_the_protocol(stage, capsys):
    module, run = classification("transductive", lower_steps=1, evaluation_steps=3), trainer(1)
    evaluate = run.validate if stage == "val" else run.test
    (found,) = evaluate(module, datamodule=Data(), verbose=False)
    printed = capsys.readouterr().out
    table = dict(rows(printed))
    assert f"{stage} episodes, MAML" in printed
    value, interval = (100 * found[f"{stage}/accuracy{end}"] for end in ("", "_ci95"))
    assert interval > 0
    assert table["accuracy"] == f"{value:.2f} ± {interval:.2f} % (95 % interval)"
    assert table["before adapting"] == f"{100 * found[f'{stage}/accuracy_before']:.2f} %"
    assert table["episodes"] == ("4" if stage == "val" else "6")
    assert table["ways, shots"] == "3, 2"
    assert table["queries of a class"] == "3"
    assert table["lower steps"] == "3"
    assert table["batch normalisation"] == "transductive"
    assert "upper iterations" not in table


def test_report_of_a_regression_and_of_data_without_a_protocol(capsys):
    (found,) = trainer(1).test(regression(), Given([curves(3)]), verbose=False)
    table = dict(rows(capsys.readouterr().out))
    assert table["mse"] == f"{found['test/mse']:.2f} ± {found['test/mse_ci95']:.2f} (95 % interval)"
    assert table["batch normalisation"] == "no batch normalisation"
    assert "episodes" not in table


def test_report_is_not_printed_during_training(capsys):
    trainer(2).fit(classification(), datamodule=Data())
    assert "95 %" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_figures_are_written_and_change_nothing(kind, tmp_path):
    make, data = (classification, Data()) if kind == "classification" else (regression, Data(curves))
    module = make(lower_steps=2, evaluation_steps=4)
    run = trainer(2, tmp_path, logger=CSVLogger(tmp_path, name="", version="log"))
    run.fit(module, datamodule=data)
    assert {p.name for p in (tmp_path / "log").glob("*.png")} == {"adaptation.png", "episode.png"}
    assert all(p.stat().st_size > 5000 for p in (tmp_path / "log").glob("*.png"))

    without = make(lower_steps=2, evaluation_steps=4)
    object.__setattr__(without.task, "callbacks", list)
    trainer(2).fit(without, datamodule=data)
    assert all(torch.equal(t, without.state_dict()[n]) for n, t in module.state_dict().items())

    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    trainer(1, tmp_path, logger=CSVLogger(tmp_path, name="", version="again")).validate(
        module, datamodule=data, verbose=False
    )
    assert (tmp_path / "again" / "episode.png").is_file()
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_figures_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(2, tmp_path, logger=TensorBoardLogger(tmp_path, name="", version="log"))
    run.fit(classification(), datamodule=Data())
    events = EventAccumulator(str(tmp_path / "log"), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"adaptation", "episode"}


def test_nothing_is_drawn_without_a_logger_or_in_the_sanity_check(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(EpisodeFigure, "figure", lambda *args: drawn.append(args))
    trainer(1, tmp_path).fit(classification(), datamodule=Data())
    assert not drawn
    assert not list(tmp_path.rglob("*.png"))
    run = trainer(
        1, tmp_path, logger=CSVLogger(tmp_path), num_sanity_val_steps=1, limit_val_batches=1, val_check_interval=2
    )
    run.fit(classification(), datamodule=Data())
    assert not drawn


def test_curve_has_a_point_for_each_step_and_ends_at_the_validation():
    module = classification("frozen", lower_steps=1, evaluation_steps=4)
    run = trainer(1)
    (found,) = run.validate(module, Given([images(3, 5)]), verbose=False)
    module.eval()
    figure = AdaptationCurve().figure(module, images(3, 5))
    *_, mean = figure.axes[0].lines
    assert list(mean.get_xdata()) == [0, 1, 2, 3, 4]
    assert float(mean.get_ydata()[-1]) == pytest.approx(found["val/accuracy"], rel=1e-5)
    assert float(mean.get_ydata()[0]) == pytest.approx(found["val/accuracy_before"], rel=1e-5)
    assert len(figure.axes[0].lines) == 4
    assert figure.axes[0].get_ylabel() == "accuracy on queries"


def test_episode_shows_support_queries_and_errors():
    module = classification("transductive", evaluation_steps=3)
    module.configure_model()
    batch = images(2, 5)
    (found,) = trainer(1).predict(module, Given([batch]))
    figure = EpisodeFigure(queries=2).figure(module, batch)
    (axes,) = figure.axes
    shown = list(zip(axes.images, axes.texts, strict=True))
    assert len(shown) == 3 * WAYS
    predicted = found["predicted"][found["episode"] == 0].view(WAYS, -1)
    for label in range(WAYS):
        (_, support), *queries = row = shown[3 * label : 3 * label + 3]
        assert [image.get_extent()[::2] for image, _ in row] == [[j, -label * 1.25 / 1.15] for j in range(3)]
        assert support.get_text() == str(label)
        for i, (_, text) in enumerate(queries):
            right = int(predicted[label, i]) == label
            assert text.get_text() == f"{int(predicted[label, i])}" + ("" if right else " ✗")
            assert text.get_color() == ("black" if right else "#c1272d")
    with pytest.raises(BilevelError, match=r"EpisodeFigure.queries"):
        EpisodeFigure(queries=0)


def test_regression_is_drawn_before_and_after():
    module = regression(evaluation_steps=3)
    module.configure_model()
    figure = RegressionFigure().figure(module, curves(1))
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["queries", "before", "after 3 steps"]
    x = figure.axes[0].lines[0].get_xdata()
    assert list(x) == sorted(x)


def test_a_callback_of_the_user_replaces_that_of_the_task(tmp_path):
    mine = EpisodeFigure(queries=1)
    run = trainer(2, tmp_path, callbacks=[mine], logger=CSVLogger(tmp_path))
    run.fit(classification(), datamodule=Data())
    assert [c for c in run.callbacks if isinstance(c, EpisodeFigure)] == [mine]
    assert len([c for c in run.callbacks if isinstance(c, FewShotReport)]) == 1
