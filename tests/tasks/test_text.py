"""Sources of text reweighted for a language model: derivatives, what stays as it was, and what the weights learn."""

import csv
import math

import pytest
import torch
from loops import trainer
from PIL import Image
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel_lightning import Adam, BilevelError, GradientDescent, algorithms, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.datamodules import TextSources
from bilevel_lightning.models import GPT, Autocast, HuggingFaceModel, LowRank, SampleWeights, SourceWeights
from bilevel_lightning.tasks import TextReweighting

TINY = {"context": 16, "width": 16, "depth": 1, "heads": 2}
DATA = {
    "context": 16, "train_bytes": 8192, "val_bytes": 1024, "test_bytes": 1024,
    "lower_batch_size": 16, "upper_batch_size": 16, "epoch_length": 10,
}  # fmt: skip


def adam(lr):
    return lambda params: torch.optim.Adam(params, lr=lr)


METHODS = {
    "SAMA": {"dynamics": Adam(0.01), "upper_optimizer": adam(0.1)},
    "F2SA": {"dynamics": GradientDescent(1.0), "lower_steps": 1, "gamma": 3.0, "upper_optimizer": adam(0.1)},
    "MEHA": {
        "dynamics": GradientDescent(1.0), "lower_lr": 1.0, "gamma": 10.0, "c": 2.0, "upper_optimizer": adam(0.1),
    },
}  # fmt: skip


