import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from bilevel_lightning import BilevelError
from bilevel_lightning.models.cells import OPERATIONS, PUBLISHED, Genotype, GenotypeNetwork, SearchNetwork, drop_path
from bilevel_lightning.models.cells.genotype import cell_of
from bilevel_lightning.models.cells.operations import FactorizedReduce, fixed_norm, operation
from bilevel_lightning.models.cells.search import CellWeights, MixedOperation


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# The network of a genotype.


@pytest.mark.parametrize(
    ("name", "layers", "auxiliary", "number"),
    [
        ("DARTS_OUR4", 8, False, 1_524_142),
        ("DARTS_OUR4", 8, True, 2_000_568),
        ("DARTS_OUR4", 20, False, 4_103_614),
        ("DARTS_V2", 20, False, 3_349_342),
    ],
)
def test_parameter_counts_of_the_released_networks(name, layers, auxiliary, number):
    assert parameters(GenotypeNetwork(PUBLISHED[name], layers=layers, auxiliary=auxiliary)) == number


@pytest.mark.parametrize(("name", "millions"), [("DARTS_V1", 3.2), ("PDARTS", 3.4), ("PC_DARTS", 3.6)])
def test_published_sizes_at_36_channels_and_20_cells(name, millions):
    assert round(parameters(GenotypeNetwork(PUBLISHED[name])) / 1e6, 1) == millions


def test_forward_and_backward_of_the_full_network():
    torch.manual_seed(0)
    network = GenotypeNetwork(PUBLISHED["DARTS_OUR4"], layers=8, auxiliary=True)
    network.dropped = 0.2
    logits, second = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == second.shape == (2, 10)
    labels = torch.tensor([1, 2])
    (cross_entropy(logits, labels) + 0.4 * cross_entropy(second, labels)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    network.eval()
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        logits, second = network(images)
        assert second is None
        assert torch.equal(logits, network(images)[0])  # nothing is dropped in evaluation
        assert torch.allclose(logits[:1], network(images[:1])[0], atol=1e-5)  # nor depends on the rest of the batch


def test_dropped_edges_leave_identities():
    torch.manual_seed(0)
    network = GenotypeNetwork(Genotype.of("normal[skip_connect(0) skip_connect(1)] reduction[skip_connect(0) "
                                          "skip_connect(1)]"), (1, 8, 8), channels=2, layers=3)  # fmt: skip
    cell = network.cells[0]
    maps = torch.randn(3, 6, 8, 8)
    assert torch.equal(cell(maps, maps, 0.999), cell(maps, maps))
    reduce = network.cells[1]
    last = cell(maps, maps)
    assert not torch.equal(reduce(maps, last, 0.999), reduce(maps, last))


def test_drop_path_is_by_sample_and_keeps_the_expectation():
    torch.manual_seed(0)
    maps = torch.rand(20_000, 2, 1, 3) + 1
    out = drop_path(maps, 0.3)
    ratio = out / maps
    kept = ratio[:, 0, 0, 0] > 0
    assert torch.allclose(ratio[kept], torch.tensor(1 / 0.7))
    assert torch.equal(ratio[~kept], torch.zeros_like(ratio[~kept]))
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=4 * (0.21 / 20_000) ** 0.5)
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.02)
    assert drop_path(maps, 0.0) is maps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_shape": (3, 30, 32)}, "image_shape must be of multiples of 4"),
        ({"layers": 2}, "layers must be at least 3"),
        ({"channels": 0}, "channels must be a positive"),
        ({"auxiliary": True, "image_shape": (1, 8, 8)}, "images of 32 to 40 pixels"),
    ],
)
def test_impossible_networks(settings, message):
    with pytest.raises(BilevelError, match=message):
        GenotypeNetwork(PUBLISHED["DARTS_V2"], **settings)


