"""The store in an S3 bucket, AWS or compatible; the only file that knows boto3.

What it knows that no other file knows:

- Checksums are ours. boto3 would send them as trailers of a chunked body over HTTPS, which many compatible servers do
  not understand, so it is told `when_required`, and every body goes with its CRC32 in the header (zlib-ng's, 0.02 s per
  GB; zlib's takes 0.24, awscrt's 0.33). A body counts as stored when the answer repeats that CRC32 or, from servers
  that do not know the header, when its ETag is the body's MD5. MD5 costs 1.3 s per GB, so only then; from the first such
  answer on it goes along as Content-MD5, which every server must check, in the place of a CRC32 that nobody would read.
  Where the ETag is no MD5 either, the body is sent again with Content-MD5.
- Parts go unsigned. SHA-256 would cost 0.57 s per GB, and boto3 spends it over plain HTTP, and over TLS where it does not see
  a checksum that we set ourselves. Whoever changes a part on its way over plain HTTP is found out by the digest of its
  frame; all that says what digests are right (manifest, small objects) is sent whole, and signed where there is no TLS.
- Every object of ours carries a random token in its metadata. When an answer is lost (or boto3 has retried a call
  that had succeeded), the token says whether the object that is there is the one we wrote.
- A bucket has 10,000 parts per upload: `part_size`. Compatible servers that want all parts alike (R2) need a
  `part_size` in the configuration with which no stream exceeds 1,000 parts.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import random
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError  # what boto3 lets through when a body breaks inside TLS
from zlib_ng import zlib_ng

from hibernode import config
from hibernode.errors import Corrupt, HibernodeError, Internal, NoAnswer, NoRoom, NotFound, Refused, StoreUnavailable
from hibernode.model import MAX_STREAMS, checked_key, checked_prefix, is_key
from hibernode.ports import Buffer, ObjectFacts, OpenUpload

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, GetObjectOutputTypeDef, HeadObjectOutputTypeDef

T = TypeVar("T")

_log = logging.getLogger(__name__)

MIB = 1 << 20
MAX_PARTS = 10_000
MAX_PART = 5 << 30
_EVEN_PARTS = 1_000  # parts of the configured size; most objects never need more
_STEP_PARTS, _STEP = 100, 13 * MIB  # then each 100 parts are 13 MiB larger: 10,000 of them hold 5.3 TB from any base
_SLICE = 256 << 10  # of a body, read at once: what is lost when it breaks. urllib3 copies each through an object of its own
_TOKEN = "hibernode-token"  # in the metadata of every object


def part_size(number: int, base: int) -> int:
    """Bytes of part `number` (from 1). 10,000 of them hold the 5 TiB that S3 allows, from the smallest base on; the
    largest is 1.2 GiB over `base`. NoRoom after the last."""
    if number > MAX_PARTS:
        raise NoRoom(f"an object has {MAX_PARTS} parts at most", hint="a larger part_size or more streams")
    steps = -(-max(0, number - _EVEN_PARTS) // _STEP_PARTS)
    return min(base + steps * _STEP, MAX_PART)


class S3:
    """ports.Store in a bucket, under a prefix. boto3's clients are thread-safe, and so is this."""

    def __init__(self, bucket: str, prefix: str, settings: config.S3, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._bucket = bucket
        self._base = "".join(f"{checked_key(p)}/" for p in [prefix.strip("/")] if p)
        self._client, self._part_client = _clients(settings)
        self._attempts = settings.attempts
        self._sleep = sleep
        self._conditional = True  # until the server says that it knows no If-None-Match
        self._crc32 = True  # until the server answers without: then Content-MD5
        self.part_size = int(settings.part_size)
        self.parts_in_flight = settings.parts_in_flight
        self.reads_in_flight = settings.reads_in_flight

    @property
    def location(self) -> str:
        return f"s3://{self._bucket}/{self._base}".rstrip("/")

    @property
    def lingers(self) -> bool:
        return True

    def check(self) -> None:
        key, data = f"check-{uuid.uuid4().hex}", random.randbytes(64)
        self.put(key, data)
        try:
            if self.get(key, limit=len(data)) != data:
                raise StoreUnavailable(f"{self.location} does not give back what was written")
            if (
                self._part_client is not self._client
            ):  # a server that wants bodies signed says so now, and not when somebody is frozen
                with self._translating(f"cannot write {key} as parts are written, with an unsigned body"):
                    self._part_client.put_object(
                        Bucket=self._bucket, Key=self._base + key, Body=data, ContentMD5=_base64(hashlib.md5(data).digest())
                    )
        finally:
            self.delete(key)

    def free_bytes(self) -> int | None:
        return None

    def upload(self, key: str) -> S3Upload:
        return S3Upload(self, checked_key(key))

    def put(self, key: str, data: bytes) -> None:
        token = uuid.uuid4().hex
        self._insist_free(checked_key(key), token)
        try:
            self._put_once(key, data, token)
        except _Mismatch:
            self.withdraw(key, token)
            raise
        except (Refused, StoreUnavailable) as e:
            try:
                ours = self._landed(key, token, len(data))
            except NotFound:
                raise e from None
            except HibernodeError as unseen:  # then it may be there, and ours: nobody may take it for somebody else's
                kind = NoAnswer if isinstance(e, NoAnswer) else StoreUnavailable
                raise kind(f"cannot see whether {key} was written: {unseen.message}", hint=unseen.hint) from e
            if ours is None:  # else only the answer was lost
                raise

    def get(self, key: str, *, limit: int) -> bytes:
        size = self.stat(key).size
        if size > limit:
            raise Corrupt(f"{key} has {size} bytes, at most {limit} were expected")
        data = bytearray(size)
        self.read_into(key, 0, memoryview(data))
        return bytes(data)

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        if not into.nbytes:
            self.stat(key)
            return
        with self.reading(key, offset, into.nbytes) as fill:
            fill(into)

    def reading(self, key: str, offset: int, size: int) -> S3Reading:
        return S3Reading(self, checked_key(key), offset, offset + size, self._attempts, self._sleep)

    def stat(self, key: str) -> ObjectFacts:
        checked_key(key)
        try:
            return _facts(key, self._head(key))
        except NotFound:
            with self._translating("cannot look for the bucket"):
                self._bucket_is_there()
            raise

    def list(self, prefix: str = "") -> Iterator[ObjectFacts]:
        """In the order of the server, which S3 promises to be that of the keys (directory buckets do not)."""
        pages = iter(
            self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._base + checked_prefix(prefix)
            )
        )
        while True:
            with self._translating("cannot list"):
                page = next(pages, None)
            if page is None:
                return
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._base)
                if is_key(key):
                    yield ObjectFacts(key, found["Size"], found["LastModified"].timestamp())

    def delete(self, key: str) -> None:
        checked_key(key)
        with suppress(NotFound), self._translating(f"cannot delete {key}"):
            self._client.delete_object(Bucket=self._bucket, Key=self._base + key)

    def open_uploads(self, prefix: str = "") -> Iterator[OpenUpload]:
        """Where none is found below it all of the bucket are asked for: MinIO takes a prefix for a whole key, unless there is none
        (cmd/erasure-server-pool.go). It knows of none from before it was started last, and removes those itself."""
        wanted, found = self._base + checked_prefix(prefix), False
        for asked in dict.fromkeys((wanted, "")):
            for upload in self._uploads(asked):
                if upload["Key"].startswith(wanted):
                    found = True
                    yield OpenUpload(upload["Key"].removeprefix(self._base), upload["UploadId"], upload["Initiated"].timestamp())
            if found:
                return

    def _uploads(self, prefix: str) -> Iterator[Mapping[str, Any]]:
        pages = iter(self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix))
        while True:
            page = None
            try:
                with suppress(_NoSuchUpload), self._translating("cannot list uploads"):  # rclone, where there never was one
                    page = next(pages, None)
            except StoreUnavailable as e:
                if prefix or not self._base or e.details.get("status") != 403:  # who may see his own alone has seen them
                    raise
            if page is None:
                return
            yield from page.get("Uploads", [])

    def abort_upload(self, upload: OpenUpload) -> None:
        """Abort it; one that is gone is no error."""
        with suppress(NotFound, _NoSuchUpload), self._translating(f"cannot abort the upload of {upload.key}"):
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._base + upload.key, UploadId=upload.id)

    # --- for who reads ---

    def body(self, key: str, offset: int, end: int) -> StreamingBody:
        """One GET of the bytes from `offset` to `end`: what comes of them."""
        with self._translating(f"cannot read {key}"):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._base + key, Range=f"bytes={offset}-{end - 1}")
        try:
            self._check_range(key, answer, offset, end - 1)
        except HibernodeError:
            answer["Body"].close()
            raise
        return answer["Body"]

    # --- for the upload ---

    def begin_parts(self, key: str, token: str) -> _Multipart:
        with self._translating(f"cannot begin {key}"):
            answer = self._client.create_multipart_upload(
                Bucket=self._bucket, Key=self._base + key, ChecksumAlgorithm="CRC32", Metadata={_TOKEN: token}
            )
        return _Multipart(
            key,
            token,
            answer["UploadId"],
            answer.get("ChecksumAlgorithm") == "CRC32",
            answer["ResponseMetadata"]["RetryAttempts"],
        )

    def send_part(self, upload: _Multipart, number: int, data: bytearray) -> _Part:
        """Send one part until the store has confirmed its bytes."""

        def send(**checks: Any) -> Mapping[str, Any]:
            with self._translating(f"cannot send part {number} of {upload.key}"):
                return self._part_client.upload_part(
                    Bucket=self._bucket, Key=self._base + upload.key, UploadId=upload.id, PartNumber=number, **checks
                )

        etag, crc = self._confirmed(f"part {number} of {upload.key}", send, data, crc32=upload.checksums)
        return _Part(number, etag, crc, len(data), data)

    def put_object(self, key: str, data: bytearray, token: str) -> None:
        """Send it until the store has confirmed its bytes. Replaces nothing but what it has itself sent before."""

        def send(**checks: Any) -> Mapping[str, Any]:
            self._insist_free(key, token)

            def put(**condition: Any) -> Mapping[str, Any]:
                with self._translating(f"cannot write {key}"):
                    return self._client.put_object(
                        Bucket=self._bucket, Key=self._base + key, Metadata={_TOKEN: token}, **condition, **checks
                    )

            return self._if_none_match(put)

        self._confirmed(key, send, data)

    def complete(self, upload: _Multipart, parts: Sequence[_Part]) -> None:
        listed: Sequence[CompletedPartTypeDef] = [
            {"PartNumber": p.number, "ETag": p.etag, "ChecksumCRC32": p.crc}
            if upload.checksums
            else {"PartNumber": p.number, "ETag": p.etag}
            for p in parts
        ]
        self._insist_free(upload.key, upload.token)

        def complete(**condition: Any) -> None:
            with self._translating(f"cannot commit {upload.key}"):
                self._client.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._base + upload.key,
                    UploadId=upload.id,
                    MultipartUpload={"Parts": listed},
                    **condition,
                )

        self._if_none_match(complete)

    def landed(self, key: str, token: str, size: int, crc: str = "") -> ObjectFacts | None:
        """The object, if it is there and ours, with that size and no other checksum (`crc` as S3 writes it)."""
        try:
            return self._landed(key, token, size, crc)
        except HibernodeError as e:
            _log.warning("cannot see whether %s was written: %s", key, e)
            return None

    def _landed(self, key: str, token: str, size: int, crc: str = "") -> ObjectFacts | None:
        head = self._head(key)
        if _token(head) != token or head["ContentLength"] != size or _contradicts(head, crc):
            return None
        return _facts(key, head)

    def withdraw(self, key: str, token: str) -> None:
        """Remove the object if it is ours. May raise what any call may."""
        with suppress(NotFound):
            if _token(self._head(key)) == token:
                self.delete(key)

    # --- inside ---

    def _head(self, key: str) -> HeadObjectOutputTypeDef:
        with self._translating(f"cannot look at {key}"):
            return self._client.head_object(Bucket=self._bucket, Key=self._base + key, ChecksumMode="ENABLED")

    def _insist_free(self, key: str, token: str) -> None:
        """Refused("exists") if somebody else's object is there; ours, of an attempt that went wrong, is removed. Asked before every
        write, because some servers ignore If-None-Match: there only a write at the same moment can go unseen."""
        try:
            found = _token(self._head(key))
        except NotFound:
            return
        if found != token:
            raise Refused("exists", f"{key} is already there", prop="object", found=key, wanted="no object of that key")
        self.delete(key)

    def _if_none_match(self, write: Callable[..., T]) -> T:
        """`write` under the condition that nothing is there, until the server says that it knows no such condition."""
        if self._conditional:
            try:
                return write(IfNoneMatch="*")
            except StoreUnavailable as e:
                if e.details.get("status") != 501:
                    raise
            self._conditional = False
        return write()

    def _bucket_is_there(self) -> None:
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as e:
            if _status(e) == 404:
                raise self._no_bucket() from e
            raise

    def _put_once(self, key: str, data: bytes, token: str) -> None:
        """PutObject that replaces nothing, sent once: sent again it would meet itself."""
        md5 = hashlib.md5(data).digest()
        checks: dict[str, Any] = {"ChecksumCRC32": _crc32(data), "ContentMD5": _base64(md5)}

        def put(**condition: Any) -> Mapping[str, Any]:
            with self._translating(f"cannot write {key}", unanswered=NoAnswer):
                return self._client.put_object(
                    Bucket=self._bucket, Key=self._base + key, Body=data, Metadata={_TOKEN: token}, **condition, **checks
                )

        if _proof(self._if_none_match(put), data, checks["ChecksumCRC32"], md5) is False:
            raise _Mismatch(f"{self.location} acknowledged other bytes than were sent for {key}")

    def _confirmed(
        self, what: str, send: Callable[..., Mapping[str, Any]], data: bytearray, *, crc32: bool = False
    ) -> tuple[str, str]:
        """Send `data` with a checksum until the store confirms these bytes; (ETag, CRC32 or "" where the server knows none)."""
        crc, md5 = "", b""
        for _ in range(max(2, self._attempts)):
            checks = {}
            if crc32 or self._crc32:
                checks["ChecksumCRC32"] = crc = crc or _crc32(data)
            if not self._crc32:
                md5 = md5 or hashlib.md5(data).digest()
                checks["ContentMD5"] = _base64(md5)
            try:
                answer = send(Body=data, **checks)
            except _Mismatch:
                continue
            proof = _proof(answer, data, crc, md5)
            self._crc32 = self._crc32 and "ChecksumCRC32" in answer
            if proof or (proof is None and "ContentMD5" in checks):
                return str(answer["ETag"]), crc
        raise _Mismatch(f"{self.location} acknowledged other bytes than were sent for {what}", hint=_NETWORK)

    def _check_range(self, key: str, answer: GetObjectOutputTypeDef, offset: int, end: int) -> None:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.get("ContentRange", ""))
        if found is None:
            raise StoreUnavailable(f"{self.location} does not answer ranges, asked for {offset}-{end} of {key}")
        first, last, total = int(found[1]), int(found[2]), found[3]
        if total != "*" and int(total) <= end:
            raise Corrupt(f"{key} ends at byte {total}, {end + 1 - int(total)} bytes too early")
        if (first, last) != (offset, end):
            raise StoreUnavailable(f"{self.location} answered {first}-{last} when asked for {offset}-{end} of {key}")

    # --- errors ---

    @contextmanager
    def _translating(self, what: str, unanswered: type[StoreUnavailable] = StoreUnavailable) -> Iterator[None]:
        """The one place where errors of boto3 become ours. Only codes and class names are quoted: a server's text, or
        boto3's, may hold parts of the request. `unanswered`: what it is called if nobody has said how the request ended: no answer, or that
        of a gateway that has not had one."""
        try:
            yield
        except ClientError as e:
            if _status(e) in (502, 504):
                raise unanswered(f"{what} in {self.location}: {_code(e)}", hint=_NETWORK, status=_status(e)) from e
            raise self._translated(what, e) from e
        except (BotoCoreError, HTTPError) as e:
            name = type(e).__name__
            if re.search("Credential|Token|Login|SSO", name):
                raise StoreUnavailable(f"{what} in {self.location}: {name}", hint=_CREDENTIALS) from e
            raise unanswered(f"{what} in {self.location}: {name}", hint=_NETWORK) from e

    def _translated(self, what: str, error: ClientError) -> HibernodeError:
        code, status = _code(error), _status(error)
        text = f"{what} in {self.location}: {code}"
        if code == "NoSuchBucket":
            return self._no_bucket()
        if code == "NoSuchUpload":
            return _NoSuchUpload(text, hint="something else aborts uploads, perhaps a lifecycle rule")
        if status == 507 or "Quota" in code or "StorageFull" in code:
            return NoRoom(text, hint="free space there, or let store.url name another place")
        if code in _DIGESTS:
            return _Mismatch(text, hint=_NETWORK)
        return _by_status(text, status)

    def _no_bucket(self) -> StoreUnavailable:
        return StoreUnavailable(f"there is no bucket {self._bucket}", hint="create it, or let store.url name another", status=404)


