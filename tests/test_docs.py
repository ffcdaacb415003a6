"""The code in the README and the docs runs, and what they name exists."""

import re
from pathlib import Path

import pytest

from bilevel_lightning import algorithms
from bilevel_lightning.cli import shipped_configs
from bilevel_lightning.cli.arguments import config_path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets():
    for page in PAGES:
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            yield pytest.param(page, code, id=f"{page.name}-{i}")


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging interval")
@pytest.mark.parametrize(("page", "code"), [*snippets()])
def test_snippet_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})  # noqa: S102


def test_a_new_problem_takes_at_most_forty_lines():
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert "class" in code
    assert ".fit(" in code
    assert len(code.splitlines()) <= 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_configs_files_and_links_exist(page):
    text = page.read_text()
    for name in re.findall(r"--config (\S+/\S+?)[`\s]", text):
        config_path(name)
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_algorithm_is_in_the_readme_and_every_config_in_a_page():
    readme, text = (ROOT / "README.md").read_text(), "".join(page.read_text() for page in PAGES)
    for name in algorithms.__all__:
        assert f"`{name}`" in readme
    for name in shipped_configs():  # in a table of one task without its folder
        assert name in text or f"`{name.partition('/')[2]}`" in text, name
