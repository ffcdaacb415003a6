import warnings
import weakref

import pytest
import torch
from loops import fit
from problems import (
    Contraction,
    Nonlinear,
    Quadratic,
    ScalarMerelyConvex,
    ScalarStronglyConvex,
    Vector,
    bound,
    relative,
    unrolled,
)
from problems import central_differences as differences

from bilevel_lightning import (
    AID,
    AIDCG,
    RHG,
    Adam,
    AggregatedDescent,
    BilevelError,
    BilevelTask,
    FixedPoint,
    GradientDescent,
    HeavyBall,
    Minibatches,
    Momentum,
    hypergradient,
    tree,
)
from bilevel_lightning.hypergradients import LinearSystemWarning, implicit
from bilevel_lightning.linear_solvers import (
    ConjugateGradient,
    Dense,
    FixedPointIteration,
    Neumann,
    NormalConjugateGradient,
    Nystrom,
    Stochastic,
)


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


@pytest.mark.parametrize(
    ("solver", "bound_on_error"),
    [
        (ConjugateGradient(160), 1e-10),
        (NormalConjugateGradient(160), 1e-10),
        (Neumann(160), 1e-12),
        (FixedPointIteration(160, tol=0), 1e-12),
        (FixedPointIteration(160), 1e-9),
        (Stochastic(160, sgd(0.4)), 1e-12),
        (Dense(), 1e-12),
        (Nystrom(6, damping=1e-7), 1e-6),
    ],
)
def test_closed_form(solver, bound_on_error):
    task = Quadratic()
    settings = {"dynamics": GradientDescent(0.4), "lower_steps": 160, "linear_solver": solver}
    gradient = hypergradient(task, method="AID", **settings)
    assert relative(gradient["x"], task.hypergradient(task.upper.x.detach())) <= bound_on_error


@pytest.mark.parametrize("dynamics", [Momentum(0.1, 0.7), HeavyBall(0.1, 0.7), Adam(0.3, eps=1.0)])
def test_closed_form_with_other_dynamics(dynamics):
    task = Quadratic()
    gradient = hypergradient(task, method="AIDCG", dynamics=dynamics, lower_steps=400)
    assert relative(gradient["x"], task.hypergradient(task.upper.x.detach())) <= 1e-9


def test_away_from_the_solution_it_is_the_formula_at_y():
    """f_x - g_xy g_yy^{-1} f_y at the y that is given, which stays as it is."""
    task = Quadratic()
    problem, x, y = bound(task)
    before = tree.clone(y)
    expected = task.rho * x["x"] + task.B.T @ torch.linalg.solve(task.A, task.y().detach() - task.c)
    step = AIDCG(lower_steps=0).bilevel_step(problem, x, y)
    assert relative(step.upper_grad["x"], expected) < 1e-10
    assert all(torch.equal(step.lower[name], before[name]) for name in y)


def test_the_solved_lower_level_may_come_from_elsewhere():
    task = Quadratic()
    x = task.upper.x.detach()
    solved = torch.linalg.solve(task.A, task.B @ x)
    y = {"first": solved[:2].reshape(2, 1), "rest": solved[2:]}
    for method in ("AID", "AIDCG"):
        gradient = hypergradient(task, y=y, method=method, lower_steps=0)
        assert relative(gradient["x"], task.hypergradient(x)) < 1e-10


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_three_names_of_one_iteration(steps):
    settings = {"method": "AID", "dynamics": GradientDescent(0.3), "lower_steps": 7}
    fixed = hypergradient(Quadratic(), linear_solver=FixedPointIteration(steps, tol=0), **settings)
    stochastic = hypergradient(Quadratic(), linear_solver=Stochastic(steps, sgd(0.3)), **settings)
    assert relative(stochastic, fixed) < 1e-14
    if steps > 1:
        neumann = hypergradient(Quadratic(), linear_solver=Neumann(steps - 1), **settings)
        assert relative(neumann, fixed) < 1e-14


