"""Every solver against dense linear algebra; vectors are three named tensors of 2, 0 and 1 dimensions."""

import pytest
import torch

from bilevel_lightning import BilevelError
from bilevel_lightning.linear_solvers import (
    ConjugateGradient,
    Dense,
    FixedPointIteration,
    Neumann,
    NormalConjugateGradient,
    Nystrom,
    Stochastic,
    System,
)

SHAPES = {"matrix": (4, 3), "number": (), "vector": (7,)}
LR = 2 / 9  # for eigenvalues between 1 and 8: contraction 7/9


def split(v):
    if len(v) != 20:
        return {"v": v}
    a, b, c = v.split([12, 1, 7])
    return {"matrix": a.view(4, 3), "number": b.view(()), "vector": c}


def flat(v):
    return torch.cat([t.flatten() for t in v.values()])


def relative(v, expected):
    return float((flat(v) - expected).norm() / expected.norm())


class Counted:
    """Systems with a dense matrix, or one for each j, that count their products."""

    def __init__(self, *matrices):
        self.matrices, self.calls = matrices, []

    def product(self, v, j):
        self.calls.append(j)
        return split(self.matrices[j % len(self.matrices)] @ flat(v))

    def transpose(self, w):
        self.calls.append("transpose")
        return split(self.matrices[0].T @ flat(w))

    def system(self, b, symmetric=True, step=None):
        return System(self.product, split(b), None if symmetric else self.transpose, step)


