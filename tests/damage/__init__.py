"""Damage: stored checkpoints in which one thing was changed, each of which a restore must refuse before CRIU is called.

`stored` makes the checkpoints, `harm` says what is done to one of them, `trial` restores and verifies what came of it, `table` counts.
`scripts/damage` runs it.
"""
