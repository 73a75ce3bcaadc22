"""The CUDA driver's checkpoint calls, made through cuda-bindings. Knows the driver's library and the bindings, and no order of calls.

For the helper process alone: one libcuda per process, chosen by the first `open`. A call returns when the driver answers, and cannot be
interrupted; it waits for ever for a target whose restore thread does not run. Other threads go on meanwhile: bindings that would hold the
interpreter's lock during a call are refused. All calls are thread-safe; two on one process are the caller's to order.
"""

from __future__ import annotations

import ctypes
import os
import re
import uuid
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

_DRIVER_WANTED = "CUDA 12.8 (driver 570) or newer"
_BINDINGS_WANTED = "cuda-bindings 13.0 or newer, not 13.3.0"
_FREES_THE_GIL = (12, 9, 1)  # the first version: 12.9.0 let 1 tick of another thread through in 300 ms, this one 58
_REMAPS = 13000  # CUDA 13.0, driver 580: there the words of a GPU map were reserved before
_ASKED_AS = 12080  # the CUDA version whose form of the calls is asked for: the first that has them
_SYMBOLS: Final = (
    "cuCheckpointProcessGetState",
    "cuCheckpointProcessGetRestoreThreadId",
    "cuCheckpointProcessLock",
    "cuCheckpointProcessCheckpoint",
    "cuCheckpointProcessRestore",
    "cuCheckpointProcessUnlock",
)
_LIBRARY = "libcuda.so.1"
# Where the loader does not look: a driver that runs in a container (the GPU operator's), and one that a container runtime brings.
_PLACES: Final = (
    "/run/nvidia/driver/usr/lib/x86_64-linux-gnu",
    "/run/nvidia/driver/usr/lib64",
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
)
# What the bindings say of a number that they have no name for: 13.0 a KeyError, of a result; 13.4 a ValueError.
_STRANGE = re.compile(r"(\d+)(?: is not a valid (CUresult|CUprocessState))?")
_RTLD_NOLOAD = getattr(os, "RTLD_NOLOAD", 4)


class State(IntEnum):
    """Of a process, as its driver sees it."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    CHECKPOINTING = 4  # 4 and 5 with custom storage only, which nobody here asks for
    RESTORING = 5


class CudaError(Exception):
    """The driver's answer to one call: anything but success. Code 0: a success that makes no sense here, such as an unknown state."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.call, self.code, self.name = call, code, name


class Unusable(Exception):
    """There is no driver to talk to, or none that can do it. `code`: gpu_driver_absent, gpu_driver_too_old or gpu_bindings."""

    def __init__(self, code: str, message: str, *, found: str, wanted: str) -> None:
        super().__init__(message)
        self.code, self.found, self.wanted = code, found, wanted


