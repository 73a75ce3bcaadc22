"""What pods ask of us by their annotations. Pure: annotations in, values out.

Whoever may make a pod writes them: what cannot be understood is told with what is wrong, and does nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from hibernode.model import HeartbeatWish

HEARTBEAT, KEEP = "hibernode.io/heartbeat", "hibernode.io/heartbeat-keep"
PRESTOP, ON_STOP = "hibernode.io/prestop", "hibernode.io/on-stop"  # by which name a hook asks for the pod, and what becomes of it
CHECKPOINT, MIGRATE = "checkpoint", "migrate"
KEPT = 3  # checkpoints that stay where a pod does not say how many: all of them would fill the store
SHORTEST, LONGEST = 10.0, 366 * 86400.0  # seconds, as the control plane has it for its own policies
MOST_KEPT = 10_000

# As Go writes durations, and with days: 10m, 1h30m, 90s, 2d.
_DURATION = re.compile(r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?", re.ASCII)
_UNITS = (86400, 3600, 60, 1)
_COUNT = re.compile(r"[0-9]{1,9}", re.ASCII)


def heartbeat(namespace: str, name: str, uid: str, since: float, annotations: Mapping[str, str]) -> HeartbeatWish | None:
    """What this pod wants; None if it says nothing of heartbeats."""
    asked, keep = annotations.get(HEARTBEAT), annotations.get(KEEP)
    if asked is None and keep is None:
        return None
    wish = HeartbeatWish(namespace=namespace, name=name, uid=uid, since=since)
    if asked is None:
        return wish.model_copy(update={"problem": f"{KEEP} says nothing without {HEARTBEAT}"})
    if (interval := _seconds(asked)) is None or not SHORTEST <= interval <= LONGEST:
        return wish.model_copy(update={"problem": f"{HEARTBEAT} is {_shown(asked)}; wanted: 10s to 366d, such as 10m or 1h30m"})
    kept = KEPT if keep is None else int(keep) if _COUNT.fullmatch(keep) else 0
    if not 1 <= kept <= MOST_KEPT:
        return wish.model_copy(update={"problem": f"{KEEP} is {_shown(keep or '')}; wanted: a number from 1 to {MOST_KEPT}"})
    return wish.model_copy(update={"interval": interval, "keep_last": kept})


def _seconds(text: str) -> float | None:
    found = _DURATION.fullmatch(text)
    if found is None or not text:
        return None
    return float(sum(int(number) * unit for number, unit in zip(found.groups("0"), _UNITS, strict=True)))


def _shown(text: str) -> str:
    """In printable characters, and not too many of them: it goes into logs, and onto terminals."""
    return json.dumps(text[:30])


def on_stop(annotations: Mapping[str, str]) -> tuple[str, str]:
    """What a pod wants when it is stopped, and what is wrong with what it says; a checkpoint alone, if something is."""
    asked = annotations.get(ON_STOP, CHECKPOINT)
    if asked in (CHECKPOINT, MIGRATE):
        return asked, ""
    return CHECKPOINT, f"{ON_STOP} is {_shown(asked)}; wanted: {CHECKPOINT} or {MIGRATE}"
