"""Every step does what its parameters say: means, variances and spectra against their formulas.

A wave of amplitude 100 keeps its amplitude to within 0.01 when levels are rounded: the rounding error, of variance
1/12, is averaged over some 40,000 pixels. What a tolerance allows beyond that is said beside it.
"""

import numpy as np
import pytest
from degradations import error, flat, gain, photo, wave
from PIL import Image

from prep.degrade import STEPS, apply, realise
from prep.degrade.optics import KERNELS
from schemas.recipes import Chain
from schemas.steps import USED_BY

NOISES = {
    "gaussian": {"sigma": 12.0},
    "poisson": {"scale": 1.0},
    "shot_read": {"shot": 0.01, "read": 3.0},
    "speckle": {"sigma": 20.0},
    "salt_pepper": {"amount": 0.05, "salt": 0.3},
}
EVERY = [
    {"step": name, **({USED_BY[name][0]: word} if name in USED_BY else {})}
    for name in STEPS
    for word in (USED_BY[name][1] if name in USED_BY else [""])
]
NAMES = [" ".join(step.values()) for step in EVERY]


def do(pixels, step, seed=1, **parameters):
    """Apply one step with all its parameters given."""
    return apply(pixels, [{"step": step, **parameters}], seed)


def noise_of(kind, level=128, side=256, gray=False, **parameters):
    """Return what a noise adds to an even picture."""
    return do(flat(level, side), "noise", kind=kind, gray=gray, **parameters).astype(float) - level


# Every step


@pytest.mark.parametrize("step", EVERY, ids=NAMES)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 9), (9, 1), (3, 5), (8, 8)])
def test_a_picture_of_any_size_survives_every_step(step, size):
    for pixels in (photo(*size), np.zeros((*size, 3), np.uint8), np.full((*size, 3), 255, np.uint8)):
        for seed in (1, 2):
            changed = apply(pixels, realise(Chain(steps=[step]), seed), seed)
            assert changed.shape == (*size, 3) and changed.dtype == np.uint8


@pytest.mark.parametrize("step", EVERY, ids=NAMES)
def test_every_step_changes_a_photograph_leaves_its_input_alone_and_repeats_itself(step):
    original = photo()
    original.setflags(write=False)
    steps = realise(Chain(steps=[step]), 3)
    changed = apply(original, steps, 3)
    assert np.array_equal(original, photo()) and not np.array_equal(changed, original)
    assert changed.flags.c_contiguous and np.array_equal(apply(photo(), steps, 3), changed)


COLOURED = {"color_cast", "chromatic_aberration", "moire", "sepia", "avif", "webp", "block_noise"}


@pytest.mark.parametrize(
    "step", [one for one in EVERY if one["step"] not in COLOURED], ids=lambda s: " ".join(s.values())
)
def test_gray_stays_gray(step):
    gray = np.repeat(photo()[:, :, :1], 3, axis=2)
    shared = {"gray_probability": 1.0} if step["step"] == "noise" else {}
    changed = apply(gray, realise(Chain(steps=[step | shared]), 1), 1).astype(int)
    # JPEG rounds colour differences of 0 on its way through YCbCr; no other step makes any.
    assert np.abs(changed - changed[:, :, :1]).max() <= (1 if step["step"] == "jpeg" else 0)


# Blur: the amplitude of a wave falls as the kernel's transfer function says


@pytest.mark.parametrize("frequency", [0.03, 0.06, 0.1])
@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0])
def test_a_gaussian_blur_has_the_transfer_function_of_a_gaussian(sigma, frequency):
    before = wave(frequency)
    after = do(before, "blur", kernel="gaussian", sigma=sigma)
    expected = np.exp(-2 * (np.pi * sigma * frequency) ** 2)
    # The kernel is cut at 3σ (0.3 % of its weight) and its weights are rounded to 1/256.
    assert gain(before, after, 30) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("frequency", [0.03, 0.1, 0.2])
