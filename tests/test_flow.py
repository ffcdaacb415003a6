import math
from functools import partial

import pytest
import torch
from torch import nn

from bilevel_lightning import BilevelError, flow
from bilevel_lightning.errors import Diverged
from bilevel_lightning.flow import GradientFlow, chebyshev, coefficients, curvature, follow


def quadratic(dim=12, largest=50.0):
    """Eigenvalues from 0 to ``largest``, a linear term, and the flow from zero at time t in closed form."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    values = torch.linspace(0, largest, dim, dtype=torch.float64)
    linear = torch.randn(dim, generator=generator, dtype=torch.float64)

    def flow(t):
        factor = torch.where(values > 0, -torch.expm1(-t * values) / values.clamp(min=1e-300), t)
        return vectors @ (factor * (vectors.T @ linear))

    return vectors @ torch.diag(values) @ vectors.T, linear, flow


def closure(optimizer, loss):
    optimizer.zero_grad()
    value = loss()
    value.backward()
    return value.detach()


def followed(matrix, linear, time, **settings):
    """The end of the flow from zero, and how many gradients it took."""
    y, calls = nn.Parameter(torch.zeros_like(linear)), []
    optimizer = GradientFlow([y], lr=time, **settings)

    def loss():
        calls.append(1)
        return 0.5 * y @ matrix @ y - linear @ y

    optimizer.step(partial(closure, optimizer, loss))
    return y.detach(), len(calls)


def test_steps_are_of_second_order():
    matrix, linear, flow = quadratic()

    def error(steps):
        y = torch.zeros_like(linear)
        for _ in range(steps):
            y = chebyshev(lambda y: linear - matrix @ y, y, linear - matrix @ y, 0.5 / steps, 8)
        return float((y - flow(0.5)).norm())

    assert error(20) < 1e-2
    assert math.log2(error(20) / error(40)) == pytest.approx(2, abs=0.3)
    assert math.log2(error(40) / error(80)) == pytest.approx(2, abs=0.15)


def test_it_follows_the_flow_as_near_as_it_is_asked_to():
    matrix, linear, flow = quadratic(dim=30, largest=500.0)
    ends = {tol: followed(matrix, linear, 3.0, tol=tol) for tol in (0.1, 0.01, 0.001)}
    errors = {tol: float((end - flow(3.0)).norm() / flow(3.0).norm()) for tol, (end, _) in ends.items()}
    assert errors[0.1] < 2e-4
    assert errors[0.01] < 2e-5
    assert errors[0.001] < 2e-6
    assert ends[0.1][1] < 200  # gradient descent takes 750 steps or more, since it is not stable with fewer


def test_curvature_is_the_largest_eigenvalue():
    matrix, linear, _ = quadratic(largest=70.0)
    y, direction = torch.ones_like(linear), linear
    for _ in range(60):
        direction, largest = curvature(lambda y: linear - matrix @ y, y, linear - matrix @ y, direction)
    assert largest == pytest.approx(70, rel=1e-3)


@pytest.mark.parametrize("stages", [2, 3, 5, 10, 25])
def test_stages_are_those_of_a_stable_method_of_order_two(stages):
    """On y' = z y: the polynomial is 1 + z + z^2 / 2 + ... and stays within 1 down to z = - .65 (s^2 - 1)."""

    def polynomial(z):
        (*_, scale, _), *rest = coefficients(stages)
        before, y = torch.ones_like(z), 1 + scale * z
        for mu, nu, new, first in rest:
            before, y = y, (1 - mu - nu) + mu * y + nu * before + z * (new * y + first)
        return y

    z = torch.linspace(-0.65 * (stages**2 - 1), 0, 2001, dtype=torch.float64)
    assert polynomial(z).abs().max() <= 1 + 1e-12
    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(polynomial(at), at, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, at)
    assert (slope.item(), curvature.item()) == pytest.approx((1, 1), abs=1e-10)
    outside = torch.tensor([-0.75 * stages**2], dtype=torch.float64)
    assert stages == 2 or polynomial(outside).abs() > 1  # so that the bound of the docstring is no accident


def test_it_ends_where_many_steps_of_gradient_descent_with_momentum_end():
    torch.manual_seed(0)
    images, labels = torch.randn(200, 15, dtype=torch.float64), torch.randint(5, (200,))

    def trained(make, steps):
        torch.manual_seed(1)
        model = nn.Linear(15, 5).double()
        optimizer = make(model.parameters())
        for _ in range(steps):
            optimizer.step(partial(closure, optimizer, lambda: nn.functional.cross_entropy(model(images), labels)))
        return nn.utils.parameters_to_vector(model.parameters()).detach(), optimizer

    reference, _ = trained(partial(torch.optim.SGD, lr=0.005, momentum=0.5), 2000)  # time 20
    start, _ = trained(partial(torch.optim.SGD, lr=0.005), 0)
    for steps in (1, 4):
        reached, _ = trained(partial(GradientFlow, lr=20 / steps, tol=0.001), steps)
        assert (reached - reference).norm() < 2e-3 * (reference - start).norm()


@pytest.mark.parametrize(("dim", "tol"), [(3, 0.1), (8, 0.1), (8, 0.001)])
def test_a_straight_way_that_bends_later_is_followed(dim, tol):
    """-y + L relu(y - 1)^2 / 2 from zero: y = t until 1, then 1 + (1 - exp(-L (t - 1))) / L."""
    stiff, y, calls = torch.logspace(0, 3, dim, dtype=torch.float64), nn.Parameter(torch.zeros(dim).double()), []
    optimizer = GradientFlow([y], lr=3.0, tol=tol)

    def loss():
        calls.append(1)
        return (0.5 * stiff * (y - 1).relu().square() - y).sum()

    optimizer.step(partial(closure, optimizer, loss))
    assert (y.detach() - 1 + torch.expm1(-2 * stiff) / stiff).norm() < 0.01 * y.detach().norm()
    assert len(calls) < 400  # 2000 with the curvature of the straight part, which is zero


