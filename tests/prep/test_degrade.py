import inspect
import json

import numpy as np
import pytest
from degradations import error, flat, gradient, photo
from PIL import Image, ImageFilter
from pydantic import ValidationError

from prep.degrade import STEPS, apply, degrade, draws, realise
from prep.degrade.draws import NORMAL, Draws, chance, look_up
from prep.degrade.optics import box_blur, gaussian_blur
from schemas.config_file import Findings, split_generator, validate
from schemas.datasets import DatasetConfig
from schemas.presets import PRESETS
from schemas.recipes import RECIPES, Chain, JpegArtifacts, Superresolution, degraded_at_source, recipe_text
from schemas.steps import STEP_MODELS, USED_BY

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
    **{f"preset {name}": Chain(preset=name) for name in PRESETS},
    "chain": Chain(
        steps=[{"step": "gamma"}, {"step": "noise"}, {"step": "jpeg"}, {"step": "moire"}], random_order=True
    ),
}
STEADY = {"blur", "box", "both", "downscale", "jpeg"}  # nothing is drawn


# Every recipe


def test_every_recipe_is_tried_below():
    assert RECIPES.keys() == {recipe.type for recipe in RECIPES_TRIED.values()}


@pytest.mark.parametrize("name", RECIPES_TRIED)
def test_a_recipe_and_a_seed_give_the_same_bytes_again_and_leave_the_original_alone(name):
    original = photo()
    original.setflags(write=False)  # as a decoded picture may be
    first = degrade(original, RECIPES_TRIED[name], 7)
    assert np.array_equal(original, photo())
    assert np.array_equal(degrade(photo(), RECIPES_TRIED[name], 7), first)
    assert first.shape == original.shape and first.dtype == np.uint8 and first.flags.c_contiguous
    assert not np.array_equal(first, original)


@pytest.mark.parametrize("name", RECIPES_TRIED)
def test_another_seed_gives_another_picture_where_something_is_drawn_and_only_there(name):
    pictures = {degrade(photo(), RECIPES_TRIED[name], seed).tobytes() for seed in range(8)}
    assert len(pictures) == 1 if name in STEADY else len(pictures) > 1


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
    even = flat(side=1024)
    if recipe == "superresolution":
        noisy = degrade(even, Superresolution(blur_type="none", noise_level=level), 3)
    else:  # compressed at the highest quality, once, without loss of colour: off by a level or so
        best = {"quality": 100, "subsampling": "4:4:4"}
        noisy = degrade(even, JpegArtifacts(**best, add_noise=True, noise_level=level), 3)
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
    assert Draws(5).words(16).tolist() == raw.view(np.uint16).tolist()
    assert Draws(5).words(7).tolist() == raw.view(np.uint16)[:7].tolist()
    assert Draws(5).uniform(4).tolist() == [(int(one) >> 11) / 2**53 for one in raw]
    assert chance(7, "blur") == chance(7, "blur") != chance(8, "blur")


@pytest.mark.parametrize("by_opencv", [True, False])
def test_looking_up_is_indexing_with_new_and_old_versions_of_opencv(by_opencv, monkeypatch):
    monkeypatch.setattr(draws, "_WORDS", by_opencv and draws._WORDS)
    words = Draws(1).words(70_001)
    for table in (np.arange(65536).astype(np.int8), np.arange(-32768, 32768, dtype=np.int16)):
        assert np.array_equal(look_up(table, words), table[words])


def test_chances_are_even():
    drawn = np.array([chance(seed, "here") for seed in range(20_000)])
    assert drawn.min() >= 0 and drawn.max() < 1
    # Of n even draws the mean is off by 1/√(12 n); a tenth of them, p = 0.1, by √(p (1 - p) n) in number.
    assert abs(drawn.mean() - 0.5) < 5 / np.sqrt(12 * drawn.size)
    counts = np.histogram(drawn, 10, (0, 1))[0]
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(0.09 * drawn.size)


def test_normal_draws_are_normal():
    values = NORMAL[Draws(1).words(100_000)]
    error_of_mean = 1 / np.sqrt(values.size)
    assert abs(values.mean()) < 5 * error_of_mean and abs(values.std() - 1) < 5 * error_of_mean
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 5 * error_of_mean
    assert abs((np.abs(values) < 2).mean() - 0.9545) < 5 * error_of_mean
    assert 3.5 < np.abs(values).max() < 4.5


# Realised steps


