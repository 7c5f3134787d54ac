"""Every piece of Python in the README, in docs/ and in docstrings runs, and the site's pages are all in its menu."""

import doctest
import importlib
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import stf

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def snippets(page):
    """The Python of a page, one snippet after another."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run_snippets(page):
    """Runs them as one program; returns its names."""
    names = {}
    for snippet in snippets(page):
        exec(compile(snippet, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_the_python_of_a_page_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = run_snippets(page)
    if page == "README.md":
        assert names["output"].shape == names["query"].shape
        assert names["completed"].shape == (2, 256)
    if page == "docs/generation.md":
        assert names["sampler"].tokens.shape == (2, 96)


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        if page.startswith("docs/"):
            assert f": {page.removeprefix('docs/')}\n" in menu, page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    """Also those that the site's generator does not look at: the README's, and pictures."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "stf").rglob("*.py")
    if not path.name.startswith("__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run_after_the_usual_imports(name):
    names = {"stf": stf, "tf": tf, "np": np, "keras": keras}
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(importlib.import_module(name), globs=names):
        runner.run(example)
    assert runner.failures == 0
