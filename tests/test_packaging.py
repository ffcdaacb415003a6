"""The package as people install it."""

import ast
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import bilevel_lightning

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("datamodules", "cli", "configs")


def command(*args, **settings):
    done = subprocess.run([*map(str, args)], capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_links_lie_in_the_package():
    """A checkout without symbolic links would build a wheel that silently lacks the sub-packages."""
    for name in LINKS:
        link = ROOT / "bilevel_lightning" / name
        assert link.is_symlink(), f"{link} must be a link to ../{name}: clone with core.symlinks=true"
        assert link.resolve() == ROOT / name


@pytest.mark.slow
def test_wheel_from_sdist_runs_a_shipped_config_elsewhere(tmp_path):
    command(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (sdist,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        assert not [name for name in archive.getnames() if "/tests/" in name or "/.venv/" in name]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "bilevel_lightning",
        f"bilevel_lightning-{bilevel_lightning.__version__}.dist-info",
    }
    shipped = set(names)
    for folder in LINKS:
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".yaml", ".json"):
                assert f"bilevel_lightning/{file.relative_to(ROOT)}" in shipped
    assert "bilevel_lightning/py.typed" in shipped

    # A fresh environment that sees the dependencies of this one, but not this checkout.
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = command(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    command(sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", site, wheel)
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "OMP_NUM_THREADS": "1"}
    where = command(python, "-c", "import bilevel_lightning as b; print(b.__file__)", cwd=tmp_path, env=environment)
    assert where.strip().startswith(site)
    output = command(
        python, "-m", "bilevel_lightning", "--config", "hyper_cleaning/digits_trhg", "--trainer.max_steps", "2",
        "--trainer.enable_progress_bar", "false", cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert "clean samples only (oracle)" in output
    assert (tmp_path / "runs" / "hyper_cleaning" / "digits_trhg" / "version_0" / "metrics.csv").is_file()


def test_every_import_is_a_declared_dependency():
    """A fresh install has what is declared, and nothing that other packages happen to bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {line.split(">")[0].split("[")[0].replace("-", "_") for line in project["dependencies"]}
    # other names
    provides = {"scikit_learn": "sklearn", "pytorch_lightning": "lightning_fabric", "pillow": "PIL", "pyyaml": "yaml"}
    declared |= {module for package, module in provides.items() if package in declared}
    imported = set()
    for folder in ("bilevel_lightning", "datamodules", "cli"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"bilevel_lightning"} <= declared


def test_every_dependency_has_a_lower_bound_with_its_reason():
    lines = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("\n]")[0].strip().splitlines()
    for reason, dependency in zip(lines[::2], lines[1::2], strict=True):
        assert reason.strip().startswith("# ")
        assert ">=" in dependency
