import numpy as np
import pytest
from PIL import Image, ImageFilter
from pydantic import ValidationError

from prep.degrade import DEGRADATIONS, Draws, box_blur, degrade, gaussian_blur
from schemas.recipes import RECIPES, JpegArtifacts, Superresolution, parse_recipe, recipe_text

PLAIN = {"blur_radius": 0, "add_noise": False}  # a superresolution that does nothing unless told to

RECIPES_TRIED = {
    "blur": Superresolution(add_noise=False),
    "box": Superresolution(blur_type="box", add_noise=False),
    "both": Superresolution(blur_type="both", add_noise=False),
    "noise": Superresolution(blur_type="none", noise_level=0.05),
    "downscale": Superresolution(**PLAIN, downscale_factor=4),
    "all of superresolution": Superresolution(downscale_factor=2.5, jpeg_quality=40),
    "jpeg": JpegArtifacts(),
    "jpeg in range": JpegArtifacts(quality_mode="range", quality_range=(1, 100)),
    "jpeg of list": JpegArtifacts(quality_mode="random", quality_list=(5, 25, 50, 90)),
    "all of jpeg": JpegArtifacts(
        compression_rounds=3, pre_blur=True, add_noise=True, enhance_blocks=True, subsampling="4:2:2"
    ),
}
RANDOM = {"noise", "all of superresolution", "jpeg in range", "jpeg of list", "all of jpeg"}


def photo(height=96, width=120):
    """Draw a picture with flat parts, edges, colours and fine texture; a smaller one is its corner."""
    down, across = np.mgrid[0:96, 0:120]
    picture = np.stack([down * 2 % 256, across * 2 % 256, (down + across) % 256], 2).astype(np.uint8)
    picture[20:60, 30:80] = (220, 40, 90)
    picture[30:50, 40:70] = np.random.default_rng(0).integers(0, 256, (20, 30, 3))
    return np.ascontiguousarray(picture[:height, :width])


def error(pixels, other):
    """Return the root of the mean squared difference."""
    return float(np.sqrt(np.mean((pixels.astype(float) - other) ** 2)))


def gradient(pixels):
    """Return the energy of the differences between neighbours."""
    values = pixels.astype(float)
    return float((np.diff(values, axis=0) ** 2).sum() + (np.diff(values, axis=1) ** 2).sum())


# Every recipe


def test_every_recipe_has_its_function_and_is_tried_below():
    assert DEGRADATIONS.keys() == RECIPES.keys() == {recipe.type for recipe in RECIPES_TRIED.values()}


@pytest.mark.parametrize("name", RECIPES_TRIED)
def test_a_recipe_and_a_seed_give_the_same_bytes_again_and_leave_the_original_alone(name):
    original = photo()
    first = degrade(original, RECIPES_TRIED[name], 7)
    assert np.array_equal(original, photo())
    assert np.array_equal(degrade(photo(), RECIPES_TRIED[name], 7), first)
    assert first.shape == original.shape and first.dtype == np.uint8 and first.flags.c_contiguous
    assert not np.array_equal(first, original)


@pytest.mark.parametrize("name", RECIPES_TRIED)
def test_another_seed_gives_another_picture_where_something_is_drawn_and_only_there(name):
    pictures = {degrade(photo(), RECIPES_TRIED[name], seed).tobytes() for seed in range(8)}
    assert len(pictures) > 1 if name in RANDOM else len(pictures) == 1


@pytest.mark.parametrize("name", RECIPES_TRIED)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 5), (8, 8)])
def test_pictures_of_any_size_survive(name, size):
    for pixels in (photo(*size), np.zeros((*size, 3), np.uint8), np.full((*size, 3), 255, np.uint8)):
        degraded = degrade(pixels, RECIPES_TRIED[name], 1)
        assert degraded.shape == (*size, 3) and degraded.dtype == np.uint8


@pytest.mark.parametrize("name", ["blur", "box", "both", "downscale", "jpeg"])
def test_gray_stays_gray_where_no_noise_is_added(name):
    gray = np.repeat(photo()[:, :, :1], 3, axis=2)
    degraded = degrade(gray, RECIPES_TRIED[name], 1).astype(int)
    assert np.abs(degraded - degraded[:, :, :1]).max() <= 1


# Superresolution


def test_a_superresolution_without_anything_to_do_changes_nothing():
    assert np.array_equal(degrade(photo(), Superresolution(**PLAIN), 1), photo())
    assert np.array_equal(degrade(photo(), Superresolution(blur_type="none", add_noise=False), 1), photo())
    assert np.array_equal(degrade(photo(), Superresolution(**PLAIN, downscale_factor=1), 1), photo())


