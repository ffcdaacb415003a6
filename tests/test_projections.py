"""Every set and proximal map against a solution found another way, and the laws that hold for all projections."""

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from scipy.optimize import brentq, minimize
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel_lightning import BilevelError
from bilevel_lightning.projections import (
    Ball,
    BallInBox,
    Box,
    ConvolutionBall,
    Projection,
    Simplex,
    SpectralBall,
    block_soft_threshold,
    soft_threshold,
)

INF = float("inf")
NORMS = {"l2": 2, "l1": 1, "linf": INF}


def normal(*shape, scale=1.0, seed=0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bounds(*shape, seed=0):
    """A box for each row; one in three contains 0 in all entries, in the others an edge or a gap keeps off it."""
    low, high = -normal(*shape, seed=seed + 1).abs(), normal(*shape, seed=seed + 2).abs()
    low[1::3, 0], high[1::3, 1], low[2::3, 2], high[2::3, 2] = 0.0, 0.0, 0.2, 0.9
    high[2::3, 3], low[2::3, 3] = -0.1, -0.5
    return low, high


LOW, HIGH = bounds(6, 5)


def in_ball(norm, radius, low=-INF, high=INF):
    def contains(q):
        size = torch.linalg.vector_norm(q, NORMS[norm], -1)
        return (size <= radius + 1e-12) & ((q >= low) & (q <= high)).all(-1)

    return contains


# name: projection, whether a point (6, 5) or (6, 4, 3) is feasible, and a feasible point
CASES = {
    "box": (Box(LOW, 1.0), lambda q: ((q >= LOW) & (q <= 1)).all(-1), (LOW + 1) / 2),
    "half box": (Box(high=0.3), lambda q: (q <= 0.3).all(-1), torch.zeros(6, 5).double()),
    "simplex": (
        Simplex(2.0),
        lambda q: (q >= 0).all(-1) & ((q.sum(-1) - 2).abs() < 1e-12),
        torch.full((6, 5), 0.4, dtype=torch.float64),
    ),
    "spectral": (
        SpectralBall(0.7),
        lambda q: torch.linalg.matrix_norm(q, 2) <= 0.7 + 1e-9,
        torch.zeros(6, 4, 3).double(),
    ),
}
for norm, radius in (("l2", 0.8), ("l1", 1.2), ("linf", 0.5)):
    CASES[norm] = (Ball(radius, norm, 1), in_ball(norm, radius), torch.zeros(6, 5).double())
    inside = BallInBox(radius, norm, 1, LOW, HIGH)
    CASES[f"{norm} in box"] = (inside, in_ball(norm, radius, LOW, HIGH), torch.zeros(6, 5).double().clamp(LOW, HIGH))
cases = pytest.mark.parametrize("case", CASES)


def points(case, scale, seed=0):
    return normal(*CASES[case][2].shape, scale=scale, seed=seed)


@cases
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_projections_are_feasible_and_idempotent_and_leave_their_argument(case, scale):
    project, contains, _ = CASES[case]
    point = points(case, scale)
    before = point.clone()
    once = project(point)
    assert contains(once).all()
    assert (project(once) - once).abs().max() <= 1e-10
    assert torch.equal(point, before)
    assert once.dtype == point.dtype
    assert once.shape == point.shape


@cases
def test_points_of_the_set_stay_bit_for_bit(case):
    project, contains, start = CASES[case]
    inner = start + points(case, 0.02)
    if case == "simplex":  # a sum that is exact
        start = inner = torch.tensor([[0.25, 0.5, 0.0, 1.0, 0.25]]).double().repeat(6, 1)
    inner = torch.where(contains(inner).view(-1, *[1] * (inner.ndim - 1)), inner, start)
    assert torch.equal(project(inner), inner)
    assert case == "simplex" or (inner != start).any()


@cases
def test_the_variational_inequality_of_the_nearest_point(case):
    """<p - P(p), q - P(p)> <= 0 for all feasible q, which are drawn without any projection."""
    project, contains, start = CASES[case]
    tried = 0
    point = points(case, 2.0, seed=5)
    nearest = project(point)
    for seed in range(40):
        toward = normal(*start.shape, seed=100 + seed)
        if case == "simplex":
            toward = 2 * toward.softmax(-1) - start
        for halving in range(8):
            q = start + toward * 0.5**halving
            kept = contains(q)
            products = ((point - nearest) * (q - nearest)).flatten(1).sum(1)
            assert (products[kept] <= 1e-9).all()
            tried += int(kept.sum())
    assert tried > 300
    assert ((point - nearest).flatten(1).norm(dim=1) > 1e-3).sum() >= 4


@cases
def test_a_batch_is_its_rows_one_by_one(case):
    project = CASES[case][0]
    point = points(case, 2.0)
    if isinstance(project, BallInBox):
        rows = [
            BallInBox(project.radius, project.norm)(p, low, high) for p, low, high in zip(point, LOW, HIGH, strict=True)
        ]
    elif case == "box":
        rows = [Box(low, 1.0)(p) for p, low in zip(point, LOW, strict=True)]
    elif isinstance(project, Ball):
        rows = [Ball(project.radius, project.norm)(p) for p in point]
    else:
        rows = [project(p) for p in point]
    torch.testing.assert_close(torch.stack(rows), project(point), rtol=1e-14, atol=1e-14)


@cases
def test_derivatives(case):
    project = CASES[case][0]
    for scale in (0.1, 1.0, 3.0):
        point = points(case, scale, seed=3).requires_grad_()
        assert gradcheck(project, point)
        assert gradgradcheck(project, point, fast_mode=True)


@cases
def test_derivatives_without_nan_at_zero_and_at_the_border(case):
    project, _, start = CASES[case]
    border = project(points(case, 3.0))
    for point in (torch.zeros_like(start), border):
        point.requires_grad_()
        weights = normal(*point.shape, seed=8).requires_grad_()
        first = grad((weights * project(point)).sum(), point, create_graph=True)[0]
        assert first.isfinite().all()
        # forward mode differentiates the adjoint; second derivatives of singular vectors do not exist at zero
        leaves = (weights,) if case == "spectral" else (weights, point)
        second = grad(first.square().sum(), leaves, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in second)


@cases
def test_single_precision(case):
    project, point = CASES[case][0], points(case, 2.0)
    single = project(point.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), project(point), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [None, *NORMS])
