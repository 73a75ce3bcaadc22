"""Encrypted checkpoints of real processes: only who has the key brings them back, and nobody else finds the token in the store."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from tests import keys
from tests.daemon import Daemon, failed, ready
from tests.node.workload import Program, checkpointed, goes_on, python

pytestmark = pytest.mark.node

SERVICE = """
import base64, json, os, sys
request = json.load(sys.stdin)
vault = sys.argv[1]
if request["operation"] == "wrap":
    name = os.urandom(8).hex()
    with open(os.path.join(vault, name), "w") as file:
        file.write(request["data_key"])
    print(json.dumps({"key": "vault", "wrapped": base64.b64encode(name.encode()).decode()}))
else:
    with open(os.path.join(vault, base64.b64decode(request["wrapped"]).decode())) as file:
        print(json.dumps({"data_key": file.read()}))
"""


def stored(daemon: Daemon) -> bytes:
    return b"".join(path.read_bytes() for path in Path(daemon.store.removeprefix("file://")).rglob("*") if path.is_file())


def test_it_is_restored_by_who_has_the_key_and_by_nobody_else(tmp_path: Path) -> None:
    """Encrypted and signed; the second daemon has a new key, and the old one to read with."""
    old, new = keys.wrapper(tmp_path, "old"), keys.wrapper(tmp_path, "new")
    pair = keys.pair(tmp_path)
    store, signing = f"file://{tmp_path}/store", {"key": pair[0], "trusted": [pair[1]]}
    with Program(tmp_path, python("memory.py", "large", "32")) as program:
        with Daemon(store=store, settings={"encryption": {"key": old}, "signing": signing}) as daemon:
            before = program.beat()
            done = checkpointed(daemon, program, streams=2, compression="none")
            assert daemon.manifest(done.checkpoint_id)["encryption"]["cipher"] == "AES-256-GCM"
            assert before.token.encode() not in stored(daemon)
        with Daemon(store=store) as stranger:
            refused = failed(stranger.restore(done.checkpoint_id), "key_unknown")
            assert "encryption.former" in refused.hint
        with Daemon(store=store, settings={"encryption": {"key": new, "former": [old]}, "signing": signing}) as daemon:
            ready(daemon.restore(done.checkpoint_id))
            goes_on(program, before)


def test_a_program_keeps_the_keys(tmp_path: Path) -> None:
    service, vault = tmp_path / "service.py", tmp_path / "vault"
    service.write_text(SERVICE)
    vault.mkdir()
    command = [sys.executable, "-I", str(service), str(vault)]
    with (
        Program(tmp_path, python("counter.py", "0.01")) as program,
        Daemon(settings={"encryption": {"command": command}}) as daemon,
    ):
        before = program.beat()
        done = checkpointed(daemon, program)
        assert len(list(vault.iterdir())) == 1
        ready(daemon.restore(done.checkpoint_id))
        goes_on(program, before)
        (secret,) = vault.iterdir()
        assert secret.read_text() not in daemon.log_path.read_text()
        vault.rename(tmp_path / "sealed")
        refused = failed(daemon.checkpoint(program.target), "key_service")
        assert "FileNotFoundError" in refused.message
        goes_on(program, before)


def test_no_key_is_in_any_file_of_the_daemon(tmp_path: Path) -> None:
    path = keys.wrapper(tmp_path, "key")
    secret = Path(path).read_text().strip()
    with Program(tmp_path, python("counter.py", "0.01")) as program, Daemon(settings={"encryption": {"key": path}}) as daemon:
        program.beat()
        ready(daemon.checkpoint(program.target))
        with daemon.halted():
            files = [found for found in daemon.home.rglob("*") if found.is_file()] + [daemon.log_path]
            assert len(files) > 5
            for file in files:
                data = file.read_bytes()
                assert secret.encode() not in data
                assert bytes.fromhex(secret) not in data
                assert not stat.S_IMODE(file.stat().st_mode) & 0o077 or file in (daemon.log_path, daemon.config), file
