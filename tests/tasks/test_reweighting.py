import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bilevel_lightning import DARTS, F2SA, MEHA, SAMA, TRHG, BilevelError, GradientDescent, Minibatches, Momentum, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.datamodules import DigitsCleaning, DigitsReweighting
from bilevel_lightning.hypergradients import reverse
from bilevel_lightning.models import ConvNet, LinearNet, LossWeights, MLPNet, SampleWeights, SourceWeights
from bilevel_lightning.tasks import Reweighting

WEIGHTS = {"loss": lambda: LossWeights(7), "sample": lambda: SampleWeights(24), "source": lambda: SourceWeights(10)}


def task_of(kind="loss", model=None, **settings):
    torch.manual_seed(0)
    task = Reweighting(model or MLPNet((1, 3, 3), hidden=5), WEIGHTS[kind](), **settings).double()
    with torch.no_grad():
        for p in task.upper.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return task


def part(n=24, seed=0, start=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 1, 3, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(10, (n,), generator=generator)
    return images, labels, torch.arange(start, start + n), labels


def batch_of(minibatches=1):
    lower = Minibatches(part(8, i, 8 * i) for i in range(minibatches))
    return {"lower": lower if minibatches > 1 else part(), "upper": part(15, seed=9)[:2]}


def by_hand(task, images, labels, index, source):
    """The formulas of the weights, without the modules."""
    each = cross_entropy(task.lower(images), labels, reduction="none")
    x = tree.of(task.upper)
    if isinstance(task.upper, SampleWeights):
        return 1 / (1 + torch.exp(-x["logits"][index])), each
    if isinstance(task.upper, SourceWeights):
        return (x["logits"].exp() / x["logits"].exp().sum())[source], each
    hidden = (each.detach()[:, None] * x["0.weight"][:, 0] + x["0.bias"]).clamp(min=0)
    return 1 / (1 + torch.exp(-(hidden @ x["2.weight"][0] + x["2.bias"]))), each


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_losses_are_the_formulas(kind, normalize):
    task = task_of(kind, l2=0.01, normalize=normalize)
    lower, upper = part(), part(15, seed=9)[:2]
    weights, each = by_hand(task, *lower)
    expected = (weights * each).sum() / (weights.sum() if normalize else 24)
    ridge = sum(p.square().sum() for p in task.lower.parameters())
    torch.testing.assert_close(task.lower_loss(lower), expected + 0.01 * ridge)
    torch.testing.assert_close(task.upper_loss(upper), cross_entropy(task.lower(upper[0]), upper[1]))
    torch.testing.assert_close(task.weigh(lower), weights)


def test_weights_at_the_beginning():
    assert torch.equal(SampleWeights(4)(None, torch.tensor([0, 3])), torch.tensor([0.5, 0.5]))
    assert torch.equal(SourceWeights(4)(None, None, torch.tensor([0, 3, 3])), torch.full((3,), 0.25))
    assert sum(p.numel() for p in LossWeights().parameters()) == 301
    found = LossWeights()(torch.linspace(0, 10, 50))
    assert found.shape == (50,)
    assert ((found > 0) & (found < 1)).all()


def test_normalised_weights_have_mean_one_and_may_all_be_zero():
    task = task_of("sample", normalize=True)
    half = task.lower_loss(part())
    with torch.no_grad():
        task.upper.logits.fill_(-3.0)
    torch.testing.assert_close(task.lower_loss(part()), task.upper_loss(part()[:2]))  # whatever the scale
    assert not torch.equal(half, task.lower_loss(part()))
    with torch.no_grad():
        task.upper.logits.fill_(-1e4)  # the sigmoid is 0 in any precision
    gradient = torch.autograd.grad(task.lower_loss(part()), [*task.parameters()])
    assert all(torch.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_hypergradient_is_the_finite_difference(kind, normalize):
    """Of f(x, y_3(x)), three lower steps on a minibatch each, in all entries of x; the l_i of `LossWeights` stay."""
    task, batch = task_of(kind, l2=0.01, normalize=normalize), batch_of(3)
    x, y = tree.clone(tree.of(task.upper)), tree.detach(tree.of(task.lower))

    def value(x):
        problem, z, pull_back = bind(task, batch, x)
        gradient, end = reverse(problem, GradientDescent(0.5), z, y, 3)
        return float(problem.f(z, end)), pull_back(gradient)

    gradient = value(x)[1]
    for name, entries in x.items():
        for i in range(entries.numel()):
            shift = torch.zeros_like(entries)
            shift.view(-1)[i] = 1e-5
            above, below = (value({**x, name: entries + sign * shift})[0] for sign in (1, -1))
            assert float(gradient[name].view(-1)[i]) == pytest.approx((above - below) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_derivatives_commute(kind):
    """g is a function of (x, y): g_xy v is the derivative of g_x along v. With l_i(y) in the weights it is not."""
    task, batch = task_of(kind), batch_of()
    problem, x, _ = bind(task, batch, tree.detach(tree.of(task.upper)))
    y = tree.detach(tree.of(task.lower))
    v = {name: torch.randn_like(t) for name, t in y.items()}
    _, _, cross = problem.gradient_and_products(x, y, v)
    above, below = (problem.values_and_gradients(x, tree.axpy(e, v, y))[1] for e in (1e-5, -1e-5))
    for name in x:
        torch.testing.assert_close(cross[name], (above[name] - below[name]) / 2e-5, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("algorithm", ["TRHG", "DARTS"])
def test_one_step_is_meta_weight_net(algorithm, normalize):
    """The look-ahead and its derivative by nested autograd, as the paper writes them."""
    task, batch, lr = task_of("loss", normalize=normalize), batch_of(), 0.3
    theta, w = [*task.upper.parameters()], [*task.lower.parameters()]
    weights, each = by_hand(task, *batch["lower"])
    weights = weights / weights.mean() if normalize else weights
    step = torch.autograd.grad((weights * each).mean(), w, create_graph=True)
    ahead = {name: p - lr * g for (name, p), g in zip(task.lower.named_parameters(), step, strict=True)}
    logits = torch.func.functional_call(task.lower, ahead, batch["upper"][0])
    expected = torch.autograd.grad(cross_entropy(logits, batch["upper"][1]), theta)
    problem, x, pull_back = bind(task, batch, tree.detach(tree.of(task.upper)))
    settings = {"TRHG": {"lower_steps": 1, "truncation": 1}, "DARTS": {"radius": 1e-4}}[algorithm]
    module = {"TRHG": TRHG, "DARTS": DARTS}[algorithm](dynamics=GradientDescent(lr), **settings)
    found = module.bilevel_step(problem, x, tree.detach(tree.of(task.lower)))
    close = {"rtol": 1e-9, "atol": 1e-12} if algorithm == "TRHG" else {"rtol": 1e-5, "atol": 1e-9}
    for gradient, value in zip(pull_back(found.upper_grad).values(), expected, strict=True):
        assert value.abs().max() > 1e-6
        torch.testing.assert_close(gradient, value, **close)
    for name, value in found.lower.items():
        torch.testing.assert_close(value, ahead[name].detach())


@pytest.mark.parametrize("shape", [(6, 4), (6,)])
def test_a_sequence_s_loss_is_the_mean_over_its_positions(shape):
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 11)

        def forward(self, tokens):
            return self.table(tokens)

    task = task_of("source", Language())
    tokens, targets = torch.randint(11, shape), torch.randint(11, shape)
    table = task.lower.table.weight.log_softmax(1)
    rows = [
        [-table[a, b] for a, b in zip(s, t, strict=True)]
        for s, t in zip(tokens.view(6, -1), targets.view(6, -1), strict=True)
    ]
    expected = torch.stack([torch.stack(row).mean() for row in rows])
    torch.testing.assert_close(task.losses(tokens, targets), expected)
    source = torch.tensor([0, 1, 0, 1, 1, 2])
    weights = task.upper.logits.softmax(0)[source]
    torch.testing.assert_close(task.lower_loss((tokens, targets, torch.arange(6), source)), (weights * expected).mean())
    with torch.no_grad():
        found = task.metrics({"lower": (tokens, targets, torch.arange(6), source), "upper": (tokens, targets)})
    assert float(found["accuracy"]) == pytest.approx(
        float((table.detach()[tokens].argmax(-1) == targets).double().mean())
    )
    assert ("balanced_accuracy" in found) == (shape == (6,))
    assert float(found["source_weight_2"]) == pytest.approx(float(task.upper.logits.detach().softmax(0)[2]))


def test_metrics_against_counting_by_hand():
    task, lower = task_of("loss", MLPNet((1, 3, 3), hidden=40)), part()
    images, labels = part(200, seed=3)[:2]
    labels = labels.clamp(max=8)  # class 8 is twice as frequent, class 9 absent
    clean = torch.arange(24) % 3 > 0
    with torch.no_grad():
        found = {
            k: float(v) for k, v in task.metrics({"lower": lower, "upper": (images, labels), "clean": clean}).items()
        }
        right = (task.lower(images).argmax(1) == labels).double()
        weights = by_hand(task, *lower)[0]
    each = [float(right[labels == c].mean()) for c in range(9)]
    assert found["accuracy"] == pytest.approx(float(right.mean()))
    assert [found[f"class_accuracy_{c}"] for c in range(9)] == pytest.approx(each)
    seen = 9 + bool((task.lower(images).argmax(1) == 9).any())  # a class that is guessed and absent counts as 0
    assert found["balanced_accuracy"] == pytest.approx(sum(each) / seen)
    assert found["weight_clean"] == pytest.approx(float(weights[clean].mean()))
    assert found["weight_corrupted"] == pytest.approx(float(weights[~clean].mean()))
    pairs = (weights[clean][:, None] > weights[~clean][None, :]).double().mean()
    assert found["auroc"] == pytest.approx(float(pairs))
    assert "auroc" not in task.metrics({"lower": lower, "upper": (images, labels), "clean": torch.ones(24).bool()})


def test_evaluation_in_parts_is_the_evaluation_of_all():
    task = task_of("loss", ConvNet((1, 3, 3), width=8, blocks=1)).eval()
    images, labels = part(1203)[:2]
    with torch.no_grad():
        assert task.outputs(images).shape == (1203, 10)
        torch.testing.assert_close(
            task.losses(images, labels), cross_entropy(task.lower(images), labels, reduction="none")
        )


ALGORITHMS = {
    "TRHG": lambda task: TRHG(task=task, dynamics=Momentum(0.3), lower_steps=2, truncation=1),
    "DARTS": lambda task: DARTS(task=task, dynamics=GradientDescent(1.0)),
    "SAMA": lambda task: SAMA(task=task),
    "MEHA": lambda task: MEHA(task=task),
    "F2SA": lambda task: F2SA(task=task, lower_steps=1),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_moves_both_levels(algorithm, kind):
    task, batch = task_of(kind), batch_of(3)
    module = ALGORITHMS[algorithm](task).double()
    module.configure_model()
    problem, x, pull_back = bind(task, batch, tree.detach(tree.of(task.upper)))
    y = tree.detach(tree.of(task.lower))
    step = module.bilevel_step(problem, x, y)
    lower = step.lower(problem, x) if callable(step.lower) else step.lower
    assert tree.norm(pull_back(step.upper_grad)) > 1e-8
    assert all(not torch.equal(lower[name], y[name]) for name in y)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            lambda: task_of("sample", LinearNet((1, 8, 8))),
            "SampleWeights has 24 weights but the data 40 training samples",
        ),
        *(
            (
                lambda number=number: Reweighting(LinearNet((1, 8, 8)), SourceWeights(number)),
                f"SourceWeights has {number} weights but the data 10 sources: set task.weights.sources",
            )
            for number in (9, 11)
        ),
        (lambda: task_of(model=LinearNet((1, 28, 28))), r"does not accept images of shape \(1, 8, 8\)"),
        (lambda: task_of(model=LinearNet((1, 8, 8), classes=7)), r"returns shape \(1, 7\) for one sample.*up to 9"),
    ],
)
def test_data_that_do_not_fit(task, message):
    data = DigitsReweighting(class_samples=4)
    data.setup()
    with pytest.raises(BilevelError, match=message):
        task().check_data(data)


def test_data_of_another_task():
    data = DigitsCleaning()
    data.setup()
    with pytest.raises(BilevelError, match="those of DigitsCleaning have 3 parts: use one of the"):
        task_of(model=LinearNet((1, 8, 8))).check_data(data)


def test_impossible_settings():
    with pytest.raises(BilevelError, match="Reweighting.l2 must not be negative, got -1"):
        Reweighting(LinearNet(), LossWeights(), l2=-1)
    for cls, name in ((SampleWeights, "samples"), (SourceWeights, "sources"), (LossWeights, "hidden")):
        with pytest.raises(BilevelError, match=f"{cls.__name__}.{name} must be a positive number, got 0"):
            cls(0)
