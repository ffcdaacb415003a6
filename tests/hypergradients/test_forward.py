import pytest
import torch
from problems import Contraction, FromX, Nonlinear, Quadratic, Vector, bound, flat, relative, unrolled
from problems import central_differences as differences

from bilevel_lightning import (
    FG2U,
    PZOBO,
    RHG,
    Adam,
    AggregatedDescent,
    Anderson,
    BilevelError,
    BilevelTask,
    FixedPoint,
    ForwardHG,
    GradientDescent,
    HeavyBall,
    HigherDynamics,
    Momentum,
    Nesterov,
    hypergradient,
    tree,
)
from bilevel_lightning.hypergradients import first_order, forward, random_forward, reverse, slopes, zeroth_order
from bilevel_lightning.schedules import InverseTime

DYNAMICS = {
    "gradient descent": GradientDescent(0.2),
    "decreasing step": GradientDescent(InverseTime(0.3, 5.0)),
    "learnt step": GradientDescent(0.2, learn_lr=True),
    "learnt steps": GradientDescent(0.2, learn_lr="per_step"),
    "momentum": Momentum(0.1, 0.8, learn_momentum=True),
    "nesterov": Nesterov(0.1, 0.8, learn_lr=True),
    "heavy ball": HeavyBall(0.1, 0.8, learn_momentum=True),
    "aggregated": AggregatedDescent(0.2, 0.1, learn_lr=True),
    "adam": Adam(0.05, learn_lr=True, learn_betas=True, learn_eps=True),
    "anderson": Anderson(GradientDescent(0.2), ridge=1e-2),
    "higher": HigherDynamics(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
}
STEPS = 8


@pytest.mark.parametrize("task", [Nonlinear, FromX])
@pytest.mark.parametrize("dynamics", DYNAMICS.values(), ids=DYNAMICS)
def test_forward_is_reverse(dynamics, task):
    """Also for the settings that are learnt, 0-d tensors among them, and from a start that depends on x."""
    problem, x, y = bound(task(), dynamics, STEPS)
    expected, y_expected = reverse(problem, dynamics, x, y, STEPS)
    found, y_found = forward(problem, dynamics, x, y, STEPS)
    assert relative(found, expected) < 1e-12
    assert relative(y_found, y_expected) < 1e-14
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in x.items()}


@pytest.mark.parametrize("dynamics", [FixedPoint(), Anderson()])
def test_fixed_point_maps(dynamics):
    problem, x, y = bound(Contraction())
    expected, _ = reverse(problem, dynamics, x, y, 4)
    assert relative(forward(problem, dynamics, x, y, 4)[0], expected) < 1e-12


def test_forward_from_a_start_that_depends_on_x_is_not_forward_from_a_fixed_one():
    problem, x, _ = bound(FromX())
    y = problem.initial(x)
    found, _ = forward(problem, GradientDescent(0.2), x, y, 3)
    assert relative(found, differences(unrolled(problem, GradientDescent(0.2), y, 3), x)) < 1e-7
    fixed, _ = forward(bound(Nonlinear())[0], GradientDescent(0.2), x, y, 3)
    assert relative(fixed, found) > 1e-3


@pytest.mark.parametrize("chunk", [1, 4, 15, 16, 100])
def test_chunks(chunk):
    """15 entries of x and one learnt setting, in chunks that do and do not divide 16."""
    dynamics = Momentum(0.1, 0.8, learn_lr=True)
    problem, x, y = bound(Nonlinear(), dynamics)
    whole, _ = forward(problem, dynamics, x, y, STEPS)
    module = ForwardHG(dynamics=dynamics, lower_steps=STEPS, chunk=chunk)
    assert relative(module.bilevel_step(problem, x, y).upper_grad, whole) < 1e-14


def test_slopes_along_directions():
    problem, x, y = bound(Nonlinear())
    gradient, _ = reverse(problem, GradientDescent(0.2), x, y, STEPS)
    directions = {name: torch.randn(3, *t.shape, dtype=t.dtype) for name, t in x.items()}
    found, _ = slopes(problem, GradientDescent(0.2), x, y, STEPS, directions)
    expected = [tree.dot(gradient, {name: t[i] for name, t in directions.items()}) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)


class SinglePrecision(FromX):
    """The start has a factor before a 0-d tensor of float32."""

    def __init__(self):
        super().__init__()
        self.inputs, self.targets = self.inputs.float(), self.targets.float()
        self.float()

    def initial_lower(self, upper):
        return {"w": 0.5 * upper["log_ridge"], "b": (0.5 * upper["shift"].mean()).reshape(1)}


def test_single_precision_from_a_start_that_depends_on_x():
    problem, x, y = bound(SinglePrecision())
    found, _ = forward(problem, GradientDescent(0.2), x, y, 3)
    expected, _ = reverse(problem, GradientDescent(0.2), x, y, 3)
    assert all(t.dtype == torch.float32 for t in found.values())
    assert relative(found, expected) < 1e-5


