"""What a folder holds of an earlier comparison: told before it is refused, named when it goes.

How a comparison is made and resumed is in ``run``; nothing is deleted here.
"""

from __future__ import annotations

from pathlib import Path

from quietvit.errors import QuietvitError
from quietvit.report import Results
from quietvit.report.results import ARMS
from quietvit.train.earlier import earlier_run

COMPARISON = "compare.json"


def named(arm: str) -> str:
    """Return the name of an arm as it stands in the name of a run's folder."""
    return arm.replace(" ", "-").lower()


def earlier_runs(folder: Path) -> dict[Path, str]:
    """Return the folder of each run of an earlier comparison that holds anything, and what."""
    found = {}
    places = [place for arm in ARMS for place in folder.glob(f"runs/seed*-{named(arm)}")]
    for place in sorted(places):
        earlier = earlier_run(place / "train")
        if (place / "run.json").is_file() or earlier.finished:
            found[place] = f"{place.name} (a finished run)"
        elif earlier.parts:
            found[place] = f"{place.name} ({earlier})"
    return found


def refusal(folder: Path, force: bool, discard: bool) -> QuietvitError | None:
    """Return why no comparison is begun where an earlier one is; None where one may be.

    ``force`` allows it; an unfinished one that has runs takes ``discard`` too.
    The error says what is there, how to go on with it, and what starting anew would delete.
    """
    runs = earlier_runs(folder)
    begun = (folder / COMPARISON).is_file()
    finished = begun and _finished(folder)
    precious = bool(runs) and not finished
    if not (begun or runs) or (force and (discard or not precious)):
        return None
    kind = "a finished" if finished else "an unfinished"
    resume = f"pass resume (--resume){' in place of force' * force}"
    keep = f"To go on with it, {resume}" if not finished else f"To add seeds to it, {resume}"
    wanted = "force and discard (--force --discard)" if precious else "force (--force)"
    return QuietvitError(
        f"the output folder {folder} holds {kind} comparison. {f'{keep}. ' if begun else ''}To "
        "start another one and keep it, choose another output folder. To start anew in this one, "
        f"pass {wanted}: that deletes {'; '.join(runs.values()) or 'no run'}."
    )


def _finished(folder: Path) -> bool:
    try:
        text = (folder / "results.json").read_text(encoding="utf-8")
        return not Results.model_validate_json(text).unfinished
    except (OSError, ValueError):
        return False
