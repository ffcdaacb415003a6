"""Two processes are one, and a resumed run is the undisturbed one, for each name in ``algorithms.__all__``."""

import pytest
import torch
from contract import CASES, EXTRAS, PROBLEMS, STEPS, Save, episodes_seen, extra, file, trained, worker
from loops import Batches, trainer
from problems import Quadratic

from bilevel_lightning import algorithms


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs: undisturbed, resumed here and in a new process, and by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for problem in PROBLEMS:
        for case in CASES:
            path = file(folder, case, problem)
            found["whole", case, problem] = trained(case, problem, callbacks=[Save(path)])
            if path.is_file() and "," in case:
                found["here", case, problem] = trained(case, problem, ckpt_path=path)
    found.update({name: extra(name, 1) for name in EXTRAS})
    found["seen"] = episodes_seen(size=4)
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    ranks = [torch.load(folder / f"results {rank}.pt", weights_only=True) for rank in (0, 1)]
    return found, ranks


def leaves(result):
    return {
        **result["state"],
        **{f"optimizer {i} {k}": v for i, s in result["optimizer"].items() for k, v in s.items()},
    }


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_the_union_batch(runs, case, problem):
    """Also with other numbers and sizes of episodes on each process; random directions alone may differ there."""
    found, ranks = runs
    whole, pair = found["whole", case, problem], [rank["pair", case, problem] for rank in ranks]
    if "refused" in whole:
        assert [p["refused"] for p in pair] == [whole["refused"]] * 2
        return
    assert whole["steps"] == pair[0]["steps"] >= STEPS
    for name, want in leaves(whole).items():
        first, second = (leaves(p)[name] for p in pair)
        assert torch.equal(first, second), name
        if name == "oracles":  # a solver that stops at a tolerance may take one product more or less
            assert (first - want).abs().max() <= 0.05 * want.max()
            continue
        if not (whole["drawn"] and problem == "episodes"):
            scale = 1.0 + want.double().abs().max()
            assert (first - want).abs().max() <= 1e-10 * scale, name


@pytest.mark.parametrize("name", EXTRAS)
def test_two_processes_keep_and_deliver_what_one_does(runs, name):
    """Heads that a task stores by episode, and sparse inputs, whole and in minibatches."""
    found, ranks = runs
    whole, pair = found[name], [rank["pair", name] for rank in ranks]
    assert whole["steps"] == pair[0]["steps"] == STEPS
    for key, want in leaves(whole).items():
        first, second = (leaves(p)[key] for p in pair)
        assert torch.equal(first, second), key
        if key != "oracles":
            assert (first - want).abs().max() <= 1e-10 * (1.0 + want.double().abs().max()), key
    tables = {"heads": ["task.stored.weight"], "twins": ["task.stored.weight", "states.theta.weight"]}
    for key in tables.get(name.split()[0], ()):
        stored = whole["state"][key]
        assert (stored != stored[:1]).flatten(1).any(1).sum() == len(stored) - 1  # each row was written, by its own


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(runs, case, problem):
    """In the middle of an epoch, in a new process, where episodes have two loader workers in place of none."""
    found, ranks = runs
    whole = found["whole", case, problem]
    if "refused" in whole:
        return
    new = ranks[PROBLEMS.index(problem)]["resumed", case, problem]
    for resumed in (new, *([found["here", case, problem]] if "," in case else [])):
        assert resumed["steps"] == whole["steps"]
        assert resumed["lr"] == whole["lr"]
        assert leaves(resumed).keys() == leaves(whole).keys()
        for name, want in leaves(whole).items():
            assert torch.equal(want, leaves(resumed)[name]), name


@pytest.mark.parametrize("case", CASES)
def test_every_algorithm_runs_on_one_of_the_problems_at_least(runs, case):
    """What is refused is refused for its structure: no y_0(x) to learn, no y that persists, or what `prepare` made."""
    refused = [found["refused"] for p in PROBLEMS if "refused" in (found := runs[0]["whole", case, p])]
    assert len(refused) < len(PROBLEMS)
    reasons = ("persistent_lower", "warm_start", "prepare(batch)")
    assert all(any(reason in message for reason in reasons) for message in refused)


def test_processes_train_on_different_episodes_and_together_on_all(runs):
    found, ranks = runs
    first, second = (rank["seen"] for rank in ranks)
    assert len({*first}) == len({*second}) == 8
    assert not {*first} & {*second}
    assert {*first} | {*second} == {*found["seen"]}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", algorithms.__all__)
def test_mixed_precision_leaves_hypergradients_in_float32(case, problem):
    """Products of second derivatives, and all else that x and y move by, are not rounded to bfloat16."""
    whole, mixed = (trained(case, problem, steps=2, precision=p) for p in ("32-true", "bf16-mixed"))
    assert whole.keys() == mixed.keys()
    if "refused" not in whole:
        assert whole["state"]["task.upper.logits" if problem == "cleaning" else "task.upper.head.weight"].dtype == (
            torch.float32
        )
        assert all(torch.equal(t, leaves(mixed)[name]) for name, t in leaves(whole).items())


def test_mixed_precision_evaluates_in_bfloat16():
    """So that the setting is no other name of 32-true; and a loss may choose it for a part of itself."""
    seen = []

    class Watched(Quadratic):
        def metrics(self, batch):
            seen.append((self.A @ self.A).dtype)
            return {}

        def lower_loss(self, batch):
            with torch.autocast("cpu", torch.bfloat16):
                seen.append((self.A @ self.A).dtype)
            seen.append((self.A @ self.A).dtype)
            return super().lower_loss(batch)

    task = Watched().float()
    task.A, task.B, task.c = task.A.float(), task.B.float(), task.c.float()
    module = algorithms.RHG(task=task)
    run = trainer(1, precision="bf16-mixed")
    run.fit(module, Batches(1))
    assert set(seen[::2]) == {torch.bfloat16}
    assert set(seen[1::2]) == {torch.float32}
    seen.clear()
    run.validate(module, Batches(1), verbose=False)
    assert seen == [torch.bfloat16]
