"""What no checkpoint needs: found, decided on, removed. And the small objects that tell others what must stay.

Under a checkpoint's id there may be, beside what its manifest names,

- `attempt`: put by the action that writes it before anything else, with that action's id. A store gives a key to one only, so that
  one id has one writer, on whatever node, and whatever lies beside the mark is that action's: `sweep` needs no clock to know it.
- `uses/<action>`: put by a restore before it reads.
- `refs/<checkpoint>`: put by the action that writes that checkpoint, before it freezes anybody, because it may refer to pages of this one.
  It stays for as long as that checkpoint, and counts for as long as that has an `attempt` and no manifest, or a manifest that names this
  one, or cannot be read. All others are stale: a mark is put after `attempt`, and `attempt` goes after the manifest has come, which never
  changes; of those who might have been referred to and are not, a crash or a store that is away may leave the mark.
- `removing`: put by whoever removes a checkpoint, before he looks for uses and references. Who restores it, or refers to it, puts his
  mark before he looks for this one: of two that meet, at least one sees the other.
- `unwanted`: somebody has deleted it while others referred to it. It goes with the last of them.

None of them makes a checkpoint, and none but `refs` is missed by one.
"""

from __future__ import annotations

import functools
import logging
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Literal

from hibernode import catalog
from hibernode.config import Retention
from hibernode.errors import Busy, Corrupt, HibernodeError, NoRoom, NotFound, OutcomeUnknown, Refused, StoreUnavailable
from hibernode.journal import Record
from hibernode.model import ActionCommand, Cancel, CheckpointCommand, Garbage, GarbageRequest, Manifest, RestoreCommand
from hibernode.node import Node, calmly
from hibernode.ports import Notary, ObjectFacts, OpenUpload, Store

_USE_COUNTS = 86400.0  # seconds: an older one is of a node that does not come back for it
_REMOVAL = 3600.0  # seconds a mark of a removal counts
_REMOVAL_BEGINS = 600.0  # seconds after its mark within which the manifest goes: while every restore still sees the mark
_DAY = 86400.0  # seconds
_REFERENCED = "referenced"  # the code of the refusal to remove what others need

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_OBJECTS = r"(?:pages|layer)-[0-9]+\.zst|(?:layer-)?index\.zst|digests\.zst|images\.tar\.zst|rootfs\.tar\.zst"
_IMAGE = rf"[A-Za-z0-9][A-Za-z0-9._-]*/(?:{_OBJECTS})"
_OURS = re.compile(rf"{_UUID}/(?:manifest\.json|attempt|removing|unwanted|(?:uses|refs)/{_UUID}|{_IMAGE})")
# A container may be called `refs`, and what is stored of it lies beside these; none of its objects is named like an id.
_REFERENCE, _USE = re.compile(rf"{_UUID}/refs/{_UUID}"), re.compile(rf"{_UUID}/uses/{_UUID}")
_UNDER_AN_ID = re.compile(rf"({_UUID})/.*", re.DOTALL)

_log = logging.getLogger("hibernode.gc")


