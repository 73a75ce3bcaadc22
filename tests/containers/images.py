"""Images for containers, made here: root file systems out of C programs and what this machine has, and the OCI tar that containerd imports.

No registry and no builder: a container's image is a directory, packed in the way that the OCI image layout says.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
_OCI = "application/vnd.oci.image"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What a registry would be asked for if an image were not there: nobody answers to these names.
PAUSE, COUNTER, BUSYBOX, REDIS, CUDA = (
    f"localhost/hibernode/{name}:1" for name in ("pause", "counter", "busybox", "redis", "cuda")
)
ALL = (PAUSE, COUNTER, BUSYBOX, REDIS, CUDA)
PROGRAM = PROGRAMS.parents[1] / "node" / "programs" / "cuda_job.py"
CUDA_JOB = (str(Path(sys.executable).resolve()), "-S", "-E", f"/{PROGRAM.name}")  # its arguments come after it


@dataclass(frozen=True)
class Image:
    name: str
    rootfs: Path
    command: tuple[str, ...]


def build(home: Path, wanted: Collection[str] = ALL) -> dict[str, Image]:
    """These images, by name, below `home`. All of them take about a second."""
    pause, counter, stream = (_compiled(name, home / name) for name in ("pause", "counter", "stream"))

    def busybox(rootfs: Path) -> None:
        """A shell and its tools, the counter, and files to change: /etc/base, /etc/gone, /full/first, /full/second."""
        _common(rootfs)
        _put(rootfs, _found("busybox", "busybox-static"), "/bin/busybox")
        _put(rootfs, counter, "/bin/counter")
        for applet in subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split():
            if applet != "busybox":
                (rootfs / "bin" / applet).symlink_to("busybox")
        for name in ("etc/base", "etc/gone", "full/first", "full/second"):
            (rootfs / name).parent.mkdir(exist_ok=True)
            (rootfs / name).write_text(f"{name} of the image\n")

    def redis(rootfs: Path) -> None:
        _common(rootfs)
        (rootfs / "data").mkdir()
        for name in ("redis-server", "redis-cli"):
            _put(rootfs, _found(name, "redis-server"), f"/bin/{name}")

    def programs(rootfs: Path) -> None:
        for program in (counter, stream):
            _put(rootfs, program, f"/bin/{program.name}")

    def cuda(rootfs: Path) -> None:
        """This Python, with what `cuda_job.py` needs of it and no more."""
        _common(rootfs)
        _put(rootfs, Path(CUDA_JOB[0]), CUDA_JOB[0])
        for place in _imported(PROGRAM):
            _put(rootfs, Path(place), place)
        shutil.copy2(PROGRAM, rootfs / PROGRAM.name)

    kinds: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
        PAUSE: (lambda rootfs: _put(rootfs, pause, "/bin/pause"), ("/bin/pause",)),
        COUNTER: (programs, ("/bin/counter",)),
        BUSYBOX: (busybox, ("/bin/sh",)),
        CUDA: (cuda, (*CUDA_JOB, "/dev/stdout")),
        REDIS: (redis, ("/bin/redis-server", "--dir", "/data")),
    }
    made = {}
    for name in wanted:
        fill, command = kinds[name]
        rootfs = home / "rootfs" / name.rpartition("/")[2].partition(":")[0]
        rootfs.mkdir(parents=True)
        fill(rootfs)
        made[name] = Image(name, rootfs, command)
    return made


def pack(images: Sequence[Image], target: Path) -> None:
    """One OCI image layout as a tar with all of these. The same directories give the same digests."""
    blobs: dict[str, bytes] = {}

    def described(kind: str, blob: bytes, **more: Any) -> dict[str, Any]:
        digest = hashlib.sha256(blob).hexdigest()
        blobs[digest] = blob
        return {"mediaType": f"{_OCI}.{kind}", "digest": f"sha256:{digest}", "size": len(blob), **more}

    def manifest(image: Image) -> dict[str, Any]:
        layer = described("layer.v1.tar", _layer(image.rootfs))
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": list(image.command), "WorkingDir": "/", "Env": [_PATH]},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        }
        body = {
            "schemaVersion": 2,
            "mediaType": f"{_OCI}.manifest.v1+json",
            "config": described("config.v1+json", json.dumps(config).encode()),
            "layers": [layer],
        }
        notes = {"io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": image.name.rpartition(":")[2]}
        return described("manifest.v1+json", json.dumps(body).encode(), annotations=notes)

    index = {"schemaVersion": 2, "mediaType": f"{_OCI}.index.v1+json", "manifests": [manifest(image) for image in images]}
    with tarfile.open(target, "w") as tar:
        files: Mapping[str, bytes] = {
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
            "index.json": json.dumps(index).encode(),
            **{f"blobs/sha256/{digest}": blob for digest, blob in blobs.items()},
        }
        for name, blob in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(blob), 0o644
            tar.addfile(info, io.BytesIO(blob))


def _layer(rootfs: Path) -> bytes:
    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(os.listdir(rootfs)):
            tar.add(rootfs / name, arcname=name, filter=plain)
    return raw.getvalue()


def _imported(program: Path) -> list[str]:
    """Files of the modules that a Python program of ours imports, before it begins and when it looks at its arguments."""
    say = (
        "import sys, runpy; found = runpy.run_path(sys.argv[1]); sys.argv[1:] = ['out']; found['_options']();"
        "print(*(each.__file__ for each in sys.modules.values() if getattr(each, '__file__', '')), sep='\\n')"
    )
    done = subprocess.run([*CUDA_JOB[:-1], "-c", say, program], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line.startswith("/")]


def _compiled(name: str, target: Path) -> Path:
    target.mkdir(parents=True)
    source, program = PROGRAMS / f"{name}.c", target / name
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", program, source], check=True)
    return program


def _found(program: str, package: str) -> Path:
    found = shutil.which(program)
    if found is None:
        raise RuntimeError(f"there is no {program}: scripts/test installs Debian's {package}")
    return Path(found).resolve()


def _common(rootfs: Path) -> None:
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "var"):
        (rootfs / name).mkdir(parents=True, exist_ok=True)
    (rootfs / "tmp").chmod(0o1777)
    (rootfs / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n")
    (rootfs / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")


def _put(rootfs: Path, program: Path, place: str) -> None:
    """The program, and every library it needs, its loader included, each under the path that it is looked for."""
    target = rootfs / place.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(program, target)
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout  # fails for a static one
    for library in re.findall(r"(/\S+) \(0x", listed):
        copy = rootfs / library.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            shutil.copy2(library, copy)
