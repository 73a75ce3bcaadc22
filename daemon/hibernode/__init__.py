"""hibernode: a node-level checkpoint/restore daemon for GPU nodes. Start reading at `checkpoint.py` and `restore.py`."""

__version__ = "0.1.0"
