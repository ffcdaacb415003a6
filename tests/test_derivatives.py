"""Every rule of differentiation, and the losses that are hard to differentiate."""

import pytest
import torch
from loops import fit
from problems import Nonlinear, Quadratic, ScalarStronglyConvex, Vector, bound, flat, relative, unrolled
from problems import central_differences as differences
from torch import nn

from bilevel_lightning import (
    AID,
    BSGM,
    DARTS,
    RHG,
    SAMA,
    TRHG,
    Adam,
    AggregatedDescent,
    Anderson,
    BilevelError,
    BilevelProblem,
    BilevelTask,
    GradientDescent,
    HeavyBall,
    HigherDynamics,
    Momentum,
    Nesterov,
    algorithms,
    hypergradient,
    linear_solvers,
    tree,
)
from bilevel_lightning.algorithms.penalty import Loopless
from bilevel_lightning.hypergradients import LinearSystemWarning, reverse

RULES = ["graph", "recompute", "mixed", "differences"]


def hessians(problem, x, y):
    """The dense g_xy and g_yy by torch, with x and y flattened in the order of their names."""

    def loss(x_flat, y_flat):
        parts = []
        for values, vector in ((x, x_flat), (y, y_flat)):
            pieces = vector.split([t.numel() for t in values.values()])
            parts.append({n: p.view_as(t) for (n, t), p in zip(values.items(), pieces, strict=True)})
        return problem.g(*parts)

    (_, xy), (_, yy) = torch.autograd.functional.hessian(loss, (flat(x), flat(y)))
    return xy, yy


def cotangent(y):
    generator = torch.Generator().manual_seed(8)
    return {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in y.items()}


@pytest.mark.parametrize(("task", "radius", "error"), [(Nonlinear, 1e-4, 1e-6), (Quadratic, 0.01, 1e-9)])
@pytest.mark.parametrize("rule", RULES)
def test_products(rule, task, radius, error):
    problem, x, y = bound(task())
    xy, yy = hessians(problem, x, y)
    v, x, y = cotangent(y), tree.leaf(x), tree.leaf(y)
    g_y = problem.tracked_by(rule, radius).grad_g(x, y, track=True)
    assert relative(g_y, problem.grad_g(x, y)) < 1e-14
    d_x, d_y = tree.vjp([*g_y.values()], [*v.values()], x, y)
    bound_on_error = error if rule == "differences" else 1e-12
    assert relative(flat(d_x), xy @ flat(v)) < bound_on_error
    assert relative(flat(d_y), yy @ flat(v)) < bound_on_error


@pytest.mark.parametrize("rule", RULES)
def test_products_with_a_learnt_step_size(rule):
    """y' = y - 0.2 exp(theta) g_y: the derivative of <v, y'> in theta, x and y."""
    dynamics = GradientDescent(0.2, learn_lr=True)
    problem, x, y = bound(Nonlinear(), dynamics)
    own = {name: t for name, t in x.items() if "/" not in name}
    xy, yy = hessians(problem, own, y)
    v, x, y = cotangent(y), {**x, "dynamics/log_lr_factor": torch.tensor(0.3, dtype=torch.float64)}, tree.leaf(y)
    lr, x = 0.2 * float(torch.tensor(0.3, dtype=torch.float64).exp()), tree.leaf(x)
    (end,) = dynamics.step(problem.tracked_by(rule, 1e-4), x, (y,), 0, track=True)
    d_x, d_y = tree.vjp([*end.values()], [*v.values()], x, y)
    error = 1e-6 if rule == "differences" else 1e-12
    assert float(d_x.pop("dynamics/log_lr_factor")) == pytest.approx(-lr * float(tree.dot(v, problem.grad_g(x, y))))
    assert relative(flat(d_x), -lr * xy @ flat(v)) < error
    assert relative(flat(d_y), flat(v) - lr * yy @ flat(v)) < error


