"""Bodies, heads and whole networks of few-shot learning: sizes of the papers, shapes, episodes side by side."""

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional

from bilevel_lightning import BilevelError
from bilevel_lightning.models import (
    ConvHead,
    ConvNet,
    ConvNetBody,
    LinearHead,
    PerStepBatchNorm2d,
    RegressionMLP,
    ResNet12,
    ResNet12Body,
)

IAPTT = {"image_shape": (3, 84, 84), "norm": "transductive", "order": "pool_norm_relu", "init": "he"}
OMNIGLOT = {"width": 64, "norm": "transductive"}
SMALL = {"image_shape": (3, 16, 16), "width": (8, 8, 16, 16)}
NORMS = ["group", "transductive", "frozen", "per_step", "none"]


def count(module):
    return sum(p.numel() for p in module.parameters())


def first(net, layers):
    return nn.Sequential(*[*net][:layers])


def images(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_sizes_of_the_papers():
    body = ConvNetBody(**IAPTT)
    assert (count(body), body.shape, body.features) == (28_896, (32, 5, 5), 800)
    assert count(LinearHead(body.features, ways=5)) == 4_005
    assert count(ConvHead(body.shape, ways=5)) == 9_957
    resnet = ResNet12Body()
    assert (count(resnet), resnet.shape, resnet.features) == (7_996_800, (512, 1, 1), 512)
    assert count(LinearHead(resnet.features, ways=5)) == 2_565
    assert count(ResNet12()) == 7_996_800 + 2_565
    assert ConvNetBody(**OMNIGLOT).features == 64
    assert count(ConvNetBody(**OMNIGLOT)) == 640 + 3 * 36_928 + 4 * 128
    assert count(RegressionMLP()) == 80 + 1_640 + 41


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pooling", ["max", "stride"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (3, 84, 84)])
def test_convolutional_bodies_have_the_shape_that_they_say(shape, pooling, norm):
    for mean in (False, True):
        body = ConvNetBody(shape, width=8, norm=norm, steps=2, pooling=pooling, mean=mean)
        out = body(images(2, *shape, dtype=torch.float32))
        assert out.shape == (2, body.features)
        assert first(body, -1)(images(2, *shape, dtype=torch.float32)).shape == (2, *body.shape)


def test_shapes_of_pooling():
    assert ConvNetBody((3, 84, 84)).shape == (32, 5, 5)
    assert ConvNetBody((3, 84, 84), pooling="stride").shape == (32, 6, 6)
    assert ConvNetBody((3, 64, 64)).shape == (32, 4, 4)
    assert ConvNetBody(width=64, pooling="stride").shape == (64, 2, 2)
    assert ConvNetBody(width=64, pooling="stride", mean=True).shape == (64, 1, 1)


@pytest.mark.parametrize("norm", NORMS)
def test_resnet_has_the_shape_that_it_says(norm):
    for shape in ((1, 28, 28), (3, 64, 64)):
        net = ResNet12(shape, classes=4, width=(8, 8, 8, 16), norm=norm, steps=2)
        x = images(2, *shape, dtype=torch.float32)
        assert net(x).shape == (2, 4)
        assert first(net, -1)(x).shape == (2, net.features)
        assert (net.features, net.shape) == (16, (16, 1, 1))
    assert first(net, 4)(x).shape == (2, 16, 8, 8)


def test_resnet_by_hand():
    net = ResNet12Body(**SMALL).double()
    p = [*net[0].parameters()]

    def normal(maps, weight, gamma, beta):
        size = weight.shape[-1] // 2
        return functional.batch_norm(functional.conv2d(maps, weight, padding=size), None, None, gamma, beta, True)

    x = images(4, 3, 16, 16)
    residual = normal(normal(normal(x, *p[:3]).relu(), *p[3:6]).relu(), *p[6:9])
    expected = functional.max_pool2d((residual + normal(x, *p[9:])).relu(), 2)
    assert len(p) == 12
    torch.testing.assert_close(net[0](x), expected, rtol=0, atol=1e-12)


def test_orders_by_hand():
    x, pool = images(5, 1, 8, 8), functional.max_pool2d

    def normal(maps):
        return functional.batch_norm(maps, None, None, training=True)

    for order, expected in {
        "norm_relu_pool": lambda maps: pool(normal(maps).relu(), 2),
        "pool_norm_relu": lambda maps: normal(pool(maps, 2)).relu(),
        "relu_pool_norm": lambda maps: normal(pool(maps.relu(), 2)),
    }.items():
        net = ConvNetBody((1, 8, 8), width=4, blocks=1, norm="transductive", order=order).double()
        maps = functional.conv2d(x, net[0].weight, net[0].bias, padding=1)
        torch.testing.assert_close(net(x), expected(maps).flatten(1), rtol=0, atol=1e-12)


def test_strided_network_of_maml_by_hand():
    net = ConvNetBody((1, 28, 28), width=4, norm="transductive", pooling="stride", mean=True, init="xavier").double()
    maps = x = images(5, 1, 28, 28)
    convolutions = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        assert not layer.bias.any()
        maps = functional.conv2d(maps, layer.weight, stride=2, padding=1)
        maps = functional.batch_norm(maps, None, None, training=True).relu()
    assert len(convolutions) == 4
    torch.testing.assert_close(net(x), maps.mean((2, 3)), rtol=0, atol=1e-12)


def test_bounded_features():
    net = ConvNetBody(image_shape=(3, 84, 84), norm="transductive", order="relu_pool_norm", tanh=True)
    assert (count(net), net.features) == (28_896, 800)  # of BioptExps
    x = images(4, 3, 84, 84, dtype=torch.float32)
    plain = first(net, -1)(x).detach()
    assert float(plain.abs().max()) > 1
    torch.testing.assert_close(net(x).detach(), plain.tanh(), rtol=0, atol=0)


def test_convnet_is_its_body_and_a_linear_layer():
    for options in ({}, {"norm": "transductive", "pooling": "stride", "order": "pool_norm_relu"}):
        net, body = ConvNet(classes=3, width=16, **options), ConvNetBody(width=16, **options)
        assert {name: t.shape for name, t in body.state_dict().items()}.items() <= {
            name: t.shape for name, t in net.state_dict().items()
        }.items()
        assert [name for name in net.state_dict() if name not in body.state_dict()] == ["17.weight", "17.bias"]
        assert [type(layer) for layer in net] == [*[type(layer) for layer in body], nn.Linear]
    kinds = [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.MaxPool2d] * 4 + [nn.Flatten, nn.Linear]
    assert [type(layer) for layer in ConvNet()] == kinds
    assert count(ConvNet()) == 320 + 3 * 9_248 + 4 * 64 + 330


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_blocks_move_from_the_body_to_the_head(blocks):
    body = ConvNetBody(**IAPTT, blocks=4 - blocks)
    head = ConvHead(body.shape, ways=5, blocks=blocks)
    assert head(body(images(2, 3, 84, 84, dtype=torch.float32))).shape == (2, 5)
    assert count(body) + count(head) == 28_896 + 4_005


def test_conv_head_by_hand():
    head = ConvHead((4, 5, 5), ways=3, width=6).double()
    x = images(7, 100)
    _, convolution, _, norm, _, _, last = head
    maps = functional.max_pool2d(functional.conv2d(x.view(7, 4, 5, 5), convolution.weight, padding=1), 2)
    maps = functional.softplus(functional.batch_norm(maps, None, None, norm.weight, norm.bias, training=True))
    torch.testing.assert_close(head(x), last(maps.flatten(1)), rtol=0, atol=1e-12)


def test_initial_weights():
    zero = LinearHead(6, ways=3, init="zero")
    assert not zero.weight.any()
    assert not zero.bias.any()
    net = ConvNet(width=64, init="he", **{"norm": "transductive"})
    assert net[4].weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert net[-1].weight.std().item() == pytest.approx(0.01, rel=0.1)
    xavier = ConvNet(width=64, init="xavier")[4].weight.abs().max().item()
    assert xavier == pytest.approx((6 / (9 * 128)) ** 0.5, rel=0.01)
    assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias"))
    assert ResNet12()[1].shortcut[0].weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)


