"""What NVIDIA's driver says of its GPUs: through NVML, and of what NVML cannot say through the kernel's own files.

This file knows pynvml. It loads it, and the library under it, only when it is asked: most machines have neither, and are well.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hibernode.model import MAX_GPUS, Gpu, GpuInventory

_SONAME = "libnvidia-ml.so.1"
_PROC = Path("/proc/driver/nvidia")
_PATIENCE = 2.0  # seconds: with persistence off the first answer takes that long for a machine full of GPUs
_SILENT = "NVML does not answer"
_LONGEST = 200  # characters of what a driver says
_NOT_AVAILABLE = (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)  # NVML's way to say that a number is none
_LIBRARY_NOT_FOUND, _UNINITIALIZED, _DRIVER_NOT_LOADED, _MISMATCH = 12, 1, 9, 18  # nvmlReturn_t
_STATES = {_LIBRARY_NOT_FOUND: "library", _DRIVER_NOT_LOADED: "unloaded", _MISMATCH: "mismatch"}
_OF_ALL = (_UNINITIALIZED, _DRIVER_NOT_LOADED, _MISMATCH)  # whatever was asked: nothing more is to be had
_MODES = {0: "default", 1: "exclusive_thread", 2: "prohibited", 3: "exclusive_process"}
_log = logging.getLogger("hibernode.gpu")


class _NoAnswer(Exception):
    """NVML cannot be asked at all; `state` is the inventory's."""

    def __init__(self, state: str, reason: str) -> None:
        super().__init__(reason)
        self.state, self.reason = state, reason


class Nvml:
    """ports.Inventory. NVML stays open between two questions: that is what makes one cheap, and it also keeps the kernel's driver from
    being unloaded while this process lives. A call into the driver cannot be interrupted, so each is made by a thread that may be left."""

    def __init__(self, library: str = "", *, patience: float = _PATIENCE, proc: Path = _PROC) -> None:
        self._library, self._patience, self._proc = library, patience, proc
        self._pynvml: Any = None  # while NVML is open
        self._turn = threading.Lock()  # held by the thread that asks, however long it takes
        self._hangs = False
        self._last = GpuInventory(state="silent", reason=_SILENT)
        self._users: dict[int, dict[str, int]] = {}

    def gpus(self) -> GpuInventory:
        if self._turn.acquire(timeout=0 if self._hangs else self._patience):
            answered = threading.Event()
            try:
                threading.Thread(target=self._read, args=(answered,), name="nvml", daemon=True).start()
            except RuntimeError as e:  # no memory for one more
                self._turn.release()
                return self._old("failed", str(e))
            if answered.wait(self._patience):
                return self._last
        self._say_hangs(hangs=True)
        return self._old("silent", _SILENT)

    def users(self) -> Mapping[int, Mapping[str, int]]:
        self.gpus()
        return self._users

    def _old(self, state: str, reason: str) -> GpuInventory:
        return self._last.model_copy(update={"state": state, "reason": reason})

    def _read(self, answered: threading.Event) -> None:
        try:
            self._last = self._look()
            self._say_hangs(hangs=False)
        finally:
            answered.set()
            self._turn.release()

    def _say_hangs(self, *, hangs: bool) -> None:
        if hangs != self._hangs:
            self._hangs = hangs
            _log.warning(_SILENT if hangs else "NVML answers again")

    def _look(self) -> GpuInventory:
        try:
            return self._ask(self._open())
        except _NoAnswer as e:
            state, reason = e.state, e.reason
        except Exception as e:  # noqa: BLE001 - a driver's nonsense is no reason for a node to go silent
            state, reason = "failed", f"{type(e).__name__}: {e}"
        self._close()
        return self._by_kernel(state, reason[:_LONGEST])

    # --- NVML ---------------------------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        if self._pynvml is None:
            if self._library:
                _load(self._library)
            try:
                pynvml = importlib.import_module("pynvml")
            except ImportError as e:
                raise _NoAnswer("bindings", "the package nvidia-ml-py is not installed") from e
            with _insisting(pynvml):
                pynvml.nvmlInit()
            self._pynvml = pynvml
        return self._pynvml

    def _close(self) -> None:
        """The next question begins anew: the driver may be back."""
        if self._pynvml is not None:
            with contextlib.suppress(self._pynvml.NVMLError):
                self._pynvml.nvmlShutdown()
            self._pynvml = None

    def _ask(self, pynvml: Any) -> GpuInventory:
        with _insisting(pynvml):
            driver, count = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlDeviceGetCount()
        gpus = [_gpu(pynvml, index) for index in range(min(count, MAX_GPUS))]
        self._users = _users(pynvml, gpus)
        return GpuInventory(state="ok", reason="", driver=driver[:_LONGEST], cuda=_cuda(pynvml), gpus=gpus)

    # --- without NVML -------------------------------------------------------------------------------------------------------

    def _by_kernel(self, state: str, reason: str) -> GpuInventory:
        """What the kernel's driver shows of itself in /proc."""
        said = _text(self._proc / "version")
        if not said and state in ("bindings", "library") and not self._library:
            return GpuInventory(state="absent", reason="no NVIDIA driver")
        version = re.search(r"\b\d+\.\d+(\.\d+)?\b", said)
        shown = sorted(self._proc.glob("gpus/*/information"))[:MAX_GPUS]
        gpus = [_gpu_by_kernel(index, _text(path), reason) for index, path in enumerate(shown)]
        return GpuInventory(state=state, reason=reason, driver=version[0] if version else "", gpus=gpus)


