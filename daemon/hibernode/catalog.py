"""Checkpoints in a store, as a whole: commit, read, list, verify, delete. The manifest is the checkpoint; nothing else says that it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from hibernode.errors import Corrupt, KeyService, NoAnswer, NotFound, OutcomeUnknown, Refused, Stuck
from hibernode.flow import Threads
from hibernode.model import (
    BaseRef,
    Cancel,
    CheckpointCommand,
    GpuImage,
    ImageRef,
    LayerRef,
    Manifest,
    Meter,
    Verdict,
)
from hibernode.node import Node, insist
from hibernode.ports import Keyring, Notary, Store, Workload
from hibernode.preflight import Options
from hibernode.transfer import format
from hibernode.transfer.receive import LayerReceiver, Receiver
from hibernode.transfer.seal import Seal, new_key

_MANIFEST = "manifest.json"


def manifest_key(checkpoint_id: str) -> str:
    return f"{checkpoint_id}/{_MANIFEST}"


def insist_new(store: Store, checkpoint_id: str) -> None:
    """Nothing is overwritten: a checkpoint id under which there is anything already is refused, before anybody is frozen for it."""
    there = [facts.key for facts in store.list(f"{checkpoint_id}/")]
    if not there:
        return
    whole = manifest_key(checkpoint_id) in there
    raise Refused(
        "exists",
        f"checkpoint {checkpoint_id} exists already" if whole else f"parts of a checkpoint {checkpoint_id} are in the store",
        prop="checkpoint_id",
        found=checkpoint_id,
        wanted="a new id",
        hint="leave it out for a new one" + (", or delete that checkpoint" if whole else ""),
    )


def new_seal(keyring: Keyring, checkpoint_id: str) -> Seal:
    """With a data key of its own, if this node encrypts. It is unwrapped once, before anybody is frozen: what nobody could decrypt must
    not be written. KeyService if that gives another key."""
    data_key = new_key()
    wrapped = keyring.wrap(data_key, checkpoint_id)
    if wrapped is None:
        return Seal(checkpoint_id)
    if keyring.unwrap(wrapped, checkpoint_id) != data_key:
        raise KeyService(
            "what was wrapped comes back as another key", hint="look at what the program of `encryption.command` does"
        )
    return Seal(checkpoint_id, data_key, wrapped)


def seal_of(manifest: Manifest, keyring: Keyring) -> Seal:
    """What its objects are opened with, and those of its bases. Raises as `Keyring.unwrap` does."""
    wrapped = manifest.encryption
    data_key = keyring.unwrap(wrapped, manifest.checkpoint_id) if wrapped is not None else None
    return Seal(manifest.checkpoint_id, data_key, wrapped, seals_of(manifest.bases, keyring))


def seals_of(bases: Iterable[BaseRef], keyring: Keyring) -> Mapping[str, Seal]:
    """By checkpoint id, of those that are encrypted; each is asked for once."""
    seals: dict[str, Seal] = {}
    for base in bases:
        key, owner = base.encryption, base.checkpoint_id
        if key is not None and owner not in seals:
            seals[owner] = Seal(owner, keyring.unwrap(key, owner), key)
    return seals


def describe(
    node: Node,
    command: CheckpointCommand,
    workload: Workload,
    options: Options,
    meter: Meter,
    images: list[ImageRef],
    layers: list[LayerRef],
    seal: Seal,
    gpu: GpuImage | None,
) -> Manifest:
    """The manifest of what was captured."""
    return Manifest(
        format_version=format.version_of((*images, *layers)),
        checkpoint_id=command.checkpoint_id,
        action_id=command.action_id,
        created_at=time.time(),
        node=node.config.node,
        kind=command.kind,
        reason=command.reason,
        workload=workload.facts,
        host=node.host.facts().model_copy(update={"criu_version": node.criu.facts().version}),
        compression=options.compression,
        criu_opts=options.criu_opts,
        pause_ns=meter.pause_ns,
        raw_bytes=meter.raw_bytes,
        zero_bytes=meter.zero_bytes,
        stored_bytes=meter.stored_bytes,
        images=images,
        layers=layers,
        encryption=seal.wrapped,
        gpu=gpu,
    )


def commit(store: Store, manifest: Manifest, notary: Notary, cancel: Cancel) -> None:
    """Make it a checkpoint: every object is there with its size, then the manifest, read back and compared; then no cancel counts any
    more. Raises with no manifest left behind; OutcomeUnknown if it cannot be removed, or may come yet, of a request without an answer: then
    nothing that it names may be removed."""
    check_sizes(store, manifest)
    data = format.encode_manifest(manifest, notary)
    format.decode_manifest(data, manifest.checkpoint_id, notary)  # what we could not read we do not write
    key = manifest_key(manifest.checkpoint_id)
    cancel.check()
    try:
        store.put(key, data)
        if store.get(key, limit=format.MAX_MANIFEST) != data:
            raise Corrupt("the manifest came back from the store different from what was written")
        cancel.close()
    except Refused:  # there is one, and it is not ours
        raise
    except BaseException as e:  # of the put, too: a store may have written what it says it could not
        _withdraw(store, manifest, notary, e)
        if isinstance(e, NoAnswer):
            raise _unknown(e, key) from e
        raise


def _withdraw(store: Store, manifest: Manifest, notary: Notary, cause: BaseException) -> None:
    """Remove it, unless it is somebody else's, who has written it meanwhile."""
    key = manifest_key(manifest.checkpoint_id)

    def remove() -> None:
        if _may_be_of(store, manifest, notary):
            store.delete(key)

    try:
        insist("removing the manifest", remove)
    except Stuck as e:
        raise _unknown(cause, key) from e


