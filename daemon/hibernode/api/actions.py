"""What an action is to the control plane, and the rules by which its status moves. Pure: values in, values out.

A status comes from the node's events, and only forward. There is one exception. Where a node says nothing, the control plane must say
something: it calls the action `error`, and marks that as `provisional`, its own word. The node's next event, whatever it says, takes its
place. So nobody waits for ever, and in the end what is said is what happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, get_args

from hibernode.errors import BusUnavailable, Refused
from hibernode.model import ActionType, Event, Kind, Status
from hibernode.wire import NAME

NODE_SILENT = "node_silent"
NEVER_BEGUN = "never_begun"
NEVER_TOLD = "never_told"
_OF_NODES = ("nodeTermination", "nodeUnschedulable")  # reasons; by `heartbeat` a node could have others' checkpoints removed
LATE = 60.0  # seconds after a command has expired until nobody begins it any more: clocks differ, an event needs its time


@dataclass(frozen=True)
class Action:
    """One row. Times are seconds since the epoch; 0 and "" are what is not known."""

    action_id: str
    checkpoint_id: str
    type: ActionType
    status: Status
    created_at: float
    updated_at: float
    cluster: str
    node: str = ""
    reason: str = "manual"
    kind: str = "simple"
    namespace: str = ""
    pod_name: str = ""
    pod_id: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)  # what its node said of itself: arch, kernel, criu, store
    source: str = ""  # of a restore: the action whose checkpoint it brings back
    expires_at: float = 0.0
    completed_at: float = 0.0  # of a checkpoint: when it became `ready`
    seq: int = 0  # of the last event that counted
    provisional: bool = False
    code: str = ""
    message: str = ""
    hint: str = ""
    retry: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] = field(default_factory=dict)
    location: str = ""
    deleted_at: float = 0.0  # of a checkpoint: when it was taken out of every list
    purged_at: float = 0.0  # and when the command that takes it out of its store was filed

    @property
    def pod(self) -> str:
        return f"{self.namespace or 'default'}/{self.pod_name}" if self.pod_name else self.pod_id


class Standing(Protocol):
    """Of an action, what decides about its next event."""

    @property
    def type(self) -> str: ...
    @property
    def status(self) -> Status: ...
    @property
    def seq(self) -> int: ...
    @property
    def node(self) -> str: ...
    @property
    def provisional(self) -> bool: ...


def changes(action: Standing, events: Sequence[Event], now: float) -> dict[str, Any]:
    """What these change in it, by the fields of `Action` (a profile as it came); no node's clock is believed to be ahead of `now`. An event
    that came before, or comes late, or from another node than the action was given to, changes nothing; so the order in which several
    servers take them does not matter."""
    found: dict[str, Any] = {}
    status, seq, node, provisional = action.status, action.seq, action.node, action.provisional
    for event in sorted(events, key=lambda event: event.seq):
        if event.seq <= seq or (node and event.node != node):
            continue
        found["seq"] = seq = event.seq
        if provisional or event.status.rank > status.rank:
            found |= _said(event, action.type, now)
            status, node, provisional = event.status, event.node, False
    same = [name for name in ("node", "provisional") if name in found and found[name] == getattr(action, name)]
    for name in same:  # a database would write its indexes anew
        del found[name]
    return found


def _said(event: Event, type_: str, now: float) -> dict[str, Any]:
    then = min(event.time, now)
    found = {
        "status": event.status,
        "node": event.node,
        "provisional": False,
        "updated_at": then,
        "code": "" if event.code == "ok" else event.code,
        "message": event.message,
        "hint": event.hint,
        "retry": event.retry,
        "details": dict(event.details),
    }
    if event.status == Status.READY and type_ == "checkpoint":
        found["completed_at"] = then
    if event.profile is not None:
        found["profile"] = event.profile
    if location := str(event.details.get("location", "")):
        found["location"] = location
    return found


def begun_elsewhere(events: Sequence[Event], cluster: str, now: float) -> dict[str, Any]:
    """An action that nobody filed here, but on its node, by gRPC: known from its first event on, and as it is when these have happened. Its
    fields; those that are not here are not known."""
    first = events[0]
    then = min(first.time, now)
    filed = _Filed(first.type, first.node)
    known = {"action_id": first.action_id, "checkpoint_id": first.checkpoint_id, "type": first.type, "cluster": cluster}
    state = {
        "status": filed.status,
        "node": first.node,
        "created_at": then,
        "updated_at": then,
        **_about(first),
    }
    return {**_UNSAID, **known, **state, **changes(filed, events, now)}


def _about(event: Event) -> dict[str, str]:
    """What its node says of an action that it has begun by itself, with each of its events. Where that is no name it is not known."""
    found = event.details.get("about")
    about = found if isinstance(found, dict) else {}
    said = {name: str(about.get(name, "")) for name in ("namespace", "pod_name", "pod_id")}
    reason, kind = str(about.get("reason", "")), str(about.get("kind", ""))
    return {
        **{name: value if NAME.fullmatch(value) else "" for name, value in said.items()},
        "reason": reason if reason in _OF_NODES else "manual",
        "kind": kind if kind in get_args(Kind) else "simple",
    }


def wants_to_go_on(made: Action) -> bool:
    """Its node has made this checkpoint because the pod was being evicted, and the pod asks to go on elsewhere."""
    about = made.details.get("about")
    return made.status == Status.READY and isinstance(about, dict) and about.get("on_stop") == "migrate"


class _Filed(NamedTuple):
    """The standing of an action of which nothing was heard."""

    type: str
    node: str
    status: Status = Status.INITIALIZED
    seq: int = 0
    provisional: bool = False


# What an event says, before one has.
_UNSAID: dict[str, Any] = {
    "seq": 0, "provisional": False, "code": "", "message": "", "hint": "", "retry": False, "details": {}, "completed_at": 0.0,
    "profile": {}, "location": "",
}  # fmt: skip


def failed(action: Action, code: str, message: str, hint: str, now: float) -> Action:
    """The control plane's own word, until the node has another. What has ended stays as it is."""
    if action.status.terminal:
        return action
    return replace(
        action,
        status=Status.ERROR,
        provisional=True,
        updated_at=now,
        code=code,
        message=message,
        hint=hint,
        retry=True,
        details={},
    )


