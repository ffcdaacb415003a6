"""<g_y, v> and its gradient (g_xy v, g_yy v), beside reverse mode over reverse mode."""

from functools import partial

import pytest
import torch
from problems import flat, relative
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bilevel_lightning import directional, tree
from bilevel_lightning.derivatives import PlainAttention

SHAPES = {"w": (5, 4), "b": (5,), "square": (5, 5), "factor": (4, 5), "idle": (3,)}


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


INPUTS = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(y, z):
    return functional.linear(functional.linear(z, y["w"], y["b"]).tanh(), y["square"]).tanh()


def attention(y, z):
    """As in `torch.nn`: products inside a function that is given the moved weights."""
    weights = {"in_proj_weight": torch.cat([y["square"]] * 3), "in_proj_bias": None, "bias_k": None, "bias_v": None}
    settings = {"num_heads": 1, "add_zero_attn": False, "dropout_p": 0.0, "need_weights": False}
    z = z @ y["factor"]
    out = {"out_proj_weight": y["square"], "out_proj_bias": y["b"]}
    with PlainAttention():
        return functional.multi_head_attention_forward(z, z, z, 5, **weights, **settings, **out)[0]


USES = {
    "layers": network,
    "sequences": lambda y, z: network(y, torch.stack([z, z**2], 1)).sum(1),
    "more outputs than samples": lambda y, z: network(y, z[:2]).sum() * network(y, z[0]),
    "no bias, one tensor in two layers and by itself": lambda y, z: (
        functional.linear(network(y, z), y["square"]) * y["square"].sum()
    ),
    "keywords": lambda y, z: functional.linear(z, weight=y["w"], bias=y["b"]) ** 2,
    "bias by keyword": lambda y, z: functional.linear(z, y["w"], bias=y["b"]) ** 2,
    "products": lambda y, z: torch.mm(torch.matmul(z, y["factor"]), y["square"]).mv(y["b"])[:, None] ** 2,
    "first factor": lambda y, z: (y["w"] @ z.T).T ** 2,
    "both factors": lambda y, z: z @ (y["factor"] @ y["square"]) ** 2 + y["w"] @ y["factor"] @ y["b"],
    "transposed": lambda y, z: (z @ y["w"].T @ y["square"].T) ** 2,
    "normalised": lambda y, z: functional.layer_norm(z @ y["factor"], (5,), y["b"], y["square"][0]) ** 2,
    "attention": attention,
    "checkpoint": lambda y, z: checkpoint(partial(network, y), z, use_reentrant=False),
    "vmap": lambda y, z: torch.func.vmap(partial(network, y))(z),
    "vmap over weights": lambda y, z: torch.func.vmap(network, in_dims=(dict.fromkeys(y, 0), None))(
        {n: torch.stack([t, 2 * t]) for n, t in y.items()}, z
    ).sum(0),
}


@pytest.mark.parametrize("use", USES)
def test_reverse_over_reverse(use):
    def loss(x, y):
        return (x["x"] * USES[use](y, INPUTS).square()).sum() + y["b"].exp().sum()

    v, x, y = values(2), tree.leaf({"x": torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]}), tree.leaf(values(3))
    (g_y,) = tree.grad(loss(x, y), y, create_graph=True)
    expected = tree.vjp([*g_y.values()], [*v.values()], x, y)
    found = directional.slope(loss, x, y, v)
    torch.testing.assert_close(found, tree.dot(g_y, v), rtol=1e-12, atol=0)
    for products, by_reverse in zip(tree.grad(found, x, y), expected, strict=True):
        assert flat(by_reverse).any()
        assert relative(products, by_reverse) < 1e-12


def test_the_gradient_of_a_layer_is_not_evaluated():
    """A linear model has two products with its 7 x 4 inputs: with W and V at once, and one that carries back."""
    counted = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                counted.append(func)
            return func(*args, **(kwargs or {}))

    model, x = nn.Linear(4, 5).double(), {"x": torch.ones(7, 1, dtype=torch.float64)}

    def loss(x, y):
        return (x["x"] * torch.func.functional_call(model, y, INPUTS).tanh()).sum()

    y = tree.leaf(tree.of(model))
    x = tree.leaf(x)
    v = {name: torch.ones_like(t) for name, t in y.items()}
    with Count():
        tree.grad(directional.slope(loss, x, y, v), x, y)
    assert len(counted) == 2


def test_a_loss_that_does_not_depend_on_y():
    y = {"y": torch.ones(2)}
    assert float(directional.slope(lambda x, y: x["x"].sum(), {"x": torch.ones(2, requires_grad=True)}, y, y)) == 0


def test_half_precision_layers_sum_in_the_precision_of_y():
    """Under autocast the layers are bfloat16: 4097 has no place in bfloat16."""
    y, ones = {"w": torch.zeros(1, 1, requires_grad=True)}, torch.ones(4097, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = directional.slope(
            lambda x, y: functional.linear(ones, y["w"]).float().sum(), {}, y, {"w": torch.ones(1, 1)}
        )
    assert found.dtype == torch.float32
    assert float(found) == 4097
