"""What normalisation layers compute, what they remember, and what evaluation leaves alone."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from bilevel_lightning import BilevelError
from bilevel_lightning.binding import Functional, running_norms
from bilevel_lightning.models import PerStepBatchNorm2d, normalization


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(layer, seed=1):
    """Returns the layer in float64 with affine parameters that differ everywhere."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def memory(layer):
    return {name: t.clone() for name, t in layer.named_buffers()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("training", [True, False])
def test_transductive_is_batch_normalisation_by_the_batch(training):
    layer = randomised(normalization("transductive", 4)).train(training)
    x = maps(6, 4, 3, 3)
    expected = functional.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)
    by_hand = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    by_hand = by_hand * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), by_hand, rtol=0, atol=1e-13)
    assert not memory(layer)
    assert not running_norms(layer)


def test_frozen_reads_running_statistics_in_evaluation_and_never_changes_them():
    layer = randomised(normalization("frozen", 4))
    layer(maps(6, 4, 3, 3))
    before = memory(layer)
    assert before["running_mean"].abs().min() > 0
    layer.eval()
    x = maps(5, 4, 3, 3, seed=2)
    expected = functional.batch_norm(x, before["running_mean"], before["running_var"], layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)
    assert same(before, memory(layer))
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=0, atol=1e-14)


def test_per_step_with_one_step_is_batch_norm():
    ours, torchs = PerStepBatchNorm2d(4).double(), nn.BatchNorm2d(4).double()
    weight, bias = maps(4, seed=3), maps(4, seed=4)
    with torch.no_grad():
        for layer in (ours, torchs):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    for training in (True, True, False):
        x = maps(6, 4, 3, 3, seed=5 + training)
        torch.testing.assert_close(ours.train(training)(x), torchs.train(training)(x), rtol=0, atol=0)
        assert all(torch.equal(t.squeeze(0), torchs.get_buffer(name)) for name, t in ours.named_buffers())
    assert ours.num_batches_tracked.tolist() == [2]


def test_per_step_keeps_statistics_and_parameters_of_steps_apart():
    layer = randomised(PerStepBatchNorm2d(4, steps=3))
    x = maps(6, 4, 3, 3)
    for t in (0, 1, 2):
        before = memory(layer)
        layer.lower_step = t
        expected = functional.batch_norm(x, None, None, layer.weight[t], layer.bias[t], training=True)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)
        after = memory(layer)
        moved = [not torch.equal(before["running_mean"][i], after["running_mean"][i]) for i in range(3)]
        assert moved == [i == t for i in range(3)]
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        torch.testing.assert_close(after["running_mean"][t], 0.1 * mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(after["running_var"][t], 0.9 + 0.1 * var, rtol=0, atol=1e-14)
    layer.lower_step = 1
    gradient = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    assert [bool(row.abs().sum() > 0) for row in gradient] == [False, True, False]


def test_per_step_in_evaluation_reads_the_step_and_changes_nothing():
    layer = randomised(PerStepBatchNorm2d(4, steps=3))
    for t in (0, 1, 2, 2):
        layer.lower_step = t
        layer(maps(6, 4, 3, 3, seed=t) + t)
    layer.eval()
    before = memory(layer)
    x = maps(5, 4, 3, 3, seed=9)
    for t in (0, 1, 2, 7):
        layer.lower_step, row = t, min(t, 2)
        statistics = before["running_mean"][row], before["running_var"][row]
        expected = functional.batch_norm(x, *statistics, layer.weight[row], layer.bias[row])
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)
    assert same(before, memory(layer))
    assert before["num_batches_tracked"].tolist() == [1, 1, 2]


def test_per_step_is_saved_and_loaded():
    layer, other = randomised(PerStepBatchNorm2d(4, steps=2)), PerStepBatchNorm2d(4, steps=2).double()
    layer(maps(6, 4, 3, 3))
    other.load_state_dict(layer.state_dict())
    assert same(layer.state_dict(), other.state_dict())
    layer.reset_parameters()
    fresh = PerStepBatchNorm2d(4, steps=2).double()
    assert same(fresh.state_dict(), layer.state_dict())


class Task(nn.Module):
    """As `Functional` sees a task: the layer on the lower level, and a loss."""

    def __init__(self, norm):
        super().__init__()
        self.upper, self.lower = nn.Module(), norm

    def lower_loss(self, x):
        return self.lower(x).square().mean()


@pytest.mark.parametrize("norm", ["frozen", "per_step"])
def test_functional_drops_what_an_evaluation_adds(norm):
    task = Task(randomised(normalization(norm, 4, steps=2)))
    assert [name for name, _ in running_norms(task)] == ["lower"]
    assert not running_norms(task.eval())
    call, before, x = Functional(task.train()), memory(task), maps(6, 4, 3, 3)
    y = {name: torch.zeros_like(p) + 2 for name, p in task.lower.named_parameters()}
    values = []
    for t in (0, 1):
        if norm == "per_step":
            task.lower.lower_step = t
        values.append(call.at({}, y, "lower_loss", x))
    assert same(before, memory(task))
    torch.testing.assert_close(values[0], values[1])
    task.lower_loss(x)
    assert not same(before, memory(task))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["transductive", "frozen", "per_step"])
def test_double_backward(norm, training):
    layer = randomised(normalization(norm, 2, steps=2))
    layer(maps(4, 2, 2, 2))
    layer.train(training)
    if norm == "per_step":
        layer.lower_step = 1
    inputs = [maps(4, 2, 2, 2, seed=3).requires_grad_(), *layer.parameters()]

    def loss(x, weight, bias):
        out = functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        return (out.sin() * torch.arange(32.0, dtype=x.dtype).view(4, 2, 2, 2)).sum()

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize(
    ("norm", "training"), [("transductive", True), ("frozen", False), ("per_step", False), ("per_step", True)]
)
def test_vmap_over_episodes_equals_a_loop(norm, training):
    layers = [randomised(normalization(norm, 4, steps=2), seed=i) for i in range(3)]
    for layer in layers:
        layer(maps(6, 4, 3, 3, seed=7))
        layer.train(training)
        layer.track_running_stats = layer.track_running_stats and not training  # statistics in place cannot be mapped
        layer.lower_step = 1
    x = maps(3, 5, 4, 3, 3)
    state = stack_module_state(layers)
    mapped = vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)))(*state, x)
    looped = torch.stack([layer(x[i]) for i, layer in enumerate(layers)])
    torch.testing.assert_close(mapped, looped, rtol=0, atol=1e-12)


def test_group_and_none():
    x = maps(3, 16, 2, 2)
    torch.testing.assert_close(normalization("group", 16).double()(x), functional.group_norm(x, 2))
    assert normalization("none", 5)(x) is x


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("group", 12), "normalization.width must be a multiple of 8, got 12.*transductive"),
        (("batch", 8), "normalization.norm must be one of group, transductive, frozen, per_step, none, got 'batch'"),
        (("frozen", 0), "normalization.width must be a positive number, got 0"),
        (("per_step", 8, 0), "normalization.steps must be a positive number, got 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(BilevelError, match=message):
        normalization(*settings)
    with pytest.raises(BilevelError, match="PerStepBatchNorm2d.steps must be a positive number"):
        PerStepBatchNorm2d(8, steps=0)