class Ridge(BilevelTask):
    """Ridge regression with a log penalty for each of 10 features; lower Hessian with eigenvalues 1.65 to 4.3725."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        u, v = torch.linalg.qr(draw(50, 10))[0], torch.linalg.qr(draw(10, 10))[0]
        eigenvalues = torch.linspace(1.65, 2.65 * 1.65, 10, dtype=torch.float64)
        self.inputs = u @ torch.diag((50 * (eigenvalues - 1)).sqrt()) @ v.T
        w = draw(10)
        self.targets = self.inputs @ w + 0.1 * draw(50)
        self.held_out = draw(50, 10)
        self.answers = self.held_out @ w + 0.1 * draw(50)
        zeros = torch.zeros(10, dtype=torch.float64)
        self.upper, self.lower = Vector(x=zeros), Vector(w=zeros)

    def lower_loss(self, batch):
        rows = slice(None) if batch is None else batch
        fit = (self.inputs[rows] @ self.lower.w - self.targets[rows]).square().mean()
        return 0.5 * fit + 0.5 * (self.upper.x.exp() * self.lower.w.square()).sum()

    def upper_loss(self, batch):
        return 0.5 * (self.held_out @ self.lower.w - self.answers).square().mean()

    def solution(self):
        """y* and the exact hypergradient."""
        penalty = self.upper.x.detach().exp()
        hessian = self.inputs.T @ self.inputs / 50 + torch.diag(penalty)
        w = torch.linalg.solve(hessian, self.inputs.T @ self.targets / 50)
        v = torch.linalg.solve(hessian, self.held_out.T @ (self.held_out @ w - self.answers) / 50)
        return {"w": w}, {"x": -penalty * w * v}


RIDGE_STEP = 2 / (1.65 + 2.65 * 1.65)  # contraction (2.65 - 1) / (2.65 + 1) = 0.452
REFERENCE = {
    "RHG": (4.9e-2, 1.4e-3, 9.2e-7, 2.2e-13),
    "TRHG": (0.11, 9.1e-3, 1.7e-4, 6.0e-8),
    "AIDFP": (1.7e-2, 3.4e-4, 1.2e-7, 1.6e-14),
    "AIDCG": (9.5e-3, 1.8e-4, 6.4e-8, 8.2e-15),
}


def ridge_error(method, steps):
    settings = {
        "RHG": {},
        "TRHG": {"truncation": max(1, steps // 2)},
        "AIDFP": {"linear_solver": FixedPointIteration(steps, tol=0)},
        "AIDCG": {"linear_solver": ConjugateGradient(steps, tol=1e-14)},
        "AID": {"linear_solver": NormalConjugateGradient(steps, tol=1e-14)},
    }
    task = Ridge()
    found = hypergradient(
        task, method=method, dynamics=GradientDescent(RIDGE_STEP), lower_steps=steps, **settings[method]
    )
    return relative(found, task.solution()[1])


@pytest.mark.parametrize("method", REFERENCE)
def test_errors_on_ridge_regression(method):
    """Not above 1.5 times what an independent implementation reached on a ridge problem of this size and condition."""
    for steps, error in zip((5, 10, 20, 40), REFERENCE[method], strict=True):
        assert ridge_error(method, steps) <= 1.5 * error


@pytest.mark.parametrize("method", ["RHG", "AIDFP", "AIDCG", "AID"])
def test_errors_on_ridge_regression_fall_to_rounding(method):
    assert ridge_error(method, 160) <= 1e-12


@pytest.mark.parametrize("method", ["RHG", "TRHG", "AIDFP"])
def test_errors_on_ridge_regression_fall_geometrically(method):
    """Like q^K, times K for unrolling; neither slower nor faster, which would be another algorithm."""
    q = 1.65 / 3.65
    ratio = ridge_error(method, 20) / ridge_error(method, 10)
    assert 0.5 * q ** (5 if method == "TRHG" else 10) < ratio < 3 * q ** (5 if method == "TRHG" else 10)


def trained(task, solver, iterations=100):
    problem, x, y = bound(task)
    dynamics = GradientDescent(0.2)
    for _ in range(iterations):
        step = AID(linear_solver=solver, dynamics=dynamics, lower_steps=20).bilevel_step(problem, x, y)
        y = step.lower
        x = tree.axpy(-0.1, step.upper_grad, x)
    return {name: float(t) for name, t in {**x, **y}.items()}


@pytest.mark.parametrize(
    ("solver", "limit"),
    [
        (ConjugateGradient(1), 0.5),
        (NormalConjugateGradient(1), 0.5),
        (Dense(), 0.5),
        (Neumann(10), 0.522438),
        (Neumann(40), 0.500027),
        (FixedPointIteration(11, tol=0), 0.522438),
        (Stochastic(11, sgd(0.2)), 0.522438),
    ],
)
def test_limits_of_training_with_warm_start(solver, limit):
    """Step size 0.2, 20 lower steps, upper step 0.1, 100 iterations: 1/2, and 1 / (2 - 0.8^(J+1))."""
    assert trained(ScalarStronglyConvex(), solver)["x"] == pytest.approx(limit, abs=1e-5)


@pytest.mark.parametrize("solver", [ConjugateGradient(), NormalConjugateGradient(), Dense()])
def test_merely_convex_lower_levels_are_singular(solver):
    with pytest.warns(LinearSystemWarning, match="g_yy is singular.*damping.*RHG"):
        trained(ScalarMerelyConvex(), solver, 2)


def test_the_neumann_series_on_a_merely_convex_lower_level():
    """The series sums and says nothing of the singularity; y2 never moves, and the solution 1 is missed."""
    found = trained(ScalarMerelyConvex(), Neumann(10))
    assert found["x"] == pytest.approx(0.482786, abs=1e-5)
    assert found["y2"] == 0.01


def test_damping_cures_a_singular_system():
    """(diag(1, 0) + 0.5 I) v = f_y."""
    problem, x, y = bound(ScalarMerelyConvex())
    x = {"x": torch.tensor(0.7, dtype=torch.float64)}
    gradient, solution = implicit(problem, GradientDescent(), x, y, ConjugateGradient(damping=0.5))
    assert float(solution.v["y1"]) == pytest.approx((0.01 - 1) / 1.5)
    assert float(solution.v["y2"]) == pytest.approx((0.01 - 0.7) / 0.5)
    assert float(gradient["x"]) == pytest.approx(0.7 - 0.01 + (0.01 - 1) / 1.5)


def test_indefinite_and_diverging_systems_warn():
    functions = (lambda x, y: y["y"] ** 2, lambda x, y: -(y["y"] ** 2) * x["x"])
    x, y = {"x": torch.tensor(1.0)}, {"y": torch.tensor(1.0)}
    with pytest.warns(LinearSystemWarning, match="negative eigenvalue.*no minimum of g"):
        hypergradient(functions, x, y, method="AIDCG", lower_steps=0)
    with pytest.warns(LinearSystemWarning, match="AIDFP|FixedPointIteration.*lower the linear solver's lr"):
        hypergradient(functions, x, y, method="AIDFP", lower_steps=0)
    solver = Neumann(60, lr=10.0)
    with pytest.raises(BilevelError, match="Neumann gave a v that is not finite.*Lower dynamics.lr"):
        hypergradient(functions, x, y, method="AID", lower_steps=0, linear_solver=solver)


def test_an_upper_loss_without_y_warns():
    functions = (lambda x, y: 3 * x["x"], lambda x, y: (y["y"] - x["x"]) ** 2)
    x, y = {"x": torch.tensor(1.0)}, {"y": torch.tensor(0.0)}
    with pytest.warns(LinearSystemWarning, match="f_y is zero at y"):
        gradient = hypergradient(functions, x, y, method="AIDCG")
    assert float(gradient["x"]) == 3.0


@pytest.mark.parametrize(
    "solver",
    [NormalConjugateGradient(), FixedPointIteration(60, tol=0), Neumann(60), Stochastic(60, sgd(1.0)), Dense()],
)
def test_fixed_point_maps(solver):
    task = Contraction()
    settings = {"dynamics": FixedPoint(), "lower_steps": 60, "linear_solver": solver}
    gradient = hypergradient(task, method="AID", **settings)
    inverse = torch.linalg.inv(torch.eye(5, dtype=torch.float64) - task.m)
    x = task.upper.x.detach()
    assert relative(gradient, {"x": inverse.T @ (inverse @ x - task.c)}) < 1e-12


@pytest.mark.parametrize("solver", [ConjugateGradient(), Nystrom()])
def test_fixed_point_maps_have_no_symmetric_system(solver):
    with pytest.raises(BilevelError, match="needs a symmetric system.*NormalConjugateGradient"):
        hypergradient(Contraction(), method="AID", dynamics=FixedPoint(), linear_solver=solver)


class Box(Quadratic):
    """The quadratic on |y_i| <= exp(x_0) / 4: some bounds are active at the solution, others are not."""

    def project_lower(self, upper, lower):
        bound = 0.25 * upper["x"][0].exp()
        return {name: torch.minimum(torch.maximum(t, -bound), bound) for name, t in lower.items()}


@pytest.mark.parametrize(
    ("dynamics", "solver"),
    [
        (GradientDescent(0.3), FixedPointIteration(200)),
        (GradientDescent(0.3), NormalConjugateGradient()),
        (GradientDescent(0.3), Dense()),
        (Momentum(0.1, 0.5), Neumann(300)),
    ],
)
def test_projected_lower_level(dynamics, solver):
    """Where the bound is active y moves with it, and where it is not as without it."""
    problem, x, y = bound(Box())
    module = AID(dynamics=dynamics, lower_steps=120, linear_solver=solver)
    step = module.bilevel_step(problem, x, y)
    active = torch.cat([t.flatten().abs() for t in step.lower.values()]) >= 0.25 * float(x["x"][0].exp()) - 1e-12
    assert 0 < int(active.sum()) < 6
    assert relative(step.upper_grad, differences(unrolled(problem, dynamics, y, 120), x)) < 1e-6


def test_projected_lower_level_has_no_symmetric_system():
    with pytest.raises(BilevelError, match="needs a symmetric system"):
        hypergradient(Box(), method="AIDCG")


class Kept:
    """Counts the tensors that autograd keeps at once, by saved-tensor hooks."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        self.now += 1
        self.most = max(self.most, self.now)
        held = _Held(tensor)
        weakref.finalize(held, self.drop)
        return held

    def drop(self):
        self.now -= 1


