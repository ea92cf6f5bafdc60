"""A check and an exported file as text for a terminal. Nothing is computed here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quietvit.deployment.checking import Check
    from quietvit.deployment.comparing import Classes, Features
    from quietvit.deployment.exporting import Artifact

SHOWN = 12


def artifact_text(made: Artifact) -> str:
    """What was exported, what it takes and gives, what it claims, and its notes."""
    facts = made.facts
    claimed = [product for product in facts.products if product.why_float is None]
    share = sum(product.macs for product in claimed) / (facts.total_macs or 1)
    shape = " x ".join(map(str, facts.input_shape))
    lines = [
        f"{made.path} ({made.size / 1e6:.2f} MB): {facts.method}",
        f"input      images, batch x {shape}, float32 after the preprocessing",
        f"output     {facts.output}",
        f"claims     {len(claimed)} of {len(facts.products)} products in integers, "
        f"{100 * share:.2f} % of the multiply-accumulates; what a runtime makes of it, check tells",
        f"carries    {'preprocessing' if facts.preprocessing else 'no preprocessing'}, "
        f"{'names of classes' if facts.labels else 'no names of classes'}",
    ]
    notes = [f"note       {note}" for note in facts.notes]
    shown = notes[:SHOWN]
    if len(notes) > SHOWN:
        shown.append(f"note       ... and {len(notes) - SHOWN} more")
    return "\n".join(lines + shown)


def _classes_lines(classes: Classes) -> list[str]:
    lines = [
        f"           class of the simulated model on {classes.agreement:.2f} % of {classes.images} "
        "images;",
        f"           it keeps {classes.steadiness:.2f} % of its own when they are moved by 1e-6",
    ]
    if classes.top1 is not None:
        lines.append(
            f"           top-1 {classes.top1:.2f} %, simulated {classes.top1_simulated:.2f} %"
        )
    return lines


def _features_lines(features: Features) -> list[str]:
    return [
        f"           output {100 * features.error:.3f} % from the simulated model's on "
        f"{features.images} images (relative L2; largest {100 * features.largest_error:.3f} %),",
        f"           cosine {features.cosine:.6f} (smallest {features.smallest_cosine:.6f});",
        f"           the simulated model moves by {100 * features.own:.3f} % when they are moved "
        "by 1e-6",
    ]


def check_text(found: Check) -> str:
    """The whole check: what ran, whether it is the same, size and speed, the verdict."""
    proof = found.proof
    integers = sum(ran.integer for ran in proof.ran)
    lines = [
        f"{found.path} in {proof.runtime} on {found.machine}",
        "",
        f"integers   {100 * proof.integer_share:.2f} % of the multiply-accumulates, "
        f"{integers} of {len(proof.ran)} products",
        "           " + ", ".join(f"{count} {name}" for name, count in proof.counts.items()),
    ]
    in_float = [ran for ran in proof.ran if not ran.integer]
    for ran in in_float[:SHOWN]:
        share = 100 * ran.macs / proof.total_macs if proof.total_macs else 0.0
        lines.append(f"           float: {ran.product} ({share:.2f} %), {ran.reason}")
    if len(in_float) > SHOWN:
        lines.append(f"           ... and {len(in_float) - SHOWN} more in float")
    if found.agreements:
        codes = sum(a.codes for a in found.agreements)
        ties = sum(a.ties for a in found.agreements)
        wrong = sum(a.wrong for a in found.agreements)
        sums = sum(a.sums for a in found.agreements)
        off = sum(a.off for a in found.agreements)
        lines.append(
            f"the same   {len(found.agreements)} products on given inputs: of {codes} codes "
            f"{wrong} differ ({ties} ties), of {sums} sums {off}"
        )
    if found.classes is not None:
        lines += _classes_lines(found.classes)
    if found.features is not None:
        lines += _features_lines(found.features)
    size = f"size       {found.bytes / 1e6:.2f} MB"
    if found.float_bytes is not None:
        size += f", float {found.float_bytes / 1e6:.2f} MB: "
        size += f"{found.float_bytes / found.bytes:.2f} times smaller"
    lines.append(size)
    for speed in found.speeds:
        lines.append(
            f"speed      batch {speed.batch}: {speed.integer_ms:.1f} ms, float "
            f"{speed.float_ms:.1f} ms: {speed.ratio:.2f} times as fast "
            f"({speed.ratio_low:.2f} to {speed.ratio_high:.2f}), "
            f"{speed.images_per_second:.0f} images/s"
        )
    lines += [f"note       {note}" for note in found.notes]
    lines.append("")
    failures = found.failures
    lines += [f"FAILED     {failure}" for failure in failures[:SHOWN]]
    if len(failures) > SHOWN:
        lines.append(f"FAILED     ... and {len(failures) - SHOWN} more")
    if not failures:
        lines.append("ok         what the file says of itself was kept")
    return "\n".join(lines)
