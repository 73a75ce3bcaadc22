"""Which earlier checkpoint a new one may refer to, so that pages which that has are not stored again. Decided, and read, before anybody is
frozen.

A base is a checkpoint that stores pages of the new one. They are flat: where the predecessor has pages of a third one, the new one refers
to the third, so that a restore reads each frame from where it lies. While a checkpoint refers to another, that one has a mark of it
(`gc.referring`) and is not removed. There are `increments.bases` of them at most; a checkpoint that would need one more is a full one,
the first of a new chain.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from hibernode import catalog, gc
from hibernode.errors import Busy, Corrupt, KeyService, NotFound, Refused
from hibernode.journal import BOOT
from hibernode.model import BaseRef, CheckpointCommand, ImageRef, Manifest, Meter, Status, WorkloadFacts
from hibernode.node import Node
from hibernode.ports import ProcessFacts, Store, Workload
from hibernode.preflight import Options
from hibernode.transfer.fingerprint import new_seed
from hibernode.transfer.known import Known, fold
from hibernode.transfer.receive import Receiver
from hibernode.transfer.seal import Seal

_LOOKS = 4  # earlier checkpoints of the workload that are looked at, until one can be referred to
_log = logging.getLogger("hibernode.increment")


@dataclass(frozen=True)
class Origin:
    """What a new checkpoint is made from. `known`: by image, as `Capture` takes it; empty: it is none that can be referred to. `seal`: the
    new one's, which opens its bases as well."""

    seal: Seal
    known: Mapping[str, Known] = field(default_factory=dict)
    references: gc.References = field(default_factory=gc.References)


@contextmanager
def origin(node: Node, store: Store, command: CheckpointCommand, workload: Workload, options: Options) -> Iterator[Origin]:
    """What it is for this command; inside, its bases stay. Refused("increment_unknown" | "increment_other_workload" | "increment_digests" |
    "increment_bases" | "increment_encryption"), or what `catalog.read` and the keyring say, where a checkpoint was named; where any will
    do, one that cannot be had makes a full one. KeyService where nobody could decrypt what is to be written."""
    seal = catalog.new_seal(node.keyring, command.checkpoint_id)
    wanted = options.increment or ("auto" if command.reason == "heartbeat" else "none")
    if command.kind == "rootfsonly" and wanted not in ("none", "auto"):
        raise Refused(
            "kind", "rootfsonly has no memory, and so no pages that another checkpoint could have", prop="criu_opts.increment",
            found=wanted, wanted="none", hint="leave it out",
        )  # fmt: skip
    if wanted == "none" or command.kind == "rootfsonly" or (wanted == "auto" and not node.config.increments.bases):
        yield Origin(seal)
        return
    with ExitStack() as stack:
        found = None
        for candidate in _latest(node, command, workload) if wanted == "auto" else [wanted]:
            try:
                with ExitStack() as attempt:
                    found = _from(candidate, node, store, seal, command, workload, attempt)
                    stack.push(attempt.pop_all())
                break
            except (Refused, NotFound, Corrupt, Busy, KeyService) as e:  # an old key may be gone: the new one was tried above
                if wanted != "auto":
                    raise
                level = logging.WARNING if isinstance(e, Corrupt) else logging.INFO
                _log.log(level, "checkpoint %s is no increment of %s: %s", command.checkpoint_id, candidate, e)
                if e.code == "increment_bases" or candidate in node.suspected:  # an older one would do, again and again
                    break
        yield found or Origin(seal, {name: Known(new_seed()) for name in workload.roots()})


def _latest(node: Node, command: CheckpointCommand, workload: Workload) -> list[str]:
    """The last checkpoints that this node has made of just these processes, or has restored them from; the newest first. Other nodes know
    of none: what they have made of it before, it is not any more."""
    alive = {(process.pid, process.start_time) for process in workload.processes()}
    found: list[str] = []
    for entry in reversed(node.journal.all()):
        record = entry.record
        there = gc.command_of(record)
        if (
            record.status == Status.READY
            and record.boot == BOOT
            and there
            and there.overrides.directory == command.overrides.directory
        ):
            known = {(tree.pid, tree.start_time) for tree in record.trees}
            if known & alive and record.checkpoint_id not in found:
                found.append(record.checkpoint_id)
        if len(found) == _LOOKS:
            break
    return found


