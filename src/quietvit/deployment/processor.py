"""Detect whether the CPU has 8-bit dot products. Each runtime decides what to do about it."""

from __future__ import annotations

import platform
from pathlib import Path


def vnni() -> bool | None:
    """Return whether the processor has an instruction for 8-bit dot products.

    True with VNNI, AMX or Arm's dot products, False without, None if it is unknown.
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
    """Return a short description of the machine."""
    known = {True: "with 8-bit dot products (VNNI or like)", False: "without VNNI", None: ""}
    return f"{platform.machine()} {known[vnni()]}".strip()
