"""Which node a checkpoint is restored on. Pure.

What is asked here is what the control plane can know: the node itself looks at all of it again, against the manifest, before it touches
anything (`preflight.restore`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hibernode.api.actions import Action
from hibernode.errors import Refused
from hibernode.model import NodeRecord, lacking


def choose(made: Action, nodes: Sequence[NodeRecord], *, shared: bool, pod: bool = False, avoid: str = "") -> NodeRecord:
    """The node for this checkpoint: the one it was made on if that will do, else the one with the least to do. Refused("no_node") says
    of each node why it will not do. `avoid` is a node that is about to leave; `shared`: `file://` is the same place on every node; `pod`:
    it has to make a pod."""
    unable = "" if not pod else "it makes no pods: it knows no API server"
    whynot = {record.node: (not record.makes_pods and unable) or _unfit(made, record, avoid, shared=shared) for record in nodes}
    fit = [record for record in nodes if not whynot[record.node]]
    if not fit:
        raise Refused(
            "no_node", "no node can restore this checkpoint", prop="node", found=whynot or "no node is alive",
            wanted=_wanted(made), hint="`GET /v2/nodes` shows what there is",
        )  # fmt: skip
    return min(fit, key=lambda record: (record.node != made.node, _business(record), record.node))


def reaching(made: Action, nodes: Sequence[NodeRecord], *, shared: bool) -> NodeRecord:
    """A node that reaches the store of this checkpoint: the one that made it, else any. Refused("no_node")."""
    fit = [record for record in nodes if record.node == made.node or _reaches(record, made, shared=shared)]
    if not fit:
        raise Refused(
            "no_node", "no node that is alive reaches this checkpoint", prop="location", found=made.location,
            wanted="a node with this store", hint="`GET /v2/nodes` shows what there is",
        )  # fmt: skip
    return min(fit, key=lambda record: (record.node != made.node, record.node))


def _unfit(made: Action, record: NodeRecord, avoid: str, *, shared: bool) -> str:
    """Why not; empty if it will do."""
    host, memory = made.host, _memory(made)
    if record.node == avoid:
        return "it is leaving"
    if host.get("arch") and record.arch != host["arch"]:
        return f"arch is {record.arch}, the checkpoint's {host['arch']}"
    if record.cpu_flags and (missing := lacking(host.get("cpu_flags", ()), record.cpu_flags)):  # else the node will say
        return f"its CPU lacks {', '.join(missing)}"
    if _version(record.criu) < _version(str(host.get("criu", ""))):
        return f"criu is {record.criu}, the checkpoint was made with {host['criu']}"
    if record.memory_available < memory:
        return f"memory available is {record.memory_available}, the checkpoint has {memory}"
    return "" if record.node == made.node else _unfit_elsewhere(made, record, shared=shared)


def _unfit_elsewhere(made: Action, record: NodeRecord, *, shared: bool) -> str:
    if not _reaches(record, made, shared=shared):
        return f"its store is {record.store}, the checkpoint is at {made.location or 'a place nobody knows'}"
    return _unlike(made.host, record) if made.profile.get("gpu_ns") else ""


def _unlike(host: Mapping[str, Any], record: NodeRecord) -> str:
    """Why what was on GPUs cannot come onto this node's: the driver is another, or none of its GPUs is of a kind that was there."""
    here = record.gpu_inventory
    if here.driver != host.get("gpu_driver", ""):
        return f"its NVIDIA driver is {here.driver or 'unknown'}, the checkpoint's {host.get('gpu_driver') or 'unknown'}"
    kinds = {gpu.name for gpu in here.gpus}
    if not kinds & set(host.get("gpus", ())):
        return (
            f"its GPUs are {', '.join(sorted(kinds)) or 'none'}, the checkpoint's {', '.join(sorted(set(host.get('gpus', ()))))}"
        )
    return ""


def _reaches(record: NodeRecord, made: Action, *, shared: bool) -> bool:
    """Whether it opens the same store: its own, or the one under it that the command had named and the restore names again."""
    root = record.store.rstrip("/")
    if root.startswith("file:") and not shared:
        return False
    directory = str(made.overrides.get("directory", "")).rstrip("/")
    if directory:
        return directory == root or directory.startswith(f"{root}/")
    return made.location == f"{root}/{made.checkpoint_id}"


def _memory(made: Action) -> int:
    """Bytes that must be there: each page that is stored, once."""
    profile: Mapping[str, Any] = made.profile
    return int(profile.get("raw_bytes", 0)) - int(profile.get("zero_bytes", 0))


def _version(text: str) -> tuple[int, ...]:
    """Of CRIU: the first two numbers count, as for the node."""
    found = re.match(r"([0-9]{1,6})\.([0-9]{1,6})", text)
    return (int(found[1]), int(found[2])) if found else ()


def _business(record: NodeRecord) -> float:
    """How much it has to do; the share of its memory that is taken breaks ties."""
    taken = 1 - record.memory_available / max(1, record.memory_total)
    return record.actions + record.load / max(1, record.cpus) + taken


def _wanted(made: Action) -> dict[str, object]:
    return {
        "arch": made.host.get("arch", "any"), "criu": made.host.get("criu", "any"), "memory": _memory(made), "location": made.location,
    }  # fmt: skip
