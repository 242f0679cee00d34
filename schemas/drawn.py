"""What a parameter of a degradation's step may say: a number or a range, a word or several to draw from.

`Drawn` and `ONE_OR_MORE` are annotations; `Drawn` also tells how a range is drawn, which prep/degrade acts on.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

Range: TypeAlias = float | tuple[float, float]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A number from `low` to `high`, or two of them between which each picture draws its own.

    Draws are uniform; `log` makes their logarithm uniform; `whole` and `odd` numbers are drawn with both ends.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False
    odd: bool = False

    def read(self, value: Any) -> Any:
        """Check a number or a range; raises ValueError."""
        if isinstance(value, list | tuple):
            if len(value) != 2:
                raise ValueError(f"must be {self.noun}, or two of them: [low, high]")
            low, high = (self._number(one) for one in value)
            if low > high:
                raise ValueError(f"the lower end comes first: [{high:g}, {low:g}]")
            return low, high
        return self._number(value)

    @property
    def noun(self) -> str:
        """Spell what is allowed."""
        kind = "an odd whole number" if self.odd else "a whole number" if self.whole else "a number"
        return f"{kind} from {self.low:g} to {self.high:g}"

    def _number(self, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high:  # neither NaN nor infinity is between
            raise ValueError(f"must be {self.noun}")
        if not (self.whole or self.odd):
            return float(value)
        if value != int(value) or (self.odd and value % 2 == 0):
            raise ValueError(f"must be {self.noun}")
        return int(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check values with `read`; null only where the option may be."""
        checked = core_schema.no_info_plain_validator_function(self.read)
        return core_schema.nullable_schema(checked) if type(None) in getattr(source, "__args__", ()) else checked

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe a number or a pair."""
        kind = "integer" if self.whole or self.odd else "number"
        one = {"type": kind, "minimum": self.low, "maximum": self.high}
        pair = {"type": "array", "items": one, "minItems": 2, "maxItems": 2}
        null = [{"type": "null"}] if schema["type"] == "nullable" else []
        return {"anyOf": [one, pair, *null]}


class _OneOrMore:
    """A single word means a list of one."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: [value] if isinstance(value, str) else value, handler(source)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        listed = handler(schema)
        return {"anyOf": [listed["items"], listed]}


ONE_OR_MORE = _OneOrMore()
