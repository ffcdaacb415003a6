import shutil
from collections import Counter

import pytest
import torch
from loops import Batches, fit, trainer
from problems import Nonlinear, Quadratic
from torch import nn

from bilevel_lightning import AIDCG, RHG, TRHG, BilevelError, BilevelTask, GradientDescent, Momentum
from bilevel_lightning.compiled import Compiled

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")


class Fitted(BilevelTask):
    """Ridge regression on the data of the batch, so that a recording must not hold the data of another."""

    def __init__(self):
        super().__init__()
        self.upper = nn.ParameterDict({"log_ridge": torch.zeros(3, dtype=torch.float64)})
        self.lower = nn.Linear(3, 1).double()
        nn.init.zeros_(self.lower.weight)
        nn.init.zeros_(self.lower.bias)

    def upper_loss(self, batch):
        inputs, targets = batch
        return (self.lower(inputs)[:, 0] - targets).square().mean()

    def lower_loss(self, batch):
        return self.upper_loss(batch) + (self.upper["log_ridge"].exp() * self.lower.weight.square()).sum()


def batches():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return [{"lower": (draw(8, 3), draw(8)), "upper": (draw(8, 3), draw(8))} for _ in range(3)]


@compiles
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_is_the_eager_run():
    modules = []
    for compile in (False, True):
        task = Fitted()
        modules.append(TRHG(task=task, dynamics=Momentum(0.1, 0.5), lower_steps=3, truncation=2, compile=compile))
        trainer(3).fit(modules[-1], Listed(batches()))
    eager, compiled = (module.state_dict() for module in modules)
    assert len(modules[1].compiled.programs) == 1
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-6, atol=1e-9)
    assert modules[0].task.upper["log_ridge"].abs().min() > 1e-4


class Listed(Batches):
    """A loader of given batches."""

    def __init__(self, batches):
        super().__init__(len(batches))
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AIDCG(task=Quadratic(), compile=True), "compile does not apply to AIDCG"),
        (lambda: RHG(task=Quadratic(), compile=True, memory="recompute"), "use memory 'graph'"),
    ],
)
def test_what_cannot_be_compiled(make, message):
    with pytest.raises(BilevelError, match=message):
        make()


class Branching(Nonlinear):
    """A loss that looks at a value."""

    def lower_loss(self, batch):
        return super().lower_loss(batch) * (2.0 if float(self.lower.b.detach().sum()) > 1e9 else 1.0)


def test_a_loss_that_branches_on_values_is_refused():
    with pytest.raises(BilevelError, match="compile cannot record"):
        fit(RHG(task=Branching(), dynamics=GradientDescent(0.1), lower_steps=2, compile=True), 1)


def test_another_shape_is_recorded_anew(monkeypatch):
    """The recording of one shape, in which the length is a number, would be wrong for another."""
    monkeypatch.setattr(torch, "compile", lambda program, **settings: program)
    compiled = Compiled(lambda a: (len(a) * a, Counter(calls=len(a))))
    for n in (2, 3, 2):
        result, counts = compiled(torch.ones(n))
        assert result.tolist() == [n] * n
        assert counts["calls"] == n
    assert len(compiled.programs) == 2