def test_a_box_blur_has_the_transfer_function_of_a_box(frequency):
    before = wave(frequency)
    expected = np.sin(np.pi * 7 * frequency) / (7 * np.sin(np.pi * frequency))  # Dirichlet's kernel of 7 pixels
    assert gain(before, do(before, "blur", kernel="box", radius=3.0), 30) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 135.0])
def test_motion_blurs_along_its_path_and_hardly_across(angle):
    along, across = wave(0.05, angle), wave(0.05, angle + 90)
    moved = {"kernel": "motion", "length": 11.0, "angle": angle}
    # A path is a box of its length whose ends fade over a pixel, a box of 1: a product of two sinc functions. Sampling a
    # turned path at whole pixels misses that by up to 2 %.
    expected = np.sinc(0.05 * 11) * np.sinc(0.05)
    assert gain(along, do(along, "blur", **moved), 30) == pytest.approx(expected, abs=0.02)
    # Sideways it fades to nothing over a pixel, a triangle: sinc².
    assert gain(across, do(across, "blur", **moved), 30) == pytest.approx(np.sinc(0.05) ** 2, abs=0.02)


@pytest.mark.parametrize("frequency", [0.03, 0.06, 0.1])
def test_defocus_has_the_transfer_function_of_a_disk(frequency):
    before = wave(frequency, angle=20)
    places = (np.arange(10_000) + 0.5) / 10_000 * 12 - 6
    chords = np.sqrt(36 - places**2)  # what a disk of radius 6 lets through at each distance
    expected = (chords * np.cos(2 * np.pi * frequency * places)).sum() / chords.sum()
    # Its edge fades over a pixel, a sixth of the radius, where the ideal one is sharp: within 2 %.
    assert gain(before, do(before, "blur", kernel="defocus", radius=6.0), 30) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("angle", [0.0, 30.0, 120.0])
def test_an_anisotropic_blur_has_a_deviation_for_each_axis(angle):
    for turned, sigma in ((angle, 3.0), (angle + 90, 1.0)):
        before = wave(0.08, turned)
        after = do(before, "blur", kernel="anisotropic", sigma=3.0, sigma_y=1.0, angle=angle)
        assert gain(before, after, 30) == pytest.approx(np.exp(-2 * (np.pi * sigma * 0.08) ** 2), abs=0.01)


def test_shapes_between_peak_and_plateau_follow_their_formulas():
    at = {"sigma": 2.0, "angle": 0.0, "size": 21}
    for beta in (0.5, 1.0, 3.0):
        general, plateau = KERNELS["generalized_gaussian"](**at, beta=beta), KERNELS["plateau"](**at, beta=beta)
        distance = np.arange(11) / 2  # in standard deviations
        assert np.allclose(general[10, 10:] / general[10, 10], np.exp(-0.5 * distance ** (2 * beta)))
        assert np.allclose(plateau[10, 10:] / plateau[10, 10], 1 / (1 + distance ** (2 * beta)))
        assert np.isclose(general.sum(), 1) and np.isclose(plateau.sum(), 1)
    assert np.allclose(KERNELS["generalized_gaussian"](**at, beta=1.0), KERNELS["anisotropic"](**at))


def bessel(values):
    """Return J₁ by its power series (Abramowitz and Stegun, 9.1.10)."""
    terms = [values / 2]
    for m in range(1, 80):
        terms.append(terms[-1] * -((values / 2) ** 2) / (m * (m + 1)))
    return sum(terms)


