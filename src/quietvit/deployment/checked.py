"""``Check``: the result of a check, as JSON and as text. ``checking`` computes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quietvit.deployment.comparing import Classes, Features
from quietvit.deployment.detected import IOU, LEAST_SCORE, Detected
from quietvit.deployment.parity import Agreement
from quietvit.deployment.proof import Proof
from quietvit.deployment.speed import Speed
from quietvit.files import json_text, write_atomic

SHOWN = 12


@dataclass(frozen=True, repr=False)
class Check:
    """The result of ``check``.

    ``classes`` is set if the file gives class scores, else ``features`` is. ``detections`` is set
    for a detector. ``box_head`` and ``mask_head`` compare the further files of a Faster or Mask
    R-CNN. ``bytes`` is the size of all files. ``float_bytes`` is that of the float files, or None
    if nothing was timed.
    """

    path: Path
    machine: str
    proof: Proof
    agreements: tuple[Agreement, ...]
    classes: Classes | None
    features: Features | None
    speeds: tuple[Speed, ...]
    bytes: int
    float_bytes: int | None
    notes: tuple[str, ...]
    box_head: Features | None = None
    mask_head: Features | None = None
    detections: Detected | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each claim that the file does not keep."""
        failures = [
            f"{ran.product} ran in float as {ran.operator}: {ran.reason}"
            for ran in self.proof.broken
        ]
        failures += [
            f"{a.product}: {a.wrong} of {a.codes} codes and {a.off} of {a.sums} sums of products "
            "differ from the simulated model"
            for a in self.agreements
            if not a.equal
        ]
        heads = (self.box_head, self.mask_head)
        for compared in (self.classes, self.features, *heads, self.detections):
            failures += () if compared is None else compared.failures
        return tuple(failures)

    @property
    def ok(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "path": str(self.path),
            "machine": self.machine,
            "runtime": self.proof.runtime,
            "ok": self.ok,
            "failures": list(self.failures),
            "integer_share_of_macs": self.proof.integer_share,
            "products": [
                asdict(ran) | {"claimed": ran.product in self.proof.claimed}
                for ran in self.proof.ran
            ],
            "agreements": [asdict(agreement) for agreement in self.agreements],
            "classes": None
            if self.classes is None
            else asdict(self.classes)
            | {
                "agreement_percent": self.classes.agreement,
                "steadiness_percent": self.classes.steadiness,
                "top1": self.classes.top1,
                "top1_simulated": self.classes.top1_simulated,
            },
            "features": None if self.features is None else asdict(self.features),
            "box_head": None if self.box_head is None else asdict(self.box_head),
            "mask_head": None if self.mask_head is None else asdict(self.mask_head),
            "detections": None
            if self.detections is None
            else asdict(self.detections)
            | {
                "agreement_percent": self.detections.agreement,
                "steadiness_percent": self.detections.steadiness,
            },
            "speed": [asdict(speed) for speed in self.speeds],
            "bytes": self.bytes,
            "float_bytes": self.float_bytes,
            "notes": list(self.notes),
        }

    def to_json(self, path: str | Path) -> Path:
        """Write ``to_dict`` to ``path`` atomically. Returns the path."""
        return write_atomic(path, json_text(self.to_dict(), indent=1) + "\n")

    def __repr__(self) -> str:
        verdict = "ok" if self.ok else f"{len(self.failures)} failures"
        share = 100 * self.proof.integer_share
        return f"Check({str(self.path)!r}, {verdict}, {share:.2f} % in integers)"

    def __str__(self) -> str:
        return _text(self)


def _classes_lines(classes: Classes) -> list[str]:
    lines = [
        f"           same class as the simulated model on {classes.agreement:.2f} % of "
        f"{classes.images} images;",
        f"           that model keeps its own class on {classes.steadiness:.2f} % of images "
        "perturbed by 1e-6",
    ]
    if classes.top1 is not None:
        lines.append(
            f"           top-1 {classes.top1:.2f} %, simulated {classes.top1_simulated:.2f} %"
        )
    return lines


def _features_lines(features: Features) -> list[str]:
    queries = features.queries
    if queries is not None and not queries.comparable:
        return [
            f"           outputs are not compared: {100 * queries.tied:.0f} % of the queries are "
            "chosen between scores that tie,",
            "           so each runtime chooses others. Check a trained model",
        ]
    chosen = []
    if queries is not None:
        chosen.append(
            f"           {100 * queries.moved:.2f} % of the queries stand at another place; they "
            "are paired, and an image's error is their median"
        )
    return [
        *chosen,
        f"           output {100 * features.error:.3f} % from the simulated model's on "
        f"{features.images} images (relative L2; largest {100 * features.largest_error:.3f} %),",
        f"           cosine {features.cosine:.6f} (smallest {features.smallest_cosine:.6f});",
        f"           the simulated output moves by {100 * features.own:.3f} % if images are "
        "perturbed by 1e-6",
    ]


def _detections_lines(found: Detected) -> list[str]:
    lines = [
        f"boxes      {found.agreement:.2f} % of {found.boxes} boxes of the simulated model are "
        f"found on {found.images} images",
        f"           (score from {LEAST_SCORE}, same class, IoU from {IOU}); that model finds "
        f"{found.steadiness:.2f} % again",
        "           if images are perturbed by 1e-6",
    ]
    if found.ap is not None and found.ap_simulated is not None:
        lines += [f"           {found.ap}", f"           simulated {found.ap_simulated}"]
    return lines


def _text(check: Check) -> str:
    """Format the check: what ran in integers, what agrees, size, speed and verdict."""
    proof = check.proof
    integers = sum(ran.integer for ran in proof.ran)
    lines = [
        f"{check.path} in {proof.runtime} on {check.machine}",
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
    if check.agreements:
        codes = sum(a.codes for a in check.agreements)
        ties = sum(a.ties for a in check.agreements)
        wrong = sum(a.wrong for a in check.agreements)
        sums = sum(a.sums for a in check.agreements)
        off = sum(a.off for a in check.agreements)
        lines.append(
            f"the same   {len(check.agreements)} products on given inputs: of {codes} codes "
            f"{wrong} differ ({ties} ties), of {sums} sums {off}"
        )
    if check.classes is not None:
        lines += _classes_lines(check.classes)
    if check.features is not None:
        lines += _features_lines(check.features)
    for name, head in (("box", check.box_head), ("mask", check.mask_head)):
        if head is not None:
            error = f"{100 * head.error:.3f} %"
            lines.append(f"           {name} head: output {error} from the simulated model's")
    if check.detections is not None:
        lines += _detections_lines(check.detections)
    size = f"size       {check.bytes / 1e6:.2f} MB"
    if check.float_bytes is not None:
        size += f", float {check.float_bytes / 1e6:.2f} MB: "
        size += f"{check.float_bytes / check.bytes:.2f} times smaller"
    lines.append(size)
    for speed in check.speeds:
        lines.append(
            f"speed      batch {speed.batch}: {speed.integer_ms:.1f} ms, float "
            f"{speed.float_ms:.1f} ms: {speed.ratio:.2f} times as fast "
            f"({speed.ratio_low:.2f} to {speed.ratio_high:.2f}), "
            f"{speed.images_per_second:.0f} images/s"
        )
    lines += [f"note       {note}" for note in check.notes]
    lines.append("")
    failures = check.failures
    lines += [f"FAILED     {failure}" for failure in failures[:SHOWN]]
    if len(failures) > SHOWN:
        lines.append(f"FAILED     ... and {len(failures) - SHOWN} more")
    if not failures:
        lines.append("ok         the file keeps all its claims")
    return "\n".join(lines)
