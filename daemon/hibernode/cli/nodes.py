"""Commands about this machine and its cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hibernode._pb import hibernode_pb2 as pb
from hibernode.cli import text
from hibernode.cli.failure import Answered
from hibernode.cli.screen import Cell, Column, Screen, ago
from hibernode.cli.session import (
    Session,
    command,
)


@command("doctor")
def doctor(session: Session) -> None:
    """Check this machine, and say how to mend what is wrong.

    The exit code is 1 if something that is required is missing. What is marked `!` is a feature less, not a defect.

    \b
    Examples:
      hibernode doctor
      hibernode doctor --json | jq '.checks[] | select(.ok | not)'
    """
    answer: pb.DoctorReply = session.client.ask(session.client.stub.Doctor, pb.Empty())
    broken = [check.name for check in answer.checks if check.required and not check.ok]
    if session.screen.as_json:
        session.screen.document(text.plain(answer))
    else:
        _checks(session.screen, answer.checks)
    if broken:
        many = "a required check fails" if len(broken) == 1 else f"{len(broken)} required checks fail"
        raise Answered("unfit", f"{many}: {', '.join(broken)}")
    if not session.screen.as_json:
        session.screen.say()
        session.screen.say("this node can do its work")


def _checks(screen: Screen, checks: Iterable[pb.Check]) -> None:
    checks = list(checks)
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        mark = ("✓", "bold green") if check.ok else ("✗", "bold red") if check.required else ("!", "bold yellow")
        optional = "" if check.ok or check.required else "  (not required)"
        screen.say(mark, f" {text.shown(check.name):<{width}}  {text.shown(check.found)}", (optional, "dim"))
        if check.hint and not check.ok:
            screen.say(" " * (width + 4), (f"mend: {text.shown(check.hint)}", "yellow"))


@command("nodes")
def nodes(session: Session) -> None:
    """Show the nodes of this cluster.

    Each node tells the others about itself through the event stream. Without one there is only this node.

    \b
    Examples:
      hibernode nodes
      hibernode nodes --json | jq -r '.nodes[].node'
    """
    answer: pb.Nodes = session.client.ask(session.client.stub.ListNodes, pb.Empty())
    if session.screen.as_json:
        session.screen.document(text.plain(answer))
        return
    columns = [
        Column("NODE", flexible=True),
        Column("ACTIONS", right=True),
        Column("LOAD", right=True),
        Column("CPUS", right=True, keep=6),
        Column("MEMORY FREE", right=True),
        Column("GPUS", flexible=True, keep=2),
        Column("GPU MEMORY USED", right=True, keep=2),
        Column("SEEN", keep=7),
        Column("VERSION", keep=5),
        Column("CRIU", keep=4),
        Column("KERNEL", keep=1),
        Column("STORE", flexible=True, keep=3),
    ]
    session.screen.table(columns, [_node_row(n) for n in answer.nodes], empty="no nodes")
    for wish in (wish for n in answer.nodes for wish in n.heartbeats if wish.problem):
        who = text.shown(f"{wish.namespace}/{wish.name}")
        session.screen.say(("!", "bold yellow"), f" pod {who} has no heartbeats: {text.shown(wish.problem)}")


def _node_row(n: pb.NodeRecord) -> list[Cell]:
    return [
        n.node,
        str(n.actions),
        f"{n.load:.1f}",
        str(n.cpus),
        text.sizes(n.memory_available, n.memory_total),
        _gpus(n.gpu_inventory),
        _gpu_memory(n.gpu_inventory.gpus),
        ago(n.time),
        n.version,
        n.criu,
        n.kernel,
        text.shown(n.store),
    ]


def _gpus(found: pb.GpuInventory) -> str:
    """`8 × NVIDIA H100`; nothing where there is none; why, where that is not known."""
    counts = Counter(gpu.name or "unknown GPU" for gpu in found.gpus)
    listed = ", ".join(f"{count} × {text.shown(name)}" for name, count in counts.items())
    if found.state in ("ok", "absent"):
        return listed
    why = text.shown(found.reason) or "the node does not say"
    return f"{listed}, {why}" if listed else f"? {why}"


def _gpu_memory(gpus: Iterable[pb.Gpu]) -> str:
    told = [(gpu.memory_used, gpu.memory_total) for gpu in gpus if gpu.HasField("memory_used") and gpu.HasField("memory_total")]
    return text.sizes(sum(used for used, _ in told), sum(total for _, total in told)) if told else ""
