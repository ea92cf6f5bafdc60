"""A check and a prediction as text for a terminal. Nothing is computed here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quietvit.deployment.checking import Check

SHOWN = 12


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
    classes = found.classes
    lines.append(
        f"           class of the simulated model on {classes.agreement:.2f} % of {classes.images} "
        "images;"
    )
    lines.append(
        f"           it keeps {classes.steadiness:.2f} % of its own when they are moved by 1e-6"
    )
    if classes.top1 is not None:
        lines.append(
            f"           top-1 {classes.top1:.2f} %, simulated {classes.top1_simulated:.2f} %"
        )
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
