"""Every way an action can end badly: one class per kind of answer, one stable code per leaf.

    HibernodeError
    ├── Permanent                 trying the same command again gives the same answer
    │   ├── BadCommand            bad_command        the message cannot be understood
    │   ├── NotFound              not_found          no such pod, job, process, action or checkpoint
    │   ├── Refused               <reason>           understood, and turned down before anything was touched
    │   ├── Corrupt               corrupt            stored bytes are not what was written
    │   ├── DumpFailed            dump_failed        CRIU could not dump; the workload runs on
    │   ├── RestoreFailed         restore_failed     CRIU could not restore; nothing of it is left running
    │   ├── GpuFailed             gpu_failed         the driver could not save or bring back GPU state; what was begun is undone
    │   ├── Interrupted           interrupted        the daemon died in the middle; recovery undid it
    │   ├── Cancelled             cancelled          somebody asked for it
    │   ├── DeadlineExceeded      deadline           a phase took longer than it may; what it had begun is undone
    │   ├── Internal              internal           a defect of ours
    │   └── Stuck                 left_suspended     an undo failed, a workload may need a person
    │       ├── GpuWedged         gpu_wedged         a driver call does not return; nobody can end it
    │       └── OutcomeUnknown    outcome_unknown    a step was begun and nobody saw how it ended
    └── Transient                 the same command may succeed later
        ├── StoreUnavailable      store_unavailable
        ├── BusUnavailable        bus_unavailable
        ├── DatabaseUnavailable   database_unavailable   of the control plane
        ├── CriUnavailable        cri_unavailable    the container runtime does not answer, or not as it must
        ├── KubernetesUnavailable kubernetes_unavailable   its API server does not answer, or not as it must
        ├── KeyService            key_service        a key management service does not answer as it must
        ├── Busy                  busy               the workload or the node has another action
        ├── GpuBusy               gpu_busy           work on the GPU did not end in time; the workload runs on
        └── NoRoom                no_room            disk, tmpfs or memory is full

Codes are stable: the same string stands in events, metrics, gRPC details and the REST API. Messages are lower case, without a
full stop; `hint` is there where a person can act. A refusal names the property and both values.
"""

from __future__ import annotations

from typing import ClassVar


class HibernodeError(Exception):
    """Base of all of them. `code` is stable, `retry` says whether the same command may succeed later."""

    code: str = "internal"
    retry: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class Permanent(HibernodeError):
    """Trying again gives the same answer."""


class Transient(HibernodeError):
    """Trying again later may succeed."""

    retry = True


class BadCommand(Permanent):
    code = "bad_command"


class NotFound(Permanent):
    code = "not_found"


class Refused(Permanent):
    """Turned down before anything was touched: `reason` is the code, `found` and `wanted` are the two values of `prop`."""

    def __init__(
        self, reason: str, message: str, *, prop: str, found: object, wanted: object, hint: str = "", **details: object
    ) -> None:
        super().__init__(message, hint=hint, property=prop, found=found, wanted=wanted, **details)
        self.code = reason


class Corrupt(Permanent):
    code = "corrupt"


class DumpFailed(Permanent):
    code = "dump_failed"


class RestoreFailed(Permanent):
    code = "restore_failed"


class GpuFailed(Permanent):
    code = "gpu_failed"


class Interrupted(Permanent):
    code = "interrupted"


class Cancelled(Permanent):
    code = "cancelled"


class DeadlineExceeded(Permanent):
    code = "deadline"


class Internal(Permanent):
    code = "internal"


class Stuck(Permanent):
    code = "left_suspended"


class GpuWedged(Stuck):
    code = "gpu_wedged"


class OutcomeUnknown(Stuck):
    code = "outcome_unknown"


class StoreUnavailable(Transient):
    code = "store_unavailable"


class NoAnswer(StoreUnavailable):
    """What was asked may still be done: a request was sent, and nobody said how it ended."""


class BusUnavailable(Transient):
    code = "bus_unavailable"


class DatabaseUnavailable(Transient):
    code = "database_unavailable"


class CriUnavailable(Transient):
    code = "cri_unavailable"


class KubernetesUnavailable(Transient):
    code = "kubernetes_unavailable"


class KeyService(Transient):
    code = "key_service"


class Busy(Transient):
    code = "busy"


class GpuBusy(Transient):
    code = "gpu_busy"


class NoRoom(Transient):
    code = "no_room"