# The operations.


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS[1:])
def test_operations_keep_channels_and_stride(name, stride):
    layer = operation(name, 4, stride, fixed_norm)
    assert layer(torch.randn(2, 4, 8, 8)).shape == (2, 4, 8 // stride, 8 // stride)


def test_what_the_operations_are():
    sizes = {name: parameters(operation(name, 6, 1, fixed_norm)) for name in OPERATIONS[1:]}
    assert sizes == {
        "max_pool_3x3": 0, "avg_pool_3x3": 0, "skip_connect": 0, "sep_conv_3x3": 2 * (9 * 6 + 36),
        "sep_conv_5x5": 2 * (25 * 6 + 36), "dil_conv_3x3": 9 * 6 + 36, "dil_conv_5x5": 25 * 6 + 36,
    }  # fmt: skip
    for name, reach in (("sep_conv_3x3", 2), ("sep_conv_5x5", 4), ("dil_conv_3x3", 2), ("dil_conv_5x5", 4)):
        layer = operation(name, 1, 1, lambda _: torch.nn.Identity()).double()
        for p in layer.parameters():
            torch.nn.init.ones_(p)
        maps = torch.ones(1, 1, 17, 17, dtype=torch.float64, requires_grad=True)
        layer(maps)[0, 0, 8, 8].backward()
        seen = maps.grad[0, 0].nonzero() - 8
        assert int(seen.abs().max()) == reach
        assert (seen % 2 == 0).all() if "dil" in name else True
    corner = operation("avg_pool_3x3", 1, 1, fixed_norm)(torch.ones(1, 1, 4, 4))
    assert torch.equal(corner, torch.ones_like(corner))  # padding is not counted


def test_factorized_reduction_sees_every_pixel():
    layer = FactorizedReduce(1, 2, lambda _: torch.nn.Identity())
    maps = torch.rand(1, 1, 4, 4, requires_grad=True)
    torch.nn.init.ones_(layer.even.weight)
    torch.nn.init.ones_(layer.odd.weight)
    out = layer(maps)
    assert torch.equal(out[0, 0], maps[0, 0, ::2, ::2])
    assert torch.equal(out[0, 1], maps[0, 0, 1::2, 1::2])
    with pytest.raises(BilevelError, match="no operation 'sep_conv_7x7'"):
        operation("sep_conv_7x7", 2, 1, fixed_norm)
    with pytest.raises(BilevelError, match="no operation 'none'"):
        operation("none", 2, 1, fixed_norm)


# The network that is searched in.


def test_a_mixed_operation_is_the_weighted_sum():
    torch.manual_seed(0)
    edge = MixedOperation(4, 2, OPERATIONS, 1, fixed_norm)
    maps, weights = torch.randn(3, 4, 8, 8), torch.rand(8)
    expected = sum(w * edge.parts[name](maps) for name, w in zip(OPERATIONS, weights, strict=True) if name != "none")
    assert torch.allclose(edge(maps, weights), expected, atol=1e-6)
    pooled = torch.nn.functional.max_pool2d(maps, 3, 2, 1)
    assert torch.allclose(edge.parts["max_pool_3x3"](maps), fixed_norm(4)(pooled), atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_partial_channels_pass_the_others_on(stride):
    torch.manual_seed(0)
    edge = MixedOperation(8, stride, OPERATIONS, 4, fixed_norm)
    assert all(layer.in_channels == 2 for layer in edge.modules() if isinstance(layer, torch.nn.Conv2d))
    maps, weights = torch.randn(3, 8, 8, 8), torch.rand(8)
    out = edge(maps, weights)
    mixed = sum(w * edge.parts[n](maps[:, :2]) for n, w in zip(OPERATIONS, weights, strict=True) if n != "none")
    rest = maps[:, 2:] if stride == 1 else torch.nn.functional.max_pool2d(maps[:, 2:], 2)
    # shuffled: channel i of the concatenation, in groups of 2, goes to 4 (i mod 2) + i // 2
    whole = torch.cat([mixed, rest], 1)
    assert torch.allclose(out, whole[:, [0, 2, 4, 6, 1, 3, 5, 7]], atol=1e-6)


def test_edge_normalisation_weighs_edges():
    torch.manual_seed(0)
    network = SearchNetwork((1, 8, 8), 3, channels=4, layers=3, nodes=2, edge_normalization=True)
    x = network.architecture(1.0)
    weights = x()["normal"]
    assert torch.allclose(weights.operations.sum(1), torch.ones(5))
    assert torch.allclose(torch.stack([weights.edges[:2].sum(), weights.edges[2:].sum()]), torch.ones(2))
    assert torch.allclose(weights.total(), weights.operations * weights.edges[:, None])
    cell, maps = network.cells[0], torch.randn(2, 12, 8, 8)
    only = CellWeights(weights.operations, torch.tensor([1.0, 0, 0, 0, 1]))
    first = cell.edges[0](cell.inputs[0](maps), weights.operations[0])
    expected = torch.cat([first, cell.edges[4](first, weights.operations[4])], 1)
    assert torch.allclose(cell(maps, maps, only), expected, atol=1e-5)
    logits = network(torch.randn(2, 1, 8, 8), x())
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(p.grad is not None for p in x.parameters())


def test_searching_remembers_nothing():
    network = SearchNetwork((1, 8, 8), channels=2, layers=3, nodes=1)
    assert not [*network.named_buffers()]
    vectors = [name for name, p in network.named_parameters() if p.ndim == 1]  # as scales and shifts would be
    assert vectors == ["classifier.bias"]
    images, weights = torch.randn(4, 1, 8, 8), network.architecture(1e-3)()
    first = network(images, weights)
    assert torch.equal(first, network(images, weights))
    assert torch.equal(first, network.eval()(images, weights))


def test_layout_of_the_search():
    network = SearchNetwork(channels=4, layers=8, nodes=4)
    assert [i for i, cell in enumerate(network.cells) if cell.kind == "reduction"] == [2, 5]
    assert network.architecture(1e-3).normal.shape == (14, 8)
    assert network.classifier.in_features == 4 * 4 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 6, "partial_channels": 4}, "partial_channels=4 does not divide channels=6"),
        ({"operations": ("none",)}, "needs an operation other than none"),
        ({"operations": ("none", "conv_1x1")}, "there is no 'conv_1x1'"),
        ({"operations": ("skip_connect", "skip_connect")}, "each but once"),
        ({"nodes": 0}, "nodes must be a positive"),
    ],
)
def test_impossible_searches(settings, message):
    with pytest.raises(BilevelError, match=message):
        SearchNetwork(**{"channels": 4, **settings})


