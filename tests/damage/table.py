"""Trials as numbers: for the machine (JSON) and for people (tables of what was damaged, how, and with which code it was refused)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tests.damage.harm import CUT, FLIP, Harm
from tests.damage.trial import Trial

_SHOWN = 20  # of those that were not refused as they must be


def summary(trials: Sequence[Trial], **facts: Any) -> dict[str, Any]:
    """`refused`: before CRIU is called, with a code that says damage, by restore and by verify, and nothing was left."""
    wrong = [trial for trial in trials if trial.wrong]
    return {
        "cases": len(trials),
        "flips_and_truncations": sum(trial.harm.deed in (FLIP, CUT) for trial in trials),
        "refused": len(trials) - len(wrong),
        "wrong": len(wrong),
        **facts,
        "by_checkpoint": _counted(trials, lambda harm: harm.stored),
        "by_object": _counted(trials, lambda harm: kind_of(harm.object)),
        "by_damage": _counted(trials, lambda harm: harm.deed),
        "by_code": dict(Counter(trial.code or "ready" for trial in trials).most_common()),
        "wrong_cases": [{"case": trial.harm.id, "found": trial.wrong} for trial in wrong[:_SHOWN]],
    }


def kind_of(name: str) -> str:
    """`pages-<n>.zst`, `index.zst`: which kind of object it is."""
    base = name.rpartition("/")[2]
    return "pages-<n>.zst" if base.startswith("pages-") else base


def _counted(trials: Iterable[Trial], key: Callable[[Harm], str]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for trial in trials:
        count = found.setdefault(key(trial.harm), Counter(cases=0, wrong=0))
        count["cases"] += 1
        count["wrong"] += bool(trial.wrong)
        count[trial.code or "ready"] += 1
    return {name: dict(found[name]) for name in sorted(found)}


def good(result: Mapping[str, Any]) -> bool:
    return result["wrong"] == 0 and result["refused"] == result["cases"] > 0


def render(result: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"| {'':16} | cases | wrong | refused with |", f"|{'-' * 18}|-------|-------|--------------|"]
    for part in ("by_checkpoint", "by_object", "by_damage"):
        for name, count in result[part].items():
            codes = ", ".join(f"{code} {n}" for code, n in count.items() if code not in ("cases", "wrong"))
            lines.append(f"| {name:16} | {count['cases']:5} | {count['wrong']:5} | {codes} |")
    lines.append("")
    for name, value in result.items():
        if not name.startswith("by_") and name != "wrong_cases":
            lines.append(f"{name:22} {value}")
    for wrong in result["wrong_cases"]:
        lines.append(f"wrong: {'; '.join(wrong['found'])[:500]}")
        lines.append(f"    again: scripts/damage --case '{wrong['case']}'")
    return "\n".join(lines)
