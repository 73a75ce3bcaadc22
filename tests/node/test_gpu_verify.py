"""`scripts/gpu-bundle` and what is in it: all steps that can run on the fake driver do, with nothing of this checkout and no network.

It says that the steps, and the bundle, work. It says nothing about a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import bundle
from tests.gpu.__main__ import STEPS

pytestmark = pytest.mark.node

# CRIU's own check connects to itself, so the loopback device is up; there is no other.
ALONE = 'ip link set lo up || exit 9; exec "$@"'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundle") / "gpu"
    assert bundle.main([str(place)]) == 0
    return place


def run(made: Path, home: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Started as on a machine that knows nothing of us."""
    (home / "tmp").mkdir(exist_ok=True)
    clean = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(home), "TMPDIR": str(home / "tmp"), **env}
    argv = [shutil.which("unshare") or "unshare", "-n", "/bin/sh", "-c", ALONE, "sh", str(made / "run"), *words]
    return subprocess.run(argv, env=clean, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def told(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_it_is_small_and_says_which_python_it_is_for(made: Path) -> None:
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    assert size < 60 << 20
    assert json.loads((made / "bundle.json").read_text())["pythons"] == [f"3.{sys.version_info[1]}"]


@pytest.mark.timeout(300)
def test_all_steps_on_the_fake_driver(made: Path, tmp_path: Path) -> None:
    done = run(made, tmp_path, "--fake", "--quick", "--out", str(tmp_path / "out"), HIBERNODE_PYTHON=sys.executable)
    lines = told(done)
    assert {line["id"]: line["ok"] for line in lines} == dict.fromkeys(STEPS, True), done.stdout + done.stderr
    assert [line["id"] for line in lines] == list(STEPS)
    assert not [line["detail"]["left_behind"] for line in lines if "left_behind" in line["detail"]]
    assert "a green fake run is never GPU support" in done.stdout
    assert done.returncode == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["fake"], summary["ok"], summary["wrong"], summary["not_run"]) == (True, len(STEPS), [], [])
    assert [json.loads(line) for line in (tmp_path / "out" / "steps.jsonl").read_text().splitlines()] == lines
    assert not [path for path in Path("/dev/shm").glob("hn-*") if (path / "gpu").exists()]


def test_a_step_that_takes_too_long_is_given_up_and_the_next_one_runs(made: Path, tmp_path: Path) -> None:
    done = run(made, tmp_path, "--fake", "--quick", "--only", "T4,T8", "--limit", "4", HIBERNODE_PYTHON=sys.executable)
    busy, maps = told(done)
    assert busy["ok"] is False
    assert busy["detail"]["say"].startswith("not over after 4 s, and given up")
    assert any("calls.py" in line for line in busy["detail"]["given_up_at"])
    assert maps["id"] == "T8"
    assert done.returncode == 1


def test_a_machine_without_a_gpu_is_told(made: Path, tmp_path: Path) -> None:
    done = run(made, tmp_path, "--only", "T1", HIBERNODE_PYTHON=sys.executable)
    (line,) = told(done)
    assert line["ok"] is None
    assert line["detail"]["say"].startswith("not run: no GPU to be seen: ")


def test_without_a_python_that_fits_it_says_which_one_it_needs(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "made-for-another"
    shutil.copytree(made, other)
    (other / "bundle.json").write_text('{"pythons": [\n"3.99"\n]}')
    done = run(other, tmp_path)
    assert done.returncode == 2
    assert "this bundle is for Python 3.99, and there is none; seen: " in done.stderr
    assert "hint: scripts/gpu-bundle --python VERSION" in done.stderr


def test_a_bundle_that_is_too_large_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_put_packages", lambda site, *_: site.mkdir(parents=True))
    with pytest.raises(bundle.Failed, match="MiB, more than 1"):
        bundle.build(tmp_path / "gpu", [], limit=1 << 20)
    assert os.listdir(tmp_path) == []


def test_what_is_there_already_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundle.main([str(tmp_path)]) == 1
    assert "is there already" in capsys.readouterr().err
