import math

import pytest
import torch
from loops import trainer

from bilevel_lightning import AIDCG, RHG, BilevelError, GradientDescent, Nesterov, hypergradient
from bilevel_lightning.datamodules import SampleIndices, SyntheticLinear
from bilevel_lightning.linear_solvers import ConjugateGradient
from bilevel_lightning.tasks import PenaltySelection, QuadraticSum


def samples(n=15, d=4, classes=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, d, dtype=torch.float64, generator=generator)
    if classes is None:
        return inputs, torch.randn(n, dtype=torch.float64, generator=generator)
    return inputs, torch.arange(n) % classes


def moved(task, seed=3):
    """The task in float64 at a random x and y."""
    generator = torch.Generator().manual_seed(seed)
    for p in task.double().parameters():
        p.data.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator))
    return task


# Losses against formulas by hand.


@pytest.mark.parametrize("penalty", ["per_feature", "per_class", "single"])
@pytest.mark.parametrize("loss", ["logistic", "multinomial", "squared"])
def test_losses_are_the_formulas(loss, penalty):
    outputs = 3 if loss == "multinomial" else 1
    classes = {"logistic": 2, "multinomial": 3, "squared": None}[loss]
    task = moved(PenaltySelection(4, loss, outputs, penalty))
    inputs, labels = batch = samples(classes=classes)
    x, y = task.upper["log_penalty"].tolist(), task.lower.weight.tolist()
    total = 0.0
    for a, b in zip(inputs.tolist(), labels.tolist(), strict=True):
        s = [sum(a[i] * y[i][j] for i in range(4)) for j in range(outputs)]
        if loss == "logistic":
            total += math.log(1 + math.exp(s[0])) - b * s[0]
        elif loss == "multinomial":
            total += math.log(sum(math.exp(v) for v in s)) - s[b]
        else:
            total += (s[0] - b) ** 2 / 2
    total /= len(labels)
    at = {"per_feature": lambda i, j: x[i][0], "per_class": lambda i, j: x[0][j], "single": lambda i, j: x[0][0]}
    pairs = [(i, j) for i in range(4) for j in range(outputs)]
    penalised = total + sum(math.exp(at[penalty](i, j)) * y[i][j] ** 2 for i, j in pairs) / 2
    with torch.no_grad():
        assert float(task.upper_loss(batch)) == pytest.approx(total, rel=1e-12)
        assert float(task.lower_loss(batch)) == pytest.approx(penalised, rel=1e-12)


def test_the_model_starts_at_zero_and_x_where_it_is_told():
    task = PenaltySelection(4, initial=-2.5)
    assert torch.equal(task.lower.weight, torch.zeros(4, 1))
    assert torch.equal(task.upper["log_penalty"], torch.full((4, 1), -2.5))


# Hypergradients.


def ridge_hypergradient(x, lower, upper):
    """y*(x) = H^{-1} A'b / n with H = A'A / n + diag(e^x); the hypergradient is -e^x y* v with H v = f_y."""
    (a, b), (c, e) = lower, upper
    hessian = a.T @ a / len(b) + torch.diag(x.exp())
    y = torch.linalg.solve(hessian, a.T @ b / len(b))
    v = torch.linalg.solve(hessian, c.T @ (c @ y - e) / len(e))
    return y, -x.exp() * y * v