def standard_errors(found, expected, variance, number):
    """How many standard errors the worst entry of a mean of ``number`` draws is away."""
    return float(((flat(found) - flat(expected)).abs() / (variance / number).sqrt()).max())


@pytest.mark.parametrize("task", [Quadratic, FromX])
def test_random_directions_are_unbiased(task):
    """The variance of entry i of one direction's estimate is |dF|^2 - dF_i^2."""
    torch.manual_seed(0)
    problem, x, y = bound(task())
    expected, _ = reverse(problem, GradientDescent(0.2), x, y, 5)
    exact = flat(expected)
    found, _ = random_forward(problem, GradientDescent(0.2), x, y, 5, 4000)
    assert 0.1 < standard_errors(found, expected, exact.square().sum() - exact.square(), 4000) < 3


def test_random_directions_are_signs():
    """For given u they give mean_j (dF u_j) u_j."""
    problem, x, y = bound(Quadratic())
    gradient = reverse(problem, GradientDescent(0.2), x, y, 5)[0]["x"]
    torch.manual_seed(2)
    found = random_forward(problem, GradientDescent(0.2), x, y, 5, 3)[0]["x"]
    torch.manual_seed(2)
    u = torch.randint(2, (3, 4)).double() * 2 - 1
    assert relative(found, (u @ gradient) @ u / 3) < 1e-13


@pytest.mark.parametrize("shape", [(), (1,)])
def test_random_directions_are_exact_for_one_upper_variable(shape):
    class One(Nonlinear):
        def __init__(self):
            super().__init__()
            self.upper = Vector(ridge=torch.full(shape, 0.4, dtype=torch.float64))

        def upper_loss(self, batch):
            return self.residual(0.0).square().mean()

        def lower_loss(self, batch):
            return self.residual(0.0).square().mean() + (self.upper.ridge.exp() * self.lower.w.square()).sum()

    problem, x, y = bound(One())
    expected, _ = reverse(problem, Momentum(0.1), x, y, 6)
    assert (
        relative(FG2U(dynamics=Momentum(0.1), lower_steps=6).bilevel_step(problem, x, y).upper_grad, expected) < 1e-13
    )


@pytest.mark.parametrize("task", [Nonlinear, FromX])
def test_zeroth_order_is_its_formula(task):
    """For the Gaussian directions that the seed gives, by plain runs of the lower level."""
    problem, x, y = bound(task())
    dynamics, mu = Momentum(0.1, 0.8), 0.1
    torch.manual_seed(4)
    found, y_found = zeroth_order(problem, dynamics, x, y, 6, directions=3, radius=mu)
    torch.manual_seed(4)
    u = [{name: torch.randn_like(t) for name, t in x.items()} for _ in range(3)]

    def solve(x):
        state = dynamics.start(problem.initial(x) if problem.start_depends_on_x else y)
        for t in range(6):
            state = dynamics.step(problem, x, state, t)
        return state[0]

    end = solve(x)
    f_x, f_y = problem.grad_f(x, end)
    expected = f_x
    for j in range(3):
        change = tree.axpy(-1.0, end, solve(tree.axpy(mu, u[j], x)))
        expected = tree.axpy(float(tree.dot(change, f_y)) / mu / 3, u[j], expected)
    assert relative(found, expected) < 1e-11
    assert relative(y_found, end) < 1e-14


def test_zeroth_order_is_unbiased_where_the_lower_level_is_linear():
    """It is f_x + mean_j u_j u_j' h, h = dF - f_x, for any radius; the mean of u u' for Gaussian u is the identity."""
    problem, x, y = bound(Quadratic())
    f_x = 0.3 * x["x"]
    h = reverse(problem, GradientDescent(0.2), x, y, 5)[0]["x"] - f_x
    module = PZOBO(dynamics=GradientDescent(0.2), lower_steps=5, directions=40, radius=5.0)
    torch.manual_seed(0)
    found = module.bilevel_step(problem, x, y).upper_grad["x"]
    torch.manual_seed(0)
    u = torch.stack([torch.randn(4, dtype=torch.float64) for _ in range(40)])
    assert relative(found, f_x + u.T @ (u @ h) / 40) < 1e-11


def test_zeroth_order_takes_no_derivative_of_the_lower_loss():
    """Its lower level may have kinks that no product sees: only lower gradients and one upper one are evaluated."""
    problem, x, y = bound(Quadratic())
    zeroth_order(problem, GradientDescent(0.2), x, y, 5, directions=3, radius=0.1)
    assert problem.counts["upper_gradients"] == 1
    assert problem.counts["lower_gradients"] == 5 * (1 + 3)
    assert problem.counts["hessian_products"] == problem.counts["cross_products"] == 0


