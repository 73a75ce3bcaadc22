"""ports.Workloads for everything that runs on a node: each target goes to who knows its kind."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hibernode.drivers.workloads import cgroup, proc, trees
from hibernode.drivers.workloads.kubelet import is_place
from hibernode.drivers.workloads.pod import Containers
from hibernode.drivers.workloads.process import ProcessWorkloads
from hibernode.errors import NotFound
from hibernode.model import HeartbeatWish, JobSpec, RestoreCommand, Target, TaskFacts, WorkloadFacts, WorkloadView
from hibernode.ports import Identity, PreparedWorkload, Workload


class AllWorkloads:
    """Processes, managed jobs, containers, pods. A name that a job and a pod have means the job."""

    def __init__(self, processes: ProcessWorkloads, containers: Containers) -> None:
        self._processes, self._containers = processes, containers

    def find(self, target: Target) -> Workload:
        if target.container:
            return self._containers.container(target.container)
        if target.pid:
            return self._processes.find(target)
        try:
            return self._processes.find(target)
        except NotFound:
            if (pod := self._containers.pod(target)) is not None:
                return pod
            raise

    def fills(self, facts: WorkloadFacts) -> bool:
        return not facts.contained and cgroup.possible()

    def insist_free(self, facts: WorkloadFacts, command: RestoreCommand) -> None:
        if facts.contained:
            self._containers.insist_awaited(facts, command)
        else:
            self._processes.insist_free(facts, command.overrides.pod_name)

    def prepare(self, facts: WorkloadFacts, command: RestoreCommand) -> PreparedWorkload:
        if facts.contained:
            return self._containers.prepare(facts, command)
        return self._processes.prepare(facts, command.overrides.pod_name)

    def blockers(self, tasks: Sequence[TaskFacts], *, living: bool = False) -> Sequence[tuple[int, str]]:
        return self._processes.blockers(tasks, living=living)

    @property
    def makes_pods(self) -> bool:
        return self._containers.makes_pods

    def cluster(self) -> str:
        return self._containers.cluster()

    def runtimes(self) -> tuple[str, str]:
        return self._containers.runtimes()

    def thaw(self, processes: Sequence[Identity], leave: Collection[Identity] = (), freezers: Sequence[str] = ()) -> None:
        self._containers.thaw(freezers)
        self._processes.thaw(processes, leave)

    def kill(
        self, processes: Sequence[Identity], place: str = "", freezers: Sequence[str] = (), *, patience: float | None = None
    ) -> None:
        if is_place(place):
            self._containers.end(place, processes, patience)
            place = ""
        known = [process for process in processes if process[1]]
        there = freezers if not known or any(proc.alive(*process) for process in known) else ()
        trees.empty(there, lambda members: self._processes.kill([*processes, *members], place, patience))

    # --- ports.Jobs ---------------------------------------------------------------------------------------------------------

    def run(self, spec: JobSpec) -> WorkloadView:
        return self._processes.run(spec)

    def stop(self, namespace: str, name: str, signal_name: str) -> WorkloadView:
        return self._processes.stop(namespace, name, signal_name)

    def reap(self) -> bool:
        return self._processes.reap()

    def views(self, target: Target | None) -> list[WorkloadView]:
        """All jobs and pods, or the one workload that `target` names."""
        if target is None:
            return [*self._processes.views(None), *self._containers.views()]
        if target.container:
            return []
        try:
            return self._processes.views(target)
        except NotFound:
            if found := [] if target.pid else self._containers.views(target):
                return found
            raise

    def heartbeats(self) -> list[HeartbeatWish]:
        return self._containers.heartbeats()
