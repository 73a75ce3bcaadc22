"""A layer of one large file through a small arena into a store and back, in a process of its own: prints the bytes that it took at most.

layer.py UPPER STORE ROOT ARENA_BYTES
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from hibernode.drivers.localdir import LocalDir
from hibernode.transfer.arena import Arena
from tests.layers import received, sent

upper, place, root, size = sys.argv[1:]
arena = Arena(int(size))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
store = LocalDir(Path(place))
ref = sent(Path(upper), store, arena=arena)
sent_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
received(store, ref, Path(root))
print(before, sent_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
