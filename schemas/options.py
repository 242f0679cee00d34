"""How an option is declared: once, with its type, default, range, help and the stages that read it.

`option` is a pydantic Field whose extra facts feed fingerprints, warnings and docs/options.md.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from schemas.keys import digest


class Options(BaseModel):
    """A frozen group of options in which an unknown key is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    def fingerprint(self, stage: str) -> str:
        """Hash the options that `stage` reads, so that it notices when one of them changes."""
        return digest(self.acting(stage))

    def acting(self, stage: str) -> dict[str, Any]:
        """Return the options that `stage` reads, as JSON values; those without effect are left out at every depth."""
        read = {name for name, facts in facts_of(type(self)) if stage in facts["stages"]}
        return {name: _acting(getattr(self, name), stage) for name in sorted(read)}


def option(
    default: Any,
    description: str,
    *,
    stages: str = "train",
    no_effect: str | None = None,
    alias: str | None = None,
    **limits: Any,
) -> Any:
    """Declare an option.

    `stages` names the commands that read it; `no_effect` marks one that is validated but not acted on and says what
    happens instead; `alias` is a second accepted spelling, turned into the first when a file is read.
    """
    read_by = stages.split() if no_effect is None else []
    extra: dict[str, Any] = {"stages": read_by, "no_effect": no_effect, "alias": alias}
    return Field(default, description=description, json_schema_extra=extra, **limits)


def _acting(value: Any, stage: str) -> Any:
    if isinstance(value, Options):
        return value.acting(stage)
    return [_acting(one, stage) for one in value] if isinstance(value, tuple) else value


def facts_of(model: type[BaseModel]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each option's name and the facts declared with `option`."""
    for name, field in model.model_fields.items():
        yield name, facts(field)


def facts(field: FieldInfo) -> Mapping[str, Any]:
    """Return the facts declared with `option`."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "every field of an Options model is declared with option()"
    return extra