# --- what is there ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """All that is in a store under one checkpoint id."""

    checkpoint_id: str
    objects: tuple[ObjectFacts, ...] = ()
    uploads: tuple[OpenUpload, ...] = ()
    manifest: Manifest | None = None  # None, and no trouble: there is none
    trouble: HibernodeError | None = None  # why it cannot be read, is not believed, or could not be restored

    @property
    def whole(self) -> bool:
        """Is it a checkpoint, whether we can read it or not?"""
        return self.manifest is not None or self.trouble is not None

    @property
    def foreign(self) -> str:
        """A key that none of us has written: then nothing here is ours to remove."""
        keys = (*(facts.key for facts in self.objects), *(upload.key for upload in self.uploads))
        return next((key for key in keys if not _OURS.fullmatch(key)), "")

    @property
    def bytes(self) -> int:
        return sum(facts.size for facts in self.objects)

    @property
    def newest(self) -> float:
        """When anything was last written here."""
        return max((*(facts.modified for facts in self.objects), *(upload.began for upload in self.uploads)))

    @property
    def created(self) -> float:
        """When it was made, by the clock of its node."""
        return self.manifest.created_at if self.manifest else 0.0

    @property
    def committed(self) -> float:
        """When it became a checkpoint, by the clock of the store."""
        key = catalog.manifest_key(self.checkpoint_id)
        return next((facts.modified for facts in self.objects if facts.key == key), 0.0)

    @property
    def alive(self) -> bool:
        """It is a checkpoint, or may become one: what it refers to has to stay."""
        return self.whole or any(facts.key == _mark(self.checkpoint_id) for facts in self.objects)

    @property
    def marks(self) -> dict[str, ObjectFacts]:
        """Of who refers to it, by their ids: some may be stale."""
        return {facts.key.rpartition("/")[2]: facts for facts in self.objects if _REFERENCE.fullmatch(facts.key)}

    @property
    def bases(self) -> set[str]:
        """To whom it refers."""
        return {base.checkpoint_id for base in self.manifest.bases} if self.manifest else set()

    def may_refer(self, base: str) -> bool:
        """It does, or may come to, or nobody can read whether it does."""
        return self.alive and (self.manifest is None or base in self.bases)

    @property
    def unwanted(self) -> bool:
        return any(facts.key == _unwanted(self.checkpoint_id) for facts in self.objects)

    @property
    def deleted(self) -> bool:
        """By somebody, while others referred to it; whether or not it could still be restored."""
        return self.unwanted and self.manifest is not None

    def used(self, now: float) -> bool:
        return any(_USE.fullmatch(facts.key) and now - facts.modified < _USE_COUNTS for facts in self.objects)


def look(store: Store, notary: Notary) -> list[Place]:
    """Everything in the store that lies under a checkpoint id, in order of the ids."""
    objects: dict[str, list[ObjectFacts]] = defaultdict(list)
    uploads: dict[str, list[OpenUpload]] = defaultdict(list)
    for facts in store.list():
        if under := _UNDER_AN_ID.fullmatch(facts.key):
            objects[under[1]].append(facts)
    for upload in store.open_uploads():
        if under := _UNDER_AN_ID.fullmatch(upload.key):
            uploads[under[1]].append(upload)
    places = [_place(store, notary, each, objects[each], uploads[each]) for each in sorted({*objects, *uploads})]
    sizes = {facts.key: facts.size for place in places for facts in place.objects}
    return [replace(place, trouble=_incomplete(place.manifest, sizes)) if place.manifest else place for place in places]


def _incomplete(manifest: Manifest, sizes: Mapping[str, int]) -> Corrupt | None:
    """What a restore of it would say, of what is not there, or is not all there. One that is committed while this lists may look so."""
    try:
        catalog.insist_sizes(manifest, sizes.get)
    except Corrupt as e:
        return e
    return None


def _place(store: Store, notary: Notary, checkpoint_id: str, objects: list[ObjectFacts], uploads: list[OpenUpload]) -> Place:
    manifest: Manifest | None = None
    trouble: HibernodeError | None = None
    if any(facts.key == catalog.manifest_key(checkpoint_id) for facts in objects):
        try:
            manifest = catalog.read(store, checkpoint_id, notary)
        except HibernodeError as e:
            trouble = e
    return Place(checkpoint_id, tuple(objects), tuple(uploads), manifest, trouble)


# --- what goes ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """One thing that goes, and why."""

    what: Literal["upload", "attempt", "checkpoint", "mark"]
    place: Place
    age: float  # seconds
    reason: Literal["orphaned_upload", "no_manifest", "beyond_last", "too_old", "unwanted", "no_referrer"]
    upload: OpenUpload | None = None
    key: str = ""  # of a mark

    @property
    def whole(self) -> bool:
        """Nothing of its place stays."""
        return self.what in ("attempt", "checkpoint")


