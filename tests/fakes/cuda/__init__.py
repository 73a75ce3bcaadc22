"""A machine with NVIDIA GPUs, without any: `fakecuda.c` and `fakenvml.c` built into a libcuda.so.1 and a libnvidia-ml.so.1 that the real
cuda-bindings and nvidia-ml-py load, and a folder that is the machine (what lies in it is described at the head of `fakecuda.c`).

A green run on it says that our order of calls, and what we make of the driver's answers, is right. It says nothing about a GPU.

A descriptor that CRIU refuses and that has a major of its own, as /dev/nvidia* has: tried with CRIU 4.2.1 on a 6.18 kernel, with nodes made
by mknod under another name and held open. "Can't dump file ... of that type (chr ...)", and the tree runs on, with /dev/cpu/0/cpuid
(203:0), and with fuse, userfaultfd, kvm, vga_arbiter, loop-control, vsock and cpu_dma_latency (all major 10). It dumps null and kmsg (major
1), and knows net/tun and autofs (major 10). None of them can be mapped. So `node()` takes cpuid, whose major nothing else has, where
there is one, else fuse or another of major 10.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent
GPU0 = "GPU-11111111-2222-3333-4444-555555555555"
GPU1 = "GPU-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
MIB = 1 << 20
CONTEXT = 64 * MIB  # what a context costs on each device it is on; `fakecuda.c` has the same number

Call = Literal["state", "lock", "checkpoint", "restore", "unlock"]

_LIBRARIES = {"libcuda.so.1": "fakecuda.c", "libnvidia-ml.so.1": "fakenvml.c"}
_FLAGS = ("-O2", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")
_SOURCES = (
    "cpu/0/cpuid",
    "fuse",
    "loop-control",
    "userfaultfd",
    "kvm",
    "vsock",
)  # of /dev, what `node` copies: the first that opens
_FAULTS = {
    "device": "FAKE_CUDA_DEVICE",
    "driver": "FAKE_DRIVER_VERSION",
    "gbps": "FAKE_CUDA_GBPS",
    "hang_limit": "FAKE_CUDA_HANG_LIMIT",
    "leftover": "FAKE_CUDA_LEFTOVER",
    "map": "FAKE_CUDA_MAP",
    "profile": "FAKE_DRIVER_PROFILE",
    "version": "FAKE_CUDA_VERSION",
}


def build() -> Path:
    """The folder with both libraries, built if there is none of these sources yet. Any number of processes may ask at once. It stays
    in the system's folder for temporary files, 150 kB for each version of the sources."""
    digest = hashlib.sha256("\0".join(_FLAGS).encode())
    for source in _LIBRARIES.values():
        digest.update((HERE / source).read_bytes())
    place = Path(tempfile.gettempdir()) / f"hibernode-fake-cuda-{os.geteuid()}-{digest.hexdigest()[:16]}"
    if not place.exists():
        _build_into(place)
    if (facts := place.lstat()).st_uid != os.geteuid() or not stat.S_ISDIR(facts.st_mode) or facts.st_mode & 0o022:
        raise RuntimeError(f"{place} is not ours alone: what lies there is not run\nhint: remove it")
    return place


def _build_into(place: Path) -> None:
    if (gcc := shutil.which("gcc")) is None:
        raise RuntimeError(
            "no gcc to build the fake CUDA driver with\nhint: scripts/test installs it, or apt-get install gcc libc6-dev"
        )
    work = Path(tempfile.mkdtemp(prefix=f"{place.name}-", dir=place.parent))
    try:
        for name, source in _LIBRARIES.items():
            # The SONAME is how the bindings find a library that is loaded already.
            command = [gcc, *_FLAGS, f"-Wl,-soname,{name}", "-o", str(work / name), str(HERE / source)]
            done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode:
                hint = "apt-get install gcc libc6-dev" if "stdio.h: No such" in done.stderr else "what gcc says is above"
                raise RuntimeError(f"{source} does not compile:\n{done.stderr}hint: {hint}")
        try:
            work.rename(place)
        except OSError:
            if not place.exists():
                raise  # else somebody was faster, with the same content
    finally:
        shutil.rmtree(work, ignore_errors=True)


