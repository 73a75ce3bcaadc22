"""`scripts/fuzz`: runs targets side by side, says how far they are, and ends with a table."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fuzz import targets

_STATUS = re.compile(r"^#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)
_EXECUTED = re.compile(r"^stat::number_of_executed_units:\s+(\d+)", re.MULTILINE)
_WHAT = re.compile(r"^ === Uncaught Python exception: ===\n(.*)|^==\d+== ?ERROR: (.*)|^ERROR: (.*)", re.MULTILINE)
_SLACK = 120  # seconds a target may take to end by itself
_DESCRIPTION = """Feed hostile input to everything that reads bytes from outside, and stop at the first thing that must not happen:
an exception the reader does not document, a hang, memory beyond its bound, a file outside of the temporary directory,
a descriptor or a thread that is left. docs/fuzzing.md has the targets and what was found."""
_EPILOG = f"""targets: {", ".join(targets.NAMES)}

examples:
  scripts/fuzz --seconds 60                      one minute of each, as many at a time as there are processors
  nice -n 19 scripts/fuzz --jobs 8               the hour of each, all at once, behind everything else
  scripts/fuzz --seconds 600 index command       ten minutes of two of them
  scripts/fuzz --replay FILE index               what that input does, without the fuzzer

What is learned (the corpus) is kept in DIRECTORY/corpus and used by the next run; logs are DIRECTORY/TARGET.log. An input that
finds something lies in DIRECTORY/findings/TARGET; once its cause is mended it belongs into fuzz/regressions/TARGET, where the
tests run it. Exit status: 0 nothing found, 1 something was found, 2 wrong arguments or a target that does not start."""


@dataclass
class Result:
    """One target's line of the table."""

    target: str
    seconds: float = 0.0
    executions: int = 0
    per_second: float = 0.0
    edges: int = 0  # of the daemon's code, in bytecode
    features: int = 0
    corpus: int = 0
    findings: int = 0
    input: str = ""
    what: str = ""


@dataclass
class _Run:
    """One target at work in a process of its own."""

    name: str
    directory: Path
    seconds: int
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    def __post_init__(self) -> None:
        self.corpus, self.found = self.directory / "corpus" / self.name, self.directory / "findings" / self.name
        self.log = self.directory / f"{self.name}.log"
        for place in (self.corpus, self.found):
            place.mkdir(parents=True, exist_ok=True)
        self._known = set(self.found.iterdir())
        self._temporary = tempfile.TemporaryDirectory(prefix=f"hibernode-fuzz-{self.name}-", dir=_fast_place())
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        arguments = [
            str(self.corpus),
            f"-max_total_time={self.seconds}",
            "-timeout=300",  # of the clock, and perhaps behind everybody else: guard.py counts processor time, and is much stricter
            "-report_slow_units=300",
            "-rss_limit_mb=2048",
            "-use_value_profile=1",
            "-print_final_stats=1",
            f"-artifact_prefix={self.found}/",
        ]
        with open(self.log, "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fuzz.engine", self.name, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": self._temporary.name},
            )

    def over(self) -> bool:
        if self._process.poll() is None and time.monotonic() - self.began > self.seconds + _SLACK:
            self._process.kill()
            self._process.wait()
        if self._process.poll() is None:
            return False
        self.ended = self.ended or time.monotonic()
        return True

    def stop(self) -> None:
        """Ask it to end; it still says how far it was."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.over()

    def close(self) -> None:
        self._temporary.cleanup()

    def result(self) -> Result:
        said = self.log.read_text(errors="replace")
        found = Result(self.name, round((self.ended or time.monotonic()) - self.began, 1))
        if status := _STATUS.findall(said):
            found.executions, found.edges, found.features, found.corpus = map(int, status[-1])
        if executed := _EXECUTED.search(said):
            found.executions = int(executed[1])
        found.per_second = round(found.executions / max(found.seconds, 0.1), 1)
        new = sorted(path for path in set(self.found.iterdir()) - self._known if not path.name.startswith("slow-unit-"))
        if new or (self.ended and self._process.returncode not in (0, -signal.SIGTERM, 72)):  # 72: libFuzzer was told to stop
            found.findings, found.input = max(1, len(new)), str(new[0]) if new else ""
            what = _WHAT.search(said)
            found.what = (
                next((part for part in what.groups() if part), "")[:200] if what else f"exit status {self._process.returncode}"
            )
        return found


def _fast_place() -> str | None:
    """tmpfs where there is one: the readers write files all the time."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _runs(names: list[str], jobs: int, directory: Path, seconds: int, say_every: float) -> Iterator[Result]:
    """Results as they come in. However this is left, no process stays."""
    waiting, working = list(names), list[_Run]()
    said = time.monotonic()
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                working.append(_Run(waiting.pop(0), directory, seconds))
            time.sleep(0.2)
            for run in [run for run in working if run.over()]:
                working.remove(run)
                yield _finished(run)
            if time.monotonic() - said >= say_every:
                said = time.monotonic()
                for run in working:
                    print(_line(run.result()), flush=True)
    except KeyboardInterrupt:
        print("fuzz: stopping", file=sys.stderr)
    finally:
        for run in working:
            run.stop()
    for run in working:
        yield _finished(run)


