import csv

import pytest
import torch
from loops import trainer
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy

from bilevel_lightning import TRHG, GradientDescent, Momentum
from bilevel_lightning.callbacks import ReweightingReport, SourceWeightCurve, WeightFigure
from bilevel_lightning.callbacks.reweighting import trained_equally
from bilevel_lightning.datamodules import DigitsReweighting
from bilevel_lightning.datamodules.iterations import Whole
from bilevel_lightning.models import ConvNet, LinearNet, LossWeights, SampleWeights, SourceWeights
from bilevel_lightning.tasks import Reweighting

WEIGHTS = {"loss": LossWeights, "sample": lambda: SampleWeights(1000), "source": lambda: SourceWeights(10)}


def module_of(kind):
    torch.manual_seed(0)
    return TRHG(
        task=Reweighting(LinearNet((1, 8, 8)), WEIGHTS[kind](), normalize=True),
        upper_optimizer=lambda params: torch.optim.Adam(params, lr=0.03),
        dynamics=GradientDescent(0.5),
        lower_steps=2,
        truncation=1,
    )


@pytest.fixture(scope="module", params=WEIGHTS)
def run(request, tmp_path_factory):
    """A short run on digits, a long-tailed set where sources are weighed, that logs everything."""
    folder = tmp_path_factory.mktemp("run")
    module = module_of(request.param)
    loggers = [TensorBoardLogger(folder, name="", version=""), CSVLogger(folder, name="", version="csv")]
    kind = {"imbalance_factor": 20} if request.param == "source" else {"noise_rate": 0.4}
    loop = trainer(30, folder, logger=loggers)
    loop.fit(module, datamodule=DigitsReweighting(epoch_length=10, **kind))
    return request.param, folder, module, loop


def own(loop, kind):
    (callback,) = [c for c in loop.callbacks if isinstance(c, kind)]
    return callback


def test_pictures_and_scalars(run):
    kind, folder, _, _ = run
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    name, width = ("source_weights", 600) if kind == "source" else ("weights", 1080)
    assert found.Tags()["images"] == [name]
    assert len(found.Images(name)) == 3
    assert [file.name for file in folder.glob("*.png")] == [f"{name}.png"]
    with Image.open(folder / f"{name}.png") as picture:
        assert picture.width == width
    names = ["accuracy", "balanced_accuracy", "class_accuracy_0", "class_accuracy_9"]
    names += [f"source_weight_{s}" for s in range(10)] if kind == "source" else ["auroc", "weight_clean"]
    for name in names:
        assert len(found.Scalars(f"val/{name}")) == 3


def test_what_the_figure_draws(run):
    kind, _, module, loop = run
    axes = WeightFigure().figures(loop, module)["weights"].axes
    part = tuple(t[:1000] for t in loop.datamodule.train)
    weights = module.task.eval().weigh(part).detach()
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes[1].patches}
    assert list(bars) == list(range(10))
    for c, height in bars.items():
        assert height == pytest.approx(float(weights[part[3] == c].mean()), rel=1e-5)
    if kind == "loss":
        (line,) = axes[0].lines
        losses = module.task.losses(*part[:2]).detach()
        assert line.get_xdata()[-1] == pytest.approx(float(losses.max()))
        middle = torch.tensor(line.get_xdata())
        assert torch.allclose(torch.tensor(line.get_ydata()), module.task.upper(middle).detach())
        counts = [bar.get_height() for bar in axes[2].patches]
        assert [sum(counts[:40]), sum(counts[40:])] == [600, 400]  # clean and corrupted
    else:
        counts = [bar.get_height() for bar in axes[0].patches]
        assert [sum(counts[:40]), sum(counts[40:])] == ([600, 400] if kind == "sample" else [len(part[3]), 0])


