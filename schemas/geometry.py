"""How an image becomes a training picture: six numbers, apart from the rows because every worker needs them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an oriented image becomes a training picture: resize to the intermediary size, then crop the target box."""

    target_width: int  # pixels
    target_height: int
    intermediary_width: int  # pixels after the resize, before the crop
    intermediary_height: int
    crop_top: int  # of the target box inside the intermediary image
    crop_left: int

    @property
    def bucket(self) -> str:
        """Name the bucket, `WxH` of the target."""
        return f"{self.target_width}x{self.target_height}"

    def as_key(self) -> tuple[int, ...]:
        """Return the six numbers in the order that keys hash them."""
        return (
            self.target_width,
            self.target_height,
            self.intermediary_width,
            self.intermediary_height,
            self.crop_top,
            self.crop_left,
        )