def test_regression_network_by_hand():
    net = RegressionMLP(2, 3, hidden=(5, 4)).double()
    x = images(6, 2)
    w1, b1, w2, b2, w3, b3 = net.parameters()
    expected = ((x @ w1.T + b1).relu() @ w2.T + b2).relu() @ w3.T + b3
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-14)
    assert RegressionMLP(hidden=())(torch.ones(4, 1)).shape == (4, 1)


BODIES = {
    "conv": lambda: ConvNetBody((1, 16, 16), width=4, norm="transductive").double(),
    "strided": lambda: ConvNetBody((1, 16, 16), width=4, norm="transductive", pooling="stride", mean=True).double(),
    "resnet": lambda: ResNet12Body((1, 16, 16), width=(4, 4, 8, 8)).double(),
}


@pytest.mark.parametrize("kind", BODIES)
def test_vmap_over_episodes_equals_a_loop(kind):
    body, x = BODIES[kind](), images(3, 5, 1, 16, 16)
    looped = torch.stack([body(episode) for episode in x])
    torch.testing.assert_close(vmap(body)(x), looped, rtol=0, atol=1e-12)
    different = not torch.allclose(body(x.flatten(0, 1)).view_as(looped), looped)
    assert different  # each episode is normalised by itself


@pytest.mark.parametrize("kind", BODIES)
def test_vmap_over_adapted_bodies_equals_a_loop(kind):
    bodies, x = [BODIES[kind]() for _ in range(3)], images(3, 5, 1, 16, 16)
    parameters, buffers = stack_module_state(bodies)

    def loss(p, x):
        return functional_call(bodies[0], p, (x,)).square().mean()

    def second(p, x):  # the gradient of an adapted loss, through the adaptation
        g = grad(loss)(p, x)
        return loss({name: p[name] - 0.1 * g[name] for name in p}, x)

    mapped = vmap(grad(second))(parameters, x)
    looped = [grad(second)({name: p[i] for name, p in parameters.items()}, x[i]) for i in range(3)]
    assert not buffers
    for name, g in mapped.items():
        torch.testing.assert_close(g, torch.stack([episode[name] for episode in looped]), rtol=1e-12, atol=1e-12)


