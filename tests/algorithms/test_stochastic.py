# ruff: noqa: N803, N806 (matrices and numbers of steps as in the papers)
"""Stochastic methods on finite sums of quadratics: identities, expectations, costs, and convergence."""

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml
from loops import trainer
from problems import Vector, central_differences, relative
from pytorch_lightning import Callback

from bilevel_lightning import (
    ALSET,
    BSA,
    BSGM,
    FSLA,
    MASOBA,
    MRBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    VRBO,
    Adam,
    AmIGO,
    BilevelError,
    BilevelTask,
    FixedPoint,
    GradientDescent,
    Minibatches,
    StocBiO,
    hypergradient,
    tree,
)
from bilevel_lightning.binding import bind
from bilevel_lightning.callbacks import SampleBudget
from bilevel_lightning.cli.arguments import config_path
from bilevel_lightning.datamodules import TwoLevelData
from bilevel_lightning.estimators import SAGA, SARAH, STORM, MovingAverage, Plain
from bilevel_lightning.hypergradients.implicit import LinearSystemWarning
from bilevel_lightning.module import ORACLES
from bilevel_lightning.schedules import InverseTime, Linear, Power

N, M, DIM, UPPER = 40, 30, 5, 3
ALL = {"lower": (torch.arange(N),), "upper": (torch.arange(M),)}