def exact():
    """A task in float64 on two lower minibatches and an upper one, eleven tokens; weights away from their start."""
    torch.manual_seed(0)
    model = GPT(tokens=11, context=5, width=8, depth=2, heads=2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    task = TextReweighting(model, SourceWeights(3)).double()
    with torch.no_grad():
        task.upper.logits.copy_(torch.tensor([0.3, -0.5, 0.1]))
    draw = lambda: (torch.randint(11, (6, 5)), torch.randint(11, (6, 5)))
    lower = [(*draw(), torch.arange(6), torch.tensor([0, 1, 2, 2, 1, 0])) for _ in range(2)]
    return task, {"lower": lower[0], "upper": draw()}


def bound(task, batch, **settings):
    return bind(task, batch, tree.detach(tree.of(task.upper)), **settings)[:2]


def differences(objective, x, step=1e-5):
    """Central differences in the logits."""
    out = []
    for i in range(3):
        shift = step * torch.eye(3, dtype=torch.float64)[i]
        out.append(
            (objective({"logits": x["logits"] + shift}) - objective({"logits": x["logits"] - shift})) / (2 * step)
        )
    return torch.stack(out).detach()


def weight(task, source):
    return float(task.upper.logits.detach().softmax(0)[source])


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def test_losses_by_hand():
    task, batch = exact()
    inputs, targets, _, source = batch["lower"]
    weights = task.upper.logits.softmax(0)
    likelihoods = task.lower(inputs).log_softmax(2)
    each = [-torch.stack([likelihoods[i, j, targets[i, j]] for j in range(5)]).mean() for i in range(6)]
    expected = sum(weights[source[i]] * each[i] for i in range(6)) / 6
    assert relative(task.lower_loss(batch["lower"]), expected) < 1e-12
    inputs, targets = batch["upper"]
    likelihoods = task.lower(inputs).log_softmax(2).gather(2, targets[..., None])
    assert relative(task.upper_loss(batch["upper"]), -likelihoods.mean()) < 1e-12


def test_hypergradient_in_the_logits_through_attention():
    """Three steps unrolled, second derivatives of attention included."""
    task, batch = exact()
    problem, x = bound(task, batch)
    module, y = (
        algorithms.RHG(task=task, dynamics=GradientDescent(0.5), lower_steps=3),
        tree.detach(tree.of(task.lower)),
    )
    found = module.bilevel_step(problem, x, y).upper_grad["logits"]
    expected = differences(lambda x: problem.f(x, module.solve_lower(problem, x, y)), x)
    assert relative(found, expected) < 1e-7


def test_sama_is_the_derivative_of_one_step_of_adam():
    task, batch = exact()
    problem, x = bound(task, batch)
    module = algorithms.SAMA(task=task, dynamics=Adam(0.01, eps=1e-3), radius=1e-4, warm_start=False)
    y = tree.detach(tree.of(task.lower))
    found = module.bilevel_step(problem, x, y).upper_grad["logits"]
    expected = differences(lambda x: problem.f(x, module.solve_lower(problem, x, y)), x)
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("samples_at_once", [None, 4])
def test_penalties_are_differentiated_at_fixed_iterates(samples_at_once):
    """The directions of F2SA-2 and MEHA are those of their penalties in x, at the y they have then."""
    task, batch = exact()
    problem, x = bound(task, batch, samples_at_once=samples_at_once)
    y = tree.detach(tree.of(task.lower))
    module = algorithms.F2SA(task=task, dynamics=GradientDescent(0.5), lower_steps=2, gamma=4.0)
    module.configure_model()
    step = module.bilevel_step(problem, x, y)
    z = step.state["z"]
    expected = differences(lambda x: 2.0 * (problem.g(x, step.lower) - problem.g(x, z)), x)
    assert relative(step.upper_grad["logits"], expected) < 1e-7
    module = algorithms.MEHA(task=task, dynamics=GradientDescent(0.5), c=2.0)
    module.configure_model()
    step = module.bilevel_step(problem, x, y)
    expected = differences(lambda x: problem.g(x, y) - problem.g(x, step.state["theta"]), x)
    assert relative(step.upper_grad["logits"], expected) < 1e-7


class Kernels(TorchDispatchMode):
    """Counts the operators that attention is evaluated by."""

    def __init__(self):
        super().__init__()
        self.fused = self.plain = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += "flash_attention" in str(func)
        self.plain += "softmax.default" in str(func) and args[0].ndim == 4
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["BOME", "DARTS", "F2SA", "MEHA", "SAMA", "VPBGD", "RHG"])
def test_methods_without_second_derivatives_use_fused_attention(name):
    task, batch = exact()
    task.float()
    problem, x = bound(task, batch)
    module = getattr(algorithms, name)(task=task, lower_steps=2)
    module.configure_model()
    y = tree.detach(tree.of(task.lower))
    with Kernels() as kernels:
        step = module.bilevel_step(problem, x, y)
        if callable(step.lower):
            step.lower(problem, x)
    assert (kernels.plain > 0) == (name == "RHG")
    assert kernels.fused > 0  # for RHG in f alone


def run(name, steps, folder=None, model=None, seed=0, data=None, callbacks=(), ckpt_path=None, **settings):
    torch.manual_seed(seed)
    task = TextReweighting(GPT(**TINY) if model is None else model(), SourceWeights(2))
    module = getattr(algorithms, name)(task=task, **{**METHODS[name], **settings})
    loop = trainer(steps, folder, callbacks=[*callbacks], enable_checkpointing=any(
        isinstance(c, ModelCheckpoint) for c in callbacks
    ))  # fmt: skip
    loop.fit(module, datamodule=TextSources(**{**DATA, **(data or {}), "seed": seed}), ckpt_path=ckpt_path)
    return module, loop


def state(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "steps", "seed"), [("SAMA", 25, 0), ("SAMA", 25, 1), ("F2SA", 20, 0), ("MEHA", 45, 0)]
)
def test_the_weight_of_the_damaged_source_falls(name, steps, seed):
    module, _ = run(name, steps, seed=seed)
    assert weight(module.task, 1) < 0.2


@pytest.mark.parametrize("name", [*METHODS])
def test_the_same_seed_gives_the_same_bits(name):
    first, second = (state(run(name, 2)[0]) for _ in range(2))
    assert all(torch.equal(t, second[key]) for key, t in first.items())
    other = state(run(name, 2, seed=1)[0])
    assert not torch.equal(first["task.upper.logits"], other["task.upper.logits"])


