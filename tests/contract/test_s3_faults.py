"""The S3 driver on a bad day: a scripted proxy in front of moto. Each time: the error's class and code, no upload left open
after abort, nothing visible that was not committed."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import http.client
import ipaddress
import logging
import ssl
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.server import ThreadedMotoServer
from pydantic import ByteSize, SecretStr

from hibernode import config
from hibernode.drivers.s3 import S3
from hibernode.errors import Corrupt, Internal, NoRoom, NotFound, Refused, StoreUnavailable
from tests.contract.test_store import PART, keys, pattern, read, written
from tests.fakes.s3_faults import Answer, Fault, FaultProxy, Flip, ListsAsMinio, Reset, Rewrite, Stall, Truncate

SIZE = 2 * PART + 1000  # three parts
ACCESS, SECRET = "AKIAPLANTED0SECRET00", "planted-secret-4711-planted-secret-4711-"

MD5_OF_SOMETHING_ELSE = '"00112233445566778899aabbccddeeff"'


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def proxy(moto: str) -> Iterator[FaultProxy]:
    with FaultProxy(moto) as proxy:
        yield proxy


def client(proxy: FaultProxy, bucket: str, prefix: str = "pre/fix", **more: object) -> S3:
    values: dict[str, object] = {
        "endpoint_url": proxy.url,
        "region": "us-east-1",
        "access_key_id": ACCESS,
        "secret_access_key": SecretStr(SECRET),
        "addressing": "path",
        "part_size": ByteSize(PART),
        "attempts": 2,
        "read_timeout": 10.0,
    }
    return S3(bucket, prefix, config.S3.model_validate(values | more), sleep=lambda _: None)


@pytest.fixture
def bucket(moto: str) -> str:
    """A new one; moto takes unsigned requests, which saves a client."""
    name = f"b-{uuid.uuid4().hex}"
    connection = http.client.HTTPConnection(moto.removeprefix("http://"), timeout=10)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()
    return name


@pytest.fixture
def store(proxy: FaultProxy, bucket: str) -> S3:
    return client(proxy, bucket)


def assert_clean(proxy: FaultProxy, store: S3) -> None:
    """Nothing visible, no upload open, no thread left."""
    proxy.heal()
    assert keys(store) == []
    assert list(store.open_uploads()) == []
    assert [t.name for t in threading.enumerate() if t.name.startswith("s3 ")] == []


def assert_secretless(error: StoreUnavailable) -> None:
    assert ACCESS not in str(error)
    assert SECRET not in str(error)
    assert "nobody should repeat" not in str(error)


def fails(store: S3, size: int = SIZE) -> StoreUnavailable:
    """An upload that must fail at some write or at its commit; only abort is legal then."""
    upload = store.upload("c1/a")

    def send() -> None:
        for start in range(0, size, PART):
            upload.write(pattern(size)[start : start + PART])
        upload.commit()

    with pytest.raises(StoreUnavailable) as raised:
        send()
    for call in (lambda: upload.write(b"more"), upload.commit):
        with pytest.raises(Internal):
            call()
    upload.abort()
    assert raised.value.code == "store_unavailable"
    assert raised.value.retry
    assert_secretless(raised.value)
    return raised.value


# --- sending ---


def recovers(proxy: FaultProxy, store: S3, size: int = SIZE) -> None:
    data = pattern(size)
    written(store, "c1/a", data)
    proxy.heal()
    assert read(store, "c1/a", 0, size) == data
    assert list(store.open_uploads()) == []


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        ("UploadPart", Answer(500, "InternalError")),
        ("UploadPart", Answer(503, "SlowDown")),
        ("UploadPart", Reset()),
        ("UploadPart", Flip()),
        ("UploadPart", Answer(400, "BadDigest")),
        ("UploadPart", Rewrite({"etag": MD5_OF_SOMETHING_ELSE})),
        ("UploadPart", Rewrite({"x-amz-checksum-crc32": "AAAAAA=="})),
        ("CreateMultipartUpload", Answer(500, "InternalError")),
        ("CreateMultipartUpload", Reset()),
        ("CompleteMultipartUpload", Answer(500, "InternalError")),
        ("CompleteMultipartUpload", Reset()),
        ("HeadObject", Answer(500, "")),
    ],
    ids=str,
)
def test_one_fault_of_many_parts_is_overcome(proxy: FaultProxy, store: S3, operation: str, fault: Fault) -> None:
    proxy.play(operation, fault, times=1)
    recovers(proxy, store)


@pytest.mark.parametrize("fault", [Answer(503, "SlowDown"), Reset(), Flip(), Answer(400, "BadDigest")], ids=str)
def test_one_fault_of_a_small_object_is_overcome(proxy: FaultProxy, store: S3, fault: Fault) -> None:
    proxy.play("PutObject", fault, times=1)
    recovers(proxy, store, 1000)
    assert proxy.seen("CreateMultipartUpload") == []


def test_retries_are_counted(proxy: FaultProxy, bucket: str) -> None:
    proxy.play("UploadPart", Answer(500, "InternalError"), times=2)
    recovers(proxy, client(proxy, bucket, attempts=3))
    assert len(proxy.seen("UploadPart")) == 3 + 2


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        ("UploadPart", Answer(503, "SlowDown")),
        ("UploadPart", Reset()),
        ("UploadPart", Flip()),
        ("UploadPart", Answer(400, "BadDigest")),
        ("UploadPart", Rewrite({"etag": MD5_OF_SOMETHING_ELSE})),
        ("UploadPart", Rewrite({"x-amz-checksum-crc32": "AAAAAA=="})),
        ("CreateMultipartUpload", Answer(500, "InternalError")),
        ("CreateMultipartUpload", Reset()),
        ("CompleteMultipartUpload", Answer(500, "InternalError")),
        ("CompleteMultipartUpload", Answer(404, "NoSuchUpload")),
        ("HeadObject", Rewrite({"content-length": "17"})),
        ("HeadObject", Rewrite({"x-amz-checksum-crc32": "AAAAAA==-3"})),
        ("HeadObject", Rewrite({"x-amz-meta-hibernode-token": "of-somebody-else"})),
    ],
    ids=str,
)
def test_a_fault_that_stays_ends_the_upload(proxy: FaultProxy, store: S3, operation: str, fault: Fault) -> None:
    proxy.play(operation, fault)
    upload_error = fails(store)
    assert upload_error.message
    proxy.heal()
    if operation == "HeadObject" and isinstance(fault, Rewrite) and "x-amz-meta-hibernode-token" in fault.headers:
        store.delete("c1/a")  # what says that it is somebody else's is not ours to remove
    assert_clean(proxy, store)


@pytest.mark.parametrize("fault", [Answer(503, "SlowDown"), Flip(), Rewrite({"etag": MD5_OF_SOMETHING_ELSE})], ids=str)
def test_a_fault_that_stays_ends_a_small_upload(proxy: FaultProxy, store: S3, fault: Fault) -> None:
    proxy.play("PutObject", fault)
    fails(store, 1000)
    assert_clean(proxy, store)


def test_slow_down_is_named(proxy: FaultProxy, store: S3) -> None:
    proxy.play("UploadPart", Answer(503, "SlowDown"))
    assert "SlowDown" in fails(store).message
    assert_clean(proxy, store)


def test_rights_lost_half_way(proxy: FaultProxy, store: S3) -> None:
    proxy.play("UploadPart", Answer(403, "AccessDenied", f"key {ACCESS} with {SECRET}"), after=1)
    error = fails(store)
    assert "AccessDenied" in error.message
    assert "credentials" in error.hint
    assert_clean(proxy, store)


def test_a_server_that_stalls_is_given_up(proxy: FaultProxy, bucket: str) -> None:
    store = client(proxy, bucket, read_timeout=0.3)
    proxy.play("UploadPart", Stall())
    assert "ReadTimeoutError" in fails(store).message
    assert_clean(proxy, store)


def test_no_room_is_no_room(proxy: FaultProxy, store: S3) -> None:
    for status, code in [(507, "InsufficientStorage"), (403, "QuotaExceeded"), (507, "XMinioStorageFull")]:
        proxy.play("PutObject", Answer(status, code))
        with pytest.raises(NoRoom):
            store.put("c1/a", b"x")
        assert_clean(proxy, store)


def test_etags_that_are_no_md5_are_answered_with_content_md5(proxy: FaultProxy, store: S3) -> None:
    proxy.play("UploadPart", Rewrite({"etag": '"opaque"', "x-amz-server-side-encryption": "aws:kms"}), times=1)
    recovers(proxy, store)
    sent = ["content-md5" in r.headers for r in proxy.seen("UploadPart")]
    assert sum(sent) >= 1
    assert sent[-1]


def test_a_server_that_does_not_know_crc32_gets_content_md5_from_then_on(proxy: FaultProxy, store: S3) -> None:
    """Which it must check; its ETag, an MD5, is compared all the same."""
    proxy.play("UploadPart", Rewrite({"x-amz-checksum-crc32": None}))
    proxy.play("CreateMultipartUpload", Rewrite({"x-amz-checksum-algorithm": None}))
    recovers(proxy, store)
    store.delete("c1/a")
    proxy.play("UploadPart", Rewrite({"x-amz-checksum-crc32": None}))
    proxy.play("CreateMultipartUpload", Rewrite({"x-amz-checksum-algorithm": None}))
    recovers(proxy, store)
    sent = [("x-amz-checksum-crc32" in r.headers, "content-md5" in r.headers) for r in proxy.seen("UploadPart")]
    assert sent[0] == (True, False)
    assert sent[-3:] == [(False, True)] * 3
    proxy.play("UploadPart", Rewrite({"etag": MD5_OF_SOMETHING_ELSE, "x-amz-checksum-crc32": None}))
    store.delete("c1/a")
    fails(store)
    assert_clean(proxy, store)


def test_a_server_that_knows_crc32_is_not_sent_md5(proxy: FaultProxy, store: S3) -> None:
    def answers(crc: str) -> None:
        proxy.play("UploadPart", Rewrite({"etag": '"opaque"', "x-amz-checksum-crc32": crc}), times=1)

    data = pattern(3 * PART)
    for start in range(0, len(data), PART):
        answers(base64.b64encode(zlib.crc32(data[start : start + PART]).to_bytes(4, "big")).decode())
    upload = client(proxy, store.location.split("/")[2], parts_in_flight=1).upload("c1/a")
    upload.write(data)  # waits for all parts but the last
    upload.abort()
    sent = [("x-amz-checksum-crc32" in r.headers, "content-md5" in r.headers) for r in proxy.seen("UploadPart")]
    assert sent[:2] == [(True, False)] * 2


def test_over_plain_http_only_parts_go_unsigned(proxy: FaultProxy, store: S3) -> None:
    """Small objects say what digests the parts must have: whoever could change both on their way would not be found out."""
    recovers(proxy, store)
    written(store, "c1/b", pattern(1000))
    store.put("c1/m", b"manifest")
    assert {r.headers["x-amz-content-sha256"] for r in proxy.seen("UploadPart")} == {"UNSIGNED-PAYLOAD"}
    bodies = [pattern(1000), b"manifest"]
    assert [r.headers["x-amz-content-sha256"] for r in proxy.seen("PutObject")] == [hashlib.sha256(b).hexdigest() for b in bodies]


def test_a_server_that_wants_bodies_signed_is_found_out_before_anybody_is_frozen(proxy: FaultProxy, store: S3) -> None:
    store.check()
    signed, unsigned = (r.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD" for r in proxy.seen("PutObject"))
    assert (signed, unsigned) == (False, True)
    proxy.play("PutObject", Answer(403, "AccessDenied"), after=1)
    with pytest.raises(StoreUnavailable, match="unsigned body"):
        store.check()
    proxy.heal()
    assert keys(store) == []


def test_an_echoed_checksum_is_enough(proxy: FaultProxy, store: S3) -> None:
    """As AWS does it with KMS: an ETag that says nothing, and the CRC32 back."""
    data = pattern(1000)
    written(store, "c1/a", data)
    crc = proxy.seen("PutObject")[-1].headers["x-amz-checksum-crc32"]
    proxy.play("PutObject", Rewrite({"etag": '"opaque"', "x-amz-checksum-crc32": crc}))
    written(store, "c1/b", data)
    assert len(proxy.seen("PutObject")) == 2


def test_all_answers_to_the_commit_are_lost_and_the_object_is_found(proxy: FaultProxy, store: S3) -> None:
    proxy.play("CompleteMultipartUpload", Reset())
    recovers(proxy, store)


def test_a_commit_nobody_could_see_is_withdrawn_when_the_store_is_back(proxy: FaultProxy, store: S3) -> None:
    upload = store.upload("c1/a")
    upload.write(pattern(SIZE))
    proxy.play("CompleteMultipartUpload", Reset())
    proxy.play("HeadObject", Answer(503, ""), after=1)  # the first asks whether the key is free
    with pytest.raises(StoreUnavailable):
        upload.commit()
    proxy.heal()
    assert keys(store) == ["c1/a"]  # it was committed, and nobody knew
    upload.abort()
    assert_clean(proxy, store)


def test_an_upload_begun_by_a_lost_answer_is_aborted_too(proxy: FaultProxy, store: S3) -> None:
    proxy.play("CreateMultipartUpload", Reset(), times=1)
    upload = store.upload("c1/a")
    upload.write(pattern(SIZE))
    assert len(list(store.open_uploads())) == 2
    upload.abort()
    assert_clean(proxy, store)


@pytest.mark.parametrize("size", [1000, SIZE], ids=str)
def test_a_commit_loses_a_race_to_another_daemon(proxy: FaultProxy, store: S3, size: int) -> None:
    """The key was free a moment ago: the server's own condition decides, and what is there is not ours to remove."""
    store.put("c1/a", b"theirs")
    proxy.play("HeadObject", Answer(404, ""), times=1)
    upload = store.upload("c1/a")
    upload.write(pattern(size))
    with pytest.raises(Refused) as refused:
        upload.commit()
    assert refused.value.code == "exists"
    upload.abort()
    assert store.get("c1/a", limit=10) == b"theirs"
    assert list(store.open_uploads()) == []