def test_weights_of_sources_over_the_iterations(run):
    kind, _, module, loop = run
    if kind != "source":
        assert not [c for c in loop.callbacks if isinstance(c, SourceWeightCurve)]
        return
    callback = own(loop, SourceWeightCurve)
    (axes,) = callback.figures(loop, module)["source_weights"].axes
    assert [line.get_label() for line in axes.lines] == [str(s) for s in range(10)]
    last = torch.stack([torch.tensor(line.get_ydata()) for line in axes.lines])[:, -1]
    assert torch.allclose(last.float(), module.task.upper.logits.detach().softmax(0))
    assert [step for step, _ in callback.path] == list(range(31))
    assert callback.path[0][1] == pytest.approx([0.1] * 10)
    again = SourceWeightCurve()
    again.load_state_dict(callback.state_dict())
    assert again.path == callback.path


def test_report(run, capsys):
    _, folder, module, loop = run
    report = own(loop, ReweightingReport)
    module.task.eval()
    test = loop.datamodule.test
    accuracy = float((module.task.lower(test[0]).argmax(1) == test[1]).float().mean())
    assert report.rows["reweighted (y)"]["accuracy"] == pytest.approx(accuracy)
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("report/equal_weights/accuracy")]
    assert float(rows[-1]["report/equal_weights/accuracy"]) == pytest.approx(report.rows["equal weights"]["accuracy"])
    keys = {name for name in rows[-1] if name.startswith("report/reweighted/class_accuracy")}
    assert len(keys) == 10
    report.show(loop)
    printed = capsys.readouterr().out
    for name in ("reweighted (y)", "equal weights, meta set too", "balanced accuracy %"):
        assert name in printed


@pytest.mark.parametrize("meta", [False, True])
def test_controls_by_hand(run, meta):
    """Torch's SGD with momentum on the same minibatches."""
    _, _, module, loop = run
    report, stream, data = own(loop, ReweightingReport), loop.train_dataloader, loop.datamodule
    n, m = len(data.train[1]), len(data.meta[1])
    torch.manual_seed(1)
    model, start = LinearNet((1, 8, 8)), LinearNet((1, 8, 8))
    model.load_state_dict(start.state_dict())
    share = m / (n + m) if meta else 0.0
    found = trained_equally(module.task, start, Momentum(0.2), stream.batch, range(4), 2, share)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for k in range(4):
        batch = stream.batch(k)
        for images, labels, _, _ in batch["lower"]:
            loss = cross_entropy(model(images), labels)
            if meta:
                loss = (n * loss + m * cross_entropy(model(batch["upper"][0]), batch["upper"][1])) / (n + m)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for p, q in zip(model.parameters(), found.lower.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert report.scratch is not None


@pytest.mark.parametrize(("first", "expected"), [(None, [0, 1, 2, 3, 4, 5]), (lambda k: 0, [0, 1, 0, 1, 0, 1])])
def test_controls_count_steps_as_the_algorithm_does(run, first, expected):
    _, _, module, loop = run
    seen = []

    class Noted(GradientDescent):
        def rate(self, x, t):
            seen.append(t)
            return super().rate(x, t)

    trained_equally(
        module.task, LinearNet((1, 8, 8)), Noted(0.1), loop.train_dataloader.batch, range(3), 2, first=first
    )
    assert seen == expected


def test_controls_advance_running_statistics(run):
    _, _, module, loop = run
    net = ConvNet((1, 8, 8), width=8, blocks=1, norm="frozen")
    found = trained_equally(module.task, net, GradientDescent(0.1), loop.train_dataloader.batch, range(3))
    assert int(found.lower[1].num_batches_tracked) == 3
    assert found.lower[1].running_mean.abs().sum() > 0


def test_without_controls_or_a_data_module(tmp_path):
    report = ReweightingReport(controls=False)
    loop = trainer(1, tmp_path, callbacks=[report])
    loop.fit(module_of("source"), datamodule=DigitsReweighting(class_samples=5, lower_batch_size=20, epoch_length=1))
    assert list(report.rows) == ["reweighted (y)"]
    assert [step for step, _ in own(loop, SourceWeightCurve).path] == [0, 1]
    data = DigitsReweighting()
    data.setup()
    batch = Whole({"lower": data.train, "upper": data.meta})
    plain = trainer(2, tmp_path / "plain", logger=TensorBoardLogger(tmp_path / "plain"))
    plain.fit(module_of("loss"), batch, batch)
    assert float(plain.callback_metrics["val/accuracy"]) > 0
    assert not list((tmp_path / "plain").rglob("*.png"))