def test_projections_are_recorded_and_mapped(norm):
    """`compile` records them, and torch.func.vmap maps them; a box around 0 needs no look at its values."""
    around = BallInBox(0.7, norm, 1, -0.6, 0.5) if norm else Box(-0.6, 0.5)
    for project in (around, Ball(0.7, norm, 1) if norm else Simplex(), SpectralBall(0.7)):
        point = normal(6, 4, 3)
        torch.testing.assert_close(vmap(project)(point), project(point), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(make_fx(project)(point)(3 * point), project(3 * point), rtol=0, atol=0)
    fixed = BallInBox(0.7, norm or "l2", 1, -HIGH.abs(), HIGH.abs())
    point = normal(6, 5)
    torch.testing.assert_close(make_fx(fixed)(point)(3 * point), fixed(3 * point), rtol=0, atol=0)


def nearest_by_slsqp(point, radius, norm, low, high):
    """The quadratic program over q or, for l1, over q = a - b with a and b >= 0, whose norm is sum(a + b)."""
    eye = np.eye(len(point))
    part = np.hstack([eye, -eye]) if norm == "l1" else eye
    size = {
        "l2": lambda z: [radius**2 - z @ z],
        "l1": lambda z: [radius - z.sum()],
        "linf": lambda z: np.concatenate([radius - z, radius + z]),
    }[norm]
    middle = np.clip(0, low, high)
    found = minimize(
        lambda z: 0.5 * np.sum((part @ z - point) ** 2),
        np.concatenate([np.maximum(middle, 0), np.maximum(-middle, 0)]) if norm == "l1" else middle,
        jac=lambda z: part.T @ (part @ z - point),
        bounds=[(0, None)] * part.shape[1] if norm == "l1" else None,
        constraints=[
            {"type": "ineq", "fun": lambda z: np.concatenate([high - part @ z, part @ z - low])},
            {"type": "ineq", "fun": size},
        ],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return part @ found.x


@pytest.mark.parametrize(("norm", "radius"), [("l2", 0.8), ("l1", 1.2), ("linf", 0.6)])
def test_ball_in_box_against_a_quadratic_program(norm, radius):
    point, (low, high) = normal(50, 5, scale=2.0, seed=11), bounds(50, 5, seed=20)
    rows = zip(point.numpy(), low.numpy(), high.numpy(), strict=True)
    expected = [nearest_by_slsqp(p, radius, norm, lo, hi) for p, lo, hi in rows]
    found = BallInBox(radius, norm, 1)(point, low, high)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    one_after_the_other = Box(low, high)(Ball(radius, norm, 1)(point))
    assert norm == "linf" or (found - one_after_the_other).abs().max() > 0.05


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_ball_in_box_against_the_root_of_its_multiplier(norm):
    images = normal(20, 784, seed=30).sigmoid()
    point, radius = normal(20, 784, scale=3.0, seed=31), {"l2": 5.0, "l1": 50.0}[norm]
    found = BallInBox(radius, norm, dims=1)(point, low=-images, high=1 - images)
    assert (torch.linalg.vector_norm(found, NORMS[norm], 1) / radius - 1).abs().max() <= 1e-12
    for p, image, q in zip(point.numpy(), images.numpy(), found.numpy(), strict=True):
        if norm == "l2":
            moved = lambda s, p=p, image=image: np.clip(s * p, -image, 1 - image)
        else:
            moved = lambda t, p=p, image=image: np.clip(np.sign(p) * np.maximum(np.abs(p) - t, 0), -image, 1 - image)
        ends = (0.0, 1.0) if norm == "l2" else (0.0, np.abs(p).max())
        excess = lambda t, moved=moved: np.linalg.norm(moved(t), NORMS[norm]) - radius
        root = brentq(excess, *ends, xtol=1e-15, rtol=1e-14)
        np.testing.assert_allclose(q, moved(root), rtol=0, atol=1e-12)


def test_multipliers_of_any_size_are_exact():
    """P(c p) for c from 1e-6 to 1e12 keeps the radius, also where nearly all entries rest at their bounds."""
    for scale in 10.0 ** torch.arange(-6, 13):
        point = scale * normal(6, 40, seed=40)
        for norm, radius in (("l2", 0.5), ("l1", 1.5)):
            for high in (0.1, 0.079, 1e3):
                ball = BallInBox(radius, norm, 1, -high, high)
                found, size = ball(point), torch.linalg.vector_norm(point.clamp(-high, high), NORMS[norm], 1)
                expected = size.clamp(max=radius)
                got = torch.linalg.vector_norm(found, NORMS[norm], 1)
                # l1: the threshold is nearly the largest entry, and |p| - t loses digits in proportion to |p|
                slack = 1e-12 + (float(scale) * 1e-14 if norm == "l1" else 0)
                torch.testing.assert_close(got, expected, rtol=0, atol=slack)
                assert found.abs().max() <= high


def test_entries_that_are_zero_equal_or_fixed():
    point = torch.tensor([[0.0, 0.0, 0.0], [3.0, 3.0, 3.0], [0.0, 5.0, -5.0], [4.0, 4.0, 0.0]]).double()
    low, high = torch.tensor([-1.0, 0.5, -1.0]).double(), torch.tensor([1.0, 0.5, INF]).double()
    for norm, size in (("l2", lambda free: (1 - 0.25) ** 0.5 * free / max(np.linalg.norm(free), 1e-9)), ("l1", None)):
        found = BallInBox(1.0, norm, 1, low, high)(point)
        assert (found[:, 1] == 0.5).all()
        assert found[0].tolist() == [0.0, 0.5, 0.0]
        if size:
            np.testing.assert_allclose(found[1, [0, 2]], size(np.array([3.0, 3.0])), rtol=1e-14)
            np.testing.assert_allclose(found[3, [0, 2]], size(np.array([4.0, 0.0])), rtol=1e-14)
        else:
            np.testing.assert_allclose(found[1:], [[0.25, 0.5, 0.25], [0, 0.5, -0.5], [0.5, 0.5, 0]], rtol=1e-14)


def test_derivatives_reach_the_bounds():
    point = normal(6, 5, scale=2.0, seed=50).requires_grad_()
    low, high = LOW.clone().requires_grad_(), HIGH.clone().requires_grad_()
    low.data[1::3, 0] -= 0.3  # away from kinks
    high.data[1::3, 1] += 0.3
    for norm, radius in (("l2", 0.8), ("l1", 1.2), ("linf", 0.55)):
        assert gradcheck(BallInBox(radius, norm, 1), (point, low, high))
    assert gradcheck(lambda p, lo, hi: Box(lo, hi)(p), (point, low, high))


def test_dims_say_over_which_dimensions_the_norm_runs():
    point = normal(2, 3, 4, scale=3.0)
    for norm in ("l2", "l1"):
        for dims, rows in ((1, 6), (2, 2), (3, 1), (None, 1)):
            expected = torch.stack([Ball(0.5, norm)(p) for p in point.view(rows, -1)]).view_as(point)
            torch.testing.assert_close(Ball(0.5, norm, dims)(point), expected)
            torch.testing.assert_close(BallInBox(0.5, norm, dims)(point), expected)
    assert Ball(0.5)(torch.tensor(2.0)) == 0.5
    assert (Ball(0.5)(torch.zeros(0, 3)) == 0).all()


def test_l1_ball_against_every_support():
    """The threshold by trying all numbers of nonzero entries, largest first: the one that agrees with itself."""
    for seed in range(20):
        p = normal(7, scale=2.0, seed=seed).numpy()
        largest = np.sort(np.abs(p))[::-1]
        agree = []
        for count in range(1, 8):
            t = (largest[:count].sum() - 1.5) / count
            if largest[count - 1] > t and (count == 7 or largest[count] <= t):
                agree.append(t)
        expected = p if np.abs(p).sum() <= 1.5 else np.sign(p) * np.maximum(np.abs(p) - agree[0], 0)
        np.testing.assert_allclose(Ball(1.5, "l1")(torch.from_numpy(p)), expected, rtol=0, atol=1e-14)


def test_simplex_against_a_quadratic_program():
    for seed in range(20):
        p = normal(6, seed=seed).numpy()
        found = minimize(
            lambda q, p=p: 0.5 * np.sum((q - p) ** 2), np.full(6, 0.5), jac=lambda q, p=p: q - p,
            bounds=[(0, None)] * 6, constraints={"type": "eq", "fun": lambda q: q.sum() - 3}, method="SLSQP",
            options={"ftol": 1e-15},
        )  # fmt: skip
        np.testing.assert_allclose(Simplex(3.0)(torch.from_numpy(p)), found.x, rtol=0, atol=1e-6)


def test_a_zero_radius_leaves_one_point():
    point = normal(3, 4).requires_grad_()
    for norm in NORMS:
        for ball in (Ball(0.0, norm, 1), BallInBox(0.0, norm, 1, -1.0, 1.0)):
            assert (ball(point) == 0).all()
            assert (ball(torch.zeros(3, 4)) == 0).all()
            assert (grad(ball(point).sum(), point)[0].isfinite()).all()


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_spectral_ball_cuts_singular_values(shape):
    a = normal(*shape)
    u, s, vt = np.linalg.svd(a.numpy(), full_matrices=False)
    found = SpectralBall(1.0)(a)
    np.testing.assert_allclose(found, (u * np.minimum(s, 1.0)) @ vt, rtol=0, atol=1e-14)
    assert np.linalg.norm(found, 2) <= 1 + 1e-9
    assert gradcheck(SpectralBall(1.0), a.requires_grad_())
    assert gradgradcheck(SpectralBall(1.0), a, fast_mode=True)


def test_spectral_derivatives_at_equal_and_zero_singular_values():
    q, _ = torch.linalg.qr(normal(5, 5))
    for s in ([2.0, 2.0, 0.5, 0.5], [2.0, 0.5, 0.0, 0.0], [3.0, 2.0, 2.0, 2.0], [0.5, 0.5, 0.5, 0.0]):
        for a in ((q[:, :4] * torch.tensor(s)) @ q[:4, :4], (q[:, :4] * torch.tensor(s)).T.contiguous()):
            assert gradcheck(SpectralBall(1.0), a.detach().requires_grad_(), atol=1e-6)


def test_soft_threshold_against_brute_force():
    p, t = normal(40, scale=2.0), normal(40, seed=1).abs()
    found = soft_threshold(p, t)
    for a, b, q in zip(p.tolist(), t.tolist(), found.tolist(), strict=True):
        cost = lambda y, a=a, b=b: 0.5 * (y - a) ** 2 + b * abs(y)
        sides = [minimize_on(cost, *sorted((0.0, end))) for end in (-5.0, 5.0)]
        assert cost(q) <= min(cost(y) for y in sides) + 1e-15
        assert min(abs(q - y) for y in sides) <= 1e-7
    assert torch.equal(soft_threshold(p, 0.0), p)
    torch.testing.assert_close(soft_threshold(p, 0.3), soft_threshold(p, torch.full_like(p, 0.3)))


def minimize_on(cost, low, high):
    """Golden section."""
    ratio = (5**0.5 - 1) / 2
    for _ in range(100):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if cost(a) < cost(b) else (a, high)
    return (low + high) / 2


def test_block_soft_threshold_against_brute_force():
    p, t = normal(3, 12, 4), normal(12, seed=1).abs() * 1.5
    found = block_soft_threshold(p, t)
    assert ((found == 0).all(-1)).any()
    assert ((found != 0).all(-1)).any()
    for a, b, q in zip(p.view(36, 4).numpy(), t.repeat(3).tolist(), found.view(36, 4).numpy(), strict=True):
        cost = lambda y, a=a, b=b: 0.5 * np.sum((y - a) ** 2) + b * np.linalg.norm(y)
        slope = lambda y, a=a, b=b: y - a + b * y / np.linalg.norm(y)
        best = minimize(cost, a, jac=slope, method="BFGS", options={"gtol": 1e-12}).x
        best = min(best, np.zeros(4), key=cost)
        assert cost(q) <= cost(best) + 1e-15
        np.testing.assert_allclose(q, best, rtol=0, atol=1e-8)
    assert torch.equal(block_soft_threshold(p, 0.0), p)
    torch.testing.assert_close(block_soft_threshold(p, 0.3), block_soft_threshold(p, torch.full((3, 12), 0.3)))


def test_derivatives_of_the_proximal_maps():
    p, t = normal(6, 4, seed=2).requires_grad_(), normal(6, 4, seed=3).abs().requires_grad_()
    row = (2 * t.detach()[:, 0]).requires_grad_()
    assert 0 < (block_soft_threshold(p, row) == 0).all(-1).sum() < 6
    assert 0 < (soft_threshold(p, t) == 0).sum() < 24
    for map_, level in ((soft_threshold, t), (block_soft_threshold, row)):
        assert gradcheck(map_, (p, level))
        assert gradgradcheck(map_, (p, level))


def test_the_proximal_maps_at_zero():
    """No NaN at zero blocks in any derivative, and threshold 0 is the identity there too."""
    for map_, leading in ((soft_threshold, (2, 3)), (block_soft_threshold, (2,))):
        for level in (0.0, 0.7):
            p, t = torch.zeros(2, 3, requires_grad=True), torch.full(leading, level, requires_grad=True)
            weights = normal(2, 3, dtype=torch.float32).requires_grad_()
            g_p, g_t = grad((weights * map_(p, t)).sum(), (p, t), create_graph=True)
            assert (map_(p, t) == 0).all()
            assert torch.equal(g_p, weights if level == 0 else torch.zeros(2, 3))
            assert torch.equal(g_t, torch.zeros(leading))
            second = grad(g_p.square().sum() + g_t.square().sum(), (p, t, weights), allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in second)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ball(-1.0), "Ball.radius must not be negative, got -1"),
        (lambda: Ball(float("nan")), "Ball.radius"),
        (lambda: Ball(INF), "Ball.radius"),
        (lambda: BallInBox(-1.0), "BallInBox.radius"),
        (lambda: SpectralBall(0.0), "SpectralBall.radius must be a positive number"),
        (lambda: Simplex(0.0), "Simplex.total must be a positive number"),
        (lambda: Ball(1.0, "l3"), "Ball.norm must be one of l2, l1, linf, got l3"),
        (lambda: Ball(1.0, dims=0), "Ball.dims"),
        (lambda: Ball(1.0, dims=2)(torch.ones(3)), "Ball.dims is 2, but the tensor has 1"),
        (lambda: SpectralBall(1.0)(torch.ones(3)), "SpectralBall needs matrices"),
        (Box, "Box needs low, high, or both"),
        (lambda: Box(1.0, 0.0), "Box: low must not be above high"),
        (lambda: Box(torch.tensor([0.0, 1.0]), 0.5), "Box: low must not be above high"),
        (lambda: Box(float("nan")), "neither may be NaN"),
        (lambda: BallInBox(1.0, low=0.0, high=torch.tensor([1.0, -1.0])), "BallInBox: low must not be above high"),
        (lambda: BallInBox(1.0)(torch.ones(2), torch.ones(2), 0.0), "BallInBox: low must not be above high"),
        (lambda: BallInBox(1.0, low=0.8)(torch.zeros(2)), "the ball does not meet the box; raise radius"),
        (lambda: BallInBox(1.0, dims=1)(torch.zeros(2, 2), high=torch.tensor([[0.0], [-0.8]])), "does not meet"),
        (lambda: soft_threshold(torch.ones(2), -0.1), "threshold must not be negative"),
        (lambda: block_soft_threshold(torch.ones(2), -0.1), "threshold must not be negative"),
    ],
)
def test_errors(make, message):
    with pytest.raises(BilevelError, match=message):
        make()


