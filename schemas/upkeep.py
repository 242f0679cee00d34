"""What the modes of `prep cache` that look after stores did: --compact, --stats, --explain, --gc.

One frozen dataclass per mode, as in schemas/summaries.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.planned import many, sized

SPARE_TOLD = 16  # shards that merging would spare: so many are worth a word
_BUSY = "somebody works there; left alone, run the command again later"


@dataclass(frozen=True, slots=True)
class StoreCompaction:
    """What `prep cache --compact` did to what one encoder left in one store."""

    kind: str  # latents or text
    folder: str
    rows: int
    shards: int  # before
    shards_after: int
    size_bytes: int  # before
    size_bytes_after: int
    written: int  # shards
    busy: bool  # somebody works there: nothing was done


@dataclass(frozen=True, slots=True)
class CompactSummary:
    """What `prep cache --compact` did."""

    stores: tuple[StoreCompaction, ...]
    warnings: tuple[str, ...]
    seconds: float
    dry_run: bool
    command: str = "prep cache --compact"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        for store in self.stores:
            rows = many(store.rows, "row")
            if store.busy:
                yield f"{store.kind}: {_BUSY}: {store.folder}"
            elif not store.written and store.shards == store.shards_after:
                yield f"{store.kind}: {rows} in {many(store.shards, 'shard')}, compact: {store.folder}"
            else:
                would = "would become" if self.dry_run else "became"
                sizes = "" if self.dry_run else f", {sized(store.size_bytes)} → {sized(store.size_bytes_after)}"
                yield (
                    f"{store.kind}: {rows}, {many(store.shards, 'shard')} {would} {store.shards_after}{sizes}: "
                    f"{store.folder}"
                )
        if not self.stores:
            yield "nothing is cached yet"


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What one encoder left in one store."""

    kind: str  # latents or text
    folder: str  # of the store, above the encoder's
    encoder: str
    description: Mapping[str, Any] | None  # what the encoder's key is the hash of; null if nobody noted it
    current: bool | None  # this project uses that encoder; null if its encoders are unknown
    rows: int
    size_bytes: int
    buckets: Mapping[str, int]  # folder of its shards, "WxH" of latents -> rows
    shards: int
    small: int  # shards that are less than half full, and not alone in their bucket
    spare: int  # shards that --compact would spare
    rejects: int
    needed: int | None  # rows that this project needs; null if that is not known
    leases: int  # units that somebody works on

    @property
    def mean_shard(self) -> int:
        """Return the mean size of a shard in bytes."""
        return self.size_bytes // max(1, self.shards)


@dataclass(frozen=True, slots=True)
class StatsSummary:
    """What `prep cache --stats` found."""

    stores: tuple[StoreStats, ...]
    unknown: str | None  # why it is not known which rows are needed
    compact: str | None  # the command that merges many small shards, if there are
    warnings: tuple[str, ...]
    seconds: float
    command: str = "prep cache --stats"

    def lines(self) -> Iterator[str]:
        """Yield a table of what is where, and what encoders are."""
        if not self.stores:
            yield "nothing is cached yet"
            return
        for kind, folder in dict.fromkeys((one.kind, one.folder) for one in self.stores):
            own = [one for one in self.stores if (one.kind, one.folder) == (kind, folder)]
            yield f"{kind}: {folder}"
            yield from _table([_HEAD, *map(_cells, own)])
        yield ""
        for one in dict((one.encoder, one) for one in self.stores).values():
            use = {True: ", this project's", False: ", not this project's now", None: ""}[one.current]
            yield f"{one.encoder}  {described(one.description)}{use}"
        yield from _buckets(self.stores)
        if self.unknown is not None:
            yield f"what is needed is not known: {self.unknown}"
        if self.compact is not None:
            yield f"many small shards; run: {self.compact}"


_HEAD = ("encoder", "rows", "needed", "size", "buckets", "shards", "mean", "small", "rejects", "leases")


def _cells(one: StoreStats) -> tuple[str, ...]:
    needed = "?" if one.needed is None else f"{one.needed:,}"
    counts = (f"{len(one.buckets):,}", f"{one.shards:,}", sized(one.mean_shard), f"{one.small:,}")
    return one.encoder, f"{one.rows:,}", needed, sized(one.size_bytes), *counts, f"{one.rejects:,}", str(one.leases)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows with their columns under each other, the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(one.rjust(width) for one, width in zip(others, widths[1:], strict=True))]
        yield "  " + "  ".join(cells).rstrip()