@pytest.mark.parametrize("rule", RULES)
def test_a_part_of_the_variables_may_need_no_derivative(rule):
    problem, x, y = bound(Nonlinear())
    xy, yy = hessians(problem, x, y)
    v, tracked = cotangent(y), problem.tracked_by(rule, 1e-4)
    error = 1e-6 if rule == "differences" else 1e-12
    leaf = tree.leaf(x)
    g_y = tracked.grad_g(leaf, y, track=True)
    assert relative(flat(tree.vjp([*g_y.values()], [*v.values()], leaf)[0]), xy @ flat(v)) < error
    leaf = tree.leaf(y)
    g_y = tracked.grad_g(x, leaf, track=True)
    assert relative(flat(tree.vjp([*g_y.values()], [*v.values()], leaf)[0]), yy @ flat(v)) < error
    shift = {"shift": x["shift"].clone().requires_grad_()}
    g_y = tracked.grad_g({**x, **shift}, {**y, "b": y["b"].clone().requires_grad_()}, track=True)
    assert relative(flat(tree.vjp([*g_y.values()], [*v.values()], shift)[0]), (xy @ flat(v))[3:]) < error


def test_differences_take_two_gradients():
    task = Nonlinear()
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    problem, x, y = bound(task)
    v, x, y = cotangent(y), tree.leaf(x), tree.leaf(y)
    g_y = problem.tracked_by("differences").grad_g(x, y, track=True)
    assert problem.counts["lower_gradients"] == 1
    tree.vjp([*g_y.values()], [*v.values()], x, y)
    assert problem.counts["lower_gradients"] == 3
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in task.named_parameters())


def test_differences_of_a_zero_cotangent():
    problem, x, y = bound(Nonlinear())
    x, y = tree.leaf(x), tree.leaf(y)
    g_y = problem.tracked_by("differences").grad_g(x, y, track=True)
    d_x, d_y = tree.vjp([*g_y.values()], [*tree.zeros_like(y).values()], x, y)
    assert not flat(d_x).any()
    assert not flat(d_y).any()


class Dropped(Nonlinear):
    def lower_loss(self, batch):
        keep = torch.nn.functional.dropout(torch.ones(12, dtype=torch.float64), 0.5)
        return (keep * self.residual(0.1 * self.upper.shift).square()).mean()


@pytest.mark.parametrize("rule", ["recompute", "mixed", "differences"])
def test_dropout_has_one_mask_in_all_evaluations(rule):
    """Through two lower steps with masks of their own; afterwards the generator is where it would be without."""
    results = []
    for r in ("graph", rule):
        torch.manual_seed(3)
        problem, x, y = bound(Dropped())
        x, state = tree.leaf(x), (y,)
        for t in range(2):
            state = GradientDescent(0.3).step(problem.tracked_by(r, 1e-4), x, state, t, track=True)
        results.append(tree.vjp([*state[0].values()], [*cotangent(y).values()], x)[0])
        results[-1]["next"] = torch.rand(1, dtype=torch.float64)
    assert relative(results[1], results[0]) < (1e-6 if rule == "differences" else 1e-12)


