"""What `train bench` measured and what `train plan` estimated: the objects they return, and how a person is told.

A further number of a step is a field here and a column of `lines`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One setting, measured; all numbers are null where it failed."""

    name: str
    settings: Mapping[str, Any]  # options that it sets itself, in place of those of all
    error: str | None = None
    seconds_per_step: float | None = None  # median, after those that warm up
    tokens_per_second: float | None = None  # of targets, references and text
    utilisation: float | None = None  # operations a step needs, by what the accelerator could do in its time at most
    peak_gib: float | None = None
    data_wait: float | None = None  # share of the steps' time that they waited for data
    compile_seconds: float | None = None  # of the first step beyond the median
    loss: float | None = None
    trainable_parameters: int | None = None


@dataclass(frozen=True, slots=True)
class BenchSummary:
    """What `train bench` measured."""

    family: str
    flavour: str
    width: int  # of targets, pixels
    height: int
    references: tuple[str, ...]  # sizes, WIDTHxHEIGHT
    tokens: int  # of a sample
    batch: int
    steps: int  # that are measured
    warmup: int  # before them
    device: str
    versions: Mapping[str, str]
    options: Mapping[str, Any]  # of training, of all rows where they set no others
    rows: tuple[BenchRow, ...]
    command: str = "train bench"

    @property
    def failed(self) -> bool:
        """Tell whether no row was measured."""
        return all(row.error is not None for row in self.rows)

    def lines(self) -> Iterator[str]:
        """Yield a table in Markdown."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        references = f"{len(self.references)} reference{'s' * (len(self.references) != 1)}"
        pictures = f"{self.width}x{self.height} px, {references}, {self.tokens} tokens"
        yield f"{self.family} {self.flavour}, random weights, {pictures}, batch {self.batch}; {self.device}; {versions}"
        yield ""
        yield from table(
            ("setting", "s/step", "tokens/s", "MFU", "peak GiB", "data wait", "compile s"),
            [self._cells(row) for row in self.rows],
        )
        yield from (f"{row.name}: {row.error}" for row in self.rows if row.error is not None)

    def _cells(self, row: BenchRow) -> tuple[str, ...]:
        if row.error is not None:
            return (row.name, "failed", *("",) * 5)
        return (
            row.name,
            shown(row.seconds_per_step, "{:.3f}"),
            shown(row.tokens_per_second, "{:.0f}"),
            shown(row.utilisation, "{:.0%}"),
            gib(row.peak_gib),
            shown(row.data_wait, "{:.1%}"),
            shown(row.compile_seconds, "{:.1f}"),
        )


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """One way to train, estimated."""

    settings: Mapping[str, Any]  # options, all that the choice is made of
    changes: Mapping[str, Any]  # those of them that are otherwise now
    peak_gib: float
    seconds_per_step: float | None  # null where nothing is known of the accelerator
    relative: float  # time, of the quickest one's
    fits: bool | None  # null where no memory is known
    exact: bool  # no other numbers than those of unquantised weights
    now: bool  # what the project has set
    worthwhile: bool  # nothing as exact is both as quick and as small
    refused: str | None = None  # why `train run` would refuse it; of what is set now alone, others are left out

    @property
    def name(self) -> str:
        """Spell the choice in a few words."""
        chosen = dict(self.settings)
        precision = chosen.pop("base_model_precision", "no_change")
        words = ["unquantised" if precision == "no_change" else str(precision)]
        words.append("compiled" if chosen.get("dynamo_backend", "no") != "no" else "eager")
        if chosen.get("gradient_checkpointing"):
            interval = chosen.get("gradient_checkpointing_interval", 1)
            kept = ", attention kept" if chosen.get("gradient_checkpointing_keep", "nothing") == "attention" else ""
            words.append(f"checkpointing{f' of every {interval}th block' if interval > 1 else ''}{kept}")
            words += ["unsloth"] * (chosen.get("gradient_checkpointing_backend", "torch") == "unsloth")
        else:
            words.append("no checkpointing")
        words += ["group offload"] * bool(chosen.get("enable_group_offload"))
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What `train plan` estimated."""

    family: str
    flavour: str
    largest: str  # sample, by its sizes, that decides the memory
    usual: str  # that decides the time
    tokens: tuple[int, int]  # of the two
    batch: int
    trainable_parameters: int
    device: str
    rates: str | None  # the accelerator whose rates times are estimated with; null if none are known of this one
    memory_gib: float | None  # there is for the process
    budget_gib: float | None  # that was asked for
    choices: tuple[ChoiceRow, ...]  # the quickest first, what is refused last
    notes: tuple[str, ...]
    everything: bool = False  # a person is told of every choice
    command: str = "train plan"

    @property
    def fastest(self) -> ChoiceRow | None:
        """Return the quickest choice that fits."""
        return next((one for one in self.choices if one.fits and one.refused is None), None)

    @property
    def fastest_exact(self) -> ChoiceRow | None:
        """Return the quickest that fits and changes no numbers."""
        return next((one for one in self.choices if one.fits and one.refused is None and one.exact), None)

    def lines(self) -> Iterator[str]:
        """Yield the choices worth a thought, and what to set for the best."""
        small, large = self.tokens[1], self.tokens[0]
        tokens = f"{large} tokens" if small == large else f"{small} tokens mostly, {large} at most"
        yield (
            f"{self.family} {self.flavour}, {self.largest}, {tokens}, batch {self.batch}, "
            f"{self.trainable_parameters / 1e6:.1f} million parameters trained"
        )
        room = "no memory known" if self.memory_gib is None else f"{gib(self.memory_gib)} GiB for tensors"
        rates = "" if self.rates in (None, self.device) else f", rates of {self.rates}"
        budget = "" if self.budget_gib is None else f", of a budget of {self.budget_gib:g} GiB"
        yield f"{self.device}{rates}: {room}{budget}"
        yield ""
        told = [one for one in self.choices if self.everything or one.worthwhile or one.now]
        yield from table(("choice", "s/step", "peak GiB", "fits", ""), [_choice_cells(one) for one in told])
        yield ""
        if not self.everything and len(told) < len(self.choices):
            yield f"{len(self.choices) - len(told)} more are no quicker and no smaller than one of these: --all"
        yield from self.notes
        yield from self._best()

    def _best(self) -> Iterator[str]:
        for said, one in (("fastest that fits", self.fastest), ("with the same numbers", self.fastest_exact)):
            if one is None or (said != "fastest that fits" and one is self.fastest):
                continue
            yield f"{said}: {one.name}{'; it is set already' if one.now else '; in config.json:'}"
            yield from (f"  {spelled(name, value)}" for name, value in one.changes.items())


def _choice_cells(one: ChoiceRow) -> tuple[str, ...]:
    marks = ["now"] * one.now + ["refused"] * (one.refused is not None) + ["other numbers"] * (not one.exact)
    fits = "?" if one.fits is None else "yes" if one.fits else "no"
    return one.name, shown(one.seconds_per_step, "{:.2f}"), gib(one.peak_gib), fits, ", ".join(marks)


def gib(value: float | None) -> str:
    """Spell GiB, those of small networks to the MiB."""
    return shown(value, "{:.1f}" if value is None or value >= 1 else "{:.3f}")


def spelled(name: str, value: Any) -> str:
    """Spell an option as a line of config.json."""
    text = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
    return f'"{name}": {text},' if not isinstance(value, str) else f'"{name}": "{value}",'


def shown(value: float | None, how: str) -> str:
    """Spell a number, or that it is not known."""
    return "-" if value is None else how.format(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table in Markdown, its columns aligned."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        yield f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