@pytest.mark.parametrize("name", RECIPES_TRIED)
def test_realised_steps_are_json_and_a_function_of_recipe_and_seed_alone(name):
    for seed in range(5):
        steps = realise(RECIPES_TRIED[name], seed)
        assert json.loads(json.dumps(steps)) == steps == realise(RECIPES_TRIED[name].model_copy(), seed)
        applied = apply(photo(), json.loads(json.dumps(steps)), seed)
        assert np.array_equal(applied, degrade(photo(), RECIPES_TRIED[name], seed))


def test_every_step_has_a_function_whose_keywords_are_what_is_realised():
    assert STEPS.keys() == STEP_MODELS.keys() - {"shuffle", "one_of", "sequence"}
    for name, function in STEPS.items():
        words = USED_BY.get(name, ("", {"": ()}))
        for word in words[1]:
            step = {"step": name, **({words[0]: word} if word else {})}
            [realised] = realise(Chain(steps=[step]), 1)
            inspect.signature(function).bind(photo(), Draws(1), **{k: v for k, v in realised.items() if k != "step"})
            given = {**realised, **({"kernel_back": "area"} if name == "resize" else {})}
            assert apply(photo(), [given], 1).shape == photo().shape


def test_the_superresolution_of_the_guide_is_a_blur_and_noise():
    recipe = split(
        {
            "type": "superresolution",
            "blur_radius": 3.0,
            "blur_type": "gaussian",
            "add_noise": True,
            "noise_level": 0.02,
            "captions": ["enhance image quality", "increase resolution", "sharpen"],
        }
    )
    assert realise(recipe, 1) == [
        {"step": "blur", "kernel": "gaussian", "sigma": 3.0},
        {"step": "noise", "kind": "gaussian", "sigma": 5.1, "gray": False},
    ]


def test_the_jpeg_artifacts_of_the_guide_are_two_rounds_the_second_at_nine_tenths_of_a_fresh_draw():
    recipe = split(
        {
            "type": "jpeg_artifacts",
            "quality_mode": "range",
            "quality_range": [10, 30],
            "compression_rounds": 2,
            "captions": ["remove compression artifacts", "restore quality"],
        }
    )
    pairs = {tuple(step["quality"] for step in realise(recipe, seed)) for seed in range(3000)}
    assert {first for first, _ in pairs} == set(range(10, 31))
    assert {second for _, second in pairs} == {int(quality * 0.9) for quality in range(10, 31)}
    assert len(pairs) > 300  # of 21 × 21 drawn apart, some of which give the same second quality
    assert all(step["subsampling"] == "4:2:0" for step in realise(recipe, 1))


def split(entry):
    """Read one entry of `conditioning` as a project's file is read."""
    found = Findings()
    read = split_generator(entry, ("file", "conditioning[0]"), found)
    dataset = validate({"id": "a", "conditioning": [read]}, DatasetConfig, ("file", ""), found)
    assert not found.faults and dataset.conditioning[0].captions == tuple(entry["captions"])
    return dataset.conditioning[0].recipe


def test_ranges_are_drawn_from_end_to_end():
    recipe = Chain(
        steps=[
            {"step": "blur", "sigma": [1, 3], "size": [3, 7]},
            {"step": "jpeg", "quality": [10, 12], "subsampling": ["4:4:4", "4:2:0"]},
            {"step": "gamma", "gamma": [0.25, 4]},
        ]
    )
    drawn = [realise(recipe, seed) for seed in range(2000)]
    sigmas = np.array([blur["sigma"] for blur, _, _ in drawn])
    assert 1 <= sigmas.min() < 1.02 and 2.98 < sigmas.max() <= 3
    assert abs(sigmas.mean() - 2) < 5 * 2 / np.sqrt(12 * sigmas.size)
    assert {blur["size"] for blur, _, _ in drawn} == {3, 5, 7}
    assert {jpeg["quality"] for _, jpeg, _ in drawn} == {10, 11, 12}
    assert {jpeg["subsampling"] for _, jpeg, _ in drawn} == {"4:4:4", "4:2:0"}
    # Drawn in the logarithm: half of all are below 1, the geometric middle.
    below = np.mean([gamma["gamma"] < 1 for _, _, gamma in drawn])
    assert abs(below - 0.5) < 5 * 0.5 / np.sqrt(sigmas.size)


@pytest.mark.parametrize("probability", [0, 0.5, 1])
def test_a_probability_is_how_often_a_step_is_done(probability):
    recipe = Chain(steps=[{"step": "grayscale", "probability": probability}])
    done = sum(len(realise(recipe, seed)) for seed in range(2000))
    # The number of successes of n trials has a standard deviation of √(n p (1 - p)), none at 0 and 1.
    assert abs(done - 2000 * probability) <= 5 * np.sqrt(2000 * probability * (1 - probability))


