"""Does a strict reference lie on its target? Shift, zoom and likeness of two pictures, from small gray versions.

`compare` does it all for one pair; `misaligned` says in a sentence what is wrong.

A pyramid of band-passed pictures is registered from coarse to fine. On each level every block of the target is fitted
to the reference by its gain and displacement (Lucas & Kanade 1981, with the gain of Hager & Belhumeur 1998), so that
contrast may differ from block to block and even be inverted. One shift and one zoom are fitted through all blocks by
iteratively reweighted least squares (Holland & Welsch 1977): blocks that were edited drop out. What is trusted is
the share of blocks that agree. The start is phase correlation (Kuglin & Hines 1975), or no shift at all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from prep.images import decode_gray
from schemas.geometry import Geometry

Gray: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
_Values: TypeAlias = npt.NDArray[np.float32]
_Numbers: TypeAlias = npt.NDArray[np.float64]

# Defaults, from 2,500 pairs made of the demo photographs at 512² to 1024² pixels: references blurred (σ up to 8 px),
# shrunk, compressed, noisy, tinted, gray, faded and scratched, inverted, posterised, drawn, or up to 65 % replaced.
TRUSTED = 0.5  # confidence from which shift and zoom count; of different pictures none had it
UNKNOWN = 0.1  # confidence where nothing can be told

SMALL = 256  # pixels of the side of a square with the small picture's area
_SMALLEST = 24  # pixels of a side that can be registered
_COARSEST = 128  # pixels of the longer side at which the pyramid ends
_THINNEST = 64  # pixels of the shorter side below which no level may be
_BLOCK = 16  # pixels of a block's side
_ROUNDS = 5  # of warping and fitting on a level
_REWEIGHTINGS = 4
_SIGMAS = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # pixels: blurs of the sharper picture
_FEWEST = 6  # blocks for a fit
_TEXTURE = 0.6  # gray levels: standard deviation of a band-passed block that is more than rounding
_FAR = 2.5  # pixels of a level: a larger displacement of a block is beyond the linear fit
_SPREAD = 0.3  # pixels of a level: scale of the weights' fall
_NEAR = 0.35  # pixels of a level by which blocks that agree may miss the common fit
_ALIKE = 0.35  # correlation of blocks that agree, of either sign
_CLEARER = 0.3  # share of agreeing blocks by which a coarser level is preferred
_AGREEING = 0.5  # share of agreeing blocks that leaves no doubt
_ENOUGH = 20  # agreeing blocks that leave no doubt
_DOUBT = 0.5  # pixels of the training picture: error at which confidence is halved
_STRANGE_SHARE = 0.1  # of agreeing blocks, below which pictures may be different ones; those have at most 0.07
_STRANGE_SHARE_ABOVE = 0.15  # on the level above, of fewer blocks: 99 % have less than 0.13
_STRANGE_LIKENESS = 0.12  # of edges; 95 % of different pictures have less than 0.10
_DETAIL = 0.2  # share of blocks that must show something before a picture is called another
_SLACK = 3  # pixels by which edges may lie apart


@dataclass(frozen=True, slots=True)
class Alignment:
    """How a reference lies on its target."""

    shift_x: float  # pixels of the training picture by which the reference lies right of its target, in the middle
    shift_y: float  # pixels below
    scale: float  # of the reference relative to its target, about the middle; 1.01 is one per cent larger
    similarity: float  # structural similarity (Wang et al. 2004) of the two gray pictures as they lie, 0 to 1
    confidence: float  # of shift and scale, 0 to 1; 0 only where both show detail and none of it agrees


MEASURES = tuple(field.name for field in fields(Alignment))  # the columns of `schemas.rows.Reference` that tell it

# Place of a set of references -> targets × MEASURES; NaN where nothing was compared.
Measures: TypeAlias = Mapping[int, _Numbers]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the reference lies, in pixels of the small picture, from the middle."""

    x: float
    y: float
    scale: float


