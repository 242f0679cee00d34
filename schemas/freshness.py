"""Whether a table still fits the project it is read for; if not, which command makes it anew.

Stages read each other's tables through here and nowhere else.
"""

from collections.abc import Sequence

import pyarrow as pa

from schemas.console import log
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.keys import digest
from schemas.project import Project
from schemas.rows import ImageRow, PairRow, from_columns
from schemas.tables import Provenance, read_columns, read_provenance


def manifest_provenance(project: Project, dataset: DatasetConfig) -> Provenance:
    """Return what made a dataset's manifest; raises UserError if it is missing or made with other settings."""
    path = project.manifest(dataset.id)
    provenance = read_provenance(path, ImageRow)
    if provenance is None:
        state = "cannot be read" if path.exists() else "is missing"
        raise UserError(f"{dataset.id}: not scanned yet ({path} {state}); run: {project.command('prep scan')}")
    if provenance.config != project.scan_settings(dataset):
        raise UserError(f"{dataset.id}: its settings changed since it was scanned; run: {project.command('prep scan')}")
    return provenance


def read_manifest(project: Project, dataset: DatasetConfig, columns: Sequence[str]) -> pa.Table:
    """Read columns of a dataset's manifest; raises UserError if it is missing, stale or damaged."""
    provenance = manifest_provenance(project, dataset)
    if not provenance.hashed:
        raise UserError(f"{dataset.id}: scanned with --no-hash, for a look; run: {project.command('prep scan')}")
    limit = provenance.limit
    if limit is not None:
        log.warning("%s: its manifest has the first %d files only (prep scan --limit)", dataset.id, limit)
    return read_columns(project.manifest(dataset.id), ImageRow, columns)


def pairs_provenance(project: Project, target: DatasetConfig) -> Provenance:
    """Say what a pair table made now would be made from."""
    manifests = [manifest_provenance(project, dataset) for dataset in (target, *project.references_of(target))]
    return Provenance(project.pairs_settings(target), digest([one.inputs for one in manifests]))


def check_pairs(project: Project, target: DatasetConfig) -> Provenance:
    """Return what made a set's pair table; raises UserError if it is missing, stale or damaged.

    Manifests are compared only where they lie in the workspace: a machine that trains does not need them.
    """
    path = project.pair_table(target.id)
    provenance = read_provenance(path, PairRow)
    command = f"run: {project.command('prep pairs')}"
    if provenance is None:
        state = "cannot be read" if path.exists() else "is missing"
        raise UserError(f"{target.id}: not paired yet ({path} {state}); {command}")
    if provenance.config != project.pairs_settings(target):
        raise UserError(
            f"{target.id}: the settings of its images or pairs changed since it was paired; "
            f"run: {project.command('prep scan')}, then prep pairs and prep cache"
        )
    together = (target, *project.references_of(target))
    here = all(project.manifest(dataset.id).exists() for dataset in together)
    if here and pairs_provenance(project, target).inputs != provenance.inputs:
        raise UserError(f"{target.id}: scanned anew since it was paired; {command}")
    return provenance


def read_pairs(project: Project, target: DatasetConfig) -> list[PairRow]:
    """Read the kept and rejected pairs of a target set; raises UserError as `check_pairs` does."""
    return from_columns(read_pair_columns(project, target), PairRow)


def read_pair_columns(project: Project, target: DatasetConfig, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a target set's pairs, or all; raises UserError as `check_pairs` does."""
    limit = check_pairs(project, target).limit
    if limit is not None:
        log.warning("%s: its table has the first %d targets only (prep pairs --limit)", target.id, limit)
    return read_columns(project.pair_table(target.id), PairRow, columns)