@pytest.mark.parametrize("shape", ["gaussian", "box", "both"])
def test_a_wider_blur_leaves_less_of_the_edges_and_the_same_brightness(shape):
    blurred = [
        degrade(photo(), Superresolution(blur_type=shape, blur_radius=radius, add_noise=False), 1)
        for radius in (0.5, 1, 2, 4, 8)
    ]
    energies = [gradient(pixels) for pixels in (photo(), *blurred)]
    assert energies == sorted(energies, reverse=True) and energies[-1] < energies[0] / 20
    inside = np.full((64, 64, 3), 90, np.uint8)
    inside[24:40, 24:40] = 210  # a blur that stays within the picture moves light, and loses none
    recipe = Superresolution(blur_type=shape, blur_radius=3, add_noise=False)
    assert abs(degrade(inside, recipe, 1).mean() - inside.mean()) < 0.5


def test_both_blurs_are_box_then_gaussian_of_seven_tenths_each():
    both = degrade(photo(), Superresolution(blur_type="both", blur_radius=3, add_noise=False), 1)
    assert np.array_equal(both, gaussian_blur(box_blur(photo(), 0.7 * 3), 0.7 * 3))
    assert not np.array_equal(both, box_blur(gaussian_blur(photo(), 0.7 * 3), 0.7 * 3))


@pytest.mark.parametrize("radius", [0.3, 0.5, 1, 1.4, 2, 2.7, 5])
def test_the_box_blur_is_pillows_away_from_borders(radius):
    expected = np.asarray(Image.fromarray(photo()).filter(ImageFilter.BoxBlur(radius))).astype(int)
    border = int(radius) + 1
    inside = (slice(border, -border), slice(border, -border))
    assert np.abs(box_blur(photo(), radius)[inside] - expected[inside]).max() <= 1


