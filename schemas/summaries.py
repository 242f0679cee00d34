"""What each command did: the object its function returns, and what `--json` prints.

One frozen dataclass per command; `as_json` is the machine's view, each `lines` the person's.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class DatasetScan:
    """What a scan saw of one dataset."""

    dataset_id: str
    seen: int
    kept: int
    rejected: Mapping[str, int]  # kind of reason -> files
    read: int  # files whose content was read; the others were unchanged since the last scan
    removed: int  # rows of the last scan whose file is gone
    buckets: Mapping[str, int]  # "WxH" -> kept images
    captions: int
    ignored_files: int  # neither images nor captions
    manifest: str
    written: bool  # false: nothing changed


@dataclass(frozen=True, slots=True)
class ScanSummary:
    """What `prep scan` did."""

    datasets: tuple[DatasetScan, ...]
    warnings: tuple[str, ...]
    seconds: float
    dry_run: bool
    command: str = "prep scan"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        for scan in self.datasets:
            yield (
                f"{scan.dataset_id}: {scan.seen} images, {scan.kept} kept, {scan.captions} captions, "
                f"{len(scan.buckets)} buckets; {scan.read} read, {scan.seen - scan.read} unchanged"
                + (f", {scan.removed} gone" if scan.removed else "")
            )
            for reason, count in scan.rejected.items():
                yield f"  rejected {count}: {reason}"
            yield f"  {_state(scan.written, self.dry_run)} {scan.manifest}"


@dataclass(frozen=True, slots=True)
class DatasetPairs:
    """What pairing made of one set of targets."""

    dataset_id: str
    targets: int
    pairs: int  # kept samples
    rejected: Mapping[str, int]  # kind of reason -> targets
    unused_references: int  # files of the reference sets that no target asks for
    generated: int  # reference pictures made by this run
    reused: int  # reference pictures that existed
    table: str
    written: bool


@dataclass(frozen=True, slots=True)
class PairsSummary:
    """What `prep pairs` did."""

    datasets: tuple[DatasetPairs, ...]
    previews: tuple[str, ...]  # contact sheets
    warnings: tuple[str, ...]
    seconds: float
    dry_run: bool
    command: str = "prep pairs"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        for entry in self.datasets:
            yield f"{entry.dataset_id}: {entry.targets} targets, {entry.pairs} pairs" + (
                f"; references made {entry.generated}, reused {entry.reused}" if entry.generated + entry.reused else ""
            )
            for reason, count in entry.rejected.items():
                yield f"  rejected {count}: {reason}"
            if entry.unused_references:
                yield f"  {entry.unused_references} reference files belong to no target"
            yield f"  {_state(entry.written, self.dry_run)} {entry.table}"
        for path in self.previews:
            yield f"contact sheet {path}"


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What `prep cache` did to one store: latents or text."""

    kind: str
    folder: str
    needed: int
    reused: int
    encoded: int
    rejected: Mapping[str, str]  # path -> reason
    truncated: int  # prompts longer than the encoder takes, of those encoded now
    bytes_written: int


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """What `prep cache` did."""

    stores: tuple[StoreSummary, ...]
    warnings: tuple[str, ...]
    seconds: float
    dry_run: bool
    command: str = "prep cache"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        for store in self.stores:
            known = f"{store.kind}: {store.needed} needed, {store.reused} reused"
            if self.dry_run:
                yield f"{known}, {store.needed - store.reused - len(store.rejected)} to encode into {store.folder}"
            else:
                size = f"{store.bytes_written / 2**20:.1f} MiB"
                yield f"{known}, {store.encoded} encoded, {size} written to {store.folder}"
            for name, reason in store.rejected.items():
                yield f"  rejected {name}: {reason}"
            if store.rejected:
                yield f"  they are not tried again; delete {store.folder}/rejects to have them tried"
            if store.truncated:
                yield f"  {store.truncated} prompts are longer than the encoder takes: what is beyond was cut off"


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What `train run` did."""

    run_folder: str
    lora: str | None  # path of the trained weights
    samples: int
    skipped: int  # samples whose image could not be encoded
    first_step: int  # steps that were done before
    last_step: int
    device: str
    dry_run: bool
    warnings: tuple[str, ...]
    stopped: bool = False  # asked to, before its last step
    first_loss: float | None = None  # mean of the first tenth of this run's steps
    loss: float | None = None  # mean of the last tenth
    trainable_parameters: int | None = None  # null if no model was loaded
    seconds_per_step: float | None = None  # median
    seconds: float = 0.0  # in all
    command: str = "train run"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        steps = self.last_step - self.first_step
        resumed = f", resumed at {self.first_step}" if self.first_step else ""
        if self.dry_run:
            yield f"would train {steps} steps{resumed} on {self.samples} samples into {self.run_folder}"
            return
        if steps == 0:
            yield f"nothing to do: {self.last_step} steps are done"
        else:
            yield (
                f"{steps} steps{resumed} on {self.samples} samples ({self.device}): {self.trainable_parameters:,} "
                f"parameters, loss {self.first_loss:.4f} to {self.loss:.4f}, {self.seconds_per_step:.2f} s/step"
            )
        if self.skipped:
            yield f"  {self.skipped} samples left out: their images could not be encoded"
        if self.stopped:
            yield f"stopped after step {self.last_step}; the same command goes on from there"
        yield f"LoRA {self.lora}"


Summary = ScanSummary | PairsSummary | CacheSummary | TrainSummary


def as_json(summary: Summary) -> str:
    """Spell a summary as one JSON document."""
    return json.dumps(asdict(summary), ensure_ascii=False, indent=2)


def _state(written: bool, dry_run: bool) -> str:
    if not written:
        return "unchanged"
    return "would write" if dry_run else "wrote"
