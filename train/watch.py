"""What a run looks at now and then: the loss on held-out pairs, and samples.

Both see the average of the weights where one is kept. A further thing to look at goes into `look`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from families.runtime import family_of, release_memory
from schemas.console import log
from schemas.project import Project
from train.checkpoint import State
from train.data import Shelf, Shown
from train.ema import averaged
from train.evaluate import Evaluation, evaluate
from train.metrics import Metrics
from train.pictures import Pictures, SampleReport


class Watch:
    """Evaluates and samples when it is time, and remembers what it saw first and last."""

    def __init__(
        self, project: Project, shelf: Shelf, held: Sequence[Shown], pictures: Pictures | None, device: torch.device
    ) -> None:
        self._config, self._family, self._shelf, self._device = project.trainer, family_of(project), shelf, device
        self._held, self._pictures = held, pictures
        self.first: Evaluation | None = None
        self.last: Evaluation | None = None
        self.samples: SampleReport | None = None

    def looks(self, step: int, steps: int) -> bool:
        """Tell whether it is time, by the settings alone: the same in every process."""
        config = self._config
        evaluates = bool(config.eval_steps_interval) and _due(step, steps, config.eval_steps_interval)
        return evaluates or _due(step, steps, config.validation_steps)

    def look(self, state: State, step: int, steps: int, metrics: Metrics) -> None:
        """Look after `step` of `steps`, if it is time: at the start, at intervals, at the end."""
        config = self._config
        evaluates = bool(self._held and config.eval_steps_interval) and _due(step, steps, config.eval_steps_interval)
        samples = self._pictures is not None and step > 0 and _due(step, steps, config.validation_steps)
        if not (evaluates or samples):
            return
        with averaged(state.average, state.parameters):
            if evaluates:
                self._evaluate(state, step, metrics)
            if samples:
                self._sample(state, step, metrics)

    def numbers(self) -> dict[str, Any]:
        """Return what the closing report says of all this."""
        first, last, samples = self.first, self.last, self.samples
        return {
            "first_eval_loss": first.loss if first is not None else None,
            "eval_loss": last.loss if last is not None else None,
            "psnr": samples.psnr if samples is not None else None,
            "reference_psnr": samples.reference_psnr if samples is not None else None,
            "ssim": samples.ssim if samples is not None else None,
            "reference_ssim": samples.reference_ssim if samples is not None else None,
        }

    def _evaluate(self, state: State, step: int, metrics: Metrics) -> None:
        batches = (self._shelf.load([one], self._device) for one in self._held)
        seen = evaluate(self._family, state.denoiser, batches, self._config)
        metrics.write(step, **seen.numbers())
        before = f" ({self.first.loss:.4f} at first)" if self.first is not None else ""
        log.info("step %d: loss on %d held-out pairs %.4f%s", step, len(self._held), seen.loss, before)
        self.first, self.last = self.first or seen, seen

    def _sample(self, state: State, step: int, metrics: Metrics) -> None:
        assert self._pictures is not None, "asked for only where there are pictures to sample"
        try:
            self.samples = self._pictures.sample(state.denoiser, step)
        except torch.OutOfMemoryError:
            log.warning(
                "step %d: the accelerator's memory is full, so nothing is sampled any more; a smaller "
                "validation_resolution, or validation_disable; training goes on", step
            )  # fmt: skip
            self._pictures = None
            release_memory()
            return
        metrics.write(step, **self.samples.values())
        metrics.picture(step, "samples", self.samples.pixels)
        log.info("step %d: samples in %s", step, self.samples.grid)


def _due(step: int, steps: int, every: int) -> bool:
    return step in (0, steps) or (bool(every) and step % every == 0)