@pytest.mark.parametrize("cutoff", [0.8, 1.2, 1.8])
def test_a_sinc_keeps_what_is_below_its_cutoff_and_nothing_above(cutoff):
    places = np.arange(-10, 11)
    distance = np.hypot(places, places[:, None])
    with np.errstate(invalid="ignore"):
        kernel = np.where(
            distance > 0, cutoff * bessel(cutoff * distance) / (2 * np.pi * distance), cutoff**2 / (4 * np.pi)
        )
    for share in (0.4, 0.5, 1.5, 2.0):
        frequency = share * cutoff / (2 * np.pi)
        before = wave(frequency)
        after = do(before, "blur", kernel="sinc", cutoff=cutoff, size=21)
        expected = (kernel * np.cos(2 * np.pi * frequency * places)).sum() / kernel.sum()
        assert gain(before, after, 30) == pytest.approx(expected, abs=0.01)
        # Cut to 21 pixels the ideal filter rings by up to a fifth where it passes.
        assert abs(expected - 1) < 0.2 if share < 1 else abs(expected) < 0.05


@pytest.mark.parametrize("kernel", ["motion", "defocus", "anisotropic", "plateau", "sinc"])
def test_a_kernel_keeps_the_mean_and_moves_nothing(kernel):
    spot = flat(0, 101)
    spot[40:61, 40:61] = 200
    numbers = {"length": 9.0, "radius": 4.0, "sigma": 2.0, "beta": 1.5, "cutoff": 1.5, "angle": 40.0}
    uses = {name: numbers[name] for name in USED_BY["blur"][1][kernel] if name in numbers}
    blurred = do(spot, "blur", kernel=kernel, **uses)[:, :, 1].astype(float)
    places = np.arange(101)
    # Rounding to whole levels loses up to half a level of faint tails; a shift of a tenth of a pixel would show.
    assert blurred.mean() == pytest.approx(spot.mean(), rel=0.03)
    assert (blurred.sum(0) * places).sum() / blurred.sum() == pytest.approx(50, abs=0.1)
    assert (blurred.sum(1) * places).sum() / blurred.sum() == pytest.approx(50, abs=0.1)


@pytest.mark.parametrize("amount", [0.5, 2.0])
def test_sharpening_adds_what_the_blur_takes(amount):
    before = wave(0.1, amplitude=30)
    expected = 1 + amount * (1 - np.exp(-2 * (np.pi * 1.5 * 0.1) ** 2))
    after = do(before, "sharpen", sigma=1.5, amount=amount)
    assert gain(before, after, 30) == pytest.approx(expected, abs=0.01 * (1 + amount))  # as for the blur, times amount


# Scaling


def test_scaling_by_area_to_a_quarter_averages_four_pixels_and_draws_lines_between():
    there_and_back = {"factor": 0.25, "kernel": "area", "kernel_back": "bilinear", "steps": []}
    low, at_zero, above = wave(0.02), wave(0.25), wave(0.4)
    # A box of 4 down, a triangle of 4 up (sinc²).
    expected = np.sin(np.pi * 4 * 0.02) / (4 * np.sin(np.pi * 0.02)) * np.sinc(4 * 0.02) ** 2
    assert gain(low, do(low, "resize", **there_and_back), 30) == pytest.approx(expected, abs=0.01)
    assert gain(at_zero, do(at_zero, "resize", **there_and_back), 30) == pytest.approx(0, abs=0.01)
    # Beyond the new limit of 1/8 nothing stays in place; aliases lie elsewhere.
    assert gain(above, do(above, "resize", **there_and_back), 30) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic", "area", "lanczos"])
@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_scaling_and_back_keeps_slow_waves_in_place(kernel, factor):
    before = wave(0.02)
    after = do(before, "resize", factor=factor, kernel=kernel, kernel_back=kernel, steps=[])
    # The worst of them, a box of 2 and its repetition, keeps sinc(0.04)² = 0.995 of it.
    assert gain(before, after, 30) == pytest.approx(1, abs=0.02)


def test_nearest_to_a_half_and_back_repeats_every_other_pixel():
    after = do(photo(), "resize", factor=0.5, kernel="nearest", kernel_back="nearest", steps=[])
    assert np.array_equal(after[::2, ::2], photo()[::2, ::2]) and np.array_equal(after[1::2, 1::2], photo()[::2, ::2])


