"""All SQL of the control plane: SQLite where there is one server, PostgreSQL where there are more. Blocking; call it from threads.

Every method is one transaction, and may raise DatabaseUnavailable: then nothing of it was done, or, where the connection broke while it
committed, all of it; each may be called again. Two servers may do the same at the same time: rows are locked in the order of their keys.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import event as hooks
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hibernode.api import actions, bulk
from hibernode.api.actions import Action
from hibernode.errors import DatabaseUnavailable, Refused
from hibernode.model import Event, Status, Value

PATIENCE = 10.0  # seconds for a lock, a connection, a statement
_AGAIN = 0.02  # seconds between two tries, where a database does not wait by itself
POOL = 10  # connections of one server; PostgreSQL allows 100 in all by default
_COUNTED = {"preserve_rowcount": True}  # of an INSERT, too
_PLANS = "-c plan_cache_mode=force_custom_plan"  # one that is kept may be of a day when the table was small, and reads all of it
# A server whose host is gone is noticed by the kernel; one that is frozen is not, and holds a thread for as long.
_ALIVE = {"keepalives_idle": 5, "keepalives_interval": 3, "keepalives_count": 3, "tcp_user_timeout": int(PATIENCE * 1000)}
_MANY_OPEN = 1000  # open actions of one look
_OPEN = ("initialized", "processing", "checkpoint_created")

tables = sa.MetaData()


def _text(name: str, **more: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False, server_default="", **more)


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def _time(name: str) -> sa.Column[float]:
    """Seconds since the epoch; 0: never."""
    return sa.Column(name, sa.Double, nullable=False, server_default="0")


def _json(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON, nullable=False, server_default="{}")


_actions = sa.Table(
    "actions",
    tables,
    sa.Column("action_id", sa.Text, primary_key=True),
    sa.Column("checkpoint_id", sa.Text, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    _time("created_at"),
    _time("updated_at"),
    _text("cluster"),
    _text("node"),
    _text("reason"),
    _text("kind"),
    _text("namespace"),
    _text("pod_name"),
    _text("pod_id"),
    _json("overrides"),
    _json("host"),
    _text("source"),
    _time("expires_at"),
    _time("completed_at"),
    _number("seq"),
    sa.Column("provisional", sa.Boolean, nullable=False, server_default=sa.false()),
    _text("code"),
    _text("message"),
    _text("hint"),
    sa.Column("retry", sa.Boolean, nullable=False, server_default=sa.false()),
    _json("details"),
    _json("profile"),
    _text("location"),
    _time("deleted_at"),
    _time("purged_at"),
    sa.Index("actions_newest", "created_at", "action_id"),
    sa.Index("actions_type", "type", "created_at", "action_id"),
    sa.Index("actions_status", "status", "created_at", "action_id"),
    sa.Index("actions_node", "node", "created_at", "action_id"),
    sa.Index("actions_pod_id", "pod_id", "created_at", "action_id"),
    sa.Index("actions_pod_name", "pod_name", "created_at", "action_id"),
    sa.Index("actions_checkpoint", "checkpoint_id"),
)

_events = sa.Table(
    "events",
    tables,
    sa.Column("action_id", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("status", sa.Text, nullable=False),
    _text("node"),
    _time("time"),
    _text("code"),
    _text("message"),
    _text("hint"),
    _json("details"),
    sqlite_with_rowid=False,  # the key is all that is asked for: one tree to write, and not two
)

_uploads = sa.Table(
    "uploads",
    tables,
    sa.Column("action_id", sa.Text, primary_key=True),
    _time("uploaded_at"),
    _text("pod_id", index=True),
    sa.Column("pod_spec", sa.Text),  # JSON as it came; null: none came
    sa.Column("pod_metadata_spec", sa.Text),
    sa.Column("persistent_volume_claim", sa.Text),
)

# What a node has told of a pod whose checkpoint it made. Of this a pod is made again, and not of an upload: who may upload may not make
# pods of any kind for it.
_pod_specs = sa.Table(
    "pod_specs",
    tables,
    sa.Column("action_id", sa.Text, primary_key=True),
    sa.Column("pod_spec", sa.Text, nullable=False),  # JSON with `metadata` and `spec`
)

_nodes = sa.Table(
    "nodes",
    tables,
    sa.Column("cluster", sa.Text, primary_key=True),
    sa.Column("node", sa.Text, primary_key=True),
    _time("seen_at"),
    _json("record"),
)

_tokens = sa.Table(
    "tokens",
    tables,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("sha256", sa.Text, nullable=False, unique=True),
    sa.Column("read_only", sa.Boolean, nullable=False, server_default=sa.false()),
    _time("created_at"),
    _time("expires_at"),
)

_heartbeats = sa.Table(
    "heartbeats",
    tables,
    sa.Column("heartbeat_id", sa.Text, primary_key=True),
    _text("cluster"),
    _text("namespace"),
    _text("pod_name"),
    _text("pod_id"),
    sa.Column("interval", sa.Double, nullable=False),
    _number("keep_last"),
    sa.Column("configured", sa.Boolean, nullable=False, server_default=sa.false()),
    _time("next_at"),
    _text("last_action_id"),
    _text("message"),
    sa.Column("annotated", sa.Boolean, nullable=False, server_default=sa.false()),
)

_moves = sa.Table(
    "moves",
    tables,
    sa.Column("move_id", sa.Text, primary_key=True),
    _text("cluster"),
    _text("node"),
    _text("reason"),
    _text("namespace"),
    _text("pod_name"),
    _text("pod_id"),
    _text("checkpoint_action_id"),
    _text("restore_action_id"),
    _text("state", index=True),
    _text("message"),
    _time("created_at"),
    _time("updated_at"),
)

_STANDING = sa.select(*(_actions.c[name] for name in ("action_id", "type", "status", "seq", "node", "provisional")))
_COLUMNS = tuple(field.name for field in fields(Action))
# What an event can change. `pod_*` are not among them: an upload may write them meanwhile.
_MOVED = (
    "status", "seq", "node", "provisional", "updated_at", "completed_at", "code", "message", "hint", "retry", "details", "profile",
    "location",
)  # fmt: skip


@dataclass(frozen=True)
class Filters:
    """Of a list of actions; empty ones let everything through."""

    type: str = ""
    status: str = ""
    node: str = ""
    namespace: str = ""
    pod_name: str = ""
    pod_id: str = ""


@dataclass(frozen=True)
class Upload:
    """What somebody wants kept so that a pod can be made again. JSON texts; None: nothing came."""

    action_id: str
    pod_id: str = ""
    pod_spec: str | None = None
    pod_metadata_spec: str | None = None
    persistent_volume_claim: str | None = None


@dataclass(frozen=True)
class Token:
    name: str
    sha256: str
    read_only: bool = False
    created_at: float = 0.0
    expires_at: float = 0.0  # 0: never


@dataclass(frozen=True)
class Heartbeat:
    """A pod that is checkpointed every `interval` seconds, next at `next_at`. One that the pod's annotations ask for (`annotated`) is of
    its name, under which a restored pod goes on; `pod_id` is then who has that name now."""

    heartbeat_id: str
    cluster: str
    namespace: str
    pod_name: str
    pod_id: str
    interval: float
    keep_last: int = 0
    configured: bool = False
    next_at: float = 0.0
    last_action_id: str = ""
    message: str = ""  # of the last time: why there was none
    annotated: bool = False

    @property
    def whose(self) -> tuple[str, str, str]:
        """Namespace, name and UID by which its actions are found."""
        return self.namespace, self.pod_name, "" if self.annotated else self.pod_id


@dataclass(frozen=True)
class Move:
    """A pod on its way from a node that leaves to another: `checkpointing`, `restoring`, then `done` or `failed`."""

    move_id: str
    cluster: str
    node: str
    reason: str
    namespace: str
    pod_name: str
    pod_id: str
    state: str
    created_at: float
    updated_at: float
    checkpoint_action_id: str = ""
    restore_action_id: str = ""
    message: str = ""

    @property
    def open(self) -> bool:
        return self.state in ("checkpointing", "restoring")


class _Standing(NamedTuple):
    type: str
    status: Status
    seq: int
    node: str
    provisional: bool


class Unkeepable(Exception):
    """A value that this database cannot hold: a text with a NUL, a number without end."""


class _MadeMeanwhile(Exception):
    """By another server, an action that was not there when we looked."""


class Database:
    """Thread-safe. Connects when it is first used."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = _engine(url)
        self._insert = sqlite.insert if self._engine.dialect.name == "sqlite" else postgresql.insert
        self._many = bulk.Bulk(self._engine.dialect)

    @property
    def writers(self) -> int:
        """How many may write at the same time and be faster for it."""
        return 1 if self._engine.dialect.name == "sqlite" else 2

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        with _translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with _translated(), self._engine.connect() as connection:
            yield connection.execution_options(reading=True)

    def ping(self) -> None:
        with self._reading() as connection:
            connection.execute(sa.select(sa.literal(1)))

    def close(self) -> None:
        self._engine.dispose()

    # --- actions ------------------------------------------------------------------------------------------------------------

    def add(self, action: Action, source: str = "") -> bool:
        """Keep a new action; False if there is one of that id, which stays as it is. `source`: the checkpoint that it reads. Refused
        ("not_restorable") if that has been deleted meanwhile; from here on it is not. Refused("restoring") for a restore of a pod that
        another one is at: of two that are filed at once, by whatever server, one is."""
        with self.writing() as connection:
            if action.type == "restore" and action.pod_name and not action.status.terminal:
                self._insist_alone(connection, action)
            if source and ((made := self._locked(connection, source)) is None or made.deleted_at):
                raise Refused(
                    "not_restorable",
                    f"the checkpoint of action {source} has been deleted",
                    prop="deleted",
                    found=True,
                    wanted=False,
                )
            return self._is_new(connection, _actions, asdict(action))

    def _insist_alone(self, connection: sa.Connection, action: Action) -> None:
        pod = action.cluster, action.namespace or "default", action.pod_name
        if self._engine.dialect.name == "postgresql":  # SQLite has one who writes
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(" ".join(("restore", *pod))))))
        if other := self._restoring(connection, *pod, action.action_id):
            raise actions.being_restored("/".join(pod[1:]), other)

    def file_again(self, action: Action) -> Action | None:
        """`action` in place of one of its id whose command may not be in the stream (`actions.unfiled`): but on the node that one was
        given to, which may have it. None if there is nothing to be filed again."""
        with self.writing() as connection:
            there = self._locked(connection, action.action_id)
            if there is None or not actions.unfiled(there):
                return None
            new = replace(action, created_at=there.created_at)
            if there.node:
                new = replace(new, node=there.node, host=there.host)
            connection.execute(_actions.update().where(_actions.c.action_id == action.action_id).values(asdict(new)))
            return new

    def find(self, action_id: str) -> Action | None:
        with self._reading() as connection:
            row = connection.execute(sa.select(_actions).where(_actions.c.action_id == action_id)).one_or_none()
            return _action(row) if row is not None else None

    def move(self, action_id: str, rule: Callable[[Action], Action]) -> Action | None:
        """`rule(action)` in its place; the new one, None if there is no such action."""
        with self.writing() as connection:
            action = self._locked(connection, action_id)
            if action is None:
                return None
            moved = rule(action)
            self._store(connection, action, moved)
            return moved

    def apply(self, events: Sequence[Event], cluster: str, now: float) -> int:
        """Keep these, each once, and move their actions; how many were new. Those that came before change nothing."""
        by_action: dict[str, list[Event]] = defaultdict(list)
        for event in events:
            by_action[event.action_id].append(event)
        while by_action:
            with suppress(_MadeMeanwhile), self.writing() as connection:
                nodes = self._apply(connection, by_action, cluster, now)
                told = [event for event in events if nodes[event.action_id] in ("", event.node)]
                for event in told:
                    if event.pod_spec and event.type == "checkpoint":
                        self._is_new(connection, _pod_specs, {"action_id": event.action_id, "pod_spec": event.pod_spec})
                return self._many.insert(connection, _events, [_event_row(event) for event in _once(told)])
        return 0

    def _apply(
        self, connection: sa.Connection, by_action: Mapping[str, Sequence[Event]], cluster: str, now: float
    ) -> dict[str, str]:
        """Of each action the node whose it is, which alone can tell of it. Rows that are there are locked before any is made, both in the
        order of their keys: so nobody who does the same waits for us while we wait for him."""
        known = self._standing(connection, by_action)
        strange = sorted(by_action.keys() - known.keys())
        made = [_plain(actions.begun_elsewhere(by_action[action_id], cluster, now)) for action_id in strange]
        if self._many.insert(connection, _actions, made) < len(made):
            raise _MadeMeanwhile
        moves: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)  # by what changes
        for action_id, standing in known.items():
            if changes := _plain(actions.changes(standing, by_action[action_id], now)):
                moves[tuple(changes)].append({"action_id": action_id, **changes})
        for rows in moves.values():
            self._many.update(connection, _actions, rows)
        return {action_id: known[action_id].node if action_id in known else told[0].node for action_id, told in by_action.items()}

    def _standing(self, connection: sa.Connection, ids: Iterable[str]) -> dict[str, _Standing]:
        """Those that are there, from now on ours."""
        rows = connection.execute(self._many.among(_STANDING, _actions.c.action_id), {"keys": list(ids)})
        return {row[0]: _Standing(row[1], Status(row[2]), *row[3:]) for row in rows}

    def _is_new(self, connection: sa.Connection, table: sa.Table, row: Mapping[str, Any]) -> bool:
        """Insert it, unless there is one with its key."""
        statement = self._insert(table).values(row).on_conflict_do_nothing()
        return connection.execute(statement, execution_options=_COUNTED).rowcount == 1

    def _locked(self, connection: sa.Connection, action_id: str) -> Action | None:
        """From now on ours."""
        row = connection.execute(sa.select(_actions).where(_actions.c.action_id == action_id).with_for_update()).one_or_none()
        return _action(row) if row is not None else None

    def _store(self, connection: sa.Connection, old: Action, new: Action) -> None:
        changed = {name: getattr(new, name) for name in _MOVED if getattr(new, name) != getattr(old, name)}
        if changed:
            connection.execute(_actions.update().where(_actions.c.action_id == old.action_id).values(changed))

    def newest(self, filters: Filters, limit: int, before: tuple[float, str] | None = None) -> list[Action]:
        """The newest first, from behind `before` on: the (created_at, action_id) of the last one of the page before."""
        return self._listed([_actions.c[name] == value for name, value in vars(filters).items() if value], limit, before)

    def checkpoints(self, limit: int, before: tuple[float, str] | None = None) -> list[Action]:
        """Those that can be restored, the newest first."""
        return self._listed(_restorable(), limit, before)

    def _listed(self, where: Sequence[sa.ColumnElement[bool]], limit: int, before: tuple[float, str] | None) -> list[Action]:
        place = (_actions.c.created_at, _actions.c.action_id)
        query = sa.select(_actions).where(*where).order_by(*(column.desc() for column in place)).limit(limit)
        if before is not None:
            query = query.where(sa.tuple_(*place) < sa.tuple_(*map(sa.literal, before)))
        with self._reading() as connection:
            return [_action(row) for row in connection.execute(query)]

    def overdue(self, silent_since: float, expired_since: float) -> list[Action]:
        """Those that have not ended, of whom nothing was heard since the one time, or whose command expired before the other."""
        silent = _actions.c.updated_at < silent_since
        waiting = sa.and_(_actions.c.seq == 0, _actions.c.expires_at > 0, _actions.c.expires_at < expired_since)
        query = sa.select(_actions).where(_actions.c.status.in_(_OPEN), sa.or_(silent, waiting))
        query = query.order_by(_actions.c.updated_at).limit(_MANY_OPEN)
        with self._reading() as connection:
            return [_action(row) for row in connection.execute(query)]

    def clusters(self) -> set[str]:
        """Whose actions and nodes are in here."""
        with self._reading() as connection:
            found = sa.union(sa.select(_actions.c.cluster), sa.select(_nodes.c.cluster))
            return set(connection.execute(found).scalars())

    def latest_of_pod(self, pod_id: str) -> str:
        """The newest action of the pod with this UID; "" if there is none."""
        with self._reading() as connection:
            newest = _actions.c.created_at.desc(), _actions.c.action_id.desc()
            uploaded = sa.select(_uploads.c.action_id).where(_uploads.c.pod_id == pod_id)
            mine = sa.or_(_actions.c.pod_id == pod_id, _actions.c.action_id.in_(uploaded))
            found = connection.execute(
                sa.select(_actions.c.action_id).where(mine).order_by(*newest).limit(1)
            ).scalar_one_or_none()
            return found or ""

    def latest_checkpoint(self, name: str) -> Action | None:
        """The newest restorable one of a pod of that name, `namespace/name` or `name` alone, or UID; or of the action with that id."""
        namespace, slash, pod_name = name.rpartition("/")
        pod = _actions.c.pod_name == pod_name
        if slash:
            pod = sa.and_(pod, _actions.c.namespace == namespace)
        named = pod if slash else sa.or_(pod, _actions.c.pod_id == name, _actions.c.action_id == name)
        found = self._listed([*_restorable(), named], 1, None)
        return found[0] if found else None

    def events(self, action_id: str) -> list[dict[str, Any]]:
        with self._reading() as connection:
            query = sa.select(_events).where(_events.c.action_id == action_id).order_by(_events.c.seq)
            return [dict(row._mapping) for row in connection.execute(query)]

    def pod_spec(self, action_id: str) -> str:
        """What its node has told of the pod that this action made a checkpoint of; "" if nothing."""
        with self._reading() as connection:
            query = sa.select(_pod_specs.c.pod_spec).where(_pod_specs.c.action_id == action_id)
            return connection.execute(query).scalar_one_or_none() or ""

    # --- uploads ------------------------------------------------------------------------------------------------------------

    def upload(self, upload: Upload, status: Status, now: float) -> bool:
        """Keep it in place of an earlier one, what does not come staying as it was; False if there is no such action."""
        given = {name: value for name, value in asdict(upload).items() if value not in (None, "")} | {"uploaded_at": now}
        with self.writing() as connection:
            action = self._locked(connection, upload.action_id)
            if action is None:
                return False
            statement = self._insert(_uploads).values(given)
            connection.execute(statement.on_conflict_do_update(index_elements=["action_id"], set_=given))
            if upload.pod_id and not action.pod_id:
                connection.execute(_actions.update().where(_actions.c.action_id == upload.action_id).values(pod_id=upload.pod_id))
            self._store(connection, action, replace(actions.uploaded(action, status), updated_at=now))
            return True

    def uploaded(self, action_id: str) -> Upload | None:
        with self._reading() as connection:
            columns = [_uploads.c[field.name] for field in fields(Upload)]
            row = connection.execute(sa.select(*columns).where(_uploads.c.action_id == action_id)).one_or_none()
            return Upload(**row._mapping) if row is not None else None

    # --- nodes --------------------------------------------------------------------------------------------------------------

    def see(self, cluster: str, records: Mapping[str, Mapping[str, Any]], now: float) -> None:
        """These nodes are there, and say this of themselves."""
        rows = [{"cluster": cluster, "node": name, "seen_at": now, "record": record} for name, record in sorted(records.items())]
        if rows:
            statement = self._insert(_nodes)
            later = sa.case((statement.excluded.seen_at > _nodes.c.seen_at, statement.excluded.seen_at), else_=_nodes.c.seen_at)
            changed = {"seen_at": later, "record": statement.excluded.record}  # another server's clock may be behind
            with self.writing() as connection:
                connection.execute(statement.on_conflict_do_update(index_elements=["cluster", "node"], set_=changed), rows)

    def nodes(self, cluster: str) -> dict[str, tuple[float, dict[str, Any]]]:
        """When each was last seen, and what it said of itself then."""
        with self._reading() as connection:
            query = sa.select(_nodes).where(_nodes.c.cluster == cluster).order_by(_nodes.c.node)
            return {row.node: (row.seen_at, row.record) for row in connection.execute(query)}

    # --- heartbeats and moves -----------------------------------------------------------------------------------------------

    def heartbeats(self, cluster: str) -> list[Heartbeat]:
        with self._reading() as connection:
            query = sa.select(_heartbeats).where(_heartbeats.c.cluster == cluster).order_by(_heartbeats.c.heartbeat_id)
            return [Heartbeat(**row._mapping) for row in connection.execute(query)]

    def put_heartbeat(self, heartbeat: Heartbeat) -> None:
        """A new one, or other settings for one that is there; its turn stays, if it is within the interval."""
        statement = self._insert(_heartbeats).values(asdict(heartbeat))
        soon = sa.case((statement.excluded.next_at + statement.excluded.interval < _heartbeats.c.next_at,
                        statement.excluded.next_at + statement.excluded.interval), else_=_heartbeats.c.next_at)  # fmt: skip
        settings: dict[str, Any] = {name: statement.excluded[name] for name in ("interval", "keep_last", "configured", "pod_id")}
        settings["next_at"] = soon
        with self.writing() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["heartbeat_id"], set_=settings))

    def heartbeat(self, heartbeat_id: str) -> Heartbeat | None:
        with self._reading() as connection:
            row = connection.execute(sa.select(_heartbeats).where(_heartbeats.c.heartbeat_id == heartbeat_id)).one_or_none()
            return Heartbeat(**row._mapping) if row is not None else None

    def remove_heartbeat(self, heartbeat_id: str) -> bool:
        with self.writing() as connection:
            return connection.execute(_heartbeats.delete().where(_heartbeats.c.heartbeat_id == heartbeat_id)).rowcount == 1

    def take_turn(self, heartbeat: Heartbeat, next_at: float) -> bool:
        """The turn of `heartbeat.next_at` is ours alone; the next one is at `next_at`. False: another server had it."""
        here = (_heartbeats.c.heartbeat_id == heartbeat.heartbeat_id, _heartbeats.c.next_at == heartbeat.next_at)
        with self.writing() as connection:
            return connection.execute(_heartbeats.update().where(*here).values(next_at=next_at)).rowcount == 1

    def note_turn(self, heartbeat_id: str, action_id: str, message: str) -> None:
        values = {"message": message} | ({"last_action_id": action_id} if action_id else {})
        with self.writing() as connection:
            connection.execute(_heartbeats.update().where(_heartbeats.c.heartbeat_id == heartbeat_id).values(values))

    def restoring(self, cluster: str, namespace: str, pod_name: str, but: str) -> str:
        """A restore of this pod, other than `but`, that has not ended; "" if there is none."""
        with self._reading() as connection:
            return self._restoring(connection, cluster, namespace, pod_name, but)

    def _restoring(self, connection: sa.Connection, cluster: str, namespace: str, pod_name: str, but: str) -> str:
        where = [_actions.c.type == "restore", _actions.c.status.in_(_OPEN), _actions.c.cluster == cluster]
        where += [_of_pod(namespace, pod_name, ""), _actions.c.action_id != but]
        return connection.execute(sa.select(_actions.c.action_id).where(*where).limit(1)).scalar_one_or_none() or ""

    def pod_at_work(self, namespace: str, pod_name: str, pod_id: str) -> str:
        """An action of this pod that has not ended; "" if there is none."""
        where = [_actions.c.status.in_(_OPEN), _of_pod(namespace, pod_name, pod_id)]
        with self._reading() as connection:
            return connection.execute(sa.select(_actions.c.action_id).where(*where).limit(1)).scalar_one_or_none() or ""

    def checkpoints_of_pod(
        self, namespace: str, pod_name: str, pod_id: str, *, reason: str = "", limit: int = 1000
    ) -> list[Action]:
        """Those that can be restored, the one that was ready last first."""
        where = [*_restorable(), _of_pod(namespace, pod_name, pod_id), *([_actions.c.reason == reason] if reason else [])]
        query = (
            sa.select(_actions).where(*where).order_by(_actions.c.completed_at.desc(), _actions.c.action_id.desc()).limit(limit)
        )
        with self._reading() as connection:
            return [_action(row) for row in connection.execute(query)]

    def stopped(self, cluster: str, since: float) -> list[Action]:
        """Ready checkpoints of pods that were ending, begun since then."""
        where = [
            *_restorable(),
            _actions.c.created_at > since,
            _actions.c.reason == "nodeTermination",
            _actions.c.cluster == cluster,
        ]
        return self._listed(where, _MANY_OPEN, None)

    def mark_deleted(self, action_id: str, now: float) -> bool:
        """From now on nobody is told of this checkpoint. False if it was before, or a restore of it has not ended, or may not have."""
        with self.writing() as connection:
            made = self._locked(connection, action_id)  # who files a restore of it locks it as well
            if made is None or made.deleted_at:
                return False
            reads = [_actions.c.type == "restore", _actions.c.checkpoint_id == made.checkpoint_id]
            reads.append(sa.or_(_actions.c.status.in_(_OPEN), _actions.c.provisional))
            if connection.execute(sa.select(_actions.c.action_id).where(*reads).limit(1)).first() is not None:
                return False
            connection.execute(_actions.update().where(_actions.c.action_id == action_id).values(deleted_at=now))
            return True

    def note_purged(self, action_id: str, now: float) -> None:
        """Its delete is in the stream."""
        with self.writing() as connection:
            connection.execute(_actions.update().where(_actions.c.action_id == action_id).values(purged_at=now))
            connection.execute(_pod_specs.delete().where(_pod_specs.c.action_id == action_id))

    def unpurged(self) -> list[Action]:
        """Marked as deleted, and nobody has filed it; of many any hundred, for some may never be."""
        where = (_actions.c.deleted_at > 0, _actions.c.purged_at == 0)
        query = sa.select(_actions).where(*where).order_by(sa.func.random()).limit(100)
        with self._reading() as connection:
            return [_action(row) for row in connection.execute(query)]

    def add_moves(self, moves: Sequence[Move]) -> None:
        """Those that are there stay as they are."""
        if moves:
            with self.writing() as connection:
                connection.execute(self._insert(_moves).on_conflict_do_nothing(), [asdict(move) for move in moves])

    def moves(self, cluster: str, node: str = "", *, only_open: bool = False) -> list[Move]:
        query = sa.select(_moves).where(_moves.c.cluster == cluster).order_by(_moves.c.created_at, _moves.c.move_id)
        if node:
            query = query.where(_moves.c.node == node)
        if only_open:
            query = query.where(_moves.c.state.in_(("checkpointing", "restoring")))
        with self._reading() as connection:
            return [Move(**row._mapping) for row in connection.execute(query)]

    def change_move(self, old: Move, new: Move) -> bool:
        """False: somebody else has changed it."""
        here = [
            _moves.c[name] == getattr(old, name) for name in ("move_id", "state", "checkpoint_action_id", "restore_action_id")
        ]
        with self.writing() as connection:
            return connection.execute(_moves.update().where(*here).values(asdict(new))).rowcount == 1

    # --- tokens -------------------------------------------------------------------------------------------------------------

    def token(self, sha256: str) -> Token | None:
        with self._reading() as connection:
            row = connection.execute(sa.select(_tokens).where(_tokens.c.sha256 == sha256)).one_or_none()
            return Token(**row._mapping) if row is not None else None

    def tokens(self) -> list[Token]:
        with self._reading() as connection:
            return [Token(**row._mapping) for row in connection.execute(sa.select(_tokens).order_by(_tokens.c.name))]

    def add_token(self, token: Token) -> bool:
        """False if there is one of that name."""
        with self.writing() as connection:
            return self._is_new(connection, _tokens, asdict(token))

    def remove_token(self, name: str) -> bool:
        with self.writing() as connection:
            return connection.execute(_tokens.delete().where(_tokens.c.name == name)).rowcount == 1


