"""Find an earlier comparison in a folder and say what starting a new one would delete.

``run`` makes and resumes comparisons. Nothing is deleted here.
"""

from __future__ import annotations

from pathlib import Path

from quietvit.errors import QuietvitError
from quietvit.report import Results
from quietvit.report.results import ARMS
from quietvit.train.earlier import earlier_run

COMPARISON = "compare.json"


def named(arm: str) -> str:
    """Return the name of an arm in the folder names of its runs."""
    return arm.replace(" ", "-").lower()


def earlier_runs(folder: Path) -> dict[Path, str]:
    """Return the runs of an earlier comparison: folder -> description. Empty runs are left out."""
    runs = {}
    places = [place for arm in ARMS for place in folder.glob(f"runs/seed*-{named(arm)}")]
    for place in sorted(places):
        earlier = earlier_run(place / "train")
        if (place / "run.json").is_file() or earlier.finished:
            runs[place] = f"{place.name} (a finished run)"
        elif earlier.parts:
            runs[place] = f"{place.name} ({earlier})"
    return runs


def refusal(folder: Path, force: bool, discard: bool) -> QuietvitError | None:
    """Return the error that forbids a new comparison in ``folder``, or None if it may start.

    An earlier comparison needs ``force``; an unfinished one with runs needs ``discard`` too. The
    error says what is there, how to continue it, and what a new comparison would delete.
    """
    runs = earlier_runs(folder)
    begun = (folder / COMPARISON).is_file()
    finished = begun and _finished(folder)
    precious = bool(runs) and not finished
    if not (begun or runs) or (force and (discard or not precious)):
        return None
    kind = "a finished" if finished else "an unfinished"
    resume = f"pass resume (--resume){' instead of force' * force}"
    keep = f"To continue it, {resume}" if not finished else f"To add seeds to it, {resume}"
    wanted = "force and discard (--force --discard)" if precious else "force (--force)"
    return QuietvitError(
        f"the output folder {folder} holds {kind} comparison. {f'{keep}. ' if begun else ''}To "
        "keep it and start another one, choose another output folder. To start a new one in this "
        f"folder, pass {wanted}: that deletes {'; '.join(runs.values()) or 'no run'}."
    )


def _finished(folder: Path) -> bool:
    try:
        text = (folder / "results.json").read_text(encoding="utf-8")
        return not Results.model_validate_json(text).unfinished
    except (OSError, ValueError):
        return False