def test_steps_reach_every_layer():
    for net in (
        ConvNet(width=8, norm="per_step", steps=6),
        ResNet12(**SMALL, norm="per_step", steps=6),
        ConvHead(norm="per_step", steps=6),
    ):
        layers = [m for m in net.modules() if isinstance(m, PerStepBatchNorm2d)]
        assert len(layers) == {ConvNet: 4, ResNet12: 16, ConvHead: 1}[type(net)]
        assert {layer.steps for layer in layers} == {6}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ConvNet", {"classes": 5, "width": 12, "norm": "transductive", "order": "pool_norm_relu", "init": "he"}),
        (
            "ConvNetBody",
            {"image_shape": [3, 84, 84], "norm": "per_step", "steps": 6, "pooling": "stride", "mean": True},
        ),
        ("ResNet12", {"classes": 20, "width": [8, 8, 8, 8], "norm": "frozen"}),
        ("ResNet12Body", {"image_shape": [3, 32, 32], "width": [8, 8, 8, 8]}),
        ("LinearHead", {"features": 32, "ways": 20, "init": "zero"}),
        ("ConvHead", {"shape": [32, 6, 6], "ways": 20, "norm": "group"}),
        ("RegressionMLP", {"hidden": [20, 20, 20]}),
    ],
)
def test_networks_are_made_from_configs(name, settings):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    config = {"model": {"class_path": f"bilevel_lightning.models.{name}", "init_args": settings}}
    model = parser.instantiate_classes(parser.parse_object(config)).model
    assert type(model).__name__ == name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvNetBody((1, 8, 8), blocks=4), "ConvNetBody.blocks must be between 1 and 3 for images of 8x8"),
        (lambda: ConvNetBody(width=12), "ConvNetBody.width must be a multiple of 8, got 12"),
        (lambda: ConvNetBody(width=0, norm="none"), "ConvNetBody.width must be a positive number"),
        (lambda: ConvNetBody(norm="per_step", steps=0), "ConvNetBody.steps must be a positive number"),
        (lambda: ConvNetBody(norm="batch"), "ConvNetBody.norm must be one of group, .*, got 'batch'"),
        (lambda: ConvNetBody(order="pool_relu"), "ConvNetBody.order must be one of norm_relu_pool, .*'pool_relu'"),
        (lambda: ConvNetBody(pooling="mean"), "ConvNetBody.pooling must be one of max, stride, got 'mean'"),
        (lambda: ConvNet(norm="batch"), "ConvNet.norm must be one of"),
        (lambda: ConvNet(init="zero"), "ConvNet.init must be one of torch, xavier, he, got 'zero'"),
        (lambda: LinearHead(init="ones"), "LinearHead.init must be one of"),
        (lambda: ResNet12((3, 7, 84)), "ResNet12.image_shape must be at least 8x8, got 7x84.*ConvNet"),
        (lambda: ResNet12Body(width=(8, 8, 8, 12), norm="group"), "ResNet12.width must be a multiple of 8"),
        (lambda: ResNet12Body(width=(8, 8, 8, 0)), "ResNet12Body.width must be a positive number"),
        (lambda: LinearHead(0), "LinearHead.features must be a positive number"),
        (lambda: LinearHead(ways=0), "LinearHead.ways must be a positive number"),
        (lambda: ConvHead((512, 1, 1)), "ConvHead.blocks must be between 1 and 0.*LinearHead"),
        (lambda: ConvHead((32, 5, 5), blocks=3), "ConvHead.blocks must be between 1 and 2 .*5x5, got 3"),
        (lambda: ConvHead(width=12, norm="group"), "ConvHead.width must be a multiple of 8"),
        (lambda: ConvHead(ways=-1), "ConvHead.ways must be a positive number"),
        (lambda: RegressionMLP(hidden=(40, 0)), "RegressionMLP.hidden must be a positive number"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(BilevelError, match=message):
        make()