@dataclass(frozen=True, slots=True)
class _Level:
    """One level of the pyramid; blocks are in reading order."""

    factor: int  # pixels of the small picture per pixel of this level
    basis: tuple[_Values, _Values, _Values]  # the band-passed target and its two derivatives
    reference: _Values  # band-passed
    centres: _Numbers  # blocks × 2, pixels from the middle: right, down
    normal: _Numbers  # blocks × 3 × 3: mean products of the basis


@dataclass(frozen=True, slots=True)
class _Blocks:
    """What each block of a level says about the displacement that is left."""

    shift: _Numbers  # blocks × 2, pixels of the level: right, down
    information: _Numbers  # blocks × 2 × 2: how far it is to be believed, by direction
    correlation: _Numbers
    textured: npt.NDArray[np.bool_]  # both show something


@dataclass(frozen=True, slots=True)
class _Fit:
    place: _Place
    agreeing: int  # blocks
    textured: int
    error: float  # pixels of the small picture: standard error of the shift

    @property
    def share(self) -> float:
        return self.agreeing / self.textured if self.textured >= _FEWEST else 0.0


_NOWHERE = _Place(0.0, 0.0, 1.0)


def alignment(target: Gray, reference: Gray, scale: float) -> Alignment:
    """Measure how a reference lies on its target, two gray pictures of equal shape.

    `scale` is the number of pixels of the training picture per pixel of these.
    """
    one, other = target.astype(np.float32), reference.astype(np.float32)
    similarity = _similarity(one, other)
    if min(one.shape) < _SMALLEST:
        return Alignment(0.0, 0.0, 1.0, similarity, UNKNOWN)
    levels = _pyramid(*_equally_sharp(one, other))
    fit, witness = _registered(levels)
    confidence = _confidence(fit, witness, scale)
    if confidence <= UNKNOWN:
        strange = fit.share < _STRANGE_SHARE and witness.share < _STRANGE_SHARE_ABOVE and _detailed(levels[0])
        unlike = strange and _likeness(one, other) < _STRANGE_LIKENESS
        return Alignment(0.0, 0.0, 1.0, similarity, 0.0 if unlike else UNKNOWN)
    place = fit.place
    return Alignment(place.x * scale, place.y * scale, place.scale, similarity, confidence)


def _confidence(fit: _Fit, witness: _Fit, scale: float) -> float:
    """Say how far a fit can be trusted: by the blocks that agree, its error, and what another level says.

    The error of large shifts may be larger: they are no less misaligned.
    """
    apart = math.hypot(fit.place.x - witness.place.x, fit.place.y - witness.place.y)
    contradiction = apart * (1 - fit.share) * min(1.0, witness.share / _AGREEING)
    doubt = math.hypot(fit.error, contradiction) * scale
    allowed = _DOUBT + 0.1 * math.hypot(fit.place.x, fit.place.y) * scale
    agreement = min(1.0, fit.share / _AGREEING) * min(1.0, fit.agreeing / _ENOUGH)
    return agreement / (1 + (doubt / allowed) ** 2)


def misaligned(found: Alignment, maximum_shift: float, maximum_scale: float, minimum_similarity: float) -> str | None:
    """Say what is wrong with how a reference lies on its target; None if nothing is, or nothing can be told."""
    if found.confidence <= 0:
        same = found.similarity >= minimum_similarity
        return None if same else f"misaligned: shows another picture (similarity {found.similarity:.2f})"
    if found.confidence < TRUSTED:
        return None
    faults = []
    if math.hypot(found.shift_x, found.shift_y) > maximum_shift:
        across, down = ("right" if found.shift_x >= 0 else "left"), ("down" if found.shift_y >= 0 else "up")
        faults.append(f"shifted {abs(found.shift_x):.1f} px {across}, {abs(found.shift_y):.1f} px {down}")
    if abs(found.scale - 1) > maximum_scale:
        faults.append(f"{abs(found.scale - 1) * 100:.1f} % {'larger' if found.scale > 1 else 'smaller'}")
    return f"misaligned: {', '.join(faults)}" if faults else None


