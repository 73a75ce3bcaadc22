"""Pods: which containers there are is asked of the container runtime (CRI), what they are like of runc's own state, and the two must agree.

A pod is found by its UID, or by its exact namespace and name. Its sandbox (the pause container) is never dumped: a restored pod gets a
sandbox of its own.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from hibernode import wishes
from hibernode.arrivals import Arrival, Arrivals, Order, awaited
from hibernode.children import Children
from hibernode.drivers.workloads import cri as interface
from hibernode.drivers.workloads import devices, freezer, network, proc, rights, runc, trees
from hibernode.drivers.workloads import kubelet as by_kubelet
from hibernode.drivers.workloads.cri import Cri
from hibernode.drivers.workloads.kubelet import Kubelet
from hibernode.drivers.workloads.runc import ContainersWorkload
from hibernode.errors import DeadlineExceeded, HibernodeError, NotFound, Refused, RestoreFailed
from hibernode.model import Cancel, ContainerFacts, HeartbeatWish, RestoreCommand, Target, TaskFacts, WorkloadFacts, WorkloadView
from hibernode.pods import ACTION
from hibernode.ports import Criu, CriuOptions, Fetched, Identity, Pod

_EVERY = 2.0  # seconds between two looks at a pod that is being made
_log = logging.getLogger("hibernode.pod")
_ROOT, _NAMESPACE = Path("/run/containerd/runc"), "k8s.io"  # of containerd, where the handler's options name no other


class Containers:
    """Pods and containers of this node. `cri`: None where it has no container runtime with that interface; `kubelet`: where it is of no
    cluster."""

    def __init__(
        self,
        cri: Cri | None,
        roots: Collection[Path],
        program: str,
        arrivals: Arrivals,
        criu: Criu,
        children: Children,
        kubelet: Kubelet | None = None,
    ) -> None:
        """`roots`: directories of runc's states, for containers that are named by their id. `program`: runc."""
        self._cri, self._roots, self._program, self._arrivals = cri, roots, program, arrivals
        self._criu, self._children, self._kubelet = criu, children, kubelet

    def container(self, container_id: str) -> ContainersWorkload:
        """The one of that id, of whatever pod or none. NotFound, Refused("ambiguous" | "runc_state" | "not_a_workload")."""
        found = runc.find(self._roots, container_id)
        runc.insist_foreign([found], f"container {found.id}")
        facts = WorkloadFacts(kind="container", name=_named(container_id), argv=proc.command_line(found.init[0]))
        return ContainersWorkload(facts, f"container {found.id}", [found], self._program, self._criu, self._children)

    def pod(self, target: Target) -> ContainersWorkload | None:
        """None if there is no such pod here. NotFound where none of its containers runs; Refused("ambiguous" | "no_cri" | "runc_state"
        | "not_a_workload"); CriUnavailable."""
        sandbox = self._sandbox(target)
        if sandbox is None or self._cri is None:
            return None
        running = [container for container in self._cri.containers(sandbox.id) if container.state == "running"]
        if not running:
            raise NotFound(
                f"pod {_of(sandbox)} has no container that runs", hint="`kubectl describe pod` shows why", uid=sandbox.uid
            )
        facts = WorkloadFacts(
            kind="pod",
            name=sandbox.name,
            namespace=sandbox.namespace,
            uid=sandbox.uid,
            kubelet=by_kubelet.of_kubelet(sandbox.annotations),
            containers=[ContainerFacts(name=each.name, image=each.image, image_ref=each.image_ref) for each in running],
        )
        containers = [self._loaded(self._cri, each) for each in running]
        runc.insist_foreign(containers, f"pod {_of(sandbox)}")
        whose = self._kubelet if by_kubelet.of_server(sandbox.annotations) else None
        made_by = sandbox.annotations.get(ACTION)  # the restore that it is made for has this key, while it goes on
        key = f"pod of {made_by}" if made_by else f"pod {sandbox.uid}"
        return ContainersWorkload(facts, key, containers, self._program, self._criu, self._children, whose)

    def _sandbox(self, target: Target) -> interface.Sandbox | None:
        """The one that is ready; of earlier attempts at it none is."""
        if self._cri is None or not self._cri.there:
            return None
        name = {"namespace": target.namespace or "default", "name": target.pod_name}
        found = self._cri.sandboxes(uid=target.pod_id) if target.pod_id else self._cri.sandboxes(**name)
        ready = [sandbox for sandbox in found if sandbox.state == "ready"]
        if len(ready) > 1:  # while one is being replaced, or where somebody else than a kubelet makes pods
            raise Refused(
                "ambiguous", f"{len(ready)} pods are {target}", prop="target", found=", ".join(each.uid for each in ready), wanted="one",
                hint="name it by UID; or one is going away: wait for that",
            )  # fmt: skip
        return ready[0] if ready else None

    def _loaded(self, cri: Cri, container: interface.Container) -> runc.Container:
        details = cri.container(container.id)
        root = (Path(details.runtime_root) if details.runtime_root else _ROOT) / _NAMESPACE
        found = runc.load(root, container.id, container.name)
        if found.init[0] != details.pid:
            raise Refused(
                "runc_state", f"container {container.name!r}: runc and the container runtime name different processes", prop="pid",
                found=found.init[0], wanted=details.pid, hint="does the daemon see the machine's processes? In a pod: hostPID: true",
            )  # fmt: skip
        return found

    def runtimes(self) -> tuple[str, str]:
        code, said = self._children.run([self._program, "--version"], timeout=10)
        runc_is = said.splitlines()[0].strip()[:100] if code == 0 and said.strip() else ""
        with contextlib.suppress(HibernodeError):
            return self._cri.version() if self._cri is not None and self._cri.there else "", runc_is
        return "", runc_is

    @property
    def makes_pods(self) -> bool:
        return self._kubelet is not None

    def cluster(self) -> str:
        return self._kubelet.says() if self._kubelet is not None else ""

    def thaw(self, freezers: Sequence[str]) -> None:
        """Whoever lives there goes on, also where a CRIU was killed that held him. As `freezer.thaw`."""
        network.reopen([pid for place in freezers for pid in freezer.members(place)], self._children)
        freezer.thaw(freezers)

    def insist_awaited(self, facts: WorkloadFacts, command: RestoreCommand) -> None:
        """Refused("no_pod") where no pod is being made for it, and none can be; else as `Kubelet.insist_free`."""
        if command.pod_id:
            return
        if self._kubelet is not None and command.pod_spec:
            self._kubelet.insist_free(facts, command)
            return
        lacks = "the command has no spec of one" if self._kubelet is not None else "this node knows no API server to make one"
        raise Refused(
            "no_pod", f"this is the checkpoint of a {facts.kind}, no pod waits for it, and {lacks}", prop="pod_id", found="none",
            wanted="a pod that is being made",
            hint="restore it by the API, which has the specs of pods; or make one with the annotation hibernode.io/restore-from and the "
            "runtime class hibernode",
        )  # fmt: skip

    def prepare(self, facts: WorkloadFacts, command: RestoreCommand) -> PreparedPod:
        self.insist_awaited(facts, command)
        maker = self._kubelet if not command.pod_id else None
        return PreparedPod(facts, command, self._arrivals, self._program, self._criu, self._children, self._made_of, maker)

    def end(self, place: str, processes: Sequence[Identity], patience: float | None = None) -> None:
        """The pod of this `Workload.place`, whose `processes` are held: as `Workload.kill` begins. Of one that was made for a restore
        nothing is held. `patience`: as `Workloads.kill` has it."""
        namespace, name, uid, action_id = by_kubelet.read_place(place)
        if self._kubelet is None:
            _log.warning("pod %s/%s is killed without its kubelet: this node knows no API server any more", namespace, name)
        elif uid and not any(proc.alive(*process) for process in processes):
            _log.warning("pod %s/%s: who was to be killed has ended; who is in it now stays", namespace, name)
        elif uid:
            self._kubelet.end(namespace, name, uid, lambda: not any(proc.alive(*process) for process in processes), patience)
        else:
            self._kubelet.forget(namespace, name, action_id)

    def _made_of(self, container_id: str) -> interface.Container | None:
        return self._cri.listed(container_id) if self._cri is not None and self._cri.there else None

    def views(self, target: Target | None = None) -> list[WorkloadView]:
        """All pods that run, or the one that is meant. A runtime that does not answer has none, where all are asked for."""
        if self._cri is None or not self._cri.there:
            return []
        if target is not None:
            workload = self.pod(target)
            return [] if workload is None else [_view(workload)]
        try:
            sandboxes = [sandbox for sandbox in self._cri.sandboxes() if sandbox.state == "ready"]
        except HibernodeError:
            return []
        return [
            WorkloadView(
                kind="pod",
                namespace=each.namespace,
                name=each.name,
                uid=each.uid,
                started_at=each.created / 1e9,
                moves=wishes.on_stop(each.annotations)[0] == wishes.MIGRATE,
            )
            for each in sandboxes
        ]

    def heartbeats(self) -> list[HeartbeatWish]:
        """What pods that run ask for by annotation. CriUnavailable, Refused("no_cri")."""
        if self._cri is None or not self._cri.there:
            return []
        ready = [sandbox for sandbox in self._cri.sandboxes() if sandbox.state == "ready"]
        found = (wishes.heartbeat(each.namespace, each.name, each.uid, each.created / 1e9, each.annotations) for each in ready)
        return [wish for wish in found if wish is not None]


