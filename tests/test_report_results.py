from __future__ import annotations

import csv
import io
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from quietvit.errors import QuietvitError
from quietvit.report import Results, runs_table, summarize, summary_csv, summary_table, tidy_csv
from quietvit.report.results import paired_interval, signed, verdict
from report_cases import results_of

points = st.floats(0, 100)
paired = st.lists(st.tuples(points, points), min_size=2, max_size=15)


@given(paired)
def test_the_interval_is_that_of_the_paired_t_test(tops):
    differences = [b - a for a, b in tops]
    low, high = paired_interval(differences, resolution=0.1)
    deviation = max(statistics.stdev(differences), 0.1)
    expected = stats.t.interval(
        0.95, len(tops) - 1, statistics.fmean(differences), deviation / len(tops) ** 0.5
    )
    assert (low, high) == pytest.approx(expected)


@given(paired)
def test_exchanging_the_arms_exchanges_better_and_worse(tops):
    opposite = {"better": "worse", "worse": "better"}
    forth = summarize(results_of(tops))
    back = summarize(results_of([(b, a) for a, b in tops]))
    for one, other in zip(forth, back, strict=True):
        assert other.outcome == opposite.get(one.outcome, one.outcome)
        assert other.difference == pytest.approx(-one.difference)
        assert (one.better, one.worse) == (other.worse, other.better)


def test_equal_gains_of_one_image_are_not_taken_for_certain():
    gain = 100 / 500
    rows = summarize(results_of([(90, 90 + gain)] * 3, images=500))
    assert {row.outcome for row in rows} == {"no difference seen"}


def test_worse_is_said_first_and_with_its_numbers():
    rows = summarize(results_of([(90, 85.0), (91, 85.5), (92, 87.5)]))
    text = verdict(rows)
    assert [row.outcome for row in rows] == ["worse"] * 3
    assert text.startswith("Training with CD: worse in 3 of 3 rows")
    assert "float (−5.00 points)" in text
    assert "better" not in text


def test_within_spread_no_difference_is_claimed():
    text = verdict(summarize(results_of([(90, 95), (95, 90), (92, 93)])))
    assert text.startswith("Training with CD: no difference seen in 3 of 3 rows")


def test_one_seed_proves_nothing():
    rows = summarize(results_of([(10, 90)]))
    assert rows[0].outcome == "one seed, spread unknown"
    assert rows[0].interval == "–"
    assert "nothing follows" in verdict(rows)


def test_seeds_with_one_arm_only_are_left_out_and_named():
    whole = results_of([(90, 91), (92, 94)])
    part = whole.model_copy(update={"runs": whole.runs[:3]})
    assert part.unfinished == ("seed 1 with CD",)
    assert summarize(part)[0].seeds == 1
    with pytest.raises(QuietvitError, match="--resume"):
        summarize(whole.model_copy(update={"runs": whole.runs[:1]}))


def test_results_survive_json():
    results = results_of([(90, 91), (92, 94)])
    assert Results.model_validate_json(results.model_dump_json()) == results


def test_csv_holds_every_number_in_full():
    tops = [(90.1234567, 91), (92, 94)]
    lines = list(csv.DictReader(io.StringIO(tidy_csv(results_of(tops)))))
    assert len(lines) == 2 * 2 * 3
    assert {(line["seed"], line["arm"]) for line in lines} == {
        (seed, arm) for seed in "01" for arm in ("without CD", "with CD")
    }
    assert float(lines[0]["top1"]) == tops[0][0]
    rows = list(csv.DictReader(io.StringIO(summary_csv(results_of(tops)))))
    assert float(rows[0]["difference"]) == statistics.fmean([91 - tops[0][0], 2])


def test_the_terminal_shows_the_page_s_cells():
    results = results_of([(90, 91), (92, 94)])
    for table in (summary_table(results), runs_table(results)):
        console = Console(width=400, record=True, file=io.StringIO())
        console.print(table.rich())
        shown = console.export_text()
        assert all(cell in shown for row in table.cells() for cell in row)


def test_the_compact_table_fits_eighty_columns():
    results = results_of([(90, 91), (92, 94)], settings=("W4A4 rtn-percentile",))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(results).rich(compact=True))
    shown = console.export_text()
    assert "W4A4 rtn-percentile" in shown
    assert "no difference seen" in shown


@pytest.mark.parametrize(("value", "text"), [(0.001, "0.00"), (-0.001, "0.00"), (-1, "−1.00")])
def test_signs(value, text):
    assert signed(value) == text


def test_a_better_float_model_is_told_from_one_that_loses_less():
    found = results_of([(90, 90.5), (91, 91.2), (92, 92.9)])
    lifted = [
        run.model_copy(
            update={
                "float_score": run.float_score + 1.5 * run.decay,
                "quantized": {k: v + 1.5 * run.decay for k, v in run.quantized.items()},
            }
        )
        for run in found.runs
    ]
    before = summarize(found)
    after = summarize(found.model_copy(update={"runs": tuple(lifted)}))
    for one, other in zip(before, after, strict=True):
        assert other.difference == pytest.approx(one.difference + 1.5)
        assert other.saved == pytest.approx(one.saved) == 0
    assert verdict(after).endswith("What quantization itself costs: no difference seen in any row.")


def test_what_quantization_costs_is_said_worse_first():
    def row(saved, low, high):
        base = summarize(results_of([(90, 90.5), (91, 91.2)]))[1]
        return replace(base, setting="W4A4", saved=saved, saved_low=low, saved_high=high)

    base = summarize(results_of([(90, 90.5), (91, 91.2)]))[0]
    better, worse, even = row(0.8, 0.2, 1.4), row(-0.8, -1.4, -0.2), row(0.1, -0.2, 0.4)
    assert "it costs less in W4A4 (+0.80 points)." in verdict([base, better])
    text = verdict([base, better, worse, even])
    assert 0 < text.index("costs more in W4A4 (−0.80 points)") < text.index("costs less")
    assert text.endswith("no difference seen in the others.")