class Translation(BilevelTask):
    """g = <a, y>, linear in y and without x, from y_0(x) = x^2: d y_T / d y_0 = I."""

    persistent_lower = False

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        draw = lambda: torch.randn(4, generator=generator, dtype=torch.float64)
        self.a, self.upper, self.lower = draw(), Vector(x=draw()), Vector(y=draw())

    def initial_lower(self, upper):
        return {"y": upper["x"].square()}

    def lower_loss(self, batch):
        return self.a @ self.lower.y

    def upper_loss(self, batch):
        return self.lower.y.sin().sum() + (self.upper.x * self.lower.y).sum()


@pytest.mark.parametrize("dynamics", [GradientDescent(0.2), Momentum(0.1), Adam(0.1)])
def test_first_order_is_exact_where_steps_translate(dynamics):
    problem, x, y = bound(Translation())
    found, y_end = first_order(problem, dynamics, x, y, 6)
    expected, y_expected = reverse(problem, dynamics, x, y, 6)
    assert relative(found, expected) < 1e-13
    assert relative(y_end, y_expected) < 1e-14


@pytest.mark.parametrize("steps", [1, 6])
def test_first_order_is_its_formula(steps):
    """For y_0 = (log_ridge / 2, mean of shift): f_x + (f_w / 2, f_b / 12) at y_T."""
    problem, x, y = bound(FromX())
    y = problem.initial(x)
    step = RHG(dynamics=GradientDescent(0.2), lower_steps=steps, first_order=True).bilevel_step(problem, x, y)
    state = (y,)
    for t in range(steps):
        state = GradientDescent(0.2).step(problem, x, state, t)
    f_x, f_y = problem.grad_f(x, state[0])
    expected = {
        "log_ridge": f_x["log_ridge"] + 0.5 * f_y["w"],
        "shift": f_x["shift"] + f_y["b"].expand(12) / 12,
    }
    assert relative(step.upper_grad, expected) < 1e-14
    assert relative(step.upper_grad, reverse(problem, GradientDescent(0.2), x, y, steps)[0]) > 1e-2
    assert relative(step.lower, state[0]) == 0


def test_first_order_of_maml():
    """x is the start: the gradient is f_y at y_T."""

    class Maml(FromX):
        def __init__(self):
            super().__init__()
            self.upper = Vector(w=self.lower.w.detach(), b=self.lower.b.detach())

        def initial_lower(self, upper):
            return dict(upper)

        def upper_loss(self, batch):
            return self.residual(0.0).square().mean()

        def lower_loss(self, batch):
            return self.residual(0.3).square().mean()

    problem, x, y = bound(Maml())
    found, y_end = first_order(problem, GradientDescent(0.2), x, y, 5)
    assert relative(found, problem.grad_f_y(x, y_end)) < 1e-14


def test_first_order_needs_a_start_that_depends_on_x():
    with pytest.raises(BilevelError, match="first_order needs a start y_0.x.: define initial_lower"):
        hypergradient(Quadratic(), first_order=True)
    with pytest.raises(BilevelError, match="leave truncation and memory out"):
        RHG(first_order=True, truncation=3)


class Dropped(Nonlinear):
    def lower_loss(self, batch):
        keep = torch.nn.functional.dropout(torch.ones(12, dtype=torch.float64), 0.5)
        return (keep * self.residual(0.1 * self.upper.shift).square()).mean()


def test_dropout_is_that_of_the_reverse_mode():
    """All directions see one mask in a step; one chunk draws as many random numbers as the reverse mode does."""
    problem, x, y = bound(Dropped())
    torch.manual_seed(5)
    found, y_found = forward(problem, GradientDescent(0.2), x, y, STEPS)
    torch.manual_seed(5)
    expected, y_expected = reverse(problem, GradientDescent(0.2), x, y, STEPS)
    assert relative(y_found, y_expected) < 1e-14
    assert relative(found, expected) < 1e-12


def test_dropout_is_one_for_all_chunks():
    """The columns of Z must belong to one y_T."""
    problem, x, y = bound(Dropped())
    torch.manual_seed(5)
    whole, _ = forward(problem, GradientDescent(0.2), x, y, STEPS)
    torch.manual_seed(5)
    chunks, _ = forward(problem, GradientDescent(0.2), x, y, STEPS, 4)
    assert relative(chunks, whole) < 1e-12


def test_dropout_is_one_for_all_shifts():
    """Without it, the differences of zeroth order would be of the order of the noise over the radius."""
    problem, x, y = bound(Dropped())
    torch.manual_seed(5)
    found, y_found = zeroth_order(problem, GradientDescent(0.2), x, y, STEPS, directions=40, radius=1e-6)
    assert float(tree.norm(found)) < 5.0
    assert all(torch.isfinite(t).all() for t in y_found.values())