@pytest.mark.parametrize(("operation", "size"), [("PutObject", 1000), ("CompleteMultipartUpload", SIZE)])
def test_a_commit_without_conditional_writes(proxy: FaultProxy, store: S3, operation: str, size: int) -> None:
    proxy.play(operation, Answer(501, "NotImplemented"), times=1)
    written(store, "c1/a", pattern(size))
    assert ["if-none-match" in r.headers for r in proxy.seen(operation)] == [True, False]
    again = store.upload("c1/a")
    again.write(b"other")
    with pytest.raises(Refused):
        again.commit()
    assert read(store, "c1/a", 0, size) == pattern(size)


# --- abort ---


@pytest.mark.parametrize("minio", [False, True])
def test_uploads_below_a_prefix_are_found(proxy: FaultProxy, store: S3, bucket: str, minio: bool) -> None:
    """Theirs alone, and of MinIO, too, which has to be asked for all."""
    other = client(proxy, bucket, "pre/fix2")
    for where, key in ((store, "c1/a"), (store, "c10/a"), (other, "c1/a")):
        where.upload(key).write(pattern(PART + 1))
    if minio:
        proxy.play("ListMultipartUploads", ListsAsMinio())
    assert [upload.key for upload in store.open_uploads("c1/")] == ["c1/a"]
    assert sorted(upload.key for upload in store.open_uploads()) == ["c1/a", "c10/a"]
    asked = [parse_qs(urlsplit(each.path).query).get("prefix", [""]) for each in proxy.seen("ListMultipartUploads")]
    below = [["pre/fix/c1/"], ["pre/fix/"]]
    assert asked == ([below[0], [""], below[1], [""]] if minio else below)
    for upload in store.open_uploads():
        store.abort_upload(upload)
    assert list(store.open_uploads()) == []


