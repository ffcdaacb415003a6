"""Settings of all tests: one thread; real data where they can be found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """Returns a function from a data set's name to the root folder that holds it; skips where there are no data."""
    prepared: dict[str, Path] = {}

    def root(name: str) -> Path:
        if "BILEVEL_DATA_DIR" in os.environ:
            return Path(os.environ["BILEVEL_DATA_DIR"])
        if not (SHARED / "prepare.py").is_file():
            pytest.skip(f"no {name}: set BILEVEL_DATA_DIR to a folder that holds it")
        if name not in prepared:
            folder = tmp_path_factory.getbasetemp() / "real_data"
            command = [sys.executable, str(SHARED / "prepare.py"), "--root", str(folder), "--only", name]
            subprocess.run(command, check=True, capture_output=True)
            prepared[name] = folder
        return prepared[name]

    return root
