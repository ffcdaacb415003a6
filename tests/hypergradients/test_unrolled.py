import weakref

import pytest
import torch
from problems import Contraction, FromX, Nonlinear, Quadratic, ScalarMerelyConvex, ScalarStronglyConvex

from bilevel_lightning import Adam, FixedPoint, GradientDescent, HeavyBall, Momentum, Nesterov, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.hypergradients import reverse
from bilevel_lightning.schedules import InverseTime

DYNAMICS = {
    "gradient descent": GradientDescent(0.2),
    "decreasing step": GradientDescent(InverseTime(0.3, 5.0)),
    "learnt step": GradientDescent(0.2, learn_lr=True),
    "momentum": Momentum(0.1, 0.8),
    "nesterov": Nesterov(0.1, 0.8, learn_lr=True),
    "adam": Adam(0.05, learn_lr=True),
}


def setup(task, dynamics):
    learnable = {name: t.double() for name, t in dynamics.learnable(12, {}).items()}
    problem, x, _ = bind(task, None, {**tree.detach(tree.of(task.upper)), **learnable}, lambda v: v)
    return problem, x, tree.detach(tree.of(task.lower))


def flat(values):
    return torch.cat([t.flatten() for t in values.values()])


def relative(a, b):
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


@pytest.mark.parametrize("truncation", [None, 1, 7])
@pytest.mark.parametrize("dynamics", DYNAMICS.values(), ids=DYNAMICS)
def test_recomputing_equals_the_graph(dynamics, truncation):
    problem, x, y = setup(Nonlinear(), dynamics)
    graph, y_graph = reverse(problem, dynamics, x, y, 15, truncation=truncation, memory="graph")
    recomputed, y_recomputed = reverse(problem, dynamics, x, y, 15, truncation=truncation, memory="recompute")
    assert relative(recomputed, graph) < 1e-12
    assert all(torch.equal(y_graph[name], y_recomputed[name]) for name in y)


@pytest.mark.parametrize("memory", ["graph", "recompute", "mixed"])
@pytest.mark.parametrize("dynamics", DYNAMICS.values(), ids=DYNAMICS)
def test_full_truncation_is_no_truncation(dynamics, memory):
    problem, x, y = setup(Nonlinear(), dynamics)
    full, _ = reverse(problem, dynamics, x, y, 9, memory=memory)
    assert relative(reverse(problem, dynamics, x, y, 9, truncation=9, memory=memory)[0], full) == 0
    assert relative(reverse(problem, dynamics, x, y, 9, truncation=8, memory=memory)[0], full) > 1e-6


@pytest.mark.parametrize("dynamics", DYNAMICS.values(), ids=DYNAMICS)
def test_finite_differences(dynamics):
    """Every entry of every upper variable, the learnt step sizes included."""
    problem, x, y = setup(Nonlinear(), dynamics)

    def objective(x):
        state = dynamics.start(y)
        for t in range(12):
            state = dynamics.step(problem, x, state, t)
        return problem.f(x, state[0])

    gradient, _ = reverse(problem, dynamics, x, y, 12)
    differences = {}
    for name, value in x.items():
        column = torch.zeros(value.numel(), dtype=torch.float64)
        for i in range(value.numel()):
            shift = torch.zeros_like(value).flatten()
            shift[i] = 1e-5
            shift = shift.view_as(value)
            column[i] = (objective({**x, name: value + shift}) - objective({**x, name: value - shift})) / 2e-5
        differences[name] = column.view_as(value)
    assert relative(gradient, differences) < 1e-6
    if dynamics.learnable(12, {}):
        assert gradient["dynamics/log_lr_factor"].abs() > 1e-6


@pytest.mark.parametrize("truncation", [1, 4, 30])
def test_closed_form_of_gradient_descent(truncation):
    task = Quadratic()
    problem, x, y = setup(task, GradientDescent(0.15))
    gradient, _ = reverse(problem, GradientDescent(0.15), x, y, 30, truncation=truncation)
    expected = task.unrolled(x["x"], task.y().detach(), 0.15, 30, truncation)
    assert float((gradient["x"] - expected).norm() / expected.norm()) < 1e-13


