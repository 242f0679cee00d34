"""What each command did: the object its function returns, and what `--json` prints.

One frozen dataclass per command; `as_json` is the machine's view, each `lines` the person's.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median

from schemas.imported import ImportSummary
from schemas.planned import PlanSummary, sized
from schemas.timed import BenchSummary, TrainPlan
from schemas.upkeep import CompactSummary, ExplainSummary, GcSummary, StatsSummary

_CUT_TOLD = 5  # prompts that were cut, told one by one
_WAITED = 0.05  # share of the time of encoding, from which on it is told what was waited for


@dataclass(frozen=True, slots=True)
class DatasetScan:
    """What a scan saw of one dataset."""

    dataset_id: str
    seen: int
    kept: int
    rejected: Mapping[str, int]  # kind of reason -> images
    read: int  # images whose content was read
    unchanged: int  # since the last scan
    decoded: int  # images whose pixels were looked at
    removed: int  # rows of the last scan whose image is gone
    changed: int  # rows of the last scan that say something else now
    settings_changed: bool  # since the last scan
    buckets: Mapping[str, int]  # "WxH" -> kept images
    batch_fill: Mapping[str, float]  # "WxH" -> share of the places in its batches that an epoch fills
    upscaled: int  # kept images that are enlarged
    oddities: Mapping[str, int]  # kept images that are more than plain 8-bit RGB, by what they are
    equal_files: int  # kept images whose bytes an earlier one has
    near_duplicates: int  # images that look like an earlier one, where that is looked for
    collisions: Mapping[str, list[str]]  # aspect of a bucket -> sizes its images would have; the first holds for all
    faces: int | None  # kept images with a face to crop to; null unless faces are looked for
    variants: int  # random crops cached per image
    captions: int
    ignored_files: int  # neither images nor captions
    unreadable_folders: tuple[str, ...]
    manifest: str
    written: bool  # false: nothing changed
    looked_at: bool  # false: skip_file_discovery let the manifest stand

    @property
    def upscaled_share(self) -> float:
        """Return the share of kept images that are enlarged."""
        return self.upscaled / self.kept if self.kept else 0.0

    def lines(self, dry_run: bool) -> Iterator[str]:
        """Yield the closing report."""
        yield (
            f"{self.dataset_id}: {counted(self.seen, 'image')}, {self.kept} kept, {counted(self.captions, 'caption')}, "
            f"{counted(len(self.buckets), 'bucket')}; "
            + (f"{self.read} read, {self.unchanged} unchanged" if self.looked_at else "not looked at")
            + (f", {self.decoded} decoded" if self.decoded else "")
            + (f", {self.removed} gone" if self.removed else "")
        )
        for reason, count in self.rejected.items():
            yield f"  rejected {count}: {reason}"
        if self.settings_changed:
            yield f"  its settings changed since the last scan: {counted(self.changed, 'row')} differ for it"
        if self.upscaled:
            yield f"  enlarged {self.upscaled} ({self.upscaled_share:.0%}); max_upscale_threshold limits it"
        if self.oddities:
            yield "  " + ", ".join(f"{name}: {count}" for name, count in self.oddities.items())
        if self.faces is not None:
            yield f"  faces found in {self.faces}; the other {self.kept - self.faces} are cropped in the middle"
        yield from self._duplicates()
        for aspect, sizes in self.collisions.items():
            yield f"  bucket {aspect}: images of it would be {' or '.join(sizes)}; the first in path order decides"
        if self.variants > 1:
            yield f"  {self.variants} random crops of each image are cached and shown in turn"
        yield f"  {_state(self.written, dry_run)} {self.manifest}"

    def _duplicates(self) -> Iterator[str]:
        if self.equal_files:
            yield f"  repeating another's bytes: {counted(self.equal_files, 'file')} (see exact_duplicates)"
        if self.near_duplicates:
            yield f"  looking like another: {counted(self.near_duplicates, 'picture')}"


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
            yield from scan.lines(self.dry_run)


@dataclass(frozen=True, slots=True)
class DatasetPairs:
    """What pairing made of one set of targets."""

    dataset_id: str
    targets: int  # usable images
    pairs: int  # kept samples: targets × variants
    rejected: Mapping[str, int]  # kind of reason -> samples
    without_reference: int  # targets kept though they lack a proper reference
    unused_references: int  # files of the reference sets that no target asks for
    resized_references: int  # strict references scaled to the size of their target
    compared: int  # strict references that were held against their target by this run
    misaligned: int  # strict references that do not lie on their target
    uncertain: int  # that differ too much from their target, or show too little, to tell
    worst: tuple[str, ...]  # a few of the misaligned
    generated: int  # reference pictures made by this run
    reused: int  # reference pictures that existed
    table: str
    report: str  # CSV of all that was odd
    written: bool

    def lines(self, dry_run: bool) -> Iterator[str]:
        """Yield the closing report."""
        yield f"{self.dataset_id}: {counted(self.targets, 'target')}, {counted(self.pairs, 'pair')}" + (
            f"; references {'to make' if dry_run else 'made'} {self.generated}, reused {self.reused}"
            if self.generated + self.reused
            else ""
        )
        for reason, count in self.rejected.items():
            yield f"  rejected {count}: {reason}"
        if self.without_reference:
            yield f"  kept {counted(self.without_reference, 'target')} without the references they lack"
        if self.unused_references:
            yield f"  {counted(self.unused_references, 'reference file')} without a target"
        if self.resized_references:
            whose = "its target" if self.resized_references == 1 else "their targets"
            yield f"  {counted(self.resized_references, 'reference')} of another size, scaled to {whose}"
        if self.compared:
            whose = "its target" if self.compared == 1 else "their targets"
            yield f"  {counted(self.compared, 'reference')} {'to compare' if dry_run else 'compared'} with {whose}"
        if self.uncertain:
            yield f"  {counted(self.uncertain, 'reference')} too different to tell whether they lie on their targets"
        if self.misaligned:
            yield f"  {counted(self.misaligned, 'reference')} misaligned, the worst first:"
            yield from (f"    {one}" for one in self.worst)
        if self.unused_references or self.resized_references or self.misaligned or self.rejected:
            yield f"  all of them: {self.report}"
        yield f"  {_state(self.written, dry_run)} {self.table}"


@dataclass(frozen=True, slots=True)
class Materialised:
    """What was written of one set of targets for another trainer."""

    dataset_id: str
    layout: str
    folder: str
    pairs: int  # that are there, whole
    written: int  # files
    reused: int  # files that were there and right
    removed: int  # files of pairs that are no more
    left_out: Mapping[str, int]  # kind of reason -> pairs
    altered: int  # pairs of which that trainer would resize or crop a picture again
    instructions: str  # how to train on it

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        yield (
            f"{self.dataset_id}: {counted(self.pairs, 'pair')} for {self.layout} in {self.folder}: "
            f"{counted(self.written, 'file')} written, {self.reused} reused"
            + (f", {self.removed} removed" if self.removed else "")
        )
        for reason, count in self.left_out.items():
            yield f"  left out {count}: {reason}"
        if self.altered:
            yield f"  {self.altered} of them it would resize or crop again"
        yield f"  {self.instructions}"


@dataclass(frozen=True, slots=True)
class PairsSummary:
    """What `prep pairs` did."""

    datasets: tuple[DatasetPairs, ...]
    previews: tuple[str, ...]  # contact sheets
    materialised: tuple[Materialised, ...]
    warnings: tuple[str, ...]
    seconds: float
    dry_run: bool
    command: str = "prep pairs"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        for entry in self.datasets:
            yield from entry.lines(self.dry_run)
        for path in self.previews:
            yield f"contact sheet {path}"
        for one in self.materialised:
            yield from one.lines()


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What `prep cache` did to one store: latents or text."""

    kind: str
    folder: str
    asked: int  # places that ask for a row, in all pair tables
    needed: int  # rows: what is asked for twice is encoded once
    bytes: int  # of all rows needed, reckoned
    reused: int
    encoded: int
    rejected: Mapping[str, str]  # path -> reason
    cut: tuple[str, ...]  # prompts longer than the encoder takes, of those encoded now, with their tokens
    bytes_written: int

    def lines(self, dry_run: bool) -> Iterator[str]:
        """Yield the closing report."""
        known = f"{self.kind}: {self.needed} needed, {self.reused} reused"
        if dry_run:
            yield f"{known}, {self.needed - self.reused - len(self.rejected)} to encode into {self.folder}"
        else:
            yield f"{known}, {self.encoded} encoded, {sized(self.bytes_written)} written to {self.folder}"
        saved = (self.asked - self.needed) * (self.bytes // max(1, self.needed))
        if saved > 0:
            yield f"  {sized(self.bytes)}; asked for {self.asked} times: storing each once saves {sized(saved)}"
        for name, reason in self.rejected.items():
            yield f"  rejected {name}: {reason}"
        if self.rejected:
            yield f"  they are not tried again; delete {self.folder}/rejects to have them tried"
        if self.cut:
            yield f"  {counted(len(self.cut), 'prompt')} longer than the encoder takes, what is beyond was cut off:"
            yield from (f"    {one}" for one in self.cut[:_CUT_TOLD])


@dataclass(frozen=True, slots=True)
class AcceleratorUse:
    """How well a GPU was used while images were encoded."""

    busy: float  # share of the time between the first batch and the last, but for compiling, that it encoded
    images: int
    seconds: float  # between the first batch and the last, but for compiling
    compiling_s: float  # that compiling the encoder took
    pixels_s: float  # of those seconds, waited for decoded pictures
    disk_s: float  # waited for rows to be written

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        waits = {"pictures (more workers decode faster)": self.pixels_s, "the disk": self.disk_s}
        long = [f"{wait:.0f} s for {what}" for what, wait in waits.items() if wait > _WAITED * self.seconds]
        yield (
            f"  {self.images / self.seconds:.1f} images/s in {self.seconds:.0f} s of encoding; GPU busy {self.busy:.0%}"
            + (f"; waited {' and '.join(long)}" if long else "")
            + (f"; compiling the encoder took {self.compiling_s:.0f} s before" if self.compiling_s else "")
        )


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """What `prep cache` did."""

    stores: tuple[StoreSummary, ...]
    warnings: tuple[str, ...]
    seconds: float
    dry_run: bool
    accelerator: AcceleratorUse | None = None  # null if this process encoded no image on a GPU
    command: str = "prep cache"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        for store in self.stores:
            yield from store.lines(self.dry_run)
        if self.accelerator is not None:
            yield from self.accelerator.lines()


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
    seconds_per_step: float | None = None  # median, without the first and those that compiled, where there are others
    data_wait: float | None = None  # share of those steps' time that they waited for data
    peak_memory_gib: float | None = None  # of the accelerator
    compiled_graphs: int | None = None  # of blocks; many more than 20 say that something is compiled again and again
    seconds: float = 0.0  # in all
    seconds_to_first_step: float | None = None  # from the start until the first step had been taken
    first_eval_loss: float | None = None  # on the held-out pairs, the first of this run
    eval_loss: float | None = None  # the last
    psnr: float | None = None  # dB, mean of the held-out pairs that were sampled last, against their targets
    reference_psnr: float | None = None  # of their references
    ssim: float | None = None
    reference_ssim: float | None = None
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
                f"parameters, loss {self.first_loss:.4f} to {self.loss:.4f}, {self.seconds_per_step:.2f} s/step, "
                f"the first after {self.seconds_to_first_step:.0f} s"
            )
        if self.compiled_graphs:
            yield f"  {counted(self.compiled_graphs, 'graph')} compiled"
        if self.skipped:
            yield f"  {self.skipped} samples left out: their images could not be encoded"
        if self.stopped:
            yield f"stopped after step {self.last_step}; the same command goes on from there"
        if self.first_eval_loss is not None and self.eval_loss is not None:
            yield f"held-out pairs: loss {self.first_eval_loss:.4f} to {self.eval_loss:.4f}"
        yield from self._samples()
        yield f"trained weights: {self.lora}"

    def _samples(self) -> Iterator[str]:
        if self.psnr is None or self.ssim is None:
            return
        if self.reference_psnr is None or self.reference_ssim is None:
            yield f"samples: PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.3f}"
        else:
            yield (
                f"samples: PSNR {self.psnr:.1f} dB, references {self.reference_psnr:.1f} dB, "
                f"SSIM {self.ssim:.3f}, references {self.reference_ssim:.3f}"
            )


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """What `train sample` did."""

    path: str
    compared: str | None  # the same picture beside the one before training; null if that was not asked for
    lora: str  # file of an adapter, or folder of a checkpoint or of whole weights
    layers: int  # of the model that an adapter changes; 0 of whole weights
    scale: float
    prompt: str
    width: int
    height: int
    seed: int
    steps: int
    guidance: float | None  # that the model was told; null if it takes none
    guidance_real: float
    device: str
    warnings: tuple[str, ...]
    seconds: float
    command: str = "train sample"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        told = f", guidance {self.guidance:g}" if self.guidance is not None else ""
        real = f", true guidance {self.guidance_real:g}" if self.guidance_real > 1 else ""
        yield (
            f"{self.width}x{self.height}, {counted(self.steps, 'step')}, seed {self.seed}{told}{real}: "
            f"{self.seconds:.1f} s ({self.device})"
        )
        adapted = f": {counted(self.layers, 'layer')}, scale {self.scale:g}"
        yield f"trained {self.lora}{adapted if self.layers else ''}"
        yield f"wrote {self.path}"
        if self.compared is not None:
            yield f"beside the one before training: {self.compared}"


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """What `prep report` did."""

    path: str
    size_bytes: int
    datasets: tuple[str, ...]  # shown
    warnings: tuple[str, ...]
    seconds: float
    command: str = "prep report"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        yield f"wrote {self.path} ({self.size_bytes / 1e6:.1f} MB): {', '.join(self.datasets)}"


