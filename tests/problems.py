"""Problems with known answers, in float64."""

import torch
from torch import Tensor, nn

from bilevel_lightning import BilevelTask, tree
from bilevel_lightning.binding import bind


class Vector(nn.Module):
    """Named vectors as parameters."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))


class Quadratic(BilevelTask):
    r"""f = |y - c|^2 / 2 + rho |x|^2 / 2 and g = y'Ay/2 - y'Bx with A symmetric, eigenvalues in [1, 4].

    y*(x) = A^{-1} B x; the gradient of f(x, y*(x)) is rho x + B'A^{-1} (A^{-1} B x - c). The lower variables are two
    tensors of different shapes, so that names and shapes matter.
    """

    def __init__(self, n: int = 6, m: int = 4, seed: int = 0, rho: float = 0.3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        q, _ = torch.linalg.qr(draw(n, n))
        self.A = q @ torch.diag(torch.linspace(1, 4, n, dtype=torch.float64)) @ q.T
        self.B, self.c, self.rho = draw(n, m), draw(n), rho
        self.upper = Vector(x=draw(m))
        y = draw(n)
        self.lower = Vector(first=y[:2].reshape(2, 1), rest=y[2:])

    def y(self) -> Tensor:
        return torch.cat([self.lower.first.flatten(), self.lower.rest])

    def upper_loss(self, batch: object) -> Tensor:
        return 0.5 * (self.y() - self.c).square().sum() + 0.5 * self.rho * self.upper.x.square().sum()

    def lower_loss(self, batch: object) -> Tensor:
        y = self.y()
        return 0.5 * y @ self.A @ y - y @ self.B @ self.upper.x

    def hypergradient(self, x: Tensor) -> Tensor:
        """The exact gradient of f(x, y*(x))."""
        inverse = torch.linalg.inv(self.A)
        return self.rho * x + self.B.T @ inverse @ (inverse @ self.B @ x - self.c)

    def unrolled(self, x: Tensor, y0: Tensor, lr: float, steps: int, truncation: int) -> Tensor:
        """The closed form of the (truncated) hypergradient of gradient descent."""
        y, eye = y0, torch.eye(len(y0), dtype=torch.float64)
        for _ in range(steps):
            y = y - lr * (self.A @ y - self.B @ x)
        series = sum(torch.linalg.matrix_power(eye - lr * self.A, i) for i in range(truncation))
        return self.rho * x + lr * (series @ self.B).T @ (y - self.c)


class ScalarStronglyConvex(BilevelTask):
    """MEHA's problem (77) with one entry: f = (x - 1)^2 / 2 + y^2 / 2, g = y^2 / 2 - x y; x* = y* = 1/2."""

    def __init__(self, start: float = 2.0) -> None:
        super().__init__()
        value = torch.tensor(start, dtype=torch.float64)
        self.upper, self.lower = Vector(x=value), Vector(y=value)

    def upper_loss(self, batch: object) -> Tensor:
        return 0.5 * (self.upper.x - 1) ** 2 + 0.5 * self.lower.y**2

    def lower_loss(self, batch: object) -> Tensor:
        return 0.5 * self.lower.y**2 - self.upper.x * self.lower.y


class ScalarMerelyConvex(BilevelTask):
    """MEHA's problem (18) with n = 1: f = (x - y2)^2/2 + (y1 - 1)^2/2, g = y1^2/2 - x y1; the solution is (1, 1, 1)."""

    def __init__(self, start: float = 0.01) -> None:
        super().__init__()
        value = torch.tensor(start, dtype=torch.float64)
        self.upper, self.lower = Vector(x=value), Vector(y1=value, y2=value)

    def upper_loss(self, batch: object) -> Tensor:
        return 0.5 * (self.upper.x - self.lower.y2) ** 2 + 0.5 * (self.lower.y1 - 1) ** 2

    def lower_loss(self, batch: object) -> Tensor:
        return 0.5 * self.lower.y1**2 - self.upper.x * self.lower.y1


class Nonlinear(BilevelTask):
    """A smooth problem without closed form, for finite differences: tanh features, coupled levels."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        self.inputs, self.targets = draw(12, 3), draw(12)
        self.upper = Vector(log_ridge=draw(3), shift=draw(12))
        self.lower = Vector(w=0.3 * draw(3), b=draw(1))

    def residual(self, shift: Tensor | float) -> Tensor:
        return torch.tanh(self.inputs @ self.lower.w + self.lower.b) - self.targets - shift

    def upper_loss(self, batch: object) -> Tensor:
        return self.residual(0.0).square().mean() + 0.01 * self.upper.log_ridge.square().sum()

    def lower_loss(self, batch: object) -> Tensor:
        ridge = (self.upper.log_ridge.exp() * self.lower.w.square()).sum()
        return self.residual(0.1 * self.upper.shift).square().mean() + 0.1 * ridge


class FromX(Nonlinear):
    """The lower level starts at y_0 = (log_ridge / 2, mean of shift): the structure of MAML."""

    persistent_lower = False

    def initial_lower(self, upper):
        return {"w": 0.5 * upper["log_ridge"], "b": upper["shift"].mean().reshape(1)}


class Contraction(BilevelTask):
    """y = Phi(x, y) = M y + x with |M| = 1/2: y* = (I - M)^{-1} x, f = |y - c|^2 / 2."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        m = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        self.m, self.c = 0.5 * m / torch.linalg.matrix_norm(m, 2), torch.randn(5, generator=generator).double()
        self.upper = Vector(x=torch.randn(5, generator=generator).double())
        self.lower = Vector(y=torch.zeros(5, dtype=torch.float64))

    def upper_loss(self, batch):
        return 0.5 * (self.lower.y - self.c).square().sum()

    def fixed_point_map(self, batch):
        return {"y": self.m @ self.lower.y + self.upper.x}


def bound(task, dynamics=None, steps=1, batch=None):
    """Returns the problem of a task, its x with the learnt settings of the dynamics, and its y."""
    learnable = {} if dynamics is None else {name: t.double() for name, t in dynamics.learnable(steps, {}).items()}
    problem, x, _ = bind(task, batch, {**tree.detach(tree.of(task.upper)), **learnable}, lambda v: v)
    return problem, x, tree.detach(tree.of(task.lower))


def flat(values):
    return torch.cat([t.flatten() for t in values.values()])


def relative(a, b):
    """The relative error of named tensors, or of vectors; names must agree."""
    if isinstance(a, dict):
        assert set(a) == set(b)
        a, b = flat(a), flat({name: b[name] for name in a})
    return float(((a - b).norm() / b.norm()).detach())


def central_differences(objective, x, step=1e-5):
    """The gradient of a scalar function of named tensors, entry by entry."""
    gradient = tree.zeros_like(x)
    for name, value in x.items():
        for i in range(value.numel()):
            shift = torch.zeros_like(value).flatten()
            shift[i] = step
            up, down = value + shift.view_as(value), value - shift.view_as(value)
            slope = (objective({**x, name: up}) - objective({**x, name: down})) / (2 * step)
            gradient[name].view(-1)[i] = float(slope)
    return gradient


def unrolled(problem, dynamics, y, steps):
    """Returns x -> f(x, y_T(x)) by plain lower steps, from y or from y_0(x), with the same random numbers each time."""

    def objective(x):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            state = dynamics.start(problem.initial(x) if problem.start_depends_on_x else y)
            for t in range(steps):
                state = dynamics.step(problem, x, state, t)
        return problem.f(x, state[0]).detach()

    return objective
