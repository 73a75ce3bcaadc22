"""The rows of a run as numbers: for the machine (JSON) and for people (a table of faults and what became of their cases)."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.matrix.checks import COUNTERS, MORE

MISSED = 0.05  # of the cases: faults that came too late for what they were meant for, as those at random moments may
Rows = Sequence[Mapping[str, Any]]


def summary(rows: Rows, afterwards: Sequence[Mapping[str, str]], **facts: Any) -> dict[str, Any]:
    """`rows` as `Row.as_json` gives them, `afterwards` the findings that belong to no case."""
    found = Counter(finding["counter"] for row in rows for finding in row["findings"])
    found.update(finding["counter"] for finding in afterwards)
    return {
        "cases": len(rows),
        **{name: found[name] for name in (*COUNTERS, *MORE)},
        "outcome_unknown": sum(row["code"] == "outcome_unknown" for row in rows),
        "killed_by_criu": sum(row["killed_by_criu"] for row in rows),
        "not_fired": sum(not row["fired"] for row in rows),
        "restored": sum(row["restored"] for row in rows),
        "increments": sum(row["increment"] for row in rows),
        "daemon_restarts": sum(row["restarts"] for row in rows),
        **facts,
        "machine": machine(),
        "afterwards": list(afterwards),
        "codes": dict(Counter(f"{_kind(row)} {row['code'] or row['status']}" for row in rows)),
        "rows": list(rows),
    }


def good(result: Mapping[str, Any]) -> bool:
    """Whether everything that must be 0 is, and what was to go wrong mostly did: a matrix of faults that miss proves nothing."""
    missed = result["not_fired"] > result["cases"] * MISSED
    return not missed and not any(result[name] for name in (*COUNTERS, *MORE)) and not result.get("reader", {}).get("bad", 0)


def machine() -> dict[str, Any]:
    memory = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    cpus = len(os.sched_getaffinity(0))
    return {"cpus": cpus, "memory_mib": int(memory) >> 10, "kernel": platform.release(), "python": platform.python_version()}


def render(result: Mapping[str, Any]) -> str:
    """For people."""
    faults: dict[str, Counter[str]] = {}
    for row in result["rows"]:
        count = faults.setdefault(_kind(row), Counter())
        count["cases"] += 1
        count["bad"] += bool(row["findings"])
        count[row["code"] or row["status"] or "nothing"] += 1
    lines = [f"| {'fault':34} | cases | bad | outcomes |", f"|{'-' * 36}|-------|-----|----------|"]
    for name, count in sorted(faults.items()):
        outcomes = ", ".join(f"{code} {n}" for code, n in count.most_common() if code not in ("cases", "bad"))
        lines.append(f"| {name:34} | {count['cases']:5} | {count['bad']:3} | {outcomes} |")
    lines.append("")
    told = (
        "outcome_unknown",
        "killed_by_criu",
        "not_fired",
        "restored",
        "increments",
        "daemon_restarts",
        "seconds",
        "seed",
        "reader",
    )
    lines += [f"{name:20} {result[name]}" for name in ("cases", *COUNTERS, *MORE, *told) if name in result]
    for row in result["rows"]:
        for finding in row["findings"]:
            lines.append(f"{finding['counter']}: {row['case']}: {finding['text'][:300]}")
            lines.append(f"    again: scripts/crash-matrix --seed {result['seed']} --case '{row['case']}'")
    lines += [f"{finding['counter']}: afterwards: {finding['text'][:300]}" for finding in result["afterwards"]]
    return "\n".join(lines)


def write(result: Mapping[str, Any], path: Path) -> None:
    """Whole or not at all: it is written again and again while the run goes on."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.rename(path)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _kind(row: Mapping[str, Any]) -> str:
    """`keep die`, `restore raise:corrupt`: direction and fault, for counting."""
    direction, _, fault = row["case"].split("@")[0].split("/")
    return f"{direction} {fault}"