def _unknown(cause: BaseException, key: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"{cause}; and whether the manifest was written is not known",
        hint="`hibernode verify` says whether the checkpoint is whole, `hibernode delete` removes it, `hibernode gc` what is none",
        key=key,
    )


def _may_be_of(store: Store, manifest: Manifest, notary: Notary) -> bool:
    """Whether the manifest that is there may be this one. One that is whole and refused is not: we would not have written it."""
    try:
        return read(store, manifest.checkpoint_id, notary).action_id == manifest.action_id
    except Refused:
        return False
    except (NotFound, Corrupt):
        return True


def check_sizes(store: Store, manifest: Manifest) -> None:
    """Every object that the manifest names, of its bases, too, is there with the size it names, or Corrupt."""

    def size_of(key: str) -> int | None:
        try:
            return store.stat(key).size
        except NotFound:
            return None

    insist_sizes(manifest, size_of)


def insist_sizes(manifest: Manifest, size_of: Callable[[str], int | None]) -> None:
    """The same, where somebody else says how large the object of a key is; None: it is not there."""
    owner = manifest.checkpoint_id
    named = {f"{owner}/{ref.key}": (ref, ref.key) for part in manifest.parts for ref in part.objects}
    for base in manifest.bases:  # but for its digests, which no restore needs
        refs = [ref for ref in base.objects if ref != base.digests]
        named |= {f"{base.checkpoint_id}/{ref.key}": (ref, f"{base.checkpoint_id}/{ref.key}") for ref in refs}
    for key, (ref, name) in named.items():
        size = size_of(key)
        if size is None:
            raise Corrupt(f"{name} is not in the store", key=name)
        if size != ref.size:
            raise Corrupt(f"{name} has {size} bytes, the manifest says {ref.size}", key=name)


def read(store: Store, checkpoint_id: str, notary: Notary) -> Manifest:
    """The manifest, checked. NotFound, Corrupt, or Refused: what `notary` does not believe, or "format_version"."""
    try:
        data = store.get(manifest_key(checkpoint_id), limit=format.MAX_MANIFEST)
    except NotFound:
        raise NotFound(
            f"no checkpoint {checkpoint_id} in {store.location}",
            hint="`hibernode list` shows those that are",
            id=checkpoint_id,
        ) from None
    return format.decode_manifest(data, checkpoint_id, notary)


def manifests(store: Store, notary: Notary) -> Iterator[Manifest]:
    """All readable checkpoints, in order of their ids; one that is damaged, too new or not believed is left out."""
    for facts in store.list():
        checkpoint_id, _, rest = facts.key.partition("/")
        if rest == _MANIFEST:
            try:
                yield read(store, checkpoint_id, notary)
            except (NotFound, Corrupt, Refused):
                continue


def verify(
    store: Store,
    checkpoint_id: str,
    notary: Notary,
    keyring: Keyring,
    threads: int,
    cancel: Cancel,
    tell: Callable[[Verdict], None],
) -> Verdict:
    """Read every byte and compare it with its digest, decrypt and inflate every frame; of the bases, every frame that it needs. Raises
    Corrupt at the first that does not hold."""
    began, meter = time.monotonic(), Meter()
    manifest, frames = read(store, checkpoint_id, notary), 0
    seal = seal_of(manifest, keyring)
    check_sizes(store, manifest)
    for part in manifest.parts:
        frames += _verify_part(store, seal, part, threads, cancel, meter)
        tell(Verdict(ok=True, bytes=meter.total_io, frames=frames, seconds=time.monotonic() - began))
    return Verdict(ok=True, bytes=meter.total_io, frames=frames, seconds=time.monotonic() - began, code="ok")


def _verify_part(store: Store, seal: Seal, part: ImageRef | LayerRef, threads: int, cancel: Cancel, meter: Meter) -> int:
    receiver: Receiver | LayerReceiver
    threads = min(threads, max(2, len(part.streams)))
    if isinstance(part, LayerRef):
        receiver = LayerReceiver(store, seal, part, threads, meter)
    else:
        receiver = Receiver(store, seal, part, threads, meter)
        receiver.verify_files()
    index = receiver.fetch_index()
    if part.digests is not None:
        receiver.fetch_digests()
    with Threads(cancel) as scope:
        return receiver.verify_pages(index, scope)


def delete(store: Store, checkpoint_id: str) -> None:
    """The manifest first: what is half deleted is no checkpoint any more."""
    key = manifest_key(checkpoint_id)
    store.stat(key)
    store.delete(key)
    for facts in list(store.list(f"{checkpoint_id}/")):
        store.delete(facts.key)