class Attentive(BilevelTask):
    """A transformer layer below; above, the scales of its inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inputs, self.targets = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 4).double()
        self.upper = Vector(scale=torch.tensor([1.0, 0.5, -0.5, 2.0]).double())
        self.lower = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).double()

    def lower_loss(self, batch):
        return (self.lower(self.upper.scale * self.inputs) - self.targets).square().mean()

    def upper_loss(self, batch):
        return (self.lower(self.inputs) - self.targets.flip(0)).square().mean()


@pytest.fixture(scope="module")
def attention_differences():
    dynamics = GradientDescent(0.1)
    problem, x, y = bound(Attentive())
    return differences(unrolled(problem, dynamics, y, 3), x)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("RHG", {"memory": "graph"}),
        ("RHG", {"memory": "recompute"}),
        ("RHG", {"memory": "mixed"}),
        ("ForwardHG", {}),
    ],
)
def test_attention(method, settings, attention_differences):
    found = hypergradient(Attentive(), method=method, dynamics=GradientDescent(0.1), lower_steps=3, **settings)
    assert relative(found, attention_differences) < 1e-7
    again = hypergradient(Attentive(), dynamics=GradientDescent(0.1), lower_steps=3)
    assert relative(found, again) < 1e-12


def test_attention_by_differences():
    """DARTS and T-RHG with K = 1 differ by the error of central differences."""
    darts = hypergradient(Attentive(), method="DARTS", radius=1e-3)
    assert relative(darts, hypergradient(Attentive(), method="TRHG", truncation=1, lower_steps=1)) < 1e-5


def test_attention_by_implicit_differentiation():
    """The formula with damping at y_0: f_x - g_xy (g_yy + d I)^{-1} f_y, from dense second derivatives."""
    problem, x, y = bound(Attentive())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        xy, yy = hessians(problem, x, y)
    f_x, f_y = problem.grad_f(x, y)
    damped = yy + 10 * torch.eye(len(yy), dtype=torch.float64)
    expected = flat(f_x) - xy @ torch.linalg.solve(damped, flat(f_y))
    solver = linear_solvers.ConjugateGradient(100, damping=10.0)
    found = hypergradient(Attentive(), method="AIDCG", lower_steps=0, linear_solver=solver)
    assert relative(flat(found), expected) < 1e-9


def attention_flags():
    backends = torch.backends.cuda
    return backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.cudnn_sdp_enabled()


@pytest.mark.parametrize("flash", [True, False])
def test_attention_flags_are_restored(flash):
    before = torch.backends.cuda.flash_sdp_enabled()
    try:
        torch.backends.cuda.enable_flash_sdp(flash)
        flags = attention_flags()
        for method, settings in (("RHG", {}), ("RHG", {"memory": "mixed"}), ("DARTS", {}), ("ForwardHG", {})):
            hypergradient(Attentive(), method=method, lower_steps=1, **settings)
            assert attention_flags() == flags

        def fails(x, y):
            raise RuntimeError("in the loss")

        with pytest.raises(RuntimeError, match="in the loss"):
            hypergradient((fails, fails), {"x": torch.ones(1)}, {"y": torch.ones(1)}, lower_steps=1)
        assert attention_flags() == flags
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


class Normalised(BilevelTask):
    """Batch normalisation below, in training mode; above, a weight for each sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inputs, self.targets = torch.randn(6, 3).double(), torch.randn(6, 2).double()
        self.upper = Vector(weight=torch.linspace(-1, 1, 6).double())
        self.lower = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()

    def lower_loss(self, batch):
        errors = (self.lower(self.inputs) - self.targets).square().mean(1)
        return (self.upper.weight.sigmoid() * errors).mean()

    def upper_loss(self, batch):
        return (self.lower(self.inputs.flip(1)) - self.targets).square().mean()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("RHG", {"memory": "graph"}),
        ("RHG", {"memory": "recompute"}),
        ("RHG", {"memory": "mixed"}),
        ("ForwardHG", {}),
    ],
)
def test_batch_normalisation(method, settings):
    task, dynamics = Normalised(), GradientDescent(0.3)
    before = {name: t.clone() for name, t in task.named_buffers()}
    found = hypergradient(task, method=method, dynamics=dynamics, lower_steps=4, **settings)
    assert all(torch.equal(t, before[name]) for name, t in task.named_buffers())
    problem, x, y = bound(task)
    assert relative(found, differences(unrolled(problem, dynamics, y, 4), x)) < 1e-7


LEARN_THE_START = {"ANIL", "FOMAML", "IMAML", "MAML", "MetaSGD", "Reptile"}  # tests/algorithms/test_maml.py
NAMES = [
    name
    for name in algorithms.__all__
    if getattr(algorithms, name).estimates_hypergradient and name not in LEARN_THE_START
]


def test_methods_without_a_hypergradient_at_one_point_say_so():
    without = {"VPBGD", "GPBGD", "BOME", "BVFSM", "MEHA", "IMAML", "Reptile", "BAMM"}
    without |= {"SOBA", "MASOBA", "SABA", "SRBA", "FSLA", "MRBO", "SUSTAIN", "VRBO"}
    assert without == {name for name in algorithms.__all__ if not getattr(algorithms, name).estimates_hypergradient}
    for name in without:
        with pytest.raises(BilevelError, match=rf"The direction of {name} at one point is no hypergradient.*F2SA"):
            hypergradient(Quadratic(), method=name)


def fine(name):
    """Few random directions, few columns."""
    return {"FG2U": {"directions": 2}, "PZOBO": {"directions": 2}, "TRHG": {"truncation": 1}}.get(name, {})


