import json

import numpy as np
import pytest

from prep.alignment import Alignment
from prep.showing import clipped, difference, told, verdict, visible
from schemas.datasets import AlignmentCheck

CHECK = AlignmentCheck()


def gray(value, shape=(8, 8, 3)):
    return np.full(shape, value, np.uint8)


def test_a_difference_has_no_sign_and_is_amplified_as_far_as_nearly_all_of_it_stays_below_white():
    for target, reference in ((100, 107), (107, 100)):
        apart = difference(gray(target), gray(reference))
        assert (apart.factor, apart.label, set(apart.pixels.ravel().tolist())) == (32, "difference ×32", {224})
    assert difference(gray(0), gray(8)).factor == 16
    assert difference(gray(0), gray(127)).factor == 2
    assert (difference(gray(0), gray(128)).factor, difference(gray(0), gray(128)).label) == (1, "difference")


def test_a_few_pixels_that_differ_much_do_not_hide_the_others():
    target = gray(50, (100, 100, 3))
    reference = target + 4
    reference[0, :5] = 255
    apart = difference(target, reference)
    assert apart.factor == 32 and apart.pixels.max() == 255 and apart.pixels[50, 50, 0] == 128


def test_equal_pictures_have_no_difference_and_those_of_other_sizes_cannot_be_compared():
    same = difference(gray(9), gray(9))
    assert (same.factor, same.label, same.pixels.any()) == (0, "no difference", False)
    assert difference(gray(9), gray(9, (8, 16, 3))) is None


def test_steps_of_a_degradation_are_told_one_by_one_with_their_numbers():
    steps = [
        {"step": "blur", "kernel": "gaussian", "sigma": 1.8312345},
        {"step": "jpeg", "quality": 23, "subsampling": None, "progressive": True, "optimize": False},
        {"step": "scale_down", "size": [64, 48]},
    ]
    assert [(step.name, step.details) for step in told(json.dumps(steps))] == [
        ("blur", "gaussian, sigma 1.831"),
        ("jpeg", "quality 23, progressive"),
        ("scale down", "size 64 48"),
    ]
    assert told(None) == ()


def test_steps_inside_a_step_are_told_below_it():
    inside = [{"step": "noise", "kind": "salt_pepper", "amount": 0.25}]
    steps = told(json.dumps([{"step": "resize", "factor": 0.5, "steps": inside}, {"step": "resize", "steps": []}]))
    assert [(step.name, step.details, step.depth) for step in steps] == [
        ("resize", "factor 0.5", 0), ("noise", "salt pepper, amount 0.25", 1), ("resize", "", 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "odd",
    ["", "{", "null", "[]", "3", '"x"', "[" * 100_000, '{"type": {"a": [1, {}]}}', "[NaN, 1e999]", '[{"step": 7}]', "[[[]]]",
     '{"steps":[' * 400 + "]}" * 400, '{"steps": 3, "kernel": [], "kind": {}, "step": null}'],
)  # fmt: skip
def test_whatever_stands_for_steps_is_told_in_a_few_short_lines(odd):
    assert all(len(step.name) <= 200 and len(step.details) <= 200 for step in told(odd))


def test_many_and_long_steps_are_cut():
    steps = told(json.dumps([{"step": "blur", "note": "x" * 10_000}] * 500))
    assert len(steps) == 17 and steps[-1].details == "and 484 more steps"
    assert max(len(step.details) for step in steps) == 200


def test_how_a_reference_lies_is_told_in_words_and_signed_numbers():
    near = verdict(Alignment(0.104, -0.2, 1.0001, 0.91, 0.97), CHECK)
    assert (near.accused, near.words) == (False, "lies on its target")
    assert dict(near.numbers) == {
        "shift": "+0.10, −0.20 px", "scale": "×1.0001", "similarity": "0.91", "confidence": "0.97"
    }  # fmt: skip
    far = verdict(Alignment(-3.2, 0.0, 1.02, 0.7, 0.9), CHECK)
    assert far.accused and far.words == "shifted 3.2 px left, 0.0 px down, 2.0 % larger"
    assert dict(verdict(Alignment(-0.001, 0.0, 1.0, 1.0, 1.0), CHECK).numbers)["shift"] == "+0.00, +0.00 px"


def test_what_cannot_be_told_has_no_shift_and_another_picture_is_called_so():
    unknown = verdict(Alignment(0.0, 0.0, 1.0, 0.4, 0.1), CHECK)
    assert not unknown.accused and unknown.words.startswith("cannot be told")
    assert [name for name, _ in unknown.numbers] == ["similarity", "confidence"]
    other = verdict(Alignment(0.0, 0.0, 1.0, 0.05, 0.0), CHECK)
    assert other.accused and other.words == "shows another picture (similarity 0.05)"


def test_the_thresholds_are_those_of_the_set():
    found = Alignment(2.0, 0.0, 1.0, 0.9, 1.0)
    assert verdict(found, CHECK).accused
    assert not verdict(found, AlignmentCheck(maximum_shift=2.5)).accused


def test_what_cannot_be_seen_is_spelled_out():
    assert visible("a\nb\u202ec\u200d\x00\ud800") == "a\\nb\\u202ec\u200d\\x00\\ud800"
    assert clipped("abcdefghij", 6, 2) == "abc…ij"
    assert clipped("abcdef", 6, 2) == "abcdef"
