"""Data keys, wrapped with a key in a file or by a program: they come back for their own checkpoint, and for nobody else."""

from __future__ import annotations

import base64
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hibernode.children import Children
from hibernode.config import Encryption
from hibernode.drivers.keyring import Keyring
from hibernode.errors import Corrupt, HibernodeError, Refused
from hibernode.model import WrappedKey
from tests.keeper import alive, wait_until

ID, OTHER = "0d1cbd6c-2b9f-4b5a-9b43-7a3c1f6fd2a0", "9d1cbd6c-2b9f-4b5a-9b43-7a3c1f6fd2a0"
DATA_KEY = bytes(range(32))


def key_file(directory: Path, name: str = "key", text: bytes | None = None) -> str:
    path = directory / name
    path.write_bytes(os.urandom(32).hex().encode() + b"\n" if text is None else text)
    path.chmod(0o600)
    return str(path)


def keyring(**encryption: object) -> Keyring:
    return Keyring(Encryption.model_validate(encryption), Children())


def wrapped(ring: Keyring) -> WrappedKey:
    found = ring.wrap(DATA_KEY, ID)
    assert found is not None
    return found


def refused(ask: Callable[[], object]) -> HibernodeError:
    with pytest.raises(HibernodeError) as raised:
        ask()
    return raised.value


# --- a key in a file --------------------------------------------------------------------------------------------------------


def test_it_comes_back(tmp_path: Path) -> None:
    ring = keyring(key=key_file(tmp_path))
    assert ring.unwrap(wrapped(ring), ID) == DATA_KEY
    assert wrapped(ring).wrapped != wrapped(ring).wrapped  # no nonce twice
    assert base64.b64encode(DATA_KEY).decode() not in wrapped(ring).wrapped


def test_nothing_is_encrypted_where_nobody_asked_for_it(tmp_path: Path) -> None:
    assert keyring().wrap(DATA_KEY, ID) is None
    assert keyring(former=(key_file(tmp_path),)).wrap(DATA_KEY, ID) is None


def test_another_checkpoint_cannot_have_it(tmp_path: Path) -> None:
    ring = keyring(key=key_file(tmp_path))
    assert isinstance(refused(lambda: ring.unwrap(wrapped(ring), OTHER)), Corrupt)


def test_every_changed_bit_is_found(tmp_path: Path) -> None:
    ring = keyring(key=key_file(tmp_path))
    good = wrapped(ring)
    raw = base64.b64decode(good.wrapped)
    for bit in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        lie = good.model_copy(update={"wrapped": base64.b64encode(changed).decode()})
        assert isinstance(refused(lambda lie=lie: ring.unwrap(lie, ID)), Corrupt)
    for length in range(len(raw)):
        lie = good.model_copy(update={"wrapped": base64.b64encode(raw[:length]).decode()})
        assert isinstance(refused(lambda lie=lie: ring.unwrap(lie, ID)), Corrupt)


def test_an_older_key_still_reads(tmp_path: Path) -> None:
    old, new = key_file(tmp_path, "old"), key_file(tmp_path, "new")
    made = wrapped(keyring(key=old))
    after = keyring(key=new, former=(old,))
    assert after.unwrap(made, ID) == DATA_KEY
    assert wrapped(after).key != made.key
    assert keyring(former=(old,)).unwrap(made, ID) == DATA_KEY


def test_a_key_that_is_not_here_is_named(tmp_path: Path) -> None:
    made = wrapped(keyring(key=key_file(tmp_path, "other")))
    for ring in (keyring(), keyring(key=key_file(tmp_path))):
        error = refused(lambda ring=ring: ring.unwrap(made, ID))
        assert error.code == "key_unknown"
        assert error.details["found"] == made.key
        assert error.details["property"] == "encryption.key"
        assert "encryption.former" in error.hint


@pytest.mark.parametrize("form", [bytes, lambda raw: raw.hex().encode(), lambda raw: base64.b64encode(raw) + b"\n"])
def test_a_key_is_raw_hex_or_base64(tmp_path: Path, form: Callable[[bytes], bytes]) -> None:
    raw = bytes(range(110, 142))
    plain, other = keyring(key=key_file(tmp_path, "raw", raw)), keyring(key=key_file(tmp_path, "other", form(raw)))
    assert other.unwrap(wrapped(plain), ID) == DATA_KEY


@pytest.mark.parametrize(
    "text", [b"", b"x", bytes(31), bytes(33), b"0" * 62, b"zz" * 32, b"-" * 64, os.urandom(16).hex().encode()]
)
def test_what_is_no_key_keeps_the_daemon_from_starting(tmp_path: Path, text: bytes) -> None:
    path = key_file(tmp_path, "key", text)
    for encryption in ({"key": path}, {"former": (path,)}):
        error = refused(lambda encryption=encryption: keyring(**encryption))
        assert (error.code, path in error.message) == ("config", True)
        assert str(error.details["property"]).startswith("encryption.")


