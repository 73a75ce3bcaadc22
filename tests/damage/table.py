"""Trials as numbers: for the machine (JSON) and for people (tables of what was damaged, how, and with which code it was refused)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tests.damage.harm import CUT, FLIP, MARKS, Harm
from tests.damage.stored import FULL, MIDDLE
from tests.damage.trial import Trial

_SHOWN = 20  # of those that were not refused as they must be


def summary(trials: Sequence[Trial], followed: Sequence[Trial] = (), **facts: Any) -> dict[str, Any]:
    """`refused`: before anybody runs, with a code that says damage, by restore and by verify, and nothing was left; `restored`: what was
    changed is of another checkpoint, and not needed. `followed`: of these only the next was made. `next`: to which it refers."""
    wrong = [trial for trial in (*trials, *followed) if trial.wrong]
    return {
        "cases": len(trials),
        "flips_and_truncations": sum(trial.harm.deed in (FLIP, CUT) for trial in trials),
        "refused": sum(bool(trial.code) and not trial.wrong for trial in trials),
        "restored": sum(not trial.code and not trial.wrong for trial in trials),
        "wrong": len(wrong),
        **facts,
        "by_checkpoint": _counted(trials, lambda harm: harm.stored),
        "by_object": _counted(trials, lambda harm: kind_of(harm.object)),
        "by_damage": _counted(trials, lambda harm: harm.deed),
        "next": dict(Counter(trial.following for trial in (*trials, *followed) if trial.following).most_common()),
        "by_code": dict(Counter(trial.code or "ready" for trial in trials).most_common()),
        "wrong_cases": [{"case": trial.harm.id, "found": trial.wrong} for trial in wrong[:_SHOWN]],
    }


def kind_of(name: str) -> str:
    """`pages-<n>.zst`, `index.zst`: which kind of object it is; `of others` in front: of a checkpoint that is referred to."""
    folder, _, base = name.rpartition("/")
    kind = (
        "pages-<n>.zst" if base.startswith("pages-") else "mark" if base in MARKS or folder.endswith("/refs") else base or "all"
    )
    return f"of others: {kind}" if name.partition("/")[0] in (FULL, MIDDLE) else kind


def _counted(trials: Iterable[Trial], key: Callable[[Harm], str]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for trial in trials:
        count = found.setdefault(key(trial.harm), Counter(cases=0, wrong=0))
        count["cases"] += 1
        count["wrong"] += bool(trial.wrong)
        count[trial.code or "ready"] += 1
    return {name: dict(found[name]) for name in sorted(found)}


def good(result: Mapping[str, Any]) -> bool:
    return result["wrong"] == 0 and result["refused"] + result["restored"] == result["cases"] > 0


def render(result: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"| {'':26} | cases | wrong | refused with |", f"|{'-' * 28}|-------|-------|--------------|"]
    for part in ("by_checkpoint", "by_object", "by_damage"):
        for name, count in result[part].items():
            codes = ", ".join(f"{code} {n}" for code, n in count.items() if code not in ("cases", "wrong"))
            lines.append(f"| {name:26} | {count['cases']:5} | {count['wrong']:5} | {codes} |")
    lines.append("")
    for name, value in result.items():
        if name not in ("by_checkpoint", "by_object", "by_damage") and name != "wrong_cases":
            lines.append(f"{name:22} {value}")
    for wrong in result["wrong_cases"]:
        lines.append(f"wrong: {'; '.join(wrong['found'])[:500]}")
        lines.append(f"    again: scripts/damage --case '{wrong['case']}'")
    return "\n".join(lines)
