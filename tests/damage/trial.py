"""One damaged checkpoint on one node of fakes: restored by the page, then verified; then the next increment is made of its workload, which
runs on. What is told is what should not be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hibernode import catalog
from hibernode.errors import Busy, Corrupt, HibernodeError, NotFound, Refused
from hibernode.journal import BOOT, Tree
from hibernode.model import Cancel, Status
from tests.damage import needed
from tests.damage.harm import Harm
from tests.damage.needed import Looks, Needed, differing
from tests.damage.stored import AUTO, FULL, MIDDLE, Objects, Stored
from tests.fakes.machine import ROOT
from tests.flow.rig import Rig, checkpoint_command, new_id, nothing_outlives

LAST = "last"  # what the one that is damaged is called by the next, which refers to it
DAMAGED = "damaged"  # the next refers to frames that are: their bytes are not read before it is made
CODES = ("corrupt", "not_found", "signature", "signer", "unsigned")  # a refusal for any other reason has not found the damage
NO_INCREMENT = (*CODES, "increment_unknown", "busy")  # what a checkpoint that says from which is refused with
_FRESH = 100  # trials on one node: its journal keeps every action that it has not published


@dataclass
class Trial:
    """What became of one: `code` is empty if it was restored. `following`: of the next increment, if one was made: which is the last that
    it refers to, or that there is damage in what it refers to."""

    harm: Harm
    code: str
    wrong: list[str] = field(default_factory=list)
    following: str = ""


class Bench:
    """A node for each kind of checkpoint, in `directory`, which should be on tmpfs: the journal writes through to the disk. Of so many of a
    chain one is followed by the next increment, which takes three times as long."""

    def __init__(self, directory: Path, everything: Mapping[str, Stored], *, followed: int = 4) -> None:
        self._directory, self._everything, self._followed, self._chained = directory, everything, followed, 0
        self._rigs: dict[str, tuple[Rig, int]] = {}
        self.looks: dict[str, Needed] = {}  # of those of chains; a test may say what is not so

    def play(self, harm: Harm, after: Objects) -> Trial:
        stored = self._everything[harm.stored]
        rig = self._rig(stored)
        rig.store.objects.clear()
        for key, data in stored.keys(after).items():
            rig.store.put(key, data)
        trial, keys = Trial(harm, ""), dict(rig.store.objects)
        looks = self.looks.get(stored.name)
        try:
            with nothing_outlives():
                may = not _changed(looks and looks.restore, stored.objects, after)
                trial.code = self._tell(trial, "restore", lambda: rig.restore(stored.checkpoint_id), fine=may)
                trial.wrong += (
                    ["CRIU was called"] if not may and (rig.criu.restores or "criu.restore" in rig.script.notes) else []
                )
                trial.wrong += ["it was reported as ready"] if not may and Status.READY in rig.statuses else []
                may = not _changed(looks and looks.verify, stored.objects, after)
                found = self._tell(trial, "verify", lambda: _verify(rig, stored.checkpoint_id), fine=may)
                trial.wrong += ["the store is not as it was"] if rig.store.objects != keys else []
                self._chained += bool(stored.runs)
                if stored.runs and self._chained % self._followed == 0:
                    self._follow(trial, rig, stored, after)
        except AssertionError as e:
            trial.wrong.append(str(e))
        else:
            if looks is None or (found and trial.code):
                trial.wrong += [f"verify says {found or 'ok'}, restore {trial.code or 'ready'}"] if found != trial.code else []
        trial.wrong += rig.at_work()
        if trial.wrong:
            del self._rigs[harm.stored]
        return trial

    def _follow(self, trial: Trial, rig: Rig, stored: Stored, after: Objects) -> None:
        """The next increment, of the same processes: what it refers to can be read, or it refers to something else; what it would not see
        before anybody is frozen are bytes of streams. Named, it is refused before anybody is frozen."""
        rig.node.damaged.clear()  # of a daemon that has not met the damage: what one does that has, tests of increments say
        before, rig.machine.runs = rig.machine.runs, [*stored.runs]
        seen = differing(self.looks[stored.name].following, stored.objects, after)
        if seen:
            named = json.dumps({"increment": stored.checkpoint_id})
            self._begin(rig)
            code = self._tell(
                trial, "an increment of it", lambda: rig.checkpoint(criu_opts=named), fine=False, codes=NO_INCREMENT
            )
            trial.wrong += [f"it was frozen before {code}"] if "workload.freeze" in rig.script.notes else []
        self._begin(rig)
        made = new_id()
        if self._tell(trial, "the next", lambda: rig.checkpoint(made, criu_opts=AUTO), fine=True):
            return
        bases = {base.checkpoint_id for base in catalog.read(rig.store, made, rig.node.notary).bases}
        trial.wrong += ["the next refers to what cannot be read"] if seen and stored.checkpoint_id in bases else []
        trial.wrong += ["the next does not refer to it"] if not seen and stored.checkpoint_id not in bases else []
        trial.following = following(stored, bases)
        folders = {**stored.bases, LAST: stored.checkpoint_id}
        whole = {**stored.objects, **{f"{LAST}/{name}": stored.objects[name] for name in stored.own}}
        now = {**after, **{f"{LAST}/{name}": after[name] for name in stored.own if name in after}}
        looks = needed.of(replace(stored, checkpoint_id=made, bases=folders), rig).restore
        changed = differing({name: look for name, look in looks.items() if name.partition("/")[0] in folders}, whole, now)
        if changed:
            trial.following = DAMAGED
            trial.wrong += [
                f"the next refers to {name}" for name in changed if "/pages-" not in name or len(now[name]) != len(whole[name])
            ]
        rig.end_of_original()
        self._tell(trial, "verify of the next", lambda: _verify(rig, made), fine=not changed)
        self._tell(trial, "restore of the next", lambda: rig.restore(made), fine=not changed)
        self._end(rig)
        rig.machine.runs = before

    @staticmethod
    def _begin(rig: Rig) -> None:
        """It runs, and nothing was done to it."""
        rig.machine.alive, rig.machine.stopped, rig.machine.restored = True, False, False
        rig.script.notes.clear()

    @staticmethod
    def _end(rig: Rig) -> None:
        rig.end_of_original()
        rig.machine.restored = rig.machine.adopted = False
        rig.criu.restores = 0

    def insist_restores(self, stored: Stored) -> None:
        """What is not damaged comes as far as CRIU, and out of it: else no refusal would prove anything."""
        rig = self._rig(stored)
        _verify(rig, stored.checkpoint_id)
        rig.restore(stored.checkpoint_id)
        assert (rig.statuses, rig.criu.restores) == ([Status.READY], 1)
        del self._rigs[stored.name]

    @staticmethod
    def _tell(
        trial: Trial, what: str, work: Callable[[], object], *, fine: bool, codes: Collection[str] = CODES
    ) -> str:  # fmt: skip
        """The code it is refused with; all else is written down as wrong. `fine`: nothing that it looks at has changed."""
        try:
            work()
        except HibernodeError as e:
            if fine or not isinstance(e, Corrupt | NotFound | Refused | Busy) or e.code not in codes:
                trial.wrong.append(f"{what} ends with {e.code}: {e}")
            return e.code
        except Exception as e:
            trial.wrong.append(f"{what} ends with {type(e).__name__}: {e}")
            return "internal"
        if not fine:
            trial.wrong.append(f"{what} finds nothing wrong")
        return ""

    def _rig(self, stored: Stored) -> Rig:
        """One on which nothing was restored yet."""
        rig, used = self._rigs.get(stored.name, (None, _FRESH))
        if rig is None or used >= _FRESH:
            place = self._directory / stored.name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            rig, used = stored.rig(place), 0
            rig.end_of_original()
            for key, data in stored.keys(stored.objects).items():
                rig.store.put(key, data)
            if stored.bases:
                self.looks.setdefault(stored.name, needed.of(stored, rig))
            _remember(rig, stored.ids)
        self._rigs[stored.name] = rig, used + 1
        self._end(rig)
        rig.script.calls.clear()
        rig.script.notes.clear()
        return rig


def _verify(rig: Rig, checkpoint_id: str) -> None:
    catalog.verify(rig.store, checkpoint_id, rig.node.notary, rig.node.keyring, 2, Cancel(), lambda verdict: None)


def _changed(looks: Looks | None, before: Objects, after: Objects) -> bool:
    """Of what it has no `looks` for everything counts, and something has changed: else it would be no case."""
    return looks is None or bool(differing(looks, before, after))


def following(stored: Stored, bases: Collection[str]) -> str:
    """To the last of which the next refers."""
    names = {**stored.bases, LAST: stored.checkpoint_id}
    return next((name for name in (LAST, MIDDLE, FULL) if names[name] in bases), "nothing")


def _remember(rig: Rig, checkpoint_ids: tuple[str, ...]) -> None:
    """This node has made them, of processes that are still there."""
    for checkpoint_id in checkpoint_ids:
        entry = rig.node.journal.begin(checkpoint_command(checkpoint_id))
        entry.update(phase="done", status=Status.READY, boot=BOOT, trees=(Tree(pid=ROOT, start_time=1000 + ROOT),))