def plan(found: Iterable[Place], now: float, policy: Retention, in_use: Collection[str]) -> list[Removal]:
    """What goes, in order of the ids, the uploads of one before its objects; but who refers to another before that. Pure.

    Nothing that is younger than `policy.grace`, that somebody uses, that is not ours, or whose manifest cannot be read or believed; nor
    what another refers to that stays. What either rule of the retention keeps stays; a checkpoint that is not believed, or lacks something,
    does not count for one that is kept."""
    places = sorted(found, key=lambda place: place.checkpoint_id)
    last = _last(places, policy.keep_last)
    removals = [
        removal
        for place in places
        if not (place.checkpoint_id in in_use or (place.trouble and not place.deleted) or place.foreign or place.used(now))
        for removal in (_checkpoint(place, now, policy, last) if place.manifest else _attempt(place, now))
        if removal.age >= policy.grace
    ]
    removals = _referrers_first(_unreferenced(removals, places))
    going = {removal.place.checkpoint_id for removal in removals if removal.whole}
    attempts = {removal.place.checkpoint_id for removal in removals if removal.what == "attempt"}
    left = {
        place.checkpoint_id: place for place in places if place.checkpoint_id not in attempts
    }  # those go before their marks; a checkpoint takes its own
    return removals + [
        Removal("mark", place, now - facts.modified, "no_referrer", key=facts.key)
        for place in places
        if place.checkpoint_id not in going and not place.foreign
        for referrer, facts in place.marks.items()
        if not (referrer in left and left[referrer].may_refer(place.checkpoint_id)) and now - facts.modified >= policy.grace
    ]


def _unreferenced(removals: list[Removal], places: Iterable[Place]) -> list[Removal]:
    """Those to which none refers that stays. A mark says it, and the manifest of who refers, should its mark be lost."""
    there = {place.checkpoint_id: place for place in places}
    while True:
        going = {removal.place.checkpoint_id for removal in removals if removal.whole}
        staying = {each: place for each, place in there.items() if each not in going}
        held = {
            each for each, place in there.items() if any(staying[who].may_refer(each) for who in place.marks.keys() & staying)
        }
        held |= {base for place in staying.values() for base in place.bases}
        left = [removal for removal in removals if not removal.whole or removal.place.checkpoint_id not in held]
        if len(left) == len(removals):
            return left
        removals = left


def _referrers_first(removals: list[Removal]) -> list[Removal]:
    ordered: list[Removal] = []
    while removals:
        going = {removal.place.checkpoint_id for removal in removals if removal.whole}
        later = {
            each.place.checkpoint_id
            for each in removals
            if each.whole and (each.place.marks.keys() - {each.place.checkpoint_id}) & going
        }
        if later == going:  # a circle, which none of us has written
            return ordered + removals
        ordered += [removal for removal in removals if removal.place.checkpoint_id not in later]
        removals = [removal for removal in removals if removal.place.checkpoint_id in later]
    return ordered


def _attempt(place: Place, now: float) -> list[Removal]:
    """As old as its newest part: one that is at work is young."""
    age = now - place.newest
    uploads = [Removal("upload", place, age, "orphaned_upload", upload) for upload in place.uploads]
    return [*uploads, *([Removal("attempt", place, age, "no_manifest")] if place.objects else [])]


def _checkpoint(place: Place, now: float, policy: Retention, last: Collection[str]) -> list[Removal]:
    uploads = [Removal("upload", place, now - upload.began, "orphaned_upload", upload) for upload in place.uploads]
    age, days = now - max(place.created, place.committed), policy.keep_days * _DAY
    if place.unwanted:
        return [*uploads, Removal("checkpoint", place, age, "unwanted")]
    if not (policy.keep_last or days) or place.checkpoint_id in last or age < days:
        return uploads
    return [*uploads, Removal("checkpoint", place, age, "too_old" if days else "beyond_last")]


def _last(places: Iterable[Place], count: int) -> set[str]:
    """The ids of each workload's `count` last checkpoints. A clock may be wrong, its node's or the store's (or a bucket was copied):
    who is among the last by either of them is."""
    groups: dict[object, list[Place]] = defaultdict(list)
    for place in places:
        if place.manifest is not None and place.trouble is None:
            groups[_workload(place.manifest)].append(place)
    kept: set[str] = set()
    for group in groups.values() if count else ():
        by_node = sorted(group, key=lambda place: (place.created, place.checkpoint_id))
        by_store = sorted(group, key=lambda place: (place.committed, place.checkpoint_id))
        kept |= {place.checkpoint_id for place in (*by_node[-count:], *by_store[-count:])}
    return kept


def _workload(manifest: Manifest) -> object:
    """What counts as one workload: a pod by its UID, for many clusters may have a pod of that name, and share this store. A process
    has no such name: then all that tells it from others."""
    facts = manifest.workload
    root = manifest.images[0].tasks[0].pid if manifest.images else 0
    return facts.uid or (manifest.node, root, facts.name, tuple(facts.argv), facts.cwd)