def test_a_key_that_others_can_read_keeps_the_daemon_from_starting(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    for mode in (0o640, 0o604, 0o660):
        os.chmod(path, mode)
        assert refused(lambda: keyring(key=path)).code == "config"
    os.chmod(path, 0o400)
    wrapped(keyring(key=path))


def test_openssl_makes_a_key(tmp_path: Path) -> None:
    """As docs/operations.md tells people to."""
    path = tmp_path / "key"
    assert os.system(f"umask 077; openssl rand -hex 32 > {path}") == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    wrapped(keyring(key=str(path)))


# --- a program --------------------------------------------------------------------------------------------------------------

SERVICE = """
import base64, json, sys
request = json.load(sys.stdin)
def mixed(text):
    return base64.b64encode(bytes(each ^ 85 for each in base64.b64decode(text))).decode()
if request["operation"] == "wrap":
    answer = {"key": "vault/7", "wrapped": mixed(request["data_key"])}
elif request["key"] != "vault/7":
    sys.exit(3)
else:
    answer = {"data_key": mixed(request["wrapped"])}
"""


def service(tmp_path: Path, more: str = "print(json.dumps(answer))") -> tuple[str, ...]:
    path = tmp_path / "service.py"
    path.write_text(SERVICE + more)
    return sys.executable, "-I", str(path)


def test_a_program_wraps_and_unwraps(tmp_path: Path) -> None:
    ring = keyring(command=service(tmp_path))
    made = wrapped(ring)
    assert made.key == "vault/7"
    assert ring.unwrap(made, ID) == DATA_KEY


def test_a_program_beside_a_former_file(tmp_path: Path) -> None:
    old = key_file(tmp_path)
    ring = keyring(command=service(tmp_path), former=(old,))
    assert ring.unwrap(wrapped(keyring(key=old)), ID) == DATA_KEY
    assert wrapped(ring).key == "vault/7"


def test_a_program_that_has_not_the_key(tmp_path: Path) -> None:
    ring = keyring(command=service(tmp_path))
    lie = wrapped(ring).model_copy(update={"key": "vault/8"})
    assert refused(lambda: ring.unwrap(lie, ID)).code == "key_unknown"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("sys.exit('the vault is sealed')", "the vault is sealed"),
        ("sys.exit(1)", "exit status 1"),
        ("print('no json')", "no JSON object"),
        ("print([])", "no JSON object"),
        ("print('{}')", "no `"),
        ("print('[' * 60000)", "no JSON object"),
        ("print(json.dumps({'key': 1, 'wrapped': 2, 'data_key': 3}))", "no `"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit status -9"),
    ],
)
def test_a_program_that_fails_is_quoted(tmp_path: Path, more: str, why: str) -> None:
    good = wrapped(keyring(command=service(tmp_path)))
    ring = keyring(command=service(tmp_path, more))
    for ask in (lambda: ring.wrap(DATA_KEY, ID), lambda: ring.unwrap(good, ID)):
        error = refused(ask)
        assert error.code == "key_service"
        assert why in error.message
        assert error.hint


@pytest.mark.parametrize("said", ["", "AAAA", "x", base64.b64encode(bytes(33)).decode()])
def test_a_data_key_that_is_none_is_corrupt(tmp_path: Path, said: str) -> None:
    good = wrapped(keyring(command=service(tmp_path)))
    ring = keyring(command=service(tmp_path, f"print(json.dumps({{'data_key': {said!r}}}))"))
    assert isinstance(refused(lambda: ring.unwrap(good, ID)), Corrupt)


def test_a_program_that_is_not_there() -> None:
    for program in ("/nowhere/service", "true", "/etc/passwd"):
        error = refused(lambda program=program: keyring(command=(program,)))
        assert (error.code, error.details["property"]) == ("config", "encryption.command")


def test_a_program_that_never_stops_talking_costs_no_memory(tmp_path: Path) -> None:
    talks = "import os\nfor _ in range(1000): sys.stderr.write('x' * 1000)\nfor _ in range(1000): os.write(1, b'{}' * 1000)\n"
    error = refused(lambda: keyring(command=service(tmp_path, talks)).wrap(DATA_KEY, ID))
    assert error.code == "key_service"


def test_a_program_that_hangs_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = tmp_path / "hangs"
    program.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {pid}\nwait\n")
    program.chmod(0o700)
    ring = Keyring(Encryption(command=(str(program),)), Children(), patience=3.0)
    error = refused(lambda: ring.wrap(DATA_KEY, ID))
    assert (error.code, error.retry) == ("key_service", True)
    assert "no answer" in error.message
    wait_until(lambda: not alive(int(pid.read_text())), 10, "the end of what it has started")


def test_a_program_and_a_key_are_one_too_many(tmp_path: Path) -> None:
    error = refused(lambda: keyring(key=key_file(tmp_path), command=("x",)))
    assert isinstance(error, Refused)
    assert (error.code, error.details["property"]) == ("config", "encryption.command")


def test_no_word_of_a_key_is_said(tmp_path: Path) -> None:
    text = os.urandom(30).hex().encode()
    error = refused(lambda: keyring(key=key_file(tmp_path, "key", text)))
    assert text.decode()[:16] not in f"{error} {error.details} {error.__cause__} {error.__context__}"
    ring = keyring(command=service(tmp_path, "sys.exit(1)"))
    error = refused(lambda: ring.wrap(DATA_KEY, ID))
    assert base64.b64encode(DATA_KEY).decode() not in f"{error} {error.details}"
