"""The tables, the page and the figure that ``evidence.py`` makes from its rows.

``evidence`` knows the runs. Nothing is trained here.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evidence_data import SCALES
from evidence_plan import FINAL_SEEDS
from evidence_run import ALL, CHOOSING, PIPELINES, summed
from quietvit.files import write_atomic

Row = dict[str, str]
Family = Mapping[str, Row]
"""Seed -> row of a final."""
Finals = Mapping[tuple[str, str], Mapping[str, Family]]
BASELINE, PIPELINE_NAMES = "adamw", tuple(PIPELINES)
HIGHER = """The first line of a family has the learning rate that is best for AdamW in float. The
other lines have the same settings at higher rates."""
HELPS = "**helps**"
TITLES = {"pipelines": "mean of pipelines"}
SIZES = ("amplification", "residual_max")
LENGTHS = ("deit-short", "deit", "deit-long")
FLOAT_LOSS = 0.3
"""How much lower float may be where CD still *helps*, in points. Fixed before the runs."""


class Interval(NamedTuple):
    """Mean of paired differences, half of its 95 % t interval (nan for one seed), the seeds."""

    mean: float
    half: float
    seeds: int

    @property
    def above_zero(self) -> bool:
        return self.mean - self.half > 0

    def __str__(self) -> str:
        half = "?" if math.isnan(self.half) else f"{self.half:.1f}"
        return f"{self.mean:+.1f} ± {half}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and half of its 95 % interval of Student's t (Student 1908), df = n - 1."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return Interval(statistics.fmean(values), math.nan, n)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(statistics.fmean(values), half, n)


def finals(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, dict[str, Row]]]:
    """(workload, scale) -> family -> seed -> row of a final.

    A family whose ladder went on has finals of several settings: the one with the most seeds
    counts, of equals the latest.
    """
    settings: dict[tuple[str, str, str], dict[str, dict[str, Row]]] = defaultdict(dict)
    for row in rows:
        if row["stage"] == "final":
            family = settings[row["workload"], row["scale"], row["family"]]
            family.setdefault(row["setting"], {})[row["seed"]] = row
    found: dict[tuple[str, str], dict[str, dict[str, Row]]] = defaultdict(dict)
    for (workload, scale, name), family in settings.items():
        found[workload, scale][name] = max(reversed(family.values()), key=len)
    return found


def figure_of(row: Row, column: str) -> float | None:
    """The number in a column; for ``pipelines`` their mean. None if it was not run."""
    if column != "pipelines":
        return float(row[column]) if row[column] else None
    found = [float(row[name]) for name in PIPELINE_NAMES if row[name]]
    return statistics.fmean(found) if len(found) == len(PIPELINE_NAMES) else None


def gain(own: Mapping[str, Row], baseline: Mapping[str, Row], column: str) -> Interval | None:
    """The gain of a family over the baseline, paired by seed; None without a common seed."""
    pairs = [
        (figure_of(own[seed], column), figure_of(baseline[seed], column))
        for seed in sorted(own.keys() & baseline.keys())
    ]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    return interval(differences) if differences else None


def verdict(own: Mapping[str, Row], baseline: Mapping[str, Row]) -> str:
    """The verdict, by the criterion that was fixed before the runs."""
    gained, lost = gain(own, baseline, "pipelines"), gain(own, baseline, "float")
    if gained is None or lost is None or math.isnan(gained.half):
        return "too few runs"
    if not gained.above_zero:
        return "no"
    return HELPS if lost.mean >= -FLOAT_LOSS else f"no: float {lost.mean:+.1f}"


def setting_of(row: Row) -> str:
    """A setting in one line: its strength, and where it acts."""
    setting: dict[str, Any] = json.loads(row["setting"])
    parts = []
    for key, value in setting.items():
        if key == "cd":
            parts.append(f"strength {next(iter(value['strength'].values())):g}")
        elif isinstance(value, dict):
            parts += [f"{name} {number:g}" for name, number in value.items()]
        elif key != "decay_all":
            parts.append(f"{key} {value:g}")
    return ", ".join(parts)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    shown = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*shown, *("| " + " | ".join(line) + " |" for line in lines)])


def _mean(rows: Mapping[str, Row], column: str) -> str:
    found = [value for row in rows.values() if (value := figure_of(row, column)) is not None]
    if not found:
        return ""
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.1f}{spread}"


def gains_table(families: Mapping[str, Mapping[str, Row]]) -> str:
    """One column per family: gain over tuned AdamW over all pipelines, in float, in each."""
    baseline = families[BASELINE]
    columns = [
        name
        for name in ("pipelines", "float", *ALL)
        if any(figure_of(row, name) is not None for row in baseline.values())
    ]
    names = [BASELINE, *(name for name in families if name != BASELINE)]
    lines = [
        ["setting", *(setting_of(next(iter(families[name].values()))) for name in names)],
        ["seeds", *(str(len(families[name])) for name in names)],
        ["helps?", "", *(verdict(families[name], baseline) for name in names[1:])],
    ]
    for column in columns:
        cells = [str(gain(families[name], baseline, column) or "") for name in names[1:]]
        lines.append([TITLES.get(column, column), _mean(baseline, column), *cells])
    return table(["", *names], lines)


def causes_table(families: Mapping[str, Mapping[str, Row]]) -> str:
    """Measures of the activations and weights of the finals, mean over seeds."""
    roles = ("residual", "post_norm", "query", "key", "value", "post_gelu")
    noisy = ("post_norm", "query_key", "attention_value", "attention_output", "post_gelu")
    names = [BASELINE, *(name for name in families if name != BASELINE)]
    chosen = [families[name] for name in names]
    lines = [["largest residual", *(_mean(own, "residual_max") for own in chosen)]]
    for heads, column, unit in ((roles, "max_over_rms", "max/rms"), (noisy, "sqnr_db", "dB")):
        for role in heads:
            lines.append([f"{role} {unit}", *(_role(own, column, role) for own in chosen)])
    costly = ("post_softmax", "post_gelu", "post_norm", "query", "key", "value", "attention_output")
    costs = [[_role(own, "sensitivity", role) for own in chosen] for role in costly]
    for role, cells in zip(costly, costs, strict=True):
        if any(cells):
            lines.append([f"{role} alone, % changed", *cells])
    lines.append(["worst pair's amplification", *(_mean(own, "amplification") for own in chosen)])
    lines.append(["worst output channel, max/rms", *map(_worst_channel, chosen)])
    return table(["", *names], lines)


def beside_baseline(finished: Finals) -> Iterator[tuple[str, str, Family, Family]]:
    """Yield (workload, family, its finals, those of AdamW) of each family that has both."""
    for (workload, scale), families in finished.items():
        for name, own in families.items() if BASELINE in families else ():
            if name != BASELINE:
                yield f"{workload} ({scale})", name, own, families[BASELINE]


def effects_table(finished: Finals) -> str:
    """What CD is built for, and what it shall lead to: AdamW's figure, then CD's. Empty if none."""
    lines = []
    for where, name, own, baseline in beside_baseline(finished):
        if name.startswith("cd"):
            both = baseline, own
            cells = [
                *(" → ".join(_mean(each, what).split(" ")[0] for each in both) for what in SIZES),
                *(
                    " → ".join(_role(each, "max_over_rms", role) for each in both)
                    for role in ("residual", "post_norm", "post_gelu")
                ),
            ]
            lines.append([where, name, *cells])
    heads = ["workload", "family", "worst pair's amplification", "largest residual"]
    heads += ["residual max/rms", "post_norm max/rms", "post_gelu max/rms"]
    return table(heads, lines) if lines else "No finals of CD beside AdamW's yet."


def _worst_channel(rows: Mapping[str, Row]) -> str:
    """The pair and channel of the largest output outlier, of all seeds."""
    causes = [json.loads(row["root_cause"]) for row in rows.values() if row["root_cause"]]
    worst = max(causes, key=lambda cause: cause.get("over_rms", 0.0), default=None)
    if not worst:
        return ""
    shown = "{over_rms} in {pair}, channel {channel}".format(**worst)
    return shown.replace(".weight", "").replace("blocks.", "")


def _role(rows: Mapping[str, Row], column: str, role: str) -> str:
    found = [json.loads(row[column]).get(role) for row in rows.values() if row[column]]
    known = [value for value in found if value is not None]
    return f"{statistics.fmean(known):.1f}" if known else ""


def tries_table(rows: Sequence[Row]) -> str:
    """Every choice and try, with the figure that judged it."""
    lines = []
    for row in rows:
        if row["stage"] in ("final", "above"):
            continue
        figures = [
            f"{name.removeprefix('val_')} {row[name]}"
            for name in row
            if name.startswith("val_") and row[name]
        ]
        head = [f"{row['workload']} ({row['scale']})", row["stage"], row["family"]]
        lines.append([*head, setting_of(row), ", ".join(figures)])
    return table(["workload", "stage", "family", "setting", "held-out images"], lines)


def rates_table(rows: Sequence[Row]) -> str:
    """Finals, and the same settings at higher learning rates; empty if there are none."""
    higher: dict[tuple[str, str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["stage"] == "above":
            place = row["workload"], row["scale"], row["family"], row["setting"]
            higher[place][row["seed"]] = row
    lines = []
    for where, families in finals(rows).items():
        for name, own in families.items():
            above = [each for place, each in higher.items() if place[:3] == (*where, name)]
            for each in (own, *above) if above else ():
                head = ["{} ({})".format(*where), name, setting_of(next(iter(each.values())))]
                columns = ("float", "pipelines", "residual_max")
                lines.append([*head, str(len(each)), *(_mean(each, name) for name in columns)])
    heads = ("workload", "family", "setting", "seeds", "float", "mean of pipelines", "residual")
    return table(heads, lines) if lines else ""


def summary(rows: Sequence[Row]) -> str:
    """Tables of every workload as Markdown, and what is missing."""
    parts = []
    for (workload, scale), families in finals(rows).items():
        parts.append(f"### {workload} ({scale})")
        if BASELINE not in families:
            parts.append("No final of AdamW yet, so nothing can be held against it.")
            continue
        parts += [gains_table(families), causes_table(families)]
    if rates := rates_table(rows):
        parts += ["### At higher learning rates", HIGHER, rates]
    return "\n\n".join(parts) or "No finals yet."


def verdicts_table(finished: Finals) -> str:
    """One line per workload and family. Seeds after the third also stand alone. Empty if none."""
    lines, further = [], False
    for where, name, own, baseline in beside_baseline(finished):
        late = {seed: row for seed, row in own.items() if int(seed) not in FINAL_SEEDS}
        alone = gain(late, baseline, "pipelines")
        further = further or alone is not None
        gains = [str(gain(own, baseline, what) or "") for what in ("pipelines", "float")]
        head = [where, name, verdict(own, baseline), *gains]
        lines.append([*head, str(len(own)), str(alone or "")])
    heads = ["workload", "family", "helps?", "mean of pipelines", "float", "seeds", "seeds 4 to 6"]
    if not further:
        heads, lines = heads[:-1], [line[:-1] for line in lines]
    return table(heads, lines) if lines else ""


def losses(finished: Finals) -> str:
    """Say in sentences where CD does not help, and where anything else does."""
    lines = []
    for workload, name, own, baseline in beside_baseline(finished):
        found = gain(own, baseline, "pipelines")
        if found is None or math.isnan(found.half):
            continue
        where = f"`{name}` on `{workload.replace(' ', '` ', 1)}"
        if not name.startswith("cd"):
            if verdict(own, baseline) == HELPS:
                lines.append(f"- {where} is no CD, and it helps: {found} points.")
        elif found.mean + found.half < 0:
            lines.append(f"- {where} loses {-found.mean:.1f} ± {found.half:.1f} points.")
        elif not found.above_zero:
            lines.append(f"- {where} shows no clear gain: {found} points.")
    return "\n".join(lines) or "No workload shows it yet."


def strengths_table(rows: Sequence[Row]) -> str:
    """The tries of each length of a fine-tune, by strength and total. Empty without tries."""
    lines = []
    for length in sorted(LENGTHS, key=lambda name: SCALES["cpu"][name].steps):
        workload = SCALES["cpu"][length]
        rates = summed(workload) * workload.rates[0]
        for row in rows:
            which = row["workload"], row["scale"], row["family"], row["stage"]
            if which == (length, "cpu", "cd+norm", "try"):
                strength = json.loads(row["setting"])["cd"]["strength"]["mlp"]
                held = [row[f"val_{name}"] for name in ("float", *CHOOSING) if row[f"val_{name}"]]
                head = [str(workload.steps), f"{strength:g}", f"{strength * rates:.2f}"]
                lines.append([*head, *held])
    heads = ["steps", "strength", "total", "float", *CHOOSING[: len(lines[0]) - 4 if lines else 0]]
    return table(heads, lines) if lines else ""


def page(rows: Sequence[Row], figure: str | None) -> str:
    """docs/evidence.md."""
    finished = finals(rows)
    shown = verdicts_table(finished) or "No finals beside AdamW's yet."
    picture = (
        f"![Gain of CD over tuned AdamW, by workload and pipeline]({figure})" if figure else ""
    )
    machines = sorted({f"{row['machine']}, {row['device']}, {row['precision']}" for row in rows})
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"""# Does Colinearity Decay keep its promise?

