"""Processes and managed jobs. A managed job is a pod of a machine without Kubernetes: a name, a namespace, a UID, a log, one tree.

The book of jobs is a directory: `<uid>.json` with what a job is and which process it is now, `<uid>.log` with what it wrote. A job
writes its log with O_APPEND, because CRIU compares the length of every other file at restore; on a restore CRIU is handed a fresh
descriptor of the log (`inherit_fd`), so that nothing of the old node's files is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hibernode.children import Children
from hibernode.drivers.workloads import cgroup, proc, trees
from hibernode.errors import DumpFailed, NotFound, Refused
from hibernode.model import Cancel, JobSpec, Target, TaskFacts, WorkloadFacts, WorkloadView
from hibernode.ports import Criu, CriuOptions, DumpStats, Fetched, Identity, LayerFacts, Prepared, ProcessFacts

_ROOT = "main"  # the image of a workload with one tree


class ProcessWorkload:
    """One tree. ports.Workload."""

    def __init__(self, facts: WorkloadFacts, pid: int, criu: Criu, children: Children) -> None:
        self._facts, self._pid, self._criu, self._children = facts, pid, criu, children
        self._started = proc.start_time(pid)
        self._seen: set[Identity] = {(pid, self._started)}  # who is in the tree, also after a parent has ended
        self._stopped_before: set[Identity] = set()

    @property
    def facts(self) -> WorkloadFacts:
        return self._facts

    @property
    def key(self) -> str:
        return f"pid {self._pid}"

    place, endable = "", True

    def pod_spec(self) -> str:
        return ""

    def roots(self) -> Mapping[str, int]:
        self._insist_alive()
        return {_ROOT: self._pid}

    def _insist_alive(self) -> None:
        if not proc.alive(self._pid, self._started):
            raise NotFound(f"process {self._pid} has ended", hint="it exited after the command was given", pid=self._pid)

    def processes(self) -> Sequence[ProcessFacts]:
        found = []
        for pid, _ in proc.forest([(self._pid, self._started)]):
            with contextlib.suppress(*proc.GONE):
                facts = facts_of(pid)
                found.append(replace(facts, tcp=proc.connections(pid, facts.fds), image=_ROOT, inside=pid))
        self._seen.update((facts.pid, facts.start_time) for facts in found)
        return found

    def within(self, pid: int) -> tuple[str, int]:
        return _ROOT, pid

    def layers(self) -> Mapping[str, LayerFacts]:
        return {}

    def freezers(self) -> tuple[str, ...]:
        return ()

    def freeze(self) -> int:
        """CRIU stops a single tree by itself; here it is only noted who was stopped before, because `thaw` leaves him so."""
        self._seen.update(proc.forest(self._seen))
        self._stopped_before = {process for process in self._seen if proc.stops(process[0])}
        return 0

    def dump(self, image: str, into: Path, pages: socket.socket, options: CriuOptions, cancel: Cancel) -> DumpStats:
        stats = self._criu.dump(self.roots()[image], into, pages, options, cancel)
        if options.leave_stopped:  # it is to be killed
            self._insist_saved(into)
        return stats

    def _insist_saved(self, into: Path) -> None:
        """All who would be killed. Who was in the tree when it was looked at, and whose parent has ended since, is in nobody's dump."""
        saved = {task.pid for task in self._criu.tasks(into)}
        for pid, started in sorted(self._seen):
            if pid not in saved and proc.alive(pid, started):
                raise DumpFailed(
                    f"process {pid} has left the tree of {self._pid} since it was looked at: it would be killed, and is not saved",
                    hint="try again: it is not of the workload any more", pid=pid,
                )  # fmt: skip

    def thaw(self) -> None:
        trees.thaw(self._seen, self._stopped_before)

    def kill(self) -> None:
        trees.kill(self._seen, self._children)


@dataclass(frozen=True)
class Job:
    """One line of the book."""

    uid: str
    namespace: str
    name: str
    argv: list[str]
    cwd: str
    log: str
    pid: int
    start_time: int
    started_at: float
    exit_code: int | None = None

    @property
    def running(self) -> bool:
        return self.pid > 0 and proc.alive(self.pid, self.start_time)