def _finished(run: _Run) -> Result:
    result = run.result()
    run.close()
    print(_line(result, over=True), flush=True)
    return result


def _line(result: Result, *, over: bool = False) -> str:
    state = f"FOUND {result.what} in {result.input}" if result.findings else "nothing found" if over else ""
    return (
        f"fuzz: {result.target:<12} {result.seconds:7.0f} s {result.executions:>11,} executions {result.per_second:>9,.0f}/s "
        f"{result.edges:>5} edges {result.features:>6} features {state}"
    ).rstrip()


def _table(results: list[Result]) -> str:
    rows = [
        f"| {r.target} | {r.seconds:.0f} | {r.executions:,} | {r.per_second:,.0f} | {r.edges} | {r.features} | {r.corpus} | {r.findings} |"
        for r in results
    ]
    return "\n".join(
        ["| target | seconds | executions | per second | edges | features | corpus | findings |", "|---" * 8 + "|", *rows]
    )


def _replay(name: str, path: Path) -> int:
    """Run one input; what it finds is raised as it is."""
    targets.load(name).one(path.read_bytes())
    print(f"fuzz: {name} takes it: {path}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all of them if none is named")
    parser.add_argument("--seconds", type=int, default=3600, help="how long each target runs (default: an hour)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="how many run at a time (default: one per processor)"
    )
    parser.add_argument(
        "--every", type=float, default=60, metavar="SECONDS", help="how often each says how far it is (default: 60)"
    )
    parser.add_argument("--directory", type=Path, default=Path(".fuzz"), help="corpus, logs and findings (default: .fuzz)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--replay", type=Path, metavar="INPUT", help="run this one input on one target, and nothing else")
    asked = parser.parse_args()
    names = list(dict.fromkeys(asked.targets)) or list(targets.NAMES)
    if unknown := [name for name in names if name not in targets.NAMES]:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(targets.NAMES)}")
    if asked.replay:
        if len(asked.targets) != 1:
            parser.error("--replay takes one target")
        return _replay(names[0], asked.replay)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = datetime.now(UTC)
    results = list(_runs(names, max(1, asked.jobs), asked.directory.resolve(), asked.seconds, asked.every))
    results.sort(key=lambda result: targets.NAMES.index(result.target))
    print(_table(results))
    if asked.json:
        told = {"began": began.isoformat(timespec="seconds"), "seconds": asked.seconds, "jobs": asked.jobs}
        findings = sum(result.findings for result in results)
        asked.json.write_text(
            json.dumps({**told, "findings": findings, "targets": [asdict(r) for r in results]}, indent=1) + "\n"
        )
    return 1 if any(result.findings for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
