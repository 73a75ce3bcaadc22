"""One row per refusal: its code, the property, and both values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from hibernode import preflight
from hibernode.config import Config
from hibernode.errors import Corrupt, HibernodeError, NoRoom, Refused
from hibernode.model import (
    PAGE,
    CheckpointCommand,
    CriuOpts,
    HostFacts,
    ImageRef,
    Manifest,
    ObjectRef,
    Overrides,
    Target,
    TaskFacts,
    WorkloadFacts,
)
from hibernode.ports import CriuFacts, CriuOptions, Load, ProcessFacts
from hibernode.transfer import format

ID = "0123abcd-0123-4567-89ab-0123456789ab"
CONFIG = Config(node="n")
PROCESS = ProcessFacts(50, 1, "train", "S", 50, False, 0, 0, PAGE, ((0, "/dev/null"), (1, "/tmp/log")))
COMMAND = CheckpointCommand(action_id=ID, checkpoint_id=ID, target=Target(pid=50))
HERE = HostFacts(arch="x86_64", kernel="6", page_size=PAGE, criu_version=0)
CRIU = CriuFacts(40201, "/usr/sbin/criu")
INDEX = 32 + (1 << 20) * 32 + (1 << 19) * (32 + 64 + 128)  # of 2 GiB, at most
MOST = format.MAX_INDEX
LOAD = Load(cpus=2, memory_total=1 << 30, memory_available=1 << 30, load=0.0)


def manifest(images: int = 1, *, pages: int = 100, zero: int = 0, unpacked: int = 0, **host: object) -> Manifest:
    def image(n: int) -> ImageRef:
        ref = ObjectRef(key=f"i{n}/index.zst", size=500, digest="0" * 64)
        return ImageRef(
            name=f"i{n}", tasks=[TaskFacts(pid=7)], pages=pages, zero_pages=zero, streams=[], index=ref,
            files=ref.model_copy(update={"key": f"i{n}/images.tar.zst"}), files_bytes=unpacked,
        )  # fmt: skip

    made = HERE.model_copy(update={"criu_version": 40201, **host})
    return Manifest(
        format_version=1, checkpoint_id=ID, action_id=ID, created_at=1.0, node="n", kind="simple", reason="manual",
        workload=WorkloadFacts(kind="job", name="a"), host=made, compression="zstd", pause_ns=0, raw_bytes=0, zero_bytes=0,
        stored_bytes=0, images=[image(n) for n in range(images)],
    )  # fmt: skip


def dumped(*, criu: CriuOptions = CriuOptions(), **process: object) -> None:  # noqa: B008 - frozen
    preflight.checkpoint(COMMAND, [PROCESS, replace(PROCESS, pid=51, **process)], criu)  # type: ignore[arg-type]


def chosen(**overrides: object) -> preflight.Options:
    return preflight.options(Overrides.model_validate(overrides), CONFIG, cpus=2)


def restored(here: HostFacts = HERE, criu: CriuFacts = CRIU, **made: object) -> None:
    preflight.restore(manifest(**made), here, criu)  # type: ignore[arg-type]


def room_for(image: Manifest, work_free: int) -> None:
    preflight.restore_room(image, work_free, LOAD)


@dataclass(frozen=True)
class Row:
    code: str
    work: Callable[[], object]
    prop: str
    found: object
    wanted: object
    kind: type[HibernodeError] = Refused
    more: dict[str, object] = field(default_factory=dict)


ROWS = [
    Row("kind", lambda: preflight.checkpoint(COMMAND.model_copy(update={"kind": "rootfs"}), [], CriuOptions()), "kind", "rootfs", "simple"),
    Row("traced", lambda: dumped(tracer=99), "TracerPid", 99, 0),
    Row("io_uring", lambda: dumped(fds=((4, "anon_inode:[io_uring]"),)), "fd 4", "anon_inode:[io_uring]", "no io_uring descriptor"),
    Row("gpu_open", lambda: dumped(fds=((5, "/dev/nvidia0"),)), "fd 5", "/dev/nvidia0", "no GPU device"),
    Row("gpu_open", lambda: dumped(fds=((5, "/dev/nvidiactl"),)), "fd 5", "/dev/nvidiactl", "no GPU device"),
    Row("terminal", lambda: dumped(fds=((0, "/dev/pts/3"),)), "fd 0", "/dev/pts/3", "no terminal"),
    Row("terminal", lambda: dumped(fds=((0, "/dev/tty"),)), "fd 0", "/dev/tty", "no terminal"),
    Row("tcp_established", lambda: dumped(tcp=("a -> b", "c -> d")), "tcp", "a -> b", "none"),
    Row("streams", lambda: chosen(streams=65), "streams", 65, "1 to 64"),
    Row("streams", lambda: chosen(streams=-1), "streams", -1, "1 to 64"),
    Row("compression", lambda: chosen(compression="lz4"), "compression", "lz4", "zstd, zstd:<-7 to 19>, none"),
    Row("expired", lambda: preflight.expired(10.0, 11.0), "expires_at", 11.0, "before 10.0"),
    Row("no_room", lambda: preflight.room(50 << 20, (1 << 20) - 1, 1 << 30), "store free bytes", (1 << 20) - 1, 1 << 20, NoRoom),
    Row("no_room", lambda: preflight.room(0, None, (16 << 20) - 1), "work_dir free bytes", (16 << 20) - 1, 16 << 20, NoRoom),
    Row("arch", lambda: restored(arch="aarch64"), "arch", "x86_64", "aarch64"),
    Row("page_size", lambda: restored(page_size=65536), "page_size", PAGE, 65536),
    Row("page_size", lambda: restored(HERE.model_copy(update={"page_size": 65536})), "page_size", 65536, PAGE),
    Row("criu_too_old", lambda: restored(criu_version=40300), "criu", "4.2.1", "4.3"),
    Row("no_room", lambda: room_for(manifest(), 100 * PAGE), "work_dir free bytes", 100 * PAGE, 100 * PAGE + 500, NoRoom),
    Row("no_room", lambda: room_for(manifest(unpacked=7000), 7000), "work_dir free bytes", 7000, 100 * PAGE + 7500, NoRoom),
    Row("no_room", lambda: room_for(manifest(pages=1 << 19), 1 << 40), "memory available", 1 << 30, (1 << 31) + 500 + INDEX, NoRoom),
    Row("no_room", lambda: room_for(manifest(pages=1 << 40, zero=1 << 40), 1 << 40), "memory available", 1 << 30, MOST + 500, NoRoom),
    Row("pid_taken", lambda: preflight.pids([(7, "'bash'"), (8, "'vi'")]), "pid", "7: 'bash'", "free", more={"pids": [7, 8]}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.code} {row.prop}")
def test_every_refusal_names_the_property_and_both_values(row: Row) -> None:
    with pytest.raises(row.kind) as raised:
        row.work()
    error = raised.value
    assert error.code == row.code
    assert error.details["property"] == row.prop
    assert (error.details["found"], error.details["wanted"]) == (row.found, row.wanted)
    assert {key: error.details[key] for key in row.more} == row.more
    assert error.hint
    assert error.message[0].islower() or error.message.startswith(("CRIU", "TCP"))
    assert not error.message.endswith(".")
    assert error.retry is (row.kind is NoRoom)


OPTS: list[tuple[str, str]] = [
    ('{"tcp": "drop"}', "tcp"),
    ('{"tcp": true}', "tcp"),
    ('{"leave_running": "no"}', "leave_running"),
    ('{"leave_running": 0}', "leave_running"),
    ('{"ghost_limit": -1}', "ghost_limit"),
    ('{"ghost_limit": 2000000000}', "ghost_limit"),
    ('{"timeout": 0}', "timeout"),
    ('{"timeout": 1.5}', "timeout"),
    ('{"manage_cgroups": true}', "manage_cgroups"),
    ('{"action_script": "/bin/sh"}', "action_script"),
    ("[]", ""),
    ("{", ""),
    ("null", ""),
    ('"x"', ""),
    ("\x00", ""),
]


@pytest.mark.parametrize(("text", "key"), OPTS)
def test_criu_opts_are_refused_with_their_key(text: str, key: str) -> None:
    with pytest.raises(Refused) as refused:
        chosen(criu_opts=text)
    error = refused.value
    assert error.code == "criu_opts"
    assert error.details["property"] == (f"criu_opts.{key}" if key else "criu_opts")
    assert "leave_running" in str(error.details["wanted"])
    assert error.details["found"]
    assert error.hint


def test_a_long_criu_opts_does_not_come_back_whole() -> None:
    with pytest.raises(Refused) as refused:
        chosen(criu_opts='{"tcp": "' + "x" * 10_000 + '"}')
    assert len(str(refused.value.details["found"])) <= 200


def test_nothing_is_refused_without_a_reason() -> None:
    dumped()
    dumped(fds=((0, "/dev/null"), (1, "pipe:[7]"), (2, "/dev/shm/x"), (3, "socket:[1]"), (4, "/home/dev/pts/log")))
    dumped(tcp=("a -> b",), criu=CriuOptions(tcp="close"))
    preflight.room(50 << 20, 1 << 20, 16 << 20)
    preflight.room(1 << 50, None, 1 << 30)
    preflight.expired(0.0, 1e12)
    preflight.expired(10.0, 10.0)
    restored()
    restored(criu=CriuFacts(40299, ""), criu_version=40201)
    restored(criu_version=40299)
    preflight.restore_room(manifest(pages=1 << 20, zero=1 << 20), 500, LOAD)
    preflight.pids([])


@pytest.mark.parametrize("images", [2, 3])
def test_a_process_has_one_image(images: int) -> None:
    with pytest.raises(Corrupt):
        restored(images=images)


# ---- what the options come to -----------------------------------------------------------------------------------------------


def test_the_configuration_is_the_default() -> None:
    found = chosen()
    assert found.criu == CriuOptions(log_level=2)
    assert (found.compression, found.level, found.streams, found.kill) == ("zstd", 1, 2, False)


def test_a_command_is_over_the_configuration() -> None:
    settings = Config.model_validate(
        {"transfer": {"compression": "none", "streams": 3}, "criu": {"tcp": "close", "timeout": 9, "ghost_limit": 5}}
    )
    found = preflight.options(Overrides(), settings, cpus=64)
    assert (found.level, found.streams, found.criu.tcp, found.criu.timeout, found.criu.ghost_limit) == (None, 3, "close", 9, 5)
    mine = Overrides(
        compression="zstd:7",
        streams=5,
        criu_opts='{"tcp": "established", "timeout": 1, "ghost_limit": 0, "leave_running": false}',
    )
    found = preflight.options(mine, settings, cpus=64)
    assert (found.level, found.streams, found.criu.tcp, found.criu.timeout, found.criu.ghost_limit) == (7, 5, "established", 1, 0)
    assert found.kill
    assert found.criu.leave_stopped


@pytest.mark.parametrize(("cpus", "streams"), [(1, 1), (2, 2), (8, 8), (64, 8)])
def test_streams_are_as_many_as_cpus_up_to_eight(cpus: int, streams: int) -> None:
    assert preflight.options(Overrides(), CONFIG, cpus).streams == streams


def test_a_restore_uses_what_the_checkpoint_was_made_with() -> None:
    """As it comes back from a manifest: every key is there, also those nobody set."""
    made = CriuOpts.model_validate_json(
        CriuOpts(tcp="close", ext_unix_sk=True, leave_running=False, ghost_limit=7).model_dump_json()
    )
    found = preflight.options(Overrides(), CONFIG, 2, made)
    assert (found.criu.tcp, found.criu.ext_unix_sk, found.criu.ghost_limit) == ("close", True, 7)
    assert not found.kill, "that was about the old tree"
    found = preflight.options(Overrides(criu_opts='{"tcp": "established", "ext_unix_sk": false}'), CONFIG, 2, made)
    assert (found.criu.tcp, found.criu.ext_unix_sk) == ("established", False)


def test_the_manifest_says_how_connections_were_dumped_also_if_the_configuration_said_so() -> None:
    """Else a node with another configuration could not restore it."""
    where_made: Any = Config.model_validate({"criu": {"tcp": "close"}})
    recorded = preflight.options(Overrides(), where_made, 2).criu_opts
    assert preflight.options(Overrides(), CONFIG, 2, recorded).criu.tcp == "close"
