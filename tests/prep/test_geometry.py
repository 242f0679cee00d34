"""Buckets, resizes and crops; `bucket_vectors.json` holds what SimpleTuner makes of the same sizes and settings."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from prep.geometry import Policy, Targets, aspects_for, drawn_aspect, fit, placed, rounded
from schemas.rows import Geometry

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # not into the repository

KNOWN = json.loads((Path(__file__).parent / "bucket_vectors.json").read_text())


VECTORS = [vector for vector in KNOWN["vectors"] if not vector["id"].startswith("anomaly")]
ANOMALIES = [vector for vector in KNOWN["vectors"] if vector["id"].startswith("anomaly")]


def policy_of(vector):
    config = vector["config"]
    return Policy(
        config["resolution"],
        config["resolution_type"],
        vector["alignment"],
        vector["rounding"],
        crop_aspect=config["crop_aspect"] if config["crop"] else "preserve",
        aspects=tuple((float(aspect), 1.0) for aspect in config.get("crop_aspect_buckets", ())),
        crop_style=config["crop_style"],
        downsample=config.get("target_downsample_size")
        if config["crop"] and config.get("maximum_image_size")
        else None,
    )


def test_all_vectors_but_the_anomalies_are_checked():
    assert (len(VECTORS), len(ANOMALIES)) == (287, 6)
    assert sum(policy_of(vector).downsample is not None for vector in VECTORS) > 10
    assert {policy_of(vector).alignment for vector in VECTORS} == {8, 16, 32, 64}
    assert {policy_of(vector).crop_aspect for vector in VECTORS} == {"preserve", "square", "closest", "random"}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_sizes_and_crops_equal_simpletuners(vector):
    policy = policy_of(vector)
    geometry = fit((vector["width"], vector["height"]), policy, Targets(), ())
    assert isinstance(geometry, Geometry)
    assert [geometry.target_width, geometry.target_height] == vector["target_size"]
    assert [geometry.crop_top, geometry.crop_left] == vector["crop_coordinates"]
    if policy.downsample is None:  # with it, the vectors give the intermediary size before a second resize
        assert [geometry.intermediary_width, geometry.intermediary_height] == vector["intermediary_size"]


@pytest.mark.parametrize("vector", ANOMALIES, ids=lambda vector: vector["id"])
def test_where_simpletuner_misses_its_square_the_square_is_covered_and_nothing_is_squashed(vector):
    geometry = fit((vector["width"], vector["height"]), policy_of(vector), Targets(), ())
    resized = (geometry.intermediary_width, geometry.intermediary_height)
    assert [geometry.target_width, geometry.target_height] == vector["target_size"]
    assert min(resized) == vector["target_size"][0]
    assert abs(resized[0] / resized[1] - vector["width"] / vector["height"]) < 2 / min(resized)


@pytest.mark.parametrize("case", KNOWN["order_dependence"], ids=lambda case: f"{case['order']} at {case['alignment']}")
def test_the_first_image_of_a_bucket_decides_its_target_size(case):
    policy, targets = Policy(case["megapixels"], "area", case["alignment"], crop_style="center"), Targets()
    for result in case["results"]:
        geometry = fit(tuple(result["original"]), policy, targets, ())
        assert [geometry.target_width, geometry.target_height] == result["target"]
        assert [geometry.intermediary_width, geometry.intermediary_height] == result["intermediary"]


@pytest.mark.parametrize(
    ("length", "alignment", "expected"),
    [(100, 64, 128), (96, 64, 128), (160, 64, 128), (1, 64, 64), (0, 8, 8), (1024, 64, 1024), (84, 8, 80), (92, 8, 96)],
)
def test_lengths_are_rounded_half_to_even_and_never_to_nothing(length, alignment, expected):
    assert rounded(length, alignment) == expected


@pytest.mark.parametrize(
    ("resolution", "kind", "edge"),
    [
        (0.21, "area", 512),
        (0.29, "area", 512),
        (480, "pixel_area", 512),
        (0.19, "area", 448),
        (0.46, "area", 768),
        (4, "area", 2048),
    ],
)
def test_areas_within_a_twentieth_of_a_customary_square_take_its_edge(resolution, kind, edge):
    geometry = fit((1600, 900), Policy(resolution, kind, 64, crop_aspect="square", crop_style="center"), Targets(), ())
    assert (geometry.target_width, geometry.target_height) == (edge, edge)


# Properties of any image under any settings

sides = st.integers(16, 6000)
policies = st.one_of(
    st.tuples(st.just("pixel"), st.integers(64, 2048)),
    st.tuples(st.just("pixel_area"), st.integers(64, 2048)),
    st.tuples(st.just("area"), st.floats(0.05, 4.0)),
).flatmap(
    lambda kind: st.builds(
        Policy,
        resolution=st.just(kind[1]),
        resolution_type=st.just(kind[0]),
        alignment=st.sampled_from([8, 16, 24, 32, 64]),
        rounding=st.integers(1, 3),
        crop_aspect=st.sampled_from(["preserve", "square", "closest", "random"]),
        aspects=st.just(((0.5, 1.0), (1.0, 2.0), (1.6, 1.0))),
        crop_style=st.sampled_from(["random", "center", "centre", "corner"]),
        downsample=st.none() | st.sampled_from([0.5, 0.75, 1, 1.5, 2]).map(lambda factor: kind[1] * factor),
    )
)


@given(sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=3), policy=policies, seed=st.integers(0, 99))
@example(sizes=[(3000, 2000), (2000, 3000)], policy=Policy(1024, "pixel_area", 64), seed=0)
@example(sizes=[(1140, 2000), (1120, 2000)], policy=Policy(1024, "pixel_area", 16), seed=0)
@settings(deadline=None, derandomize=True, database=None, max_examples=500)
def test_targets_are_aligned_and_lie_inside_a_resized_image_of_the_images_own_aspect(sizes, policy, seed):
    targets = Targets()
    for size in sizes:
        assume(1 / 20 <= size[0] / size[1] <= 20)
        geometry = fit(size, policy, targets, (seed,))
        assume(isinstance(geometry, Geometry))  # an aspect that rounds to 0 is a reason, below

        target, resized = geometry.as_key()[:2], geometry.as_key()[2:4]
        assert target[0] % policy.alignment == target[1] % policy.alignment == 0
        assert min(target) >= policy.alignment
        assert resized[0] >= target[0] and resized[1] >= target[1]
        assert 0 <= geometry.crop_left <= resized[0] - target[0]
        assert 0 <= geometry.crop_top <= resized[1] - target[1]
        if policy.crop_aspect == "square":
            assert target[0] == target[1]

        # How many pixels either side may be off from the image's own aspect.
        true, loss = size[0] / size[1], 1
        if policy.downsample is not None:  # rounded at half the size or more, then enlarged up to 2√20 times to cover
            loss = 12
        # One that is nearly a square may become one without a crop.
        slack = 1.0102 if target == resized and target[0] == target[1] else 1
        assert (resized[0] - loss) / (resized[1] + loss) <= true * slack
        assert resized[1] <= loss or true / slack <= (resized[0] + loss) / (resized[1] - loss)


@given(size=st.tuples(sides, sides), policy=policies)
@settings(deadline=None, derandomize=True, database=None)
def test_geometry_is_a_function_of_size_settings_and_seed(size, policy):
    assert fit(size, policy, Targets(), (1, "a")) == fit(size, policy, Targets(), (1, "a"))


def test_an_image_too_narrow_for_a_bucket_is_a_reason():
    assert (
        fit((4, 1000), Policy(512, "pixel_area", 64), Targets(), ())
        == "too narrow: 4x1000, its aspect ratio rounds to 0"
    )
    assert isinstance(fit((6, 1000), Policy(512, "pixel_area", 64), Targets(), ()), Geometry)


@pytest.mark.parametrize("kind", ["pixel", "pixel_area"])
def test_an_image_too_wide_for_a_bucket_is_a_reason(kind):
    reason = "too wide: 1000x4, the inverse of its aspect ratio rounds to 0"
    assert fit((1000, 4), Policy(512, kind, 64), Targets(), ()) == reason
    assert isinstance(fit((1000, 6), Policy(512, kind, 64), Targets(), ()), Geometry)
    assert fit((1000, 6), Policy(512, kind, 64, rounding=1), Targets(), ()) == reason.replace("1000x4", "1000x6")


# An area within a twentieth of a customary one: pictures of 448 pixels become squares of 512.
ENLARGED = Policy(0.21, "area", 64, crop_style="center")


@pytest.mark.parametrize("size", [(1000, 1000), (1010, 1000), (1000, 1010), (1001, 1000), (990, 1000)])
def test_an_image_within_a_hundredth_of_a_square_becomes_one_without_a_crop(size):
    assert fit(size, ENLARGED, Targets(), ()) == Geometry(512, 512, 512, 512, 0, 0)


@pytest.mark.parametrize("size", [(1012, 1000), (1000, 1012), (1030, 1000), (970, 1000), (1100, 1000)])
def test_an_image_further_from_a_square_is_cropped_to_one(size):
    geometry = fit(size, ENLARGED, Targets(), ())
    resized = (geometry.intermediary_width, geometry.intermediary_height)
    assert geometry.bucket == "512x512" and min(resized) == 512 < max(resized)
    assert abs(resized[0] / resized[1] - size[0] / size[1]) < 2 / 512


# Crops

# A square of 64 pixels out of an image resized to 96 × 128: room in both directions.
ROOM = {"resolution": 64, "resolution_type": "pixel", "alignment": 32, "crop_aspect": "square", "downsample": 96}


@pytest.mark.parametrize(("style", "place"), [("center", (32, 16)), ("centre", (32, 16)), ("corner", (0, 0))])
def test_fixed_crops_lie_where_they_are_told(style, place):
    geometry = fit((300, 400), Policy(**ROOM, crop_style=style), Targets(), ("unused",))
    assert geometry == Geometry(64, 64, 96, 128, *place)


def test_random_crops_are_drawn_once_per_seed_and_lie_inside():
    policy = Policy(**ROOM, crop_style="random")
    first = [fit((300, 400), policy, Targets(), (42, "crop", "photos", f"{n}.jpg")) for n in range(200)]
    again = [fit((300, 400), policy, Targets(), (42, "crop", "photos", f"{n}.jpg")) for n in range(200)]
    other = [fit((300, 400), policy, Targets(), (43, "crop", "photos", f"{n}.jpg")) for n in range(200)]
    assert first == again
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 10
    assert all(0 <= one.crop_top <= 64 and 0 <= one.crop_left <= 32 for one in first)


def test_random_crops_cover_the_whole_range_and_their_axes_are_independent():
    policy = Policy(**ROOM, crop_style="random")
    count = 6000
    crops = [fit((400, 400), policy, Targets(), (n,)) for n in range(count)]
    top, left = np.array([(one.crop_top, one.crop_left) for one in crops]).T

    # Each axis is uniform over 33 places: a chi-square of k degrees of freedom stays below k + 5·√(2k).
    for axis in (top, left):
        seen = np.bincount(axis, minlength=33)
        assert len(seen) == 33
        assert ((seen - count / 33) ** 2 / (count / 33)).sum() < 32 + 5 * np.sqrt(64)
    # Independent: the correlation of n pairs has a standard error of 1/√n, and 11 × 11 blocks are hit alike.
    assert abs(np.corrcoef(top, left)[0, 1]) < 5 / np.sqrt(count)
    blocks = np.histogram2d(top // 3, left // 3, bins=11)[0]
    assert ((blocks - count / 121) ** 2 / (count / 121)).sum() < 120 + 5 * np.sqrt(240)


def test_images_at_the_resolution_already_are_not_scaled_before_the_crop():
    policy = Policy(**ROOM, crop_style="center")
    assert fit((64, 64), policy, Targets(), ()) == Geometry(64, 64, 64, 64, 0, 0)
    assert fit((65, 65), policy, Targets(), ()) == Geometry(64, 64, 96, 96, 16, 16)


# Aspects to choose from

CHOICES = {"aspects": ((0.5, 1.0), (1.0, 3.0), (2.0, 1.0)), "crop_style": "center"}


@pytest.mark.parametrize(
    ("size", "aspect"), [((1500, 1000), 1.0), ((1600, 1000), 2.0), ((600, 1000), 0.5), ((3000, 1000), 2.0)]
)
def test_the_nearest_aspect_is_taken_the_first_of_two(size, aspect):
    policy = Policy(512, "pixel_area", 64, crop_aspect="closest", **CHOICES)
    assert aspects_for(size, policy)[0][0] == aspect


def test_aspects_are_drawn_by_weight_and_image_and_always_the_same():
    policy = Policy(512, "pixel_area", 64, crop_aspect="random", **CHOICES)
    aspects = aspects_for((1000, 1000), policy)
    drawn = [drawn_aspect(aspects, (42, "photos", f"{number}.jpg")) for number in range(5000)]
    assert drawn == [drawn_aspect(aspects, (42, "photos", f"{number}.jpg")) for number in range(5000)]
    assert abs(drawn.count(1.0) / 5000 - 0.6) < 0.035 and abs(drawn.count(0.5) / 5000 - 0.2) < 0.03  # 5 σ


def test_aspects_that_would_enlarge_too_much_are_left_out_first():
    policy = Policy(1024, "pixel", 64, crop_aspect="random", most_upscale=0.2, **CHOICES)
    assert [aspect for aspect, _ in aspects_for((1000, 900), policy)] == [0.5, 1.0]
    assert [aspect for aspect, _ in aspects_for((1900, 1000), policy)] == [0.5, 1.0, 2.0]
    reason = aspects_for((256, 256), policy)
    assert reason == "too small: 256x256 would be enlarged 4.00 times, allowed are 1.2"


@pytest.mark.parametrize(("edge", "kept"), [(846, False), (850, True), (1024, True)])
def test_enlarging_is_limited_for_every_kind_of_crop(edge, kept):
    for aspect in ("preserve", "square"):
        fitted = fit((edge, edge), Policy(1024, "pixel", 64, crop_aspect=aspect, most_upscale=0.2), Targets(), ())
        assert isinstance(fitted, Geometry) == kept, fitted


def test_aspect_limits_compare_the_images_own_rounded_aspect():
    policy = Policy(512, "pixel_area", 64, least_aspect=0.5, most_aspect=2.0)
    assert isinstance(fit((498, 1000), policy, Targets(), ()), Geometry)  # 0.498 is 0.5 in two decimals
    assert fit((490, 1000), policy, Targets(), ()) == "too narrow: 490x1000, minimum_aspect_ratio is 0.5"
    assert fit((2010, 1000), policy, Targets(), ()) == "too wide: 2010x1000, maximum_aspect_ratio is 2"


def test_sizes_that_a_bucket_would_have_had_are_noted():
    policy, targets = Policy(1024, "pixel_area", 16), Targets()
    for size in ((1120, 2000), (1140, 2000), (1120, 2000)):
        fit(size, policy, targets, ())
    assert (targets.sizes, targets.others) == ({0.56: (768, 1376)}, {0.56: {(768, 1360)}})


# Faces and variants


@pytest.mark.parametrize(
    ("face", "place"), [((0.5, 0.5), (32, 16)), ((0.0, 0.0), (0, 0)), ((1.0, 1.0), (64, 32)), ((0.4, 0.3), (6, 6))]
)
def test_a_crop_is_centred_on_the_face_as_far_as_the_image_goes(face, place):
    fitted = fit((300, 400), Policy(**ROOM, crop_style="center"), Targets(), ())
    moved = placed(fitted, "face", (), face=face)
    assert (moved.crop_top, moved.crop_left) == place
    assert placed(fitted, "face", ()) == fitted  # no face: the middle


def test_variants_of_a_random_crop_differ_in_nothing_but_their_place():
    policy = Policy(**ROOM, crop_style="random")
    fitted = fit((300, 400), policy, Targets(), (42, "photos", "a.jpg"))
    variants = [placed(fitted, "random", (42, "photos", "a.jpg"), number) for number in range(8)]
    assert variants[0] == fitted and len(set(variants)) > 5
    assert len({one.as_key()[:4] for one in variants}) == 1