def test_who_may_list_uploads_of_his_own_prefix_alone_has_seen_them(proxy: FaultProxy, store: S3) -> None:
    proxy.play("ListMultipartUploads", Answer(403, "AccessDenied"), after=1)
    assert list(store.open_uploads("c1/")) == []
    with pytest.raises(StoreUnavailable):
        list(store.open_uploads("c1/"))


def test_an_abort_that_fails_once_is_repeated(proxy: FaultProxy, store: S3) -> None:
    upload = store.upload("c1/a")
    upload.write(pattern(SIZE))
    proxy.play("AbortMultipartUpload", Answer(500, "InternalError"), times=1)
    upload.abort()
    assert_clean(proxy, store)


def test_an_abort_that_fails_is_logged_and_may_be_tried_again(
    proxy: FaultProxy, store: S3, caplog: pytest.LogCaptureFixture
) -> None:
    upload = store.upload("c1/a")
    upload.write(pattern(SIZE))
    proxy.play("AbortMultipartUpload", Answer(403, "AccessDenied"))
    with caplog.at_level(logging.WARNING):
        upload.abort()
    assert "c1/a" in caplog.text
    proxy.heal()
    assert [u.key for u in store.open_uploads()] == ["c1/a"]
    upload.abort()
    assert_clean(proxy, store)