class Sums(BilevelTask):
    """g = mean_i (y'A_i y / 2 - y'B_i x), f = mean_j |y - c_j|^2 / 2 + rho |x|^2 / 2; a batch is a tuple of numbers."""

    def __init__(self, noise=0.3, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        q, _ = torch.linalg.qr(draw(DIM, DIM))
        base = q @ torch.diag(torch.linspace(1, 2, DIM, dtype=torch.float64)) @ q.T
        wiggle = noise * draw(N, DIM, DIM)
        self.A = base + wiggle @ wiggle.mT / DIM
        self.B, self.c, self.rho = draw(DIM, UPPER) + noise * draw(N, DIM, UPPER), draw(DIM) + noise * draw(M, DIM), 0.5
        self.upper, self.lower = Vector(x=draw(UPPER)), Vector(y=draw(DIM))

    def lower_loss(self, batch):
        y, (i,) = self.lower.y, batch
        return 0.5 * y @ self.A[i].mean(0) @ y - y @ self.B[i].mean(0) @ self.upper.x

    def upper_loss(self, batch):
        (j,) = batch
        return 0.5 * (self.lower.y - self.c[j]).square().sum(1).mean() + 0.5 * self.rho * self.upper.x.square().sum()

    def hypergradient(self, x):
        inverse, B = torch.linalg.inv(self.A.mean(0)), self.B.mean(0)
        return self.rho * x + B.T @ inverse @ (inverse @ B @ x - self.c.mean(0))

    def minimiser(self):
        zero = torch.zeros(UPPER, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(self.hypergradient, zero)
        return torch.linalg.solve(jacobian, -self.hypergradient(zero))


class Numbers(TwoLevelData):
    """The numbers of the samples of both levels."""

    def levels(self):
        return (torch.arange(N),), (torch.arange(M),)


def run(algorithm, steps, lower=None, upper=None, task=None, seed=0, lr=0.05, folder=None, **settings):
    """Trains on minibatches of the given sizes, x by SGD; returns the task and the module."""
    task = Sums() if task is None else task
    settings.setdefault("upper_optimizer", lambda params: torch.optim.SGD(params, lr=lr))
    module = algorithm(task=task, **settings)
    data = Numbers(lower, upper, epoch_length=50, seed=seed)
    trainer(steps, folder, log_every_n_steps=0).fit(module, datamodule=data)
    return task, module


def bound(module, lower, upper, x=None):
    """A problem on minibatches of numbers, or on all where None."""
    lower = (torch.arange(N),) if lower is None else Minibatches([(i,) for i in lower])
    upper = (torch.arange(M),) if upper is None else Minibatches([(j,) for j in upper])
    x = tree.detach(tree.of(module.hooks.upper)) if x is None else x
    problem, x, _ = bind(module.hooks, {"lower": lower, "upper": upper}, x)
    return problem, x, tree.detach(tree.of(module.hooks.lower))


def prepared(algorithm, **settings):
    module = algorithm(task=Sums(), **settings)
    module.configure_model()
    return module


def draws(number, size, total=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(total, generator=generator)[:size] for _ in range(number)]


# Which minibatches are taken, and what they cost.


def steady(steps):
    return lambda s: steps


def growing(s):
    return (math.ceil(1.5 * (s + 1)),) * 3


ETA, RHO = 0.2, 0.3
FALLS, ANOTHER = InverseTime(ETA, 10), InverseTime(RHO, 5)
BOTH, NONE, OF_Y = (True, True), (False, False), (True, False)
APART, ONE = {"linear_lr": RHO}, {"lower_steps": 1, "linear_steps": 1, "cross_samples": 1}
TIED, GROWING = {"linear_steps": None, "cross_samples": None}, {"lower_steps": Power(1.5, 1.0)}
SIX, SIX_FOUR = {"lower_steps": 6, **TIED}, {"lower_steps": 6, "linear_steps": 4, "cross_samples": None, **APART}
OPERATIONS = {  # the released searches' names: (algorithm, settings, warm starts of y and v, T, K, J, eta, rho, batch)
    "bioptwsyes": (AmIGO, SIX, BOTH, steady((6, 6, 6)), ETA, ETA, 3),
    "bioptwsyesv2": (AmIGO, SIX_FOUR, BOTH, steady((6, 4, 4)), ETA, RHO, 3),
    "bioptwsno": (BSGM, {"lower_steps": 6}, NONE, steady((6, 6, 6)), ETA, ETA, 3),
    "bioptgammawsno": (BSGM, {"lower_steps": 6}, NONE, steady((6, 6, 6)), FALLS, FALLS, 3),
    "bioptgammawsnov2": (BSGM, {"lower_steps": 6, "linear_steps": 3, "linear_lr": ANOTHER}, NONE, steady((6, 3, 3)),
                         FALLS, ANOTHER, 3),
    "bioptgammaTinclin": (BSGM, GROWING, NONE, growing, FALLS, FALLS, 3),
    "bioptgammaTinclinwsyes": (BSGM, {**GROWING, "warm_start": True, "warm_start_linear": True}, BOTH, growing, FALLS,
                               FALLS, 3),
    "stochbiold": (StocBiO, SIX, OF_Y, steady((6, 6, 6)), ETA, ETA, 3),
    "stochbio": (StocBiO, SIX_FOUR, OF_Y, steady((6, 4, 4)), ETA, RHO, 3),
    "stochbiobs90": (StocBiO, {**SIX_FOUR, "cross_samples": 1}, OF_Y, steady((6, 4, 1)), ETA, RHO, 7),
    "doubleloop": (StocBiO, {**SIX_FOUR, "cross_samples": 1}, OF_Y, steady((6, 4, 1)), ETA, RHO, 3),
    "alset": (ALSET, {"linear_steps": 4, **APART}, OF_Y, steady((1, 4, 1)), ETA, RHO, 3),
    "alsetwslin": (ALSET, {"linear_steps": 1, "warm_start_linear": True}, BOTH, steady((1, 1, 1)), ETA, ETA, 3),
    "alsetwslinv2": (ALSET, {"linear_steps": 1, "warm_start_linear": True, **APART}, BOTH, steady((1, 1, 1)), ETA, RHO,
                     3),
    "bioptdet": (BSGM, {"lower_steps": 6, "linear_steps": 4, "cross_samples": 1, **APART}, NONE, steady((6, 4, 1)), ETA,
                 RHO, None),
    "bioptdetwsv2": (AmIGO, ONE, BOTH, steady((1, 1, 1)), ETA, ETA, None),  # bioptdetv2 is the same
    "bioptdetws": (AmIGO, {**ONE, **APART}, BOTH, steady((1, 1, 1)), ETA, RHO, None),
    "bioptdetwsv3rand": (AmIGO, SIX_FOUR, BOTH, steady((6, 4, 4)), ETA, RHO, None),
    "bioptdetv3rand": (BSGM, SIX_FOUR, NONE, steady((6, 4, 4)), ETA, RHO, None),
}  # fmt: skip


class Recorded(Numbers):
    """The same, and what was delivered in each iteration."""

    def train_dataloader(self):
        found, self.seen = super().train_dataloader(), []
        make = found.batch
        found.batch = lambda k: self.seen.append(make(k)) or self.seen[-1]
        return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_written_out_over_four_iterations(name):
    """T, K, J, the starts of y and v, the sequences of step sizes, x, and the samples touched in each iteration."""
    algorithm, settings, (warm_y, warm_v), numbers, eta, rho, b = OPERATIONS[name]
    task, data, costs = Sums(), Recorded(b, None, seed=2), []

    class Counted(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            costs.append(module.oracles.tolist())

    module = algorithm(
        task=task, dynamics=GradientDescent(eta), linear_start="rhs", **settings,
        upper_optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
    )  # fmt: skip
    x, first, whole, before = task.upper.x.detach().clone(), task.lower.y.detach().clone(), torch.arange(M), None
    trainer(4, log_every_n_steps=0, callbacks=[Counted()]).fit(module, datamodule=data)
    y, v = first, torch.zeros_like(first)
    for s, batch in enumerate(data.seen[:4]):
        T, K, J = numbers(s)
        lower = [i for (i,) in batch["lower"]] if b else [torch.arange(N)] * (T + K + 1)
        assert [len(i) for i in lower] == ([b] * (T + K) + [b * J] if b else [N] * (T + K + 1))
        start = v if warm_v else None
        y, v, d = by_hand(task, lower, whole, x, y if warm_y else first, start, T, K, eta, rho, first=1.0)
        x = x - 0.05 * d
        spent = costs[s] if before is None else [a - c for a, c in zip(costs[s], before, strict=True)]
        spent, before = dict(zip(ORACLES, spent, strict=True)), costs[s]
        assert spent["samples"] == (b * (T + K + J) if b else N * (T + K + 1)) + M
        assert (spent["hessian_products"], spent["cross_products"], spent["upper_gradients"]) == (K, 1, 1)
    torch.testing.assert_close(task.upper.x.detach(), x, rtol=1e-12, atol=0)
    torch.testing.assert_close(task.lower.y.detach(), y, rtol=1e-12, atol=0)


def test_the_published_budget_lasts_for_21_iterations():
    """Of the poisoning config, with its numbers of steps and sizes, and a small model in the place of MNIST's."""
    config = yaml.safe_load(Path(config_path("poisoning/mnist_bsgm")).read_text())
    steps, b = config["model"]["init_args"]["lower_steps"], config["data"]["init_args"]["lower_batch_size"]
    (budget,) = (c["init_args"]["samples"] for c in config["trainer"]["callbacks"] if c["class_path"] == "SampleBudget")

    class Few(Sums):
        def lower_loss(self, batch):
            return 0.5 * (self.lower.y - self.upper.x[0]).square().sum()

        def upper_loss(self, batch):
            return self.lower.y.sum()

    class Many(Numbers):
        def levels(self):
            return (torch.arange(100),), (torch.arange(15_000),)

    module = BSGM(task=Few(), lower_steps=steps, dynamics=GradientDescent(0.01))
    fitted = trainer(-1, callbacks=[SampleBudget(budget)], log_every_n_steps=0)
    fitted.fit(module, datamodule=Many(b, None, epoch_length=50))
    assert fitted.global_step == 21
    assert int(module.oracles[-1]) == 21 * 96_000 == 2_016_000


def test_growing_numbers():
    module = prepared(BSGM, lower_steps=Power(1.5, 1.0))
    assert [module.numbers(s) for s in range(4)] == [(math.ceil(1.5 * (s + 1)),) * 3 for s in range(4)]
    assert module.minibatches(3) == ([1] * 12 + [6], [6])


def by_hand(task, lower, upper, x, y, v0, T, K, lr, rho, first=None):
    """BSGM written out: y, v and the direction from lists of minibatches; cold, v starts at ``first`` f_y."""
    lr, rho = (value if callable(value) else lambda t, value=value: value for value in (lr, rho))
    for t in range(T):
        y = y - lr(t) * (task.A[lower[t]].mean(0) @ y - task.B[lower[t]].mean(0) @ x)
    f_y = y - task.c[upper].mean(0)
    v, number = ((rho(0) if first is None else first) * f_y, 1) if v0 is None else (v0, 0)
    for j in range(K):
        v = v - rho(number + j) * (task.A[lower[T + j]].mean(0) @ v - f_y)
    return y, v, task.rho * x + task.B[lower[T + K]].mean(0).T @ v


@pytest.mark.parametrize("warm", [False, True])
def test_bsgm_is_its_definition(warm):
    eta, rho = InverseTime(0.3, 4), InverseTime(0.2, 3)
    module = prepared(
        BSGM, lower_steps=3, linear_steps=4, cross_samples=2, dynamics=GradientDescent(eta), linear_lr=rho,
        warm_start_linear=warm,
    )  # fmt: skip
    v0 = torch.linspace(-1, 1, DIM, dtype=torch.float64)
    if warm:
        module.states["v"].set({"y": v0})
    lower, upper = [*draws(7, 4), torch.cat(draws(2, 4, seed=2))], [draws(1, 6, M)[0]]
    problem, x, y = bound(module, lower, upper)
    step = module.bilevel_step(problem, x, y)
    want = by_hand(module.task, lower, upper[0], x["x"], y["y"], v0 if warm else None, 3, 4, eta, rho)
    torch.testing.assert_close(step.lower["y"], want[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(step.upper_grad["x"], want[2], rtol=1e-12, atol=0)
    if warm:
        torch.testing.assert_close(step.state["v"]["y"], want[1], rtol=1e-12, atol=0)


def test_linear_start_at_the_right_hand_side_and_no_step():
    module = prepared(BSGM, lower_steps=2, linear_steps=0, linear_start="rhs", dynamics=GradientDescent(0.2))
    problem, x, y = bound(module, None, None)
    step = module.bilevel_step(problem, x, y)
    y, task = step.lower["y"], module.task
    want = task.rho * x["x"] + task.B.mean(0).T @ (y - task.c.mean(0))
    torch.testing.assert_close(step.upper_grad["x"], want, rtol=1e-13, atol=0)
    assert problem.counts["hessian_products"] == 0


def test_lower_decay_scales_the_lower_steps_alone():
    one, two = (prepared(StocBiO, lower_steps=4, dynamics=GradientDescent(lr), linear_lr=0.1, lower_decay=decay)
                for lr, decay in ((0.05, None), (0.2, Power(0.25, 0.0))))  # fmt: skip
    steps = [m.bilevel_step(*bound(m, None, None)) for m in (one, two)]
    for a, b in zip(steps[0][:2], steps[1][:2], strict=True):
        assert relative(a, b) < 1e-14


def test_a_lower_decay_of_zero_leaves_y():
    module = prepared(StocBiO, lower_steps=4, dynamics=GradientDescent(0.2), lower_decay=Linear(0.0, 1.0, 10))
    problem, x, y = bound(module, None, None)
    assert torch.equal(module.bilevel_step(problem, x, y).lower["y"], y["y"])


@pytest.mark.parametrize("warm", [False, True])
def test_divergence_of_v_falls_back_to_no_linear_steps(warm):
    settings = {"lower_steps": 3, "linear_lr": 1e3, "dynamics": GradientDescent(0.2)}
    module = prepared(BSGM, linear_steps=200, warm_start_linear=warm, **settings)
    want = prepared(BSGM, linear_steps=0, **settings)
    if warm:
        module.states["v"].set({"y": torch.full((DIM,), 7.0, dtype=torch.float64)})
    with pytest.warns(LinearSystemWarning, match="linear_steps was taken as 0: lower linear_lr"):
        step = module.bilevel_step(*bound(module, None, None))
    assert relative(step.upper_grad, want.bilevel_step(*bound(want, None, None)).upper_grad) == 0
    if warm:  # the next iteration goes on from this v, and not from one that led to divergence
        f_y = step.lower["y"] - module.task.c.mean(0)
        torch.testing.assert_close(step.state["v"]["y"], 1e3 * f_y, rtol=1e-13, atol=0)


def test_the_direction_is_the_mean_of_that_on_minibatches():
    """v is a product of independent factors, each linear in its sample: its mean is that of the full batch."""
    full = prepared(BSGM, lower_steps=0, linear_steps=6, linear_lr=0.2)
    exact = full.bilevel_step(*bound(full, None, None)).upper_grad["x"]
    found = []
    for seed in range(300):
        lower = draws(7, 2, seed=seed)
        found.append(full.bilevel_step(*bound(full, lower, draws(1, 2, M, seed=seed + 1000))).upper_grad["x"])
    found = torch.stack(found)
    error = (found.mean(0) - exact).abs()
    assert (error < 3 * found.std(0) / len(found) ** 0.5).all()
    assert found.std(0).min() > 0.05  # they do differ


def test_decreasing_steps_average_the_noise_out():
    exact, errors = Sums(1.0), []
    for K in (30, 240):
        module = BSGM(task=exact, lower_steps=0, linear_steps=K, linear_lr=InverseTime(0.3, 10))
        module.configure_model()
        v = torch.linalg.solve(exact.A.mean(0), exact.lower.y.detach() - exact.c.mean(0))
        want = exact.rho * exact.upper.x.detach() + exact.B.mean(0).T @ v
        found = [
            module.bilevel_step(*bound(module, [*draws(K, 1, seed=s), torch.arange(N)], None)).upper_grad["x"] - want
            for s in range(30)
        ]
        errors.append(torch.stack(found).square().sum(1).mean().sqrt())
    assert errors[1] / errors[0] < 0.65


@pytest.mark.parametrize("algorithm", [BSA, TTSA])
def test_the_random_term_is_the_series_in_the_mean(algorithm):
    settings = {"lower_steps": 0, "linear_steps": 4, "linear_lr": 0.3}
    module, series = prepared(algorithm, **settings), prepared(StocBiO, **settings)
    exact = series.bilevel_step(*bound(series, None, None)).upper_grad["x"]
    torch.manual_seed(0)
    found = torch.stack([module.bilevel_step(*bound(module, None, None)).upper_grad["x"] for _ in range(400)])
    assert len(found.unique(dim=0)) == 5  # the terms p = 0..4
    assert ((found.mean(0) - exact).abs() < 3 * found.std(0) / 20).all()


def test_sustain_takes_one_random_term_for_both_points():
    module = prepared(SUSTAIN, linear_steps=6, linear_lr=0.3)
    problem, x, y = bound(module, None, None)
    term, u = module.term(problem), {"x/x": x["x"], "y/y": y["y"]}
    for seed in range(5):
        torch.manual_seed(seed)
        now, before = module.estimator._both([term], u, {**u, "y/y": 2 * y["y"]})
        torch.manual_seed(seed)
        again = term.evaluate({**u, "y/y": 2 * y["y"]})
        assert relative(before, again) == 0
        assert relative(now, before) > 0.1


# Special cases coincide.


def same(one, two, tolerance=1e-12):
    for a, b in ((one.upper, two.upper), (one.lower, two.lower)):
        assert relative(tree.detach(tree.of(a)), tree.detach(tree.of(b))) < tolerance


@pytest.mark.parametrize("batch", [None, 4])
def test_amigo_with_single_steps_at_once_is_soba(batch):
    """Where both levels have one minibatch in an iteration; SOBA takes the same for y, v and x."""

    class Single(AmIGO):
        def minibatches(self, k):
            return [1], [1]

    settings = {"lower": batch, "upper": batch}
    amigo, _ = run(
        Single, 20, lower_steps=1, linear_steps=1, order="simultaneous", dynamics=GradientDescent(0.2), **settings
    )
    soba, _ = run(SOBA, 20, lower_lr=0.2, **settings)
    same(amigo, soba)


@pytest.mark.parametrize("batch", [None, 4])
def test_mrbo_without_memory_is_stocbio(batch):
    settings = {"linear_steps": 5, "linear_lr": 0.2, "lower": batch, "upper": batch}
    mrbo, _ = run(MRBO, 20, estimator=STORM(1.0), lower_lr=0.2, **settings)
    stocbio, _ = run(StocBiO, 20, lower_steps=1, order="simultaneous", dynamics=GradientDescent(0.2), **settings)
    same(mrbo, stocbio)


FULL = [
    (SABA, {}, SOBA, {}),
    (SRBA, {"estimator": SARAH(7)}, SOBA, {}),
    (SOBA, {"estimator": STORM(0.3)}, SOBA, {}),
    (MASOBA, {"estimator": MovingAverage(1.0)}, SOBA, {}),
    (MRBO, {"estimator": STORM(0.3)}, MRBO, {"estimator": Plain()}),
    (MRBO, {"estimator": SARAH(4)}, MRBO, {"estimator": Plain()}),
    (FSLA, {}, FSLA, {"estimator": STORM(1.0)}),
]


@pytest.mark.parametrize(("algorithm", "settings", "reference", "plain"), FULL)
def test_reduced_variance_is_exact_on_full_batches(algorithm, settings, reference, plain):
    one, _ = run(algorithm, 25, lower_lr=0.2, **settings)
    two, _ = run(reference, 25, lower_lr=0.2, **plain)
    same(one, two, 1e-11)


def test_vrbo_on_full_batches_is_its_definition():
    """x moves along the hypergradient at the last y at which it was estimated; then y takes its lower steps."""
    task, _ = run(VRBO, 6, lr=0.1, lower_steps=3, lower_lr=0.2, linear_steps=4, linear_lr=0.2, estimator=SARAH(4))
    other = Sums()
    x, y, A, B, c = other.upper.x.detach(), other.lower.y.detach(), other.A.mean(0), other.B.mean(0), other.c.mean(0)
    for k in range(6):
        at = y
        for _ in range(3 if k else 0):
            at, y = y, y - 0.2 * (A @ y - B @ x)
        at = y if k % 4 == 0 else at
        v = 0.2 * (at - c)
        for _ in range(4):
            v = v - 0.2 * (A @ v - (at - c))
        x = x - 0.1 * (other.rho * x + B.T @ v)
    torch.testing.assert_close(task.upper.x.detach(), x, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(task.lower.y.detach(), y, rtol=1e-11, atol=1e-13)


# Estimators on minibatches.


def test_storm_is_its_definition():
    """Three iterations on given minibatches, with the point before and the direction kept in the module's state."""
    module = prepared(SOBA, estimator=STORM(0.25), lower_lr=0.1)
    task, direction, before = module.task, None, None
    x, y, v = task.upper.x.detach(), task.lower.y.detach(), torch.zeros(DIM, dtype=torch.float64)

    def phi(u, i, j):
        x, y, v = u
        A, B, c = task.A[i].mean(0), task.B[i].mean(0), task.c[j].mean(0)
        return [A @ y - B @ x, A @ v - (y - c), task.rho * x + B.T @ v]

    for k in range(3):
        i, j = draws(1, 3, seed=k)[0], draws(1, 3, M, seed=k + 50)[0]
        now = phi((x, y, v), i, j)
        if k:
            last = phi(before, i, j)
            now = [a + 0.75 * (d - b) for a, d, b in zip(now, direction, last, strict=True)]
        problem, _, _ = bound(module, [i], [j])
        d, memory = module.estimator.estimate(
            module.terms(problem), {"x/x": x, "y/y": y, "v/y": v}, module.remembered(), k, module.estimator.restarts(k)
        )
        for name, want in zip(("y/y", "v/y", "x/x"), now, strict=True):
            torch.testing.assert_close(d[name], want, rtol=1e-12, atol=1e-13)
        for name, values in memory.items():
            module.states[name].set(values)
        before, direction = (x, y, v), now
        y, v, x = (a - 0.1 * b for a, b in zip((y, v, x), now, strict=True))


def test_saga_keeps_the_last_direction_of_each_part_and_their_mean():
    _, module = run(SABA, 60, 6, 7, lower_lr=0.05)
    for i, parts in ((0, 7), (1, 5)):
        table, mean = module.kept(f"table{i}"), module.kept(f"mean{i}")
        data = Numbers(6, 7)
        assert list(data.parts().values())[i] == parts
        shares = torch.tensor([6 / 40] * 5 + [5 / 40] * 2 if i == 0 else [6 / 30] * 5, dtype=torch.float64)
        for name, rows in table.items():
            assert len(rows) == parts
            want = torch.einsum("p,p...->...", shares, rows)
            torch.testing.assert_close(mean[name], want, rtol=1e-9, atol=1e-9)
            assert (rows.abs().sum(tuple(range(1, rows.ndim))) > 0).all()


def test_saga_says_when_there_are_more_parts_than_memories():
    module = prepared(SABA)
    problem, x, y = bound(module, [torch.arange(3)], None)
    problem.parts = {"lower": ([4], [1 / 9] * 9)}
    with pytest.raises(BilevelError, match="more parts than SAGA has memories"):
        module.bilevel_step(problem, x, y)


def test_fsla_moves_y_v_and_x_on_minibatches_of_their_own():
    """On one shared minibatch g_xy and the new v would not be independent, and the direction of x biased."""
    module = prepared(FSLA, lower_lr=0.2)
    assert module.minibatches(0) == (3, [1])
    task, v = module.task, torch.linspace(-1, 1, DIM, dtype=torch.float64)
    module.states["v"].set({"y": v})
    (i, j, n), (m,) = draws(3, 4), draws(1, 5, M)
    problem, x, y = bound(module, [i, j, n], [m])
    step = module.bilevel_step(problem, x, y)
    y = y["y"] - 0.2 * (task.A[i].mean(0) @ y["y"] - task.B[i].mean(0) @ x["x"])
    v = v - 0.2 * (task.A[j].mean(0) @ v - (y - task.c[m].mean(0)))
    torch.testing.assert_close(step.lower["y"], y, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(step.state["v"]["y"], v, rtol=1e-13, atol=1e-14)
    want = task.rho * x["x"] + task.B[n].mean(0).T @ v
    torch.testing.assert_close(step.upper_grad["x"], want, rtol=1e-13, atol=1e-14)


# Convergence on minibatches.


def distance(task):
    best = task.minimiser()
    return float((task.upper.x.detach() - best).norm() / (Sums().upper.x.detach() - best).norm())


CONVERGE = {  # algorithm: (settings, iterations, step size of x, bound on the relative distance to the minimiser)
    SABA: ({"lower_lr": 0.2}, 500, 0.02, 1e-3),
    SRBA: ({"lower_lr": 0.3, "estimator": SARAH(8)}, 300, 0.04, 1e-3),
    SOBA: ({"lower_lr": Power(0.4, -0.2)}, 300, 0.04, 0.04),
    MASOBA: ({"lower_lr": Power(0.4, -0.2), "estimator": MovingAverage(0.3)}, 300, 0.03, 0.04),
    FSLA: ({"lower_lr": Power(0.4, -0.2)}, 300, 0.04, 0.04),
    MRBO: ({"lower_lr": 0.1, "linear_lr": 0.3}, 100, 0.1, 0.05),
    SUSTAIN: ({"lower_lr": 0.3, "linear_lr": 0.3, "linear_steps": 6}, 200, 0.1, 0.03),
    VRBO: ({"lower_lr": 0.3, "linear_lr": 0.3, "lower_steps": 2, "estimator": SARAH(4)}, 60, 0.2, 0.01),
    BSGM: ({"lower_steps": 10, "dynamics": GradientDescent(0.3)}, 60, 0.2, 0.03),
    StocBiO: ({"lower_steps": 3, "dynamics": GradientDescent(0.2)}, 60, 0.2, 0.05),
    AmIGO: ({"lower_steps": 3, "linear_steps": 3, "dynamics": GradientDescent(0.1)}, 100, 0.2, 0.08),
    ALSET: ({"dynamics": GradientDescent(0.2)}, 80, 0.2, 0.05),
    BSA: ({"lower_steps": 3, "linear_steps": 5, "dynamics": GradientDescent(0.3)}, 150, 0.2, 0.06),
    TTSA: ({"linear_steps": 5, "dynamics": GradientDescent(0.5), "linear_lr": 0.3}, 150, 0.2, 0.15),
}


@pytest.mark.parametrize("algorithm", CONVERGE)
def test_minibatches_lead_to_the_solution(algorithm):
    settings, steps, lr, tolerance = CONVERGE[algorithm]
    if algorithm not in (SABA, SRBA):  # those converge with constant steps
        settings = {**settings, "upper_scheduler": InverseTime(1.0, 60)}
    torch.manual_seed(0)
    task, _ = run(algorithm, steps, 5, 5, lr=lr, **settings)
    assert distance(task) < tolerance


def test_budget_ends_training_with_the_iteration_that_spends_it():
    task = Sums()
    module = BSGM(task=task, lower_steps=3, linear_steps=2, cross_samples=2)
    per_step = 4 * (3 + 2 + 2) + M
    fitted = trainer(-1, callbacks=[SampleBudget(2.5 * per_step)], log_every_n_steps=0)
    fitted.fit(module, datamodule=Numbers(4, None))
    assert fitted.global_step == 3


def test_a_budget_is_exact_or_refused():
    """With several upper iterations a batch, training would go on to the end of the batch that spends it."""
    module = StocBiO(task=Sums(), upper_iterations=3)
    fitted = trainer(-1, callbacks=[SampleBudget(100)], log_every_n_steps=0)
    with pytest.raises(BilevelError, match=r"model\.upper_iterations=3 takes that many.*end training by trainer"):
        fitted.fit(module, datamodule=Numbers())


@pytest.mark.parametrize(("algorithm", "settings"), [
    (SRBA, {"estimator": SARAH(3)}),
    (VRBO, {"estimator": SARAH(3), "lower_steps": 2}),
    (BSGM, {"lower_steps": Power(1.0, 1.0)}),
])  # fmt: skip
def test_minibatches_are_those_prepared_also_where_hypergradients_are_gathered(algorithm, settings, monkeypatch):
    """Batches are counted, not steps of x: an iteration finds as many minibatches as it takes, and restarts on all."""
    found, restarts, step, estimate = [], [], algorithm.bilevel_step, SARAH.estimate

    def estimated(self, terms, point, memory, k, restart):
        restarts.append(restart)
        return estimate(self, terms, point, memory, k, restart)

    def watched(self, problem, x, y):
        restarts.clear()
        result = step(self, problem, x, y)
        assert (problem._samples[0][0] == N) == any(restarts)
        lower, upper = problem._samples
        found.append((problem.counts["samples"], lower, upper))
        return result

    monkeypatch.setattr(algorithm, "bilevel_step", watched)
    monkeypatch.setattr(SARAH, "estimate", estimated)
    module = run(algorithm, 3, 4, 4, accumulate=2, **settings)[1]
    assert len(found) == 6
    for k, (touched, lower, upper) in enumerate(found):
        assert (len(lower), len(upper)) == tuple(map(len, module.minibatches(k)))
        if algorithm is BSGM:  # each sample of the lower level once, those of the upper one in f_x and f_y at once
            assert touched == sum(lower) + sum(upper) == 4 * 4 * (k + 1)


def test_vrbo_takes_fresh_minibatches_in_every_lower_step():
    """An iteration on given minibatches, written out: every correction has its own, at both of its points."""
    module = prepared(VRBO, lower_steps=2, linear_steps=2, linear_lr=0.2, lower_lr=0.1, estimator=SARAH(5))
    task, x, y = module.task, module.task.upper.x.detach(), module.task.lower.y.detach()
    lower, upper = draws(8, 3), draws(2, 4, M)
    x0, y0 = x + 0.3, y - 0.2
    d = {"y": torch.ones_like(y), "x": torch.ones_like(x)}
    module.states["before"].set({"x/x": x0, "y/y": y0})
    module.states["direction"].set({"x/x": d["x"], "y/y": d["y"]})

    def phi(x, y, i, j):
        f_y = y - task.c[j].mean(0)
        v = 0.2 * f_y
        for n in (1, 2):
            v = v - 0.2 * (task.A[i[n]].mean(0) @ v - f_y)
        return task.rho * x + task.B[i[3]].mean(0).T @ v, task.A[i[0]].mean(0) @ y - task.B[i[0]].mean(0) @ x

    d_x, d_y, now = d["x"], d["y"], y
    for t in range(2):
        i, j = lower[4 * t : 4 * t + 4], upper[t]
        new, old = phi(x, now, i, j), phi(x0, y0, i, j)
        d_x, d_y = d_x + new[0] - old[0], d_y + new[1] - old[1]
        x0, y0, now = x, now, now - 0.1 * d_y
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VRBO, "batches", 1)
        assert module.minibatches(1) == ([1] * 8, [1] * 2)
        problem, x, y = bound(module, lower, upper)
        step = module.bilevel_step(problem, x, y)
    torch.testing.assert_close(step.upper_grad["x"], d_x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(step.lower["y"], now, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("algorithm", [SABA, MRBO, VRBO, AmIGO])
def test_a_resumed_run_goes_on_to_the_bit(algorithm, tmp_path):
    def start():
        return algorithm(task=Sums(), upper_optimizer=lambda params: torch.optim.SGD(params, lr=0.05))

    whole = start()
    data = lambda: Numbers(6, 7, epoch_length=4)
    trainer(10, log_every_n_steps=0).fit(whole, datamodule=data())
    half = trainer(5, log_every_n_steps=0)
    half.fit(start(), datamodule=data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = start()
    trainer(10, log_every_n_steps=0).fit(rest, datamodule=data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for name, t in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], t), name


# What cannot be.


class Projected(Sums):
    def project_lower(self, upper, lower):
        return lower


class Episodic(Sums):
    persistent_lower = False


class Prepared(Sums):
    def prepare(self, batch):
        return batch


BAD = [
    (lambda: BSGM(linear_steps=-1), "linear_steps must be at least 0, got -1"),
    (lambda: BSGM(cross_samples=0), "cross_samples must be at least 1, got 0"),
    (lambda: BSGM(linear_steps=0, warm_start_linear=True), "raise linear_steps"),
    (lambda: BSGM(order="jacobi"), "order must be sequential or simultaneous, got jacobi"),
    (lambda: BSGM(linear_start="zero"), "linear_start must be step or rhs, got zero"),
    (lambda: BSA(warm_start_linear=True), "BSA draws one term of a series"),
    (lambda: TTSA(decay_exponent=0.0), "decay_exponent must be negative, got 0.0"),
    (lambda: BSA(linear_lr=Power(0.1, -0.5)), "give linear_lr as a number"),
    (lambda: TTSA(dynamics=Adam()), "lower_decay scales the lower loss, and the steps of Adam do not"),
    (lambda: BSGM(dynamics=FixedPoint(), lower_decay=Power(1.0, -0.5)), "the steps of FixedPoint do not"),
    (lambda: SOBA(warm_start=False), "SOBA steps y once in an iteration: it needs warm_start = True"),
    (lambda: FSLA(estimator=SAGA()), "FSLA: its direction has samples of both levels at once"),
    (lambda: AmIGO(task=Episodic()).configure_model(), "AmIGO: warm_start_linear goes on from the last v"),
    (
        lambda: hypergradient(Sums(), batch=ALL, method="BSGM", dynamics=Adam(0.1)),
        "linear_lr must be given: Adam has no",
    ),
    (lambda: MRBO(estimator=SAGA()), "MRBO: a Neumann series is no mean over samples"),
    (lambda: MRBO(linear_steps=0), "linear_steps must be a positive number"),
    (lambda: SARAH(0), "SARAH.period must be at least 1"),
    (lambda: STORM(0.0), r"STORM.eta must be in \(0, 1\]"),
    (lambda: MovingAverage(1.5), r"MovingAverage.theta must be in \(0, 1\]"),
    (lambda: SampleBudget(0), "SampleBudget.samples must be a positive number"),
    (
        lambda: SOBA(task=Projected()).configure_model(),
        "SOBA solves g_yy v = f_y, which does not hold with project_lower",
    ),
    (lambda: SABA(task=Prepared()).configure_model(), "use Plain as estimator, or leave prepare out"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_impossible_settings(make, message):
    with pytest.raises(BilevelError, match=message):
        make()


def test_a_linear_step_size_is_not_taken_from_adam():
    module = prepared(BSGM, lower_steps=1, dynamics=Adam())
    with pytest.raises(BilevelError, match="linear_lr must be given: Adam has no step size that suits"):
        module.bilevel_step(*bound(module, None, None))
    given = prepared(BSGM, lower_steps=1, dynamics=Adam(), linear_lr=0.2)
    assert given.bilevel_step(*bound(given, None, None)).upper_grad["x"].isfinite().all()


def test_minibatches_are_not_taken_for_several_iterations():
    with pytest.raises(BilevelError, match=r"same minibatches several times: leave it or data.lower_batch_size out"):
        run(StocBiO, 4, 5, None, upper_iterations=2)


def test_a_scheduled_number_of_cross_samples_is_at_least_one():
    module = prepared(BSGM, lower_steps=2, cross_samples=Linear(0, 3, 3))
    assert [module.minibatches(k)[0][-1] for k in range(4)] == [1, 1, 2, 3]


def test_directions_of_soba_are_derivatives():
    """d_x at the exact v is the gradient of f(x, y*(x)), by central differences."""
    module = prepared(SOBA)
    task = module.task
    A, B = task.A.mean(0), task.B.mean(0)

    def objective(x):
        y = torch.linalg.solve(A, B @ x["x"])
        return 0.5 * (y - task.c).square().sum(1).mean() + 0.5 * task.rho * x["x"].square().sum()

    x = tree.detach(tree.of(task.upper))
    y = {"y": torch.linalg.solve(A, B @ x["x"])}
    module.states["v"].set({"y": torch.linalg.solve(A, y["y"] - task.c.mean(0))})
    problem, x, _ = bound(module, None, None)
    step = module.bilevel_step(problem, x, y)
    assert relative(step.upper_grad, central_differences(objective, x)) < 1e-8
    assert relative(step.lower, y) < 1e-13
    assert copy.copy(step.logs)["train/residual"] < 1e-12