class _Held:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize(
    ("task", "solver"),
    [
        (Quadratic, ConjugateGradient(3)),
        (Quadratic, FixedPointIteration(3)),
        (Box, FixedPointIteration(3)),
        (Box, NormalConjugateGradient(3)),
        (Contraction, NormalConjugateGradient(3)),
    ],
)
def test_memory_does_not_depend_on_the_number_of_lower_steps(task, solver):
    dynamics = FixedPoint() if task is Contraction else GradientDescent(0.2)

    few, many = (most(AID(dynamics=dynamics, lower_steps=t, linear_solver=solver), task()) for t in (4, 40))
    assert 0 < few == many
    assert most(RHG(dynamics=dynamics, lower_steps=40), task()) > most(RHG(dynamics=dynamics, lower_steps=4), task())


def most(module, task, batch=None):
    """The largest number of tensors that autograd keeps at once in one upper iteration."""
    kept = Kept()
    problem, x, y = bound(task, batch=batch)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        module.bilevel_step(problem, x, y)
    return kept.most


class Recorded(Quadratic):
    """Notes the lower minibatch of each evaluation; minibatch i shifts the linear term."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def lower_loss(self, batch):
        if isinstance(batch, int):
            self.seen.append(batch)
        return super().lower_loss(batch) * (1.0 if batch is None else 1.0 + 0.01 * float(batch))


@pytest.mark.parametrize(
    ("solver", "products", "cross"),
    [
        (ConjugateGradient(3), [4], None),
        (Dense(), [4], None),
        (NormalConjugateGradient(3), [4], None),
        (Neumann(3), [4, 5, 6], 7),
        (Stochastic(3), [4, 5, 6], 7),
        (FixedPointIteration(3), [4, 5], 7),
    ],
)
def test_minibatches_of_the_linear_system(solver, products, cross):
    """T = 4 lower steps take minibatches 0..3; product j takes T + j and the cross product T + K."""
    task = Recorded()
    module = AID(dynamics=GradientDescent(0.1), lower_steps=4, linear_solver=solver)
    needed, _ = module.minibatches(0)
    problem, x, y = bound(task, batch={"lower": Minibatches(range(needed)), "upper": 0})
    module.bilevel_step(problem, x, y)
    assert task.seen == [0, 1, 2, 3, *products, *([] if cross is None else [cross])]
    assert max(task.seen) < needed


def test_memory_does_not_depend_on_the_number_of_minibatches():
    batch = {"lower": Minibatches(range(50)), "upper": 0}
    few, many = (most(AID(lower_steps=2, linear_solver=Neumann(steps)), Recorded(), batch) for steps in (4, 40))
    assert 0 < few == many


@pytest.mark.parametrize("solver", [Neumann(3), Stochastic(3), FixedPointIteration(3)])
def test_one_minibatch_is_the_deterministic_problem(solver):
    batches = (None, {"lower": Minibatches([None]), "upper": None}, {"lower": Minibatches([0, 0, 0]), "upper": 0})
    results = []
    for batch in batches:
        problem, x, y = bound(Recorded(), batch=batch)
        results.append(AID(dynamics=GradientDescent(0.1), linear_solver=solver).bilevel_step(problem, x, y).upper_grad)
    assert relative(results[1], results[0]) == 0
    assert relative(results[2], results[0]) == 0


def test_different_minibatches_enter_the_products():
    """Neumann with K = 1: v = lr (b + (I - lr A_T) b), and the cross product on minibatch T + 1."""
    task = Recorded()
    problem, x, y = bound(task, batch={"lower": Minibatches(range(9)), "upper": 0})
    gradient, _ = implicit(problem, GradientDescent(0.1), x, y, Neumann(1), t=2)
    b = task.y().detach() - task.c
    v = 0.1 * (b + b - 0.1 * 1.02 * task.A @ b)
    assert relative(gradient["x"], task.rho * x["x"] + 1.03 * task.B.T @ v) < 1e-14


@pytest.mark.filterwarnings("ignore::bilevel_lightning.hypergradients.LinearSystemWarning")
@pytest.mark.parametrize("solver", [FixedPointIteration(40, lr=0.1), Neumann(40, 0.1), Stochastic(40, sgd(0.1))])
def test_stochastic_products_are_unbiased(solver):
    """At y*, with minibatches of 5 of 50 samples: the mean of 60 repetitions is within 3 standard errors of exact."""
    task, generator = Ridge(), torch.Generator().manual_seed(1)
    y, exact = task.solution()
    draws = []
    for _ in range(60):
        lower = Minibatches(torch.randint(50, (5,), generator=generator) for _ in range(41))
        problem, x, _ = bound(task, batch={"lower": lower, "upper": torch.zeros(1)})
        draws.append(implicit(problem, GradientDescent(), x, y, solver)[0]["x"])
    values = torch.stack(draws)
    error = (values.mean(0) - exact["x"]).abs() / (values.std(0) / 60**0.5)
    assert error.max() < 3
    assert (values.std(0) > 1e-3 * exact["x"].abs()).all()


def test_the_noise_of_minibatches_is_no_divergence():
    """The unbiased, stable iteration above must not warn "the residual is larger than that of v = 0"."""
    task, generator = Ridge(), torch.Generator().manual_seed(1)
    y, _ = task.solution()
    for _ in range(30):
        lower = Minibatches(torch.randint(50, (5,), generator=generator) for _ in range(41))
        problem, x, _ = bound(task, batch={"lower": lower, "upper": torch.zeros(1)})
        implicit(problem, GradientDescent(), x, y, FixedPointIteration(40, lr=0.1))


@pytest.mark.parametrize(
    ("dynamics", "message"),
    [
        (GradientDescent(learn_lr=True), "does not depend on.*log_lr_factor.*or use RHG"),
        (Adam(learn_betas=True), "does not depend on.*logit_beta1"),
        (AggregatedDescent(), "AggregatedDescent mixes in the upper loss.*use RHG"),
    ],
)
@pytest.mark.parametrize("method", ["AID", "AIDCG", "AIDFP", "AIDNeumann", "Nystrom"])
def test_dynamics_without_implicit_derivative(method, dynamics, message):
    with pytest.raises(BilevelError, match=message):
        hypergradient(Quadratic(), method=method, dynamics=dynamics)


def test_step_size_must_be_known_to_a_series():
    with pytest.raises(BilevelError, match=r"Neumann.lr must be given"):
        hypergradient(Quadratic(), method="AIDNeumann", dynamics=Adam(0.1))
    task = Quadratic()
    gradient = hypergradient(
        task, method="AIDNeumann", dynamics=Adam(0.3, eps=1.0), lower_steps=400, linear_solver=Neumann(160, 0.4)
    )
    assert relative(gradient["x"], task.hypergradient(task.upper.x.detach())) < 1e-9


def test_linear_solution_is_kept():
    """Two steps of conjugate gradient an iteration reach v only where they go on from the last iteration's."""
    residuals = {}
    for warm in (False, True):
        module = AIDCG(
            task=Quadratic(),
            linear_solver=ConjugateGradient(2),
            warm_start_linear=warm,
            dynamics=GradientDescent(0.4),
            upper_optimizer=lambda p: torch.optim.SGD(p, lr=1e-6),
        )
        run = fit(module, 15)
        residuals[warm] = float(run.callback_metrics["train/residual"])
        assert list(module.states) == (["v"] if warm else [])
    assert residuals[True] < 1e-4 < 1e-2 < residuals[False]


def test_finite_differences_of_a_solved_problem():
    """No closed form: 250 steps solve the lower level."""
    task, dynamics = Nonlinear(), GradientDescent(0.3)
    problem, x, y = bound(task)
    x["log_ridge"] = x["log_ridge"].abs() + 1  # strongly convex
    gradient = AIDCG(dynamics=dynamics, lower_steps=250).bilevel_step(problem, x, y).upper_grad
    objective = unrolled(problem, dynamics, y, 250)
    expected = differences(lambda part: objective({**x, **part}), {"log_ridge": x["log_ridge"]})
    assert relative({"log_ridge": gradient["log_ridge"]}, expected) < 1e-6


def test_no_warning_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient(Quadratic(), method="AIDCG")