def test_bounds_of_the_call_replace_those_of_the_value():
    point, ball = normal(6, 5, scale=2.0), BallInBox(1.0, dims=1, low=0.0, high=0.7)
    assert torch.equal(ball(point, high=0.3), BallInBox(1.0, dims=1, low=0.0, high=0.3)(point))
    assert torch.equal(ball(point, LOW), BallInBox(1.0, dims=1, low=LOW, high=0.7)(point))
    assert torch.equal(ball(point, LOW, HIGH), BallInBox(1.0, dims=1, low=LOW, high=HIGH)(point))


def test_a_box_that_touches_the_ball_is_met():
    found = BallInBox(1.0, low=0.1)(torch.zeros(100).double())  # the norm of the corner rounds to more than 1
    torch.testing.assert_close(found, torch.full((100,), 0.1, dtype=torch.float64), rtol=0, atol=1e-15)


def test_a_config_names_projections_by_class():
    parser = ArgumentParser()
    parser.add_argument("--set", type=Projection)
    for given in (
        {"class_path": "BallInBox", "init_args": {"radius": 5.0, "norm": "l1", "dims": 1, "low": 0.0}},
        {"class_path": "Box", "init_args": {"low": -1.0, "high": None}},
        {"class_path": "Simplex"},
        {"class_path": "SpectralBall", "init_args": {"radius": 0.5}},
    ):
        made = parser.instantiate_classes(parser.parse_object({"set": given})).set
        assert type(made).__name__ == given["class_path"]
        assert all(getattr(made, name) == value for name, value in given.get("init_args", {}).items())


