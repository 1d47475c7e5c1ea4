"""The profile of a whole sampling run."""

import pytest
import torch

import cmfast
from cmfast.profiling import profile_sampling


@pytest.mark.parametrize(
    ("accelerated", "options", "evaluations"),
    [(True, {"steps": 2}, 2), (False, {"steps": 2}, 2), (True, {"sampler": "heun", "steps": 3, "rounds": 2}, 5)],
)
def test_stages(accelerated, options, evaluations):
    model = cmfast.load("digits")
    model = cmfast.accelerate(model) if accelerated else model
    before = model.sample(2, steps=2)
    profile = profile_sampling(model, 2, "sampling", **options)
    stages = {group.name: group for group in profile.by_stage()}
    assert stages.keys() == {"noise", "sampler", "outside", *(f"evaluation {i + 1}" for i in range(evaluations))}
    for i in range(evaluations):
        assert stages[f"evaluation {i + 1}"].operations == stages["evaluation 1"].operations > 0
    assert {row.layer.split(".")[0] for row in profile.rows if row.stage.startswith("evaluation")} == {"unet"}
    drawn = [row for row in profile.rows if row.stage == "noise" and row.operator == "cmfast.consistency_step"]
    assert len(drawn) == 1
    steps = [row for row in profile.rows if row.stage == "sampler" and row.operator == "cmfast.consistency_step"]
    assert len(steps) == evaluations
    assert "\nstage " in str(profile)
    assert sum(row.seconds for row in profile.rows) >= profile.seconds * (1 - 1e-9)  # what is left is outside
    assert torch.equal(model.sample(2, steps=2), before)


def test_noise_that_is_drawn_apart_is_a_stage_of_its_own():
    model = cmfast.load("digits-teacher")
    profile = profile_sampling(model, 1, "sampling", sampler="ancestral", steps=3, rounds=1)
    drawn = [row for row in profile.rows if row.stage == "noise" and row.operator == "cmfast.consistency_step"]
    assert len(drawn) == 1 + 2  # the initial noise, and one for each step but the last


@pytest.mark.parametrize(
    ("options", "message"), [({"sampler": "huen"}, "unknown sampler 'huen'"), ({"steps": 0}, "at least 1")]
)
def test_what_cannot_be_sampled(options, message):
    with pytest.raises(ValueError, match=message):
        profile_sampling(cmfast.load("digits"), 1, "sampling", **options)