class Cuda:
    """The driver of this machine. Each call raises CudaError for what the driver refuses. `pid` is a process (never a thread) in the
    caller's pid namespace: who it is has to be checked before the call, by its start time."""

    def __init__(self, bindings: Any, version: int) -> None:
        """Of bindings that have been tried: use `open`."""
        self._bindings = bindings
        self.version = version  # 13000 is CUDA 13.0
        self.can_remap = version >= _REMAPS and hasattr(bindings, "CUcheckpointGpuPair")

    @classmethod
    def open(cls, library: str = "") -> Cuda:
        """Load `library` (a path to a libcuda.so.1), or what the loader finds, or what lies in one of the usual places; then try it,
        touching no device. Raises Unusable. In a process whose bindings have looked for a driver before, that one stays."""
        bindings = _bindings()
        _load(library)
        try:
            version = int(_insist("cuDriverGetVersion", bindings.cuDriverGetVersion())[0])
            missing = [name for name in _SYMBOLS if not _has(bindings, name)]
        except (RuntimeError, CudaError) as e:  # RuntimeError: the bindings found no library, or no such symbol in it
            raise _absent(str(e)) from e
        if missing:
            shown = _show(version)
            raise Unusable(
                "gpu_driver_too_old",
                f"the NVIDIA driver ({shown}) has no {missing[0]}",
                found=shown,
                wanted=_DRIVER_WANTED,
            )
        return cls(bindings, version)

    def init(self) -> None:
        """cuInit. Makes no context and takes no device memory, but holds the driver's devices open until the process ends. A restore
        needs it where persistence mode is off."""
        self._call("cuInit", 0)

    def state(self, pid: int) -> State:
        return State(int(self._call("cuCheckpointProcessGetState", pid)[0]))

    def restore_thread(self, pid: int) -> int:
        """The thread of `pid` that serves these calls, by its id in the caller's pid namespace: who has one uses CUDA. CudaError 3 is the
        answer for who does not, but also where the driver is not initialised here."""
        return int(self._call("cuCheckpointProcessGetRestoreThreadId", pid)[0])

    def lock(self, pid: int, timeout_ms: int) -> None:
        """RUNNING -> LOCKED: its next CUDA call waits, and what was submitted has ended. CudaError 600 after `timeout_ms`, and it is
        RUNNING still."""
        if timeout_ms <= 0:
            raise ValueError(f"a lock with timeout_ms={timeout_ms} could wait for ever")
        args = self._bindings.CUcheckpointLockArgs()
        args.timeoutMs = timeout_ms
        self._call("cuCheckpointProcessLock", pid, args)

    def checkpoint(self, pid: int) -> None:
        """LOCKED -> CHECKPOINTED: device memory is the process's own memory now, and the device is free of it. After an error it may be
        FAILED, for good."""
        self._call("cuCheckpointProcessCheckpoint", pid, None)

    def restore(self, pid: int, pairs: Sequence[tuple[str, str]] = ()) -> None:
        """CHECKPOINTED -> LOCKED, on the GPUs it was on, or by `pairs` of UUIDs (old, new) on others: then all that it saw have to be
        named. After CudaError 1 it can be tried again if the state is CHECKPOINTED still; after 2 never. Raises Unusable for pairs
        where `can_remap` is false, ValueError for what is no GPU's UUID."""
        if not pairs:
            self._call("cuCheckpointProcessRestore", pid, None)
            return
        if not self.can_remap:
            shown = _show(self.version)
            raise Unusable(
                "gpu_driver_too_old",
                f"the NVIDIA driver ({shown}), or its bindings, cannot restore onto another GPU",
                found=shown,
                wanted="CUDA 13.0 (driver 580) or newer",
            )
        args = self._bindings.CUcheckpointRestoreArgs()
        args.gpuPairs = [self._pair(old, new) for old, new in pairs]  # copied
        args.gpuPairsCount = len(pairs)
        self._call("cuCheckpointProcessRestore", pid, args)

    def unlock(self, pid: int) -> None:
        """LOCKED -> RUNNING."""
        self._call("cuCheckpointProcessUnlock", pid, None)

    def _call(self, name: str, *args: Any) -> tuple[Any, ...]:
        try:
            answer = getattr(self._bindings, name)(*args)
        except (KeyError, ValueError) as e:  # the bindings know no such result, or state: a newer driver's
            if not (found := _STRANGE.fullmatch(str(e))):
                raise
            kind = found[2] or "CUresult"
            raise CudaError(name, int(found[1]) if kind == "CUresult" else 0, f"{kind} {found[1]}") from e
        return _insist(name, answer)

    def _pair(self, old: str, new: str) -> Any:
        pair = self._bindings.CUcheckpointGpuPair()
        pair.oldUuid, pair.newUuid = self._uuid(old), self._uuid(new)
        return pair

    def _uuid(self, text: str) -> Any:
        if not text.startswith("GPU-"):
            raise ValueError(f"{text} is not the UUID of a whole GPU")
        raw, made = uuid.UUID(text.removeprefix("GPU-")).bytes, self._bindings.CUuuid()
        ctypes.memmove(made.getPtr(), raw, len(raw))  # its `bytes` cannot be set
        return made


def _insist(name: str, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call returned besides its result, which is success."""
    result, *values = answer
    if code := int(result):
        raise CudaError(name, code, getattr(result, "name", f"CUresult {code}"))
    return tuple(values)


def _bindings() -> Any:
    """cuda.bindings.driver, of a version that can be used."""
    try:
        from cuda import bindings  # noqa: PLC0415 - optional: a node without GPUs does not have it
        from cuda.bindings import driver  # noqa: PLC0415
    except (ImportError, RuntimeError) as e:
        raise Unusable("gpu_bindings", f"no cuda-bindings: {e}", found=str(e), wanted=_BINDINGS_WANTED) from e
    version = str(bindings.__version__)
    numbers = tuple(int(digits) for digits in re.findall(r"\d+", version)[:3])
    if numbers < _FREES_THE_GIL or not hasattr(driver, "CUcheckpointRestoreArgs"):
        raise Unusable(
            "gpu_bindings", f"cuda-bindings {version} cannot be used", found=f"cuda-bindings {version}", wanted=_BINDINGS_WANTED
        )
    return driver


def _load(library: str) -> None:
    """Have the driver's library loaded, where the bindings find it by its name."""
    paths = [library] if library else [_LIBRARY, *(str(Path(place) / _LIBRARY) for place in _PLACES)]
    why = []
    for path in paths:
        try:
            loaded = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        except OSError as e:
            why.append(str(e))
            continue
        try:
            same = ctypes.CDLL(_LIBRARY, _RTLD_NOLOAD)._handle == loaded._handle
        except OSError:
            same = False
        if same:
            return
        why.append(f"{path} is not the {_LIBRARY} of this process")
    raise _absent(why[0])


def _has(bindings: Any, name: str) -> bool:
    result, address, *_ = bindings.cuGetProcAddress(name.encode(), _ASKED_AS, 0)
    return not int(result) and bool(address)


def _absent(why: str) -> Unusable:
    return Unusable("gpu_driver_absent", f"no NVIDIA driver: {why}", found=why, wanted=f"{_LIBRARY} of {_DRIVER_WANTED}")


def _show(version: int) -> str:
    return f"CUDA {version // 1000}.{version % 1000 // 10}"
