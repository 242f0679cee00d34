import pytest

from schemas.config_file import Findings, split_generator, validate
from schemas.datasets import DatasetConfig
from schemas.presets import PRESETS
from schemas.recipes import Chain


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_steps_with_known_names_and_sound_numbers(name):
    assert Chain(preset=name).all_steps == Chain(steps=PRESETS[name]).all_steps != ()


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ([{"step": "blurr"}], "steps[0].step = \"blurr\": must be one of 'resize', 'blur'"),
        ([{"step": "blurr"}], "did you mean 'blur'?"),
        ([{"sigma": 1}], "steps[0] = {\"sigma\": 1}: must be an object with a 'step'; known: resize, blur"),
        ([{"step": "blur", "sigm": 1}], "steps[0].sigm = 1: unknown key; did you mean 'sigma'?"),
        ([{"step": "gamma", "gama": 1}], "steps[0].gama = 1: unknown key; did you mean 'gamma'?"),
        ([{"step": "blur", "sigma": [3, 1]}], "steps[0].sigma = [3, 1]: the lower end comes first: [1, 3]"),
        ([{"step": "blur", "sigma": [1, 2, 3]}], "steps[0].sigma = [1, 2, 3]: must be a number from 0 to 100, or two"),
        ([{"step": "blur", "sigma": -1}], "steps[0].sigma = -1: must be a number from 0 to 100"),
        ([{"step": "blur", "sigma": 10**400}], "must be a number from 0 to 100"),
        ([{"step": "blur", "sigma": True}], "steps[0].sigma = true: must be a number"),
        ([{"step": "blur", "sigma": "3"}], 'steps[0].sigma = "3": must be a number from 0 to 100'),
        ([{"step": "blur", "size": 4}], "steps[0].size = 4: must be an odd whole number from 1 to 999"),
        ([{"step": "blur", "kernel": "gausian"}], "steps[0].kernel[0] = \"gausian\": must be one of 'gaussian'"),
        ([{"step": "blur", "kernel": []}], "steps[0].kernel = []: must not be empty"),
        ([{"step": "jpeg", "quality": 0}], "steps[0].quality = 0: must be a whole number from 1 to 100"),
        (
            [{"step": "webp", "quality": [10, 101]}],
            "steps[0].quality = [10, 101]: must be a whole number from 1 to 100",
        ),
        ([{"step": "jpeg", "quality": 20.5}], "steps[0].quality = 20.5: must be a whole number"),
        ([{"step": "noise", "probability": 1.5}], "steps[0].probability = 1.5: must be less than or equal to 1"),
        ([{"step": "resize", "factor": 0}], "steps[0].factor = 0: must be a number from 0.015625 to 4"),
        ([{"step": "banding", "levels": 1}], "steps[0].levels = 1: must be a whole number from 2 to 256"),
        ([{"step": "shuffle", "steps": []}], "steps[0].steps = []: must not be empty"),
        ([{"step": "one_of", "steps": [{"step": "gamma"}], "weights": [1, 2]}], "2 weights for 1 steps"),
        ([{"step": "one_of", "steps": [{"step": "gamma"}], "weights": [0]}], "some weight must be above 0"),
        ([{"step": "shuffle", "steps": [{"step": "jpg"}]}], 'steps[0].steps[0].step = "jpg": must be one of'),
        ([], "conditioning[0].steps = []: must not be empty"),
        (5, "conditioning[0].steps = 5: must be a list"),
    ],
    ids=str,
)
def test_a_fault_in_a_chain_says_where_it_is_and_what_would_do(steps, problem):
    [fault] = faults_of({"type": "chain", "steps": steps})
    assert problem in fault


def test_a_chain_has_either_steps_or_a_known_preset():
    steps = [{"step": "gamma"}]
    [neither] = faults_of({"type": "chain"})
    [both] = faults_of({"type": "chain", "steps": steps, "preset": "denoise"})
    assert "give either `steps` or a `preset`" in neither and "give either `steps` or a `preset`" in both
    [unknown] = faults_of({"type": "chain", "preset": "old-foto"})
    assert (
        "preset = \"old-foto\": must be one of 'realesrgan-like'" in unknown and "did you mean 'old-photo'?" in unknown
    )
    assert not faults_of({"type": "chain", "steps": steps}) and not faults_of(
        {"type": "chain", "params": {"steps": steps}}
    )


def faults_of(entry):
    """Return what is said of one entry of `conditioning`."""
    found = Findings()
    read = split_generator(entry, ("file", "conditioning[0]"), found)
    validate({"id": "a", "conditioning": [read]}, DatasetConfig, ("file", ""), found)
    return [str(fault) for fault in found.faults]