# Kernels of convolutions.


def zero_padded(kernel, height, width):
    """The matrix of a zero-padded convolution on maps (height, width)."""
    maps = torch.eye(kernel.shape[1] * height * width, dtype=kernel.dtype).view(-1, kernel.shape[1], height, width)
    pads = tuple(n // 2 for n in kernel.shape[-2:])
    return torch.conv2d(maps, kernel, padding=pads).flatten(1)


def circular(kernel, height, width):
    """The matrix of the convolution on a torus."""
    maps = torch.eye(kernel.shape[1] * height * width, dtype=kernel.dtype).view(-1, kernel.shape[1], height, width)
    pads = [n // 2 for n in reversed(kernel.shape[-2:]) for _ in range(2)]
    return torch.conv2d(torch.nn.functional.pad(maps, pads, mode="circular"), kernel).flatten(1)


@pytest.mark.parametrize("shape", [(2, 2, 3, 3), (3, 2, 1, 3), (2, 3, 5, 3)])
def test_convolution_norm_is_that_of_its_matrix_and_bounds_the_zero_padded_one(shape):
    for seed in range(5):
        kernel = normal(*shape, seed=seed)
        norm = ConvolutionBall(1.0, (5, 7)).norm(kernel)
        torch.testing.assert_close(norm, torch.linalg.matrix_norm(circular(kernel, 5, 7), 2))
        height, width = 5 - shape[-2] // 2, 7 - shape[-1] // 2
        padded = torch.linalg.matrix_norm(zero_padded(kernel, height, width), 2)
        assert 0.5 * norm < padded <= norm * (1 + 1e-12)


def test_the_norm_on_a_smaller_map_is_no_bound():
    """What a projection on a grid of half the size misses."""
    kernels = [normal(2, 2, 3, 3, seed=seed) for seed in range(20)]
    true = [float(torch.linalg.matrix_norm(zero_padded(kernel, 6, 6), 2)) for kernel in kernels]
    half, bound = ([float(ConvolutionBall(1.0, size).norm(k)) for k in kernels] for size in ((3, 3), (7, 7)))
    assert min(h / t for h, t in zip(half, true, strict=True)) < 0.9
    assert min(b / t for b, t in zip(bound, true, strict=True)) >= 1


@pytest.mark.parametrize("scale", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("tol", [1e-3, 1e-7])
def test_convolution_ball_is_feasible_and_idempotent(scale, tol):
    project, point = ConvolutionBall(0.5, (5, 5), tol=tol), normal(3, 2, 3, 3, scale=scale)
    once = project(point)
    assert project.norm(once) <= 0.5 * (1 + 1e-12)
    assert (project(once) - once).abs().max() < 1e-14
    assert torch.equal(once, point) == (scale == 0.02)
    assert once.shape == point.shape
    assert project(point.float()).dtype == torch.float32


def test_convolution_ball_gives_the_nearest_kernel():
    """The variational inequality; and a 1x1 kernel, which is a matrix."""
    project, point = ConvolutionBall(0.5, (5, 5), tol=1e-9), normal(2, 2, 3, 3, scale=0.6, seed=4)
    nearest = project(point)
    assert (point - nearest).norm() > 0.5
    for seed in range(300):
        q = nearest + normal(2, 2, 3, 3, seed=seed, scale=0.5 ** (seed % 9))
        q = q * (0.5 / project.norm(q)).clamp(max=1.0)
        assert torch.sum((point - nearest) * (q - nearest)) <= 1e-6
    matrix = normal(4, 3)
    found = ConvolutionBall(0.5, (5, 5), tol=1e-9)(matrix[:, :, None, None])
    torch.testing.assert_close(found[:, :, 0, 0], SpectralBall(0.5)(matrix), rtol=0, atol=1e-8)


def test_convolution_ball_within_few_steps_is_feasible():
    project, point = ConvolutionBall(0.5, (5, 5), steps=2), normal(2, 2, 3, 3)
    assert abs(float(project.norm(project(point))) - 0.5) < 1e-12


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvolutionBall(0.0, (5, 5)),
        lambda: ConvolutionBall(1.0, (0, 5)),
        lambda: ConvolutionBall(1.0, (5, 5), steps=0),
        lambda: ConvolutionBall(1.0, (5, 5), tol=0.0),
        lambda: ConvolutionBall(1.0, (2, 2))(torch.zeros(1, 1, 3, 3)),
        lambda: ConvolutionBall(1.0, (2, 2))(torch.zeros(2, 2)),
    ],
)
def test_impossible_convolution_balls(make):
    with pytest.raises(BilevelError, match="ConvolutionBall"):
        make()
