import warnings

import pytest
import torch
from problems import (
    Contraction,
    Nonlinear,
    Quadratic,
    ScalarMerelyConvex,
    ScalarStronglyConvex,
    bound,
    flat,
    relative,
    unrolled,
)
from problems import central_differences as differences

from bilevel_lightning import (
    Accelerated,
    Adam,
    AggregatedDescent,
    Anderson,
    BilevelError,
    FixedPoint,
    GradientDescent,
    HeavyBall,
    HigherDynamics,
    Momentum,
    Nesterov,
    tree,
)
from bilevel_lightning.binding import bind
from bilevel_lightning.hypergradients import reverse
from bilevel_lightning.problem import BilevelProblem
from bilevel_lightning.schedules import Cosine, InverseTime, Linear, Power

TORCH = {
    "gradient descent": (GradientDescent(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (Momentum(0.1, 0.7), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7)),
    "nesterov": (Nesterov(0.1, 0.7), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7, nesterov=True)),
    "adam": (Adam(0.05, (0.8, 0.95), 1e-6), lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=1e-6)),
}


@pytest.mark.parametrize(("dynamics", "optimizer"), TORCH.values(), ids=TORCH)
def test_trajectory_is_that_of_the_torch_optimizer(dynamics, optimizer):
    task = Nonlinear()
    problem, x, _ = bind(task, None, tree.clone(tree.of(task.upper)), lambda v: v)
    state = dynamics.start(tree.clone(tree.of(task.lower)))
    stepper = optimizer(task.lower.parameters())
    for t in range(25):
        state = dynamics.step(problem, x, state, t)
        stepper.zero_grad()
        task.lower_loss(None).backward()
        stepper.step()
        for name, p in task.lower.named_parameters():
            torch.testing.assert_close(state[0][name], p.detach(), rtol=1e-12, atol=1e-13)


def test_decreasing_step():
    problem = BilevelProblem(lambda x, y: y["y"].sum(), lambda x, y: y["y"].sum())
    dynamics = GradientDescent(InverseTime(1.0, 2.0))
    state = dynamics.start({"y": torch.zeros(1)})
    for t in range(3):
        state = dynamics.step(problem, {}, state, t)
    assert float(state[0]["y"]) == pytest.approx(-(1 + 2 / 3 + 2 / 4))


def test_learnt_step_size_starts_at_lr_and_stays_positive():
    dynamics = GradientDescent(0.25, learn_lr=True)
    (name,) = dynamics.learnable(12, {})
    assert float(dynamics.rate(dynamics.learnable(12, {}), 0)) == 0.25
    assert float(dynamics.rate({name: torch.tensor(-9.0)}, 0)) > 0
    assert GradientDescent(0.25).learnable(12, {}) == {}