@dataclass(frozen=True, slots=True)
class StoreCheck:
    """What `prep cache --verify` found in one store."""

    kind: str  # latents or text
    folder: str
    shards: int
    rows: int
    size_bytes: int
    faults: Mapping[str, str]  # file, and key of the row -> what is wrong
    repaired: bool  # faulty rows were taken out, to be encoded again


@dataclass(frozen=True, slots=True)
class DecodedRow:
    """One latent that was decoded, held against the picture it was made from."""

    key: str
    picture: str
    folder: str
    psnr: float | None  # dB, 100 at most; null if it cannot be told
    fault: str | None  # why not


@dataclass(frozen=True, slots=True)
class VerifySummary:
    """What `prep cache --verify` did."""

    stores: tuple[StoreCheck, ...]
    decoded: tuple[DecodedRow, ...]
    undecoded: str | None  # why nothing was decoded, where that was asked for or usual
    encoded: CacheSummary | None  # what --repair then encoded again
    warnings: tuple[str, ...]
    seconds: float
    command: str = "prep cache --verify"

    @property
    def faults(self) -> int:
        """Count what is wrong."""
        return sum(len(store.faults) for store in self.stores)

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        for store in self.stores:
            size = f"{store.size_bytes / 2**20:,.1f} MiB"
            there = f"{counted(store.rows, 'row')} in {counted(store.shards, 'shard')}, {size}"
            yield f"{store.kind}: {there}: {store.folder}"
            done = "taken out" if store.repaired else "--repair takes it out and encodes it again"
            for place, fault in store.faults.items():
                yield f"  {place}: {fault} ({done})"
        yield from self._decoded()
        yield "every row is whole" if not self.faults else f"{counted(self.faults, 'fault')}"
        if self.encoded is not None:
            yield from self.encoded.lines()

    @property
    def psnr(self) -> tuple[float, float] | None:
        """Return the lowest and the median of what decoded latents came to, in dB."""
        known = [one.psnr for one in self.decoded if one.psnr is not None]
        return (min(known), median(known)) if known else None

    def _decoded(self) -> Iterator[str]:
        if self.undecoded is not None:
            yield f"no latent was decoded: {self.undecoded}"
        if self.psnr is not None:
            yield "decoded {}: PSNR against the pixels at least {:.1f} dB, median {:.1f} dB".format(
                counted(sum(one.psnr is not None for one in self.decoded), "latent"), *self.psnr
            )
        for one in self.decoded:
            yield f"  {f'{one.psnr:5.1f} dB' if one.psnr is not None else '   -    '}  {one.key}  {one.picture}" + (
                f": {one.fault}" if one.fault is not None else ""
            )


