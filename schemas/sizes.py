"""Sizes of pictures as people write them: `1024x768`, an edge, megapixels, several separated by commas."""

_MOST_MEGAPIXELS = 20  # a smaller number is no edge
_EDGES = (16, 8192)  # pixels


def picture_sizes(value: str | int | float) -> tuple[tuple[int, int], ...]:
    """Return the sizes, width and height, that a text or number stands for; raises ValueError."""
    sizes = []
    for part in str(value).lower().split(","):
        width, by, height = part.partition("x")
        try:
            size = (int(width), int(height)) if by else (_edge(float(width)),) * 2
        except (ValueError, OverflowError):
            size = (0, 0)
        if not all(_EDGES[0] <= side <= _EDGES[1] for side in size):
            raise ValueError(
                f"must be WIDTHxHEIGHT, an edge of {_EDGES[0]} to {_EDGES[1]} pixels, or megapixels, such as 1024x768, "
                "768, 0.5; several are separated by commas"
            )
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


def checked_sizes(value: str | int | float) -> str | int | float:
    """Return the value as it is; raises ValueError if it stands for no sizes."""
    picture_sizes(value)
    return value


def _edge(number: float) -> int:
    return round((number * 1e6) ** 0.5) if 0 < number < _MOST_MEGAPIXELS else round(number)