# Noise


def expected_deviation(kind, level):
    """Return the standard deviation that the formulas give, in levels.

    Rounding to whole levels adds 1/12; rounding a fraction f up or down adds f (1 - f), from 0 to 1/4: 1/6 or so.
    """
    share = level / 255
    variances = {
        "gaussian": 12.0**2,
        "poisson": share * 256 * (255 / 256) ** 2,  # a count's variance is its mean, here share · 256
        "shot_read": 0.01 * share * 255**2 + 3.0**2,
        "speckle": (20.0 * share) ** 2,
    }
    return np.sqrt(variances[kind] + (1 / 6 if kind == "poisson" else 1 / 12))


@pytest.mark.parametrize("level", [60, 128, 190])
@pytest.mark.parametrize("kind", ["gaussian", "poisson", "shot_read", "speckle"])
def test_noise_has_its_deviation_at_every_level_and_no_bias(kind, level):
    drawn, deviation = noise_of(kind, level, **NOISES[kind]), expected_deviation(kind, level)
    # Of n draws the mean is off by σ/√n, the deviation by σ/√(2n); a count's distribution cut to 4096 steps lacks
    # 1/8192 on either side, 0.3 % of the deviation, as the 1/12 more or less by which 1/6 may be wrong is.
    assert abs(drawn.mean()) < 5 * deviation / np.sqrt(drawn.size) + 0.01
    assert abs(drawn.std() - deviation) < 5 * deviation / np.sqrt(2 * drawn.size) + 0.003 * deviation


def test_light_is_counted_so_dark_pixels_have_skewed_noise_and_black_none():
    drawn = noise_of("poisson", 20, scale=1.0)
    skew = ((drawn - drawn.mean()) ** 3).mean() / drawn.std() ** 3
    # A Poisson variable's skew is 1/√mean; of n draws it is off by √(6/n); the tail that is cut weighs some 0.02.
    assert skew == pytest.approx(1 / np.sqrt(20 / 255 * 256), abs=5 * np.sqrt(6 / drawn.size) + 0.02)
    assert not noise_of("poisson", 0, scale=3.0).any() and not noise_of("speckle", 0, sigma=50.0).any()


def test_a_scale_multiplies_the_noise_of_counting():
    deviations = [noise_of("poisson", 128, scale=scale).std() for scale in (0.5, 2.0)]
    counting = expected_deviation("poisson", 128) ** 2 - 1 / 6
    for scale, deviation in zip((0.5, 2.0), deviations, strict=True):
        # Of 196608 draws a variance is off by √(2/n), 1.6 % at five times that; and rounding by 1/12 of some 30.
        assert deviation**2 == pytest.approx(scale**2 * counting + 1 / 6, rel=0.02)


@pytest.mark.parametrize("kind", ["gaussian", "poisson", "shot_read", "speckle"])
def test_the_spectrum_of_noise_is_flat(kind):
    drawn = noise_of(kind, side=512, **NOISES[kind])[:, :, 1]
    power = np.abs(np.fft.fft2(drawn - drawn.mean())) ** 2
    bands = power.reshape(8, 64, 8, 64).mean((1, 3)) / power.mean()
    # Powers are exponential, and each occurs twice: the mean of 64 · 64 of them is off by √2/64.
    assert np.abs(bands - 1).max() < 5 * np.sqrt(2) / 64


