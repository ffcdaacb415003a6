"""Kills trainings at random moments, goes on with them, and compares their end with that of undisturbed ones.

    python benchmarks/faults.py                      # 30 kills over six algorithms
    python benchmarks/faults.py --kills 2 --only maml

Every run is the same command, ``bilevel-fit ... --ckpt_path last``, given again after each SIGKILL. A checkpoint is
written after every upper iteration, so that kills fall into writes too. After each kill all checkpoints must load; at
the end every tensor of the last one, optimizer's and schedulers' included, must equal that of the undisturbed run to
the bit. Exit status 1: one did not.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

STEPS = 60
QUIET = ["progress_bar", "model_summary"]
CLEANING = ["--trainer.callbacks+=CleaningReport", "--trainer.callbacks.steps=2", "--data.epoch_length=25"]
MINIBATCHES = [*CLEANING, "--data.lower_batch_size=50", "--data.upper_batch_size=20"]
EPISODES = ["--data.epoch_length=25", "--data.val_episodes=4", "--data.test_episodes=4"]
RUNS = {
    "trhg": ["hyper_cleaning/digits_trhg", "--model.upper_scheduler=StepLR", "--model.upper_scheduler.step_size=20",
             *MINIBATCHES],
    "aidcg": ["hyper_cleaning/digits_aidcg", "--model.warm_start_linear=true", *CLEANING],
    "meha": ["hyper_cleaning/digits_meha", *MINIBATCHES],
    "f2sa": ["hyper_cleaning/digits_f2sa", *MINIBATCHES],
    "sama": ["hyper_cleaning/digits_sama", *MINIBATCHES],
    "maml": ["few_shot/sinusoid_maml", "--data.num_workers=2", "--model.accumulate=3", *EPISODES],
}  # fmt: skip


def command(name: str, folder: Path) -> list[str]:
    """Returns the command line of a training, which begins it or goes on with it."""
    config, *settings = RUNS[name]
    return [
        sys.executable, "-m", "bilevel_lightning", "--config", config, *settings,
        "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1",
        "--trainer.callbacks.monitor=null", "--trainer.callbacks.filename={step:04d}",
        f"--trainer.max_steps={STEPS}", f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu",
        *(f"--trainer.enable_{what}=false" for what in QUIET), "--ckpt_path=last",
    ]  # fmt: skip


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints by the upper iteration of their names."""
    return sorted(folder.rglob("*.ckpt"), key=step)


def step(path: Path) -> int:
    """Returns the upper iteration of a checkpoint, from its name."""
    return int(path.stem.partition("step=")[2].partition("-")[0] or 0)


def reached(folder: Path) -> int:
    """Returns the upper iteration of the newest checkpoint; 0 where there is none."""
    return max((step(path) for path in folder.rglob("*.ckpt")), default=0)


def killed(name: str, folder: Path, goal: int, rng: random.Random) -> bool:
    """Goes on with a training up to iteration ``goal``, and kills it a random moment later; False: it had ended."""
    with (folder / "output.txt").open("ab") as output:
        run = subprocess.Popen(command(name, folder), stdout=output, stderr=output, start_new_session=True)
        while run.poll() is None and reached(folder) < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        ended = run.poll() is not None
        if not ended:
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    if ended and run.returncode:
        raise SystemExit((folder / "output.txt").read_text()[-2000:])
    return not ended


def readable(path: Path) -> bool:
    """Whether a checkpoint loads."""
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


def tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Returns all tensors of a checkpoint by their places in it."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {n: t for key, part in pairs for n, t in tensors(part, f"{name}/{key}").items()}


def compared(one: Path, other: Path) -> int:
    """Returns how many tensors of two checkpoints differ in a bit, or in being there."""
    states = []
    for path in (one, other):
        checkpoint = torch.load(path, weights_only=True)
        kept = ("state_dict", "optimizer_states", "lr_schedulers", "random_state", "accumulated")
        states.append(tensors({key: checkpoint[key] for key in kept}))
    names = states[0].keys() | states[1].keys()
    return sum(n not in states[0] or n not in states[1] or not torch.equal(states[0][n], states[1][n]) for n in names)


def main() -> None:
    """Runs the trainings that were asked for, and prints what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="over all algorithms")
    parser.add_argument("--only", nargs="+", choices=[*RUNS], default=[*RUNS])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    rng, failed = random.Random(given.seed), False
    table = Table("run", "kills", "inside a write", "unreadable", "tensors that differ")
    with tempfile.TemporaryDirectory() as root:
        for i, name in enumerate(given.only):
            wanted = given.kills // len(given.only) + (i < given.kills % len(given.only))
            calm, rough = (Path(root) / kind / name for kind in ("calm", "rough"))
            for folder in (calm, rough):
                folder.mkdir(parents=True)
            killed(name, calm, STEPS + 1, rng)
            kills = unreadable = inside = 0
            while kills < wanted:
                left = STEPS - reached(rough)
                if left <= 2:
                    break
                goal = reached(rough) + rng.randint(1, max(1, 2 * left // (wanted - kills + 2)))
                kills += killed(name, rough, goal, rng)
                unreadable += sum(not readable(path) for path in checkpoints(rough))
                inside += len([*rough.rglob(".*.unfinished")])
                for path in rough.rglob(".*.unfinished"):
                    path.unlink()
            killed(name, rough, STEPS + 1, rng)
            ends = [checkpoints(folder)[-1] for folder in (calm, rough)]
            differ = compared(*ends) + (step(ends[1]) != STEPS)
            failed = failed or bool(differ or unreadable)
            table.add_row(name, str(kills), str(inside), str(unreadable), str(differ))
    Console().print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