@pytest.mark.parametrize("method", ["AIDCG", "RHG"])
def test_ridge_hypergradient_is_the_closed_form(method):
    lower, upper = samples(30, 5), samples(20, 5, seed=1)
    task = moved(PenaltySelection(5, "squared"))
    x = task.upper["log_penalty"].detach().flatten()
    y, expected = ridge_hypergradient(x, lower, upper)
    extra = {"linear_solver": ConjugateGradient(steps=20, tol=1e-14)} if method == "AIDCG" else {}
    found = hypergradient(
        task,
        batch={"lower": lower, "upper": upper},
        method=method,
        dynamics=GradientDescent(0.2),
        lower_steps=600,
        **extra,
    )
    torch.testing.assert_close(found["log_penalty"].flatten(), expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(task.lower_solution(lower).flatten(), y, rtol=0, atol=1e-8)


def newton(task, batch):
    """y*(x) to the last digit, from zero."""
    shape = task.lower.weight.shape

    def g(y):
        return torch.func.functional_call(Lower(task), {"task.lower.weight": y.view(shape)}, (batch,))

    y = torch.zeros(shape.numel(), dtype=torch.float64)
    for _ in range(15):
        y = y - torch.linalg.solve(torch.func.hessian(g)(y), torch.func.grad(g)(y))
    return y.view(shape)


class Lower(torch.nn.Module):
    def __init__(self, task):
        super().__init__()
        self.task = task

    def forward(self, batch):
        return self.task.upper_loss(batch) + ridge(self.task.upper["log_penalty"].detach(), self.task.lower.weight)


def ridge(x, y):
    return 0.5 * (x.exp() * y.square()).sum()


@pytest.mark.parametrize("penalty", ["per_feature", "per_class", "single"])
@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_hypergradient_is_the_finite_difference(classes, penalty):
    loss, outputs = ("logistic", 1) if classes == 2 else ("multinomial", 3)
    task = moved(PenaltySelection(4, loss, outputs, penalty))
    lower, upper = samples(18, 4, classes), samples(18, 4, classes, seed=1)
    found = hypergradient(
        task,
        y={"weight": newton(task, lower)},
        batch={"lower": lower, "upper": upper},
        method="AIDCG",
        lower_steps=0,
        linear_solver=ConjugateGradient(steps=40, tol=1e-14),
    )["log_penalty"]
    x = task.upper["log_penalty"].data
    torch.testing.assert_close(task.lower_solution(lower), newton(task, lower), rtol=0, atol=1e-7)
    for place in [divmod(i, x.shape[1]) for i in range(x.numel())]:
        values = []
        for shift in (1e-4, -1e-4):
            x[place] += shift
            task.lower.weight.data.copy_(newton(task, lower))
            values.append(float(task.upper_loss(upper).detach()))
            x[place] -= shift
        assert float(found[place]) == pytest.approx((values[0] - values[1]) / 2e-4, abs=1e-8)
    assert found.abs().max() > 1e-3


def test_the_notebook_of_hypertorch_starts_where_ours_does():
    """It prints .6240899 for the lower loss after 100 steps, and .5744 for the upper one, all penalties being 1."""
    data = SyntheticLinear()
    data.setup()
    task = PenaltySelection(20)
    task.lower.weight.data.copy_(task.lower_solution(data.train))
    with torch.no_grad():
        assert float(task.lower_loss(data.train)) == pytest.approx(0.6240899, abs=3e-7)
        assert float(task.upper_loss(data.val)) == pytest.approx(0.5744, abs=5e-5)


def test_training_lowers_the_validation_loss_of_a_fitted_model():
    data = SyntheticLinear(samples=200, features=10, epoch_length=40)
    task = PenaltySelection(10, report_solution=True)
    module = AIDCG(
        task=task,
        upper_optimizer=lambda params: torch.optim.Adam(params, lr=0.1),
        dynamics=Nesterov(lr=0.1),
        lower_steps=30,
    )
    run = trainer(40)
    run.fit(module, datamodule=data)
    end = {name: float(v) for name, v in run.callback_metrics.items()}
    fresh = PenaltySelection(10, report_solution=True)
    with torch.no_grad():
        before = float(fresh.metrics({"lower": data.train, "upper": data.val})["value"])
    assert end["val/value"] < 0.5 * before
    assert end["val/lower_distance"] < 0.1 * float(task.lower.weight.detach().norm())
    assert end["val/accuracy"] > 0.9
    tested = run.test(module, datamodule=data, verbose=False)[0]
    assert tested["test/accuracy"] > 0.85
    (predicted,) = run.predict(module, datamodule=data)
    assert (predicted["predicted"] == predicted["label"]).float().mean() == pytest.approx(tested["test/accuracy"])


# The quadratic.


@pytest.fixture
def quadratic():
    return QuadraticSum(60, 50, 5, 3, seed=2).double()


def whole(task):
    return (torch.arange(60),), (torch.arange(50),)


def test_losses_are_means_of_the_samples_quadratics(quadratic):
    x, y = quadratic.upper["x"], quadratic.lower["y"]
    with torch.no_grad():
        for level, loss in (("lower", quadratic.lower_loss), ("upper", quadratic.upper_loss)):
            rows_y, rows_x = getattr(quadratic, f"{level}_y"), getattr(quadratic, f"{level}_x")
            each = []
            for (s, w, a), (t, u, b) in zip(rows_y, rows_x, strict=True):
                quadratics = 0.5 * y @ s.outer(s) @ y + 0.5 * x @ t.outer(t) @ x + x @ u.outer(w) @ y
                each.append(quadratics + a @ y + b @ x)
            each = torch.stack(each)
            for index in (torch.arange(len(each)), torch.tensor([3, 1, 3]), torch.zeros(len(each), dtype=torch.long)):
                torch.testing.assert_close(loss((index,)), each[index].mean())


def test_spectra_are_those_asked_for():
    g, f = QuadraticSum(200, 150, 6, 4, mu=0.2, smoothness=3.0, cross=0.3, seed=1).double().sums()
    for mean in (g, f):
        for matrix, d in ((mean.A, 6), (mean.B, 4)):
            expected = torch.logspace(math.log10(0.2), math.log10(3.0), d, dtype=torch.float64)
            torch.testing.assert_close(torch.linalg.eigvalsh(matrix), expected, rtol=1e-5, atol=0)
        singular = torch.linalg.svdvals(mean.C).flip(0)
        expected = torch.logspace(math.log10(0.2), math.log10(0.3), 4, dtype=torch.float64)
        torch.testing.assert_close(singular, expected, rtol=1e-5, atol=0)


def test_the_closed_form_is_what_autograd_and_brute_force_give(quadratic):
    lower, upper = whole(quadratic)
    x = quadratic.upper["x"].detach().clone()

    def solved(x):
        """y*(x) by one Newton step from zero, with autograd's derivatives of the sum itself."""

        def g(y):
            return torch.func.functional_call(quadratic, {"upper.x": x, "lower.y": y}, ("lower",))

        zero = torch.zeros(5, dtype=torch.float64)
        return -torch.linalg.solve(torch.func.hessian(g)(zero), torch.func.grad(g)(zero))

    quadratic.forward = lambda level: quadratic.lower_loss(lower) if level == "lower" else quadratic.upper_loss(upper)

    def objective(x):
        return torch.func.functional_call(quadratic, {"upper.x": x, "lower.y": solved(x)}, ("upper",))

    torch.testing.assert_close(quadratic.lower_solution(x), solved(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(quadratic.value(x), objective(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(quadratic.gradient(x), torch.func.grad(objective)(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(quadratic.hessian(), torch.func.hessian(objective)(x), rtol=1e-9, atol=1e-11)
    best = quadratic.solution()
    torch.testing.assert_close(
        torch.func.grad(objective)(best), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10
    )
    assert quadratic.value(x) > quadratic.value(best)
    found = quadratic.metrics(())
    assert float(found["value_gap"]) == pytest.approx(float((objective(x) - objective(best)).detach()), rel=1e-8)
    assert float(found["gradient_squared"]) == pytest.approx(
        float(torch.func.grad(objective)(x).square().sum()), rel=1e-8
    )
    distance = (quadratic.lower["y"] - solved(x)).detach().square().sum()
    assert float(found["lower_distance"]) == pytest.approx(float(distance), rel=1e-8)


@pytest.mark.parametrize("method", ["AIDCG", "RHG"])
def test_hypergradients_are_the_closed_form(quadratic, method):
    lower, upper = whole(quadratic)
    found = hypergradient(
        quadratic, batch={"lower": lower, "upper": upper}, method=method, dynamics=GradientDescent(0.9), lower_steps=400
    )
    expected = quadratic.gradient(quadratic.upper["x"].detach())
    torch.testing.assert_close(found["x"], expected, rtol=0, atol=1e-10)


def test_training_reaches_the_solution():
    task = QuadraticSum(80, 60, 5, 3)
    module = AIDCG(
        task=task,
        upper_optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
        dynamics=GradientDescent(0.9),
        lower_steps=10,
    )
    run = trainer(90, precision="64-true")
    run.fit(module, datamodule=SampleIndices(80, 60, epoch_length=90))
    end = {name: float(v) for name, v in run.callback_metrics.items()}
    assert end["val/value_gap"] < 1e-6
    assert end["val/gradient_squared"] < 1e-6
    assert end["val/lower_distance"] < 1e-6
    torch.testing.assert_close(task.upper["x"].detach(), task.solution(), rtol=0, atol=1e-2)


# Wrong settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 0}, "features must be a positive"),
        ({"features": 4, "outputs": 2}, "outputs must be 1 for logistic"),
        ({"features": 4, "loss": "multinomial"}, "outputs must be 1 for logistic and the number of classes"),
        ({"features": 4, "loss": "hinge"}, "loss must be logistic, multinomial or squared"),
        ({"features": 4, "penalty": "per_word"}, "penalty must be one of per_feature"),
    ],
)
def test_impossible_penalties(settings, message):
    with pytest.raises(BilevelError, match=message):
        PenaltySelection(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": 0.0}, "mu must be a positive"),
        ({"cross": -1.0}, "cross must be a positive"),
        ({"mu": 2.0}, "smoothness=1.0 is less than mu"),
        ({"upper_samples": 4}, "must be at least the dimensions"),
        ({"cross": 3.0}, "Hessian of F has the eigenvalue -.*lower cross"),
    ],
)
def test_impossible_quadratics(settings, message):
    with pytest.raises(BilevelError, match=message):
        QuadraticSum(**{"lower_samples": 50, "upper_samples": 50, "lower_dim": 6, "upper_dim": 4, **settings})


@pytest.mark.parametrize(
    ("task", "regression", "message"),
    [
        (PenaltySelection(7), False, "have 6 features: set task.features"),
        (PenaltySelection(6, "multinomial", 3), False, "2 classes, and the task has loss multinomial and 3 outputs"),
        (PenaltySelection(6, "squared"), False, "set data.regression to true"),
        (PenaltySelection(6), True, "set data.regression to false"),
    ],
)
def test_data_that_do_not_fit(task, regression, message):
    data = SyntheticLinear(samples=20, features=6, test_samples=5, regression=regression)
    with pytest.raises(BilevelError, match=message):
        trainer(1).fit(RHG(task=task), datamodule=data)


def test_other_numbers_of_samples():
    with pytest.raises(BilevelError, match="has 50 lower and 40 upper samples, and the data 50 and 41"):
        trainer(1).fit(RHG(task=QuadraticSum(50, 40, 5, 3)), datamodule=SampleIndices(50, 41))
