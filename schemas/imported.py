"""What `prep import` did: the object that `prep.importing.run.import_cache` returns, and how it is told to a person."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verification:
    """What re-encoding a sample of one store's candidates showed."""

    checked: int
    tolerance: float  # relative root mean square error that counts as equal
    worst: float  # of the errors measured
    worst_name: str  # whose it is
    fault: str | None  # why nothing is imported; null if all are equal


@dataclass(frozen=True, slots=True)
class ImportedStore:
    """What became of the latents of one dataset, those of resized pictures apart, or of the text embeds."""

    name: str  # id of the dataset, of resized pictures with a word more, or `text`
    folder: str
    needed: int
    present: int  # in our store before
    found: int  # in the cache, whatever became of them
    imported: int  # under --dry-run those that would be
    refused: Mapping[str, int]  # kind of reason -> pictures or prompts
    reasons: Mapping[str, str]  # picture or prompt -> why it was refused
    verification: Verification | None  # null if there was nothing to verify
    bytes_written: int

    def lines(self, dry_run: bool) -> Iterator[str]:
        """Yield the closing report."""
        done = "to import" if dry_run else "imported"
        size = "" if dry_run else f", {self.bytes_written / 2**20:.1f} MiB written to {self.folder}"
        yield (
            f"{self.name}: {self.needed} needed, {self.present} already there, {self.found} found, "
            f"{self.imported} {done}{size}"
        )
        if self.verification is not None:
            checked = self.verification
            yield (
                f"  encoded again {checked.checked}: they differ by at most {checked.worst:.2%} "
                f"({checked.worst_name}); {checked.tolerance:.2%} counts as equal"
            )
            if checked.fault is not None:
                yield f"  nothing of it is imported: {checked.fault}"
        for kind, count in self.refused.items():
            name, reason = next(one for one in self.reasons.items() if one[1].partition(":")[0] == kind)
            yield f"  refused {count}: {kind}"
            if reason != kind:
                yield f"    {name!r}: {reason}"


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """What `prep import` did."""

    format: str
    cache: str
    files: int  # of the format, in the cache
    unclaimed: tuple[str, ...]  # of them, files that no picture and no prompt of the project asks for
    stores: tuple[ImportedStore, ...]
    warnings: tuple[str, ...]
    seconds: float
    dry_run: bool
    command: str = "prep import"

    @property
    def failed(self) -> bool:
        """Tell that a sample was not equal."""
        return any(store.verification is not None and store.verification.fault is not None for store in self.stores)

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        yield f"{self.cache}: {self.files} files of {self.format}"
        for store in self.stores:
            yield from store.lines(self.dry_run)
        if self.unclaimed:
            yield f"files that no picture or prompt asks for: {len(self.unclaimed)}, such as {self.unclaimed[0]}"
