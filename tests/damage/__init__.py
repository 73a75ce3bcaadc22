"""Damage: stored checkpoints in which one thing was changed, each of which a restore must refuse before anybody runs; and increments, of
which what is damaged may be another's, needed or not.

`stored` makes the checkpoints, `harm` says what is done to one of them, `needed` what of it is looked at, `trial` restores and verifies
what came of it, and makes the next increment, `table` counts. `scripts/damage` runs it.
"""
