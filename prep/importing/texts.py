"""The text embeds of an import: found by their prompts, a sample encoded again, the rest taken over."""

from collections.abc import Sequence
from pathlib import Path

import torch

from prep.importing.found import ABSENT, Cache, FoundText
from prep.importing.part import UNEQUAL, Checked, Part
from prep.importing.storing import LATENTS, text_store
from prep.importing.trial import TEXT_TOLERANCE, TextTrial
from prep.planning.budget import sizes_of
from schemas.imported import Verification
from schemas.keys import seed_of
from schemas.project import Project
from schemas.shards import SHARD_BYTES


class Texts:
    """The text embeds of a project."""

    def __init__(self, project: Project, cache: Cache, checkpoint: Path, prompts: Sequence[str]) -> None:
        self._project, self._cache, self._checkpoint = project, cache, checkpoint
        self._store = text_store(project, checkpoint, remember=False)
        self._sizes = sizes_of(project)
        self.part = Part("text", self._store.folder)
        self.claimed: set[Path] = set()
        self._candidates: list[str] = []
        missing = set(self._store.missing(prompts))
        self.part.needed, self.part.present = len(prompts), len(prompts) - len(missing)
        for prompt in prompts:
            found = self._cache.text(prompt)
            if isinstance(found, FoundText):
                self.claimed.update(found.files)
            if prompt in missing:
                self._sort(prompt, found)

    def _sort(self, prompt: str, found: FoundText | str) -> None:
        if isinstance(found, str) and found == ABSENT:
            self.part.reasons[prompt] = found
            return
        self.part.found += 1
        proven = self._proven(found)
        if isinstance(proven, str):
            self.part.reasons[prompt] = proven
        else:
            self._candidates.append(prompt)

    def run(self, sample: int, dry_run: bool) -> None:
        """Verify a sample, then import what is left."""
        if not self._candidates:
            return
        trial = TextTrial(self._project, self._checkpoint)
        self.part.verification = result = self._verify(trial, sample)
        if result is not None and result.fault is not None:
            self.part.reasons |= dict.fromkeys(self._candidates, UNEQUAL)
        elif result is not None:
            self._import(trial, dry_run)

    def _verify(self, trial: TextTrial, sample: int) -> Verification | None:
        checked = Checked(TEXT_TOLERANCE)
        seed = self._project.trainer.prep_seed
        for prompt in sorted(self._candidates, key=lambda one: seed_of(seed, "import", one))[:sample]:
            found = self._proven(self._cache.text(prompt))
            judgement = found if isinstance(found, str) else trial.judge(prompt, found)
            if isinstance(judgement, str):
                self.part.reasons[prompt] = judgement
                self._candidates.remove(prompt)
            else:
                checked.add(prompt, judgement, LATENTS)
        return checked.result()

    def _import(self, trial: TextTrial, dry_run: bool) -> None:
        length = self._project.text_tokens
        rows = []
        for prompt in self._candidates:
            found = self._proven(self._cache.text(prompt))
            if isinstance(found, str):
                self.part.reasons[prompt] = found
                continue
            self.part.imported += 1
            rows.append(trial.encoded(prompt, found, length))
            if not dry_run and len(rows) * self._sizes.of_prompt(length) >= SHARD_BYTES:
                self.part.written += self._store.store(rows)
                rows = []
        if rows and not dry_run:
            self.part.written += self._store.store(rows)

    def _proven(self, found: FoundText | str) -> FoundText | str:
        """Check what a file holds, but for the encoder; a text says what is wrong."""
        if isinstance(found, str):
            return found
        tensors = [found.embed] if found.pooled is None else [found.embed, found.pooled]
        if sum(one.numel() for one in tensors) != self._sizes.prompt_values:
            return f"another shape: {', '.join('×'.join(map(str, one.shape)) for one in tensors)}"
        if not all(torch.isfinite(one.float()).all() for one in tensors):
            return "not finite: it holds values that are no numbers"
        return found