def _buckets(stores: Sequence[StoreStats]) -> Iterator[str]:
    """Yield how many rows the buckets of latents have, of all stores together, the fullest first."""
    rows: dict[str, int] = {}
    for one in stores:
        for bucket, count in one.buckets.items() if one.kind == "latents" else ():
            rows[bucket] = rows.get(bucket, 0) + count
    if rows:
        most = sorted(rows.items(), key=lambda one: (-one[1], one[0]))
        more = f", {len(most) - _BUCKETS_TOLD} more" if len(most) > _BUCKETS_TOLD else ""
        yield "rows by bucket: " + ", ".join(f"{name} {count:,}" for name, count in most[:_BUCKETS_TOLD]) + more


_BUCKETS_TOLD = 12
_LONGEST = 60  # signs of a value that are told


def described(description: Mapping[str, Any] | None) -> str:
    """Spell what an encoder is, in one line."""
    if description is None:
        return "(nothing says what this encoder is)"
    rest = {name: value for name, value in description.items() if name != "encoder"}
    return f"{description.get('encoder', '?')} encoder: " + ", ".join(f"{k} {short(v)}" for k, v in rest.items())


def short(value: object) -> str:
    """Spell a value of a key in one line, hashes by their first digits, long texts by their beginning."""
    text = " ".join(str(value).split())
    kept = 12 if len(text) == 32 and set(text) <= set("0123456789abcdef") else _LONGEST
    return f"{text[:kept]}…" if len(text) > kept else text


@dataclass(frozen=True, slots=True)
class Change:
    """One component of a key that is not what it was when the sample was last cached."""

    component: str
    old: Any
    new: Any

    def line(self) -> str:
        """Spell it."""
        return f"{self.component}: {short(self.old)} → {short(self.new)}"


@dataclass(frozen=True, slots=True)
class PartState:
    """One row that a sample needs: its target's, a reference's, or a prompt's."""

    part: str  # target, reference 1, prompt 1, ...
    name: str  # path of the picture, or the prompt
    key: str
    state: str  # cached, missing, rejected
    reason: str | None  # of a reject
    changes: tuple[Change, ...]  # since it was last cached; empty if it is as it was

    @property
    def cached(self) -> bool:
        """Tell whether it is there."""
        return self.state == "cached"


@dataclass(frozen=True, slots=True)
class ExplainSummary:
    """What `prep cache --explain` found."""

    sample_id: str
    dataset_id: str
    target: str
    noted: bool  # there is a last version to compare with
    parts: tuple[PartState, ...]
    gone: tuple[str, ...]  # parts of the last version that it has no more
    next_command: str | None
    warnings: tuple[str, ...]
    seconds: float
    command: str = "prep cache --explain"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        yield f"sample {self.sample_id}: {self.target} of {self.dataset_id}"
        width = max(len(part.part) for part in self.parts)
        for part in self.parts:
            why = f" ({part.reason})" if part.reason else ""
            yield f"  {part.part:{width}}  {part.state:8}  {part.key}  {part.name}{why}"
            yield from (f"  {'':{width}}  changed   {change.line()}" for change in part.changes)
        for name in self.gone:
            yield f"  no more: {name}"
        if not self.noted:
            yield "it was not cached before, there is nothing to compare it with"
        elif not self.gone and not any(part.changes for part in self.parts):
            yield "nothing changed since it was last cached"
        if self.next_command is not None:
            yield f"next: {self.next_command}"


@dataclass(frozen=True, slots=True)
class StoreGc:
    """What `prep cache --gc` found in what one encoder left in one store."""

    kind: str  # latents or text
    folder: str
    rows: int  # that nothing reaches
    bytes: int  # of them, as payload
    rejects: int  # that nothing reaches
    shards_removed: int  # that hold no other rows
    shards_rewritten: int  # that hold others too
    rows_kept: int
    bytes_kept: int


@dataclass(frozen=True, slots=True)
class GcSummary:
    """What `prep cache --gc` did."""

    stores: tuple[StoreGc, ...]
    projects: tuple[str, ...]  # whose pair tables were read
    unnamed: tuple[str, ...]  # other projects that use these stores
    deleted: bool
    warnings: tuple[str, ...]
    seconds: float
    command: str = "prep cache --gc"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        for store in self.stores:
            done = "removed" if self.deleted else "would go"
            rejects = f", {many(store.rejects, 'reject')}" if store.rejects else ""
            yield f"{store.kind}: {store.folder}"
            yield (
                f"  {many(store.rows, 'row')}, {sized(store.bytes)}{rejects} {done}; "
                f"{many(store.rows_kept, 'row')}, {sized(store.bytes_kept)} {'stayed' if self.deleted else 'stay'}"
            )
        for name in self.unnamed:
            yield f"used by {name} too, which was not named: name it with --also"
        rows, size = sum(store.rows for store in self.stores), sum(store.bytes for store in self.stores)
        if not self.stores:
            yield "nothing is cached yet"
        elif not rows and not any(store.rejects for store in self.stores):
            yield "all rows are reached"
        elif not self.deleted:
            yield f"{many(rows, 'row')}, {sized(size)} in all; --delete removes them"
