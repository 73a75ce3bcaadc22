"""One damaged checkpoint on one node of fakes: restored by the page, then verified. What is told is what should not be."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hibernode import catalog
from hibernode.errors import Corrupt, HibernodeError, NotFound, Refused
from hibernode.model import Cancel, Status
from tests.damage.harm import Harm
from tests.damage.stored import Objects, Stored
from tests.flow.rig import Rig, nothing_outlives

CODES = ("corrupt", "not_found", "signature", "signer", "unsigned")  # a refusal for any other reason has not found the damage
_FRESH = 100  # trials on one node: its journal keeps every action that it has not published


@dataclass
class Trial:
    """What became of one: `code` is empty if it was restored."""

    harm: Harm
    code: str
    wrong: list[str] = field(default_factory=list)


class Bench:
    """A node for each kind of checkpoint, in `directory`, which should be on tmpfs: the journal writes through to the disk."""

    def __init__(self, directory: Path, everything: Mapping[str, Stored]) -> None:
        self._directory, self._everything = directory, everything
        self._rigs: dict[str, tuple[Rig, int]] = {}

    def play(self, harm: Harm, after: Objects) -> Trial:
        stored = self._everything[harm.stored]
        rig = self._rig(stored)
        keys = {f"{stored.checkpoint_id}/{name}": data for name, data in after.items()}
        rig.store.objects = dict(keys)
        trial = Trial(harm, "")
        try:
            with nothing_outlives():
                trial.code = self._tell(trial, "restore", lambda: rig.restore(stored.checkpoint_id))
                found = self._tell(trial, "verify", lambda: _verify(rig, stored))
        except AssertionError as e:
            trial.wrong.append(str(e))
        else:
            trial.wrong += [f"verify says {found or 'ok'}, restore {trial.code or 'ready'}"] if found != trial.code else []
        trial.wrong += rig.at_work()
        trial.wrong += ["CRIU was called"] if rig.criu.restores or "criu.restore" in rig.script.notes else []
        trial.wrong += ["it was reported as ready"] if Status.READY in rig.statuses else []
        trial.wrong += ["the store is not as it was"] if rig.store.objects != keys else []
        if trial.wrong:
            del self._rigs[harm.stored]
        return trial

    def insist_restores(self, stored: Stored) -> None:
        """What is not damaged comes as far as CRIU, and out of it: else no refusal would prove anything."""
        rig = self._rig(stored)
        _verify(rig, stored)
        rig.restore(stored.checkpoint_id)
        assert (rig.statuses, rig.criu.restores) == ([Status.READY], 1)
        del self._rigs[stored.name]

    @staticmethod
    def _tell(trial: Trial, what: str, work: Callable[[], object]) -> str:
        """The code it is refused with; all else is written down as wrong."""
        try:
            work()
        except HibernodeError as e:
            if not isinstance(e, Corrupt | NotFound | Refused) or e.code not in CODES:
                trial.wrong.append(f"{what} ends with {e.code}: {e}")
            return e.code
        except Exception as e:
            trial.wrong.append(f"{what} ends with {type(e).__name__}: {e}")
            return "internal"
        trial.wrong.append(f"{what} finds nothing wrong")
        return ""

    def _rig(self, stored: Stored) -> Rig:
        """One on which nothing was restored yet."""
        rig, used = self._rigs.get(stored.name, (None, _FRESH))
        if rig is None or used >= _FRESH:
            place = self._directory / stored.name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            rig, used = stored.rig(place), 0
            rig.end_of_original()
            for name, data in stored.objects.items():
                rig.store.put(f"{stored.checkpoint_id}/{name}", data)
        self._rigs[stored.name] = rig, used + 1
        rig.script.calls.clear()
        rig.script.notes.clear()
        return rig


def _verify(rig: Rig, stored: Stored) -> None:
    catalog.verify(rig.store, stored.checkpoint_id, rig.node.notary, rig.node.keyring, 2, Cancel(), lambda verdict: None)