def _load(library: str) -> None:
    """Before pynvml, which asks for it by its soname: the linker then takes the one that is there."""
    try:
        loaded = ctypes.CDLL(library)
        same = ctypes.CDLL(_SONAME)._handle == loaded._handle
    except OSError as e:
        raise _NoAnswer("library", f"gpu.nvml: {e}") from e
    if not same:
        raise _NoAnswer("library", f"gpu.nvml: {library} does not call itself {_SONAME}, or another is loaded")


@contextlib.contextmanager
def _insisting(pynvml: Any) -> Iterator[None]:
    """Without an answer to this there is none to anything."""
    try:
        yield
    except pynvml.NVMLError as e:
        state = _STATES.get(e.value, "failed")
        raise _NoAnswer(state, f"{_SONAME} was not found" if state == "library" else f"NVML: {e}") from e


def _cuda(pynvml: Any) -> str:
    try:
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    except pynvml.NVMLError:
        return ""
    return f"{version // 1000}.{version % 1000 // 10}"


# --- one GPU --------------------------------------------------------------------------------------------------------------

_Values = Sequence[object]
_LOOKS: Mapping[tuple[str, ...], Callable[[Any, Any], _Values]] = {
    ("uuid",): lambda nv, gpu: [nv.nvmlDeviceGetUUID(gpu)],
    ("name",): lambda nv, gpu: [nv.nvmlDeviceGetName(gpu)],
    ("bus_id",): lambda nv, gpu: [_bus_id(nv.nvmlDeviceGetPciInfo(gpu).busId)],
    ("minor",): lambda nv, gpu: [nv.nvmlDeviceGetMinorNumber(gpu)],
    ("compute_capability",): lambda nv, gpu: [".".join(map(str, nv.nvmlDeviceGetCudaComputeCapability(gpu)))],
    ("memory_total", "memory_used", "memory_free"): lambda nv, gpu: _memory(nv.nvmlDeviceGetMemoryInfo(gpu)),
    ("mig",): lambda nv, gpu: [nv.nvmlDeviceGetMigMode(gpu)[0] == nv.NVML_DEVICE_MIG_ENABLE],
    ("persistence",): lambda nv, gpu: [nv.nvmlDeviceGetPersistenceMode(gpu) == nv.NVML_FEATURE_ENABLED],
    ("compute_mode",): lambda nv, gpu: [_mode(nv.nvmlDeviceGetComputeMode(gpu))],
    ("processes",): lambda nv, gpu: [len(nv.nvmlDeviceGetComputeRunningProcesses_v3(gpu))],
    ("mps_processes",): lambda nv, gpu: [len(nv.nvmlDeviceGetMPSComputeRunningProcesses_v3(gpu))],
    ("ecc_uncorrected",): lambda nv, gpu: [
        nv.nvmlDeviceGetTotalEccErrors(gpu, nv.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nv.NVML_VOLATILE_ECC)
    ],
    ("rows_pending", "rows_failed"): lambda nv, gpu: [bool(flag) for flag in nv.nvmlDeviceGetRemappedRows(gpu)[2:]],
}
_FIELDS = [name for names in _LOOKS for name in names]