# --- going --------------------------------------------------------------------------------------------------------------------


def policy(configured: Retention, request: GarbageRequest) -> Retention:
    """What was asked for, and where nothing was, what is configured."""
    asked = {name: value for name in ("grace", "keep_last", "keep_days") if (value := getattr(request, name)) is not None}
    return configured.model_copy(update=asked)


def collect(
    node: Node, store: Store, policy: Retention, tell: Callable[[Garbage], None], cancel: Cancel, *, apply: bool = False
) -> None:
    """Tell what would go, or remove it and tell how that went: one that cannot be removed keeps no other. Then what stays and should
    be looked at. In a thread; ends after the removal at hand when cancelled."""
    places, now = look(store, node.notary), time.time()
    for removal in plan(places, now, policy, _at_work(node)):
        cancel.check()
        tell(_remove(node, store, removal) if apply else _told(removal, "found"))
    for place in places:
        for garbage in _staying(place, now):
            tell(garbage)


def _at_work(node: Node) -> set[str]:
    """The checkpoints that this node's actions write or read; their claims are asked when something is removed."""
    return {entry.record.checkpoint_id for entry in node.journal.all() if not entry.record.done}


def _remove(node: Node, store: Store, removal: Removal) -> Garbage:
    checkpoint_id = removal.place.checkpoint_id
    try:
        with node.claims.claim(f"checkpoint {checkpoint_id}", f"gc {uuid.uuid4()}"):
            if checkpoint_id in _at_work(node):
                raise Busy(f"an action of this node is at work on {checkpoint_id}")
            if removal.upload is not None:
                store.abort_upload(removal.upload)
            elif removal.what == "mark":
                _remove_mark(store, node.notary, removal.key)
            elif removal.what == "attempt":
                _remove_attempt(store, removal.place)
            else:
                with _removing_alone(store, node.notary, checkpoint_id):
                    catalog.delete(store, checkpoint_id)
                _let_go(store, node.notary, checkpoint_id, removal.place.bases)
    except Busy as e:
        return _told(removal, "in_use", e)
    except HibernodeError as e:
        if e.code == _REFERENCED:  # since it was looked at
            return _told(removal, "in_use", e)
        _log.warning("%s %s could not be removed: %s", removal.what, checkpoint_id, e)
        return _told(removal, "failed", e)
    _log.info("%s %s is removed: %s", removal.what, checkpoint_id, removal.reason)
    return _told(removal, "removed")


def _remove_attempt(store: Store, place: Place) -> None:
    """All its objects, its mark last, if it is as it was when it was looked at."""
    there = list(store.list(f"{place.checkpoint_id}/"))
    if set(there) - set(place.objects):
        raise Busy(f"something was written under {place.checkpoint_id} meanwhile")
    for facts in sorted(there, key=lambda facts: facts.key == _mark(place.checkpoint_id)):
        store.delete(facts.key)


def _remove_mark(store: Store, notary: Notary, key: str) -> None:
    """Of who might have referred to another, if he does not."""
    if _may_refer(store, notary, key.rpartition("/")[2], key.partition("/")[0]):
        raise Busy(f"somebody has begun to refer: {key}")
    store.delete(key)


@contextmanager
def _removing_alone(store: Store, notary: Notary, checkpoint_id: str) -> Iterator[None]:
    """Inside it is removed, manifest first; Busy if somebody uses it, Refused("referenced") if somebody refers to it. No mark stays on what
    stays."""
    began = time.monotonic()
    _put_removing(store, checkpoint_id)
    try:
        there = tuple(store.list(f"{checkpoint_id}/"))
        if Place(checkpoint_id, there).used(time.time()):
            raise Busy(f"a restore uses {checkpoint_id}", hint="wait for it; what a node left that died counts for a day")
        if referrers := _referrers(store, notary, checkpoint_id, there):
            raise Refused(
                "referenced", f"{len(referrers)} checkpoints have pages in {checkpoint_id}, and could not be restored without it: "
                + ", ".join(referrers[:3]), prop="checkpoint_id", found=referrers[:100], wanted="none that refers to it",
                hint="delete those first",
            )  # fmt: skip
        if time.monotonic() - began > _REMOVAL_BEGINS:
            raise StoreUnavailable(f"the store is too slow to remove {checkpoint_id} safely", hint="try again")
        yield
    except BaseException:
        calmly("removing the mark of the removal", lambda: store.delete(_removing(checkpoint_id)))()
        raise


