import shutil
from collections import Counter

import numpy as np
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


class Own(torch.Tensor):
    """A tensor class that make_fx does not know."""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a: a * a.sum().item(), "compile cannot record"),
        (lambda a: a * sum(a.tolist()), "compile cannot record.*tolist.*stay those of the first batch"),
        (lambda a: a * torch.as_tensor(a.detach().numpy()), "compile cannot record.*numpy"),
        (lambda a: a * torch.as_tensor(np.sin(a)), "compile cannot record.*__array__"),
        (lambda a: a.as_subclass(Own) * 2, "compile cannot record"),
        (lambda a: torch.nested.nested_tensor([a, a[:1]]).to_padded_tensor(0.0), "compile cannot record"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_recorded(function, message):
    with pytest.raises(BilevelError, match=message):
        Compiled(lambda a: (function(a), Counter()))(torch.ones(2))


@pytest.fixture
def recorded_only(monkeypatch):
    """Runs the recording as it is."""
    monkeypatch.setattr(torch, "compile", lambda program, **settings: program)


def test_another_shape_is_recorded_anew(recorded_only):
    """The recording of one shape, in which the length is a number, would be wrong for another."""
    compiled = Compiled(lambda a: (len(a) * a, Counter(calls=len(a))))
    for n in (2, 3, 2):
        result, counts = compiled(torch.ones(n))
        assert result.tolist() == [n] * n
        assert counts["calls"] == n
        counts["calls"] = 0  # the caller's copy
    assert len(compiled.programs) == 2


def test_a_size_that_comes_from_values_is_not_that_of_another_batch(recorded_only):
    compiled = Compiled(lambda a, chosen: (a[chosen].expand(int(a[chosen].shape[0])), Counter()))
    values = torch.arange(3.0)
    assert compiled(values, torch.tensor([True, False, True]))[0].tolist() == [0, 2]
    with pytest.raises(BilevelError, match="compile cannot run its recording on this batch; leave it off"):
        compiled(values, torch.tensor([True, True, True]))


def dropped():
    return Compiled(lambda a: (nn.functional.dropout(a), Counter()))


def test_recording_leaves_the_random_state(recorded_only):
    compiled, ones = dropped(), torch.ones(100)
    for _ in range(2):  # with and without recording
        torch.manual_seed(0)
        found = compiled(ones)[0]
        torch.manual_seed(0)
        assert torch.equal(found, nn.functional.dropout(ones))


@compiles
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_random_numbers_are_drawn_anew():
    compiled, ones, draws = dropped(), torch.ones(1000), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws += [compiled(ones)[0], compiled(ones)[0]]
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[4])
    assert 0.9 < torch.stack(draws).mean() < 1.1