def _from(
    checkpoint_id: str,
    node: Node,
    store: Store,
    seal: Seal,
    command: CheckpointCommand,
    workload: Workload,
    attempt: ExitStack,
) -> Origin:
    """`attempt` keeps the marks of the bases."""
    try:
        before = catalog.read(store, checkpoint_id, node.notary)
    except NotFound as e:
        raise Refused(
            "increment_unknown", e.message, prop="criu_opts.increment", found=checkpoint_id, wanted=f"a checkpoint in {store.location}",
            hint="`hibernode list` shows those that are",
        ) from e  # fmt: skip
    _check(before, node.config.increments.bases, seal, workload.facts, workload.processes())
    owners = {base.checkpoint_id for base in before.bases} | {checkpoint_id}
    if found := sorted(owners & node.suspected):  # in bytes of streams, which are not read here
        raise Corrupt(
            f"damage was found in {', '.join(found)}, or in what shares a base with it", hint="say auto: that makes a full one"
        )
    references = attempt.enter_context(gc.referring(store, node.notary, owners, command.checkpoint_id))
    catalog.check_sizes(
        store, before
    )  # as the commit will ask: found out only there, a stream that is gone would cost a freeze each time
    opened = catalog.seal_of(before, node.keyring)
    images = {image.name: image for image in before.images}
    meter = Meter()  # of what is read before the freeze nobody is told
    known = {name: _known(store, opened, images.get(name), before, meter) for name in workload.roots()}
    bases = {**opened.bases, **({checkpoint_id: replace(opened, bases={})} if opened.wrapped else {})}
    return Origin(replace(seal, bases=bases), known, references)


def _check(before: Manifest, most: int, seal: Seal, facts: WorkloadFacts, processes: Sequence[ProcessFacts]) -> None:
    """Refused where the new one may not refer to it."""
    old, bases = before.workload, len({base.checkpoint_id for base in before.bases})
    other = (old.kind, old.namespace, old.name) != (facts.kind, facts.namespace, facts.name)
    if old.kind == "process" and before.images:  # of these any number may have one name
        other |= before.images[0].tasks[0].pid not in {process.inside for process in processes}
    digests = bool(before.images) and all(image.digests for image in before.images)
    for code, wrong, what, found, wanted, hint in (
        (
            "increment_other_workload", other, "is of another workload", f"{old.kind} {old.namespace}/{old.name}",
            f"{facts.kind} {facts.namespace}/{facts.name}", "name one of its own, or say auto",
        ),
        (
            "increment_digests", not digests, "was not made so that others can refer to it", "no digests of its pages",
            "digests of its pages", "say auto: where there is none, that makes one",
        ),
        (
            "increment_encryption", (before.encryption is None) != (seal.wrapped is None),
            "is not encrypted as this node encrypts", "encrypted" if before.encryption else "not encrypted",
            "encrypted" if seal.wrapped else "not encrypted", "say auto: that makes a full one",
        ),
        (
            "increment_bases", bases >= most, f"has pages of {bases} others already", bases + 1, f"at most {most}",
            "say auto: that makes a full one, with which a new chain begins",
        ),
    ):  # fmt: skip
        if wrong:
            raise Refused(
                code, f"checkpoint {before.checkpoint_id} {what}", prop="criu_opts.increment", found=found, wanted=wanted, hint=hint
            )  # fmt: skip


def _known(store: Store, seal: Seal, image: ImageRef | None, before: Manifest, meter: Meter) -> Known:
    """What that image has. Corrupt where its digests are not those of one chain."""
    if image is None:  # of a container that was not there
        return Known(new_seed())
    receiver = Receiver(store, seal, image, 1, meter)
    index = receiver.fetch_index()
    own, seed = receiver.fetch_digests()
    digests = own.copy()  # what was read cannot be written to
    del own
    for number, source in enumerate(receiver.sources[1:]):
        of_base, same = receiver.digests_of(source)
        if same != seed:
            raise Corrupt(f"the digests of {source.seal.checkpoint_id} are of another chain than those of {before.checkpoint_id}")
        fold(digests, index.references, number, of_base)
        del of_base  # before the next is read: each has as many as it has pages
    whole = BaseRef(
        **{name: getattr(image, name) for name in BaseRef.model_fields if name in type(image).model_fields},
        checkpoint_id=before.checkpoint_id, encryption=before.encryption,
    )  # fmt: skip
    return Known(seed, digests, index.references, (*image.bases, whole))
