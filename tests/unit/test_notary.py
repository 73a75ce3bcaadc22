"""Signatures: what one key has signed, only its holders' friends believe, and nothing else; bad key files keep a daemon from starting."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hibernode.config import Signing
from hibernode.drivers.notary import Notary
from hibernode.errors import Refused
from hibernode.model import Signature
from tests import keys

MESSAGE = b"hibernode manifest v1\0 and the rest"


def refused(notary: Notary, message: bytes, signature: Signature | None) -> Refused:
    with pytest.raises(Refused) as raised:
        notary.check(message, signature)
    assert raised.value.details["property"] == "signature"
    assert raised.value.details["found"]
    assert raised.value.details["wanted"]
    assert raised.value.hint
    return raised.value


def signed(notary: Notary, message: bytes = MESSAGE) -> Signature:
    signature = notary.sign(message)
    assert signature is not None
    return signature


# --- who believes whom ------------------------------------------------------------------------------------------------------


def test_without_keys_nothing_is_signed_and_everything_believed(tmp_path: Path) -> None:
    nobody, other = Notary(Signing()), Notary(Signing(key=keys.pair(tmp_path)[0]))
    assert nobody.sign(MESSAGE) is None
    for signature in (None, signed(other), Signature(key="0" * 64, ed25519="0" * 128)):
        nobody.check(MESSAGE, signature)


def test_a_node_that_signs_and_names_nobody_asks_for_nothing_yet(tmp_path: Path) -> None:
    """The first step, on every node, before the second: nobody is shut out meanwhile."""
    Notary(Signing(key=keys.pair(tmp_path)[0])).check(MESSAGE, None)


def test_the_trusted_and_oneself_are_believed_and_nobody_else(tmp_path: Path) -> None:
    mine, a, b, stranger = (keys.pair(tmp_path, name) for name in ("mine", "a", "b", "stranger"))
    node = Notary(Signing(key=mine[0], trusted=(a[1], b[1])))
    for key, _ in (mine, a, b):
        node.check(MESSAGE, signed(Notary(Signing(key=key))))
    other = signed(Notary(Signing(key=stranger[0])))
    assert refused(node, MESSAGE, None).code == "unsigned"
    found = refused(node, MESSAGE, other)
    assert (found.code, found.details["found"]) == ("signer", other.key)


def test_a_signature_is_of_its_message_and_of_its_key(tmp_path: Path) -> None:
    a, b = keys.pair(tmp_path, "a"), keys.pair(tmp_path, "b")
    node = Notary(Signing(key=a[0], trusted=(b[1],)))
    good, others = signed(node), signed(Notary(Signing(key=b[0])))
    node.check(MESSAGE, good)
    wrong = [
        (MESSAGE + b"\0", good),
        (MESSAGE[:-1], good),
        (b"", good),
        (MESSAGE, good.model_copy(update={"key": others.key})),
        (MESSAGE, good.model_copy(update={"ed25519": others.ed25519})),
        (MESSAGE, good.model_copy(update={"ed25519": "0" * 128})),
    ]
    for message, signature in wrong:
        assert refused(node, message, signature).code == "signature"


def test_no_bit_of_a_signature_can_be_changed(tmp_path: Path) -> None:
    node = Notary(Signing(key=keys.pair(tmp_path)[0], trusted=(keys.pair(tmp_path, "other")[1],)))
    good = signed(node)
    raw = bytes.fromhex(good.ed25519)
    for bit in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        assert refused(node, MESSAGE, Signature(key=good.key, ed25519=changed.hex())).code == "signature"
    order = (1 << 252) + 27742317777372353535851937790883648493
    again = int.from_bytes(raw[32:], "little") + order  # another scalar with the same meaning
    if again < 1 << 256:
        twin = raw[:32] + again.to_bytes(32, "little")
        assert refused(node, MESSAGE, Signature(key=good.key, ed25519=twin.hex())).code == "signature"


def test_openssl_makes_keys_for_it_and_says_their_names(tmp_path: Path) -> None:
    """As docs/operations.md tells people to."""
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    script = (
        f"umask 077; openssl genpkey -algorithm ed25519 -out {key} && openssl pkey -in {key} -pubout -out {public} && chmod 644 {public};"
        f"openssl pkey -pubin -in {public} -outform DER | tail -c 32 | sha256sum"
    )
    said = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout
    node = Notary(Signing(key=str(key), trusted=(str(public),)))
    node.check(MESSAGE, signed(node))
    assert said.split()[0] == signed(node).key


# --- files ------------------------------------------------------------------------------------------------------------------


def kept_from_starting(prop: str, **signing: object) -> str:
    with pytest.raises(Refused) as raised:
        Notary(Signing.model_validate(signing))
    assert raised.value.code == "config"
    assert raised.value.details["property"] == prop
    assert raised.value.details["wanted"]
    return raised.value.message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o610, 0o644, 0o777])
def test_a_private_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    key, _ = keys.pair(tmp_path)
    os.chmod(key, mode)
    assert f"{mode:04o}" in kept_from_starting("signing.key", key=key)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_a_private_key_of_its_owner_alone_is_taken(tmp_path: Path, mode: int) -> None:
    key, _ = keys.pair(tmp_path)
    os.chmod(key, mode)
    signed(Notary(Signing(key=key)))


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o622])
def test_a_trusted_key_that_others_can_replace_is_refused(tmp_path: Path, mode: int) -> None:
    key, public = keys.pair(tmp_path)
    os.chmod(public, mode)
    kept_from_starting("signing.trusted[0]", key=key, trusted=(public,))


def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    key, public = keys.pair(tmp_path)
    os.chown(key, 12345, 12345)
    kept_from_starting("signing.key", key=key)
    os.chown(key, 0, 0)
    os.chown(public, 12345, 12345)
    kept_from_starting("signing.trusted[0]", key=key, trusted=(public,))


def test_a_link_to_a_key_is_followed(tmp_path: Path) -> None:
    """Secrets that Kubernetes mounts are links."""
    key, _ = keys.pair(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(key)
    signed(Notary(Signing(key=str(link))))


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    key, public = keys.pair(tmp_path)
    rsa, locked, fifo = tmp_path / "rsa", tmp_path / "locked", tmp_path / "fifo"
    subprocess.run(["openssl", "genpkey", "-algorithm", "rsa", "-out", str(rsa)], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", str(rsa), "-pubout", "-out", f"{rsa}.pub"], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", str(locked)], check=True)
    os.mkfifo(fifo, 0o600)
    empty, large, cut = tmp_path / "empty", tmp_path / "large", tmp_path / "cut"
    empty.write_bytes(b"")
    large.write_bytes(b"x" * 100_000)
    cut.write_bytes(Path(key).read_bytes()[:60])
    for file in (rsa, locked, empty, large, cut):
        file.chmod(0o600)
    Path(f"{rsa}.pub").chmod(0o644)
    for wrong in (rsa, locked, fifo, empty, large, cut, tmp_path, tmp_path / "nothing", public):
        if wrong == public:
            shutil.copy(public, tmp_path / "copy")
            (tmp_path / "copy").chmod(0o600)
            wrong = tmp_path / "copy"  # noqa: PLW2901
        assert str(wrong) in kept_from_starting("signing.key", key=str(wrong))
    for wrong in (f"{rsa}.pub", fifo, empty, large, cut, tmp_path, tmp_path / "nothing", key):
        assert str(wrong) in kept_from_starting("signing.trusted[1]", key=key, trusted=(public, str(wrong)))


def test_no_word_of_a_key_is_said(tmp_path: Path) -> None:
    key, _ = keys.pair(tmp_path)
    secret = Path(key).read_text().splitlines()[1]
    Path(key).write_text(f"-----BEGIN PRIVATE KEY-----\n{secret[:-9]}\n-----END PRIVATE KEY-----\n")
    with pytest.raises(Refused) as raised:
        Notary(Signing(key=key))
    assert secret[:20] not in f"{raised.value} {raised.value.details} {raised.value.__cause__}"


def test_a_node_that_would_not_believe_itself_does_not_start(tmp_path: Path) -> None:
    _, public = keys.pair(tmp_path)
    assert "of its own" in kept_from_starting("signing.key", trusted=(public,))
