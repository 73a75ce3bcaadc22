"""What no checkpoint needs: found, decided on, removed. And the three small objects that tell others what must stay.

Under a checkpoint's id there may be, beside what its manifest names,

- `attempt`: put by the action that writes it before anything else, with that action's id. A store gives a key to one only, so that
  one id has one writer, on whatever node, and whatever lies beside the mark is that action's: `sweep` needs no clock to know it.
- `uses/<action>`: put by a restore before it reads.
- `removing`: put by whoever removes a checkpoint, before he looks for uses. A restore puts its use before it looks for this one:
  of two that meet, at least one sees the other.

None of them makes a checkpoint, and none is missed by one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hibernode import catalog
from hibernode.errors import Busy, Corrupt, NoRoom, NotFound, OutcomeUnknown, Refused, StoreUnavailable
from hibernode.node import calmly
from hibernode.ports import Store

_REMOVAL = 3600.0  # seconds a mark of a removal counts

_log = logging.getLogger("hibernode.gc")


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
    own, and nothing but the mark where there is a manifest. May be repeated; may raise, and then the mark still says whose it is.

    Not for an action that a crash ended while it was committing: its manifest may be on its way, and must not come to name what is
    gone. Such a rest is `collect`'s, after the grace time."""
    if not _is_of(store, checkpoint_id, action_id):
        return
    there = [facts.key for facts in store.list(f"{checkpoint_id}/")]
    if _manifest(checkpoint_id) not in there:
        for upload in list(store.open_uploads(f"{checkpoint_id}/")):
            store.abort_upload(upload)
        for key in there:
            if key != _mark(checkpoint_id):
                store.delete(key)
    store.delete(_mark(checkpoint_id))


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
    if _manifest(checkpoint_id) not in there:
        raise NotFound(f"checkpoint {checkpoint_id} was removed", hint="`hibernode list` shows those that are", id=checkpoint_id)


def _manifest(checkpoint_id: str) -> str:
    return f"{checkpoint_id}/manifest.json"


def _mark(checkpoint_id: str) -> str:
    return f"{checkpoint_id}/attempt"


def _use(checkpoint_id: str, action_id: str) -> str:
    return f"{checkpoint_id}/uses/{action_id}"


def _removing(checkpoint_id: str) -> str:
    return f"{checkpoint_id}/removing"