def test_it_is_the_damage_that_counts_not_the_order():
    module, _ = run("SAMA", 25, seed=1, data={"corrupted": {"first": 0.5}})
    assert weight(module.task, 0) < 0.2


@pytest.mark.parametrize("name", [*METHODS])
def test_what_is_frozen_keeps_its_bits(name):
    model = lambda: LowRank(GPT(**TINY), rank=2, layers="qkv|up", trained=r"^norm\.")
    torch.manual_seed(0)
    before = {f"task.lower.{key}": t.clone() for key, t in model().state_dict().items()}
    module, _ = run(name, 3, model=model)
    after, moved = state(module), {f"task.lower.{key}" for key in tree.of(module.task.lower)}
    assert moved == {key for key, t in before.items() if not torch.equal(t, after[key])}
    assert len(moved) == 2 * 2 + 2


ACCUMULATED = {"accumulate": 2, "samples_at_once": 6, "model": lambda: Autocast(GPT(**TINY))}


@pytest.mark.parametrize(("name", "settings"), [("SAMA", {}), ("F2SA", ACCUMULATED), ("MEHA", ACCUMULATED)])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, name, settings):
    """In the middle of an epoch, and of a window of accumulated batches."""
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole, _ = run(name, 4, **settings, callbacks=[save])
    again = ModelCheckpoint(tmp_path, save_top_k=0, every_n_train_steps=1)
    resumed, _ = run(name, 4, **settings, callbacks=[again], ckpt_path=tmp_path / "step=2.ckpt")
    assert int(resumed.oracles[1]) == int(whole.oracles[1])
    expected = state(whole)
    assert all(torch.equal(t, expected[key]) for key, t in state(resumed).items())


