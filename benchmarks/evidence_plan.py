"""Which runs the study of ``evidence.py`` has, in which order, and how it chooses.

Nothing is trained here. Workloads are in ``evidence_data``.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from evidence_data import SCALES, Workload
from evidence_run import ALL, CHOOSING, Setting, summed

FINAL_SEEDS = (1, 2, 3)
FURTHER = 2
"""A family whose best try is the last of its ladder gets so many further tries at most."""
FIGURES = (
    *("val_float", *(f"val_{name}" for name in CHOOSING)),
    *("float", "float_same", *ALL),
    *("residual_max", "max_over_rms", "sqnr_db", "sensitivity"),
    *("amplification", "worst_pair", "root_cause"),
    *("train_seconds", "last_loss"),
)
COLUMNS = (
    *("workload", "scale", "family", "setting", "seed", "stage"),
    *FIGURES,
    *("seconds", "device", "precision", "commit", "torch", "timm", "machine"),
)
DENSE = ("mlp", "value_output")
RATE, TRY, FINAL, ABOVE = "rate", "try", "final", "above"

Row = dict[str, str]
Block = tuple[tuple[str, ...], tuple[str, ...]]
# Workloads and families, in the order in which they are worked off: of each block all rates, all
# tries, all finals, and the same settings at higher rates. Lengths (short, long) answer which
# strength.
BLOCKS: tuple[Block, ...] = (
    (("deit",), ("adamw", "cd+norm")),
    (("deit",), ("cd", "cd+qk")),
    (("deit", "vits14"), ("usual",)),
    (("deit",), ("cd+norm-top",)),  # the best other penalty of results/ablate.csv
    (("scratch",), ("adamw", "cd")),
    (("deit",), ("adamw-all", "norm-gains", "muon", "tweo", "s2d")),
    (("deit-short", "deit-long"), ("cd+norm", "adamw")),
    (("scratch",), ("cd+norm", "cd+qk", "muon", "adamw-all", "norm-gains", "tweo", "s2d")),
    (("vits14",), ("adamw", "cd", "cd+norm", "cd+qk", "adamw-all", "muon")),
)
FIXED: dict[str, Setting] = {"usual": {"weight_decay": 0.05}}
"""Families of one setting, which has finals without tries. Only where there is one rate."""
FAMILIES = tuple(dict.fromkeys(family for _, families in BLOCKS for family in families))


def _cd(strengths: Sequence[float], *kinds: str, **fields: str) -> list[Setting]:
    return [{"cd": {"strength": dict.fromkeys((*DENSE, *kinds), s), **fields}} for s in strengths]


def tries_of(family: str, workload: Workload) -> list[Setting]:
    """The four tries of a family on a workload, without the learning rate.

    Fine-tuning: results/ablate.csv and results/finetune_cifar.csv were best at strength times
    summed learning rates of about 0.06. The tries lie around that. From scratch, decay and growth
    reach a balance, so the tries are strengths around those of earlier runs.
    """
    total = summed(workload) * workload.rates[0] if workload.finetunes else 1.0

    def ladder(*values: float) -> list[float]:
        return [float(f"{value / total:.2g}") for value in values]

    if workload.finetunes:
        whole, gentle = ladder(0.04, 0.08, 0.16, 0.32), ladder(0.02, 0.04, 0.08, 0.16)
        matrices = [0.05, *ladder(0.02, 0.06, 0.18)]
    else:
        whole, gentle = [0.1, 0.3, 1.0, 3.0], [0.03, 0.1, 0.3, 1.0]
        matrices = [0.05, 0.2, 0.5, 1.0]
    every: dict[str, list[Setting]] = {
        "adamw": [{"weight_decay": decay} for decay in matrices],
        "adamw-all": [{"weight_decay": decay, "decay_all": True} for decay in whole],
        "norm-gains": [{"gains": strength} for strength in whole],
        "tweo": [{"tweo": {"strength": strength}} for strength in (0.003, 0.01, 0.03, 0.1)],
        # DeiT-Tiny has one layer above S2D's own threshold: the other tries have one that acts.
        "s2d": [
            {"s2d": {"strength": 5e-4}},
            *({"s2d": {"strength": s, "threshold": 0.3}} for s in (5e-3, 5e-2, 0.2)),
        ],
        "muon": [{"muon": 0.3}, {"muon": 1.0}, {"muon": 3.0}, {"muon": 1.0, "weight_decay": 0.5}],
        "cd": _cd(whole),
        "cd+norm": _cd(gentle, "norm_linear"),
        "cd+norm-top": _cd(gentle, "norm_linear", penalty="top"),
        "cd+qk": _cd(whole, "query_key"),
    }
    return every[family]


def further(before: Any, last: Any) -> Any:
    """The next rung of a ladder: every number that changed grows by the same factor again.

    None where the two tries differ in more than numbers.
    """
    if isinstance(last, dict):
        if not isinstance(before, dict) or before.keys() != last.keys():
            return None
        return {key: further(before[key], value) for key, value in last.items()}
    if before == last or isinstance(last, (bool, str)):
        return last
    return float(f"{last * last / before:.2g}")


@dataclass(frozen=True)
class Job:
    """One run; ``setting`` is JSON."""

    workload: str
    scale: str
    family: str
    setting: str
    seed: str
    stage: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.workload, self.scale, self.setting, self.seed, self.stage


def key_of(row: Row) -> tuple[str, ...]:
    return row["workload"], row["scale"], row["setting"], row["seed"], row["stage"]


def shown(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


def score(row: Row) -> float:
    """Decides a choice, on held-out images. A run that diverged is below all others."""
    names = ["val_float"] if row["stage"] == RATE else [f"val_{name}" for name in CHOOSING]
    found = statistics.mean(float(row[name]) for name in names if row[name])
    return -math.inf if math.isnan(found) else found


def best(rows: Sequence[Row], jobs: Sequence[Job]) -> str | None:
    """The setting of the best of these jobs; None while one is missing or if all diverged."""
    by_key = {key_of(row): row for row in rows}
    found = {job.setting: score(by_key[job.key]) for job in jobs if job.key in by_key}
    if len(found) < len(jobs) or max(found.values()) == -math.inf:
        return None
    return max(found, key=found.__getitem__)


def rate_jobs(name: str, scale: str) -> list[Job]:
    """The jobs that choose a learning rate, for AdamW; none if there is only one rate."""
    rates = SCALES[scale][name].rates
    if len(rates) == 1:
        return []
    return [Job(name, scale, "adamw", shown({"lr": lr}), "0", RATE) for lr in rates]


def try_jobs(rows: Sequence[Row], name: str, scale: str, family: str) -> list[Job]:
    """The four tries of a family; none while the rate is not chosen.

    While the best try is the last of them, the ladder goes on (``FURTHER``), in every family alike.
    """
    if family in FIXED:
        return []
    rates, chosen = rate_jobs(name, scale), {}
    if rates:
        found = best(rows, rates)
        if found is None:
            return []
        chosen = json.loads(found)
    tries = tries_of(family, SCALES[scale][name])
    jobs = [Job(name, scale, family, shown({**chosen, **each}), "0", TRY) for each in tries]
    for _ in range(FURTHER):
        following = further(tries[-2], tries[-1])
        if following is None or best(rows, jobs) != jobs[-1].setting:
            break
        tries.append(following)
        jobs.append(Job(name, scale, family, shown({**chosen, **following}), "0", TRY))
    return jobs


def final_jobs(
    rows: Sequence[Row],
    name: str,
    scale: str,
    family: str,
    seeds: Sequence[int] = FINAL_SEEDS,
) -> list[Job]:
    """The best try with every seed; none while a try is missing."""
    tries = try_jobs(rows, name, scale, family)
    found = best(rows, tries) if tries else None  # None as well while a further try is missing
    if family in FIXED:
        found = shown(FIXED[family])
    if found is None:
        return []
    return [Job(name, scale, family, found, str(seed), FINAL) for seed in seeds]


def above_jobs(rows: Sequence[Row], name: str, scale: str, family: str) -> list[Job]:
    """The setting of the finals at every rate above the chosen one: is a high rate tolerated?"""
    jobs = []
    for final in final_jobs(rows, name, scale, family):
        setting = json.loads(final.setting)
        higher = [rate for rate in SCALES[scale][name].rates if rate > setting.get("lr", math.inf)]
        jobs += [
            replace(final, setting=shown({**setting, "lr": rate}), stage=ABOVE) for rate in higher
        ]
    return jobs


def next_jobs(
    rows: Sequence[Row],
    scale: str,
    workloads: Sequence[str],
    families: Sequence[str],
    seeds: Sequence[int] = FINAL_SEEDS,
) -> Iterator[Job]:
    """The jobs that can run now, in order. ``seeds`` are those of the finals."""
    done = {key_of(row) for row in rows}
    for names, members in BLOCKS:
        jobs: list[Job] = []
        chosen = [family for family in members if family in families]
        for name in (name for name in names if name in workloads and chosen):
            jobs += rate_jobs(name, scale)
            tries = [try_jobs(rows, name, scale, family) for family in chosen]
            jobs += [job for place in zip_longest(*tries) for job in place if job]
            finals = [final_jobs(rows, name, scale, family, seeds) for family in chosen]
            above = [above_jobs(rows, name, scale, family) for family in chosen]
            for stage in (finals, above):
                jobs += [job for seed in zip_longest(*stage) for job in seed if job]
        yield from (job for job in jobs if job.key not in done)