@pytest.mark.parametrize("sigma", [0.5, 1, 2, 4])
def test_the_gaussian_blur_has_the_standard_deviation_it_is_given(sigma):
    edge = np.zeros((9, 201, 3), np.uint8)
    edge[:, 101:] = 255  # blurred, its slope is the kernel
    slope = np.diff(gaussian_blur(edge, sigma)[4, :, 0].astype(float)) / 255
    places = np.arange(200) - 100
    kernel = np.exp(-(places**2) / (2 * sigma**2))  # sampled at whole pixels: narrower than sigma if that is small
    expected = np.sqrt((kernel * places**2).sum() / kernel.sum())
    assert abs(slope.sum() - 1) < 1e-9 and abs((slope * places).sum()) < 0.05
    # Levels are rounded to 1/255, and the tail is cut off where it falls below half of that.
    assert np.sqrt((slope * places**2).sum()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("level", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("recipe", ["superresolution", "jpeg_artifacts"])
def test_noise_has_the_level_it_is_given_and_keeps_the_mean(recipe, level):
    flat = np.full((1024, 1024, 3), 128, np.uint8)
    if recipe == "superresolution":
        noisy = degrade(flat, Superresolution(blur_type="none", noise_level=level), 3)
    else:  # compressed at the highest quality, once, without loss of colour: off by a level or so
        best = {"quality": 100, "subsampling": "4:4:4"}
        noisy = degrade(flat, JpegArtifacts(**best, add_noise=True, noise_level=level), 3)
    difference = noisy.astype(float) - 128
    # Rounding to whole levels adds a variance of 1/12; of n draws, the mean is off by σ/√n, the deviation by σ/√(2n).
    expected, count = np.sqrt((level * 255) ** 2 + 1 / 12), difference.size
    slack = 0 if recipe == "superresolution" else 0.25
    assert abs(difference.mean()) < 5 * expected / np.sqrt(count) + slack
    assert abs(difference.std() - expected) < 5 * expected / np.sqrt(2 * count) + slack
    if recipe == "superresolution":  # channels and neighbours are drawn apart
        red, green = difference[..., 0].ravel(), difference[..., 1].ravel()
        assert abs(np.corrcoef(red, green)[0, 1]) < 5 / np.sqrt(red.size)
        assert abs(np.corrcoef(red[1:], red[:-1])[0, 1]) < 5 / np.sqrt(red.size)


def test_noise_at_the_ends_of_the_range_is_clipped_not_wrapped():
    recipe = Superresolution(blur_type="none", noise_level=0.05)
    assert degrade(np.zeros((64, 64, 3), np.uint8), recipe, 1).max() < 100
    assert degrade(np.full((64, 64, 3), 255, np.uint8), recipe, 1).min() > 155


def test_a_larger_downscale_loses_more():
    errors = [
        error(degrade(photo(), Superresolution(**PLAIN, downscale_factor=f), 1), photo()) for f in (1, 2, 4, 8, 16)
    ]
    assert errors == sorted(errors) and errors[0] == 0 < errors[1]
    assert degrade(photo(3, 5), Superresolution(**PLAIN, downscale_factor=64), 1).std(axis=(0, 1)).max() == 0


def test_the_last_step_of_a_superresolution_is_a_jpeg_of_its_quality():
    errors = [error(degrade(photo(), Superresolution(**PLAIN, jpeg_quality=q), 1), photo()) for q in (95, 60, 30, 5)]
    assert errors == sorted(errors) and errors[0] > 0
    noisy = Superresolution(blur_type="none", noise_level=0.1)
    before = degrade(photo(), noisy, 1)
    after = degrade(photo(), noisy.model_copy(update={"jpeg_quality": 30}), 1)
    assert np.array_equal(after, degrade(before, JpegArtifacts(quality=30), 1))


# JPEG


def test_a_lower_quality_loses_more():
    recipes = [JpegArtifacts(quality=quality, subsampling="4:4:4") for quality in (100, 90, 70, 40, 20, 5, 1)]
    errors = [error(degrade(photo(), recipe, 1), photo()) for recipe in recipes]
    assert errors == sorted(errors)
    assert errors[0] < 1 < 20 < errors[-1]


def test_a_quality_is_drawn_from_the_whole_range_both_ends_included():
    recipe = JpegArtifacts(quality_mode="range", quality_range=(10, 12))
    fixed = {quality: degrade(photo(), JpegArtifacts(quality=quality), 1).tobytes() for quality in (10, 11, 12)}
    drawn = [degrade(photo(), recipe, seed).tobytes() for seed in range(60)]
    assert set(drawn) == set(fixed.values())


def test_a_quality_is_drawn_from_the_whole_list():
    recipe = JpegArtifacts(quality_mode="random", quality_list=(5, 50, 90))
    fixed = {degrade(photo(), JpegArtifacts(quality=quality), 1).tobytes() for quality in (5, 50, 90)}
    assert {degrade(photo(), recipe, seed).tobytes() for seed in range(60)} == fixed


def test_later_rounds_compress_at_a_decaying_quality():
    def rounds(count, decay):
        return degrade(photo(), JpegArtifacts(quality=80, compression_rounds=count, round_quality_decay=decay), 1)

    by_hand = degrade(
        degrade(degrade(photo(), JpegArtifacts(quality=80), 1), JpegArtifacts(quality=40), 1),
        JpegArtifacts(quality=20),
        1,
    )
    assert np.array_equal(rounds(3, 0.5), by_hand)
    assert error(rounds(3, 0.5), photo()) > error(rounds(3, 1.0), photo()) >= error(rounds(1, 0.5), photo())
    assert np.array_equal(rounds(50, 0.1), rounds(50, 0.1))  # the quality never falls below 1


def test_colours_are_subsampled_as_told_and_by_half_both_ways_otherwise():
    def compressed(subsampling):
        return degrade(photo(), JpegArtifacts(quality=90, subsampling=subsampling), 1)

    errors = [error(compressed(kind), photo()) for kind in ("4:4:4", "4:2:2", "4:2:0")]
    assert errors == sorted(errors) and errors[0] < errors[2]
    assert np.array_equal(compressed(None), compressed("4:2:0"))


def test_blur_and_noise_come_before_the_first_round():
    blurred = gaussian_blur(photo(), 3)
    assert np.array_equal(
        degrade(photo(), JpegArtifacts(pre_blur=True, pre_blur_radius=3), 1), degrade(blurred, JpegArtifacts(), 1)
    )
    noisy = degrade(photo(), Superresolution(blur_type="none", noise_level=0.1), 1)
    assert np.array_equal(
        degrade(photo(), JpegArtifacts(add_noise=True, noise_level=0.1), 1), degrade(noisy, JpegArtifacts(), 1)
    )


def test_stressed_blocks_differ_in_every_eighth_row_and_column_only():
    plain, stressed = (
        degrade(photo(), JpegArtifacts(enhance_blocks=on, block_noise_level=0.1), 1) for on in (False, True)
    )
    differs = (plain != stressed).any(axis=2)
    on_edges = np.zeros_like(differs)
    on_edges[::8] = on_edges[:, ::8] = True
    assert not differs[~on_edges].any()
    assert differs[on_edges].mean() > 0.9


def test_how_a_file_would_be_stored_changes_no_pixel():
    plain = degrade(photo(), JpegArtifacts(), 1)
    assert np.array_equal(degrade(photo(), JpegArtifacts(optimize=True, progressive=True), 1), plain)


# Draws


def test_draws_are_the_same_on_every_machine_and_version():
    raw = np.random.SFC64(5).random_raw(4)  # NumPy keeps this stream (NEP 19)
    draws = Draws(5)
    assert [draws.integer(10, 50) for _ in range(4)] == [10 + int(one) % 41 for one in raw]
    assert Draws(5).normal((2, 3)).shape == (2, 3) and Draws(5).normal((2, 3)).dtype == np.float32
    assert np.array_equal(Draws(5).normal((2, 3)).ravel(), Draws(5).normal((6,)))


def test_normal_draws_are_normal():
    values = Draws(1).normal((100_000,)).astype(float)
    error_of_mean = 1 / np.sqrt(values.size)
    assert abs(values.mean()) < 5 * error_of_mean and abs(values.std() - 1) < 5 * error_of_mean
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 5 * error_of_mean
    assert abs((np.abs(values) < 2).mean() - 0.9545) < 5 * error_of_mean
    assert 3.5 < np.abs(values).max() < 4.5


# Recipes as data


@pytest.mark.parametrize("name", RECIPES_TRIED)
def test_a_recipe_comes_back_from_its_text(name):
    recipe = RECIPES_TRIED[name]
    text = recipe_text(recipe)
    assert parse_recipe(text) == recipe
    assert recipe_text(parse_recipe(text)) == text


def test_a_recipes_text_leaves_out_what_changes_no_pixel_and_spells_out_defaults():
    assert (
        recipe_text(JpegArtifacts(optimize=True))
        == recipe_text(JpegArtifacts(progressive=True))
        == recipe_text(JpegArtifacts())
    )
    assert (
        recipe_text(JpegArtifacts(quality=25)) == recipe_text(JpegArtifacts()) != recipe_text(JpegArtifacts(quality=26))
    )
    assert recipe_text(Superresolution(blur_radius=2)) == recipe_text(Superresolution(blur_radius=2.0))


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (Superresolution, {"blur_radius": -1}),
        (Superresolution, {"blur_radius": 101}),
        (Superresolution, {"blur_type": "motion"}),
        (Superresolution, {"noise_level": -0.1}),
        (Superresolution, {"noise_level": 1.1}),
        (Superresolution, {"noise_level": float("nan")}),
        (Superresolution, {"jpeg_quality": 0}),
        (Superresolution, {"jpeg_quality": 101}),
        (Superresolution, {"downscale_factor": 0.5}),
        (Superresolution, {"downscale_factor": 65}),
        (Superresolution, {"sharpness": 1}),
        (JpegArtifacts, {"quality_mode": "best"}),
        (JpegArtifacts, {"quality": 0}),
        (JpegArtifacts, {"quality_range": (50, 10)}),
        (JpegArtifacts, {"quality_range": (0, 10)}),
        (JpegArtifacts, {"quality_range": (10,)}),
        (JpegArtifacts, {"quality_list": ()}),
        (JpegArtifacts, {"quality_list": (10, 101)}),
        (JpegArtifacts, {"compression_rounds": 0}),
        (JpegArtifacts, {"compression_rounds": 51}),
        (JpegArtifacts, {"round_quality_decay": 0}),
        (JpegArtifacts, {"round_quality_decay": 1.1}),
        (JpegArtifacts, {"subsampling": "4:1:1"}),
        (JpegArtifacts, {"pre_blur_radius": -1}),
        (JpegArtifacts, {"noise_level": 2}),
        (JpegArtifacts, {"block_noise_level": -1}),
        (JpegArtifacts, {"compression_rounds": 1.5}),
    ],
    ids=str,
)
def test_numbers_out_of_range_and_unknown_words_are_refused(recipe, options):
    with pytest.raises(ValidationError):
        recipe(**options)


def test_the_ends_of_ranges_are_in():
    Superresolution(blur_radius=100, noise_level=1, jpeg_quality=1, downscale_factor=64)
    JpegArtifacts(quality=100, quality_range=(1, 1), compression_rounds=50, round_quality_decay=1, noise_level=0)
