"""One row per refusal: its code, the property, and both values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from hibernode import preflight
from hibernode.config import Config
from hibernode.drivers.host import LinuxHost
from hibernode.errors import Corrupt, HibernodeError, NoRoom, Refused
from hibernode.model import (
    PAGE,
    CheckpointCommand,
    ContainerFacts,
    CriuOpts,
    Gpu,
    GpuImage,
    GpuInventory,
    HostFacts,
    ImageRef,
    Manifest,
    ObjectRef,
    Overrides,
    Target,
    TaskFacts,
    WorkloadFacts,
    WorkloadKind,
    lacking,
)
from hibernode.ports import CriuFacts, CriuOptions, Load, ProcessFacts
from hibernode.transfer import format

ID = "0123abcd-0123-4567-89ab-0123456789ab"
CONFIG = Config(node="n")
PROCESS = ProcessFacts(50, 1, "train", "S", 50, False, 0, 0, PAGE, ((0, "/dev/null"), (1, "/tmp/log")))
COMMAND = CheckpointCommand(action_id=ID, checkpoint_id=ID, target=Target(pid=50))
ROOTFS = COMMAND.model_copy(update={"kind": "rootfs"})
PROCESS_FACTS, JOB_FACTS = WorkloadFacts(kind="process", name="train"), WorkloadFacts(kind="job", name="train")
POD_FACTS = WorkloadFacts(kind="pod", name="train", namespace="here", kubelet=True)
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
    preflight.checkpoint(COMMAND, PROCESS_FACTS, [PROCESS, replace(PROCESS, pid=51, **process)], criu)  # type: ignore[arg-type]


OTHERS = "another name than attempt, manifest.json, removing, unwanted"


def named(container: str, kind: WorkloadKind = "pod") -> None:
    facts = POD_FACTS.model_copy(update={"containers": [ContainerFacts(name="a"), ContainerFacts(name=container)]})
    preflight.checkpoint(COMMAND, facts if kind == "pod" else WorkloadFacts(kind=kind, name=container), [], CriuOptions())


def kept(**connections: str) -> None:
    """Of a pod, by container."""
    processes = [replace(PROCESS, image=name, tcp=tuple(said.split(", "))) for name, said in connections.items()]
    preflight.checkpoint(COMMAND, POD_FACTS, processes, CriuOptions(tcp="established"))


def on_the_node(facts: WorkloadFacts = POD_FACTS, tcp: str = "established") -> None:
    processes = [PROCESS, replace(PROCESS, image="main", nodes_network=True)]
    preflight.checkpoint(COMMAND, facts, processes, CriuOptions(tcp=tcp))


BETWEEN, TOGETHER = "127.0.0.1:1 -> 127.0.0.1:2 in 'b'", "both ends in one container"


def chosen(**overrides: object) -> preflight.Options:
    return preflight.options(Overrides.model_validate(overrides), CONFIG, cpus=2)


def restored(here: HostFacts = HERE, criu: CriuFacts = CRIU, **made: object) -> None:
    preflight.restore(manifest(**made), here, criu)  # type: ignore[arg-type]


def cpu(*flags: str) -> HostFacts:
    return HERE.model_copy(update={"cpu_model": "small", "cpu_flags": ["fpu", "sse2", *flags]})


def made_on(*flags: str) -> dict[str, object]:
    return {"cpu_model": "large", "cpu_flags": ["fpu", "sse2", *flags]}


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


def gpu(number: int, name: str = "H100", **more: object) -> Gpu:
    facts: dict[str, object] = {"name": name, "compute_capability": "9.0", "memory_total": 80 << 30, "mig": False, **more}
    return Gpu(index=number, uuid=f"GPU-00000000-0000-4000-8000-{number:012}", **facts)  # type: ignore[arg-type]


def machine(*gpus: Gpu, driver: str = "580.1", cuda: str = "13.0", state: str = "ok") -> GpuInventory:
    return GpuInventory(state=state, reason="" if state == "ok" else "why", driver=driver, cuda=cuda, gpus=list(gpus))


def on_gpus(*gpus: Gpu, used: Sequence[Gpu] = ()) -> GpuImage:
    found = preflight.gpu_image([7], machine(*gpus), {7: {each.uuid: 1 << 30 for each in (used or gpus)}})
    assert found is not None
    return found


def shown(name: str) -> str:
    return f"{name} 9.0 of {80 << 30} bytes"


def placed(image: GpuImage, *here: Gpu, **more: str) -> list[dict[str, str]]:
    return preflight.gpu_places(image, machine(*here, **more))


def test_a_gpu_that_was_not_used_needs_no_place() -> None:
    image = on_gpus(gpu(1), gpu(2), used=[gpu(1)])
    assert placed(image, gpu(2)) == [{gpu(1).uuid: gpu(2).uuid}]
    assert placed(image, gpu(1)) == []
    assert placed(image, gpu(3), gpu(2)) == [{gpu(1).uuid: gpu(3).uuid, gpu(2).uuid: gpu(2).uuid}, {gpu(1).uuid: gpu(3).uuid}]


def test_what_a_workload_has_on_gpus_comes_beside_its_memory() -> None:
    assert preflight.gpu_memory(on_gpus(gpu(1)), machine(gpu(1)), 2 << 30) == 1 << 30
    unknown = preflight.gpu_image([7, 8], machine(gpu(1)), {7: {gpu(1).uuid: 1 << 30}})
    assert preflight.gpu_memory(unknown, machine(gpu(1, memory_used=5 << 30)), 9 << 30) == 5 << 30


def test_gpus_that_are_here_are_used_as_they_were() -> None:
    assert placed(on_gpus(gpu(1), gpu(2)), gpu(2), gpu(1), gpu(3)) == []


def test_a_gpu_that_is_not_here_is_replaced_by_one_of_its_kind_and_all_are_named() -> None:
    found = placed(on_gpus(gpu(1), gpu(2)), gpu(2), gpu(3, "A100"), gpu(4))
    assert found == [{gpu(1).uuid: gpu(4).uuid, gpu(2).uuid: gpu(2).uuid}]


ANY_GPU = "driver, and of every GPU UUID, name, compute capability and memory"
ROWS = [
    Row("host_memory", lambda: preflight.gpu_memory(on_gpus(gpu(1)), machine(gpu(1)), 10), "memory available", 10, (1 << 30) * 11 // 10),
    Row("gpu_inventory", lambda: preflight.gpu_image([7], machine(state="failed"), {}), "NVML", "why", ANY_GPU),
    Row("gpu_inventory", lambda: on_gpus(gpu(1, "")), "NVML", "a GPU without its facts", ANY_GPU),
    Row("gpu_design", lambda: preflight.gpu_workload(POD_FACTS, "stop"), "gpu.design", "stop", "lock"),
    Row("gpu_mig", lambda: on_gpus(gpu(1, mig=True)), "MIG", "on", "off"),
    Row("gpu_mps", lambda: on_gpus(gpu(1), gpu(2, mps_processes=1)), "MPS", "on", "off"),
    Row("vram", lambda: preflight.gpu_room(on_gpus(gpu(1)), [], machine(gpu(1, memory_free=5))), "GPU memory free", 5, 1 << 30),
    Row("gpu_driver_mismatch", lambda: placed(on_gpus(gpu(1)), gpu(1), driver="570.1"), "NVIDIA driver", "570.1", "580.1"),
    Row("gpu_driver_mismatch", lambda: placed(on_gpus(gpu(1)), driver=""), "NVIDIA driver", "none", "580.1"),
    Row("gpu_driver_too_old", lambda: placed(on_gpus(gpu(1)), gpu(2), cuda="12.8"), "CUDA", "12.8", "13.0"),
    Row("gpu_model", lambda: placed(on_gpus(gpu(1)), gpu(2, "A100")), "GPU", shown("A100"), shown("H100")),
    Row("gpu_model", lambda: placed(on_gpus(gpu(1), gpu(2)), gpu(3)), "GPU", shown("H100"), shown("H100")),
    Row(
        "kubelet",
        lambda: preflight.checkpoint(COMMAND, POD_FACTS, [], CriuOptions(leave_stopped=True), endable=False),
        "criu_opts.leave_running", False, True,
    ),
    *(
        Row("container_name", functools.partial(named, name), "container", name, OTHERS)
        for name in ("attempt", "manifest.json", "removing", "unwanted")
    ),
    Row("container_name", functools.partial(named, "attempt", "container"), "container", "attempt",
        OTHERS),
    Row("link_remap", lambda: dumped(criu=CriuOptions(link_remap=True)), "criu_opts.link_remap", True,
        "a process that is killed by its checkpoint"),
    Row("link_remap", lambda: preflight.checkpoint(COMMAND, POD_FACTS, [], CriuOptions(link_remap=True, leave_stopped=True)),
        "criu_opts.link_remap", True, "a process that is killed by its checkpoint"),
    Row("kind", lambda: preflight.checkpoint(ROOTFS, JOB_FACTS, [], CriuOptions()), "kind", "rootfs", "simple"),
    Row("traced", lambda: dumped(tracer=99), "TracerPid", 99, 0),
    Row("io_uring", lambda: dumped(fds=((4, "anon_inode:[io_uring]"),)), "fd 4", "anon_inode:[io_uring]", "no io_uring descriptor"),
    Row("terminal", lambda: dumped(fds=((0, "/dev/pts/3"),)), "fd 0", "/dev/pts/3", "no terminal"),
    Row("terminal", lambda: dumped(fds=((0, "/dev/tty"),)), "fd 0", "/dev/tty", "no terminal"),
    Row("cap_sys_resource", lambda: dumped(ids=frozenset({0, 7}), limits=False), "uids and gids", [7], "0, or CAP_SYS_RESOURCE"),
    Row("tcp_established", lambda: dumped(tcp=("a -> b", "c -> d")), "tcp", "a -> b", "none"),
    Row("tcp_peer", lambda: kept(a="127.0.0.1:1 -> 127.0.0.1:2", b="127.0.0.1:2 -> 127.0.0.1:1"), "tcp", BETWEEN, TOGETHER),
    Row("tcp_peer", lambda: kept(a="9.0.0.1:1 -> 9.0.0.1:2", b="9.0.0.1:2 -> 9.0.0.1:1"), "tcp", "9.0.0.1:1 -> 9.0.0.1:2 in 'b'", TOGETHER),
    Row("tcp_peer", lambda: kept(a="[::1]:1 -> [::1]:2"), "tcp", "[::1]:1 -> [::1]:2", TOGETHER),
    Row("host_network", on_the_node, "network", "the node's", "the pod's own"),
    Row("host_network", lambda: on_the_node(PROCESS_FACTS), "network", "the node's", "the pod's own"),
    Row("streams", lambda: chosen(streams=65), "streams", 65, "1 to 64"),
    Row("streams", lambda: chosen(streams=-1), "streams", -1, "1 to 64"),
    Row("compression", lambda: chosen(compression="lz5"), "compression", "lz5", "zstd, zstd:<-7 to 19>, lz4, none"),
    Row("expired", lambda: preflight.expired(10.0, 11.0), "expires_at", 11.0, "before 10.0"),
    Row("no_room", lambda: preflight.room(50 << 20, (1 << 20) - 1, 1 << 30), "store free bytes", (1 << 20) - 1, 1 << 20, NoRoom),
    Row("no_room", lambda: preflight.room(0, None, (16 << 20) - 1), "work_dir free bytes", (16 << 20) - 1, 16 << 20, NoRoom),
    Row("arch", lambda: restored(arch="aarch64"), "arch", "x86_64", "aarch64"),
    Row("page_size", lambda: restored(page_size=65536), "page_size", PAGE, 65536),
    Row("page_size", lambda: restored(HERE.model_copy(update={"page_size": 65536})), "page_size", 65536, PAGE),
    Row("cpu_features", lambda: restored(cpu("avx2"), **made_on("avx512f", "avx2", "amx_tile", "smap")), "CPU flags",
        "small, without amx_tile, avx512f", "large, with amx_tile, avx512f", more={"missing": ["amx_tile", "avx512f"]}),
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
    assert error.message[0].islower() or error.message.startswith(("CRIU", "TCP", "GPU"))
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
    dumped(ids=frozenset({0, 7}))
    dumped(fds=((0, "/dev/null"), (1, "pipe:[7]"), (2, "/dev/shm/x"), (3, "socket:[1]"), (4, "/home/dev/pts/log")))
    dumped(tcp=("a -> b",), criu=CriuOptions(tcp="close"))
    kept(a="127.0.0.1:1 -> 127.0.0.1:2, 127.0.0.1:2 -> 127.0.0.1:1", b="10.0.0.1:1 -> 10.0.0.2:2")
    on_the_node(tcp="close")
    preflight.room(50 << 20, 1 << 20, 16 << 20)
    preflight.room(1 << 50, None, 1 << 30)
    preflight.expired(0.0, 1e12)
    preflight.expired(10.0, 10.0)
    restored()
    restored(criu=CriuFacts(40299, ""), criu_version=40201)
    restored(criu_version=40299)
    restored(cpu("avx2"))  # by a writer that did not say
    restored(cpu("avx2", "avx512f", "amx_tile"), **made_on("avx2"))
    preflight.restore_room(manifest(pages=1 << 20, zero=1 << 20), 500, LOAD)
    preflight.pids([])


XEON = """
fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush dts acpi mmx fxsr sse sse2 ss ht tm pbe syscall
nx pdpe1gb rdtscp lm constant_tsc art arch_perfmon pebs bts rep_good nopl xtopology nonstop_tsc cpuid aperfmperf pni pclmulqdq
dtes64 monitor ds_cpl vmx smx est tm2 ssse3 sdbg fma cx16 xtpr pdcm pcid dca sse4_1 sse4_2 x2apic movbe popcnt
tsc_deadline_timer aes xsave avx f16c rdrand lahf_lm abm 3dnowprefetch cpuid_fault epb cat_l3 ssbd mba ibrs ibpb stibp
ibrs_enhanced tpr_shadow flexpriority ept vpid ept_ad fsgsbase tsc_adjust bmi1 hle avx2 smep bmi2 erms invpcid rtm cqm rdt_a
avx512f avx512dq rdseed adx smap avx512ifma clflushopt clwb intel_pt avx512cd sha_ni avx512bw avx512vl xsaveopt xsavec xgetbv1
xsaves cqm_llc cqm_occup_llc cqm_mbm_total split_lock_detect user_shstk avx_vnni avx512_bf16 wbnoinvd dtherm ida arat pln pts
vnmi avx512vbmi umip pku ospke waitpkg avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq la57
rdpid bus_lock_detect cldemote movdiri movdir64b enqcmd fsrm md_clear serialize tsxldtrk pconfig arch_lbr ibt amx_bf16
avx512_fp16 amx_tile amx_int8 flush_l1d arch_capabilities
"""
SETS_OF_XEON = """
abm adx aes amx_bf16 amx_int8 amx_tile avx avx2 avx512_bf16 avx512_bitalg avx512_fp16 avx512_vbmi2 avx512_vnni avx512_vpopcntdq
avx512bw avx512cd avx512dq avx512f avx512ifma avx512vbmi avx512vl avx_vnni bmi1 bmi2 clflushopt clwb cx16 enqcmd f16c fma
fsgsbase gfni lahf_lm movbe movdir64b movdiri ospke pclmulqdq pni popcnt rdpid rdrand rdseed rdtscp rtm serialize sha_ni sse4_1
sse4_2 ssse3 tsxldtrk user_shstk vaes vpclmulqdq waitpkg xgetbv1 xsave xsavec xsaveopt
"""


def test_only_what_user_space_can_execute_counts() -> None:
    """Of a large Xeon, with what a kernel says of itself and of its host, against a CPU with no more than every x86-64 has."""
    xeon = XEON.split()
    assert lacking(xeon, ["fpu", "sse", "sse2"]) == SETS_OF_XEON.split()
    assert lacking(xeon, xeon) == []
    assert lacking(["sse2"], xeon) == lacking([], []) == []
    assert lacking(["avx10_2", "amx_fp8", "unheard_of"], xeon) == ["amx_fp8", "avx10_2"]


def test_this_machine_says_what_its_cpu_has() -> None:
    here = LinuxHost().facts()
    assert {"fpu", "sse2"} <= set(here.cpu_flags)
    assert lacking(here.cpu_flags, here.cpu_flags) == []
    assert here.cpu_model


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


def test_an_increment_is_asked_for_each_time_and_is_in_no_manifest() -> None:
    """Readers of versions 1 and 2 would not know the key."""
    found = preflight.options(Overrides(criu_opts='{"increment": "auto"}'), CONFIG, 2)
    assert found.increment == "auto"
    assert "increment" not in found.criu_opts.model_dump_json()
    assert not preflight.options(Overrides(), CONFIG, 2, CriuOpts(increment="auto")).increment
    with pytest.raises(Refused, match="not of a restore"):
        preflight.options(Overrides(criu_opts='{"increment": "auto"}'), CONFIG, 2, CriuOpts())


def test_the_manifest_says_how_connections_were_dumped_also_if_the_configuration_said_so() -> None:
    """Else a node with another configuration could not restore it."""
    where_made: Any = Config.model_validate({"criu": {"tcp": "close"}})
    recorded = preflight.options(Overrides(), where_made, 2).criu_opts
    assert preflight.options(Overrides(), CONFIG, 2, recorded).criu.tcp == "close"