def _referrers(store: Store, notary: Notary, checkpoint_id: str, there: tuple[ObjectFacts, ...]) -> list[str]:
    return [each for each in Place(checkpoint_id, there).marks if _may_refer(store, notary, each, checkpoint_id)]


def remove(store: Store, notary: Notary, checkpoint_id: str, *, later: bool = False) -> None:
    """Somebody has asked for it: remove this checkpoint. NotFound if there is none, Busy if a restore, on whatever node, uses it,
    Refused("referenced") if others refer to it; `later`: then it goes with the last of them."""
    store.stat(catalog.manifest_key(checkpoint_id))
    bases = bases_of(store, notary, checkpoint_id)
    try:
        with _removing_alone(store, notary, checkpoint_id):
            catalog.delete(store, checkpoint_id)
    except Refused as e:
        if e.code != _REFERENCED or not later:
            raise
        _log.info("%s, and goes with the last of them", e.message)
        with suppress(Refused):  # it is there
            store.put(_unwanted(checkpoint_id), b"")
        if not _referrers(
            store, notary, checkpoint_id, tuple(store.list(f"{checkpoint_id}/"))
        ):  # the last has gone before he could see that
            remove(store, notary, checkpoint_id, later=True)
        return
    _let_go(store, notary, checkpoint_id, bases)


def bases_of(store: Store, notary: Notary, checkpoint_id: str) -> set[str]:
    """To whom it refers; none of one that cannot be read: its marks are stale when it has gone, and `collect` finds them."""
    try:
        return {base.checkpoint_id for base in catalog.read(store, checkpoint_id, notary).bases}
    except (Corrupt, Refused):
        return set()


def _let_go(store: Store, notary: Notary, checkpoint_id: str, bases: Iterable[str]) -> None:
    """It is gone, and refers to nobody: who was there for it alone goes, too."""
    for base in sorted(bases):
        calmly(f"removing the mark in {base}", functools.partial(_let_one_go, store, notary, checkpoint_id, base))()


def _let_one_go(store: Store, notary: Notary, checkpoint_id: str, base: str) -> None:
    store.delete(_reference(base, checkpoint_id))
    if _is_there(store, _unwanted(base)):
        remove(store, notary, base, later=True)


def _may_refer(store: Store, notary: Notary, checkpoint_id: str, base: str) -> bool:
    """As `Place` says it. `attempt` first: while it is looked for the manifest may come, and it may go."""
    attempted = _is_there(store, _mark(checkpoint_id))
    try:
        return base in {each.checkpoint_id for each in catalog.read(store, checkpoint_id, notary).bases}
    except NotFound:
        return attempted
    except (Corrupt, Refused):
        return True


def _put_removing(store: Store, checkpoint_id: str) -> None:
    key = _removing(checkpoint_id)
    try:
        store.put(key, b"")
    except Refused:
        with suppress(NotFound):
            if time.time() - store.stat(key).modified < _REMOVAL:
                raise Busy(f"somebody removes {checkpoint_id} already") from None
        store.delete(key)  # of one who died
        store.put(key, b"")


def _told(
    removal: Removal, state: Literal["found", "removed", "in_use", "failed"], error: HibernodeError | None = None
) -> Garbage:
    place, upload = removal.place, removal.upload
    return Garbage(
        what=removal.what,
        checkpoint_id=place.checkpoint_id,
        key=upload.key if upload else removal.key,
        bytes=place.bytes if removal.whole else 0,
        age=removal.age,
        reason=removal.reason,
        workload=_name(place),
        state=state,
        code=error.code if error else "",
        message=error.message if error else "",
    )


def _staying(place: Place, now: float) -> Iterator[Garbage]:
    """What stays though it may be garbage: only a person can tell."""
    trouble = None if isinstance(place.trouble, NotFound) else place.trouble  # removed since we listed it
    if place.foreign or trouble:
        yield Garbage(
            what="checkpoint" if place.whole else "attempt",
            checkpoint_id=place.checkpoint_id,
            key=place.foreign,
            bytes=place.bytes,
            age=now - place.newest,
            reason="foreign" if place.foreign else "unreadable",
            workload=_name(place),
            state="kept",
            code=trouble.code if trouble else "",
            message=trouble.message if trouble else "",
        )


