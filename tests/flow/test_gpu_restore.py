"""A restore of what was on GPUs, on fakes: who is not there any more when his state would be brought back."""

from __future__ import annotations

from pathlib import Path

import pytest

from hibernode.errors import RestoreFailed
from tests.fakes.gpu import INVENTORY
from tests.fakes.machine import ROOT, memory
from tests.fakes.script import Script
from tests.flow.rig import Rig

pytestmark = pytest.mark.timeout(30)


def test_a_user_of_a_gpu_that_ended_before_ends_the_restore_and_the_driver_is_not_asked(tmp_path: Path) -> None:
    """He may have ended as soon as CRIU let him go; the others would wait for him for ever."""
    rig = Rig(tmp_path, memory(20))
    rig.machine.gpu, rig.machine.gpus = "RUNNING", INVENTORY
    checkpoint_id = rig.checkpoint()
    rig.end_of_original()
    rig.machine.gpu = "CHECKPOINTED"
    rig.machine.states = {ROOT: ""}
    rig.rescript(script := Script())
    with pytest.raises(RestoreFailed, match=f"process {ROOT} ended before its GPU state was brought back") as told:
        rig.restore(checkpoint_id)
    assert told.value.details["pids"] == [ROOT]
    assert "gpu.restored" not in script.notes
    assert not rig.machine.restored
    assert not rig.at_work()
    assert rig.statuses == []