class S3Reading(AbstractContextManager["S3Reading"]):
    """A range of an object on its way in: called, it fills a view. A body that breaks is asked for again from there, so often in all."""

    def __init__(self, store: S3, key: str, offset: int, end: int, attempts: int, sleep: Callable[[float], None]) -> None:
        self._store, self._key, self._at, self._end = store, key, offset, end
        self._attempts, self._sleep = attempts, sleep
        self._asked = 0  # times
        self._body: StreamingBody | None = None

    def __call__(self, into: memoryview) -> None:
        view = into.cast("B")
        while view:
            body = self._body = self._body or self._ask()
            try:
                n = body.readinto(view[:_SLICE])  # type: ignore[arg-type]  # the stub's mistake
            except (BotoCoreError, HTTPError) as e:
                _log.info("the body of %s broke %d bytes too early: %s", self._key, self._end - self._at, type(e).__name__)
                n = 0
            if not n:
                self._drop()
            view, self._at = view[n:], self._at + n

    def _ask(self) -> StreamingBody:
        if self._asked == self._attempts:
            missing = self._end - self._at
            raise StoreUnavailable(
                f"the body of {self._key} broke {self._asked} times, {missing} bytes are missing", hint=_NETWORK
            )
        if self._asked:
            self._sleep(min(5.0, 0.1 * 2**self._asked) * random.random())
        self._asked += 1
        return self._store.body(self._key, self._at, self._end)

    def _drop(self) -> None:
        """A connection with a rest in it must not go back to the pool."""
        if self._body is not None:
            self._body.close()
            self._body = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._at < self._end:
            self._drop()


