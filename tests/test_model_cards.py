"""Cards say what was measured: they are written from the results, and a changed number shows."""

import runpy
from pathlib import Path

import pytest

from diffusers_fastdiff.pretrained import available_pretrained, available_solvers

ROOT = Path(__file__).parents[1]
CARDS = runpy.run_path(str(ROOT / "examples" / "write_model_cards.py"))["cards"]()


def test_every_artefact_has_a_card():
    assert set(available_pretrained()) | set(available_solvers()) == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_card_is_what_the_results_say(name):
    assert (ROOT / "model_cards" / f"{name}.md").read_text() == CARDS[name]


def test_pages_hold_what_was_measured():
    pages = runpy.run_path(str(ROOT / "examples" / "write_readme.py"))["pages"]()
    assert [path.name for path, text in pages.items() if path.read_text(encoding="utf-8") != text] == []
    assert pages[ROOT / "README.md"].count("<!-- measured:") >= 6