def test_an_independent_unrolling():
    """A loop of plain autograd without any of the package's parts."""
    task = Nonlinear()
    problem, x, y = setup(task, GradientDescent(0.2))
    gradient, y_end = reverse(problem, GradientDescent(0.2), x, y, 10)
    shift, ridge = x["shift"].clone().requires_grad_(), x["log_ridge"].clone().requires_grad_()
    w, b = y["w"].clone().requires_grad_(), y["b"].clone().requires_grad_()
    for _ in range(10):
        residual = torch.tanh(task.inputs @ w + b) - task.targets - 0.1 * shift
        g = residual.square().mean() + 0.1 * (ridge.exp() * w.square()).sum()
        g_w, g_b = torch.autograd.grad(g, (w, b), create_graph=True)
        w, b = w - 0.2 * g_w, b - 0.2 * g_b
    f = (torch.tanh(task.inputs @ w + b) - task.targets).square().mean() + 0.01 * ridge.square().sum()
    d_ridge, d_shift = torch.autograd.grad(f, (ridge, shift))
    assert relative(gradient, {"log_ridge": d_ridge, "shift": d_shift}) < 1e-14
    assert relative(y_end, {"w": w.detach(), "b": b.detach()}) < 1e-14


@pytest.mark.parametrize("memory", ["graph", "recompute", "mixed"])
@pytest.mark.parametrize(
    ("task", "truncation", "limit"),
    [
        (ScalarStronglyConvex, None, {"x": 0.502899}),
        (ScalarStronglyConvex, 10, {"x": 0.528366}),
        (ScalarStronglyConvex, 2, {"x": 0.735294}),
        (ScalarMerelyConvex, None, {"x": 0.502130, "y2": 0.01}),
    ],
)
def test_limits_of_training_with_warm_start(task, truncation, limit, memory):
    """s = 0.2, T = 20, upper step 0.1, 100 upper iterations, y kept: the closed-form limits, to 1e-5.

    With q_K = 0.8^K they are 1 / (2 - q_K), and (q' + 0.01) / (1 + q') with q' = 1 - q_20 for the merely convex one,
    whose true solution is 1: y2 has no lower gradient and stays where it began.
    """
    problem, x, y = setup(task(), GradientDescent(0.2))
    for _ in range(100):
        gradient, y = reverse(problem, GradientDescent(0.2), x, y, 20, truncation=truncation, memory=memory)
        x = tree.axpy(-0.1, gradient, x)
    for name, value in limit.items():
        assert float({**x, **y}[name]) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("memory", ["graph", "recompute", "mixed"])
@pytest.mark.parametrize("dynamics", [Momentum(0.1, 0.5), HeavyBall(0.1, 0.7)])
def test_derivative_through_the_start(memory, dynamics):
    task = FromX()
    problem, x, _ = setup(task, dynamics)

    def objective(x):
        state = dynamics.start(task.initial_lower(x))
        for t in range(5):
            state = dynamics.step(problem, x, state, t, track=True)
        return problem.f(x, state[0])

    leaves = tree.leaf(x)
    expected = tree.grad(objective(leaves), leaves)[0]
    y0 = tree.detach(task.initial_lower(x))
    gradient, _ = reverse(problem, dynamics, x, y0, 5, memory=memory)
    assert relative(gradient, expected) < 1e-13
    assert relative(reverse(problem, dynamics, x, y0, 5, truncation=4, memory=memory)[0], expected) > 1e-3


@pytest.mark.parametrize("memory", ["graph", "recompute", "mixed"])
def test_fixed_point_maps(memory):
    task = Contraction()
    problem, x, y = setup(task, FixedPoint())
    gradient, y = reverse(problem, FixedPoint(), x, y, 60, memory=memory)
    inverse = torch.linalg.inv(torch.eye(5, dtype=torch.float64) - task.m)
    assert relative(y, {"y": inverse @ x["x"]}) < 1e-14
    assert relative(gradient, {"x": inverse.T @ (inverse @ x["x"] - task.c)}) < 1e-14
    # the first step is linear in x and starts at a constant: nothing of it has to be evaluated again
    assert problem.counts["fixed_point_maps"] == (60 if memory == "graph" else 119)


