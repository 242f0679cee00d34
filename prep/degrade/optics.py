"""What lenses, shaking hands and the air do: blur, sharpening, lateral colour, haze.

A new kernel is a function that returns it, an entry in `KERNELS`, and its words and parameters in schemas/steps.py.
Gaussian and box blurs are fixed-point; other kernels are float32, and a level may differ by one between processors.
"""

import math
from collections.abc import Callable, Mapping

import cv2
import numpy as np
import numpy.typing as npt

from prep.degrade.draws import Draws
from prep.images import Pixels

Kernel = npt.NDArray[np.float64]


def blur(pixels: Pixels, _: Draws, *, kernel: str, **numbers: float) -> Pixels:
    """Convolve with a kernel; beyond the border the outermost pixels repeat."""
    if kernel == "gaussian":
        return gaussian_blur(pixels, **numbers)
    if kernel == "box":
        return box_blur(pixels, **numbers)
    weights = KERNELS[kernel](**numbers)
    # filter2D correlates: turned by 180°, it convolves.
    turned = np.ascontiguousarray(weights[::-1, ::-1], np.float32)
    blurred: Pixels = cv2.filter2D(pixels, -1, turned, borderType=cv2.BORDER_REPLICATE)
    return blurred


def gaussian_blur(pixels: Pixels, sigma: float, size: float = 0) -> Pixels:
    """Blur with a gaussian; of `size` pixels, or as wide as it needs to be."""
    if sigma <= 0:
        return pixels
    blurred: Pixels = cv2.GaussianBlur(pixels, (int(size), int(size)), sigma, borderType=cv2.BORDER_REPLICATE)
    return blurred


def box_blur(pixels: Pixels, radius: float) -> Pixels:
    """Average over a square of side 2 × radius + 1; the outermost pixels count by the radius's fraction."""
    if radius <= 0:
        return pixels
    whole = int(radius)
    ends = [radius - whole] if radius > whole else []
    kernel = np.array([*ends, *[1.0] * (2 * whole + 1), *ends]) / (2 * radius + 1)
    blurred: Pixels = cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return blurred


def motion_kernel(length: float, angle: float) -> Kernel:
    """Return a straight path of even speed, `length` pixels long and one wide, smoothed over one pixel."""
    across, up = _grid(2 * math.ceil(length / 2) + 3)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along, aside = across * cos + up * sin, up * cos - across * sin
    # A path of no length is one pixel; its ends, like its sides, fade over a pixel.
    ends = np.clip(max(length, 1) / 2 + 0.5 - np.abs(along), 0, 1)
    return _normalised(ends * np.clip(1 - np.abs(aside), 0, 1))


def defocus_kernel(radius: float) -> Kernel:
    """Return a disk, the image of a point that a round aperture has out of focus; its edge fades over a pixel."""
    across, up = _grid(2 * math.ceil(radius) + 3)
    return _normalised(np.clip(radius + 0.5 - np.hypot(across, up), 0, 1))


def anisotropic_kernel(sigma: float, angle: float, sigma_y: float = -1, size: float = 0) -> Kernel:
    """Return a gaussian of two standard deviations, turned."""
    return _normalised(np.exp(-0.5 * _distance(sigma, sigma_y, angle, size)))


def generalized_gaussian_kernel(
    sigma: float, angle: float, beta: float, sigma_y: float = -1, size: float = 0
) -> Kernel:
    """Return exp(-½ d^2β), d the distance in standard deviations (Pascal et al., https://arxiv.org/abs/1302.6498)."""
    return _normalised(np.exp(-0.5 * _distance(sigma, sigma_y, angle, size) ** beta))


def plateau_kernel(sigma: float, angle: float, beta: float, sigma_y: float = -1, size: float = 0) -> Kernel:
    """Return 1 / (1 + d^2β), d the distance in standard deviations (Wang et al. 2021, section 3.2)."""
    return _normalised(1 / (1 + _distance(sigma, sigma_y, angle, size) ** beta))


def sinc_kernel(cutoff: float, size: float = 21) -> Kernel:
    """Return the ideal circular low-pass ω J₁(ω r) / (2π r), cut to `size` pixels (Wang et al. 2021, eq. 6)."""
    distance = np.hypot(*_grid(int(size)))
    middle = distance == 0
    distance[middle] = 1
    kernel = cutoff * _bessel(cutoff * distance) / (2 * np.pi * distance)
    kernel[middle] = cutoff**2 / (4 * np.pi)
    return _normalised(kernel)