def overdue(action: Action, node_seen_at: float, now: float, silent_after: float, idle_for: float = 0.0) -> Action:
    """`failed` where nobody is to be waited for any more: the command has expired and was never begun, or the node is silent, or it has
    been seen without any action for `idle_for` seconds and this one has not ended. For a node that was never seen, `node_seen_at` is 0."""
    if action.status.terminal:
        return action
    if not action.seq and action.expires_at and now > action.expires_at + LATE:
        return failed(
            action, NEVER_BEGUN, f"the command waited for node {action.node} until it expired", "is its daemon running? Give it again",
            now,
        )  # fmt: skip
    silent = now - max(node_seen_at, action.updated_at)
    if silent > silent_after:
        return failed(
            action, NODE_SILENT, f"node {action.node} has said nothing for {silent:.0f} s",
            "if it comes back it says how the action ended, and this status is corrected", now,
        )  # fmt: skip
    if action.seq and idle_for > silent_after:
        return failed(
            action, NEVER_TOLD, f"node {action.node} has run nothing for {idle_for:.0f} s, and has not said how this action ended",
            f"`hibernode status {action.action_id}` on that node knows; if it says so here, this status is corrected", now,
        )  # fmt: skip
    return action


def unfiled(action: Action) -> bool:
    """Its command may not be in the stream: nothing was ever heard of it, and its server died, or the broker did not answer. Then it may
    be filed again: the stream keeps one command of an id."""
    lost = action.provisional and action.code == BusUnavailable.code
    return not action.seq and (not action.status.terminal or lost)  # an upload may have moved it on


def uploaded(action: Action, status: Status) -> Action:
    """The status that an upload brings along, where it is a step forward that is not the node's alone to say: `ready` and `error` are.
    Anything else leaves the status as it is."""
    if status.terminal or status.rank <= action.status.rank:
        return action
    return replace(action, status=status)


def being_restored(pod: str, by: str) -> Refused:
    return Refused(
        "restoring", f"pod {pod} is being restored", prop="action", found=by, wanted="none", hint="wait for its end, or cancel it"
    )