class Boxed(Nonlinear):
    """Projected on a box whose size is an upper variable's."""

    def project_lower(self, upper, lower):
        bound = 0.05 * upper["shift"].square().mean()
        return {**lower, "w": torch.minimum(torch.maximum(lower["w"], -bound), bound)}


@pytest.mark.parametrize("memory", ["graph", "recompute", "mixed"])
def test_projection_is_differentiated(memory):
    dynamics, task = GradientDescent(0.2), Boxed()
    problem, x, y = setup(task, dynamics)
    gradient, y_end = reverse(problem, dynamics, x, y, 8, memory=memory)
    assert y_end["w"].abs().max() <= 0.05 * x["shift"].square().mean() + 1e-15

    def objective(shift):
        _, y_end = reverse(problem, dynamics, {**x, "shift": shift}, y, 8)
        return problem.f({**x, "shift": shift}, y_end)

    for i in range(3):
        e = torch.zeros(12, dtype=torch.float64)
        e[i] = 1e-6
        difference = (objective(x["shift"] + e) - objective(x["shift"] - e)) / 2e-6
        assert float(gradient["shift"][i]) == pytest.approx(float(difference), rel=1e-6)


class Dropped(Nonlinear):
    def lower_loss(self, batch):
        keep = torch.nn.functional.dropout(torch.ones(12, dtype=torch.float64), 0.5)
        return (keep * self.residual(0.1 * self.upper.shift).square()).mean()


def test_random_losses_are_replayed():
    problem, x, y = setup(Dropped(), GradientDescent(0.2))
    results = []
    for memory in ("graph", "recompute"):
        torch.manual_seed(5)
        results.append(reverse(problem, GradientDescent(0.2), x, y, 10, memory=memory)[0])
        results[-1]["after"] = torch.rand(1)
    assert relative(results[1], results[0]) < 1e-13


class Live:
    """Counts the bytes that autograd keeps, by saved-tensor hooks; what is saved twice counts once."""

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.kept[storage.data_ptr()] = self.kept.get(storage.data_ptr(), 0) + 1
        self.bytes[storage.data_ptr()] = storage.nbytes()
        self.peak = max(self.peak, sum(self.bytes[p] for p in self.kept))
        return _Held(self, tensor)

    def count(self, memory, steps, truncation=None):
        self.kept, self.bytes, self.peak = {}, {}, 0
        problem, x, y = setup(Nonlinear(), Momentum(0.1, 0.8))
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor):
            reverse(problem, Momentum(0.1, 0.8), x, y, steps, truncation=truncation, memory=memory)
        return self.peak


class _Held:
    def __init__(self, live, tensor):
        self.live, self.tensor, self.key = live, tensor, tensor.untyped_storage().data_ptr()

    def __del__(self):
        self.live.kept[self.key] -= 1
        if not self.live.kept[self.key]:
            del self.live.kept[self.key]


STATE = 8 * 4  # bytes of y


def test_memory_of_the_modes():
    live = Live()
    assert live.count("recompute", 40) - live.count("recompute", 5) <= 35 * STATE
    assert live.count("graph", 40) - live.count("graph", 5) > 10 * 35 * STATE
    for memory in ("graph", "recompute"):
        assert live.count(memory, 200, truncation=5) == live.count(memory, 20, truncation=5)


def test_recompute_holds_k_states():
    """Of T = 30 iterates T-RHG keeps the last K = 4, and lets go of each as soon as it is differentiated."""
    alive = weakref.WeakSet()
    peak = []

    class Watched(GradientDescent):
        def step(self, problem, x, state, t, *, track=False):
            out = super().step(problem, x, state, t, track=track)
            alive.add(out[0]["w"])
            peak.append(len(alive))
            return out

    problem, x, y = setup(Nonlinear(), GradientDescent(0.2))
    reverse(problem, Watched(0.2), x, y, 30, truncation=4, memory="recompute")
    assert max(peak) <= 5  # the K states and the one being made
