import pytest
import torch
from torch.nn.functional import cross_entropy

from bilevel_lightning import BilevelError, GradientDescent, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.datamodules import DigitsCleaning
from bilevel_lightning.hypergradients import reverse
from bilevel_lightning.models import ConvNet, LinearNet, MLPNet
from bilevel_lightning.tasks import HyperCleaning


@pytest.fixture
def data():
    data = DigitsCleaning(train_samples=40, val_samples=30)
    data.setup()
    return data


def task_of(samples=40, l2=0.0, model=None):
    torch.manual_seed(0)
    return HyperCleaning(model or LinearNet((1, 8, 8)), samples=samples, l2=l2).double()


def doubled(data):
    images, labels, index = data.train
    return {
        "lower": (images.double(), labels, index),
        "upper": (data.val[0].double(), data.val[1]),
        "clean": data.clean,
    }


def test_losses_are_the_formulas(data):
    task, batch = task_of(l2=0.01), doubled(data)
    with torch.no_grad():
        task.upper.logits.copy_(torch.linspace(-3, 3, 40))
        images, labels, index = batch["lower"]
        each = cross_entropy(task.lower(images), labels, reduction="none")
        ridge = sum(p.square().sum() for p in task.lower.parameters())
        expected = (torch.sigmoid(task.upper.logits) * each).mean() + 0.01 * ridge
        torch.testing.assert_close(task.lower_loss(batch["lower"]), expected)
        torch.testing.assert_close(
            task.upper_loss(batch["upper"]), cross_entropy(task.lower(batch["upper"][0]), batch["upper"][1])
        )
        some = index[[5, 2]]
        part = task.lower_loss((images[some], labels[some], some))
        torch.testing.assert_close(part, (torch.sigmoid(task.upper.logits[some]) * each[some]).mean() + 0.01 * ridge)


def test_the_lower_solution_depends_on_every_weight(data):
    """Each weight moves the trajectory by itself, and its entry of the hypergradient is the finite difference."""
    task, batch = task_of(), doubled(data)
    x = {"logits": torch.linspace(-1, 1, 40, dtype=torch.float64)}
    problem, _, _ = bind(task, batch, x, lambda v: v)
    y = tree.detach(tree.of(task.lower))
    gradient, end = reverse(problem, GradientDescent(0.5), x, y, 20)

    def run(i, shift):
        moved = x["logits"].clone()
        moved[i] += shift
        _, y_end = reverse(problem, GradientDescent(0.5), {"logits": moved}, y, 20)
        return problem.f({"logits": moved}, y_end), y_end

    for i in range(40):
        above, y_above = run(i, 1e-4)
        below, _ = run(i, -1e-4)
        assert not torch.equal(y_above["1.weight"], end["1.weight"])
        assert float(gradient["logits"][i]) == pytest.approx(float((above - below) / 2e-4), rel=1e-5, abs=1e-9)


def test_metrics_against_counting_by_hand(data):
    task, batch = task_of(), doubled(data)
    with torch.no_grad():
        task.upper.logits.copy_(torch.linspace(-1, 1, 40)[torch.randperm(40)])
        found = {name: float(value) for name, value in task.metrics(batch).items()}
        weights = torch.sigmoid(task.upper.logits)
        guess = task.lower(batch["upper"][0]).argmax(1)
    kept, clean = weights >= 0.5, data.clean
    precision = float((kept & clean).sum() / kept.sum())
    recall = float((kept & clean).sum() / clean.sum())
    pairs = (weights[clean][:, None] > weights[~clean][None, :]).float().mean()
    assert found["accuracy"] == pytest.approx(float((guess == batch["upper"][1]).float().mean()))
    assert found["precision"] == pytest.approx(precision)
    assert found["recall"] == pytest.approx(recall)
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["auroc"] == pytest.approx(float(pairs))
    assert found["weight_clean"] == pytest.approx(float(weights[clean].mean()))
    assert found["weight_corrupted"] == pytest.approx(float(weights[~clean].mean()))
    assert list(task.metrics({**batch, "clean": torch.ones_like(clean)})) == ["accuracy"]
    assert list(task.metrics({"lower": batch["lower"], "upper": batch["upper"]})) == ["accuracy"]


def test_a_hypergradient_step_tells_clean_from_corrupted():
    data = DigitsCleaning(train_samples=300, val_samples=300)
    data.setup()
    task, batch = task_of(300), doubled(data)
    problem, x, _ = bind(task, batch, tree.detach(tree.of(task.upper)), lambda v: v)
    gradient, _ = reverse(problem, GradientDescent(1.0), x, tree.of(task.lower), 60)
    tree.assign(task.upper, {"logits": -1000 * gradient["logits"]})
    assert float(task.metrics(batch)["auroc"]) > 0.93


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: task_of(39), "The task has 39 weights but the data 40 training samples: set task.samples"),
        (lambda: task_of(model=LinearNet((1, 28, 28))), r"does not accept images of shape \(1, 8, 8\).*image_shape"),
        (
            lambda: task_of(model=LinearNet((1, 8, 8), classes=7)),
            r"returns shape \(1, 7\) for one image instead of \(1, 10\)",
        ),
    ],
)
def test_data_that_do_not_fit(data, task, message):
    with pytest.raises(BilevelError, match=message):
        task().check_data(data)


def test_impossible_settings():
    with pytest.raises(BilevelError, match="HyperCleaning.samples must be a positive number, got 0"):
        HyperCleaning(LinearNet(), samples=0)
    with pytest.raises(BilevelError, match="HyperCleaning.l2 must not be negative, got -1"):
        HyperCleaning(LinearNet(), l2=-1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("model", [LinearNet, MLPNet, ConvNet])
def test_models_take_every_image(model, shape):
    assert model(shape)(torch.rand(3, *shape)).shape == (3, 10)


def test_models_have_the_sizes_of_the_papers():
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(MLPNet()) == 238_510
    assert count(LinearNet()) == 7_850
    linear = MLPNet(activation="none")
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(linear(x) + linear(torch.zeros_like(x)), linear(x / 2) * 2, rtol=1e-4, atol=1e-5)


def test_linear_net_without_bias_and_from_zero():
    assert [p.shape for p in LinearNet(bias=False).parameters()] == [(10, 784)]
    zero = LinearNet((1, 8, 8), init="zero")
    assert len(list(zero.parameters())) == 2
    assert all((p == 0).all() for p in zero.parameters())
    assert (LinearNet((1, 8, 8))[1].weight != 0).any()
    with pytest.raises(BilevelError, match="LinearNet.init must be torch or zero, got 'ones'"):
        LinearNet(init="ones")


def test_convnet_refuses_impossible_sizes():
    with pytest.raises(BilevelError, match="ConvNet.blocks must be between 1 and 3 for images of 8x8, got 4"):
        ConvNet((1, 8, 8), blocks=4)
    with pytest.raises(BilevelError, match="ConvNet.width must be a multiple of 8, got 12"):
        ConvNet(width=12)
