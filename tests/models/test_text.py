"""GPT against formulas by hand and against Hugging Face's GPT-2; parts of it as y; bfloat16 around it."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm

from bilevel_lightning import BilevelError
from bilevel_lightning.models import GPT, Autocast, HuggingFaceModel, LowRank, Subset

SMALL = {"tokens": 11, "context": 6, "width": 8, "depth": 2, "heads": 2}


def small(**changes):
    """A double-precision GPT whose biases and norms are not at their initial values."""
    torch.manual_seed(0)
    model = GPT(**{**SMALL, **changes}).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def tokens(length=6):
    return torch.randint(11, (3, length), generator=torch.Generator().manual_seed(1))


def by_hand(model, inputs):
    """The logits, one head and one position at a time."""
    h = model.embedding.weight[inputs] + model.positions.weight[: inputs.shape[1]]
    for block in model.blocks:
        q, k, v = (block.norm1(h) @ block.qkv.weight.T + block.qkv.bias).split(8, dim=2)
        mixed = torch.zeros_like(h)
        for b in range(len(h)):
            for cut in (slice(0, 4), slice(4, 8)):
                for i in range(h.shape[1]):
                    scores = torch.stack([q[b, i, cut] @ k[b, j, cut] / 4**0.5 for j in range(i + 1)])
                    mixed[b, i, cut] = scores.softmax(0) @ v[b, : i + 1, cut]
        h = h + mixed @ block.out.weight.T + block.out.bias
        up = gelu(block.norm2(h) @ block.up.weight.T + block.up.bias)
        h = h + up @ block.down.weight.T + block.down.bias
    return layer_norm(h, (8,), model.norm.weight, model.norm.bias) @ model.embedding.weight.T


def test_gpt_is_its_formula():
    model, inputs = small(), tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), by_hand(model, inputs), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(model(inputs[:, :4]), by_hand(model, inputs[:, :4]), rtol=1e-11, atol=1e-11)


def test_gpt_does_not_look_ahead():
    model, inputs = small(), tokens()
    changed = inputs.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    with torch.no_grad():
        before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert ((before - after)[:, 4:].abs().amax(2) > 1e-6).all()


def test_gpt_sizes_and_initial_weights():
    torch.manual_seed(0)
    model = GPT(width=128, depth=4)
    assert sum(p.numel() for p in GPT().parameters()) == 120_576
    weights = model.state_dict()
    assert float(weights["blocks.0.up.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(weights["blocks.3.down.weight"].std()) == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert float(weights["embedding.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert not weights["blocks.1.qkv.bias"].any()
    assert not [name for name in weights if name.startswith("head")]  # the output layer is the embedding


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"heads": 3}, "GPT.heads=3 must divide GPT.width=8"), ({"depth": 0}, "GPT.depth must be a positive number")],
)
def test_gpt_refuses_impossible_sizes(settings, message):
    with pytest.raises(BilevelError, match=message):
        GPT(**{**SMALL, **settings})


def test_gpt_refuses_long_sequences():
    with pytest.raises(BilevelError, match=r"7 tokens is longer than GPT.context=6"):
        small()(tokens(7))


def test_gpt_from_a_file(tmp_path):
    """A state dict, or a checkpoint of a run, in which the network lies somewhere."""
    model, inputs = small().float(), tokens()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    inside = {f"task.lower.model.{name}": t for name, t in model.state_dict().items()}
    torch.save({"state_dict": {"task.upper.logits": torch.zeros(2), **inside}}, tmp_path / "run.ckpt")
    for name in ("weights.pt", "run.ckpt"):
        assert torch.equal(GPT(**SMALL, weights=str(tmp_path / name))(inputs), model(inputs))
    with pytest.raises(BilevelError, match=r"weights.pt does not fit: RuntimeError"):
        GPT(**{**SMALL, "width": 16}, weights=str(tmp_path / "weights.pt"))
    with pytest.raises(BilevelError, match="does not fit: KeyError"):
        GPT(**{**SMALL, "depth": 3}, weights=str(tmp_path / "weights.pt"))
    with pytest.raises(BilevelError, match="does not fit: FileNotFoundError"):
        GPT(**SMALL, weights=str(tmp_path / "nothing.pt"))
    torch.save({"state_dict": {"embedding.weight": Path("code")}}, tmp_path / "code.pt")
    with pytest.raises(BilevelError, match="does not fit: UnpicklingError"):
        GPT(**SMALL, weights=str(tmp_path / "code.pt"))


# Parts of a network as y.


def drawn(model):
    """The same network with adapters that are not zero."""
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(p, std=0.3)
    return model


def test_low_rank_starts_at_the_network_and_moves_by_its_formula():
    model, inputs = small(), torch.randn(5, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    adapted = LowRank(model, rank=3, alpha=6.0)
    assert torch.equal(adapted(tokens()), plain(tokens()))
    layer, base = drawn(adapted).model.blocks[1].up, plain.blocks[1].up
    assert layer.A.shape == (3, 8)
    assert layer.B.shape == (32, 3)
    expected = inputs @ (base.weight + 2.0 * layer.B @ layer.A).T + base.bias
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-12, atol=1e-12)


def test_low_rank_merges_exactly():
    adapted = drawn(LowRank(small(), rank=3, alpha=6.0, layers="qkv|up"))
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    merged = adapted.merged()
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens()), adapted(tokens()), rtol=1e-12, atol=1e-12)
        assert (merged(tokens()) - small()(tokens())).abs().max() > 0.01
    assert merged.state_dict().keys() == small().state_dict().keys()
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters())


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_is_trained():
    adapters = {f"model.blocks.{i}.qkv.{m}" for i in (0, 1) for m in "AB"}
    assert trained(LowRank(small(), layers="qkv")) == adapters
    norm = {"model.norm.weight", "model.norm.bias"}
    assert trained(LowRank(small(), layers="qkv", trained=r"^norm\.")) == adapters | norm
    assert trained(Subset(small(), r"^norm\.|blocks\.1\.up")) == norm | {
        f"model.blocks.1.up.{m}" for m in ("weight", "bias")
    }
    assert torch.equal(Subset(small(), "norm")(tokens()), small()(tokens()))
    assert len(trained(LowRank(small()))) == 2 * 8  # all eight linear layers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(small(), layers="query"), "LowRank.layers='query' is found in no linear layer; there are bl"),
        (lambda: LowRank(small(), layers="("), "LowRank.layers is no regular expression"),
        (lambda: LowRank(small(), trained="bias$$x"), "LowRank.trained='bias$$x' is found in no parameter"),
        (lambda: LowRank(small(), rank=0), "LowRank.rank must be a positive number"),
        (lambda: LowRank(nn.Embedding(3, 3)), "LowRank.model=Embedding has no linear layer"),
        (lambda: Subset(small(), "nothing"), "Subset.trained='nothing' is found in no parameter; there are embedding"),
    ],
)
def test_parts_that_do_not_exist(make, message):
    with pytest.raises(BilevelError) as error:
        make()
    assert message in str(error.value)


# bfloat16.


def test_autocast_computes_in_bfloat16_around_the_network_alone():
    model, inputs, seen = small().float(), tokens(), []
    model.blocks[0].up.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    exact = model(inputs)
    with torch.autocast("cpu", enabled=False):  # as in an upper iteration
        rounded = Autocast(model)(inputs)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]
    assert rounded.dtype == torch.float32
    error = float((rounded - exact).detach().norm() / exact.detach().norm())
    assert 1e-4 < error < 0.05
    rounded.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_autocast_refuses_second_derivatives():
    model = Autocast(small().float())
    loss, y = model(tokens()).square().mean(), [*model.parameters()]
    with pytest.raises(BilevelError, match="Autocast is for methods without second derivatives"):
        torch.autograd.grad(loss, y, create_graph=True)


# Hugging Face.

GPT2 = {
    "vocab_size": 11, "n_positions": 6, "n_embd": 8, "n_layer": 2, "n_head": 2, "activation_function": "gelu",
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


@pytest.fixture
def hugging_face():
    pytest.importorskip("transformers", reason="transformers is not installed: pip install bilevel-lightning[text]")


def test_hugging_face_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BilevelError, match=r"pip install bilevel-lightning\[text\], or use GPT"):
        HuggingFaceModel(settings=GPT2)


def test_gpt_is_hugging_faces_gpt2_with_its_weights(hugging_face):
    ours, theirs = small(), HuggingFaceModel(settings=GPT2).double()
    names = {"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "norm1": "ln_1"}
    names |= {"norm2": "ln_2", "norm": "ln_f", "blocks": "h", "embedding": "wte", "positions": "wpe"}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            path = ".".join(names.get(part, part) for part in name.split("."))
            target = theirs.model.transformer.get_parameter(path)
            linear = p.ndim == 2 and name.startswith("blocks")
            target.copy_(p.T if linear else p)
        torch.testing.assert_close(ours(tokens()), theirs(tokens()), rtol=1e-10, atol=1e-10)
        eager = HuggingFaceModel(settings=GPT2, attention="eager").double()
        eager.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(eager(tokens()), theirs(tokens()), rtol=1e-10, atol=1e-10)


def test_adapters_of_hugging_faces_layers_merge_exactly(hugging_face):
    torch.manual_seed(0)
    adapted = drawn(LowRank(HuggingFaceModel(settings=GPT2).double(), rank=2, layers="c_attn|c_proj"))
    assert adapted.model.model.transformer.h[0].attn.c_attn.B.shape == (24, 2)
    assert len(trained(adapted)) == 2 * 6
    with torch.no_grad():
        torch.testing.assert_close(adapted.merged()(tokens()), adapted(tokens()), rtol=1e-11, atol=1e-11)


def test_hugging_face_from_a_folder(hugging_face, tmp_path):
    torch.manual_seed(0)
    made = HuggingFaceModel(settings=GPT2)
    made.model.save_pretrained(tmp_path)
    again = HuggingFaceModel(str(tmp_path), settings={"attn_pdrop": 0.25})
    assert again.model.config.attn_pdrop == 0.25
    assert torch.equal(again.eval()(tokens()), made.eval()(tokens()))


def test_hugging_face_runs_no_code_and_reads_no_pickle(hugging_face, tmp_path):
    made = HuggingFaceModel(settings=GPT2)
    with pytest.raises(BilevelError, match="nothing is downloaded"):
        HuggingFaceModel("openai-community/gpt2")
    made.model.save_pretrained(tmp_path / "pickle")
    torch.save(made.model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    with pytest.raises(BilevelError, match="HuggingFaceModel cannot be made"):
        HuggingFaceModel(str(tmp_path / "pickle"))
    made.model.save_pretrained(tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass")
    with pytest.raises(BilevelError, match="HuggingFaceModel cannot be made"):
        HuggingFaceModel(str(tmp_path / "code"))
    assert not (tmp_path / "ran").exists()
    for name in ("trust_remote_code", "attn_implementation", "_attn_implementation", "auto_map"):
        with pytest.raises(BilevelError, match=f"settings must not hold {name}"):
            HuggingFaceModel(settings={**GPT2, name: "a/b"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "nothing"}, "HuggingFaceModel cannot be made: .*nothing"),
        ({"model_type": "vit"}, "HuggingFaceModel cannot be made"),
        ({"attention": "flash"}, "attention must be sdpa or eager"),
    ],
)
def test_hugging_face_settings_that_do_not_exist(hugging_face, settings, message):
    with pytest.raises(BilevelError, match=message):
        HuggingFaceModel(**settings)
