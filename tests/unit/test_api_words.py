"""`hibernode api ...` as people type it: what it prints, and what it refuses to start with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hibernode.__main__ import EXIT_CONFIG, main
from hibernode.api.db import Database
from hibernode.api.guard import PREFIX, hashed
from hibernode.api.server import document


def typed(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "hibernode.toml"
    path.write_text(f'state_dir = "{tmp_path}/state"\n')
    return path


def test_the_document_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(["api", "--print-openapi"], capsys)
    assert code == 0
    assert json.loads(out) == document()


def test_a_token_is_made_listed_and_removed(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["api", "token", "--config", str(config)]
    code, out, _ = typed([*words, "new", "ops", "--read-only"], capsys)
    secret = out.strip()
    assert code == 0
    assert secret.startswith(PREFIX)
    database = Database(f"sqlite:///{tmp_path}/state/api.sqlite")
    kept = database.token(hashed(secret))
    database.close()
    assert kept is not None
    assert (kept.name, kept.read_only) == ("ops", True)
    assert typed([*words, "list"], capsys)[1] == "ops\tread\n"
    assert typed([*words, "new", "ops"], capsys)[0] == EXIT_CONFIG
    assert typed([*words, "remove", "ops"], capsys)[0] == 0
    code, _, error = typed([*words, "remove", "ops"], capsys)
    assert code == EXIT_CONFIG
    assert "hint" in error


def test_migrating_says_which_version_it_is(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(["api", "--migrate", "--config", str(config)], capsys)
    assert (code, out.split()[:3]) == (0, ["the", "database", "is"])


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("", "bus.url"),
        ('[bus]\nurl = "nats://127.0.0.1:1"\n[api]\nlisten = "nowhere"\n', "api.listen"),
        ('[bus]\nurl = "nats://127.0.0.1:1"\n[api]\nlisten = "0.0.0.0:0"\nauth = "none"\n', "without tokens"),
        ('[bus]\nurl = "nats://127.0.0.1:1"\n[api]\ntokens = ["secret"]\n', "api.tokens"),
        ('[bus]\nurl = "nats://127.0.0.1:1"\n[api]\ndatabase = "mysql://u:secret@h/d"\n', "api.database"),
        ("[[api.heartbeats]]\ninterval = 1\n", "api.heartbeats"),
    ],
)
def test_what_it_cannot_run_with_is_refused_without_a_traceback(config: Path, lines: str, why: str) -> None:
    """A process of its own: a server arranges the logs of its whole process."""
    config.write_text(config.read_text() + lines)
    words = [sys.executable, "-m", "hibernode", "api", "--config", str(config)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    error = ended.stderr
    assert ended.returncode == EXIT_CONFIG
    assert (why in error) or (why == "bus.url" and "event stream" in error), error
    assert "Traceback" not in error
    assert "secret" not in error