def _gpu(pynvml: Any, index: int) -> Gpu:
    """Each look by itself: what one GPU, or one driver, cannot say costs nothing else."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError as e:
        return Gpu(index=index, unknown=dict.fromkeys(_FIELDS, _why(pynvml, e)))
    known: dict[str, object] = {}
    unknown: dict[str, str] = {}
    for names, look in _LOOKS.items():
        try:
            found = dict(zip(names, look(pynvml, handle), strict=True))
        except Exception as e:  # noqa: BLE001 - an older pynvml, text that is none: it costs no other look
            unknown |= dict.fromkeys(names, _why(pynvml, e))
        else:
            known |= {name: _cut(value) for name, value in found.items() if _is_known(value)}
            unknown |= {name: "the driver gives no value" for name, value in found.items() if not _is_known(value)}
    return Gpu.model_validate({"index": index, "unknown": unknown, **known})


def _users(pynvml: Any, gpus: Sequence[Gpu]) -> dict[int, dict[str, int]]:
    """pid -> UUID -> bytes; of a GPU that does not tell, nobody."""
    found = defaultdict[int, dict[str, int]](dict)
    for gpu in gpus:
        if gpu.processes:
            with contextlib.suppress(pynvml.NVMLError):
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses_v3(pynvml.nvmlDeviceGetHandleByIndex(gpu.index)):
                    found[process.pid][gpu.uuid] = process.usedGpuMemory or 0
    return dict(found)


def _why(pynvml: Any, error: Exception) -> str:
    """Why something is unknown; or _NoAnswer, where NVML has none to anything any more."""
    if isinstance(error, pynvml.NVMLError) and error.value in _OF_ALL:
        raise _NoAnswer(_STATES.get(error.value, "failed"), f"NVML: {error}") from error
    return f"{error}"[:_LONGEST] or type(error).__name__


def _is_known(value: object) -> bool:
    if isinstance(value, int):
        return value not in _NOT_AVAILABLE and 0 <= value <= 1 << 53
    return value != ""


def _cut(value: object) -> object:
    return value[:_LONGEST] if isinstance(value, str) else value


def _memory(found: Any) -> _Values:
    return [found.total, found.used, found.free]


def _mode(number: int) -> str:
    return _MODES.get(number, str(number))


def _bus_id(found: str | bytes) -> str:
    """As the kernel writes it, 0000:3b:00.0: NVML gives the domain eight digits."""
    domain, _, place = (found.decode() if isinstance(found, bytes) else found).lower().partition(":")
    return f"{int(domain, 16):04x}:{place}"


# --- one GPU, as in /proc/driver/nvidia/gpus/*/information ----------------------------------------------------------------


def _gpu_by_kernel(index: int, said: str, reason: str) -> Gpu:
    lines = {key.strip(): rest.strip() for key, _, rest in (line.partition(":") for line in said.splitlines())}
    minor = lines.get("Device Minor", "")
    known: dict[str, object] = {
        "uuid": lines.get("GPU UUID", "")[:_LONGEST],
        "name": lines.get("Model", "")[:_LONGEST],
        "bus_id": lines.get("Bus Location", "")[:_LONGEST].lower(),
        "minor": int(minor) if re.fullmatch(r"\d{1,9}", minor) else None,
    }
    if "?" in str(known["uuid"]):  # GPU-????????-...: the driver has not woken it up yet
        known["uuid"] = ""
    unknown = {name: reason for name in _FIELDS if known.get(name) in (None, "")}
    return Gpu.model_validate({"index": index, "unknown": unknown, **known})


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