def _of_pod(namespace: str, pod_name: str, pod_id: str) -> sa.ColumnElement[bool]:
    if pod_id:
        return _actions.c.pod_id == pod_id
    return sa.and_(_actions.c.namespace == (namespace or "default"), _actions.c.pod_name == pod_name)


def _restorable() -> list[sa.ColumnElement[bool]]:
    return [_actions.c.type == "checkpoint", _actions.c.status == "ready", _actions.c.deleted_at == 0]


def _action(row: sa.Row[Any]) -> Action:
    values = {name: getattr(row, name) for name in _COLUMNS}
    return Action(**{**values, "status": Status(values["status"])})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As `bulk` takes them: no types but the driver's own."""
    return {name: _PLAIN[name](value) if name in _PLAIN else value for name, value in values.items()}


def _event_row(event: Event) -> dict[str, Any]:
    return {
        "action_id": event.action_id,
        "seq": event.seq,
        "status": event.status.value,
        "node": event.node,
        "time": event.time,
        "code": event.code,
        "message": event.message,
        "hint": event.hint,
        "details": _text_of(event.details),
    }


def _once(events: Sequence[Event]) -> Iterable[Event]:
    """PostgreSQL takes no row twice in one statement."""
    return {(event.action_id, event.seq): event for event in events}.values()


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "postgresql" and "+" not in parsed.drivername:
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
            raise ValueError(f"no database of ours: {parsed.drivername}")
    except (SQLAlchemyError, ValueError) as e:
        raise Refused(
            "config", "api.database is not the address of a database of ours", prop="api.database", found="(hidden)",
            wanted="sqlite:////path or postgresql://user:password@host/name",
        ) from e  # fmt: skip
    if parsed.drivername == "sqlite":
        return _sqlite(parsed)
    options = f"-c lock_timeout={PATIENCE}s -c statement_timeout={3 * PATIENCE}s {_PLANS}"
    return sa.create_engine(
        parsed, pool_size=POOL, max_overflow=0, pool_timeout=PATIENCE, pool_pre_ping=True, json_serializer=dumps, hide_parameters=True,
        connect_args={"connect_timeout": int(PATIENCE), "options": options, **_ALIVE},
    )  # fmt: skip


