import csv
import math

import pytest
import torch
from loops import trainer
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bilevel_lightning import TRHG, Momentum
from bilevel_lightning.callbacks import CleaningReport
from bilevel_lightning.callbacks.cleaning import SuspiciousImages
from bilevel_lightning.datamodules import DigitsCleaning
from bilevel_lightning.datamodules.iterations import Whole
from bilevel_lightning.models import LinearNet
from bilevel_lightning.tasks import HyperCleaning


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on digits that logs everything."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    module = TRHG(
        task=HyperCleaning(LinearNet((1, 8, 8)), samples=600),
        upper_optimizer=lambda params: torch.optim.Adam(params, lr=0.3),
        dynamics=Momentum(0.3),
        lower_steps=60,
        truncation=30,
        warm_start=False,
    )
    loggers = [TensorBoardLogger(folder, name="", version=""), CSVLogger(folder, name="", version="csv")]
    report = CleaningReport(steps=150)
    loop = trainer(20, folder, logger=loggers, callbacks=[report])
    loop.fit(module, datamodule=DigitsCleaning(epoch_length=10))
    return folder, module, loop, report


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_scalars_of_the_event_file(run):
    found = events(run[0])
    names = found.Tags()["scalars"]
    for name in ("upper_loss", "lower_loss", "hypergradient_norm", "stationarity"):
        values = [event.value for event in found.Scalars(f"train/{name}")]
        assert len(values) == 20
        assert all(map(math.isfinite, values))
    losses = [event.value for event in found.Scalars("train/upper_loss")]
    assert losses[-1] < 0.7 * losses[0]
    for name in ("accuracy", "precision", "recall", "f1", "auroc", "weight_clean", "weight_corrupted", "upper_loss"):
        assert len(found.Scalars(f"val/{name}")) == 2
    assert found.Scalars("oracle/lower_gradients")[-1].value == 20 * 60
    assert found.Scalars("oracle/hessian_products")[-1].value == 20 * 30
    assert "report/learnt_weights" in names


def test_histograms_and_pictures_of_the_event_file(run):
    found = events(run[0])
    for name, fraction in (("clean", 300), ("corrupted", 300)):
        histograms = found.Histograms(f"weights/{name}")
        assert len(histograms) == 2
        assert histograms[-1].histogram_value.num == fraction
    means = [found.Histograms(f"weights/{name}")[-1].histogram_value.sum / 300 for name in ("clean", "corrupted")]
    assert means[0] > 0.6
    assert means[1] < 0.3
    assert len(found.Images("suspicious_images")) == 2
    assert found.Images("suspicious_images")[0].width > 500
    with Image.open(run[0] / "suspicious_images.png") as picture:
        assert picture.width > 800


def test_suspicious_images_are_those_of_the_smallest_weights(run):
    """Eight in a row, the last row shorter, each at its place with its label, weight and mark."""
    _, module, loop, _ = run
    (axes,) = SuspiciousImages(images=19).figures(loop, module)["suspicious_images"].axes
    assert len(axes.images) == 19
    images, labels, index = loop.datamodule.train
    weights = module.task.upper(None, index).detach()
    order = weights.argsort()[:19]
    assert 0 < loop.datamodule.clean[order].sum() < 19
    for place, (i, image, text) in enumerate(zip(order, axes.images, axes.texts, strict=True)):
        row, column = divmod(place, 8)
        left, right, bottom, top = image.get_extent()
        assert (left, bottom) == pytest.approx((column, -row * 1.25))
        assert right - left == pytest.approx(top - bottom)
        assert torch.equal(torch.as_tensor(image.get_array().data), images[i][0])
        clean = bool(loop.datamodule.clean[i])
        assert text.get_text() == f"{int(labels[i])}, {weights[i]:.3f}" + ("" if clean else " ✗")
        assert text.get_color() == ("black" if clean else "#c1272d")
        assert left < text.get_position()[0] < right
        assert top < text.get_position()[1] < bottom + 1.25


def test_report(run, capsys):
    folder, module, loop, report = run
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("report/learnt_weights")]
    row = {name: float(value) for name, value in rows[-1].items() if name.startswith("report/")}
    assert row["report/clean_samples_only"] > row["report/all_samples_equally"] + 0.1
    assert row["report/learnt_weights"] > row["report/all_samples_equally"] + 0.1
    assert row["report/validation_data_only"] > 0.9
    assert row["report/auroc"] > 0.95
    report.on_train_end(loop, module)
    printed = capsys.readouterr().out
    for name in ("y at the end of the run", "all samples equally", "clean samples only (oracle)", "weight corrupted"):
        assert name in printed


def test_retraining_is_a_weighted_mean_from_the_first_weights(run):
    """One step of plain gradient descent, by hand; the second half of the weights is zero."""
    _, _, loop, report = run
    images, labels, _ = loop.datamodule.train
    one = CleaningReport(steps=1, optimizer=lambda params: torch.optim.SGD(params, lr=0.7))
    one.scratch = report.scratch
    weights = torch.cat([torch.full((300,), 0.25), torch.zeros(300)])
    accuracy = one.retrain("digits", images, labels, weights, loop.datamodule.test)
    layer = report.scratch[1]
    w, b = layer.weight.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    logits = images[:300].flatten(1) @ w.T + b
    torch.nn.functional.cross_entropy(logits, labels[:300]).backward()
    w, b = w - 0.7 * w.grad, b - 0.7 * b.grad
    guess = (loop.datamodule.test[0].flatten(1) @ w.T + b).argmax(1)
    assert float(accuracy) == pytest.approx(float((guess == loop.datamodule.test[1]).float().mean()))


@pytest.mark.parametrize(("terminal", "bar"), [(True, True), (True, False), (False, True)])
def test_retraining_shows_how_far_it_is_where_the_trainer_does(monkeypatch, capsys, terminal, bar):
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    report = CleaningReport(steps=2)
    report.setup(trainer(1, enable_progress_bar=bar), None, "test")
    capsys.readouterr()
    assert list(report.counted(3, "all samples")) == [0, 1, 2]
    printed = capsys.readouterr().out
    assert ("Training on all samples" in printed) == (terminal and bar)
    assert (terminal and bar) or not printed


def test_a_callback_of_the_trainer_replaces_the_task_s_own(run):
    _, _, loop, report = run
    assert [c for c in loop.callbacks if isinstance(c, CleaningReport)] == [report]


def test_without_a_data_module_nothing_is_shown(tmp_path):
    """The task with plain loaders: it trains, and its figures and report keep out of the way."""
    data = DigitsCleaning(train_samples=40, val_samples=30)
    data.setup()
    module = TRHG(task=HyperCleaning(LinearNet((1, 8, 8)), samples=40))
    batch = Whole({"lower": data.train, "upper": data.val})
    loop = trainer(2, tmp_path, logger=TensorBoardLogger(tmp_path))
    loop.fit(module, batch, batch)
    assert float(loop.callback_metrics["val/accuracy"]) > 0
    assert not list(tmp_path.rglob("*.png"))
