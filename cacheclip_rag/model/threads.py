"""How many threads PyTorch should compute with: as many as there are CPUs that this process may use.

More do not merely gain nothing. The threads of a computation wait for one another by spinning, so that one which has no
CPU holds up all others, and they it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger("cacheclip_rag")


@dataclass(frozen=True)
class Allowance:
    """What this process may use: so many of the machine's CPUs, and of their time so much (CPUs; None: no quota)."""

    cpus: int
    quota: float | None = None

    @property
    def threads(self) -> int:
        """How many threads can run all the time."""
        return max(1, self.cpus if self.quota is None else min(self.cpus, int(self.quota)))

    def __str__(self) -> str:
        quota = "no quota" if self.quota is None else f"a quota of {self.quota:g}"
        return f"{self.cpus} CPUs by affinity, {quota}"


def allowance(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Allowance:
    """By this process's affinity, and the quotas of its control groups (a container's ``--cpus``)."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on this system
        cpus = os.cpu_count() or 1
    return Allowance(cpus, _quota(groups, own))


def fit_threads() -> int:
    """Lower the number of PyTorch's threads to what this process may use; that number. A lower one stays as it is."""
    allowed = allowance()
    if torch.get_num_threads() > allowed.threads:
        torch.set_num_threads(allowed.threads)
        log.info("computing with %d threads (%s)", allowed.threads, allowed)
    return torch.get_num_threads()


def _quota(groups: Path, own: Path) -> float | None:
    """The lowest quota of this process's groups and those around them, by either version of control groups."""
    found: list[float] = []
    try:
        lines = own.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            roots, read = [groups, groups / "unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            roots, read = [groups / controllers, groups / "cpu"], _quota_v1
        else:
            continue
        for root in roots:
            folder = root / name.lstrip("/")
            # Inside of a container the name may be the host's, and the container's own group stands at the root.
            for each in (folder, *folder.parents):
                if each == root or root in each.parents:
                    found += [quota for quota in [read(each)] if quota is not None]
    return min(found, default=None)


def _quota_v2(folder: Path) -> float | None:
    numbers = _words(folder / "cpu.max")
    return _ratio(numbers[0], numbers[1]) if len(numbers) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    return _ratio(quota[0], period[0]) if quota and period else None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []


def _ratio(quota: str, period: str) -> float | None:
    """None for what is no quota: "max", or -1."""
    try:
        ratio = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return ratio if ratio > 0 else None