def _sqlite(url: sa.URL) -> sa.Engine:
    """One writer at a time: a transaction that will write says so when it begins, or two that have read would wait for each other."""
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = sa.create_engine(
        url,
        json_serializer=dumps,
        hide_parameters=True,
        pool_size=POOL,
        max_overflow=0,
        pool_timeout=PATIENCE,
        connect_args={"timeout": PATIENCE},
    )  # fmt: skip

    def prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver's own transactions begin too late
        _to_wal(connection)
        connection.execute("PRAGMA synchronous = FULL")  # what was acknowledged to the broker does not come again
        # In pages, 16 MiB: with 1000, the default, every large commit had to wait for a checkpoint of the log.
        connection.execute("PRAGMA wal_autocheckpoint = 4000")
        connection.execute("PRAGMA cache_size = -32000")  # KiB

    def begin(connection: sa.Connection) -> None:
        reading = connection.get_execution_options().get("reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    hooks.listen(engine, "connect", prepare)
    hooks.listen(engine, "begin", begin)
    return engine


def _to_wal(connection: sqlite3.Connection) -> None:
    """For all who come after, too. SQLite waits for no lock here (seen with 3.40), and servers may start together."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(_AGAIN)
        else:
            return


_JSON = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def dumps(value: object) -> str:
    """In ASCII: a database need not hold what JSON can (NUL, half characters). ValueError if there is a number that JSON has not."""
    return _JSON.encode(value)


def _text_of(value: object) -> str:
    if isinstance(value, Value):
        return value.model_dump_json()
    return dumps(value) if value else "{}"


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "status": lambda status: status.value,
    **{column.name: _text_of for column in _actions.c if isinstance(column.type, sa.JSON)},
}


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (DataError, OverflowError, UnicodeError) as e:
        raise Unkeepable(str(e.orig if isinstance(e, DBAPIError) else e)) from e
    except (OperationalError, InterfaceError, InternalError, PoolTimeout, OSError) as e:  # any other is a defect of ours
        reason = str(e.orig if isinstance(e, DBAPIError) else e).strip().split("\n")[0]
        raise DatabaseUnavailable(f"the database does not answer: {reason}", hint="is it up? See api.database") from e