@pytest.mark.filterwarnings("ignore::bilevel_lightning.hypergradients.LinearSystemWarning")
@pytest.mark.parametrize("name", sorted({*algorithms.__all__} - LEARN_THE_START))
def test_running_statistics_advance_once_in_an_upper_iteration(name):
    task = Normalised()
    algorithm = getattr(algorithms, name)
    module = algorithm(task=task, **({} if issubclass(algorithm, Loopless) else {"lower_steps": 3}), **fine(name))
    fit(module, 2)
    assert int(task.lower[1].num_batches_tracked) == 2


def test_running_statistics_are_those_of_the_new_y():
    """running_mean <- 0.9 running_mean + 0.1 mean, from zero, at y_1 and at y_2."""
    means, task = [], Normalised()
    for _ in range(2):
        fit(RHG(task=task, lower_steps=3), 1)
        means.append(task.lower[0](task.inputs).mean(0).detach())
    torch.testing.assert_close(task.lower[1].running_mean, 0.09 * means[0] + 0.1 * means[1])


def test_frozen_parameters_are_left_out():
    task = Nonlinear()
    task.lower.b.requires_grad_(False)
    task.upper.log_ridge.requires_grad_(False)
    before = tree.clone(dict(task.named_parameters()))
    dense = {"linear_solver": linear_solvers.Dense(damping=9.0)}  # this lower level is not convex
    for name in ("RHG", "AID", "DARTS", "ForwardHG", "PZOBO"):
        found = hypergradient(task, method=name, lower_steps=3, **(dense if name == "AID" else {}))
        assert list(found) == ["shift"]
    problem, x, y = bound(task)
    expected = differences(unrolled(problem, GradientDescent(), y, 3), x)
    assert list(y) == ["w"]
    assert relative(hypergradient(task, lower_steps=3), expected) < 1e-7
    fit(RHG(task=task, lower_steps=3), 2)
    after = dict(task.named_parameters())
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"upper.shift", "lower.w"}
    assert not task.lower.b.requires_grad
    assert not task.upper.log_ridge.requires_grad


class Tied(Nonlinear):
    """One tensor, two names: the weight of the features and of their squares."""

    def __init__(self):
        super().__init__()
        self.lower.again = self.lower.w

    def residual(self, shift):
        return super().residual(shift) + self.inputs.square() @ self.lower.again


@pytest.mark.parametrize(
    ("method", "settings"),
    [("RHG", {}), ("RHG", {"memory": "recompute"}), ("RHG", {"memory": "mixed"}), ("ForwardHG", {})],
)
def test_tied_parameters_are_one_variable(method, settings):
    task = Tied()
    found = hypergradient(task, method=method, dynamics=GradientDescent(0.05), lower_steps=4, **settings)
    _, x, y = bound(task)
    assert sorted(y) == ["b", "w"]
    by_hand = Nonlinear()
    by_hand.residual = lambda shift: (
        Nonlinear.residual(by_hand, shift) + by_hand.inputs.square() @ by_hand.lower.w  # w itself in both places
    )
    objective = unrolled(bound(by_hand)[0], GradientDescent(0.05), y, 4)
    assert relative(found, differences(objective, x)) < 1e-7


