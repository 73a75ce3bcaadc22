"""Connections of the NATS driver that others must not read or use: TLS, certificates of both sides, credentials files."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import ipaddress
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nkeys  # type: ignore[import-untyped]
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from nacl.signing import SigningKey

from hibernode.config import Bus
from hibernode.drivers.nats import NatsNode
from hibernode.errors import Refused
from tests.nats_server import NatsServer

LIMIT = 20.0


@dataclass(frozen=True)
class Pair:
    """Files of a certificate and its key."""

    cert: Path
    key: Path


class Authority:
    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.pair = self._write(name, self._key, self._builder(self._name, self._key, authority=True))

    def issue(self, name: str) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        return self._write(name, key, self._builder(subject, key, authority=False).add_extension(address, critical=False))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )

    def _write(self, name: str, key: ec.EllipticCurvePrivateKey, builder: x509.CertificateBuilder) -> Pair:
        pair = Pair(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        pair.cert.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(pem))
        pair.key.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
        return pair


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture(params=[False, True], ids=["server", "both"])
def secure(request: pytest.FixtureRequest, tmp_path: Path, authority: Authority) -> Iterator[tuple[NatsServer, bool]]:
    """A server with TLS, and whether it asks for a certificate of the client."""
    pair = authority.issue("broker")
    tls = f'cert_file: "{pair.cert}", key_file: "{pair.key}", ca_file: "{authority.pair.cert}"'
    settings = f"tls {{ {tls}, verify: {str(request.param).lower()} }}"
    with NatsServer(tmp_path / "nats", settings=settings) as running:
        yield running, request.param


async def connects(config: Bus) -> None:
    node = NatsNode(config, "c", "n")
    try:
        await asyncio.wait_for(node.start(), LIMIT)
        assert node.connected
        await node.put_node(b"")
    finally:
        await node.stop()


async def test_tls_with_the_right_authority(secure: tuple[NatsServer, bool], authority: Authority) -> None:
    server, both = secure
    ours = authority.issue("node")
    for url in (server.url, server.url.replace("nats://", "tls://")):
        files = {"tls_cert": str(ours.cert), "tls_key": str(ours.key)} if both else {}
        await connects(Bus.model_validate({"url": url, "tls_ca": str(authority.pair.cert)} | files))


async def test_tls_with_another_authority_is_refused(secure: tuple[NatsServer, bool], tmp_path: Path) -> None:
    other = Authority(tmp_path, "other")
    for ca in (str(other.pair.cert), ""):
        with pytest.raises(Refused) as caught:
            await connects(Bus(url=secure[0].url, tls_ca=ca))
        assert caught.value.code == "bus_tls"
        assert "bus.tls_ca" in caught.value.hint


async def test_no_password_goes_out_where_tls_was_asked_for_and_is_not_there(tmp_path: Path, authority: Authority) -> None:
    heard: list[bytes] = []

    async def broker_without_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version":"2.15.0","headers":true,"auth_required":true,"max_payload":1048576}\r\n')
        await writer.drain()
        heard.append(await reader.read(65536))
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(broker_without_tls, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for config in (
        {"url": f"tls://127.0.0.1:{port}", "user": "me", "password": "s3cret"},
        {"url": f"tls://me:s3cret@127.0.0.1:{port}"},
        {"url": f"nats://me:s3cret@127.0.0.1:{port}", "tls_ca": str(authority.pair.cert)},
    ):
        with pytest.raises(Refused) as caught:
            await connects(Bus.model_validate(config))
        assert caught.value.code == "bus_tls"
    server.close()
    await server.wait_closed()
    assert b"s3cret" not in b"".join(heard)


@pytest.mark.parametrize("key", ["tls_ca", "tls_cert"])
async def test_a_certificate_file_that_is_none_is_refused(key: str, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("nonsense")
    for path in (tmp_path / "absent.pem", tmp_path / "bad.pem"):
        with pytest.raises(Refused) as caught:
            await connects(Bus.model_validate({"url": "nats://127.0.0.1:9", key: str(path)}))
        assert caught.value.code == "config"
        assert str(path) in caught.value.message


# --- credentials ------------------------------------------------------------------------------------------------------


class Signer:
    """One key of the NATS hierarchy, with what it takes to sign the claims of the next."""

    def __init__(self, prefix: int) -> None:
        seed = bytes(SigningKey.generate())
        self.seed = nkeys.encode_seed(seed, prefix)
        self.pair = nkeys.from_seed(bytearray(self.seed))
        self.public = self.pair.public_key.decode()

    def claims(self, subject: str, kind: str, nats: dict[str, object]) -> str:
        body = {"iss": self.public, "sub": subject, "iat": 1, "name": kind, "nats": {"type": kind, "version": 2} | nats}
        body["jti"] = base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).decode().rstrip("=")
        signed = ".".join(_base64(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body))
        return f"{signed}.{_base64(self.pair.sign(signed.encode()))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def creds(path: Path, account: Signer) -> Path:
    user = Signer(nkeys.PREFIX_BYTE_USER)
    token = account.claims(user.public, "user", {"pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1})
    path.write_text(
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    return path


async def test_a_credentials_file_logs_in_and_another_accounts_does_not(tmp_path: Path) -> None:
    operator = Signer(nkeys.PREFIX_BYTE_OPERATOR)
    system, account, stranger = (Signer(nkeys.PREFIX_BYTE_ACCOUNT) for _ in range(3))
    limits = {"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True, "conn": -1}
    storage = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
    settings = (
        f"operator: {operator.claims(operator.public, 'operator', {'system_account': system.public})}\n"
        f"system_account: {system.public}\nresolver: MEMORY\nresolver_preload {{\n"
        f"  {system.public}: {operator.claims(system.public, 'account', {'limits': limits})}\n"
        f"  {account.public}: {operator.claims(account.public, 'account', {'limits': limits | storage})}\n}}\n"
    )
    with NatsServer(tmp_path / "nats", settings=settings) as server:
        await connects(Bus(url=server.url, credentials=str(creds(tmp_path / "good.creds", account))))
        with pytest.raises(Refused) as caught:
            await connects(Bus(url=server.url, credentials=str(creds(tmp_path / "bad.creds", stranger))))
        assert caught.value.code == "bus_login"