<!-- Made by `python benchmarks/evidence.py report` from results/evidence.csv; edit the script. -->

**Question.** What does Colinearity Decay (CD) gain over AdamW? AdamW gets as many tries, and they
tune its weight decay. The study measures float and every quantization pipeline. A pipeline is a
choice of bits, method and ranges, such as W4A8-omse.

**Criterion.** It was fixed before the runs. CD *helps* on a workload if both hold:

- Its gain, as the mean over {len(PIPELINE_NAMES)} pipelines, has a 95 % interval above 0.
- Float is not lower by more than {FLOAT_LOSS} points.

{shown}

{picture}

All gains are in points of top-1. Each compares two runs with the same seed. The interval is
Student's t interval over seeds, and `±` gives half of it. `?` means that there is one seed.

Each family of settings had four tries with seed 0, judged on held-out images. If the last try was
the best, up to two more followed. The best try went on with seeds 1, 2 and 3 on test images. Some
families have the seeds 4, 5 and 6 too. The lab log names them, with the reason, before their runs.

## What CD changes

The amplification of a pair is the standard deviation of its worst output channel for white input.
CD penalizes it, so it falls. The hope is that large activations fall with it. AdamW's figure comes
first, then CD's:

{effects_table(finished)}

## Where CD does not help

{losses(finished)}