@pytest.mark.parametrize("kind", NOISES)
def test_gray_noise_is_shared_by_the_channels_and_other_noise_is_not(kind):
    drawn = noise_of(kind, gray=True, **NOISES[kind])
    assert (drawn == drawn[:, :, :1]).all() and drawn.any()
    red, green, blue = noise_of(kind, **NOISES[kind]).reshape(-1, 3).T
    for one, other in ((red, green), (green, blue), (red, blue), (red[1:], red[:-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(one.size)  # what independent draws stay below


def test_gray_noise_has_the_deviation_of_its_kind_too():
    for kind in ("gaussian", "poisson", "shot_read", "speckle"):
        drawn, deviation = noise_of(kind, gray=True, **NOISES[kind])[:, :, 0], expected_deviation(kind, 128)
        assert abs(drawn.std() - deviation) < 5 * deviation / np.sqrt(2 * drawn.size) + 0.003 * deviation


def test_salt_and_pepper_replace_their_shares_and_leave_the_rest():
    noisy = do(flat(100), "noise", kind="salt_pepper", gray=False, amount=0.05, salt=0.3)
    assert set(np.unique(noisy)) == {0, 100, 255}
    for level, share in ((255, 0.05 * 0.3), (0, 0.05 * 0.7)):
        count = noisy.size * share
        assert abs((noisy == level).sum() - count) < 5 * np.sqrt(count) + noisy.size / 65536  # shares in 65536ths


@pytest.mark.parametrize("kind", ["gaussian", "poisson", "shot_read", "speckle"])
def test_noise_at_the_ends_is_clipped_not_wrapped(kind):
    strong = {"sigma": 60.0} if "sigma" in NOISES[kind] else NOISES[kind]
    assert do(flat(255), "noise", kind=kind, gray=False, **strong).min() > 255 - 6 * 60
    assert (do(flat(250), "noise", kind=kind, gray=False, **strong) >= 250).mean() > 0.4
    assert (do(flat(5), "noise", kind=kind, gray=False, **strong) <= 5).mean() > 0.4


def test_block_noise_has_its_deviation_on_the_edges_of_blocks():
    drawn = do(flat(), "block_noise", sigma=8.0).astype(float) - 128
    for lines, variance in ((drawn[::8, 4::8], 64), (drawn[4::8, ::8], 64), (drawn[::8, ::8], 128)):
        deviation = np.sqrt(variance + (1 if variance == 64 else 2) / 12)  # where both cross, both are added
        assert abs(lines.std() - deviation) < 5 * deviation / np.sqrt(2 * lines.size)
    assert not drawn[np.arange(256) % 8 > 0][:, np.arange(256) % 8 > 0].any()


# Compression


def test_jpeg_leaves_edges_where_its_blocks_meet():
    smooth = do(photo(96, 120), "blur", kernel="gaussian", sigma=3.0)
    steps = np.abs(np.diff(do(smooth, "jpeg", quality=8, subsampling="4:4:4").astype(float), axis=1)).mean((0, 2))
    before = np.abs(np.diff(smooth.astype(float), axis=1)).mean((0, 2))
    edges = np.arange(len(steps)) % 8 == 7
    assert before[edges].mean() < 1.2 * before[~edges].mean()
    assert steps[edges].mean() > 2 * steps[~edges].mean()  # a block at quality 8 is flat but for a few waves


@pytest.mark.parametrize("codec", ["jpeg", "webp", "avif"])
def test_a_lower_quality_loses_more(codec):
    also = {"subsampling": "4:4:4"} if codec == "jpeg" else {}
    gray = np.repeat(photo()[:, :, :1], 3, 2)  # two of them always halve the resolution of colours
    errors = [error(do(gray, codec, quality=quality, **also), gray) for quality in (95, 60, 30, 5)]
    assert errors == sorted(errors) and 0 < errors[0] < errors[-1] / 2


# Tone and colour


def ramp():
    """Return every gray level once."""
    return np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)


def test_a_cast_multiplies_each_channel():
    cast = do(ramp(), "color_cast", red=1.25, green=1.0, blue=0.5).reshape(-1, 3).astype(float)
    for channel, factor in enumerate((1.25, 1.0, 0.5)):
        assert np.abs(cast[:, channel] - np.minimum(255, np.arange(256) * factor)).max() <= 0.5


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.2])
def test_gamma_is_a_power_of_brightness(gamma):
    levels = do(ramp(), "gamma", gamma=gamma)[:, :, 0].ravel()
    assert np.abs(levels - 255 * (np.arange(256) / 255) ** gamma).max() <= 0.5
    assert levels[0] == 0 and levels[-1] == 255