def test_memory_layout_does_not_matter():
    """Parameters of several shapes, transposed, strided and with channels last, against one vector."""
    matrix, linear, exact = quadratic(24)
    parts = torch.zeros(6, 2).double().T, torch.zeros(16).double()[::2], torch.zeros(1, 2, 1, 2).double()
    parts = [nn.Parameter(p) for p in (*parts[:2], parts[2].contiguous(memory_format=torch.channels_last))]
    assert [p.is_contiguous() for p in parts[:2]] == [False, False]
    optimizer = GradientFlow(parts, lr=0.5, tol=0.01)

    def loss():
        y = torch.cat([p.flatten() for p in parts])
        return 0.5 * y @ matrix @ y - linear @ y

    optimizer.step(partial(closure, optimizer, loss))
    found = torch.cat([p.detach().flatten() for p in parts])
    assert torch.equal(found, followed(matrix, linear, 0.5, tol=0.01)[0])
    assert (found - exact(0.5)).norm() < 0.005 * found.norm()


def test_rounding_cannot_keep_the_estimate_of_the_curvature_from_ending():
    """In float32 the gradients of an almost straight loss differ by rounding, and power iteration does not settle."""
    calls = []
    for seed in range(40):
        generator, count = torch.Generator().manual_seed(seed), len(calls)
        g, y = torch.randn(3, generator=generator), 10 * torch.randn(3, generator=generator)

        def slope(y, g=g, count=count):
            calls.append(1)
            assert len(calls) - count < 100
            return -1e-3 * g * torch.cos(1e-3 * y)

        torch.testing.assert_close(follow(slope, y, 1.0, 0.1), y - 1e-3 * g, rtol=1e-5, atol=1e-6)


def test_a_time_of_any_length_is_followed(monkeypatch):
    """The shortest step is a share of what the curvature asks for, not of the time."""
    monkeypatch.setattr(flow, "SHORTEST", 1e-2)
    matrix, linear, exact = quadratic(largest=500.0)
    end, _ = followed(matrix, linear, 3.0)
    assert (end - exact(3.0)).norm() < 1e-3 * end.norm()


def test_frozen_and_unused_parameters_stay():
    used, unused, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    frozen.requires_grad_(False)
    optimizer = GradientFlow([used, unused, frozen], lr=0.5, tol=1e-3)
    loss = optimizer.step(partial(closure, optimizer, lambda: used.square().sum()))
    assert loss == 2
    assert used.detach() == pytest.approx(torch.full((2,), math.exp(-1)), rel=0.01)
    assert torch.equal(unused, torch.ones(2))
    assert torch.equal(frozen, torch.ones(2))


def test_a_resting_point_stays():
    y = nn.Parameter(torch.zeros(3))
    optimizer = GradientFlow([y], lr=5.0)
    optimizer.step(partial(closure, optimizer, lambda: y.square().sum()))
    assert torch.equal(y, torch.zeros(3))


@pytest.mark.parametrize("loss", [lambda y: (y * float("nan")).sum(), lambda y: y.abs().sqrt().sum()])
def test_what_cannot_be_followed_is_said_and_changes_nothing(loss):
    y = nn.Parameter(torch.full((3,), 0.25, dtype=torch.float64))
    optimizer = GradientFlow([y], lr=5.0)
    with pytest.raises(Diverged, match="cannot follow the loss"):
        optimizer.step(partial(closure, optimizer, lambda: loss(y)))
    assert torch.equal(y, torch.full_like(y, 0.25))


def test_an_interrupted_step_changes_nothing():
    y, left = nn.Parameter(torch.ones(3)), [9]
    optimizer = GradientFlow([y], lr=5.0, tol=1e-3)

    def loss():
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return (y.square() * torch.tensor([1.0, 5.0, 50.0])).sum()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(partial(closure, optimizer, loss))
    assert torch.equal(y, torch.ones(3))


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.float64, 2e-15), (torch.bfloat16, 0.05)])
def test_a_tolerance_within_rounding_is_refused(dtype, tol):
    y = nn.Parameter(torch.ones(3, dtype=dtype))
    with pytest.raises(BilevelError, match=f"GradientFlow.tol={tol} is finer than {dtype} can tell: raise it to"):
        GradientFlow([y], lr=1.0, tol=tol).step(lambda: 0.0)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"lr": float("inf")}, {"lr": 1.0, "tol": -1.0}])
def test_impossible_settings(settings):
    with pytest.raises(BilevelError, match="GradientFlow.(lr|tol) must be a positive number"):
        GradientFlow([nn.Parameter(torch.zeros(1))], **settings)


def test_what_it_cannot_do_is_said():
    with pytest.raises(BilevelError, match="give step\\(closure\\)"):
        GradientFlow([nn.Parameter(torch.zeros(1))], lr=1.0).step()
    with pytest.raises(BilevelError, match="nothing to train"):
        GradientFlow([nn.Parameter(torch.zeros(1), requires_grad=False)], lr=1.0).step(lambda: 0.0)
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))]}]
    with pytest.raises(BilevelError, match="one parameter group"):
        GradientFlow(groups, lr=1.0)