class FakeGpus:
    """A machine in the folder `root`, which becomes the machine's if it is empty. `gpus`: (uuid, bytes) or (uuid, bytes, chip) each; a
    UUID that begins with MIG- is a slice. Remaps between different chips are refused."""

    def __init__(
        self, root: Path, gpus: Sequence[tuple[str, int] | tuple[str, int, str]] = ((GPU0, 2048 * MIB), (GPU1, 2048 * MIB))
    ) -> None:
        self.root, self.build = root, build()
        self.libcuda, self.libnvml = self.build / "libcuda.so.1", self.build / "libnvidia-ml.so.1"
        self.uuids = [gpu[0] for gpu in gpus]
        for part in ("faults", "locks"):
            (root / part).mkdir(parents=True, exist_ok=True)
        (root / "devices").write_text("".join(f"{gpu[0]} {gpu[1]}\n" for gpu in gpus))
        (root / "chips").write_text("".join(f"{gpu[0]} {gpu[2]}\n" for gpu in gpus if len(gpu) > 2))
        (root / "namespace").write_text(str(os.stat("/proc/self/ns/pid").st_ino))

    def env(self, visible: str | None = "0", **faults: str) -> dict[str, str]:
        """What a program of the machine has in its environment, to be merged into its own: a target, or with visible=None one that
        looks at all, as the helper does. CRIU must not get it. Faults from the start of the process on:

        profile: r550, r555, r565 (no checkpoint calls), r570, r575 (no remap), r580 (the default), r590, r595, r610, r615
        version: what cuDriverGetVersion answers instead of the profile's ("13000"); driver: what NVML says ("580.159.04")
        gbps: copies at so many 10^9 bytes a second
        device: a node (see `node`) that is open while there is device state
        leftover: "fd": one descriptor of the device stays open whatever is called
        map: "box": a map must name every GPU of the machine, not only the visible ones
        hang_limit: seconds after which a hang ends by itself ("60")
        """
        made = {"LD_LIBRARY_PATH": str(self.build), "FAKE_CUDA_ROOT": str(self.root)}
        if visible is not None:
            made["CUDA_VISIBLE_DEVICES"] = visible
        return made | {_FAULTS[name]: value for name, value in faults.items()}

    def arm(self, who: int | Literal["any"], call: Call, what: str) -> None:
        """From now on that call on process `who` (its pid as the caller knows it) does `what`. Words, spaces between them:

        "hang": no answer until `disarm` (or hang_limit), then the other words count; "200ms": it takes so much longer
        "die": the target is killed before it answers
        "801": that is the answer, and nothing is done; "801 done": done all the same; "801 failed": the process is FAILED then
        "state=6": what get-state answers
        "once": disarmed when it strikes
        """
        place = self.root / "faults" / str(who)
        place.mkdir(parents=True, exist_ok=True)
        draft = place / f".{call}"
        draft.write_text(what)
        draft.rename(place / call)

    def disarm(self, who: int | Literal["any"], call: Call) -> None:
        """Harmless when repeated."""
        (self.root / "faults" / str(who) / call).unlink(missing_ok=True)

    def record(self) -> None:
        """From now on `calls` has what is done."""
        (self.root / "calls").write_text("")

    def calls(self, pid: int) -> list[tuple[str, int]]:
        """What process `pid` has served since `record`, in order: the call and its CUresult. It lived when it wrote that."""
        lines = [line.split() for line in (self.root / "calls").read_text().splitlines()]
        return [(call, int(code)) for who, call, code in lines if int(who) == pid]

    def replug(self, uuids: Sequence[str], size: int = 2048 * MIB) -> None:
        """From now on the machine has these GPUs."""
        (self.root / "devices").write_text("".join(f"{uuid} {size}\n" for uuid in uuids))

    def say(self, uuid: str, field: str, text: str) -> None:
        """What NVML says of that GPU (`fakenvml.c` lists the fields); empty: as it is."""
        place = self.root / "nvml" / uuid / field
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text) if text else place.unlink(missing_ok=True)

    def users(self, uuid: str) -> dict[str, int]:
        """Who uses that GPU: pid ("<pid>@<namespace>" for one of another pid namespace) -> bytes. A context counts 64 MiB."""
        with self._locked():
            entries = sorted((self.root / uuid).iterdir()) if (self.root / uuid).exists() else []
            return {entry.name: int(entry.read_text() or 0) for entry in entries if _is_locked(entry)}

    def used(self, uuid: str) -> int:
        """Bytes in use on that GPU."""
        return sum(self.users(uuid).values())

    def node(self, name: str = "nvidia0") -> Path:
        """A device node for `env(device=...)`, <root>/dev/<name>, made if it is not there: CRIU refuses to dump who has it open. Needs
        root. `os.major(path.stat().st_rdev)` is what a scan for it has to look for."""
        place = self.root / "dev" / name
        if place.exists():
            return place
        place.parent.mkdir(exist_ok=True)
        why = []
        for source in _SOURCES:
            try:
                os.mknod(place, 0o600 | stat.S_IFCHR, os.stat(f"/dev/{source}").st_rdev)
                os.close(os.open(place, os.O_RDONLY))
            except OSError as e:
                place.unlink(missing_ok=True)
                why.append(f"{source}: {e.strerror}")
            else:
                return place
        raise RuntimeError(f"no device here that CRIU refuses ({', '.join(why)})\nhint: run as root, not under a device cgroup")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.root / "locks" / "machine", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _is_locked(ledger: Path) -> bool:
    """Whether the process that wrote it lives."""
    with open(ledger) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
