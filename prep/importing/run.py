"""`prep import`: what other trainers have cached, into our stores, as far as it is proven to be what a key promises.

`import_cache` is the public function. Names and a sample come first; where the sample, encoded again, is equal, all
that is proven follows.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from families import Source, open_project
from families.checkpoints import encoder_keys, here, locate, record_keys
from prep.importing.found import Cache
from prep.importing.latents import Latents
from prep.importing.musubi import Musubi
from prep.importing.sd_scripts import SdScripts
from prep.importing.simpletuner import SimpleTuner
from prep.importing.storing import needed_latents
from prep.importing.texts import Texts
from prep.needed import needed_of
from schemas.errors import UserError
from schemas.freshness import read_pairs
from schemas.imported import ImportSummary
from schemas.project import Project

# Format -> what opens a folder of it, given the word for the family in its files and the pixels of a latent's cell.
FORMATS: Mapping[str, Callable[[Path, str, int], Cache]] = {
    "simpletuner": lambda folder, family, scale: SimpleTuner(folder, family),
    "musubi": Musubi,
    "sd-scripts": SdScripts,
}


def import_cache(
    project: Source,
    folder: str | Path,
    *,
    format: str = "auto",
    dataset: str | None = None,
    sample: int = 8,
    dry_run: bool = False,
) -> ImportSummary:
    """Bring another trainer's cache into the stores of a project, as far as it is proven to be equal.

    `dataset` looks for the latents of that dataset alone; `sample` is how many of each dataset, and how many prompts,
    are encoded again. Raises UserError if a table is missing or stale, or the folder holds nothing of the format.
    """
    start = time.monotonic()
    project = open_project(project, need_images=True)
    folder = Path(folder)
    if dataset is not None and dataset not in {one.id for one in project.scanned}:
        known = ", ".join(one.id for one in project.scanned)
        raise UserError(f"--dataset {dataset}: not a dataset of this project; it has {known}")
    rows = [row for target in project.targets for row in read_pairs(project, target) if row.reject is None]
    if not rows:
        raise UserError("no pair is left to import for; prep pairs says why each was rejected")
    name, cache = _opened(project, folder, format)
    checkpoint = _checkpoint(project, dry_run)
    needed = needed_latents(project, rows, checkpoint, remember=not dry_run)
    latents = Latents(project, cache, checkpoint, needed, dataset)
    latents.run(sample, dry_run)
    texts = Texts(project, cache, checkpoint, needed_of(project).prompts)
    texts.run(sample, dry_run)
    if not dry_run:
        record_keys(project, encoder_keys(project))
    files, claimed = cache.files(), latents.claimed | texts.claimed
    return ImportSummary(
        format=name,
        cache=str(folder),
        files=len(files),
        unclaimed=tuple(sorted(str(path) for path in files if path not in claimed)),
        stores=tuple(part.summary() for part in (*latents.parts.values(), texts.part)),
        warnings=project.warnings,
        seconds=time.monotonic() - start,
        dry_run=dry_run,
    )


def _opened(project: Project, folder: Path, format: str) -> tuple[str, Cache]:
    """Open a folder in a format, or in the one that its files are named by."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    names = project.family.elsewhere
    if not names:
        raise UserError(
            f"caches of other trainers are not read for {project.trainer.model_family}; "
            f"run: {project.command('prep cache')}"
        )
    if format not in ("auto", *names):
        raise UserError(f"--format {format}: one of auto, {', '.join(names)}")
    asked = [format] if format != "auto" else list(names)
    opened = [(one, FORMATS[one](folder, names[one], project.family.latent_scale)) for one in asked]
    found = [(one, cache) for one, cache in opened if cache.files()]
    if not found:
        raise UserError(f"{folder}: no cache files of {' or '.join(asked)} for {project.trainer.model_family} in it")
    if len(found) > 1:
        raise UserError(f"{folder}: holds caches of {' and '.join(one for one, _ in found)}; say which with --format")
    return found[0]


def _checkpoint(project: Project, dry_run: bool) -> Path:
    """Return the checkpoint that comparisons need; a dry run fetches and builds none."""
    components = (*project.family.image_encoder, *project.family.text_encoders)
    folder = here(project, components) if dry_run else locate(project, components)
    if folder is None:
        raise UserError(f"checkpoint {project.checkpoint} is not on this machine, and a dry run does not fetch it")
    return folder
