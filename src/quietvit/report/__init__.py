"""Turn the results of a comparison into tables, plots and one HTML page.

Nothing is trained, quantized or measured here.
"""

from __future__ import annotations

from quietvit.report.page import render_page
from quietvit.report.results import Results, Run, SiteNoise, SiteOutlier, summarize, verdict
from quietvit.report.tables import Table, runs_table, summary_csv, summary_table, tidy_csv

__all__ = [
    "Results",
    "Run",
    "SiteNoise",
    "SiteOutlier",
    "Table",
    "render_page",
    "runs_table",
    "summarize",
    "summary_csv",
    "summary_table",
    "tidy_csv",
    "verdict",
]