@pytest.mark.parametrize("levels", [2, 5, 16, 255, 256])
def test_banding_leaves_so_many_levels_evenly_spaced_from_black_to_white(levels):
    left = np.unique(do(ramp(), "banding", levels=levels))
    assert left.size == levels and left[0] == 0 and left[-1] == 255
    assert np.abs(left - np.linspace(0, 255, levels)).max() <= 0.5


def test_bands_are_equally_wide():
    assert np.unique(do(ramp(), "banding", levels=16), return_counts=True)[1].tolist() == [16 * 3] * 16


def test_fading_loses_contrast_and_lifts_black():
    faded = do(ramp(), "fade", contrast=0.6, lift=40.0)[:, :, 0].ravel()
    assert np.abs(faded - (0.6 * np.arange(256) + 40)).max() <= 0.5


def test_grayscale_is_brightness_as_pillow_weighs_it():
    expected = np.asarray(Image.fromarray(photo()).convert("L")).astype(int)
    assert np.abs(do(photo(), "grayscale") - expected[:, :, None]).max() <= 1


def test_sepia_tones_gray_brown_in_proportion_to_its_strength():
    full = do(flat(100), "sepia", strength=1.0)[0, 0]
    assert np.abs(full - np.array([135.1, 120.3, 93.7])).max() <= 1  # 100 times the sums of the matrix's rows
    half = do(flat(100), "sepia", strength=0.5)[0, 0]
    assert np.abs(half - (100 + full.astype(float)) / 2).max() <= 1
    assert np.array_equal(do(photo(), "sepia", strength=0.0), photo())


# The air and the lens


def test_haze_takes_contrast_by_its_transmission_and_moves_towards_the_air():
    before = wave(0.05)
    hazy = do(before, "haze", pattern="constant", transmission=0.4, airlight=0.9)
    assert gain(before, hazy, 1) == pytest.approx(0.4, abs=0.005)  # shares are rounded to 1/256, here 0.3984
    black, white = (
        do(flat(level, 4), "haze", pattern="constant", transmission=0.4, airlight=0.9)[0, 0, 0] for level in (0, 255)
    )
    assert black == pytest.approx(0.9 * 255 * 0.6, abs=1) and white == pytest.approx(255 * (0.4 + 0.9 * 0.6), abs=1)


@pytest.mark.parametrize(("angle", "rows", "columns"), [(90.0, slice(None, None, -1), 0), (0.0, 0, slice(None))])
def test_graded_haze_grows_evenly_from_the_near_side_to_the_far_side(angle, rows, columns):
    hazy = do(flat(0), "haze", pattern="gradient", transmission=0.9, far=0.1, angle=angle, airlight=1.0)
    path = hazy[rows, columns, 0].astype(float)  # of black the air's light alone is left
    assert np.abs(path - np.linspace(0.1, 0.9, 256) * 255).max() < 1.1  # shares in 256ths, then whole levels
    assert not np.ptp(hazy, axis=1 if angle else 0).any()


@pytest.mark.parametrize("shift", [5.0, -3.0])
def test_red_moves_outwards_and_blue_inwards_in_proportion_to_the_distance_from_the_middle(shift):
    down, across = np.mgrid[0:201, 0:201]
    for column in (180, 140):
        spot = 250 * np.exp(-((across - column) ** 2 + (down - 100) ** 2) / (2 * 3.0**2))
        moved = do(np.repeat(np.rint(spot)[:, :, None], 3, 2).astype(np.uint8), "chromatic_aberration", shift=shift)
        centres = (moved * across[:, :, None]).sum((0, 1)) / moved.sum((0, 1))
        outwards = shift * (column - 100) / np.hypot(100, 100)  # of the corner's shift the distance's share
        assert centres - column == pytest.approx([outwards, 0, -outwards], abs=0.05)  # places are in 1/32 of a pixel


