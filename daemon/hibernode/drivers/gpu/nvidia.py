"""ports.Gpu on NVIDIA's driver: finds who uses a GPU, and has the helper make the calls, in their order.

The helper is started when it is first needed, and again when it has died: it is asked for what is left to do, and knows from its journal
what was begun. A workload without CUDA never comes to it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from hibernode.children import Children
from hibernode.config import Gpu as Settings
from hibernode.drivers.gpu import talk
from hibernode.drivers.gpu.talk import AT_ONCE, Question, Result, Verb
from hibernode.errors import GpuBusy, GpuFailed, GpuWedged, HibernodeError, Refused
from hibernode.ports import Identity, ProcessFacts

INVALID_VALUE, NOT_INITIALIZED, NOT_READY, NOT_SUPPORTED = 1, 3, 600, 801  # CUresult, as cuda.h has them
_START = 30.0  # seconds a helper has to answer; attaching to a driver takes up to 2.7 s on a node of eight GPUs (gpu.md)
_ENDING = 1.0  # seconds for one that has the lock to answer, before it is taken to be about to end, and another is started
_PROBE = 20.0  # seconds: it needs none of the device's time
_MORE = 5.0  # seconds beside the timeout of a lock, which the driver keeps itself
_UNDO = 15.0  # seconds a daemon's start waits for what the helper goes on with by itself
_AGAIN = 0.05  # seconds
_STOP = 15.0  # seconds for all threads of processes to stop, of which the helper waits five
_PHASES: Mapping[Verb, int] = {"resume": 2, "undo": 4}  # parts of a question that are waited for in turn; of others one
_MARGIN = 10.0  # seconds beside the helper's patience, until it is he who does not answer; less than `watchdog.grace`
_OWN = 2.0  # seconds until a helper that is told something has heard it; with `_MARGIN` less than `watchdog.grace`, too
_ROUNDS = 5  # looks for processes that have begun to use a GPU while others were locked
_log = logging.getLogger("hibernode.gpu")


class Nvidia:
    """`directory` is the helper's: socket, journal, lock and log."""

    def __init__(self, settings: Settings, directory: Path, children: Children) -> None:
        self._settings, self._directory, self._children = settings, directory, children
        self._starting, self._owning = threading.Lock(), threading.Lock()
        self._live = set[str]()  # actions that have something suspended, or are about to
        self._own_line: _Line | None = None

    def begun(self, action_id: str) -> None:
        with self._owning:
            self._live.add(action_id)
            self._own()

    def over(self, action_id: str) -> None:
        with self._owning:
            if action_id in self._live:
                self._live.remove(action_id)
                self._own()

    def _own(self) -> None:
        """The helper that is there knows whom this daemon answers for, on a connection that ends with the daemon, or when that is nobody.
        Where there is none, whoever starts one comes by here. With `_owning`."""
        question = Question("own", "", [], mine=sorted(self._live))
        for _ in range(2 if self._live else 0):  # the helper that had heard it may have died
            try:
                if self._own_line is None:
                    if (found := self._try()) is None:
                        return
                    self._own_line = _Line(found)
                self._own_line.ask(question, _OWN)
                return
            except TimeoutError as e:  # it stands still: whoever asks it something is told so
                _log.warning("the GPU helper does not answer: %s", e)
                break
            except (OSError, ValueError) as e:
                _log.info("the GPU helper has ended, or does not hear: %s", e)
                self._disown()
        self._disown()

    def _disown(self) -> None:
        line, self._own_line = self._own_line, None
        if line is not None:
            line.close()

    def check(self) -> None:
        self.connect().close()

    def find(self, action_id: str, processes: Sequence[ProcessFacts]) -> Tree:
        tree = Tree(self, action_id)
        try:
            tree.look(processes)
        except BaseException:
            tree.close()
            raise
        return tree

    def restored(self, action_id: str, processes: Sequence[Identity], halted: Sequence[Identity] = ()) -> Tree:
        return Tree(self, action_id, processes, halted)

    def recover(self, action_id: str) -> None:
        """Where no helper ever was nothing was begun, and none is started to say so."""
        journal = self._directory / "journal"
        if journal.exists() and journal.stat().st_size:
            with contextlib.closing(Tree(self, action_id)) as tree:
                tree.undo()

    def park(self, action_id: str, processes: Sequence[Identity], limit: float) -> None:
        """Where nobody has the driver's library no helper is asked, and none is started."""
        users = [who for who in processes if any("/libcuda.so" in path for path in _mapped(who[0]))]
        if users:
            with contextlib.closing(Tree(self, action_id, users)) as tree:
                tree.park(limit)

    def connect(self) -> socket.socket:
        """To the helper, which is started if there is none; it may be the first to hear from us. Raises Refused or GpuFailed."""
        found = self._connect()
        with self._owning:
            self._own()
        return found

    def _connect(self) -> socket.socket:
        if (found := self._try()) is not None:
            return found
        with self._starting:
            if (found := self._try()) is not None:
                return found
            deadline = time.monotonic() + _START
            while True:
                self._start()
                again = time.monotonic() + _ENDING
                while (found := self._try()) is None and time.monotonic() < again:
                    time.sleep(_AGAIN)
                if found is not None:
                    return found
                if time.monotonic() > deadline:
                    raise GpuFailed("the GPU helper does not answer", hint=f"see {self._directory}/log")

    def _try(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            with talk.address(self._directory) as short:
                connection.connect(short)
        except OSError:
            connection.close()
            return None
        return connection

    def _start(self) -> None:
        argv = [sys.executable, "-m", "hibernode", "gpu-helper", "--directory", str(self._directory)]
        argv += ["--libcuda", self._settings.libcuda, "--idle", str(self._settings.idle)]
        status, said = self._children.run(argv, timeout=_START)
        if not status:
            return
        try:
            why = json.loads(said)
        except ValueError:
            raise GpuFailed(f"the GPU helper does not start: {said.strip()[-300:]}", hint=f"see {self._directory}/log") from None
        for code, hint in (
            ("gpu_driver_absent", "is the NVIDIA driver of the host here? Set `libcuda` in [gpu] if it is in an unusual place"),
            ("gpu_driver_too_old", "the driver's checkpoint calls came with 570"),
            ("gpu_bindings", "pip install 'hibernode[gpu]'"),
        ):
            if why["code"] == code:
                raise Refused(code, why["message"], prop="CUDA driver", found=why["found"], wanted=why["wanted"], hint=hint)
        raise GpuFailed(f"the GPU helper does not start: {why['message']}", hint=f"see {self._directory}/log")

    @property
    def lock_timeout(self) -> float:
        return self._settings.lock_timeout

    @property
    def halts(self) -> bool:
        return self._settings.design == "stop"


class _Line:
    """One connection to the helper. While it is open, the helper leaves what its action holds as it is."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._stream = self._socket.makefile("rwb")

    def ask(self, question: Question, seconds: float | None) -> list[Result]:
        """OSError if the helper is gone; TimeoutError if it does not answer in so many seconds, as one that is stopped."""
        self._socket.settimeout(seconds)
        self._stream.write(talk.encode(question))
        self._stream.flush()
        if not (line := self._stream.readline()):
            raise ConnectionResetError("the GPU helper has ended")
        return talk.decode_results(line)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
        self._socket.close()


def _time_of(question: Question) -> float | None:
    """Seconds for a helper that keeps its own time to answer. None: for ever."""
    rounds = -(-max(1, len(question.processes)) // AT_ONCE) * _PHASES.get(question.verb, 1)
    return question.patience * rounds + _MARGIN if question.patience else None


class Tree:
    """ports.GpuTree."""

    def __init__(self, gpu: Nvidia, action_id: str, users: Sequence[Identity] = (), halted: Sequence[Identity] = ()) -> None:
        self._gpu, self._action_id = gpu, action_id
        self._line: _Line | None = None
        self._users = list(users)
        self._halted: list[Identity] = []  # by us
        self._brought_back = list(halted)

    @property
    def pids(self) -> list[int]:
        return [pid for pid, _ in self._users]

    @property
    def halted(self) -> list[int]:
        return [pid for pid, _ in self._halted]

    def look(self, processes: Sequence[ProcessFacts]) -> list[Identity]:
        """Those of these that were not known, and have GPU state. Refused for every doubt."""
        unknown = self._unknown(processes)
        if not unknown:
            return []
        found = list[Identity]()
        for result in self._ask("probe", unknown, patience=_PROBE):
            process = unknown[result.who]
            if not result.gone and _insist_saveable(result, process):
                found.append(result.who)
        self._users += found
        _insist_no_peers([each for each in processes if (each.pid, each.start_time) in self._users])
        return found

    def _unknown(self, processes: Sequence[ProcessFacts]) -> dict[Identity, ProcessFacts]:
        """Who may have GPU state, and is not known to: who had none may have begun since."""
        users = [each for each in processes if each.cuda or any(map(_is_gpu, each.fds))]
        return {who: each for each in users if (who := (each.pid, each.start_time)) not in self._users}

    def suspend(self, everybody: Callable[[], Sequence[ProcessFacts]], limit: float) -> None:
        self._gpu.begun(self._action_id)
        new = [*self._users, *(self.look(everybody()) if not self._users else ())]
        for _ in range(_ROUNDS):
            if not new:
                break
            self._lock(new)
            new = self.look(everybody())
        else:
            raise GpuBusy("new processes begin to use a GPU all the time", hint="try again when the workload has started")
        if not self._users:
            return
        if self._gpu.halts:
            self._halt(everybody)
        for result in self._ask("checkpoint", self._users, patience=limit):
            if not result.ok and not result.gone:
                raise self._failed(result, "save", limit)
            if result.gone:
                self._users.remove(result.who)
        if left := leftovers(everybody()):
            pid, descriptor, what = left[0]
            pids = sorted({each[0] for each in left})
            raise Refused(
                "gpu_leftover", f"process {pid} still has {what} open", prop=f"fd {descriptor}", found=what, wanted="no GPU device",
                hint="a child that was forked without exec keeps its parent's descriptors: start workers by spawn", pids=pids,
            )  # fmt: skip

    def _lock(self, processes: Sequence[Identity]) -> None:
        timeout = self._gpu.lock_timeout
        results = self._ask("lock", processes, timeout_ms=max(1, int(timeout * 1e3)), patience=timeout + _MORE)
        for result in results:
            if not result.ok and not result.gone:
                raise self._failed(result, "lock", timeout)
            if result.gone and result.who in self._users:
                self._users.remove(result.who)

    def _halt(self, everybody: Callable[[], Sequence[ProcessFacts]]) -> None:
        """All of them stand still. Who is born meanwhile is seen at the next look; who stands still has no more children."""
        seen = set[Identity]()
        for _ in range(_ROUNDS):
            there = everybody()
            new = [who for each in there if (who := (each.pid, each.start_time)) not in seen]
            if not new:
                break
            seen.update(new)
            for result in self._ask("halt", new, patience=_STOP):
                if not result.ok:
                    raise self._not_halted(result)
                if not result.halted and result.who not in self._halted:
                    self._halted.append(result.who)
        else:
            raise GpuBusy("new processes are born all the time", hint="try again when the workload has started")
        if self._unknown(there):
            raise GpuBusy("a process has begun to use a GPU meanwhile", hint="try again when the workload has started")

    def _not_halted(self, result: Result) -> HibernodeError:
        pid = result.who[0]
        if result.halted == "T" or result.gone:
            return GpuBusy(f"process {pid} was stopped by somebody else, or has ended, meanwhile", hint="try again", pid=pid)
        if result.halted:
            return GpuBusy(
                f"a thread of process {pid} does not stop", hint="it waits for a disk or for a child: try again", pid=pid,
                property="thread state", found=result.halted, wanted="T",
            )  # fmt: skip
        if not result.call:
            return self._failed(result, "stop", 0.0)
        return Refused(
            "gpu_design", f"process {pid} cannot be saved while it stands still: {result.name}", prop="gpu.design", found="stop",
            wanted="lock", hint='say `design = "lock"` in [gpu]', pid=pid,
        )  # fmt: skip

    def resume(self, places: Sequence[Mapping[str, str]] = (), *, strict: bool = False, limit: float = 0.0) -> None:
        if not self._users:
            return
        for pairs in [tuple(each.items()) for each in places] or [()]:
            found = self._ask("resume", self._users, pairs=pairs, strict=strict, patience=limit, halted=self._brought_back)
            if not any(result.code == INVALID_VALUE and result.state == "CHECKPOINTED" for result in found):
                break
        self._insist_running(found, limit, gone=strict)

    def undo(self) -> None:
        """Whatever the helper knows of this action runs again."""
        self._insist_running(self._ask("undo", (), patience=_UNDO), _UNDO)

    def park(self, limit: float) -> None:
        """As `Gpu.park`."""
        timeout_ms = max(1, int(self._gpu.lock_timeout * 1e3))
        try:
            results = self._ask("park", self._users, timeout_ms=timeout_ms, patience=limit)
        except HibernodeError as e:
            _log.warning("pids %s are killed as they are: %s", self.pids, e)
            return
        for result in results:
            # Who only has the library in its memory, and whom the driver does not know, has nothing to lose.
            if not result.ok and not result.gone and result.code != NOT_INITIALIZED:
                why = result.name or ("stopped" if result.halted else "no answer" if result.wedged else "its state is no other")
                _log.warning("pid %d is killed while it may use a GPU: %s %s", result.who[0], result.state, why)

    def _insist_running(self, results: Sequence[Result], limit: float, *, gone: bool = False) -> None:
        """`gone`: who has ended is one that does not run. Who has failed is named, before who only waits for him."""
        for result in sorted(results, key=lambda result: result.ok):
            if (gone or not result.gone) and not (result.ok and result.state == "RUNNING"):
                raise self._failed(result, "bring back", limit)

    def close(self) -> None:
        self._gpu.over(self._action_id)
        self._hang_up()

    def _hang_up(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _ask(
        self, verb: Verb, processes: Iterable[Identity], *, timeout_ms: int = 0, patience: float = 0.0,
        pairs: tuple[tuple[str, str], ...] = (), strict: bool = False, halted: Sequence[Identity] = (),
    ) -> list[Result]:  # fmt: skip
        """A helper that has died is asked again, in its next life, where asking twice does no harm."""
        question = Question(verb, self._action_id, list(processes), timeout_ms, patience, pairs, strict, list(halted))
        for again in (True, False):
            try:
                if self._line is None:
                    self._line = _Line(self._gpu.connect())
                return self._line.ask(question, _time_of(question))
            except TimeoutError as e:
                self._hang_up()
                raise GpuWedged(
                    f"the GPU helper does not answer: {verb}",
                    hint="is it stopped? Its pid has the lock on `gpu/lock` in the state directory",
                ) from e
            except (OSError, ValueError) as e:
                self._hang_up()
                if not again or verb not in ("probe", "resume", "undo", "park"):
                    raise GpuFailed(f"the GPU helper ended while it was asked to {verb}: {e}", hint="see its log") from e
                _log.warning("the GPU helper has ended, and is started again: %s", e)
        raise AssertionError

    def _failed(self, result: Result, what: str, limit: float) -> HibernodeError:
        pid = result.who[0]
        if result.wedged:
            return GpuWedged(
                f"the driver does not answer for process {pid} after {limit:.0f} s: {what}", hint="nobody can end a driver's call; "
                "if the process is stopped or frozen let it go on, and what was begun is undone then", pid=pid,
            )  # fmt: skip
        facts = {"pid": pid, "call": result.call, "cuda": result.code, "state": result.state}
        if what == "lock" and result.code == NOT_READY:
            return GpuBusy(
                f"process {pid} had work on its GPU for more than {limit:g} s", hint="raise `gpu.lock_timeout`; a kernel that never "
                "ends, or waits for a peer that is locked, cannot be saved", **facts,
            )  # fmt: skip
        hint = "managed memory, IPC handles, MIG and MPS cannot be saved by this driver" if result.code == NOT_SUPPORTED else ""
        if result.state == "FAILED":
            hint = "the driver has given it up, as it does with managed memory and IPC handles: kill it, and restore an earlier checkpoint"
        why = result.name or ("it has ended" if result.gone else "no answer")
        return GpuFailed(f"the driver could not {what} process {pid}: {why}", hint=hint, **facts)


def _insist_saveable(result: Result, process: ProcessFacts) -> bool:
    """Whether it has GPU state. Only what the driver says for certain is a no."""
    who = f"process {process.pid} ({process.comm!r})"
    device = next((what for descriptor, what in process.fds if _is_gpu((descriptor, what))), "")
    if result.halted:
        raise Refused(
            "target_frozen", f"a thread of {who} is stopped: the driver would wait for it", prop="thread state", found=result.halted,
            wanted="running", hint="send it SIGCONT, thaw its cgroup, or detach the debugger",
        )  # fmt: skip
    if result.wedged:
        raise Refused(
            "gpu_probe_failed", f"the driver does not answer for {who}", prop="answer", found=f"none in {_PROBE:.0f} s",
            wanted="its state", hint="is the driver well? `nvidia-smi` says",
        )  # fmt: skip
    if result.ok and result.state == "RUNNING":
        return True
    if result.ok:
        raise Refused(
            "gpu_state", f"{who} is {result.state} already", prop="CUDA state", found=result.state, wanted="RUNNING",
            hint="another tool has it, or has left it so: `cuda-checkpoint --toggle` brings it back",
        )  # fmt: skip
    if result.code == NOT_INITIALIZED and not device:
        return False
    raise Refused(
        "gpu_probe_failed", f"nobody can say whether {who} has GPU state: {result.name}", prop=result.call or "CUDA state",
        found=f"{result.name}; open: {device or 'no GPU'}", wanted="a CUDA process, or no GPU open",
        hint="it may be starting: try again; what uses a GPU without CUDA cannot be saved",
    )  # fmt: skip


def _insist_no_peers(users: Sequence[ProcessFacts]) -> None:
    """What several processes share on GPUs the driver cannot save, and it says so when it has begun: they are lost then."""
    peers = [each for each in users if any("/libnccl" in path for path in _mapped(each.pid))]
    if len(peers) > 1 and not all(_has_transports_off(each.pid) for each in peers):
        raise Refused(
            "gpu_peers", f"{len(peers)} processes of the workload may share GPU memory by NCCL", prop="NCCL",
            found=", ".join(f"{each.pid} ({each.comm})" for each in peers[:10]), wanted="one, or its transports off",
            hint="start it with NCCL_P2P_DISABLE=1 NCCL_NVLS_ENABLE=0 NCCL_SHM_DISABLE=1", pids=[each.pid for each in peers][:100],
        )  # fmt: skip


def _has_transports_off(pid: int) -> bool:
    """As it was started: NVIDIA's nvcf has saved NCCL so, over eight H100 (gpu.md, section 5)."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return {b"NCCL_P2P_DISABLE=1", b"NCCL_NVLS_ENABLE=0", b"NCCL_SHM_DISABLE=1"} <= set(words)


# --- devices --------------------------------------------------------------------------------------------------------------------


def _is_gpu(descriptor: tuple[int, str]) -> bool:
    """By name: /dev/nvidia0, nvidiactl, nvidia-uvm, wherever a container has them."""
    return descriptor[1].startswith("/") and Path(descriptor[1]).name.startswith("nvidia") and "/dev/" in descriptor[1]


def leftovers(processes: Sequence[ProcessFacts]) -> list[tuple[int, int | str, str]]:
    """What of a GPU these still hold: (pid, descriptor or "map", path). CRIU would refuse it."""
    found: list[tuple[int, int | str, str]] = []
    majors = _majors()
    for process in processes:
        for descriptor, what in process.fds:
            if _is_gpu((descriptor, what)) or _major(process.pid, descriptor) in majors:
                found.append((process.pid, descriptor, what))
        found += [(process.pid, "map", path) for path in _mapped(process.pid) if _is_gpu((0, path))]
    return found


def _mapped(pid: int) -> set[str]:
    """Files that it has in its memory."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}


def _major(pid: int, descriptor: int) -> int:
    """Of the character device that it is open on; 0 for anything else."""
    try:
        found = os.stat(f"/proc/{pid}/fd/{descriptor}")
    except OSError:
        return 0
    return os.major(found.st_rdev) if stat.S_ISCHR(found.st_mode) else 0


def _majors() -> set[int]:
    """Of every device that the NVIDIA driver has registered."""
    try:
        lines = Path("/proc/devices").read_text().partition("Block devices")[0].splitlines()
    except OSError:
        return set()
    words = [line.split() for line in lines]
    return {int(each[0]) for each in words if len(each) == 2 and each[0].isdecimal() and each[1].startswith(("nvidia", "gdrdrv"))}