class Unused(Quadratic):
    def __init__(self):
        super().__init__()
        self.upper.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.lower.idle = nn.Parameter(torch.ones(2, 1, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_unused_variables(name):
    """Both levels ignore them: zero above, and below as if they were not there."""
    settings = {"lower_steps": 3, **fine(name)}
    if name in ("FG2U", "PZOBO", "Nystrom"):  # their random numbers depend on the number of variables
        found = hypergradient(Unused(), method=name, **settings)
        assert all(torch.isfinite(t).all() for t in found.values())
        return
    torch.manual_seed(0)  # BSA and TTSA draw which term they take
    found = hypergradient(Unused(), method=name, **settings)
    assert not found.pop("idle").any()
    if name == "IAPTTGM":  # whose start is learnt, of the idle lower variable too
        assert not found.pop("auxiliary/idle").any()
    torch.manual_seed(0)
    assert relative(found, hypergradient(Quadratic(), method=name, **settings)) < 1e-12


def test_an_upper_loss_of_an_idle_lower_variable_is_singular():
    class Idle(Unused):
        def upper_loss(self, batch):
            return super().upper_loss(batch) + self.lower.idle.sum()

    assert relative(hypergradient(Idle(), lower_steps=3), hypergradient(Unused(), lower_steps=3)) < 1e-14
    with pytest.warns(LinearSystemWarning, match="g_yy is singular"):
        hypergradient(Idle(), method="AIDCG", lower_steps=3)


DYNAMICS = {
    "gradient descent": GradientDescent(0.2),
    "momentum": Momentum(0.2, 0.5),
    "nesterov": Nesterov(0.2, 0.5),
    "heavy ball": HeavyBall(0.2, 0.5),
    "adam": Adam(0.1),
    "anderson": Anderson(GradientDescent(0.2)),
    "higher sgd": HigherDynamics(lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5)),
    "higher adam": HigherDynamics(lambda p: torch.optim.Adam(p, lr=0.1)),
    "aggregated": AggregatedDescent(0.2),
}


IMPLICIT = {name for name in algorithms.__all__ if issubclass(getattr(algorithms, name), AID)}
STEPWISE = {"AIDNeumann", "AIDFP", *(name for name in IMPLICIT if issubclass(getattr(algorithms, name), BSGM))}


def refused(name, dynamics):
    """Solvers that step along the residual need a step size of the kind of gradient descent's."""
    if name in STEPWISE:
        return dynamics in ("adam", "higher sgd", "higher adam", "aggregated")
    return name in IMPLICIT and dynamics == "aggregated"


# The Adam of `higher` has no derivative at zero gradients in forward mode; `HigherDynamics` says so.
WITHOUT = {("FG2U", "higher adam"), ("ForwardHG", "higher adam")}
EXACT = [name for name in NAMES if name != "F2SA"]  # its f moves y
COMBINATIONS = [(n, d) for n in EXACT for d in DYNAMICS if not refused(n, d) and (n, d) not in WITHOUT]


def lower(x, y):
    return 0.5 * x["x"].exp() * (y["y"] - 1).square().sum()


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_dynamics_stay_at_the_solution(dynamics):
    """At all steps, exactly; but for `AggregatedDescent`, which f moves."""
    f = (lambda x, y: (y["y"] - 1).square().sum()) if dynamics == "aggregated" else lambda x, y: y["y"].sum()
    problem = BilevelProblem(f, lower)
    x, y = {"x": torch.tensor(0.3).double()}, {"y": torch.ones(2).double()}
    state = DYNAMICS[dynamics].start(y)
    for t in range(12):
        state = DYNAMICS[dynamics].step(problem, x, state, t)
        torch.testing.assert_close(state[0]["y"], y["y"], rtol=1e-15, atol=0)


@pytest.mark.parametrize(("name", "dynamics"), COMBINATIONS)
def test_start_at_the_solution(name, dynamics):
    """g = exp(x) |y - 1|^2 / 2 from y = 1: g_y and g_xy are zero, so y stays and the hypergradient is f_x = y."""
    upper = lambda x, y: 0.5 * (y["y"] - 3).square().sum() + x["x"] * y["y"].sum()
    x, y = {"x": torch.tensor(0.3).double()}, {"y": torch.ones(2).double()}
    settings = {"dynamics": DYNAMICS[dynamics], "lower_steps": 8, **fine(name)}
    found = hypergradient((upper, lower), x, y, method=name, **settings)
    if dynamics == "aggregated":  # f moves y
        assert torch.isfinite(found["x"])
    else:
        assert float(found["x"]) == pytest.approx(2.0, abs=1e-9)


@pytest.mark.parametrize(("name", "dynamics"), COMBINATIONS)
def test_all_gradients_are_zero(name, dynamics):
    upper = lambda x, y: 0.5 * (y["y"] - 1).square().sum() + 2 * x["x"]
    x, y = {"x": torch.tensor(0.3).double()}, {"y": torch.ones(2).double()}
    settings = {"dynamics": DYNAMICS[dynamics], "lower_steps": 3, **fine(name)}
    if name in IMPLICIT:
        with pytest.warns(LinearSystemWarning, match="f_y is zero at y"):
            found = hypergradient((upper, lower), x, y, method=name, **settings)
    else:
        found = hypergradient((upper, lower), x, y, method=name, **settings)
    assert float(found["x"]) == 2.0


@pytest.mark.parametrize("name", [name for name in EXACT if name not in ("BSA", "TTSA")])
def test_one_lower_variable(name):
    """x = y = 2, lr = 1: one step solves g = y^2 / 2 - x y, and the hypergradient is x - 1 + y* = 3.

    BSA and TTSA draw a term of the series, of which all but the first are zero here. That of PZOBO is x - 1 + y* mean
    u^2 with its Gaussian u, whose mean square tends to 1.
    """
    settings = {
        "FG2U": {"directions": 1},
        "PZOBO": {"directions": 50},
        "TRHG": {"truncation": 1},
        "Nystrom": {"linear_solver": linear_solvers.Nystrom(1, damping=1e-8)},
    }.get(name, {})
    torch.manual_seed(0)
    found = hypergradient(ScalarStronglyConvex(), method=name, dynamics=GradientDescent(1.0), lower_steps=2, **settings)
    assert found["x"].shape == ()
    torch.manual_seed(0)
    draws = torch.stack([torch.randn((), dtype=torch.float64) for _ in range(50)])
    exact = 1 + 2 * float(draws.square().mean()) if name == "PZOBO" else 3.0
    assert float(found["x"]) == pytest.approx(exact, abs=1e-7 if name == "Nystrom" else 1e-9)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("dynamics", [GradientDescent(0.2), Momentum(0.2, 0.7), Adam(0.1)])
def test_darts_is_truncation_to_one_step(dynamics, steps):
    darts = hypergradient(Quadratic(), method="DARTS", dynamics=dynamics, lower_steps=steps)
    truncated = hypergradient(Quadratic(), method="TRHG", dynamics=dynamics, lower_steps=steps, truncation=1)
    assert relative(darts, truncated) < 1e-9


@pytest.mark.parametrize("radius", [0.01, 0.5])
def test_darts_is_its_formula(radius):
    """f_x(x, y') - lr (g_x(x, y+) - g_x(x, y-)) / (2 eps), y+- = y +- eps f_y(x, y'), eps = radius / |f_y|."""
    problem, x, y = bound(Nonlinear())
    step = DARTS(dynamics=GradientDescent(0.2), radius=radius).bilevel_step(problem, x, y)
    moved = tree.axpy(-0.2, problem.grad_g(x, y), y)
    f_x, f_y = problem.grad_f(x, moved)
    eps = radius / float(flat(f_y).norm())

    def g_x(y):
        leaf = tree.leaf(x)
        return tree.grad(problem.g(leaf, y), leaf)[0]

    difference = tree.axpy(-1.0, g_x(tree.axpy(-eps, f_y, y)), g_x(tree.axpy(eps, f_y, y)))
    assert relative(step.upper_grad, tree.axpy(-0.2 / (2 * eps), difference, f_x)) < 1e-12
    assert relative(step.lower, moved) == 0


def sama(problem, x, y, m, v, t, lr, b1, b2, small, radius):
    """One iteration of SAMA as its docstring has it, du/dg by hand: h, y', and the memories."""
    g, new_m, new_v, moved, slope = problem.grad_g(x, y), {}, {}, {}, {}
    c1, c2 = 1 - b1**t, 1 - b2**t
    for n in y:
        new_m[n] = b1 * m[n] + (1 - b1) * g[n]
        new_v[n] = b2 * v[n] + (1 - b2) * g[n] ** 2
        mean, root = new_m[n] / c1, (new_v[n] / c2).sqrt()
        moved[n] = y[n] - lr * mean / (root + small)
        through_m = (1 - b1) / c1 / (root + small)
        through_v = mean / (root + small) ** 2 * (1 - b2) * g[n] / c2 / root
        slope[n] = lr * (through_m - through_v)
    f_x, f_y = problem.grad_f(x, moved)
    direction = {n: slope[n] * f_y[n] for n in y}
    eps = radius / float(flat(direction).norm())

    def g_x(y):
        leaf = tree.leaf(x)
        return tree.grad(problem.g(leaf, y), leaf)[0]

    plus, minus = g_x(tree.axpy(eps, direction, y)), g_x(tree.axpy(-eps, direction, y))
    h = {n: f_x[n] - (plus[n] - minus[n]) / (2 * eps) for n in x}
    return h, moved, new_m, new_v


SETTINGS = {"lr": 0.05, "b1": 0.8, "b2": 0.9, "small": 1e-3}
ADAM = Adam(0.05, (0.8, 0.9), 1e-3)


def test_sama_is_its_formula():
    problem, x, y = bound(Nonlinear())
    step = SAMA(dynamics=ADAM, radius=0.1).bilevel_step(problem, x, y)
    zeros = tree.zeros_like(y)
    h, moved, _, _ = sama(problem, x, y, zeros, zeros, 1, radius=0.1, **SETTINGS)
    assert relative(step.upper_grad, h) < 1e-11
    assert relative(step.lower, moved) < 1e-14


@pytest.mark.parametrize("warm_start", [True, False])
def test_sama_keeps_the_memories_of_adam(warm_start):
    """Five upper iterations with SGD above: x and y of the whole run; without a warm start all begins anew."""
    task = Nonlinear()
    problem, x, y = bound(Nonlinear())
    first, zeros = y, tree.zeros_like(y)
    m, v = zeros, zeros
    for k in range(5):
        t = k + 1
        if not warm_start:
            y, m, v, t = first, zeros, zeros, 1
        h, y, m, v = sama(problem, x, y, m, v, t, radius=0.1, **SETTINGS)
        x = tree.axpy(-0.5, h, x)
    sgd = lambda p: torch.optim.SGD(p, lr=0.5)
    module = SAMA(task=task, dynamics=ADAM, radius=0.1, upper_optimizer=sgd, warm_start=warm_start)
    fit(module, 5)
    assert relative(tree.detach(tree.of(task.upper)), x) < 1e-10
    assert relative(tree.detach(tree.of(task.lower)), y) < 1e-10


def test_memories_of_several_lower_steps_go_on_at_their_step():
    """DARTS with 3 steps of Adam an iteration, x fixed: y after 4 iterations is 12 steps of Adam in one run."""
    task, dynamics = Nonlinear(), Adam(0.05)
    problem, x, y = bound(Nonlinear())
    state = dynamics.start(y)
    for t in range(12):
        state = dynamics.step(problem, x, state, t)
    still = lambda p: torch.optim.SGD(p, lr=1e-300)
    module = DARTS(task=task, dynamics=dynamics, lower_steps=3, upper_optimizer=still)
    fit(module, 4)
    assert relative(tree.detach(tree.of(task.lower)), state[0]) < 1e-13
    assert sorted(module.states) == ["memory0", "memory1"]
    assert relative(module.kept("memory1"), state[2]) < 1e-12


def test_truncation_needs_no_derivative_of_the_first_steps():
    """T-RHG by any rule agrees with the others, also where the rule is forward over reverse."""
    results = [
        hypergradient(Nonlinear(), method=TRHG, truncation=3, lower_steps=9, memory=memory)
        for memory in ("graph", "recompute", "mixed")
    ]
    assert relative(results[1], results[0]) < 1e-12
    assert relative(results[2], results[0]) < 1e-12
    problem, x, y = bound(Nonlinear())
    by_differences, _ = reverse(problem, GradientDescent(), x, y, 9, truncation=3, memory="differences", radius=1e-4)
    assert relative(by_differences, results[0]) < 1e-6


class Single(Nonlinear):
    """In float32, with factors before scalars in the lower loss."""

    def __init__(self):
        super().__init__()
        self.inputs, self.targets = self.inputs.float(), self.targets.float()
        self.float()

    def lower_loss(self, batch):
        penalty = (0.5 * self.lower.w.square().sum()).exp()
        return super().lower_loss(batch) + 0.5 * self.upper.log_ridge.exp().sum() * penalty


class Double(Single):
    def __init__(self):
        Nonlinear.__init__(self)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("RHG", {"memory": "graph"}),
        ("RHG", {"memory": "recompute"}),
        ("RHG", {"memory": "mixed"}),
        ("ForwardHG", {}),
        ("FG2U", {"directions": 2}),
    ],
)
def test_single_precision(method, settings):
    found = hypergradient(Single(), method=method, lower_steps=5, **settings)
    assert all(t.dtype == torch.float32 for t in found.values())
    if method != "FG2U":
        assert relative(flat(found).double(), flat(hypergradient(Double(), lower_steps=5))) < 1e-5
