"""A store in memory that keeps every promise of ports.Store; `tests/contract/test_store.py` holds it to that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hibernode.errors import Corrupt, Internal, NotFound, Refused, StoreUnavailable
from hibernode.model import checked_key, checked_prefix
from hibernode.ports import Buffer, ObjectFacts, OpenUpload
from tests.fakes.script import Script


class MemoryStore:
    """ports.Store. Steps: `store.check`, `.upload`, `.write`, `.commit`, `.put`, `.get`, `.read`, `.stat`, `.list`,
    `.delete`, each with the last name of its key; `store.abort` is only noted."""

    location = "memory:///"

    def __init__(self, script: Script | None = None) -> None:
        self._script = script or Script()
        self._lock = threading.Lock()
        self._modified: dict[str, float] = {}
        self.objects: dict[str, bytes] = {}  # a test may damage what is in here
        self.uploads: list[MemoryUpload] = []  # begun and neither committed nor aborted: empty when all is well

    @property
    def reads_in_flight(self) -> int:
        return 1

    def check(self) -> None:
        self._script.step("store.check")

    lingers = False

    def free_bytes(self) -> int | None:
        return None

    def upload(self, key: str) -> MemoryUpload:
        checked_key(key)
        self.step("upload", key)
        upload = MemoryUpload(self, key)
        with self._lock:
            self.uploads.append(upload)
        return upload

    def put(self, key: str, data: bytes) -> None:
        checked_key(key)
        self.step("put", key)
        with self._lock:
            self._keep(key, data)

    def get(self, key: str, *, limit: int) -> bytes:
        checked_key(key)
        self.step("get", key)
        data = self._data(key)
        if len(data) > limit:
            raise Corrupt(f"{key} has {len(data)} bytes, at most {limit} were expected")
        return data

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        checked_key(key)
        self.step("read", key)
        view = into.cast("B")
        data = memoryview(self._data(key))[offset : offset + len(view)]
        if len(data) < len(view):
            raise Corrupt(f"{key} ends {len(view) - len(data)} bytes too early")
        view[:] = data

    @contextmanager
    def reading(self, key: str, offset: int, size: int) -> Iterator[Callable[[memoryview], None]]:
        at = offset

        def fill(into: memoryview) -> None:
            nonlocal at
            self.read_into(key, at, into)
            at += into.nbytes

        yield fill

    def stat(self, key: str) -> ObjectFacts:
        checked_key(key)
        self.step("stat", key)
        return ObjectFacts(key, len(self._data(key)), self._modified[key])

    def list(self, prefix: str = "") -> Iterator[ObjectFacts]:
        checked_prefix(prefix)
        self.step("list", prefix)
        with self._lock:
            found = [ObjectFacts(k, len(v), self._modified[k]) for k, v in self.objects.items() if k.startswith(prefix)]
        yield from sorted(found, key=lambda facts: facts.key)

    def delete(self, key: str) -> None:
        checked_key(key)
        self.step("delete", key)
        with self._lock:
            self.objects.pop(key, None)

    def open_uploads(self, prefix: str = "") -> Iterator[OpenUpload]:
        checked_prefix(prefix)
        with self._lock:
            uploads = [*self.uploads]
        yield from (OpenUpload(u.key, str(id(u)), u.began) for u in uploads if u.key.startswith(prefix))

    def abort_upload(self, upload: OpenUpload) -> None:
        with self._lock:
            self.uploads = [u for u in self.uploads if str(id(u)) != upload.id]

    def _data(self, key: str) -> bytes:
        with self._lock:
            if key not in self.objects:
                raise NotFound(f"no object {key} in {self.location}")
            return self.objects[key]

    def _keep(self, key: str, data: bytes) -> ObjectFacts:
        if key in self.objects:
            raise Refused("exists", f"{key} is already there", prop="object", found=key, wanted="no object of that key")
        self.objects[key] = bytes(data)
        self._modified[key] = time.time()
        return ObjectFacts(key, len(data), self._modified[key])

    # --- for MemoryUpload ---

    def step(self, verb: str, key: str) -> None:
        self._script.step(f"store.{verb} {key.rpartition('/')[2]}".rstrip())

    def finish(self, upload: MemoryUpload, data: bytes | None) -> ObjectFacts | None:
        """No longer open; visible if there is `data`, if that may be, and if nobody has aborted it."""
        with self._lock:
            if data is not None and not any(u is upload for u in self.uploads):
                raise StoreUnavailable(f"the upload of {upload.key} is gone")
            facts = None if data is None else self._keep(upload.key, data)
            self.uploads = [u for u in self.uploads if u is not upload]
            return facts

    def note(self, verb: str, key: str) -> None:
        self._script.note(f"store.{verb} {key.rpartition('/')[2]}")


class MemoryUpload:
    def __init__(self, store: MemoryStore, key: str) -> None:
        self._store = store
        self._data = bytearray()
        self._writable = True
        self.key = key
        self.began = time.time()

    def write(self, *pieces: Buffer) -> None:
        self._break()
        self._store.step("write", self.key)
        for piece in pieces:
            self._data += piece
        self._writable = True

    def commit(self) -> ObjectFacts:
        self._break()
        self._store.step("commit", self.key)
        facts = self._store.finish(self, bytes(self._data))
        assert facts is not None
        return facts

    def abort(self) -> None:
        self._writable = False
        self._store.note("abort", self.key)
        self._store.finish(self, None)

    def _break(self) -> None:
        if not self._writable:
            raise Internal(f"the upload of {self.key} has ended or failed before")
        self._writable = False