# Genotypes.


def test_reading_a_genotype_out():
    names = ("none", "skip_connect", "sep_conv_3x3")
    weights = torch.tensor([
        [0.8, 0.15, 0.05], [0.1, 0.2, 0.7],  # node 2: state 1 is stronger; none is never chosen
        [0.2, 0.5, 0.3], [0.9, 0.06, 0.04], [0.3, 0.3, 0.4],  # node 3: states 0 and 2
    ])  # fmt: skip
    assert cell_of(weights, names) == (
        (("sep_conv_3x3", 1), ("skip_connect", 0)),
        (("skip_connect", 0), ("sep_conv_3x3", 2)),
    )


def test_edges_weigh_in_the_read_out():
    network = SearchNetwork((1, 8, 8), channels=4, layers=3, nodes=2, edge_normalization=True)
    x = network.architecture(1e-3)
    with torch.no_grad():
        x.normal[:] = 0
        x.normal[:, 4] = torch.tensor([1.0, 1, 3, 2, 1])  # without edges: states 0 and 1
        x.normal_edges[:] = torch.tensor([0.0, 0, -9, 0, 3])
    assert x.genotype().normal[1] == (("sep_conv_3x3", 2), ("sep_conv_3x3", 1))


def test_entropy():
    x = SearchNetwork((1, 8, 8), channels=4, layers=3, nodes=2).architecture(1e-3)
    with torch.no_grad():
        x.normal[:] = 0
        x.reduction[:, 2] = 1e4
    entropy = x.entropy()
    assert float(entropy["normal"]) == pytest.approx(torch.tensor(8.0).log().item())
    assert float(entropy["reduction"]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("genotype", [*PUBLISHED.values(), Genotype.random(5, nodes=3)])
def test_genotypes_survive_text_and_file(genotype, tmp_path):
    assert Genotype.of(str(genotype)) == genotype
    genotype.save(tmp_path / "g.json")
    assert Genotype.of(str(tmp_path / "g.json")) == genotype
    assert json.loads((tmp_path / "g.json").read_text())["normal"][0][0] == list(genotype.normal[0][0])


def test_random_genotypes():
    state = torch.get_rng_state()
    drawn = [Genotype.random(seed) for seed in range(200)]
    assert torch.equal(state, torch.get_rng_state())
    assert drawn[3] == Genotype.random(3) == Genotype.of("random", seed=3)
    assert len({*drawn}) == 200
    used = {name for g in drawn for cell in (g.normal, g.reduction) for edges in cell for name, _ in edges}
    assert used == {*OPERATIONS[1:]}
    for genotype in drawn:
        for cell in (genotype.normal, genotype.reduction):
            assert [len({state for _, state in edges}) for edges in cell] == [2, 2, 2, 2]
    last = [state for g in drawn for _, state in g.normal[3]]
    assert {*last} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"holds no genotype \(JSONDecodeError"),
        ('{"normal": []}', r"holds no genotype \(KeyError: 'reduction'"),
        ('{"normal": [3], "reduction": []}', r"holds no genotype \(TypeError"),
        ('{"normal": [], "reduction": []}', "g.json: The normal cell of a genotype has no node"),
        ('{"normal": [[["skip_connect", 0]]], "reduction": []}', "Node 2 of the normal cell has 1 edges"),
        ('{"normal": [[["skip", 0], ["none", 1]]], "reduction": []}', "has the operation 'skip'; choose among max"),
        ('{"normal": [[["skip_connect", 0], ["none", 1]]], "reduction": []}', "has the operation 'none'"),
        ('{"normal": [[["skip_connect", 0], ["skip_connect", 2]]], "reduction": []}', "reads state 2; only 0 to 1"),
    ],
)
def test_damaged_files(content, message, tmp_path):
    (tmp_path / "g.json").write_text(content)
    with pytest.raises(BilevelError, match=message):
        Genotype.of(str(tmp_path / "g.json"))


def test_what_is_no_genotype():
    with pytest.raises(BilevelError, match="neither a file nor 'random' nor one of DARTS_V1"):
        Genotype.of("DARTS_V3")
    with pytest.raises(BilevelError, match="is no cell"):
        Genotype.of("normal[skip_connect] reduction[skip_connect(0) skip_connect(1)]")
    with pytest.raises(BilevelError, match="Cannot read the genotype"):
        Genotype.load("nowhere.json")