# Patterns


def test_scan_lines_are_a_wave_of_their_period_and_strength():
    rows = do(flat(200), "scanlines", period=8.0, strength=0.3, phase=0.25).astype(float)
    assert not np.ptp(rows, axis=(1, 2)).any()
    spectrum = np.fft.rfft(rows[:, 0, 0]) / 128
    assert np.abs(spectrum[1:]).argmax() + 1 == 256 / 8
    assert np.abs(spectrum[32]) == pytest.approx(200 * 0.3 / 2, abs=0.5)  # levels are rounded twice
    assert rows.mean() == pytest.approx(200 * (1 - 0.3 / 2), abs=0.5)
    assert np.abs(np.delete(np.abs(spectrum), [0, 32])).max() < 1


def test_a_moire_is_a_wave_of_its_length_direction_and_strength_apart_in_each_channel():
    period, angle = 256 / 26, np.degrees(np.arctan2(10, 24))  # 24 waves across, 10 up
    added = do(flat(), "moire", period=period, angle=angle, strength=20.0, color=0.6, phase=0.1).astype(float) - 128
    spectrum = np.fft.fft2(added, axes=(0, 1)) / (256 * 256 / 2)
    half = np.abs(spectrum[:, :129])
    assert {np.unravel_index(half[:, :, channel].argmax(), half.shape[:2]) for channel in range(3)} == {(246, 24)}
    peaks = spectrum[246, 24]
    assert np.abs(peaks) == pytest.approx([20, 20, 20], abs=0.1)
    apart = np.angle(peaks[1:] / peaks[:-1]) / (2 * np.pi)
    assert apart == pytest.approx([0.2, 0.2], abs=0.01)  # 0.6 of a third of a period
    even = do(flat(), "moire", period=period, angle=angle, strength=20.0, color=0.0, phase=0.1)
    assert (even == even[:, :, :1]).all()


def test_scratches_are_white_upright_and_as_wide_as_told():
    scratched = do(flat(100, 400), "scratches", count=1, width=3, opacity=1.0)[:, :, 0]
    rows = (scratched > 100).any(1)
    assert scratched.min() == 100 and scratched.max() == 255 and 0.2 * 400 - 1 <= rows.sum() <= 400
    # What a row's pixels are covered by adds up to the width; levels are rounded.
    assert ((scratched - 100.0) / 155).sum(1)[rows] == pytest.approx(3, abs=0.05)
    counts = [(do(flat(100, 400), "scratches", count=n, width=1, opacity=0.5) > 100).sum() for n in (0, 5, 50)]
    assert counts[0] == 0 < counts[1] < counts[2]


def test_dust_covers_what_its_density_and_radius_say_black_and_white_alike():
    dusty = do(flat(100, 1000), "dust", density=2000.0, radius=3.0, opacity=1.0)[:, :, 0].astype(float)
    dark, light = ((100 - dusty).clip(0) / 100).sum(), ((dusty - 100).clip(0) / 155).sum()
    # 1000 disks of each whose radii are even between 1 and 3: mean r² is (1² + 1·3 + 3²) / 3, and 1/12 more for edges
    # that fade. A disk's area varies by 60 % of its mean, that of 1000 by 2 %; 3 % lie on others, less beyond the border.
    expected = 1000 * np.pi * (13 / 3 + 1 / 12)
    assert dark == pytest.approx(expected, rel=0.13) and light == pytest.approx(expected, rel=0.13)
    assert np.array_equal(do(photo(), "dust", density=0.0, radius=6.0, opacity=1.0), photo())
