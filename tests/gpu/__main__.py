"""`scripts/gpu-verify`: its words, the steps one after the other, what it says of them.

Each step is a process of its own, with a time limit: one that hangs in a driver is ended, or left, and the next one begins. One line of
JSON each, as soon as it is over; then a table, and `summary.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from tests.gpu import calls, rig, whole
from tests.gpu.rig import Options, Rig, Unable, Wrong, given

FAKE = "on the fake driver: a green fake run is never GPU support"
NO_NEW = 510.0  # seconds after which no step begins
WHOLE = 580.0  # seconds after which none goes on
GRACE = 15.0  # seconds a step has to clean up
_PROBE = "import torch; assert torch.cuda.is_available(); torch.zeros(1, device='cuda')"


@dataclass(frozen=True)
class Step:
    work: Callable[[Rig], None]
    limit: float  # seconds
    until: float = 0.0  # of the whole run: it leaves time to those after it

    @property
    def what(self) -> str:
        return (self.work.__doc__ or "").split("\n")[0].strip()


STEPS = {
    "T0": Step(calls.t0, 60),
    "T1": Step(calls.t1, 40),
    "T2": Step(calls.t2, 50),
    "T3": Step(calls.t3, 100),
    "T4": Step(calls.t4, 45),
    "T5": Step(whole.t5, 110),
    "T6": Step(whole.t6, 50),
    "T7": Step(whole.t7, 90),
    "T8": Step(calls.t8, 45),
    "T11": Step(whole.t11, 200, until=450),
    "T9": Step(whole.t9, 70),
    "T10": Step(calls.t10, 45),
    "T13": Step(calls.t13, 80),
    "T12": Step(calls.t12, 45),
}


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    if arguments.step:
        return _one(arguments.step, Options(**json.loads(arguments.options)), arguments.limit)
    if os.geteuid():
        sys.stderr.write("gpu-verify: it needs root, as the daemon does\n")
        return 2
    names = [name for name in STEPS if not arguments.only or name in arguments.only.upper().split(",")]
    out = Path(arguments.out or tempfile.mkdtemp(prefix="gpu-verify-")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="hn-gpu-"))
    began = time.monotonic()
    try:
        return _run(names, arguments, out, work, began)
    finally:
        rig.mop(work)
        shutil.rmtree(work, ignore_errors=True)


def _run(names: Sequence[str], arguments: argparse.Namespace, out: Path, work: Path, began: float) -> int:
    python = arguments.python or ("" if arguments.fake else _with_torch())
    options = Options(
        str(out), str(work), arguments.criu or shutil.which("criu") or "criu", python, fake=arguments.fake, quick=arguments.quick
    )
    where = FAKE if arguments.fake else f"on this machine's GPU; PyTorch: {python or 'none, ctypes does'}"
    sys.stderr.write(f"gpu-verify: {where}; results in {out}\n")
    told = []
    with open(out / "steps.jsonl", "w", buffering=1) as lines:
        for name in names:
            told.append(line := _step(name, options, arguments.limit, began))
            for stream in (lines, sys.stdout):
                stream.write(json.dumps(line, default=str) + "\n")
                stream.flush()
    summary = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "fake": arguments.fake,
        "where": where,
        "quick": arguments.quick,
        "seconds": round(time.monotonic() - began, 1),
        "ok": sum(line["ok"] is True for line in told),
        "wrong": [line["id"] for line in told if line["ok"] is False],
        "not_run": [line["id"] for line in told if line["ok"] is None],
        "steps": told,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1, default=str) + "\n")
    sys.stdout.write(_table(summary))
    return 1 if summary["wrong"] else 0


def _step(name: str, options: Options, most: float, began: float) -> dict[str, Any]:
    """In a process of its own. The process, and what it has started, is gone when this returns; or it is said to be there still."""
    passed = time.monotonic() - began
    if passed > NO_NEW:
        return {"id": name, "ok": None, "ms": 0, "detail": {"say": f"not begun: {passed:.0f} s have passed"}}
    step, place = STEPS[name], Path(options.work) / name
    limit = min(step.limit, most, WHOLE - GRACE - passed)
    if step.until:
        limit = min(limit, max(45.0, step.until - passed))
    argv = [sys.executable, "-m", "tests.gpu", "--step", name, "--limit", str(limit), "--options", json.dumps(asdict(options))]
    with open(Path(options.out) / f"{name}.log", "wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    at, late = time.monotonic(), False
    for number, patience in ((signal.SIGTERM, limit), (signal.SIGKILL, GRACE), (None, 5.0)):
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            late = True
            if number is not None:
                process.send_signal(number)
    ms = round((time.monotonic() - at) * 1e3)
    left = rig.mop(place)
    line = _told(place, name, ms)
    line = json.loads(json.dumps(line).replace(f"{options.work}/", ""))  # gone when anybody reads it
    if late:
        seen = line["detail"].get("say", "")
        line["ok"], line["detail"]["say"] = False, f"not over after {limit:.0f} s, and given up" + (f": {seen}" if seen else "")
    elif line["ok"] is None and "say" not in line["detail"]:
        line["ok"], line["detail"]["say"] = False, f"it ended without a result: see {name}.log"
    if left:
        line["detail"]["left_behind"] = left
    _keep_logs(place, Path(options.out))
    return line


def _told(place: Path, name: str, ms: int) -> dict[str, Any]:
    """What the step has left: its result, or how far it came."""
    found: dict[str, Any] = {"ok": None, "detail": {}}
    with contextlib.suppress(OSError, ValueError):
        found["detail"] = json.loads((place / "detail.json").read_text())
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((place / "result.json").read_text())
    return {"id": name, "ok": found["ok"], "ms": ms, "detail": found["detail"]}


def _keep_logs(place: Path, out: Path) -> None:
    """Of the daemons, and what targets said."""
    for path in [*place.glob("daemon-*/log"), *place.glob("daemon-*/state/gpu/log"), *place.glob("*.err")]:
        with contextlib.suppress(OSError):
            if path.stat().st_size:
                shutil.copyfile(path, out / "-".join(path.relative_to(place.parent).parts))


def _one(name: str, options: Options, limit: float) -> int:
    """The step's own process."""
    place, began = Path(options.work) / name, time.monotonic()
    ok: bool | None = False
    with Rig(options, place, began + limit) as here:

        def give_up(number: int, frame: FrameType | None) -> None:
            stack = [each for each in traceback.extract_stack(frame) if "tests" in Path(each.filename).parts]
            here.note(given_up_at=[f"{Path(each.filename).name}:{each.lineno} {each.line}" for each in stack[-4:]])
            sys.exit("given up")

        signal.signal(signal.SIGTERM, give_up)
        try:
            STEPS[name].work(here)
            ok = True
        except Unable as e:
            ok = None
            here.note(say=f"not run: {e}")
        except Wrong as e:
            here.note(say=f"WRONG: {e}")
        except Exception as e:
            traceback.print_exc()
            here.note(say=f"{type(e).__name__}: {e}"[:400], traceback=traceback.format_exc().splitlines()[-8:])
        draft = place / "result.new"
        draft.write_text(json.dumps({"ok": ok, "detail": here.detail}, default=str))
        draft.rename(place / "result.json")
    return 0