# --- put ---


def test_put_meets_itself_when_its_answer_was_lost(proxy: FaultProxy, store: S3) -> None:
    """boto3 sends it again, and the server says 412: it is ours all the same."""
    proxy.play("PutObject", Reset(), times=1)
    store.put("c1/m", b"manifest")
    assert len(proxy.seen("PutObject")) == 2
    assert store.get("c1/m", limit=10) == b"manifest"


def test_put_whose_answers_are_all_lost_is_found(proxy: FaultProxy, bucket: str) -> None:
    store = client(proxy, bucket, attempts=1)
    proxy.play("PutObject", Reset())
    store.put("c1/m", b"manifest")
    assert store.get("c1/m", limit=10) == b"manifest"


def test_put_that_nobody_can_see_is_not_somebody_elses(proxy: FaultProxy, store: S3) -> None:
    """Its answer was lost, it meets itself, and then the store does not say whose it is: whoever took it for another's would go on
    and remove what it names."""
    proxy.play("PutObject", Reset(), times=1)
    proxy.play("HeadObject", Answer(403, "AccessDenied"), after=1)
    with pytest.raises(StoreUnavailable, match="cannot see"):
        store.put("c1/m", b"manifest")
    proxy.heal()
    assert store.get("c1/m", limit=10) == b"manifest"


