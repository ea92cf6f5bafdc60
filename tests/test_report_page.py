from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from quietvit.report import render_page, summary_table
from quietvit.report.lines import noise_panels, outlier_panels, training_panels
from quietvit.report.plots import DARK, LIGHT, accuracy_panels, overview_panel, svg_uri
from quietvit.report.results import summarize
from report_cases import results_of

TOPS = [(90, 85.0), (91, 85.5), (92, 87.5)]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.headings: list[int] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.addresses += [
            attributes[key] for key in ("src", "href", "srcset", "action") if key in attributes
        ]
        if tag == "img":
            self.images.append(attributes)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        assert tag not in ("script", "link", "iframe")

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(results_of(TOPS))


def test_the_page_loads_nothing_from_outside(page):
    found = Page(page)
    assert found.addresses
    assert all(address.startswith("data:image/") for address in found.addresses)
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_shows_every_cell_of_the_table_and_the_verdict(page):
    words = " ".join(Page(page).words)
    cells = [cell for row in summary_table(results_of(TOPS)).cells() for cell in row]
    assert all(cell in words for cell in cells)
    assert "Training with CD: worse in 3 of 3 rows" in words
    assert words.index("worse") < words.index("Outliers")
    assert "quietvit compare tiny.toml" in words


def test_every_plot_is_told_in_words_and_headings_do_not_skip(page):
    found = Page(page)
    assert len(found.images) == 1 + 1 + 2 + 2
    assert all(image["alt"] for image in found.images)
    assert found.headings[0] == 1
    assert found.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(found.headings, found.headings[1:], strict=False))


def test_what_comes_from_outside_is_escaped():
    text = render_page(results_of(TOPS, command="<script>alert(1)</script>", model="a<b>c"))
    assert "<script" not in text
    assert "a&lt;b&gt;c" in text


def test_the_overhead_is_relative_to_the_training_without_the_decay(page):
    assert "10.00 ± 0.00 %" in page


def test_an_unfinished_comparison_says_so():
    whole = results_of(TOPS)
    text = render_page(whole.model_copy(update={"runs": whole.runs[:5]}))
    assert "Not finished" in text
    assert "seed 2 with CD" in text


def test_plots_are_the_same_bytes_each_time_and_differ_by_theme():
    results = results_of(TOPS)
    for panels in (accuracy_panels, outlier_panels, noise_panels):
        first, again = panels(results)[0], panels(results)[0]
        assert svg_uri(first.draw(LIGHT)) == svg_uri(again.draw(LIGHT))
        assert svg_uri(first.draw(LIGHT)) != svg_uri(first.draw(DARK))


def test_dots_are_seeds():
    (panel,) = accuracy_panels(results_of(TOPS))
    dots = [line.get_ydata() for line in panel.draw(LIGHT).axes[0].lines]
    assert [list(found) for found in dots] == [[90, 91, 92]] * 3 + [[85.0, 85.5, 87.5]] * 3


def test_a_role_with_one_site_is_not_drawn_and_stretches_no_axis():
    panels = outlier_panels(results_of(TOPS))
    assert [panel.title for panel in panels] == ["post norm", "post gelu"]
    assert panels[0].draw(LIGHT).axes[0].get_ylim()[1] < 1000


def test_a_site_of_zeros_alone_can_be_drawn():
    whole = results_of(TOPS)
    silent = tuple(site.model_copy(update={"ratio": 0.0}) for site in whole.runs[0].outliers)
    runs = (whole.runs[0].model_copy(update={"outliers": silent}), *whole.runs[1:])
    panels = outlier_panels(whole.model_copy(update={"runs": runs}))
    assert all(svg_uri(panel.draw(LIGHT)) for panel in panels)


def test_runs_without_measured_sites_have_no_empty_plots():
    whole = results_of(TOPS)
    bare = tuple(run.model_copy(update={"outliers": (), "noise": ()}) for run in whole.runs)
    text = render_page(whole.model_copy(update={"runs": bare}))
    assert "Outliers</h2>" not in text
    assert len(Page(text).images) == 2


def test_the_overview_comes_before_the_table_and_the_terms_after(page):
    words = " ".join(Page(page).words)
    told = (
        "Of 3 settings, 3 are worse",
        "Colinearity Decay (CD) is",
        "saved",
        "worse in 3 of 3 rows",
    )
    places = [words.index(text) for text in told]
    assert places == sorted(places)
    assert page.index("<figure") < page.index("<table")
    assert "6 dB are one bit" in words
    results = results_of(TOPS)
    axes = overview_panel(summarize(results), results.metric).draw(LIGHT).axes[0]
    assert next(label.get_text() for label in axes.get_yticklabels()) == "float"


def test_many_lines_become_their_mean_in_a_band_and_the_worst_role_comes_first():
    few, many = (outlier_panels(results_of(TOPS[:1] * count)) for count in (3, 4))
    assert len(few[0].draw(LIGHT).axes[0].lines) == 6
    axes = many[0].draw(LIGHT).axes[0]
    assert len(axes.lines) == len(axes.collections) == 2
    whole = results_of(TOPS)
    loud = tuple(
        site.model_copy(update={"ratio": 9 * site.ratio}) if site.role == "post_gelu" else site
        for site in whole.runs[0].outliers
    )
    runs = (whole.runs[0].model_copy(update={"outliers": loud}), *whole.runs[1:])
    panels = outlier_panels(whole.model_copy(update={"runs": runs}))
    assert [panel.title for panel in panels] == ["post gelu", "post norm"]


def test_training_curves_are_drawn_where_runs_have_them():
    whole = results_of(TOPS)
    assert training_panels(whole) == []
    curve = tuple((step, 2.0 / step) for step in range(1, 30))
    runs = tuple(run.model_copy(update={"curve": curve}) for run in whole.runs)
    (panel,) = training_panels(whole.model_copy(update={"runs": runs}))
    assert panel.draw(LIGHT).axes[0].lines[0].get_ydata()[0] == 2.0
    assert "0.069" in panel.alt