def compare(
    target: bytes, target_view: str, reference: bytes, reference_view: str, geometry: Geometry
) -> Alignment | str:
    """Measure how a reference's file lies on its target's, or return the reason why it cannot be."""
    grays = []
    for data, view in ((target, target_view), (reference, reference_view)):
        picture = decode_gray(data, view, needed(geometry))
        if isinstance(picture, str):
            return picture
        grays.append(gray(picture, geometry))
    [(one, scale), (other, _)] = grays
    return alignment(one, other, scale)


def needed(geometry: Geometry, most: int = SMALL) -> tuple[int, int]:
    """Return the width and height of a whole picture from which `gray` loses nothing."""
    scale = _scale(geometry, most)
    return math.ceil(geometry.intermediary_width / scale), math.ceil(geometry.intermediary_height / scale)


def gray(picture: Image.Image, geometry: Geometry, most: int = SMALL) -> tuple[npt.NDArray[np.uint8], float]:
    """Make a small gray version of the training picture; return it and the training pixels per pixel of it.

    It has at most `most`² pixels, square ones: what is left over of the last is cut off.
    """
    scale = _scale(geometry, most)
    width, height = max(1, int(geometry.target_width / scale)), max(1, int(geometry.target_height / scale))
    across, down = picture.width / geometry.intermediary_width, picture.height / geometry.intermediary_height
    left, top = geometry.crop_left * across, geometry.crop_top * down
    right = min(picture.width, left + width * scale * across)  # rounding must not lead out of the picture
    bottom = min(picture.height, top + height * scale * down)
    small = picture.convert("L").resize((width, height), Image.Resampling.BILINEAR, (left, top, right, bottom))
    return np.asarray(small), scale


def _scale(geometry: Geometry, most: int) -> float:
    shorter = min(geometry.target_width, geometry.target_height)
    return min(max(1.0, math.sqrt(geometry.target_width * geometry.target_height) / most), shorter)


def _similarity(target: _Values, reference: _Values) -> float:
    """Return the mean structural similarity (Wang et al. 2004, equation 13 and the constants of section III-C)."""
    mean, other_mean = _smooth(target, 1.5), _smooth(reference, 1.5)
    variance = _smooth(target * target, 1.5) - mean * mean
    other_variance = _smooth(reference * reference, 1.5) - other_mean * other_mean
    covariance = _smooth(target * reference, 1.5) - mean * other_mean
    first, second = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean * other_mean + first) * (2 * covariance + second)
    below = (mean * mean + other_mean * other_mean + first) * (variance + other_variance + second)
    return min(1.0, max(0.0, float(np.mean(above / below))))


def _equally_sharp(target: _Values, reference: _Values) -> tuple[_Values, _Values]:
    """Blur the sharper picture until it is as soft as the other.

    Otherwise what the blur took away weighs on one side of a block's edges more than on the other, and moves it.
    """
    limits = _sharpness(target), _sharpness(reference)
    if limits[0] > limits[1]:
        return _blurred(target, limits[1]), reference
    return target, _blurred(reference, limits[0])


def _blurred(picture: _Values, sharpness: float) -> _Values:
    """Blur a picture as far as it stays at least this sharp."""
    blurred = picture
    for sigma in _SIGMAS:
        candidate = _smooth(picture, sigma)
        if _sharpness(candidate) < sharpness:
            break
        blurred = candidate
    return blurred


def _sharpness(picture: _Values) -> float:
    """Return the energy of differences at a short distance, relative to those at a long one."""
    return _energy(picture, 2) / (_energy(picture, 8) + 1e-6)


def _energy(picture: _Values, distance: int) -> float:
    across, down = picture[:, distance:] - picture[:, :-distance], picture[distance:] - picture[:-distance]
    return float(np.mean(across * across) + np.mean(down * down))


def _pyramid(target: _Values, reference: _Values) -> list[_Level]:
    """Return the levels, finest first."""
    levels = [_level(target, reference, 1)]
    while max(target.shape) > _COARSEST and min(target.shape) // 2 >= _THINNEST:
        target, reference = _halved(target), _halved(reference)
        levels.append(_level(target, reference, 2 * levels[-1].factor))
    return levels


