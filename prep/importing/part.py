"""One store on its way through an import: counts, reasons, and what its sample showed."""

from collections import Counter
from dataclasses import dataclass, field

from prep.importing.trial import Judgement
from schemas.imported import ImportedStore, Verification
from schemas.stores import Store

UNEQUAL = "sample not equal"


@dataclass(slots=True)
class Part:
    """The latents of one dataset, or the text embeds, on their way."""

    name: str
    folder: Store
    needed: int = 0
    present: int = 0
    found: int = 0
    imported: int = 0
    written: int = 0
    reasons: dict[str, str] = field(default_factory=dict)  # of what is refused, by name
    verification: Verification | None = None

    def summary(self) -> ImportedStore:
        kinds = Counter(reason.partition(":")[0] for reason in self.reasons.values())
        return ImportedStore(
            name=self.name,
            folder=self.folder.where(),
            needed=self.needed,
            present=self.present,
            found=self.found,
            imported=self.imported,
            refused=dict(kinds.most_common()),
            reasons=self.reasons,
            verification=self.verification,
            bytes_written=self.written,
        )


@dataclass(slots=True)
class Checked:
    """The running result of a verification."""

    tolerance: float
    count: int = 0
    worst: float = 0.0
    worst_name: str = ""
    faults: list[tuple[str, Judgement]] = field(default_factory=list)

    def add(self, name: str, judgement: Judgement, accepted: frozenset[str]) -> None:
        self.count += 1
        if judgement.error >= self.worst:
            self.worst, self.worst_name = judgement.error, name
        if judgement.kind not in accepted:
            self.faults.append((name, judgement))

    def result(self) -> Verification | None:
        if not self.count:
            return None
        return Verification(self.count, self.tolerance, self.worst, self.worst_name, self._fault())

    def _fault(self) -> str | None:
        if not self.faults:
            return None
        share = f"{len(self.faults)} of {self.count} differ"
        if all(judgement.kind == "draw" for _, judgement in self.faults):
            return (
                f"{share}, for they are draws from the posterior, made without a seed, and a latent here is its mode; "
                "run prep cache instead"
            )
        return (
            f"{share}; likely by other weights or another precision of the encoder, another resize or decoder, or "
            "images that have changed"
        )