def test_adam_has_a_derivative_where_all_gradients_were_zero():
    """y - lr g / (|g| + eps) has the slope -lr / eps in g at g = 0; a naive square root gives NaN."""
    problem = BilevelProblem(lambda x, y: y["y"].sum(), lambda x, y: (x["x"] * y["y"]).sum())
    x = {"x": torch.zeros(2, dtype=torch.float64, requires_grad=True)}
    y = {"y": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    (end, *_) = Adam(0.1, eps=1e-3).step(problem, x, Adam().start(y), 0, track=True)
    (slope,) = torch.autograd.grad(end["y"].sum(), x["x"])
    torch.testing.assert_close(slope, torch.full((2,), -0.1 / 1e-3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientDescent(-0.1), "GradientDescent.lr must be a positive number, got -0.1"),
        (lambda: GradientDescent(float("nan")), "GradientDescent.lr must be a positive number"),
        (lambda: Adam(0.0), "Adam.lr must be a positive number, got 0.0"),
        (lambda: Momentum(0.1, 1.0), r"Momentum.momentum must be in \[0, 1\), got 1.0"),
        (lambda: Nesterov(0.1, -0.5), r"Nesterov.momentum must be in \[0, 1\)"),
        (lambda: Adam(betas=(0.9, 1.0)), r"Adam.betas must be in \[0, 1\)"),
        (lambda: Adam(eps=0.0), "Adam.eps must be a positive number"),
        (lambda: Linear(-1.0, 1.0, 5), "Linear.start must not be negative"),
        (lambda: Cosine(1.0, -1.0, 5), "Cosine.final must not be negative"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(BilevelError, match=message):
        make()


def test_schedules():
    assert [Linear(0.0, 3.0, 4)(t) for t in (0, 2, 4, 9)] == [0.0, 1.5, 3.0, 3.0]
    assert [InverseTime(2.0, 10.0)(t) for t in (0, 10)] == [2.0, 1.0]
    assert [Power(2.0, -0.5)(t) for t in (0, 3)] == [2.0, 1.0]
    assert [Cosine(5.0, 1.0, 6)(t) for t in (0, 2, 3, 6, 9)] == pytest.approx([5.0, 4.0, 3.0, 1.0, 1.0])
    assert Cosine(5.0, 0.0, 6)(6) == 0.0


def ran(dynamics, task, steps):
    """The iterates y_1, ..., y_T."""
    problem, x, y = bound(task)
    state, iterates = dynamics.start(y), []
    for t in range(steps):
        state = dynamics.step(problem, x, state, t)
        iterates.append(state[0])
    return iterates


def test_heavy_ball_is_momentum_at_a_constant_step():
    pairs = zip(ran(HeavyBall(0.1, 0.7), Nonlinear(), 25), ran(Momentum(0.1, 0.7), Nonlinear(), 25), strict=True)
    assert all(relative(ball, momentum) < 1e-13 for ball, momentum in pairs)
    schedule = InverseTime(0.3, 5.0)
    ball, momentum = ran(HeavyBall(schedule, 0.7), Nonlinear(), 25), ran(Momentum(schedule, 0.7), Nonlinear(), 25)
    assert relative(ball[0], momentum[0]) < 1e-15
    assert relative(ball[-1], momentum[-1]) > 1e-3


def test_heavy_ball_with_a_decreasing_step():
    """y_{t+1} = y_t - lr_t (A y_t - B x) + mu (y_t - y_{t-1}), lr_t = 0.3 * 5 / (5 + t)."""
    task = Quadratic()
    y = previous = task.y().detach()
    for t, found in enumerate(ran(HeavyBall(InverseTime(0.3, 5.0), 0.6), task, 12)):
        gradient = task.A @ y - task.B @ task.upper.x.detach()
        y, previous = y - 0.3 * 5 / (5 + t) * gradient + 0.6 * (y - previous), y
        assert relative(flat(found), y) < 1e-13


def test_accelerated_descent():
    """u_{t+1} = y_{t+1} + (s_t - 1) / s_{t+1} (y_{t+1} - y_t), s_0 = 1, s_{t+1} = (1 + sqrt(1 + 4 s_t^2)) / 2."""
    task, s = Quadratic(), 1.0
    y = u = task.y().detach()
    for found in ran(Accelerated(0.2), task, 12):
        after = u - 0.2 * (task.A @ u - task.B @ task.upper.x.detach())
        larger = (1 + (1 + 4 * s**2) ** 0.5) / 2
        u, y, s = after + (s - 1) / larger * (after - y), after, larger
        assert relative(flat(found), y) < 1e-13


@pytest.mark.parametrize(
    ("dynamics", "alpha"),
    [
        (AggregatedDescent(0.2, 0.07), lambda t: 0.5 / (1 + t)),
        (AggregatedDescent(0.2, 0.07, 0.3), lambda t: 0.3),
    ],
)
def test_aggregated_descent(dynamics, alpha):
    """y <- y - alpha_t 0.07 (y - c) - (1 - alpha_t) 0.2 (A y - B x)."""
    task = Quadratic()
    y, x = task.y().detach(), task.upper.x.detach()
    for t, found in enumerate(ran(dynamics, task, 12)):
        y = y - alpha(t) * 0.07 * (y - task.c) - (1 - alpha(t)) * 0.2 * (task.A @ y - task.B @ x)
        assert relative(flat(found), y) < 1e-13


@pytest.mark.parametrize(
    ("task", "iterations", "limit"),
    [
        (ScalarStronglyConvex, 100, {"x": 1 / (1 + 0.81 * (1 - 0.8**20))}),
        (ScalarMerelyConvex, 200, {"x": 1.0, "y1": 1.0, "y2": 1.0}),
    ],
)
def test_limits_of_aggregated_descent(task, iterations, limit):
    """Both steps 0.2, alpha = 0.1, T = 20, upper step 0.1, y kept. Biased where y* is unique; right where it is not."""
    dynamics = AggregatedDescent(0.2, 0.2, 0.1)
    problem, x, y = bound(task())
    for _ in range(iterations):
        gradient, y = reverse(problem, dynamics, x, y, 20)
        x = tree.axpy(-0.1, gradient, x)
    for name, value in limit.items():
        assert float({**x, **y}[name]) == pytest.approx(value, abs=1e-5)


def steps_to(dynamics, task, solution, error=1e-12):
    distances = [relative(flat(y), solution) for y in ran(dynamics, task, 150)]
    return next(t + 1 for t, distance in enumerate(distances) if distance < error)


def test_anderson_accelerates_fixed_point_maps():
    task = Contraction()
    symmetric = task.m + task.m.T
    task.m = 0.8 * symmetric / torch.linalg.matrix_norm(symmetric, 2)
    solution = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - task.m, task.upper.x.detach())
    assert 5 * steps_to(Anderson(), task, solution) < steps_to(FixedPoint(), task, solution)


def test_anderson_accelerates_gradient_descent():
    task = Quadratic()
    solution = torch.linalg.solve(task.A, task.B @ task.upper.x.detach())
    accelerated = Anderson(GradientDescent(0.4), history=8)
    assert steps_to(accelerated, task, solution) < 20 < 40 < steps_to(GradientDescent(0.4), task, solution)


def test_anderson_with_one_pair_is_the_damped_map():
    task = Contraction()
    y, x = task.lower.y.detach(), task.upper.x.detach()
    for found in ran(Anderson(history=1, mixing=0.6), task, 6):
        y = y + 0.6 * (task.m @ y + x - y)
        assert relative(found["y"], y) < 1e-13


def test_anderson_with_two_pairs_is_its_formula():
    """w minimises |w r_0 + (1 - w) r_1|: w = <r_1, r_1 - r_0> / |r_1 - r_0|^2."""
    task = Contraction()
    y0, x = task.lower.y.detach(), task.upper.x.detach()
    phi = lambda y: task.m @ y + x
    y1 = phi(y0)
    r0, r1 = phi(y0) - y0, phi(y1) - y1
    w = r1 @ (r1 - r0) / (r1 - r0).square().sum()
    expected = w * (y0 + 0.7 * r0) + (1 - w) * (y1 + 0.7 * r1)
    problem, x, _ = bound(task)
    moved, *pairs = Anderson(mixing=0.7, ridge=1e-14).step(problem, x, ({"y": y1}, {"y": y0}, {"y": r0}), 1)
    assert relative(moved["y"], expected) < 1e-12
    for pair, kept in zip(pairs, (y0, r0, y1, r1), strict=True):
        torch.testing.assert_close(pair["y"], kept, rtol=1e-13, atol=0)


DIFFERENTIATED = {
    "anderson": Anderson(GradientDescent(0.2, learn_lr=True), history=3, ridge=1e-4),
    "adam": Adam(0.05, (0.8, 0.9), 1e-2, learn_lr=True, learn_betas=True, learn_eps=True),
    "adam's steps": Adam(0.05, (0.8, 0.9), 1e-2, learn_lr="per_step"),
    "steps": GradientDescent(InverseTime(0.3, 5.0), learn_lr="per_step"),
    "momentum": Momentum(0.1, 0.7, learn_lr=True, learn_momentum=True),
    "nesterov": Nesterov(0.1, 0.7, learn_lr="per_step", learn_momentum=True),
    "heavy ball": HeavyBall(0.1, 0.7, learn_lr=True, learn_momentum=True),
    "accelerated": Accelerated(0.1, learn_lr=True),
    "aggregated": AggregatedDescent(0.2, 0.1, learn_lr=True),
}


@pytest.mark.parametrize("dynamics", DIFFERENTIATED.values(), ids=DIFFERENTIATED)
def test_derivatives_in_x_and_the_settings(dynamics):
    """Each by itself, so that a small one cannot hide, and away from theta = 0."""
    problem, x, y = bound(Nonlinear(), dynamics, 7)
    settings = {n: 0.1 + 0.05 * torch.arange(t.numel()).double().view_as(t) for n, t in x.items() if "/" in n}
    x = {**x, **settings}
    gradient, _ = reverse(problem, dynamics, x, y, 7)
    expected = differences(unrolled(problem, dynamics, y, 7), x)
    for name in x:
        assert relative(gradient[name], expected[name]) < 1e-6, name
        assert float(gradient[name].norm()) > 1e-6


def test_learnt_schedules_have_a_number_for_each_step():
    dynamics = DIFFERENTIATED["steps"]
    assert dynamics.learnable(7, {})["dynamics/log_lr_factor"].shape == (7,)
    x = {"dynamics/log_lr_factor": torch.arange(3.0)}
    rates = [float(dynamics.rate(x, t)) for t in range(4)]
    assert rates == pytest.approx([0.3 * 5 / (5 + t) * float(torch.tensor(min(t, 2.0)).exp()) for t in range(4)])


@pytest.mark.parametrize("name", ["lr", "b1", "b2", "eps"])
def test_derivative_of_adam_in_its_natural_settings(name):
    """d lr = lr d theta, d eps = eps d theta, d b = b (1 - b) d theta."""
    at = {"lr": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2}

    def objective(**change):
        s = {**at, **change}
        problem, x, y = bound(Nonlinear())
        return float(unrolled(problem, Adam(s["lr"], (s["b1"], s["b2"]), s["eps"]), y, 7)(x))

    step = 1e-5 * at[name]
    slope = (objective(**{name: at[name] + step}) - objective(**{name: at[name] - step})) / (2 * step)
    dynamics = DIFFERENTIATED["adam"]
    problem, x, y = bound(Nonlinear(), dynamics)
    gradient, _ = reverse(problem, dynamics, x, y, 7)
    chain = at[name] * (1 - at[name]) if name in ("b1", "b2") else at[name]
    key = {"lr": "log_lr_factor", "b1": "logit_beta1", "b2": "logit_beta2", "eps": "log_eps_factor"}[name]
    assert float(gradient[f"dynamics/{key}"]) == pytest.approx(chain * slope, rel=1e-6)


def rms(parameters):
    return torch.optim.RMSprop(parameters, lr=0.02, alpha=0.8, eps=1e-4)


def adam(parameters, eps=1e-14):
    return torch.optim.Adam(parameters, lr=0.05, betas=(0.8, 0.9), eps=eps)


HIGHER = {
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7), Momentum(0.1, 0.7)),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7, nesterov=True), Nesterov(0.1, 0.7)),
    "adam": (adam, Adam(0.05, (0.8, 0.9), 1e-14)),
    "rmsprop": (rms, None),
}
WARNS = pytest.mark.filterwarnings("ignore:Differentiable RMSprop suffers:UserWarning")


