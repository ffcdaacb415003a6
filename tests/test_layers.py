"""Tall products with few outputs: the values and the first two derivatives of `torch.nn.functional.linear`."""

import pytest
import torch
from problems import relative
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from bilevel_lightning import RHG, GradientDescent, layers, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.layers import quick
from bilevel_lightning.models import LinearNet
from bilevel_lightning.tasks import HyperCleaning

GENERATOR = torch.Generator().manual_seed(0)
Z, W, B = (torch.randn(s, generator=GENERATOR, dtype=torch.float64) for s in ((40, 30), (8, 30), (8,)))


@pytest.fixture
def taken(monkeypatch):
    """Layers of any height and any number of inputs, and how often one was taken the quick way."""
    found = []
    monkeypatch.setattr(layers, "INPUTS", 0)
    monkeypatch.setattr(layers, "ENTRIES", 0)
    apply = layers._Product.apply
    monkeypatch.setattr(layers._Product, "apply", lambda *args: (found.append(1), apply(*args))[1])
    return found


USES = {
    "bias": lambda w, b: functional.linear(Z, w, b),
    "bias by keyword": lambda w, b: functional.linear(Z, w, bias=b),
    "no bias": lambda w, b: functional.linear(Z, w) * b,
    "two layers": lambda w, b: functional.linear(functional.linear(Z, w, b).tanh() @ w, w, b),
    "and by itself": lambda w, b: functional.linear(Z, w, b) * w.square().sum(),
}


@pytest.mark.parametrize("name", USES)
def test_values_and_derivatives(name, taken):
    def function(w, b):
        return USES[name](**quick({"w": w, "b": b}))

    w, b = W.clone().requires_grad_(), B.clone().requires_grad_()
    assert relative({"": function(w, b)}, {"": USES[name](w, b)}) < 1e-14
    assert taken
    assert type(function(w, b)) is torch.Tensor
    torch.autograd.gradcheck(function, (w, b))
    torch.autograd.gradgradcheck(function, (w, b))


def test_other_layers_are_left_alone(taken):
    for z, w in ((Z, W[:7]), (Z, W.repeat(3, 1)), (Z[0], W), (torch.stack([Z, Z]), W)):
        functional.linear(z, quick({"w": w})["w"])
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.linear(Z.float(), quick({"w": W.float()})["w"]).dtype == torch.bfloat16
    assert not taken
    layers.ENTRIES = Z.numel() + 1
    functional.linear(Z, quick({"w": W})["w"])
    layers.ENTRIES, layers.INPUTS = 0, 31
    functional.linear(Z, quick({"w": W})["w"])
    assert not taken
    layers.INPUTS = 30
    functional.linear(Z, quick({"w": W})["w"])
    assert taken


def test_recordings_have_plain_layers(taken):
    def function(w):
        return functional.linear(Z, quick({"w": w})["w"]).square()

    recorded = make_fx(function)(W)
    assert not taken
    torch.testing.assert_close(recorded(2 * W), function(2 * W))
    assert taken


def test_hypergradient_is_that_of_plain_layers(taken, monkeypatch):
    """And each of the lower steps takes the quick way."""
    images, labels = Z.view(40, 1, 5, 6), torch.arange(40) % 8
    task = HyperCleaning(LinearNet((1, 5, 6), classes=8), 40).double()
    batch = {"lower": (images, labels, torch.arange(40)), "upper": (images, labels.flip(0))}

    def hypergradient():
        problem, x, _ = bind(task, batch, tree.detach(tree.of(task.upper)))
        module = RHG(dynamics=GradientDescent(0.1), lower_steps=6)
        return module.bilevel_step(problem, x, tree.detach(tree.of(task.lower))).upper_grad

    found = hypergradient()
    assert len(taken) == 6
    monkeypatch.setattr(layers, "ENTRIES", 10**9)
    assert relative(found, hypergradient()) < 1e-12
    assert len(taken) == 6
