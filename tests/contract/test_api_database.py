"""One suite for the control plane's database: SQLite and a real PostgreSQL keep the same promises."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from hibernode.api import actions
from hibernode.api.actions import Action
from hibernode.api.db import Database, Filters, Token, Upload, tables
from hibernode.api.migrate import migrate
from hibernode.errors import DatabaseUnavailable, Refused
from hibernode.model import Event, Status
from tests.postgres import PostgresServer

NOW = 1_700_000_000.0
CLUSTER = "c"


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/api.sqlite"
    server: PostgresServer = request.getfixturevalue("server")
    return server.database(f"t{uuid.uuid4().hex}")


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = Database(url)
    migrate(made)
    yield made
    made.close()


def new_id() -> str:
    return str(uuid.uuid4())


def action(**changes: object) -> Action:
    action_id = new_id()
    base = Action(
        action_id, action_id, "checkpoint", Status.INITIALIZED, NOW, NOW, CLUSTER, node="n", namespace="default", pod_name="p"
    )
    return replace(base, **changes)  # type: ignore[arg-type] # whatever a test says


def event(of: Action, seq: int, status: Status, **more: object) -> Event:
    facts: dict[str, object] = {"node": "n", "time": NOW + seq, **more}
    return Event(
        action_id=of.action_id, seq=seq, type=of.type, status=status, checkpoint_id=of.checkpoint_id, **facts  # type: ignore[arg-type]
    )  # fmt: skip


def story(of: Action) -> list[Event]:
    statuses = (Status.PROCESSING, Status.CHECKPOINT_CREATED, Status.READY)
    return [event(of, seq, status) for seq, status in enumerate(statuses, 1)]


# --- tables -------------------------------------------------------------------------------------------------------------------


def test_the_migrations_make_the_tables_that_the_code_knows(database: Database) -> None:
    with database.writing() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables) == []


def test_migrating_again_and_at_the_same_time_is_harmless(url: str) -> None:
    made = [Database(url) for _ in range(3)]
    versions, errors = list[str](), list[BaseException]()

    def work(each: Database) -> None:
        try:
            versions.append(migrate(each))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(each,)) for each in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for each in made:
        each.close()
    assert not errors
    assert len(set(versions)) == 1


def test_a_new_database_is_waited_for_while_somebody_writes_it(tmp_path: Path) -> None:
    """Servers may start together: SQLite itself waits for nobody who changes how it writes."""
    with contextlib.closing(sqlite3.connect(tmp_path / "new.sqlite", isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE theirs (a)")
        other.execute("BEGIN IMMEDIATE")
        ending = threading.Timer(0.3, other.execute, ["COMMIT"])
        ending.start()
        made = Database(f"sqlite:///{tmp_path}/new.sqlite")
        made.ping()
        made.close()
        ending.join()


def test_of_many_restores_of_one_pod_that_are_filed_at_once_one_is(url: str, database: Database) -> None:
    """By servers that do not know of each other, out of different checkpoints: a pod does not run twice."""
    servers = [Database(url) for _ in range(4)]
    filed, refused = list[str](), list[str]()
    start = threading.Barrier(len(servers))

    def file(each: Database) -> None:
        start.wait()
        try:
            wanted = action(type="restore", source=new_id())
            assert each.add(wanted)
            filed.append(wanted.action_id)
        except Refused as e:
            refused.append(e.code)

    threads = [threading.Thread(target=file, args=(each,)) for each in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for each in servers:
        each.close()
    assert (len(filed), refused) == (1, ["restoring"] * 3)
    assert database.add(action(type="restore", pod_name="another"))
    assert database.add(action(type="restore", status=Status.ERROR)), "one that has failed already"
    with pytest.raises(Refused, match="is being restored") as other:
        database.add(action(type="restore"))
    assert other.value.details["found"] == filed[0]


def test_a_database_of_a_newer_version_is_refused(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Refused, match="newer"):
        migrate(database)


# --- actions ------------------------------------------------------------------------------------------------------------------


def test_what_is_kept_comes_back_as_it_was(database: Database) -> None:
    kept = action(
        overrides={"criu_opts": '{"tcp":"close"}', "odd": "\0\ud800 é"}, host={"arch": "x86_64"}, details={"a": [1, None]},
        profile={"phases": {}}, provisional=True, retry=True, seq=1 << 40, expires_at=NOW + 0.125, message="é",
    )  # fmt: skip
    assert database.add(kept)
    assert database.find(kept.action_id) == kept
    assert not database.add(replace(kept, node="other"))
    assert database.find(kept.action_id) == kept
    assert database.find(new_id()) is None


def test_events_move_their_action_and_each_counts_once(database: Database) -> None:
    kept = action()
    database.add(kept)
    assert database.apply(story(kept)[:2], CLUSTER, NOW + 10) == 2
    assert database.apply(story(kept), CLUSTER, NOW + 10) == 1
    assert database.apply(story(kept), CLUSTER, NOW + 10) == 0
    found = database.find(kept.action_id)
    assert found is not None
    assert (found.status, found.seq, found.completed_at) == (Status.READY, 3, NOW + 3)
    assert [(row["seq"], row["status"]) for row in database.events(kept.action_id)] == [
        (1, "processing"), (2, "checkpoint_created"), (3, "ready"),
    ]  # fmt: skip


def test_an_event_that_is_there_twice_in_one_batch_counts_once(database: Database) -> None:
    kept = action()
    database.add(kept)
    assert database.apply(story(kept) * 2, CLUSTER, NOW + 10) == 3


def test_events_of_an_action_that_was_begun_on_its_node_make_it_known(database: Database) -> None:
    strange = action()
    database.apply(story(strange)[:1], CLUSTER, NOW + 10)
    database.apply(story(strange)[1:], CLUSTER, NOW + 10)
    found = database.find(strange.action_id)
    assert found is not None
    assert (found.status, found.node, found.created_at, found.pod) == (Status.READY, "n", NOW + 1, "")


@pytest.mark.parametrize("filed", [20, 10, 0])
def test_two_servers_take_events_of_the_same_actions(database: Database, filed: int) -> None:
    """At the same time, in opposite orders, whether they were filed here or not: nothing is lost, and neither waits for the other for
    ever."""
    kept = [action() for _ in range(20)]
    for each in kept[:filed]:
        database.add(each)
    events = [found for each in kept for found in story(each)]
    errors = list[BaseException]()

    def take(mine: list[Event]) -> None:
        try:
            for n in range(0, len(mine), 7):
                database.apply(mine[n : n + 7], CLUSTER, NOW + 10)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=take, args=(mine,)) for mine in (events[::2], events[1::2][::-1], events[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for each in kept:
        found = database.find(each.action_id)
        assert found is not None
        assert (found.status, len(database.events(each.action_id))) == (Status.READY, 3)


def test_a_rule_is_applied_to_what_is_there_now(database: Database) -> None:
    kept = action()
    database.add(kept)
    database.apply(story(kept), CLUSTER, NOW + 10)
    moved = database.move(kept.action_id, lambda now: actions.failed(now, "node_silent", "m", "h", NOW))
    assert moved is not None
    assert moved.status == Status.READY
    assert database.move(new_id(), lambda now: now) is None


# --- lists --------------------------------------------------------------------------------------------------------------------


def test_pages_of_a_list_hold_everything_once_the_newest_first(database: Database) -> None:
    """Also those that were made in the same moment."""
    made = [action(created_at=NOW + n // 3) for n in range(10)]
    for each in made:
        database.add(each)
    wanted = sorted(((each.created_at, each.action_id) for each in made), reverse=True)
    found, before = list[tuple[float, str]](), None
    for _ in range(10):
        page = database.newest(Filters(), 4, before)
        if not page:
            break
        found += [(each.created_at, each.action_id) for each in page]
        before = found[-1]
    assert found == wanted


def test_filters_go_together(database: Database) -> None:
    made = {}
    for type_, status, node, namespace in itertools.product(
        ("checkpoint", "restore"), ("ready", "error"), ("a", "b"), ("x", "y")
    ):
        each = action(type=type_, status=Status(status), node=node, namespace=namespace, pod_id=f"{node}{namespace}")
        made[each.action_id] = each
        database.add(each)

    def ids(filters: Filters) -> set[str]:
        return {each.action_id for each in database.newest(filters, 100)}

    def those(rule: Callable[[Action], bool]) -> set[str]:
        return {each.action_id for each in made.values() if rule(each)}

    assert ids(Filters(type="restore")) == those(lambda a: a.type == "restore")
    assert ids(Filters(status="error", node="b")) == those(lambda a: a.status == "error" and a.node == "b")
    assert ids(Filters(pod_id="ax", type="checkpoint")) == those(lambda a: a.pod_id == "ax" and a.type == "checkpoint")
    assert ids(Filters(namespace="x", pod_name="p", status="ready")) == those(
        lambda a: a.namespace == "x" and a.status == "ready"
    )
    assert ids(Filters(node="nobody")) == set()


def test_the_latest_of_a_pod_and_its_latest_checkpoint(database: Database) -> None:
    old = action(status=Status.READY, pod_id="u1", location="s3://b/old")
    new = action(status=Status.READY, pod_id="u1", created_at=NOW + 1, location="s3://b/new")
    failed = action(status=Status.ERROR, pod_id="u1", created_at=NOW + 2)
    gone = action(status=Status.READY, pod_id="u1", created_at=NOW + 3, deleted_at=NOW + 4)
    elsewhere = action(status=Status.READY, namespace="other", created_at=NOW + 5, location="s3://b/other")
    restore = action(type="restore", status=Status.READY, created_at=NOW + 6)
    for each in (old, new, failed, gone, elsewhere, restore):
        database.add(each)
    assert database.latest_of_pod("u1") == gone.action_id
    assert database.latest_of_pod("u2") == ""
    names = {
        "default/p": "s3://b/new", "other/p": "s3://b/other", "p": "s3://b/other", "u1": "s3://b/new", old.action_id: "s3://b/old",
    }  # fmt: skip
    for name, wanted in names.items():
        found = database.latest_checkpoint(name)
        assert found is not None, name
        assert found.location == wanted, name
    assert database.latest_checkpoint("nobody") is None
    assert [each.action_id for each in database.checkpoints(10)] == [elsewhere.action_id, new.action_id, old.action_id]


# --- uploads, nodes, tokens -----------------------------------------------------------------------------------------------------


def test_an_upload_is_kept_and_a_later_one_adds_to_it(database: Database) -> None:
    kept = action()
    database.add(kept)
    assert database.upload(Upload(kept.action_id, "u9", pod_spec='{"a":"\\u0000"}'), Status.PROCESSING, NOW + 1)
    assert database.upload(Upload(kept.action_id, persistent_volume_claim="[]"), Status.READY, NOW + 2)
    found = database.find(kept.action_id)
    assert found is not None
    assert (found.status, found.pod_id) == (Status.PROCESSING, "u9")
    assert database.uploaded(kept.action_id) == Upload(kept.action_id, "u9", '{"a":"\\u0000"}', None, "[]")
    assert database.latest_of_pod("u9") == kept.action_id
    assert not database.upload(Upload(new_id()), Status.PROCESSING, NOW)


def test_the_spec_of_a_pod_is_what_its_checkpoint_told_first(database: Database) -> None:
    one, other = action(), replace(action(), type="restore")
    for each in (one, other):
        database.add(each)
    created, ready = (
        event(one, 1, Status.CHECKPOINT_CREATED, pod_spec='{"a":"\\u0000"}'),
        event(one, 2, Status.READY, pod_spec="{}"),
    )
    restored = event(other, 1, Status.READY, pod_spec="{}")
    assert database.apply([created, ready, restored], "c", 1.0) == 3
    database.apply([created], "c", 2.0)
    assert database.pod_spec(one.action_id) == '{"a":"\\u0000"}'
    assert database.pod_spec(other.action_id) == database.pod_spec("nobody") == ""
    database.note_purged(one.action_id, 3.0)
    assert database.pod_spec(one.action_id) == "", "it may hold secrets, and goes with its checkpoint"


def test_nodes_are_kept_as_they_were_last_seen(database: Database) -> None:
    database.see(CLUSTER, {"a": {"load": 1.5}, "b": {}}, NOW)
    database.see(CLUSTER, {"a": {"load": 2.5}}, NOW + 5)
    database.see("another", {"z": {}}, NOW + 6)
    assert database.nodes(CLUSTER) == {"a": (NOW + 5, {"load": 2.5}), "b": (NOW, {})}


def test_tokens_are_found_by_their_hash_alone(database: Database) -> None:
    token = Token("ops", "ab" * 32, read_only=True, created_at=NOW)
    assert database.add_token(token)
    assert not database.add_token(replace(token, sha256="cd" * 32))
    assert database.token("ab" * 32) == token
    assert database.token("cd" * 32) is None
    assert database.tokens() == [token]
    assert database.remove_token("ops")
    assert not database.remove_token("ops")


# --- when it does not answer ------------------------------------------------------------------------------------------------------


def test_a_database_that_is_away_is_unavailable_and_comes_back() -> None:
    with PostgresServer() as server:
        database = Database(server.database("away"))
        migrate(database)
        kept = action()
        database.add(kept)
        server.stop(kill=True)
        with pytest.raises(DatabaseUnavailable) as refused:
            database.find(kept.action_id)
        assert "only-for-tests" not in str(refused.value)
        server.start()
        assert database.find(kept.action_id) == kept
        database.close()


@pytest.mark.parametrize("url", ["mysql://h/d", "no address", "postgresql+asyncpg://user:secret@h/d", "sqlite+aiosqlite:///x"])
def test_what_is_no_database_of_ours_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(Refused) as refused:
        Database(url)
    assert "secret" not in f"{refused.value}{refused.value.details}"