class Jobs:
    """The book. Thread-safe; one file per job, replaced whole."""

    def __init__(self, directory: Path, children: Children, clock: Callable[[], float] = time.time) -> None:
        self._directory, self._children, self._clock = directory, children, clock
        self._guests: dict[int, str] = {}
        self._left: set[str] = set()  # whose roots have ended, and in whose cgroups somebody may still live: a child
        self._lock = threading.RLock()  # held while the book is read and changed, never while anything is waited for
        self._reserved: set[tuple[str, str]] = set()  # names of jobs that are about to run
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def all(self) -> list[Job]:
        jobs = [self._load(path.stem) for path in self._directory.glob("[!.]*.json")]
        return sorted((job for job in jobs if job is not None), key=lambda job: job.started_at)

    def _load(self, uid: str) -> Job | None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Job(**json.loads((self._directory / f"{uid}.json").read_text()))
        return None

    def save(self, job: Job) -> None:
        temporary = self._directory / f".{job.uid}.json"
        with self._lock:
            try:
                with open(temporary, "w", opener=lambda path, flags: os.open(path, flags, 0o600), encoding="utf-8") as file:
                    json.dump(asdict(job), file)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.rename(self._directory / f"{job.uid}.json")
            finally:
                temporary.unlink(missing_ok=True)

    def log_path(self, uid: str) -> str:
        return str(self._directory / f"{uid}.log")

    def remove_log(self, uid: str) -> None:
        """Of a job that came to nothing."""
        with contextlib.suppress(OSError):
            os.unlink(self.log_path(uid))

    def open_log(self, uid: str) -> int:
        return os.open(self.log_path(uid), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def named(self, namespace: str, name: str) -> Job | None:
        """The running job of that name, else the latest that ran."""
        jobs = [job for job in self.all() if (job.namespace, job.name) == (namespace, name)]
        return next((job for job in jobs if job.running), jobs[-1] if jobs else None)

    def insist_free(self, namespace: str, name: str) -> None:
        job = self.named(namespace, name)
        running = job is not None and job.running
        if running or (namespace, name) in self._reserved:
            who = f"pid {job.pid}" if job is not None and running else "about to run"
            raise Refused(
                "name_taken",
                f"there is a job {namespace}/{name} already: {who}",
                prop="name",
                found=f"{namespace}/{name} ({who})",
                wanted="a name no running job has",
                hint="stop it, or choose another name",
            )

    def reserve(self, namespace: str, name: str) -> None:
        """From now on the name is taken, until `release`. Of two who want it one gets it."""
        with self._lock:
            self.insist_free(namespace, name)
            self._reserved.add((namespace, name))

    def release(self, namespace: str, name: str) -> None:
        self._reserved.discard((namespace, name))

    def run(self, spec: JobSpec) -> WorkloadView:
        """Start a job in a session and a cgroup of its own. One that cannot be written down does not run."""
        insist_startable(spec)
        self.reserve(spec.namespace, spec.name)
        uid = str(uuid.uuid4())
        with ExitStack() as always, ExitStack() as undo:
            always.callback(self.release, spec.namespace, spec.name)
            log = self.open_log(uid)
            undo.callback(self.remove_log, uid)
            always.callback(os.close, log)
            child = _start(spec, log)
            undo.callback(cgroup.remove, uid)
            root = child.pid, proc.start_time(child.pid)
            undo.callback(trees.kill, [root], self._children, uid)
            cgroup.join(cgroup.create(uid), child.pid)  # what it forks before that stays in the daemon's
            job = Job(uid, spec.namespace, spec.name, list(spec.argv), spec.cwd, self.log_path(uid), *root, self._clock())
            self.save(job)
            undo.pop_all()
        return self.view(job)

    def stop(self, namespace: str, name: str, signal_name: str, grace: float = 10.0) -> WorkloadView:
        """TERM to its root, and what has not ended with it within `grace` seconds is killed; or KILL at once. Returns when nothing of
        it is left, in its cgroup neither."""
        job = self.named(namespace, name)
        if job is None:
            raise NotFound(f"no job {namespace}/{name}", hint="`hibernode jobs` lists them")
        if job.running:
            root = job.pid, job.start_time
            tree = proc.forest([root])  # before its root ends: afterwards nobody knows whose they were
            if signal_name != "KILL":
                trees.send(root, signal.SIGTERM)
                trees.ends(root, grace)
            trees.kill(tree, self._children, job.uid)
            self.reap()
        cgroup.remove(job.uid)
        return self.view(self._load(job.uid) or job)

    def adopt(self, pid: int, uid: str) -> None:
        """A restored process that is no job lives in cgroup `uid`: removed when it has ended."""
        self._guests[pid] = uid

    def trees(self, *, but: str) -> list[Identity]:
        """The roots of jobs and of restored trees, except those of `but`."""
        jobs = [(job.pid, job.start_time) for job in self.all() if job.uid != but]
        return jobs + [(pid, proc.start_time(pid)) for pid, uid in list(self._guests.items()) if uid != but]

    def make_place(self, uid: str) -> tuple[str, ...]:
        """cgroup.create, for who comes back: it is nobody's to remove any more."""
        with self._lock:
            self._left.discard(uid)
            return cgroup.create(uid)

    def leave(self, uid: str) -> None:
        """The cgroup of `uid` is removed when nobody lives there any more."""
        with self._lock:
            self._left.add(uid)

    def reap(self) -> bool:
        """Wait for children that have ended: keep the exit codes of those that were jobs, remove the cgroups. Never blocks."""
        self._children.reap()
        exits = self._children.take_exits()
        with self._lock:  # against a restore that writes the same job down meanwhile
            for job in self.all() if exits else ():
                if job.pid in exits and not proc.alive(job.pid, job.start_time):
                    self.save(replace(job, exit_code=exits[job.pid]))
                    self._left.add(job.uid)
            self._left.update(self._guests.pop(pid) for pid in exits.keys() & self._guests.keys())
            self._left = {uid for uid in self._left if not cgroup.remove(uid)}
        return bool(exits)

    def view(self, job: Job) -> WorkloadView:
        return self.views([job])[0]

    def views(self, jobs: Sequence[Job]) -> list[WorkloadView]:
        """How they are now."""
        families = proc.families([(job.pid, job.start_time) for job in jobs if job.running])
        return [_view(job, families.get((job.pid, job.start_time), [])) for job in jobs]


def _view(job: Job, tree: Sequence[proc.Stat]) -> WorkloadView:
    """Of one whose processes these are; none: it has ended."""
    return WorkloadView(
        kind="job",
        namespace=job.namespace,
        name=job.name,
        uid=job.uid,
        pid=job.pid if tree else 0,
        state="running" if tree else "killed" if (job.exit_code or 0) < 0 else "exited",
        command=" ".join(job.argv),
        rss=sum(process.rss for process in tree),
        processes=len(tree),
        log=job.log,
        started_at=job.started_at,
    )


def insist_startable(spec: JobSpec) -> None:
    """Refused("cannot_start") for what no kernel can be handed: strings end with a NUL, names of variables with a `=`."""
    bad = [text for text in (*spec.argv, spec.cwd) if "\0" in text]
    bad += [name for name, value in spec.env.items() if not name or "=" in name or "\0" in name + value]  # values may be secret
    if bad:
        raise Refused(
            "cannot_start",
            f"no program can be given {bad[0][:200]!r}",
            prop="argv, cwd, env",
            found=repr(bad[0][:200]),
            wanted="no NUL anywhere; names of variables that are not empty and have no =",
        )


def _start(spec: JobSpec, log: int) -> subprocess.Popen[bytes]:
    try:
        child = subprocess.Popen(
            spec.argv, cwd=spec.cwd, env=spec.env or {"PATH": os.defpath}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    except OSError as e:
        raise Refused(
            "cannot_start",
            f"cannot start {spec.argv[0]!r} in {spec.cwd}: {e.strerror}",
            prop="argv",
            found=spec.argv[0],
            wanted="a program that can be executed there",
        ) from e
    child.returncode = 0  # `children` waits for it like for a restored one; this object must not
    return child


class ProcessWorkloads:
    """Processes and managed jobs: `kinds` has the rest."""

    def __init__(self, jobs: Jobs, criu: Criu, children: Children) -> None:
        self._jobs, self._criu, self._children = jobs, criu, children

    def find(self, target: Target) -> ProcessWorkload:
        if target.pid:
            return self._process(target.pid)
        job = self._job(target)
        if not job.running:
            raise NotFound(
                f"job {job.namespace}/{job.name} does not run", hint="`hibernode jobs` shows how it ended", uid=job.uid
            )
        return ProcessWorkload(self._facts_of(job), job.pid, self._criu, self._children)

    def _job(self, target: Target) -> Job:
        if target.pod_id:
            job = next((job for job in self._jobs.all() if job.uid == target.pod_id), None)
        else:
            job = self._jobs.named(target.namespace or "default", target.pod_name)
        if job is None:
            raise NotFound(f"no {target} on this node", hint="`hibernode jobs` lists what can be checkpointed here")
        return job

    def _facts_of(self, job: Job) -> WorkloadFacts:
        logs = {job.log: "log"}
        return WorkloadFacts(
            kind="job", name=job.name, namespace=job.namespace, uid=job.uid, logs=logs, argv=job.argv, cwd=job.cwd
        )

    def _process(self, pid: int) -> ProcessWorkload:
        insist_foreign(pid)
        try:
            facts = facts_of(pid)
        except proc.GONE:
            raise NotFound(f"no process {pid}", hint="it has ended, or lives in another pid namespace", pid=pid) from None
        insist_dumpable(facts)
        job = next((job for job in self._jobs.all() if job.pid == pid and job.running), None)
        if job is not None:
            return ProcessWorkload(self._facts_of(job), pid, self._criu, self._children)
        argv = proc.command_line(pid)
        return ProcessWorkload(WorkloadFacts(kind="process", name=facts.comm, argv=argv), pid, self._criu, self._children)

    def insist_free(self, facts: WorkloadFacts, name: str) -> None:
        if _is_job(facts, name):
            self._jobs.insist_free(facts.namespace, name or facts.name)

    def prepare(self, facts: WorkloadFacts, name: str) -> PreparedProcess:
        return PreparedProcess(facts, name, self._jobs, self._criu, self._children)

    def blockers(self, tasks: Sequence[TaskFacts], *, living: bool = False) -> Sequence[tuple[int, str]]:
        self._jobs.reap()
        taken = []
        for pid in (pid for task in tasks for pid in (task.pid, *task.threads)):
            with contextlib.suppress(*proc.GONE):
                holder, ended = proc.stat(pid), proc.thread_states(pid) <= trees.DEAD
                what = f"a zombie of {holder.comm!r} that its parent {holder.ppid} has not waited for"
                if not (living and ended):
                    taken.append((pid, what if ended else repr(holder.comm)))
        return taken

    def thaw(self, processes: Sequence[Identity], leave: Collection[Identity] = ()) -> None:
        trees.thaw(processes, leave)

    def kill(self, processes: Sequence[Identity], place: str = "", patience: float | None = None) -> None:
        trees.kill(processes, self._children, place, patience)

    # --- ports.Jobs ---------------------------------------------------------------------------------------------------------

    def run(self, spec: JobSpec) -> WorkloadView:
        return self._jobs.run(spec)

    def stop(self, namespace: str, name: str, signal_name: str) -> WorkloadView:
        return self._jobs.stop(namespace, name, signal_name)

    def reap(self) -> bool:
        return self._jobs.reap()

    def views(self, target: Target | None) -> list[WorkloadView]:
        """All jobs, or the one workload that `target` names."""
        if target is None:
            return self._jobs.views(self._jobs.all())
        if not target.pid:
            return [self._jobs.view(self._job(target))]
        workload = self._process(target.pid)
        processes = workload.processes()
        return [
            WorkloadView(
                kind="process",
                namespace="",
                name=workload.facts.name,
                pid=target.pid,
                command=" ".join(workload.facts.argv),
                rss=sum(p.rss for p in processes),
                processes=len(processes),
            )
        ]


def _is_job(facts: WorkloadFacts, name: str) -> bool:
    """Does it come back as a managed job? A process does under a new name."""
    return facts.kind == "job" or bool(name)


def facts_of(pid: int) -> ProcessFacts:
    """Of a process that may be somebody else's. Raises FileNotFoundError or ProcessLookupError when it is gone."""
    try:
        return proc.facts(pid)
    except PermissionError as e:
        raise Refused(
            "no_access", f"the daemon may not look into process {pid}", prop=str(e.filename), found=e.strerror, wanted="readable",
            hint="the daemon needs CAP_SYS_PTRACE, and all capabilities that the process has", pid=pid,
        ) from e  # fmt: skip


def insist_foreign(pid: int) -> None:
    """Refuse a tree that the daemon itself is in: frozen, it could not let go."""
    if pid == 1 or os.getpid() in proc.tree(pid):
        raise Refused(
            "not_a_workload", f"the tree of pid {pid} is init's, or has the daemon in it", prop="pid", found=pid,
            wanted="a tree without the daemon", hint="name the process that is to be saved, not what started the daemon",
        )  # fmt: skip


def insist_dumpable(facts: ProcessFacts) -> None:
    """Refuse what can never be the root of a workload."""
    pid = facts.pid
    if facts.kernel_thread:
        raise Refused(
            "kernel_thread", f"pid {pid} is the kernel thread {facts.comm!r}", prop="pid", found=pid, wanted="a process",
            hint="it belongs to the kernel; name a process",
        )  # fmt: skip
    if facts.tgid != pid:
        raise Refused(
            "pid_is_thread",
            f"pid {pid} is a thread of process {facts.tgid}",
            prop="pid",
            found=pid,
            wanted=facts.tgid,
            hint=f"name the process: {facts.tgid}",
        )
    if facts.state in ("Z", "X"):
        raise Refused(
            "zombie",
            f"process {pid} ({facts.comm!r}) is a zombie",
            prop="state",
            found=facts.state,
            wanted="a live process",
            hint="it has ended; its parent has not waited for it",
        )


class PreparedProcess:
    """ports.PreparedWorkload: a log and a cgroup for a tree that comes back."""

    def __init__(self, facts: WorkloadFacts, name: str, jobs: Jobs, criu: Criu, children: Children) -> None:
        self._jobs, self._criu, self._children = jobs, criu, children
        self._facts = facts.model_copy(update={"name": name or facts.name})
        self._is_job = _is_job(facts, name)
        self._log, self._new_log, self._open = -1, False, True
        running = {job.uid for job in jobs.all() if job.running}
        reuse = facts.uid and not name and facts.uid not in running and not cgroup.members(facts.uid)
        self._uid = facts.uid if reuse else str(uuid.uuid4())
        if self._is_job:
            jobs.reserve(self._facts.namespace, self._facts.name)
        try:
            if facts.logs:
                self._new_log = not Path(jobs.log_path(self._uid)).exists()
                self._log = jobs.open_log(self._uid)
            self._procs = jobs.make_place(self._uid)
        except BaseException:
            self.discard()
            raise
        self._began = proc.now()

    @property
    def place(self) -> str:
        return self._uid

    @property
    def prepared(self) -> Prepared:
        keys = {path.lstrip("/"): self._log for path in self._facts.logs if self._log >= 0}
        return Prepared(inherit=keys, cgroup_procs=self._procs)

    def restore(
        self,
        fetched: Fetched,
        options: CriuOptions,
        cancel: Cancel,
        note: Callable[[Sequence[str]], None],  # noqa: ARG002 - it is born in `place`
    ) -> ProcessWorkload:
        (directory,) = fetched.images.values()
        if fetched.begin is not None:
            self._begin(fetched.begin)
        return self._adopt(self._criu.restore(directory, options, self.prepared, cancel, fetched.held))

    def _begin(self, begin: Callable[[Sequence[str], Sequence[str]], None]) -> None:
        if not self._procs:
            raise Refused(
                "lazy_cgroup", "no cgroup can be made here, and by it a tree that is filled is found when it has to be killed",
                prop="cgroup", found="none", wanted="hibernode/<uid>", hint="without `lazy`, and with `filler = false` in [criu]",
            )  # fmt: skip
        own = f"{self._uid}.keeper"
        try:
            begin(self._procs, self._jobs.make_place(own))
        finally:
            self._jobs.leave(own)

    def _adopt(self, pid: int) -> ProcessWorkload:
        facts = self._facts
        if self._is_job:
            job = Job(
                self._uid, facts.namespace, facts.name, facts.argv, facts.cwd, self._jobs.log_path(self._uid), pid,
                proc.start_time(pid), time.time(),
            )  # fmt: skip
            self._jobs.save(job)
            self._new_log = False  # it is the job's
            facts = facts.model_copy(update={"uid": self._uid, "logs": {job.log: "log"}, "kind": "job"})
        else:
            self._jobs.adopt(pid, self._uid)
        self._close()
        return ProcessWorkload(facts, pid, self._criu, self._children)

    def kill(self, tasks: Sequence[TaskFacts]) -> None:
        trees.kill(self._made(tasks), self._children, self._uid)

    def _made(self, tasks: Sequence[TaskFacts]) -> list[Identity]:
        """What may be of this restore and not in its cgroup, because none could be made: it has a pid of the image, began after
        `prepare`, which found that pid free, descends from this daemon, and is in no other tree that the daemon knows, nor one of its
        helpers: the CRIU of a dump may have taken that pid meanwhile."""
        helpers = self._children.helpers()
        pids, others = {task.pid for task in tasks}, set(proc.forest(self._jobs.trees(but=self._uid)))
        below = proc.forest([(os.getpid(), proc.start_time(os.getpid()))])
        return [each for each in below if each[0] in pids - helpers and each[1] >= self._began and each not in others]

    def discard(self) -> None:
        self._close()
        if self._new_log:
            self._jobs.remove_log(self._uid)
        cgroup.remove(self._uid)

    def _close(self) -> None:
        """Both ends come here: the name is the job's in the book, or free again."""
        if self._open:
            self._open = False
            if self._is_job:
                self._jobs.release(self._facts.namespace, self._facts.name)
            if self._log >= 0:
                os.close(self._log)