def _view(workload: ContainersWorkload) -> WorkloadView:
    processes, facts = workload.processes(), workload.facts
    return WorkloadView(
        kind="pod",
        namespace=facts.namespace,
        name=facts.name,
        uid=facts.uid,
        pid=next(iter(workload.roots().values())),
        command=", ".join(container.name for container in facts.containers),
        rss=sum(process.rss for process in processes),
        processes=len(processes),
    )


def _nobody_made(left: Collection[str], trouble: str, error: DeadlineExceeded) -> DeadlineExceeded:
    names = ", ".join(sorted(left))
    return DeadlineExceeded(
        f"{error.message}: containers of the checkpoint that the pod has not got: {names}" + (f" ({trouble})" if trouble else ""),
        hint="does the new pod have containers of these names? `kubectl describe pod` shows what keeps them; or raise `limits.restore`",
        **error.details,
    )


def _of(sandbox: interface.Sandbox) -> str:
    return f"{sandbox.namespace}/{sandbox.name}"


def _named(container_id: str) -> str:
    """As an image can be called."""
    return container_id[:64].strip("-_.+") or "main"


class PreparedPod:
    """ports.PreparedWorkload: a pod that a kubelet makes, container by container, and whose runtime asks what it is to do with each.
    Each runs from its own start on: a kubelet starts one before it makes the next."""

    def __init__(
        self,
        facts: WorkloadFacts,
        command: RestoreCommand,
        arrivals: Arrivals,
        program: str,
        criu: Criu,
        children: Children,
        made_of: Callable[[str], interface.Container | None],
        maker: Kubelet | None,
    ) -> None:
        """`made_of`: what the container runtime says of a container, by its id; None where there is none to ask. `maker`: of the pod; None
        if it is being made already."""
        self._made_of, self._maker, self._command = made_of, maker, command
        name = command.overrides.pod_name or facts.name
        self._facts = facts.model_copy(update={"name": name, "uid": command.pod_id})
        self._pod: Pod | None = None
        self._arrivals = arrivals
        self._program, self._criu, self._children = program, criu, children
        self._made: list[runc.Container] = []
        self._places: list[str] = []  # freezers of all that was begun

    @property
    def place(self) -> str:
        """Its containers are their runtime's; who they are is in the journal when they are there."""
        return by_kubelet.place_for(self._command, self._facts) if self._maker is not None else ""

    def restore(
        self, fetched: Fetched, options: CriuOptions, cancel: Cancel, note: Callable[[Sequence[str]], None]
    ) -> ContainersWorkload:
        left = {*fetched.images, *fetched.layers}
        try:
            with self._pod_made(cancel):
                self._take_in(left, fetched, options, cancel, note)
        except DeadlineExceeded as e:
            raise self._closed(_nobody_made(left, self._trouble(), e) if left else e) from e
        except HibernodeError as e:
            raise self._closed(e) from None
        return self._workload()

    @contextlib.contextmanager
    def _pod_made(self, cancel: Cancel) -> Iterator[None]:
        """There is a pod. If it is ours it is looked at from time to time: one that its kubelet gives up is not waited for."""
        if self._maker is None:
            yield
            return
        self._pod = self._maker.make(self._command, cancel)
        self._facts = self._facts.model_copy(update={"uid": self._pod.uid})
        _log.info("pod %s/%s is made", self._pod.namespace, self._pod.name)
        over = threading.Event()
        looking = threading.Thread(target=self._look, args=(over, cancel), name="pod", daemon=True)
        looking.start()
        try:
            yield
        finally:
            over.set()
            looking.join()

    def _look(self, over: threading.Event, cancel: Cancel) -> None:
        while not over.wait(_EVERY):
            try:
                self._trouble(strict=True)
            except RestoreFailed as e:
                cancel.set(e.message, e)
                return

    def _trouble(self, *, strict: bool = False) -> str:
        """What the kubelet says; a server that does not answer says nothing. `strict`: raises RestoreFailed."""
        try:
            return self._maker.look(self._pod) if self._maker is not None and self._pod is not None else ""
        except RestoreFailed as e:
            if strict:
                raise
            return e.message
        except HibernodeError:
            return ""

    def _take_in(
        self, left: set[str], fetched: Fetched, options: CriuOptions, cancel: Cancel, note: Callable[[Sequence[str]], None]
    ) -> None:
        """Each container as it comes, until all that are `left` are there."""
        while left:
            arrival = self._arrivals.next(self._command.action_id, cancel)
            if stranger := self._stranger(arrival):
                arrival.end(stranger)
            elif arrival.name not in left:  # it was not there then, or did not run; or it has ended and is made anew
                arrival.give(Order())
            elif self._bring_back(arrival, fetched, options, cancel, note):
                left.remove(arrival.name)

    def _stranger(self, arrival: Arrival) -> Refused | None:
        """A container of another pod than the one that is restored gets nothing of its memory, nor does a pod in another namespace: whoever
        makes pods in one is not to read those of another."""
        facts = self._facts
        for prop, found, wanted in (("pod", arrival.pod, facts.uid), ("namespace", arrival.namespace, facts.namespace)):
            if found != wanted and (prop == "pod" or facts.kind == "pod"):
                return Refused(
                    "other_pod", f"container {arrival.name!r} is of another {prop} than the restore", prop=prop, found=found, wanted=wanted,
                    hint="restore it in the namespace that it was in, each pod by its own restore",
                )  # fmt: skip
        return None

    def _closed(self, error: HibernodeError) -> HibernodeError:
        """Whoever makes the pod hears just this."""
        self._arrivals.close(self._command.action_id, error)
        return error

    def _bring_back(
        self, arrival: Arrival, fetched: Fetched, options: CriuOptions, cancel: Cancel, note: Callable[[Sequence[str]], None]
    ) -> bool:
        """False: whoever made it has given up before anything was done; it comes again, with a root file system of its own."""
        directory = fetched.images.get(arrival.name)
        if directory is not None:
            demands = self._criu.demands(directory)
            rights.insist_within(arrival.name, runc.spec_of(arrival.bundle), demands)
            network.insist_there(arrival.name, runc.spec_of(arrival.bundle), demands.sockets, kept=options.tcp == "established")
        self._insist_same_image(arrival)
        arrival.touched = True
        if arrival.name in fetched.layers:
            fetched.layers[arrival.name](runc.rootfs_of(arrival.bundle))
        if directory is None:  # its files alone: it is started anew
            return arrival.give(Order())
        self._places.append(runc.freezer_of(arrival.bundle))
        note(self._places)  # before it is there
        with runc.keeping_times(runc.rootfs_of(arrival.bundle), demands.deleted):
            if not arrival.give(self._order(directory, options)):
                return False
            awaited(arrival.made, cancel)
        container = runc.load(arrival.root, arrival.id, arrival.name)
        self._made.append(container)
        devices.give(arrival.name, runc.spec_of(arrival.bundle), container.init[0], demands.devices)
        awaited(arrival.started, cancel, lambda: container.alive)
        return True

    def _insist_same_image(self, arrival: Arrival) -> None:
        """Refused("container_image"): files that a process has open, and those that it will look for, are of its image. An image that the
        container runtime knows by digest on both sides is compared so; one that it does not know yet, by name."""
        was = next((each for each in self._facts.containers if each.name == arrival.name), None)
        now = self._made_of(arrival.id)
        if was is None or now is None:
            return
        found, wanted = (now.image_ref, was.image_ref) if now.image_ref and was.image_ref else (now.image, was.image)
        if found != wanted:
            raise Refused(
                "container_image", f"container {arrival.name!r} is of another image than in the checkpoint", prop="image", found=found,
                wanted=wanted, hint="give the new pod the image that the old one had, by digest",
            )  # fmt: skip

    def _workload(self) -> ContainersWorkload:
        key = f"pod {self._facts.uid}"
        return ContainersWorkload(self._facts, key, self._made, self._program, self._criu, self._children)

    def _order(self, directory: Path, options: CriuOptions) -> Order:
        settings = directory.with_name(f"{directory.name}.conf")
        settings.write_text("".join(f"{line}\n" for line in runc.criu_settings(options)))
        known = self._criu.environment()
        env = {name: known[name] for name in ("PATH", "CRIU_LIBS_DIR") if name in known}
        # auto-dedup frees each page of the image as it is used: no second copy at the end
        return Order(directory, ("--auto-dedup", *runc.flags(options)), {**env, "CRIU_CONFIG_FILE": str(settings)})

    def kill(self, tasks: Sequence[TaskFacts]) -> None:  # noqa: ARG002 - whoever lives in the containers is of it
        self._arrivals.close(self._command.action_id, RestoreFailed("the restore of its pod has failed"))
        trees.empty(self._places, lambda members: trees.kill(members, self._children))
        if self._maker is not None:
            self._maker.forget(self._facts.namespace, self._facts.name, self._command.action_id)

    def discard(self) -> None:
        self._arrivals.close(self._command.action_id, RestoreFailed("the restore of its pod has ended"))