@dataclass(frozen=True, slots=True)
class StageState:
    """How far one product of a stage is."""

    stage: str  # scan, pairs, cache, train
    product: str  # id of a dataset, or kind of a store
    state: str  # complete, partial, stale, missing
    detail: str


@dataclass(frozen=True, slots=True)
class StatusSummary:
    """What `prep status` found."""

    states: tuple[StageState, ...]
    next_command: str | None  # that brings the project on; null if all is done
    warnings: tuple[str, ...]
    seconds: float
    command: str = "prep status"

    def lines(self) -> Iterator[str]:
        """Yield one line per product, and what to run next."""
        stage = max((len(one.stage) for one in self.states), default=0)
        product = max((len(one.product) for one in self.states), default=0)
        for one in self.states:
            yield f"{one.stage:{stage}}  {one.product:{product}}  {one.state:8}  {one.detail}"
        yield f"next: {self.next_command}" if self.next_command else "all is done"


Summary = (
    ScanSummary
    | PairsSummary
    | CacheSummary
    | TrainSummary
    | SampleSummary
    | BenchSummary
    | TrainPlan
    | ReportSummary
    | PlanSummary
    | StatusSummary
    | VerifySummary
    | ImportSummary
    | CompactSummary
    | StatsSummary
    | ExplainSummary
    | GcSummary
)


def as_json(summary: Summary) -> str:
    """Spell a summary as one JSON document."""
    return json.dumps(asdict(summary), ensure_ascii=False, indent=2)


def counted(number: int, noun: str) -> str:
    """Spell a number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _state(written: bool, dry_run: bool) -> str:
    if not written:
        return "unchanged"
    return "would write" if dry_run else "wrote"