def definite(n=20, condition=8.0):
    """A random matrix with random eigenvalues between 1 and the condition number, both included."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    share = torch.rand(n, generator=generator, dtype=torch.float64)
    share = (share - share.min()) / (share.max() - share.min())
    return q @ torch.diag(1 + (condition - 1) * share) @ q.T


def nonsymmetric():
    """A matrix whose symmetric part is definite, with |I - A| = 0.9."""
    generator = torch.Generator().manual_seed(4)
    m = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    return torch.eye(20, dtype=torch.float64) - 0.9 * m / torch.linalg.matrix_norm(m, 2)


A = definite()
B = torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EYE = torch.eye(20, dtype=torch.float64)

SOLVERS = {
    "conjugate gradient": ConjugateGradient(20),
    "normal": NormalConjugateGradient(40),
    "neumann": Neumann(200, LR),
    "fixed point": FixedPointIteration(200, lr=LR),
    "stochastic": Stochastic(200, lambda p: torch.optim.SGD(p, lr=LR)),
    "nystrom": Nystrom(20, damping=1e-6),
    "dense": Dense(),
}


@pytest.mark.parametrize(
    ("solver", "bound"),
    [
        (ConjugateGradient(20), 1e-8),
        (ConjugateGradient(5), 3e-2),
        (NormalConjugateGradient(40), 1e-8),
        (Neumann(200, LR), 1e-9),
        (FixedPointIteration(200, lr=LR), 1e-9),
        (Dense(), 1e-13),
        (Nystrom(20, damping=1e-6), 2e-6),
    ],
)
def test_solution_of_a_definite_system(solver, bound):
    assert relative(solver.solve(Counted(A).system(B)).v, torch.linalg.solve(A, B)) <= bound


def test_conjugate_gradient_step_by_step():
    """Each iterate minimises the energy over the Krylov space of b."""
    basis = B[:, None]
    for steps in range(1, 6):
        expected = basis @ torch.linalg.solve(basis.T @ A @ basis, basis.T @ B)
        assert relative(ConjugateGradient(steps).solve(Counted(A).system(B)).v, expected) < 1e-9
        basis = torch.linalg.qr(torch.cat([basis, A @ basis[:, -1:]], 1))[0]


def test_conjugate_gradient_on_the_identity():
    system = Counted(EYE)
    solution = ConjugateGradient().solve(system.system(B))
    assert relative(solution.v, B) < 1e-15
    assert (solution.products, system.calls, solution.status) == (1, [0], "converged")


def test_neumann_is_its_series():
    power, total = B, torch.zeros_like(B)
    for _ in range(8):
        total, power = total + LR * power, power - LR * A @ power
    assert relative(Neumann(7, LR).solve(Counted(A).system(B)).v, total) < 1e-14


def test_nystrom_is_woodbury_of_its_columns():
    torch.manual_seed(3)
    index = torch.randperm(20)[:6]
    torch.manual_seed(3)
    v = Nystrom(6, damping=0.3).solve(Counted(A).system(B)).v
    c = A[:, index]
    low_rank = c @ torch.linalg.inv(A[index][:, index]) @ c.T
    assert relative(v, torch.linalg.solve(low_rank + 0.3 * EYE, B)) < 1e-12


@pytest.mark.parametrize("start", [None, split(B.flip(0))], ids=["cold", "warm"])
@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("name", ["conjugate gradient", "normal", "nystrom", "dense"])
def test_residual_is_the_true_one(name, damping, start):
    solvers = {
        "conjugate gradient": ConjugateGradient(4, damping=damping),
        "normal": NormalConjugateGradient(4, damping=damping),
        "nystrom": Nystrom(5, damping=damping or 0.01),
        "dense": Dense(damping=damping),
    }
    solution = solvers[name].solve(Counted(A).system(B), start)
    true = (B - (A + solvers[name].damping * EYE) @ flat(solution.v)).norm() / B.norm()
    assert solution.residual == pytest.approx(float(true), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("start", [None, split(B.flip(0))], ids=["cold", "warm"])
@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize(
    "make",
    [
        lambda steps, damping: Neumann(steps, LR, damping),
        lambda steps, damping: FixedPointIteration(steps, lr=LR, damping=damping),
        lambda steps, damping: Stochastic(steps, lambda p: torch.optim.SGD(p, lr=LR), damping=damping),
    ],
    ids=["neumann", "fixed point", "stochastic"],
)
def test_residual_is_that_of_the_iterate_before(make, damping, start):
    before, solution = (make(steps, damping).solve(Counted(A).system(B), start) for steps in (5, 6))
    true = (B - (A + damping * EYE) @ flat(before.v)).norm() / B.norm()
    assert solution.residual == pytest.approx(float(true), rel=1e-9)


@pytest.mark.parametrize(
    ("solver", "products"),
    [
        (ConjugateGradient(7), 7),
        (NormalConjugateGradient(7), 15),
        (Neumann(7, LR), 7),
        (FixedPointIteration(7, lr=LR), 6),
        (Stochastic(7), 7),
        (Nystrom(7), 8),
        (Dense(), 20),
    ],
)
def test_products_are_counted(solver, products):
    system = Counted(A)
    assert solver.solve(system.system(B)).products == len(system.calls) == products
    warm, more = Counted(A), 0 if isinstance(solver, Stochastic) else 1  # its first product is with the start anyhow
    assert solver.solve(warm.system(B), split(B)).products == len(warm.calls) == products + more


@pytest.mark.parametrize("damping", [0.2, 3.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda d: ConjugateGradient(20, damping=d),
        lambda d: NormalConjugateGradient(40, damping=d),
        lambda d: Neumann(300, 0.15, damping=d),
        lambda d: FixedPointIteration(300, lr=0.15, damping=d),
        lambda d: Stochastic(300, lambda p: torch.optim.SGD(p, lr=0.15), damping=d),
        lambda d: Nystrom(20, damping=d),
        lambda d: Dense(damping=d),
    ],
)
def test_damping_is_added_to_the_diagonal(make, damping):
    v = make(damping).solve(Counted(A).system(B)).v
    assert relative(v, torch.linalg.solve(A + damping * EYE, B)) < 1e-8


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_warm_start_at_the_solution_stays_there(solver):
    exact = torch.linalg.solve(A + solver.damping * EYE, B)
    solution = solver.solve(Counted(A).system(B), split(exact))
    assert relative(solution.v, exact) < 1e-13
    if isinstance(solver, ConjugateGradient):
        assert (solution.products, solution.status) == (1, "converged")


@pytest.mark.parametrize(
    "solver",
    [ConjugateGradient(4), NormalConjugateGradient(4), Neumann(4, LR), FixedPointIteration(4, lr=LR), Stochastic(4)],
)
def test_warm_start_helps(solver):
    exact = torch.linalg.solve(A, B)
    near = split(exact + 1e-3 * B.flip(0))
    cold, warm = solver.solve(Counted(A).system(B)), solver.solve(Counted(A).system(B), near)
    assert relative(warm.v, exact) < 1e-2 * relative(cold.v, exact)
    assert warm.residual < 0.05 * cold.residual


def test_tolerance_stops():
    for make in (ConjugateGradient, NormalConjugateGradient, lambda k, tol: FixedPointIteration(k, tol, LR)):
        system = Counted(A)
        solution = make(500, tol=1e-4).solve(system.system(B))
        assert solution.status == "converged"
        assert solution.residual <= 1e-4
        assert len(system.calls) < 60
        assert make(3, tol=1e-4).solve(Counted(A).system(B)).status == "stopped"


@pytest.mark.parametrize("start", [None, split(B.flip(0))], ids=["cold", "warm"])
def test_three_names_of_one_iteration(start):
    fixed = FixedPointIteration(12, lr=0.1).solve(Counted(A).system(B), start).v
    neumann = Neumann(11, 0.1).solve(Counted(A).system(B), start).v
    sgd = Stochastic(12, lambda p: torch.optim.SGD(p, lr=0.1)).solve(Counted(A).system(B), start).v
    assert relative(neumann, flat(fixed)) < 1e-14
    assert relative(sgd, flat(fixed)) < 1e-14


def test_stochastic_takes_any_optimizer():
    solver = Stochastic(2500, lambda p: torch.optim.Adam(p, lr=0.01))
    solution = solver.solve(Counted(A).system(B))
    assert relative(solution.v, torch.linalg.solve(A, B)) < 1e-6
    assert solution.residual < 1e-6


@pytest.mark.parametrize(
    "solver",
    [Neumann(40, 0.02), FixedPointIteration(40, lr=0.02), Stochastic(40, lambda p: torch.optim.SGD(p, lr=0.02))],
)
def test_stochastic_solvers_take_sample_j_for_product_j(solver):
    """Two matrices in turn whose mean is A: the solution is near that of A, not that of the first one."""
    assert solver.samples == 40
    system = Counted(A + 0.9 * EYE, A - 0.9 * EYE)
    solver.solve(system.system(B))
    assert system.calls == list(range(len(system.calls)))
    solver.steps = 2000
    v = solver.solve(system.system(B)).v
    assert relative(v, torch.linalg.solve(A, B)) < 0.05
    assert relative(v, torch.linalg.solve(A + 0.9 * EYE, B)) > 0.2


@pytest.mark.parametrize("solver", [ConjugateGradient(), NormalConjugateGradient(), Nystrom(), Dense()])
def test_the_others_take_one_sample(solver):
    system = Counted(A, 2 * A)
    solver.solve(system.system(B))
    assert solver.samples == 0
    assert set(system.calls) <= {0, "transpose"}


def test_randomised_neumann_is_one_term_times_their_number():
    """(K + 1) lr (I - lr A)^p b with p in 0..K, whose mean over all p is the series."""
    torch.manual_seed(0)
    found = {}
    for _ in range(60):
        solution = Neumann(4, LR, randomised=True).solve(Counted(A).system(B))
        found[solution.products] = flat(solution.v)
        power = torch.linalg.matrix_power(EYE - LR * A, solution.products)
        assert relative(solution.v, 5 * LR * power @ B) < 1e-13
    series = flat(Neumann(4, LR).solve(Counted(A).system(B)).v)
    assert float((sum(found[p] for p in range(5)) / 5 - series).norm() / series.norm()) < 1e-13


def test_randomised_neumann_from_a_start():
    """v_0 + (K + 1) lr (I - lr A)^p (b - A v_0), whose product with v_0 takes a sample of its own."""
    torch.manual_seed(0)
    start = B.flip(0)
    for _ in range(10):
        system = Counted(A)
        solution = Neumann(4, LR, randomised=True).solve(system.system(B), split(start))
        p = solution.products - 1
        expected = start + 5 * LR * torch.linalg.matrix_power(EYE - LR * A, p) @ (B - A @ start)
        assert relative(solution.v, expected) < 1e-13
        assert system.calls == [p, *range(p)]


def test_randomised_neumann_is_unbiased():
    torch.manual_seed(0)
    solver = Neumann(8, LR, randomised=True)
    solutions = [solver.solve(Counted(A).system(B)) for _ in range(400)]
    draws = torch.stack([flat(solution.v) for solution in solutions])
    series = flat(Neumann(8, LR).solve(Counted(A).system(B)).v)
    error = (draws.mean(0) - series).abs() / (draws.std(0) / 400**0.5)
    assert error.max() < 3
    shares = torch.bincount(torch.tensor([solution.products for solution in solutions])) / 400
    torch.testing.assert_close(shares, torch.full((9,), 1 / 9), atol=0.05, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("start", [None, split(B)], ids=["cold", "warm"])
def test_zero_right_hand_side(solver, start):
    system = Counted(A)
    solution = solver.solve(system.system(torch.zeros_like(B)), start)
    assert not flat(solution.v).any()
    assert (solution.residual, solution.products, solution.status) == (0.0, 0, "zero")
    assert system.calls == []


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


ONES = torch.ones(4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("matrix", "solver", "status"),
    [
        (diagonal(1, 2, 3, -5), ConjugateGradient(), "indefinite"),
        (diagonal(-1, -2, -3, -4), ConjugateGradient(), "indefinite"),
        (diagonal(1, 2, 3, -5), Dense(), "indefinite"),
        (diagonal(1, 2, 3, -5), Nystrom(4), "indefinite"),
        (diagonal(1, 2, 3, -5), ConjugateGradient(damping=6.0), "converged"),
        (diagonal(1, 2, 3, 0), ConjugateGradient(), "singular"),
        (diagonal(1, 2, 3, 0), NormalConjugateGradient(), "singular"),
        (diagonal(1, 2, 3, 0), Dense(), "singular"),
        (diagonal(1, 2, 3, 0), ConjugateGradient(damping=0.1), "converged"),
        (diagonal(0, 0, 0, 0), ConjugateGradient(), "singular"),
        (diagonal(0, 0, 0, 0), NormalConjugateGradient(), "singular"),
        (diagonal(0, 0, 0, 0), Dense(), "singular"),
        (diagonal(1, 2, 3, 4), Neumann(20, 0.9), "diverged"),
        (diagonal(1, 2, 3, 4), FixedPointIteration(20, lr=0.9), "diverged"),
        (diagonal(1, 2, 3, 4), Stochastic(20, lambda p: torch.optim.SGD(p, lr=0.9)), "diverged"),
        (diagonal(1, 2, 3, -5), Neumann(20, 0.1), "diverged"),
        (diagonal(1, 2, 3, 4), Neumann(2000, 0.9), "not finite"),
        (diagonal(1, 2, 3, 4), Neumann(20, 0.1), "stopped"),
    ],
)
def test_status(matrix, solver, status):
    assert solver.solve(Counted(matrix).system(ONES)).status == status


def test_dense_on_a_singular_system_gives_the_shortest_least_squares_solution():
    v = Dense().solve(Counted(diagonal(1, 2, 3, 0)).system(ONES)).v["v"]
    torch.testing.assert_close(v, torch.tensor([1, 1 / 2, 1 / 3, 0], dtype=torch.float64))


@pytest.mark.parametrize("name", SOLVERS)
def test_products_that_are_not_numbers(name):
    assert SOLVERS[name].solve(Counted(A * float("nan")).system(B)).status == "not finite"


@pytest.mark.parametrize("solver", [NormalConjugateGradient(40), FixedPointIteration(400, lr=1.0), Neumann(400, 1.0)])
def test_nonsymmetric_system(solver):
    m = nonsymmetric()
    assert relative(solver.solve(Counted(m).system(B, symmetric=False)).v, torch.linalg.solve(m, B)) < 1e-8


@pytest.mark.parametrize(
    "solver",
    [NormalConjugateGradient(40, damping=0.5), FixedPointIteration(400, lr=0.6, damping=0.5), Dense(damping=0.5)],
)
def test_nonsymmetric_system_with_damping(solver):
    m = nonsymmetric()
    v = solver.solve(Counted(m).system(B, symmetric=False)).v
    assert relative(v, torch.linalg.solve(m + 0.5 * EYE, B)) < 1e-8


def test_nonsymmetric_system_by_the_dense_solver():
    m = nonsymmetric()
    solution = Dense().solve(Counted(m).system(B, symmetric=False))
    assert relative(solution.v, torch.linalg.solve(m, B)) < 1e-13
    assert solution.status == "stopped"


@pytest.mark.parametrize("solver", [ConjugateGradient(), Nystrom()])
def test_nonsymmetric_system_is_refused(solver):
    with pytest.raises(BilevelError, match="needs a symmetric system.*NormalConjugateGradient"):
        solver.solve(Counted(nonsymmetric()).system(B, symmetric=False))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", SOLVERS)
def test_one_unknown(name, shape):
    rhs = {"y": torch.full(shape, 3.0, dtype=torch.float64)}
    solution = SOLVERS[name].solve(System(lambda v, j: {"y": 4.0 * v["y"]}, rhs))
    assert solution.v["y"].shape == shape
    assert float(solution.v["y"]) == pytest.approx(0.75, rel=1e-6)


def test_step_size_is_that_of_the_dynamics_by_default():
    for solver, given in ((Neumann(9), Neumann(9, 0.07)), (FixedPointIteration(9), FixedPointIteration(9, lr=0.07))):
        default = solver.solve(Counted(A).system(B, step=0.07)).v
        assert relative(default, flat(given.solve(Counted(A).system(B, step=0.2)).v)) == 0
        with pytest.raises(BilevelError, match=r"\.lr must be given"):
            solver.solve(Counted(A).system(B))


def test_dense_refuses_large_systems():
    with pytest.raises(BilevelError, match="Dense would need 20 products.*Dense.largest.*ConjugateGradient"):
        Dense(largest=19).solve(Counted(A).system(B))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConjugateGradient(0), "ConjugateGradient.steps must be a positive number, got 0"),
        (lambda: ConjugateGradient(tol=-1e-3), "ConjugateGradient.tol must not be negative"),
        (lambda: NormalConjugateGradient(damping=-0.1), "NormalConjugateGradient.damping must not be negative"),
        (lambda: Dense(damping=float("nan")), "Dense.damping must not be negative"),
        (lambda: Neumann(lr=0.0), "Neumann.lr must be a positive number"),
        (lambda: FixedPointIteration(lr=-1.0), "FixedPointIteration.lr must be a positive number"),
        (lambda: Stochastic(tol=float("inf")), "Stochastic.tol must not be negative"),
        (lambda: Nystrom(damping=0.0), "Nystrom.damping must be a positive number"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(BilevelError, match=message):
        make()


@pytest.mark.parametrize("solver", [ConjugateGradient(), NormalConjugateGradient(), Dense()])
def test_single_precision(solver):
    solution = solver.solve(Counted(A.float()).system(B.float()))
    assert flat(solution.v).dtype == torch.float32
    assert relative(solution.v, torch.linalg.solve(A, B)) < 1e-5
    assert solution.status in ("stopped", "converged")


def test_names_and_shapes_are_kept():
    for solver in SOLVERS.values():
        v = solver.solve(Counted(A).system(B)).v
        assert {name: tuple(t.shape) for name, t in v.items()} == SHAPES
        assert not any(t.requires_grad for t in v.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda steps: FixedPointIteration(steps, lr=0.02),
        lambda steps: Neumann(steps, 0.02),
        lambda steps: Stochastic(steps, lambda p: torch.optim.SGD(p, lr=0.02)),
    ],
)
def test_warm_start_of_a_stochastic_solver_is_forgotten(make):
    """After many steps the start does not matter."""
    samples, solver = (A + 0.9 * EYE, A - 0.9 * EYE), make(2000)
    cold = solver.solve(Counted(*samples).system(B)).v
    warm = solver.solve(Counted(*samples).system(B), split(torch.linalg.solve(A, B))).v
    assert relative(warm, flat(cold)) < 3e-2