def _name(place: Place) -> str:
    if place.manifest is None:
        return ""
    workload = place.manifest.workload
    return f"{workload.namespace}/{workload.name}" if workload.kind == "job" else workload.name


# --- what an action puts beside its objects -----------------------------------------------------------------------------------


@contextmanager
def attempting(store: Store, checkpoint_id: str, action_id: str) -> Iterator[None]:
    """The one attempt at this id: Refused("exists") if there is anything under it, or if another node is at it. Left with an error,
    nothing of it stays; but what nobody knows the outcome of is left as it is."""
    _insist_new(store, checkpoint_id, action_id)
    try:
        _put_mark(store, checkpoint_id, action_id)
        yield
    except OutcomeUnknown:
        raise
    except BaseException:
        calmly("sweeping up after the attempt", lambda: sweep(store, checkpoint_id, action_id))()
        raise
    calmly("removing the mark of the attempt", lambda: store.delete(_mark(checkpoint_id)))()


def _insist_new(store: Store, checkpoint_id: str, action_id: str) -> None:
    try:
        catalog.insist_new(store, checkpoint_id)
    except Refused:
        if not _is_of(store, checkpoint_id, action_id):
            raise
        sweep(store, checkpoint_id, action_id)  # of a try before, whose end did not reach the store
        catalog.insist_new(store, checkpoint_id)


def _put_mark(store: Store, checkpoint_id: str, action_id: str) -> None:
    try:
        store.put(_mark(checkpoint_id), action_id.encode())
    except Refused:
        catalog.insist_new(store, checkpoint_id)  # says it in words
        raise


def sweep(store: Store, checkpoint_id: str, action_id: str) -> None:
    """Remove what an attempt of this action has left under its id: open uploads, objects, its mark. Nothing where the mark is not its
    own, and no object but the mark where there is a manifest. May be repeated; may raise, and then the mark still says whose it is.

    Not for an action that a crash ended while it was committing, in a store that `lingers`: its manifest may be on its way, and must
    not come to name what is gone. Such a rest is `collect`'s, after the grace time."""
    if not _is_of(store, checkpoint_id, action_id):
        return
    there = [facts.key for facts in store.list(f"{checkpoint_id}/")]
    whole = catalog.manifest_key(checkpoint_id) in there
    for upload in list(store.open_uploads(f"{checkpoint_id}/")):
        others = _USE.fullmatch(upload.key) or _REFERENCE.fullmatch(upload.key)  # somebody says that he reads
        if not (whole and others):
            store.abort_upload(upload)
    if not whole:
        for key in there:
            if key != _mark(checkpoint_id):
                store.delete(key)
    store.delete(_mark(checkpoint_id))


def tidy(node: Node, record: Record) -> None:
    """Recovery: take out of the store what a crash has left of this action there, its attempt or its use. To be called when its
    workload is free and no other waits: a store may be slow. Never raises: what it cannot do is left to `collect`."""
    calmly(f"tidying up after action {record.action_id}", lambda: _tidy(node, record))()


def _tidy(node: Node, record: Record) -> None:
    command = command_of(record)
    if command is None:
        return
    store = node.open_store(command.overrides.directory)
    if isinstance(command, RestoreCommand):
        for upload in store.open_uploads(_use(command.checkpoint_id, command.action_id)):
            store.abort_upload(upload)  # it died while it said that it reads
        release(store, command.checkpoint_id, command.action_id)
    elif record.phase == "committing" and store.lingers and not _is_there(store, catalog.manifest_key(command.checkpoint_id)):
        _log.info("left for a collection: %s may still get its manifest", command.checkpoint_id)
    else:
        sweep(store, command.checkpoint_id, command.action_id)


def command_of(record: Record) -> ActionCommand | None:
    """None of an entry that could not be read."""
    try:
        kind = CheckpointCommand if record.type == "checkpoint" else RestoreCommand
        return kind.model_validate_json(record.command)
    except ValueError:
        return None


def _is_there(store: Store, key: str) -> bool:
    return any(facts.key == key for facts in store.list(key))


