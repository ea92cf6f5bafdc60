"""Results of a comparison made up for tests of the report. No test lives here."""

from __future__ import annotations

from collections.abc import Sequence

from quietvit.report import Results, Run, SiteNoise, SiteOutlier

SETTINGS = ("W8A8 rtn-minmax", "W4A4 rtn-minmax")


def results_of(
    tops: Sequence[tuple[float, float]],
    settings: tuple[str, ...] = SETTINGS,
    images: int = 1000,
    **changes: object,
) -> Results:
    """One (without, with) top-1 a seed, the same at every setting."""
    roles = ("post_norm", "post_gelu")
    runs = [
        Run(
            seed=seed,
            decay=decay,
            float_top1=tops[seed][decay],
            quantized=dict.fromkeys(settings, tops[seed][decay]),
            images=images,
            steps=10,
            train_seconds=11.0,
            decay_seconds=1.0 * decay,
            coverage=1.0,
            outliers=tuple(
                SiteOutlier(site=f"{role}.{i}", role=role, ratio=4.0 + i + decay, maximum=9.0)
                for role in roles
                for i in range(3)
            ),
            noise=tuple(
                SiteNoise(site=f"{role}.{i}", role=role, db=20.0 - i)
                for role in roles
                for i in range(3)
            ),
        )
        for seed in range(len(tops))
        for decay in (False, True)
    ]
    alone = SiteOutlier(site="head.0", role="head", ratio=1000.0, maximum=9.0)
    runs = [run.model_copy(update={"outliers": (*run.outliers, alone)}) for run in runs]
    results = Results(
        model="tiny",
        data="embedded:digits",
        settings=settings,
        noise_setting=settings[-1],
        seeds=tuple(range(len(tops))),
        runs=tuple(runs),
        configuration={"recipe.learning_rate": "0.001"},
        versions={"torch": "2.11.0"},
        command="quietvit compare tiny.toml",
        machine="2 cores",
        date="2026-01-01",
    )
    return results.model_copy(update=changes)
