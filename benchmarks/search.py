"""Eight studies of twenty trials on digits with two workers each, all killed once in the middle.

Prints a table row for each: trials, complete, pruned, failed, lost and done again, the best validation accuracy and the
test accuracy with its weights in %, CPU and wall seconds.

    python benchmarks/search.py [folder] [--only digits_trhg ...] [--storage URL]
"""

import argparse
import csv
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna

from bilevel_lightning.search.study import counted, lost

STUDIES = {
    "digits_trhg": ("cleaning", 20),
    "digits_darts": ("cleaning", 50),
    "digits_f2sa": ("cleaning", 100),
    "digits_aidfp": ("cleaning_implicit", 20),
    "digits_aidneumann": ("cleaning_implicit", 20),
    "digits_vpbgd": ("cleaning_penalty", 100),
    "digits_bome": ("cleaning_penalty", 100),
    "digits_meha": ("cleaning_penalty", 200),
}
TRIALS, GRACE = 20, 20


def trials(url: str, name: str) -> tuple[list[optuna.trial.FrozenTrial], int]:
    """Returns the trials that count, and how many were lost."""
    study = optuna.load_study(study_name=name, storage=url)
    return counted(study), len(lost(study.get_trials()))


def main(root: Path, only: list[str], storage: str | None) -> None:
    """Runs the studies."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    root.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{root / 'studies.db'}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = time.perf_counter()
    for config, (space, steps) in ((name, STUDIES[name]) for name in only):
        command = [
            sys.executable, "-c", "from bilevel_lightning.cli import search; search()",
            "--config", f"hyper_cleaning/{config}", "--space", space, "--trials", str(TRIALS), "--storage", url,
            "--grace", str(GRACE), "--trainer.default_root_dir", str(root), "--trainer.max_steps", str(steps),
            "--data.epoch_length", "10",
        ]  # fmt: skip
        name, begun, used = f"{config}_{space}", time.perf_counter(), cpu()

        def workers(command: list[str] = command) -> list[subprocess.Popen[bytes]]:
            return [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]

        running = workers()
        while not (root / "search" / name / f"version_{TRIALS // 2}").exists():
            time.sleep(0.2)
        for worker in running:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        running = workers()
        assert [worker.wait() for worker in running] == [0, 0]
        found, gone = trials(url, name)
        states = [trial.state.name.lower() for trial in found]
        with (root / "search" / name / "results.csv").open() as file:
            best = next(csv.DictReader(file))
        scores = [100 * float(best[name]) for name in ("val/accuracy", "report/learnt_weights")]
        counts = [len(found), *(states.count(state) for state in ("complete", "pruned", "fail")), gone]
        times = [cpu() - used, time.perf_counter() - begun]
        row = [config, *map(str, counts), *(f"{v:.1f}" for v in scores), *(f"{t:.0f}" for t in times)]
        print(f"| {' | '.join(row)} |", flush=True)
    print(f"CPU {cpu():.0f} s, wall {time.perf_counter() - whole:.0f} s")


def cpu() -> float:
    """Returns the CPU seconds of all workers so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/benchmark_search"))
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--storage", help="where the studies are kept; default: an SQLite file in the folder")
    args = parser.parse_args()
    main(args.folder, args.only, args.storage)