## What strength to take

The total is the strength times the sum of the learning rates of all steps. In a fine-tune, take the
strength that gives a total of 0.06. [The method](method.md#which-strength) shows how, and what to
take from scratch. These are the tries with `cd+norm` of a DeiT-Tiny, on held-out images:

{strengths_table(rows)}

## What the names mean

All workloads learn CIFAR-10 images. (cpu) is the size of the study that fits one slow core.

| name | meaning |
|---|---|
| `deit` | fine-tuning of DeiT-Tiny with its ImageNet weights |
| `vits14` | fine-tuning of a ViT-S/14 that has large outliers |
| `scratch` | a small ViT, trained from random weights |
| `adamw` | AdamW with its best weight decay. Cells hold top-1: mean ± standard deviation |
| `usual` | AdamW with a weight decay of 0.05, as recipes often have it |
| `cd` | CD on the pairs `mlp` and `value_output` |
| `cd+norm`, `cd+qk` | CD on the [pairs](method.md#pairs) `norm_linear` too, on `query_key` too |
| `cd+norm-top` | `cd+norm` with the [penalty](method.md) `top` instead of `energy` |
| `adamw-all` | AdamW whose weight decay also reaches norm gains and biases |
| `norm-gains` | AdamW, and a decay of the norm gains towards a smaller spread |
| `muon` | Muon for the matrices, AdamW for the rest; the number multiplies the learning rate |
| `tweo`, `s2d` | AdamW with the regularizer TWEO, or with S2D |
| W4A8 | 4-bit weights and 8-bit activations, other numbers alike |
| m8 | attention maps at 8 bits |
| minmax, omse | rounding to nearest, with the whole range or the range of least squared error |
| repq, gptq | the methods RepQ-ViT and GPTQ |
| residual | the residual stream, which adds up the outputs of the blocks |
| max/rms | the largest activation over the root mean square, mean over seeds |
| alone, % changed | images whose class changes if only this role is quantized, W4A4m8-omse |
| dB | signal to quantization noise of a product's output, in decibels |

W4A4-minmax, W4A4-omse and all W3A3 columns are not part of the mean of pipelines.

## Every family

{summary(rows)}

## Tries

{tries_table(rows)}

## How

`python benchmarks/evidence.py run` made {len(rows)} runs. Machines: {"; ".join(machines)}. Commits:
`{commits}`. [results/evidence.csv](../results/evidence.csv) has the figures, seeds and
settings of each run. The [lab log](lab-log.md) has the expectations and deviations.
"""


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw the gains of CD over AdamW by workload and pipeline; False if there are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        where: {
            name: own
            for name, own in families.items()
            if name.startswith("cd") or verdict(own, families[BASELINE]) == HELPS
        }
        for where, families in finals(rows).items()
        if BASELINE in families
    }
    panels = {where: shown for where, shown in panels.items() if shown}
    if not panels:
        return False
    columns = ("pipelines", "float", *PIPELINE_NAMES)
    names = dict.fromkeys(name for shown in panels.values() for name in shown)
    colors = {name: f"C{place}" for place, name in enumerate(names)}
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1.5 + 3.6 * len(panels), 6), sharey=True, squeeze=False
    )
    for ax, ((workload, scale), shown) in zip(axes[0], panels.items(), strict=True):
        baseline = finals(rows)[workload, scale][BASELINE]
        for offset, (name, own) in enumerate(shown.items()):
            for place, column in enumerate(columns):
                found = gain(own, baseline, column)
                if found is None:
                    continue
                half = 0.0 if math.isnan(found.half) else found.half
                ax.errorbar(
                    *(found.mean, place + 0.15 * (offset - (len(shown) - 1) / 2)),
                    xerr=half,
                    fmt="o",
                    ms=4,
                    capsize=2,
                    color=colors[name],
                )
        ax.axvline(0, color="grey", lw=0.8)
        ax.set_title(f"{workload} ({scale})")
        ax.set_xlabel("points of top-1 over tuned AdamW")
    axes[0][0].set_yticks(range(len(columns)), ["mean of pipelines", *columns[1:]])
    axes[0][0].invert_yaxis()
    handles = [pyplot.Line2D([], [], color=color, marker="o", ms=4) for color in colors.values()]
    figure.legend(handles, colors, loc="lower center", ncols=len(colors), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


def report(rows: Sequence[Row], target: Path) -> None:
    """Write the page, and its figure beside it if there are gains to draw."""
    figure = target.with_suffix(".png")
    drawn = draw(rows, figure)
    write_atomic(target, page(rows, figure.name if drawn else None))
