"""What accelerators can do: peaks of their data sheets, and the rates that steps are estimated with.

Another one is a line in `DEVICES`; rates that were measured replace those that are assumed from the peaks.
"""

from dataclasses import dataclass

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator; operations and bytes are a second's."""

    name: str  # part of what PyTorch calls it
    peak: float  # of bfloat16 products, without sparsity, summed in float32
    peak_fp8: float | None  # null if it has no such products
    products: float  # what large bfloat16 products reach
    products_fp8: float | None
    attention: float  # forward
    attention_both: float  # forward and backward together
    memory: float  # bytes that pointwise operations move
    transfer: float  # bytes between it and the CPU, in one direction
    gib: float  # its memory
    measured: bool = False  # or shares of the data sheet's peaks


def _assumed(name: str, peaks: tuple[float, float | None], memory: float, transfer: float, gib: float) -> Device:
    """Take 70 % of the peaks for products, 55 and 45 % for attention, 80 % of the memory's rate."""
    peak, fp8 = peaks[0] * _TERA, None if peaks[1] is None else peaks[1] * _TERA
    return Device(
        name=name,
        peak=peak,
        peak_fp8=fp8,
        products=0.7 * peak,
        products_fp8=None if fp8 is None else 0.7 * fp8,
        attention=0.55 * peak,
        attention_both=0.45 * peak,
        memory=0.8 * memory * _GIGA,
        transfer=transfer * _GIGA,
        gib=gib,
    )


H200 = Device(
    name="H200",
    peak=989 * _TERA,
    peak_fp8=1979 * _TERA,
    products=787 * _TERA,
    products_fp8=1443 * _TERA,
    attention=666 * _TERA,
    attention_both=565 * _TERA,
    memory=4200 * _GIGA,
    transfer=50 * _GIGA,
    gib=139.8,
    measured=True,
)
DEVICES: tuple[Device, ...] = (
    H200,
    _assumed("H100 PCIe", (756, 1513), 2000, 50, 79.2),
    _assumed("H100", (989, 1979), 3350, 50, 79.2),
    _assumed("A100", (312, None), 2000, 22, 79.2),
    _assumed("RTX 5090", (209, 419), 1790, 45, 31.4),
    _assumed("RTX 4090", (165, 330), 1008, 22, 23.5),
    _assumed("RTX 3090", (71, None), 936, 22, 23.6),
)


def device_named(name: str) -> Device | None:
    """Return what is known of an accelerator by its name, or a part of its name alone; None if nothing is."""
    found = [one for one in DEVICES if one.name.lower() in name.lower()]
    if found:
        return max(found, key=lambda one: len(one.name))
    part = [one for one in DEVICES if name.lower() in one.name.lower()]
    return part[0] if len(part) == 1 else None