def _with_torch() -> str:
    """The first of this machine's Pythons that has PyTorch and sees a GPU; empty if none does."""
    folders = [*os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/local/bin", "/usr/bin", "/opt/conda/bin"]
    seen = set[Path]()
    for python in (Path(folder) / "python3" for folder in folders if folder):
        if python in seen or not python.exists():
            continue
        seen.add(python)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            argv = [str(python), "-c", _PROBE]
            if not subprocess.run(
                argv, env=given(), stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
            ).returncode:
                return str(python)
    return ""


def _table(summary: dict[str, Any]) -> str:
    words = {True: "ok", False: "WRONG", None: "not run"}
    rows = [f"{'step':4} {'':8} {'s':>6}  what, and what was seen"]
    for line in summary["steps"]:
        rows.append(f"{line['id']:4} {words[line['ok']]:8} {line['ms'] / 1e3:6.1f}  {STEPS[line['id']].what}")
        rows.append(f"{'':21} {str(line['detail'].get('say', ''))[:220]}")
    counts = f"{summary['ok']} ok, {len(summary['wrong'])} wrong, {len(summary['not_run'])} not run, {summary['seconds']} s"
    return "\n".join(["", *rows, "", f"{counts}; {summary['where']}", ""])


def _parser() -> argparse.ArgumentParser:
    steps = "; ".join(f"{name}: {step.what}" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        "gpu-verify", description="Check GPU checkpoints on this machine, in less than ten minutes. " + steps
    )
    parser.add_argument("--out", metavar="DIR", default="", help="where results go; else a new folder")
    parser.add_argument(
        "--fake", action="store_true", help=f"not this machine's GPU, but the tests' fake driver; {FAKE.split(': ')[1]}"
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes, shorter kernels")
    parser.add_argument(
        "--python", metavar="PATH", default="", help="one with PyTorch; else the first python3 that has it and a GPU"
    )
    parser.add_argument("--criu", metavar="PATH", default="", help="else the one on PATH")
    parser.add_argument("--only", metavar="T3,T5", default="", help="these steps")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", default=WHOLE, help="of each step at most; each has its own, too"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