def test_put_damaged_on_its_way_is_withdrawn(proxy: FaultProxy, store: S3) -> None:
    proxy.play("PutObject", Flip())
    with pytest.raises(StoreUnavailable):
        store.put("c1/m", b"manifest")
    assert_clean(proxy, store)


def test_put_loses_a_race_to_another_daemon(proxy: FaultProxy, store: S3) -> None:
    store.put("c1/m", b"theirs")
    proxy.play("HeadObject", Answer(404, ""), times=1)  # as it was a moment ago
    with pytest.raises(Refused) as refused:
        store.put("c1/m", b"mine!!")
    assert refused.value.code == "exists"
    assert store.get("c1/m", limit=10) == b"theirs"


def test_put_without_conditional_writes(proxy: FaultProxy, store: S3) -> None:
    proxy.play("PutObject", Answer(501, "NotImplemented"), times=1)
    store.put("c1/m", b"manifest")
    assert ["if-none-match" in r.headers for r in proxy.seen("PutObject")] == [True, False]
    with pytest.raises(Refused):
        store.put("c1/m", b"manifest")


# --- reading ---


@pytest.mark.parametrize("fault", [Truncate(1 << 20), Truncate(1 << 20, stall=True), Truncate(0)], ids=str)
def test_a_body_that_breaks_is_resumed_where_it_broke(proxy: FaultProxy, bucket: str, fault: Truncate) -> None:
    store = client(proxy, bucket, read_timeout=3.0)
    data = pattern(3 << 20)
    written(store, "a", data)
    proxy.play("GetObject", fault, times=1)
    assert read(store, "a", 1000, 2 << 20) == data[1000 : 1000 + (2 << 20)]
    asked = [r.headers["range"] for r in proxy.seen("GetObject")]
    assert asked == [f"bytes={start}-{1000 + (2 << 20) - 1}" for start in (1000, 1000 + fault.size)]


def test_a_body_that_breaks_between_two_pieces_is_resumed_there(proxy: FaultProxy, bucket: str) -> None:
    store = client(proxy, bucket)
    data = pattern(3 << 20)
    written(store, "a", data)
    proxy.play("GetObject", Truncate(1 << 20), times=1)
    pieces = [bytearray(1 << 20), bytearray(1 << 20)]
    with store.reading("a", 0, 2 << 20) as fill:
        for piece in pieces:
            fill(memoryview(piece))
    assert b"".join(pieces) == data[: 2 << 20]
    assert [r.headers["range"] for r in proxy.seen("GetObject")] == ["bytes=0-2097151", "bytes=1048576-2097151"]