@WARNS
@pytest.mark.parametrize(("optimizer", "own"), HIGHER.values(), ids=HIGHER)
def test_higher_follows_torch(optimizer, own):
    task = Nonlinear()
    iterates = ran(HigherDynamics(optimizer), Nonlinear(), 12)
    stepper = optimizer(task.lower.parameters())
    for found in iterates:
        stepper.zero_grad()
        task.lower_loss(None).backward()
        stepper.step()
        assert relative(found, tree.detach(tree.of(task.lower))) < 1e-12


@WARNS
@pytest.mark.parametrize(("optimizer", "own"), HIGHER.values(), ids=HIGHER)
def test_hypergradient_through_higher(optimizer, own):
    problem, x, y = bound(Nonlinear())
    found, _ = reverse(problem, HigherDynamics(optimizer), x, y, 9)
    if own is None:
        assert relative(found, differences(unrolled(problem, HigherDynamics(optimizer), y, 9), x)) < 1e-6
    else:
        assert relative(found, reverse(problem, own, x, y, 9)[0]) < 1e-10
    for memory in ("recompute", "mixed"):
        assert relative(reverse(problem, HigherDynamics(optimizer), x, y, 9, memory=memory)[0], found) < 1e-11
    truncated, _ = reverse(problem, HigherDynamics(optimizer), x, y, 9, truncation=4)
    assert own is None or relative(truncated, reverse(problem, own, x, y, 9, truncation=4)[0]) < 1e-10


