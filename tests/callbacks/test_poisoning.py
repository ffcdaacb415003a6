import csv
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from loops import trainer
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy

from bilevel_lightning import AIDFP, TRHG, BilevelError, GradientDescent
from bilevel_lightning.callbacks import PoisonedImages, PoisoningReport
from bilevel_lightning.datamodules import DigitsPoisoning
from bilevel_lightning.datamodules.iterations import Whole
from bilevel_lightning.flow import GradientFlow
from bilevel_lightning.linear_solvers import FixedPointIteration
from bilevel_lightning.models import LinearNet
from bilevel_lightning.tasks import Poisoning

LBFGS = partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", tolerance_change=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short attack on digits that logs everything."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    module = AIDFP(
        task=Poisoning(LinearNet((1, 8, 8), bias=False, init="zero"), 202, (1, 8, 8), radius=2.0),
        upper_optimizer=lambda params: torch.optim.SGD(params, lr=1e4),
        dynamics=GradientDescent(0.5),
        lower_steps=100,
        linear_solver=FixedPointIteration(100, lr=0.5),
        warm_start=False,
    )
    loggers = [TensorBoardLogger(folder, name="", version=""), CSVLogger(folder, name="", version="csv")]
    report = PoisoningReport(steps=200, optimizer=lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.5))
    loop = trainer(10, folder, logger=loggers, callbacks=[report])
    loop.fit(module, datamodule=DigitsPoisoning(epoch_length=5))
    return folder, module, loop, report


def row_of_report(folder):
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("report/poisoned_images/test_accuracy")]
    return {name[7:]: float(value) for name, value in rows[-1].items() if name.startswith("report/")}


def test_scalars_and_pictures_of_the_event_file(run):
    found = EventAccumulator(str(run[0]), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    losses = [event.value for event in found.Scalars("train/upper_loss")]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.1  # minus the cross-entropy of validation images
    for name in ("accuracy", "cross_entropy", "norm", "largest_norm", "moved", "upper_loss"):
        assert len(found.Scalars(f"val/{name}")) == 2
    last = {name: found.Scalars(f"val/{name}")[-1].value for name in ("largest_norm", "moved", "accuracy")}
    assert last["largest_norm"] == pytest.approx(2.0, abs=1e-5)
    assert last["moved"] > 0.9
    assert found.Scalars("val/accuracy")[0].value > last["accuracy"]
    assert len(found.Images("poisoned_images")) == 2
    with Image.open(run[0] / "poisoned_images.png") as picture:
        assert picture.width > 800
        colours = np.asarray(picture.convert("RGB")).astype(int)
    assert (colours[..., 0] - colours[..., 2] > 100).any()  # the difference has red and blue, the images are grey
    assert (colours[..., 2] - colours[..., 0] > 100).any()


def test_the_attack_beats_random_noise(run):
    found = row_of_report(run[0])
    clean, noise, poisoned = (
        found[f"{name}/test_accuracy"] for name in ("clean_images", "random_noise", "poisoned_images")
    )
    assert clean > 0.9
    assert noise > clean - 0.04
    assert poisoned < noise - 0.05
    assert found["poisoned_images/val_accuracy"] < found["random_noise/val_accuracy"] - 0.1
    assert found["clean_images/norm"] == 0
    assert found["random_noise/norm"] > 1.5
    assert found["poisoned_images/norm"] > 1.0


def test_perturbations_are_feasible(run):
    task = run[1].task
    changed = run[2].datamodule.poisoned[0] + task.upper.delta.detach()
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert float(task.upper.norms().max()) <= 2 + 1e-5


def test_report_is_printed(run, capsys):
    _, module, loop, _ = run
    short = PoisoningReport(steps=1, controls=False)
    short.scratch = deepcopy(module.task.lower)
    short.on_train_end(loop, module)
    printed = capsys.readouterr().out
    for name in ("y at the end of the run", "poisoned images", "mean norm", "validation", "steps: 1"):
        assert name in printed
    assert "random noise" not in printed


def test_retraining_is_the_lower_loss_from_the_first_weights(run):
    """Two steps with momentum, by hand; the run's y is left alone."""
    _, module, loop, report = run
    before = deepcopy(module.task.lower.state_dict())
    images, labels, _ = loop.datamodule.train
    two = PoisoningReport(steps=2)
    two.scratch = report.scratch
    assert (report.scratch[1].weight == 0).all()
    weight, speed = torch.zeros(10, 64), 0
    for _ in range(2):
        weight.requires_grad_()
        loss = cross_entropy(images.flatten(1) @ weight.T, labels) + 0.1 * weight.square().mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        speed = 0.5 * speed + gradient
        weight = (weight - 0.1 * speed).detach()
    model = two.retrain("digits", module.task, images, labels)
    torch.testing.assert_close(model[1].weight.detach(), weight)
    guess = (loop.datamodule.test[0].flatten(1) @ weight.T).argmax(1)
    expected = float((guess == loop.datamodule.test[1]).float().mean())
    assert two.accuracies(model, [loop.datamodule.test]) == [pytest.approx(expected)]
    assert all(torch.equal(value, before[name]) for name, value in module.task.lower.state_dict().items())


def test_retraining_by_lbfgs_reaches_the_minimum(run):
    """The gradient of the lower loss is zero there, and any other training's loss is larger."""
    _, module, loop, report = run
    images, labels, _ = loop.datamodule.train
    losses = []
    for steps, optimizer in ((8, LBFGS), (300, lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9))):
        trainings = PoisoningReport(steps=steps, optimizer=optimizer)
        trainings.scratch = report.scratch
        model = trainings.retrain("digits", module.task, images, labels)
        loss = module.task.training_loss(model, images, labels)
        losses.append(float(loss.detach()))
        if optimizer is LBFGS:
            (gradient,) = torch.autograd.grad(loss, [*model.parameters()])
            assert float(gradient.abs().max()) < 1e-4
    assert losses[0] < losses[1]