def test_a_body_that_always_breaks_is_given_up(proxy: FaultProxy, store: S3) -> None:
    written(store, "a", pattern(1000))
    proxy.play("GetObject", Truncate(100))
    with pytest.raises(StoreUnavailable):
        read(store, "a", 0, 1000)
    assert len(proxy.seen("GetObject")) == 2
    proxy.heal()
    assert read(store, "a", 0, 1000) == pattern(1000)


@pytest.mark.parametrize("fault", [Answer(500, "InternalError"), Reset(), Stall()], ids=str)
def test_a_get_that_fails(proxy: FaultProxy, bucket: str, fault: Fault) -> None:
    store = client(proxy, bucket, read_timeout=3.0)
    written(store, "a", b"0123456789")
    proxy.play("GetObject", fault, times=1)
    assert read(store, "a", 2, 3) == b"234"
    proxy.play("GetObject", fault)
    with pytest.raises(StoreUnavailable) as raised:
        read(store, "a", 2, 3)
    assert_secretless(raised.value)


@pytest.mark.parametrize(
    "headers",
    [{"content-range": "bytes 0-2/10"}, {"content-range": None}, {"content-range": "bytes 2-3/10"}, {"content-range": "x"}],
    ids=str,
)
def test_another_range_than_asked_is_never_taken(proxy: FaultProxy, store: S3, headers: dict[str, str | None]) -> None:
    written(store, "a", b"0123456789")
    proxy.play("GetObject", Rewrite(headers))
    with pytest.raises(StoreUnavailable):
        read(store, "a", 2, 3)


def test_an_object_that_became_shorter_is_corrupt(proxy: FaultProxy, store: S3) -> None:
    written(store, "a", b"0123456789")
    with pytest.raises(Corrupt):
        read(store, "a", 8, 3)
    with pytest.raises(Corrupt):
        read(store, "a", 10, 3)


# --- what a person must mend ---


def test_without_its_bucket_nothing_is_not_found(proxy: FaultProxy) -> None:
    store = client(proxy, "no-such-bucket-here")
    upload = store.upload("c1/a")
    calls: list[Callable[[], object]] = [
        store.check,
        lambda: store.put("c1/a", b""),
        lambda: store.get("c1/a", limit=1),
        lambda: read(store, "c1/a", 0, 1),
        lambda: store.stat("c1/a"),
        lambda: list(store.list()),
        lambda: list(store.open_uploads()),
        lambda: upload.write(pattern(SIZE)),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable) as raised:
            call()
        assert "no-such-bucket-here" in raised.value.message
        assert "create it" in raised.value.hint
    upload.abort()


def test_a_missing_key_in_a_bucket_that_is_there(proxy: FaultProxy, store: S3) -> None:
    with pytest.raises(NotFound):
        store.stat("c1/a")
    proxy.play("HeadObject", Answer(403, ""))  # what S3 says to those who may not list
    with pytest.raises(StoreUnavailable) as raised:
        store.stat("c1/a")
    assert "ListBucket" in raised.value.hint


def test_nobody_listens(proxy: FaultProxy) -> None:
    store = client(proxy, "bucket", endpoint_url="http://127.0.0.1:1", attempts=1)
    with pytest.raises(StoreUnavailable) as raised:
        store.check()
    assert "EndpointConnectionError" in raised.value.message
    assert "endpoint_url" in raised.value.hint


def test_a_client_that_cannot_be_made_is_refused(proxy: FaultProxy) -> None:
    for wrong in ({"profile": "nobody-has-this-profile"}, {"endpoint_url": "not a url"}):
        with pytest.raises(Refused) as refused:
            client(proxy, "bucket", **wrong)
        assert refused.value.code == "config"


# --- over TLS ---


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A certificate for 127.0.0.1 that boto3 trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    monkeypatch.setenv("AWS_CA_BUNDLE", str(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def test_over_tls_bodies_go_plain_with_a_checksum_and_are_not_hashed_twice(moto: str, bucket: str, tls: ssl.SSLContext) -> None:
    with FaultProxy(moto, tls) as proxy:
        store = client(proxy, bucket)
        recovers(proxy, store)
        proxy.play("UploadPart", Reset(), times=1)
        store.delete("c1/a")
        recovers(proxy, store)
        for request in proxy.seen("UploadPart"):
            assert request.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
            assert "x-amz-checksum-crc32" in request.headers
            assert "content-encoding" not in request.headers
            assert "x-amz-trailer" not in request.headers