def sharpen(pixels: Pixels, _: Draws, *, sigma: float, amount: float) -> Pixels:
    """Add `amount` × (picture - blurred picture), an unsharp mask."""
    # In 64ths every product of a level is exact in float32, so all machines round alike.
    share = round(amount * 64) / 64
    sharp: Pixels = cv2.addWeighted(pixels, 1 + share, gaussian_blur(pixels, sigma), -share, 0)
    return sharp


def chromatic_aberration(pixels: Pixels, _: Draws, *, shift: float) -> Pixels:
    """Scale red up and blue down about the middle, by `shift` pixels at the corners; green stays."""
    height, width = pixels.shape[:2]
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    corner = max(1.0, float(np.hypot(*middle)))
    shifted = pixels.copy()
    for channel, outwards in ((0, shift), (2, -shift)):
        scale = max(0.1, 1 + outwards / corner)
        move = np.array([[scale, 0, 0], [0, scale, 0]])
        move[:, 2] = middle * (1 - scale)
        plane = np.ascontiguousarray(pixels[:, :, channel])
        shifted[:, :, channel] = cv2.warpAffine(
            plane, move, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
    return shifted


def haze(
    pixels: Pixels, _: Draws, *, pattern: str, transmission: float, airlight: float, far: float = 0, angle: float = 0
) -> Pixels:
    """Mix with the light of the air: I = J·t + A·(1 - t) (Koschmieder's law; He, Sun, Tang, CVPR 2009, eq. 1)."""
    height, width = pixels.shape[:2]
    shares = np.full((1, 1), transmission)
    if pattern == "gradient":
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        reach = max(1.0, abs(cos) * (width - 1) + abs(sin) * (height - 1))
        across, up = np.arange(width) - (width - 1) / 2, (height - 1) / 2 - np.arange(height)
        place = 0.5 + (across * cos + up[:, None] * sin) / reach  # 0 at the near side, 1 at the far side
        shares = transmission + (far - transmission) * place
    # In 256ths, so that the mix is a sum of whole numbers, of 16 bits.
    kept = np.rint(shares * 256).astype(np.uint16)[:, :, None]
    added = np.uint16(round(airlight * 255)) * (np.uint16(256) - kept) + np.uint16(128)
    if kept.size > 1:
        mixed: Pixels = ((pixels * kept + added) >> 8).astype(np.uint8)
        return mixed
    table = (np.arange(256, dtype=np.uint16) * kept[0, 0] + added[0, 0]) >> 8
    hazy: Pixels = cv2.LUT(pixels, table.astype(np.uint8))
    return hazy


def _grid(size: int) -> tuple[Kernel, Kernel]:
    """Return how far right and up of the middle each pixel of an odd square is."""
    reach = size // 2
    places = np.arange(-reach, reach + 1.0)
    return np.tile(places, (len(places), 1)), np.tile(-places[:, None], (1, len(places)))


def _distance(sigma: float, sigma_y: float, angle: float, size: float) -> Kernel:
    """Return the squared distance from the middle in standard deviations."""
    first, second = max(sigma, 1e-3), max(sigma if sigma_y < 0 else sigma_y, 1e-3)
    across, up = _grid(int(size) or 2 * math.ceil(3 * max(first, second)) + 1)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    distance: Kernel = ((across * cos + up * sin) / first) ** 2 + ((up * cos - across * sin) / second) ** 2
    return distance


def _bessel(values: Kernel) -> Kernel:
    """Return J₁, as the mean of cos(τ - x sin τ) over half a turn (Abramowitz and Stegun, 9.1.21)."""
    turns = (np.arange(256) + 0.5) * (np.pi / 256)
    mean: Kernel = np.cos(turns - values[..., None] * np.sin(turns)).mean(-1)
    return mean


def _normalised(kernel: Kernel) -> Kernel:
    normalised: Kernel = kernel / kernel.sum()
    return normalised


KERNELS: Mapping[str, Callable[..., Kernel]] = {
    "motion": motion_kernel,
    "defocus": defocus_kernel,
    "anisotropic": anisotropic_kernel,
    "generalized_gaussian": generalized_gaussian_kernel,
    "plateau": plateau_kernel,
    "sinc": sinc_kernel,
}