def test_retraining_by_the_flow_ends_where_many_small_steps_end(run):
    """Both far from the minimum: a model that is trained on ends elsewhere."""
    _, module, loop, report = run
    images, labels, _ = loop.datamodule.train

    def trained(steps, optimizer):
        training = PoisoningReport(steps=steps, optimizer=optimizer)
        training.scratch = report.scratch
        return training.retrain("digits", module.task, images, labels)[1].weight.detach()

    small = trained(400, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.5))  # time 40
    further = trained(800, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.5))
    flow = trained(1, lambda params: GradientFlow(params, lr=40.0))
    assert (flow - small).norm() < 0.02 * small.norm()
    assert (further - small).norm() > 0.2 * small.norm()


def test_retraining_in_minibatches(run):
    _, module, loop, report = run
    images, labels, _ = loop.datamodule.train
    small = PoisoningReport(steps=1, batch_size=7)
    small.scratch = report.scratch
    chosen = torch.randint(len(labels), (7,), generator=torch.Generator().manual_seed(0))
    whole = PoisoningReport(steps=1)
    whole.scratch = report.scratch
    expected = whole.retrain("digits", module.task, images[chosen], labels[chosen])
    torch.testing.assert_close(small.retrain("digits", module.task, images, labels)[1].weight, expected[1].weight)


def test_the_pictures_show_all_classes_in_turn():
    norms = torch.tensor([0.1, 0.9, 0.8, 0.7, 0.2, 0.0])
    labels = torch.tensor([2, 1, 1, 1, 0, 0])
    assert PoisonedImages(5).chosen(norms, labels).tolist() == [1, 4, 0, 2, 5]
    assert PoisonedImages(9).chosen(norms, labels).tolist() == [1, 4, 0, 2, 5, 3]


def test_callbacks_of_the_trainer_replace_the_task_s_own(run):
    _, _, loop, report = run
    assert [c for c in loop.callbacks if isinstance(c, PoisoningReport)] == [report]
    assert [c for c in loop.callbacks if isinstance(c, PoisonedImages)]


def test_without_a_data_module_nothing_is_shown(tmp_path):
    """The task with plain loaders trains if it was given the images, and its figures keep out of the way."""
    data = DigitsPoisoning(samples=120)
    data.setup()
    task = Poisoning(LinearNet((1, 8, 8)), 18, (1, 8, 8))
    task.check_data(data)
    batch = Whole({"lower": data.train, "upper": data.val})
    loop = trainer(2, tmp_path, logger=TensorBoardLogger(tmp_path))
    loop.fit(TRHG(task=task), batch, batch)
    assert float(loop.callback_metrics["val/accuracy"]) > 0
    assert not list(tmp_path.rglob("*.png"))


def test_impossible_settings():
    with pytest.raises(BilevelError, match="PoisonedImages.images must be a positive number, got 0"):
        PoisonedImages(0)
    with pytest.raises(BilevelError, match="PoisoningReport.steps must be a positive number, got 0"):
        PoisoningReport(steps=0)
    with pytest.raises(BilevelError, match="PoisoningReport.batch_size must be a positive number, got 0"):
        PoisoningReport(batch_size=0)
