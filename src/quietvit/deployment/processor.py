"""What the processor can do with 8-bit integers. What follows is each runtime's business."""

from __future__ import annotations

import platform
from pathlib import Path


def vnni() -> bool | None:
    """Whether the processor has an instruction for 8-bit dot products.

    True with VNNI, AMX or Arm's dot products; False on x86-64 without; None where it cannot be
    told.
    """
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return True
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    line = next((ln for ln in text.splitlines() if ln.startswith(("flags", "Features"))), None)
    if line is None:
        return None
    flags = set(line.partition(":")[2].split())
    return bool(flags & {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp"})


def described() -> str:
    """A few words about the machine."""
    known = {True: "with 8-bit dot products (VNNI or like)", False: "without VNNI", None: ""}
    return f"{platform.machine()} {known[vnni()]}".strip()