def _detailed(level: _Level) -> bool:
    """Tell whether both pictures are large enough and show something in enough places."""
    pictures = (level.basis[0], level.reference)
    return min(level.reference.shape) >= _THINNEST and all(
        float(np.mean(_means(one * one) > _TEXTURE**2)) > _DETAIL for one in pictures
    )


def _likeness(target: _Values, reference: _Values) -> float:
    """Return the correlation of where two pictures have edges, whatever these look like; the best of small shifts."""
    edges = [_edges(picture) for picture in (target, reference)]
    slack = min(_SLACK, min(edges[0].shape) // 4)
    middle = edges[0][slack:-slack, slack:-slack]
    return float(cv2.matchTemplate(edges[1], middle, cv2.TM_CCOEFF_NORMED).max())


def _edges(picture: _Values) -> _Values:
    reduced = _halved(picture) if min(picture.shape) >= 2 * _THINNEST else picture
    strength = np.sqrt(np.hypot(_derivative(reduced, 1, 0), _derivative(reduced, 0, 1)))
    return _smooth(strength, 1.0) - _smooth(strength, 6.0)


def _level(target: _Values, reference: _Values, factor: int) -> _Level:
    band = _band(target)
    basis = (band, _derivative(band, 1, 0), _derivative(band, 0, 1))
    height, width = band.shape
    down, across = np.mgrid[0 : height // _BLOCK, 0 : width // _BLOCK] * float(_BLOCK) + (_BLOCK - 1) / 2
    centres = np.stack([across.ravel() - (width - 1) / 2, down.ravel() - (height - 1) / 2], 1)
    normal = np.stack([np.stack([_means(one * other) for other in basis], 1) for one in basis], 1)
    return _Level(factor, basis, _band(reference), centres, normal + 1e-6 * np.eye(3))


def _registered(levels: list[_Level]) -> tuple[_Fit, _Fit]:
    """Return the fit on the finest level and the one on the level above it, or in turn if that is much clearer.

    It is where one picture is much blurred: its finest details are noise.
    """
    coarsest = levels[-1]
    window = cv2.createHanningWindow(coarsest.reference.shape[::-1], cv2.CV_32F)
    (x, y), _ = cv2.phaseCorrelate(coarsest.basis[0], coarsest.reference, window)
    starts = [_NOWHERE, _Place(x * coarsest.factor, y * coarsest.factor, 1.0)]
    fits: list[_Fit] = []
    for level in levels[::-1]:
        fits.append(max((_fitted(level, place) for place in starts), key=lambda fit: fit.share))
        starts = [fits[-1].place] + ([_NOWHERE] if fits[-1].share < _AGREEING else [])
    fine, coarse = fits[-1], fits[max(0, len(fits) - 2)]
    return (coarse, fine) if coarse.share > fine.share + _CLEARER else (fine, coarse)


def _fitted(level: _Level, place: _Place) -> _Fit:
    """Fit a shift and a zoom to all blocks, from a first guess."""
    design = np.zeros((len(level.centres), 2, 3))
    design[:, 0, 0] = design[:, 1, 1] = 1
    design[:, :, 2] = level.centres
    reach = float(np.abs(level.centres).max())
    for _ in range(_ROUNDS):
        blocks = _measured(level, place)
        used = blocks.textured & (np.hypot(*blocks.shift.T) < _FAR)
        if np.count_nonzero(used) < _FEWEST:
            return _Fit(place, 0, int(np.count_nonzero(blocks.textured)), math.inf)
        change, missed, error = _robust(design, blocks, used)
        right, below, larger = np.clip(change, (-3, -3, -0.06), (3, 3, 0.06)).tolist()
        place = _Place(place.x + right * level.factor, place.y + below * level.factor, place.scale * (1 + larger))
        if max(abs(right), abs(below), abs(larger) * reach) < 0.01:
            break
    near = used & (missed < _NEAR) & (np.abs(blocks.correlation) > _ALIKE)
    return _Fit(place, int(np.count_nonzero(near)), int(np.count_nonzero(blocks.textured)), error * level.factor)


def _robust(design: _Numbers, blocks: _Blocks, used: npt.NDArray[np.bool_]) -> tuple[_Numbers, _Numbers, float]:
    """Return shift and zoom, by how much each block misses them, and the standard error of the shift.

    Weights fall with the fourth power of the distance; the error is the sandwich of White (1980).
    """
    weights = used.astype(np.float64)
    through = np.matmul(design.transpose(0, 2, 1), blocks.information)  # blocks × 3 × 2
    squares, products = np.matmul(through, design), np.matmul(through, blocks.shift[:, :, None])[:, :, 0]
    for _ in range(_REWEIGHTINGS):
        left = np.tensordot(weights, squares, 1) + 1e-9 * np.eye(3)
        left[2, 2] += 1e-3 * (left[0, 0] + left[1, 1])  # a zoom that few blocks speak for is none
        change = np.linalg.solve(left, weights @ products)
        miss = blocks.shift - design @ change
        distance = np.hypot(*miss.T)
        weights = used / (1 + (distance / _SPREAD) ** 2) ** 2
    scores = np.matmul(through, miss[:, :, None])[:, :, 0] * weights[:, None]
    inverse = np.linalg.inv(left)
    covariance = inverse @ (scores.T @ scores) @ inverse
    return change, distance, math.sqrt(max(covariance[0, 0], covariance[1, 1], 0.0))


def _measured(level: _Level, place: _Place) -> _Blocks:
    """Fit gain and displacement of every block, once the reference is moved back from `place`."""
    height, width = level.reference.shape
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = np.array([place.x, place.y]) / level.factor
    matrix = np.column_stack([place.scale * np.eye(2), middle - place.scale * middle + shift])
    moved = cv2.warpAffine(level.reference, matrix, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    reach = np.abs(level.centres * place.scale + shift) + place.scale * _BLOCK / 2
    inside = np.all(reach <= middle + 1, axis=1)
    inside &= np.mean(inside) > 0.5  # a place that leaves less of the picture is none
    products = np.stack([_means(one * moved) for one in level.basis], 1)
    energy = _means(moved * moved)
    solved = np.linalg.solve(level.normal, products[:, :, None])[:, :, 0]
    gain = np.where(np.abs(solved[:, 0]) < 1e-6, 1e-6, solved[:, 0])
    left_over = np.maximum(energy - np.sum(products * solved, 1), 0.02 * energy) + 1e-6
    normal = level.normal
    gradients = normal[:, 1:, 1:] - normal[:, 1:, :1] * normal[:, :1, 1:] / normal[:, :1, :1]
    return _Blocks(
        shift=-solved[:, 1:] / gain[:, None],
        information=gradients * (gain**2 / left_over)[:, None, None],
        correlation=products[:, 0] / np.sqrt(normal[:, 0, 0] * energy + 1e-9),
        textured=inside & (normal[:, 0, 0] > _TEXTURE**2) & (energy > _TEXTURE**2),
    )


def _means(values: _Values) -> _Numbers:
    """Return the mean of each whole block, in reading order."""
    rows, columns = values.shape[0] // _BLOCK, values.shape[1] // _BLOCK
    whole = values[: rows * _BLOCK, : columns * _BLOCK]
    return np.asarray(cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_AREA), np.float64).ravel()


def _band(values: _Values) -> _Values:
    return _smooth(values, 1.0) - _smooth(values, 3.0)


def _smooth(values: _Values, sigma: float) -> _Values:
    return np.asarray(cv2.GaussianBlur(values, (0, 0), sigma), np.float32)


def _derivative(values: _Values, across: int, down: int) -> _Values:
    return np.asarray(cv2.Sobel(values, cv2.CV_32F, across, down, ksize=3, scale=1 / 8), np.float32)


def _halved(values: _Values) -> _Values:
    rows, columns = values.shape[0] // 2, values.shape[1] // 2
    whole = values[: 2 * rows, : 2 * columns]
    return np.asarray(cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_AREA), np.float32)
