"""`prep cache --verify`: is every row whole, and where it belongs; what is bad is taken out to be encoded again.

`verify` is the public function.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from families import Source, open_project
from families.checkpoints import here, key_of
from prep.upkeep.stores import Kept, folder_of, shards_of, stores_of
from schemas.console import progress
from schemas.errors import Unreachable, UserError
from schemas.project import Project
from schemas.shards import ShardHeader, faults_of, headers_of, rewrite
from schemas.stores import Store
from schemas.summaries import DecodedRow, StoreCheck, VerifySummary

_DECODED = 4  # latents, unless another number is asked for
_ROWS = {"latents": "LatentRow", "text": "TextRow"}


def verify(project: Source, *, repair: bool = False, decode: int | None = None) -> VerifySummary:
    """Read every row of a project's stores, of all encoders, and hold it against its checksum, shape and finiteness.

    `decode` latents are decoded and compared with the pixels they were made from; by default a few if the checkpoint is
    on this machine. `repair` takes bad rows, and files that cannot be read, out of the stores: the next prep cache
    encodes them again.
    """
    start = time.monotonic()
    project = open_project(project)
    checks = tuple(_check(kept, project.family.latent_scale, repair=repair) for kept in stores_of(project))
    decoded, undecoded = _decoded(project, decode)
    return VerifySummary(checks, decoded, undecoded, None, project.warnings, time.monotonic() - start)


def _decoded(project: Project, asked: int | None) -> tuple[tuple[DecodedRow, ...], str | None]:
    """Decode a few latents; without a word if nobody asked for it and the encoder is not here."""
    count = _DECODED if asked is None else asked
    if not count:
        return (), None
    from prep.upkeep.decode import decode  # noqa: PLC0415 - it loads a tensor library

    try:
        checkpoint = here(project, project.family.image_encoder)
        if checkpoint is None:
            return (), None if asked is None else "the image encoder is not on this machine"
        return tuple(decode(project, checkpoint, count)), None
    except UserError as fault:  # no pair table, or none that fits: a matter of its stage, not of the rows
        return (), str(fault)


def _check(kept: Kept, scale: int, *, repair: bool) -> StoreCheck:
    store = kept.store
    shards, rows = shards_of(store), 0
    told = {f"{kept.encoder}/encoder.json": fault for fault in _misnamed(kept)}
    wrong = len(told)
    with progress(f"verify {kept.kind}", len(shards), "shard") as bar:
        for name in shards:
            with store.anew(name):
                faults = _faults(kept, store, name, scale)
                rows += 0 if None in faults else sum(len(keys) for _, _, keys in headers_of(store, [name]))
                told |= {name if key is None else f"{name} {key}": fault for key, fault in faults.items()}
                if repair:
                    _take_out(store, name, list(faults))
            bar.update()
    if repair and wrong:
        store.remove("encoder.json")
    return StoreCheck(kept.kind, store.where(), len(shards), rows, sum(shards.values()), told, repair and bool(told))


def _misnamed(kept: Kept) -> Iterator[str]:
    """Yield what is wrong with what an encoder's folder says of itself."""
    if kept.store.read("encoder.json") is None:
        return
    said = kept.description()
    if said is None:
        yield "damaged"
    elif key_of(said) != kept.encoder:
        yield f"describes the encoder {key_of(said)}"


def _faults(kept: Kept, store: Store, name: str, scale: int) -> dict[str | None, str]:
    """Return what is wrong with a shard: as a whole, under None, or with rows of it."""
    try:
        said = list(headers_of(store, [name]))
    except Unreachable:  # a service that does not answer says nothing of what it keeps
        raise
    except UserError as fault:
        return {None: str(fault).partition(": ")[2]}
    for _, header, _ in said:
        if misplaced := _misplaced(kept, name, header, scale):
            return {None: misplaced}
    return faults_of(store, name)


def _misplaced(kept: Kept, name: str, header: ShardHeader, scale: int) -> str | None:
    """Say why a shard does not belong where it lies."""
    if header.row != _ROWS[kept.kind]:
        return f"misplaced: it holds {header.row}"
    if header.encoder != kept.encoder:
        return f"misplaced: it is of encoder {header.encoder}"
    if kept.kind == "text":
        return None
    height, width = header.shapes["latent"][-2:]
    bucket = f"{width * scale}x{height * scale}"
    return f"misplaced: its latents are of {bucket}" if bucket != folder_of(name) else None


def _take_out(store: Store, name: str, bad: Sequence[str | None]) -> None:
    if None in bad:
        store.remove(name)
    elif bad:
        with suppress(FileNotFoundError):  # merged with others meanwhile
            rewrite(store, [name], drop=[key for key in bad if key is not None])
