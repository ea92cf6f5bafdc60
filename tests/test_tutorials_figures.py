"""The figures that the tutorials quote are those of results/tutorials.csv."""

from __future__ import annotations

import csv
from pathlib import Path
from string import Formatter

import pytest

ROOT = Path(__file__).parents[1]
# How each page states its figures. A name in braces is a figure of the table.
SAID = {
    "detector": [
        "The image has {boxes, annotated:.0f} annotated boxes. The float model finds "
        "{boxes, float:.0f}. The W4A4 model finds {boxes, W4A4:.0f}, and "
        "{boxes at W4A4 over a box in float:.0f} of these lie over a box in float.",
        "on {test images:.0f} test images:",
        "| float | {AP, float:.1f} |",
        "| file of W8A8 with RTN, in onnxruntime | {AP, file of W8A8:.1f} |",
        "attention maps and predictors at 8 bits | {AP, W4A4:.1f} |",
        "The {epochs:.0f} epochs took {CPU seconds of train:.0f} CPU seconds in float32",
    ],
    "diagnosis": [
        "{heaviest sites behind GELU:.0f} of the {heaviest sites:.0f} sites with the heaviest "
        "tails are there, with a `max/rms` up to {max/rms behind GELU:.0f}.",
        "up to {largest residual:.0f}, in channel {channel of the largest residual:.0f}.",
        "It amplifies channel {channel of the worst pair:.0f}, and its `alignment` is "
        "{alignment of the worst pair:.1f}. In {causes in this channel:.0f} of the {causes:.0f} "
        "causes, a block writes into this channel.",
        "explains at most {largest share in this channel, %:.0f} % of a value",
    ],
    "photos": [
        "We took {training photos:.0f} photos of four classes",
        "`train` | top-1 {top-1 of train, %:.0f} % on {test photos:.0f} test photos |",
        "top-1 {top-1 of quantize, %:.0f} %, {on quantized operands, %:.0f} % of multiply-",
        "{products in integers:.0f} of {products:.0f} products in integers, "
        "{codes that differ:.0f} codes differ, top-1 {top-1 of check, %:.0f} %, "
        "the file is {times smaller:.1f} times smaller |",
    ],
    "training-loops": [
        "Without the line it grows from {penalty without, start:.0f} to "
        "{penalty without, end:.0f}. With the line it falls from {penalty with, start:.0f} to "
        "{penalty with, end:.0f}.",
        "{top-1 without, %:.0f} % of the test digits are right without the line, and "
        "{top-1 with, %:.0f} % with it.",
    ],
}
# Figures that are names, and how the page says them.
NAMES = {
    ("diagnosis", "worst pair"): (
        "mlp: blocks.11.mlp.fc1.weight -> blocks.11.mlp.fc2.weight",
        "the worst pair is fc1 and fc2 of block 11",
    ),
}


def figures() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    with (ROOT / "results/tutorials.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["page"], {})[row["figure"]] = row["value"]
    return found


def text_of(page: str) -> str:
    return " ".join((ROOT / f"docs/tutorials/{page}.md").read_text("utf-8").split())


@pytest.mark.parametrize("page", SAID)
def test_a_tutorial_states_the_figures_of_the_table(page: str) -> None:
    values = {
        name: float(value) for name, value in figures()[page].items() if (page, name) not in NAMES
    }
    for phrase in SAID[page]:
        assert phrase.format_map(values) in text_of(page)
    stated = {name for phrase in SAID[page] for _, name, _, _ in Formatter().parse(phrase)}
    assert stated - {None} == values.keys(), "a figure is in the table or in a phrase alone"


def test_names_in_the_table_are_those_of_the_pages() -> None:
    for (page, name), (value, said) in NAMES.items():
        assert figures()[page][name] == value
        assert said in text_of(page)


def test_every_page_of_the_table_is_compared() -> None:
    assert figures().keys() == SAID.keys()