class Logits(Callback):
    """The dtype of the logits of each evaluation, and the number of windows."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        pl_module.task.lower.model.blocks[0].register_forward_hook(
            lambda module, args, out: self.seen.append((len(out), module.up(args[0]).dtype))
        )


def test_upper_iterations_in_bfloat16_a_few_windows_at_a_time():
    """Close to float32 all at once, and not the same."""
    watch = Logits()
    rounded, _ = run("F2SA", 2, **{**ACCUMULATED, "accumulate": 1}, callbacks=[watch])
    assert {dtype for _, dtype in watch.seen} == {torch.bfloat16}
    assert {number for number, _ in watch.seen} == {6, 4}  # of 16
    plain, _ = run("F2SA", 2)
    for key, t in tree.of(plain.task.lower).items():
        found = tree.of(rounded.task.lower)[f"model.{key}"]
        assert found.dtype == torch.float32
        assert not torch.equal(found, t)
        assert relative(found, t) < 0.05
    module = algorithms.RHG(task=TextReweighting(Autocast(GPT(**TINY)), SourceWeights(2)), lower_steps=1)
    with pytest.raises(BilevelError, match="for methods without second derivatives"):
        trainer(1).fit(module, datamodule=TextSources(**DATA))


@torch.no_grad()
def test_metrics_and_predictions():
    torch.manual_seed(0)
    task, data = TextReweighting(GPT(**TINY), SourceWeights(2)), TextSources(**DATA)
    data.setup("fit")
    task.upper.logits.copy_(torch.tensor([0.0, -1.0]))
    (batch,) = data.val_dataloader()
    found = task.metrics(batch)
    probabilities = task.lower(batch["upper"][0]).softmax(2)
    right = probabilities.gather(2, batch["upper"][1][..., None])
    assert float(found["bits_per_byte"]) == pytest.approx(float(-right.log2().mean()), rel=1e-5)
    guessed = (probabilities.argmax(2) == batch["upper"][1]).float().mean()
    assert float(found["accuracy"]) == pytest.approx(float(guessed), rel=1e-5)
    inputs, targets, _, source = (t[:, None] if t.ndim == 1 else t for t in batch["lower"])
    likelihoods = task.lower(inputs).softmax(2).gather(2, targets[..., None])[..., 0].log2()
    for s in (0, 1):
        expected = -likelihoods[source[:, 0] == s].mean()
        assert float(found[f"source_bits_per_byte_{s}"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(found["source_weight_1"]) == pytest.approx(1 / (1 + math.e))
    table = task.predict(data.decoded(data.train))
    assert [*table] == ["index", "source", "bits_per_byte", "weight"]
    assert len({len(column) for column in table.values()}) == 1
    shown = table["bits_per_byte"][batch["lower"][2]]
    torch.testing.assert_close(shown, -likelihoods.mean(1), rtol=1e-4, atol=1e-4)


def test_figure_and_scalars(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path, name="", version="csv")]
    torch.manual_seed(0)
    task = TextReweighting(GPT(**TINY), SourceWeights(2))
    module = algorithms.SAMA(task=task, **METHODS["SAMA"])
    loop = trainer(10, tmp_path, logger=loggers, log_every_n_steps=2)
    loop.fit(module, datamodule=TextSources(**{**DATA, "epoch_length": 5}))
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    curve = [float(row["train/source_weight/second"]) for row in rows if row["train/source_weight/second"]]
    assert len(curve) == 5
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] == pytest.approx(weight(task, 1), abs=1e-6)
    for name in ("bits_per_byte", "source_bits_per_byte_0", "source_bits_per_byte_1", "source_weight_0"):
        assert len([row for row in rows if row[f"val/{name}"]]) == 2
    (report,) = [c for c in loop.callbacks if type(c).__name__ == "SourceWeightCurve"]
    assert [step for step, _ in report.path] == [0, 2, 4, 6, 8, 10]
    assert report.path[0][1] == [0.5, 0.5]
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    assert len(events.Reload().Images("source_weights")) == 2
    with Image.open(tmp_path / "source_weights.png") as picture:
        assert picture.width > 400


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ({}, SourceWeights(3), r"SourceWeights has 3 weights but the data 2 sources \(first, second\)"),
        ({}, SampleWeights(10), "SampleWeights has 10 weights but the data 1022 training windows"),
        ({"context": 8}, SourceWeights(2), "A sequence of 16 tokens is longer than GPT.context=8"),
        ({"tokens": 64}, SourceWeights(2), r"does not accept windows of 16 bytes \(index out of range"),
        ({"tokens": 128}, SourceWeights(2), r"returns shape \(1, 16, 128\) .* a logit for each of 256 bytes"),
    ],
)
def test_data_that_do_not_fit(model, weights, message):
    module = algorithms.SAMA(task=TextReweighting(GPT(**{**TINY, **model}), weights))
    with pytest.raises(BilevelError, match=message):
        trainer(1).fit(module, datamodule=TextSources(**DATA))


def test_each_window_may_have_its_own_weight():
    torch.manual_seed(0)
    task = TextReweighting(GPT(**TINY), SampleWeights(1022))
    trainer(2).fit(algorithms.SAMA(task=task, **METHODS["SAMA"]), datamodule=TextSources(**DATA))
    moved = task.upper.logits.detach() != 0
    assert 16 <= int(moved.sum()) <= 32


def test_a_model_of_hugging_face_in_its_place():
    pytest.importorskip("transformers", reason="transformers is not installed: pip install bilevel-lightning[text]")
    settings = {
        "vocab_size": 256, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    module, _ = run("SAMA", 20, model=lambda: HuggingFaceModel(settings=settings))
    assert weight(module.task, 1) < 0.2
    adapters = lambda: LowRank(HuggingFaceModel(settings=settings), layers="c_attn", trained="wte|ln")
    before = adapters().state_dict().keys()
    module, _ = run("F2SA", 2, model=adapters, samples_at_once=8)
    assert module.task.lower.state_dict().keys() == before