def test_a_random_order_is_every_order_equally_often_and_a_fixed_one_is_kept():
    steps = [{"step": "gamma"}, {"step": "fade"}, {"step": "sepia"}]
    orders = {
        "random": Chain(steps=steps, random_order=True),
        "group": Chain(steps=[{"step": "shuffle", "steps": steps}]),
    }
    for recipe in orders.values():
        drawn = [tuple(step["step"] for step in realise(recipe, seed)) for seed in range(1200)]
        counts = np.array([drawn.count(order) for order in set(drawn)])
        # Six orders of 200 each; the standard deviation of such a count is √(1200 · 1/6 · 5/6) = 12.9.
        assert counts.size == 6 and np.abs(counts - 200).max() < 5 * 12.9
    assert {tuple(s["step"] for s in realise(Chain(steps=steps), seed)) for seed in range(50)} == {
        ("gamma", "fade", "sepia")
    }


def test_one_of_is_drawn_by_weight():
    recipe = Chain(
        steps=[
            {
                "step": "one_of",
                "weights": [1, 3, 0],
                "steps": [
                    {"step": "gamma"},
                    {"step": "sequence", "steps": [{"step": "fade"}, {"step": "sepia"}]},
                    {"step": "dust"},
                ],
            }
        ]
    )
    drawn = [tuple(step["step"] for step in realise(recipe, seed)) for seed in range(2000)]
    assert set(drawn) == {("gamma",), ("fade", "sepia")}
    assert abs(drawn.count(("gamma",)) - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_another_step_or_parameter_disturbs_no_other_draw():
    def steps_of(*steps):
        return {step["step"]: step for step in realise(Chain(steps=list(steps)), 3)}

    plain = steps_of({"step": "noise"}, {"step": "jpeg"})
    more = steps_of({"step": "blur"}, {"step": "noise"}, {"step": "gamma"}, {"step": "jpeg", "quality": [1, 2]})
    assert more["noise"] == plain["noise"] and more["jpeg"]["subsampling"] == plain["jpeg"]["subsampling"]
    noisy = apply(flat(), [plain["noise"]], 3)
    same = {"step": "gamma", "gamma": 1}
    assert np.array_equal(apply(flat(), [same, plain["noise"]], 3), noisy)
    assert not np.array_equal(apply(flat(), [plain["noise"], plain["noise"]], 3), 2 * noisy.astype(int) - 128)


def test_two_steps_of_a_name_draw_apart():
    twice = Chain(steps=[{"step": "noise", "sigma": [1, 30]}, {"step": "noise", "sigma": [1, 30]}])
    first, second = np.array([[step["sigma"] for step in realise(twice, seed)] for seed in range(500)]).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(500)  # what independent draws stay below


def test_a_step_between_scaling_and_scaling_back_sees_the_smaller_picture():
    inside = {"step": "noise", "kind": "gaussian", "sigma": 20, "gray": False}
    scale = {"step": "resize", "factor": 0.125, "kernel": "area", "kernel_back": "nearest"}
    noisy = apply(flat(), [{**scale, "steps": [inside]}], 1)
    blocks = noisy.reshape(32, 8, 32, 8, 3)
    assert (blocks == blocks[:, :1, :, :1]).all() and noisy.std() > 15
    [done] = realise(Chain(steps=[{"step": "resize", "factor": 1, "steps": [{"step": "gamma"}]}]), 1)
    assert done["step"] == "gamma"  # at its own size a picture is not scaled


# Presets


def numbers(steps, name, parameter):
    """Yield a parameter of every realised step of a name, those inside others too."""
    for step in steps:
        if step["step"] == name and parameter in step:
            yield step[parameter]
        yield from numbers(step.get("steps", ()), name, parameter)


@pytest.mark.parametrize(
    ("preset", "step", "parameter", "low", "high"),
    [  # each within the range that its source gives; see schemas/presets.py
        ("realesrgan-like", "jpeg", "quality", 30, 95),
        ("realesrgan-like", "noise", "sigma", 1, 30),
        ("realesrgan-like", "noise", "scale", 0.05, 3),
        ("realesrgan-like", "blur", "sigma", 0.2, 3),
        ("realesrgan-like", "blur", "sigma_y", 0.2, 3),
        ("realesrgan-like", "blur", "beta", 0.5, 4),
        ("realesrgan-like", "blur", "cutoff", np.pi / 5, np.pi),
        ("realesrgan-like", "blur", "size", 7, 21),
        ("realesrgan-like", "resize", "factor", 0.075, 1.5),
        ("old-photo", "jpeg", "quality", 40, 100),
        ("old-photo", "noise", "sigma", 5, 50),
        ("old-photo", "noise", "amount", 0, 0.01),
        ("old-photo", "noise", "salt", 0.3, 0.8),
        ("old-photo", "blur", "sigma", 1, 5),
        ("old-photo", "blur", "size", 3, 7),
        ("old-photo", "resize", "factor", 0.5, 1),
        ("web-jpeg", "jpeg", "quality", 5, 95),
        ("denoise", "noise", "sigma", 0, 55),
        ("deblur", "blur", "length", 1, 25),
    ],
)
def test_a_presets_numbers_fill_the_published_range_and_never_leave_it(preset, step, parameter, low, high):
    drawn = [x for seed in range(600) for x in numbers(realise(Chain(preset=preset), seed), step, parameter)]
    slack = 1e-4 * high  # π/5 and the like are written with five digits
    assert low - slack <= min(drawn) and max(drawn) <= high + slack
    # Of at least 40 even draws none in a given tenth of the range happens once in e^4; here all are met.
    assert len(drawn) > 40 and min(drawn) < low + 0.3 * (high - low) and max(drawn) > high - 0.3 * (high - low)


def test_real_esrgan_draws_its_kernels_and_noises_as_often_as_published():
    drawn = [realise(Chain(preset="realesrgan-like"), seed) for seed in range(2000)]
    first = [steps[0]["kernel"] for steps in drawn]
    published = {"gaussian": 0.9 * 0.45, "anisotropic": 0.9 * 0.25, "generalized_gaussian": 0.9 * 0.15, "sinc": 0.1}
    for kernel, share in {**published, "plateau": 0.9 * 0.15}.items():
        assert abs(first.count(kernel) - 2000 * share) < 5 * np.sqrt(2000 * share * (1 - share))
    noises = [
        (kind, gray)
        for steps in drawn
        for kind, gray in zip(numbers(steps, "noise", "kind"), numbers(steps, "noise", "gray"), strict=True)
    ]
    assert len(noises) == 4000  # both processes, always
    assert abs(sum(kind == "gaussian" for kind, _ in noises) - 2000) < 5 * np.sqrt(4000 * 0.25)
    assert abs(sum(gray for _, gray in noises) - 1600) < 5 * np.sqrt(4000 * 0.24)


def test_real_esrgan_at_its_end_is_a_quarter_of_the_size_and_ends_in_sinc_or_jpeg():
    ends = [realise(Chain(preset="realesrgan-like"), seed)[-1] for seed in range(300)]
    assert all(end["step"] == "resize" and end["factor"] == 0.25 for end in ends)
    inside = {tuple(step["step"] for step in end["steps"]) for end in ends}
    assert inside == {("blur", "jpeg"), ("jpeg",), ("blur",), ()}


# Recipes as data


@pytest.mark.parametrize("name", RECIPES_TRIED)
def test_a_recipe_comes_back_from_its_text_unless_it_is_a_preset(name):
    recipe, values = RECIPES_TRIED[name], json.loads(recipe_text(RECIPES_TRIED[name]))
    if "preset" not in values:
        assert RECIPES[values["type"]].model_validate(values) == recipe
    assert len(recipe_text(recipe)) < 1000 or "preset" not in values


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


# Chains as data


def test_a_changed_preset_is_another_recipe(monkeypatch):
    from schemas import recipes

    before = recipe_text(Chain(preset="denoise"))
    assert recipe_text(Chain(preset="denoise")) == before
    changed = Chain(steps=[*PRESETS["denoise"], {"step": "jpeg"}]).all_steps
    monkeypatch.setattr(recipes, "_preset_steps", lambda name: changed)
    assert recipe_text(Chain(preset="denoise")) != before
    assert len({recipe_text(Chain(preset=name)) for name in PRESETS}) == len(PRESETS)


def test_where_a_picture_is_degraded_is_part_of_the_text_unless_it_is_the_target():
    for recipe, options in ((Superresolution, {}), (JpegArtifacts, {}), (Chain, {"preset": "denoise"})):
        assert "degrade_at" not in recipe_text(recipe(**options))
        at_source = recipe_text(recipe(**options, degrade_at="source"))
        assert degraded_at_source(at_source) and not degraded_at_source(recipe_text(recipe(**options)))


def test_what_a_kernel_does_not_use_is_not_in_the_text():
    box = Chain(steps=[{"step": "blur", "kernel": "box", "radius": 2}])
    assert recipe_text(box) == recipe_text(Chain(steps=[{"step": "blur", "kernel": "box", "radius": 2, "sigma": 9}]))
    assert recipe_text(box) != recipe_text(Chain(steps=[{"step": "blur", "kernel": "box", "radius": 3}]))