class S3Upload:
    """ports.Upload: parts go to the bucket while the next one fills; less than one part goes as one PutObject.

    Worst-case memory: `(parts_in_flight + 1) * part_size(last part)`, allocated as needed and reused; that is
    `(parts_in_flight + 1) * base` for an object of up to 1,000 parts, and with `base` 8 MiB a part has 151 MiB when
    the object has 100 GiB. Threads: `parts_in_flight`, from the first full part until the end.
    """

    def __init__(self, store: S3, key: str) -> None:
        self._store = store
        self._key = key
        self._token = uuid.uuid4().hex
        self._size = 0
        self._writable = True
        self._over = False  # committed, or aborted with nothing left
        self._stray = False  # an upload may be open in the bucket whose id we never learnt
        self._committing = False  # the object may be visible
        self._upload: _Multipart | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._flying: deque[Future[_Part]] = deque()
        self._landed: list[_Part] = []
        self._free: list[bytearray] = []
        self._buffer = bytearray()
        self._filled = 0

    def write(self, *pieces: Buffer) -> None:
        with self._breaking():
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while view:
                    n = self._fill(view)
                    view = view[n:]
                    if self._filled == len(self._buffer):
                        self._ship()

    def commit(self) -> ObjectFacts:
        """Raises with everything withdrawn, or, if even that failed, with the withdrawal left to `abort`."""
        with self._breaking():
            try:
                facts = self._finish()
            except HibernodeError:
                self.abort()
                raise
        self._writable, self._over = False, True
        self._stop_threads()
        self._best_effort(self._remove_strays)
        return facts

    def abort(self) -> None:
        """Waits for parts on their way (a request has time limits), else they would arrive after the abort and stay."""
        self._writable = False
        if self._over:
            return
        self._stop_threads()
        self._over = self._best_effort(self._remove)

    # --- filling and shipping ---

    def _fill(self, view: memoryview) -> int:
        if not self._buffer:
            self._buffer = self._take(part_size(len(self._landed) + len(self._flying) + 1, self._store.part_size))
        n = min(len(view), len(self._buffer) - self._filled)
        memoryview(self._buffer)[self._filled : self._filled + n] = view[:n]
        self._filled += n
        self._size += n
        return n

    def _take(self, size: int) -> bytearray:
        while self._flying and self._flying[0].done():
            self._land()
        self._free = [b for b in self._free if len(b) == size]
        return self._free.pop() if self._free else bytearray(size)

    def _ship(self) -> None:
        """Send the buffer on its way, when there is a place among the parts in flight."""
        if self._upload is None:
            self._stray = True
            self._upload = self._store.begin_parts(self._key, self._token)
            self._stray = self._upload.retries > 0
            self._pool = ThreadPoolExecutor(self._store.parts_in_flight, thread_name_prefix=f"s3 {self._key}")
        while len(self._flying) >= self._store.parts_in_flight:
            self._land()
        assert self._pool is not None
        number = len(self._landed) + len(self._flying) + 1
        self._flying.append(self._pool.submit(self._store.send_part, self._upload, number, self._buffer))
        self._buffer, self._filled = bytearray(), 0

    def _land(self) -> None:
        """Wait for the oldest part in flight; what failed it is raised here."""
        part = self._flying.popleft().result()
        self._landed.append(part)
        self._free.append(part.buffer)

    # --- ending ---

    def _finish(self) -> ObjectFacts:
        del self._buffer[self._filled :]
        if self._upload is not None and self._filled:
            self._ship()
        while self._flying:
            self._land()
        self._committing = True
        failure: HibernodeError | None = None
        try:
            if self._upload is None:
                self._store.put_object(self._key, self._buffer, self._token)
            else:
                self._store.complete(self._upload, self._landed)
        except _Mismatch:
            raise
        except (Refused, StoreUnavailable) as e:
            failure = e  # perhaps only the answer was lost, and what is there is ours
        crc = _composite([p.crc for p in self._landed]) if self._upload else _crc32(self._buffer)
        facts = self._store.landed(self._key, self._token, self._size, crc)
        if facts is None:
            raise failure or StoreUnavailable(f"{self._store.location} shows another {self._key} than was written")
        return facts

    def _remove(self) -> None:
        if self._upload is not None:
            self._store.abort_upload(OpenUpload(self._key, self._upload.id, 0.0))
        self._remove_strays()
        if self._committing:
            self._store.withdraw(self._key, self._token)

    def _remove_strays(self) -> None:
        """Uploads of this key that were begun by a call whose answer was lost."""
        if self._stray:
            for upload in self._store.open_uploads(self._key):
                if upload.key == self._key:
                    self._store.abort_upload(upload)

    def _best_effort(self, undo: Callable[[], None]) -> bool:
        """Whether `undo`, which may be repeated, worked; what it raises is logged."""
        try:
            undo()
        except HibernodeError as e:
            _log.warning("the upload of %s was not cleaned up, gc will find it: %s", self._key, e)
            return False
        return True

    def _stop_threads(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._flying.clear()
        self._free.clear()
        self._buffer, self._filled = bytearray(), 0

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """Whatever fails in here leaves only `abort` legal."""
        if not self._writable:
            raise Internal(f"the upload of {self._key} has ended or failed before")
        self._writable = False
        yield
        self._writable = True


# --- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Multipart:
    key: str
    token: str  # of the object that it becomes
    id: str
    checksums: bool  # the server keeps CRC32s, and wants them again at the end
    retries: int  # calls that it took; the earlier ones may have begun an upload too


@dataclass(frozen=True)
class _Part:
    number: int
    etag: str
    crc: str  # "": not computed, because the server does not know it
    size: int
    buffer: bytearray  # to be used again


class _Mismatch(StoreUnavailable):
    """The store has other bytes than we sent."""


class _NoSuchUpload(StoreUnavailable):
    """Aborted, or completed by a call whose answer was lost."""


_SERVICES = {"s3", "sts", "sso", "oidc", "portal.sso", "signin"}  # as AWS names their endpoints
_NETWORK = "check store.s3.endpoint_url, the network and the server"
_CREDENTIALS = (
    "check store.s3 credentials; the daemon needs GetObject, PutObject, DeleteObject, AbortMultipartUpload, ListBucket "
    "and ListBucketMultipartUploads"
)
_DIGESTS = ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")


def _clients(settings: config.S3) -> tuple[S3Client, S3Client]:
    """For all calls but UploadPart, and for that, with the SDK's own chain for what is not set. Over TLS they are one, which signs no
    body. Refused("config") if they cannot be made."""
    for name in ("botocore", "boto3", "urllib3"):  # at debug level they log headers: signatures and session tokens
        logging.getLogger(name).setLevel(logging.INFO)
    options = Config(
        connect_timeout=settings.connect_timeout,
        read_timeout=settings.read_timeout,
        retries={"mode": "standard", "total_max_attempts": settings.attempts},
        # A bound on idle connections, not on open ones.
        max_pool_connections=MAX_STREAMS * max(settings.parts_in_flight, settings.reads_in_flight),
        tcp_keepalive=True,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": settings.addressing},
    )
    unsigned = options.merge(Config(s3={"addressing_style": settings.addressing, "payload_signing_enabled": False}))
    try:
        core = botocore.session.Session()
        _cut_endpoints(core)
        session = boto3.session.Session(
            botocore_session=core,
            aws_access_key_id=settings.access_key_id or None,
            aws_secret_access_key=settings.secret_access_key.get_secret_value() or None,
            region_name=settings.region or None,
            profile_name=settings.profile or None,
        )
        endpoint = settings.endpoint_url or None
        parts = session.client("s3", endpoint_url=endpoint, config=unsigned)
        if parts.meta.endpoint_url.startswith("https:"):
            return parts, parts
        return session.client("s3", endpoint_url=endpoint, config=options), parts
    except (BotoCoreError, ValueError) as e:
        name = type(e).__name__
        raise Refused("config", f"no S3 client can be made: {name}", prop="store.s3", found=name, wanted="valid") from e


def _cut_endpoints(core: botocore.session.Session) -> None:
    """Keep what is known of every service of every region in mind only of those that we, or its credentials, call: the rest is 5 MiB. It is
    loaded once for each session."""
    for partition in core.get_component("data_loader").load_data("endpoints")["partitions"]:
        services = partition["services"]
        partition["services"] = {name: services[name] for name in _SERVICES & services.keys()}


def _by_status(text: str, status: int) -> HibernodeError:
    if status == 404:
        return NotFound(text)
    if status == 412:
        return Refused("exists", text, prop="object", found="one", wanted="none")
    if status == 416:
        return Corrupt(f"{text}: the object is shorter than that")
    hint = _CREDENTIALS if status in (401, 403) else _NETWORK if status >= 500 else ""
    return StoreUnavailable(text, hint=hint, status=status)


def _proof(answer: Mapping[str, Any], data: Buffer, crc: str, md5: bytes) -> bool | None:
    """Whether the server has these bytes, from what it answered; None if the answer does not tell. `crc`, `md5`: what is known already."""
    if echoed := answer.get("ChecksumCRC32"):
        return bool(echoed == (crc or _crc32(data)))
    etag = str(answer.get("ETag", "")).strip('"')
    encrypted = "kms" in str(answer.get("ServerSideEncryption", "")) or answer.get("SSECustomerAlgorithm")
    if encrypted or not re.fullmatch("[0-9a-f]{32}", etag):
        return None
    return etag == (md5 or hashlib.md5(data).digest()).hex()


def _contradicts(head: Mapping[str, Any], crc: str) -> bool:
    """Whether the server states another checksum. One of a kind that we did not compute says nothing."""
    stated = str(head.get("ChecksumCRC32", ""))
    whole = head.get("ChecksumType") == "FULL_OBJECT" or "-" not in stated
    return bool(stated and crc) and whole == ("-" not in crc) and stated != crc


def _composite(crcs: Sequence[str]) -> str:
    """The CRC32 that S3 gives an object of parts: that of their CRC32s, and their number. "" where one was not computed."""
    if not all(crcs):
        return ""
    return f"{_crc32(b''.join(base64.b64decode(c) for c in crcs))}-{len(crcs)}"


def _crc32(data: Buffer) -> str:
    return _base64(zlib_ng.crc32(data).to_bytes(4, "big"))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _token(head: Mapping[str, Any]) -> str:
    """Our token; some servers answer names of metadata with capitals."""
    return next((v for k, v in head["Metadata"].items() if k.lower() == _TOKEN), "")


def _facts(key: str, head: HeadObjectOutputTypeDef) -> ObjectFacts:
    return ObjectFacts(key, head["ContentLength"], head["LastModified"].timestamp())


def _code(error: ClientError) -> str:
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code if re.fullmatch(r"[A-Za-z0-9.]{1,64}", code) else "an error without a code"


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