def _is_of(store: Store, checkpoint_id: str, action_id: str) -> bool:
    try:
        return store.get(_mark(checkpoint_id), limit=len(action_id)) == action_id.encode()
    except (NotFound, Corrupt):
        return False


@contextmanager
def using(store: Store, checkpoint_id: str, action_id: str) -> Iterator[None]:
    """While inside, no node's `collect` removes this checkpoint. Busy or NotFound if one is at it or has done so. A store that cannot
    be written is used without: its checkpoints are then as safe as their age makes them."""
    if not _leased(store, _use(checkpoint_id, action_id)):
        yield
        return
    try:
        _insist_stays(store, checkpoint_id)
        yield
    finally:
        calmly("giving the checkpoint back", lambda: release(store, checkpoint_id, action_id))()


def release(store: Store, checkpoint_id: str, action_id: str) -> None:
    """Take back a use, also one that a crash has left. May be repeated."""
    store.delete(_use(checkpoint_id, action_id))


def _leased(store: Store, key: str) -> bool:
    try:
        try:
            store.put(key, b"")
        except Refused:  # of a try before: its age is not ours
            store.delete(key)
            store.put(key, b"")
    except (StoreUnavailable, NoRoom, Refused) as e:
        _log.warning("the store cannot be told that %s is in use: %s", key, e)
        return False
    return True


def _insist_stays(store: Store, checkpoint_id: str) -> None:
    there = {facts.key: facts for facts in store.list(f"{checkpoint_id}/")}
    removing = there.get(_removing(checkpoint_id))
    if removing is not None and time.time() - removing.modified < _REMOVAL:
        raise Busy(f"checkpoint {checkpoint_id} is being removed", hint="`hibernode list` shows those that stay")
    if catalog.manifest_key(checkpoint_id) not in there:
        raise NotFound(f"checkpoint {checkpoint_id} was removed", hint="`hibernode list` shows those that are", id=checkpoint_id)


class References:
    """The marks that a checkpoint on its way has in those to which it may refer."""

    def __init__(self, bases: Collection[str] = ()) -> None:
        self.unneeded = set(bases)

    @contextmanager
    def committing(self, store: Store, manifest: Manifest) -> Iterator[None]:
        """Inside it is committed; then those to which it does refer keep their marks for as long as it is there. Busy if what says that
        this is an attempt has been removed (a workload may wait for its arena for longer than another node's `collect` has patience),
        Busy or NotFound if a base is, or was."""
        for base in sorted({base.checkpoint_id for base in manifest.bases}):
            with suppress(Refused):  # it is there, as it should be
                store.put(_reference(base, manifest.checkpoint_id), b"")
            _insist_stays(store, base)
        if manifest.bases and not _is_of(store, manifest.checkpoint_id, manifest.action_id):
            raise Busy(f"somebody has removed the attempt at {manifest.checkpoint_id}", hint="a longer `gc.grace`; try again")
        yield
        self.unneeded -= {base.checkpoint_id for base in manifest.bases}


@contextmanager
def referring(store: Store, notary: Notary, bases: Collection[str], checkpoint_id: str) -> Iterator[References]:
    """While inside, none of these is removed by any node; afterwards none of those that were kept. Inside of `attempting`. Busy or NotFound
    if one is being removed or was; what the store says if it cannot be written: without a mark nothing is referred to."""
    references = References(bases)

    def release() -> None:
        _let_go(store, notary, checkpoint_id, references.unneeded)

    try:
        for base in sorted(bases):
            with suppress(Refused):  # of a try before
                store.put(_reference(base, checkpoint_id), b"")
            _insist_stays(store, base)
        yield references
    except OutcomeUnknown:
        raise
    except BaseException:
        calmly("taking back references", lambda: None if _is_there(store, catalog.manifest_key(checkpoint_id)) else release())()
        raise
    calmly("taking back references that are not needed", release)()


def _mark(checkpoint_id: str) -> str:
    return f"{checkpoint_id}/attempt"


def _use(checkpoint_id: str, action_id: str) -> str:
    return f"{checkpoint_id}/uses/{action_id}"


def _reference(base: str, checkpoint_id: str) -> str:
    return f"{base}/refs/{checkpoint_id}"


def _unwanted(checkpoint_id: str) -> str:
    return f"{checkpoint_id}/unwanted"


def _removing(checkpoint_id: str) -> str:
    return f"{checkpoint_id}/removing"
