"""What accelerators can do: peaks of their data sheets, and the rates that steps are estimated with.

Another one is a line in `DEVICES`; rates that were measured replace those that are assumed from the peaks.
"""

import re
from dataclasses import dataclass, replace

_TERA, _GIGA = 1e12, 1e9
_PLAIN = re.compile(r"nvidia|geforce|tesla|gpu|tensor|core|sxm\d?|pcie?|hbm\d?e?")  # tell no card from another
_SIZE = re.compile(r"\b(\d+) ?gi?b\b")
_NEAR = 0.03  # share by which a card's GiB are fewer than the gigabytes in its name


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator; operations and bytes are a second's."""

    name: str  # words of what PyTorch calls it
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
DEVICES: tuple[Device, ...] = (  # variants after what is meant by the name alone
    H200,
    _assumed("H200 NVL", (835, 1671), 4800, 50, 139.8),
    _assumed("H100", (989, 1979), 3350, 50, 79.2),
    _assumed("H100 PCIe", (756, 1513), 2000, 50, 79.2),
    _assumed("H100 NVL", (835, 1671), 3900, 50, 93.1),
    _assumed("A100", (312, None), 2000, 22, 79.2),
    _assumed("A100 40GB", (312, None), 1555, 22, 39.4),
    _assumed("RTX 5090", (209, 419), 1790, 45, 31.4),
    _assumed("RTX 4090", (165, 330), 1008, 22, 23.5),
    _assumed("RTX 3090", (71, None), 936, 22, 23.6),
)


def device_named(name: str) -> Device | None:
    """Return what is known of an accelerator by its name, or by words of it that no other has; None if nothing is.

    A memory that is named decides between variants; one that none of them has takes the place of theirs.
    """
    words, size = _read(name)
    found = _whole(words) or _part(words)
    if found is None or size is None:
        return found
    variants = [one for one in DEVICES if _words(found) <= _words(one)]
    sized = (one for one in variants if abs(one.gib - size) <= _NEAR * size)
    return next(sized, replace(found, name=f"{found.name} {size}GB", gib=float(size)))


def _whole(words: set[str]) -> Device | None:
    """Find the device all of whose words are there, and no others that tell cards apart."""
    found = [one for one in DEVICES if _words(one) <= words and not _telling(words - _words(one))]
    return max(found, key=lambda one: len(_words(one)), default=None)


def _part(words: set[str]) -> Device | None:
    """Find the device some of whose words are there alone; the shortest name, if only one is as short."""
    telling = _telling(words)
    found = [one for one in DEVICES if telling and telling <= _words(one)]
    least = min((len(_words(one)) for one in found), default=0)
    short = [one for one in found if len(_words(one)) == least]
    return short[0] if len({frozenset(_words(one)) for one in short}) == 1 else None


def _words(device: Device) -> set[str]:
    return _read(device.name)[0]


def _telling(words: set[str]) -> set[str]:
    return {one for one in words if not _PLAIN.fullmatch(one)}


def _read(name: str) -> tuple[set[str], int | None]:
    """Return the words of a name, and the gigabytes that it names."""
    lower = name.lower()
    size = _SIZE.search(lower)
    return set(re.findall(r"[a-z0-9]+", _SIZE.sub(" ", lower))), int(size[1]) if size else None