def test_higher_scales_the_eps_of_adam_otherwise():
    """Its denominator is sqrt(v) + eps before the correction of the bias; torch's and ours come after it."""
    ours, theirs = (ran(d, Nonlinear(), 1)[0] for d in (Adam(0.05, eps=0.01), HigherDynamics(lambda p: adam(p, 0.01))))
    assert relative(theirs, ours) > 1e-3


def test_what_higher_does_not_support():
    with pytest.raises(BilevelError, match="HigherDynamics.optimizer: .*Choose SGD, Adam or RMSprop"):
        HigherDynamics(lambda p: torch.optim.AdamW(p, lr=0.1))


def test_the_derivative_in_beta2_is_wrong_through_higher():
    """Its bias correction leaves torch. Ours agrees with finite differences, and the two runs are the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import higher
    problem, x, y = bound(Nonlinear())

    def objective(b2):
        return float(unrolled(problem, Adam(0.05, (0.8, b2), 1e-14), y, 7)(x))

    slope = (objective(0.9 + 1e-5) - objective(0.9 - 1e-5)) / 2e-5
    b2 = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    values = [t.clone().requires_grad_() for t in y.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = higher.get_diff_optim(adam(values), values, override={"betas": [(0.8, b2)]})
        for _ in range(7):
            values = list(optimizer.step(problem.g(x, dict(zip(y, values, strict=True))), params=values))
    end = problem.f(x, dict(zip(y, values, strict=True)))
    assert float(end.detach()) == pytest.approx(objective(0.9), rel=1e-12)
    (wrong,) = torch.autograd.grad(end, b2)
    assert abs(float(wrong) - slope) > 0.05 * abs(slope)
    dynamics = Adam(0.05, (0.8, 0.9), 1e-14, learn_betas=True)
    problem, x, y = bound(Nonlinear(), dynamics)
    ours = reverse(problem, dynamics, x, y, 7)[0]["dynamics/logit_beta2"]
    assert float(ours) / (0.9 * 0.1) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adam(betas=(0.0, 0.9), learn_betas=True), "Adam.betas must be in .* Learnt, it must not be 0"),
        (lambda: Momentum(0.1, 0.0, learn_momentum=True), "Momentum.momentum must be in .* Learnt, it must not be 0"),
        (lambda: AggregatedDescent(alpha=1.0), "AggregatedDescent.alpha must be in"),
        (lambda: AggregatedDescent(upper_lr=0.0), "AggregatedDescent.upper_lr must be a positive number"),
        (lambda: Anderson(history=0), "Anderson.history must be a positive number"),
        (lambda: Anderson(mixing=0.0), "Anderson.mixing must be in"),
        (lambda: Anderson(ridge=0.0), "Anderson.ridge must be a positive number"),
        (lambda: Anderson(Momentum()), "Anderson.map must not have memories of its own, as Momentum has"),
    ],
)
def test_impossible_settings_of_the_others(make, message):
    with pytest.raises(BilevelError, match=message):
        make()
