"""What bodies ask of a model, without a service."""

import contextlib
import dataclasses
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmfast import preconditioning
from cmfast.serving.batches import Plan
from cmfast.serving.description import Description
from cmfast.serving.errors import ApiError
from cmfast.serving.requests import ImagesBody, Reader, SamplesBody, read
from cmfast.serving.settings import Limits

DIGITS = Description("digits", (1, 8, 8), 10, preconditioning.Consistency(), {2: (80.0, 0.5)}, True, "cpu")
MODELS = [
    DIGITS,
    dataclasses.replace(DIGITS, num_classes=None, preconditioning=preconditioning.Flow()),
    dataclasses.replace(DIGITS, sample_shape=(2, 32), preconditioning=preconditioning.LatentConsistency()),
    dataclasses.replace(DIGITS, sample_shape=(3, 4, 8, 8), preconditioning=preconditioning.TrajectoryConsistency()),
]
LIMITS = Limits(count=8, steps=20)


def images(about=DIGITS, /, **body):
    return Reader(about, LIMITS).images(read(ImagesBody, json.dumps(body).encode()))


def samples(about=DIGITS, /, **body):
    return Reader(about, LIMITS).samples(read(SamplesBody, json.dumps(body).encode()))


def test_images():
    wanted = images(prompt=" 3 ", n=2, size="8x8", model="digits", user="me", seed=(1 << 64) - 1, steps=2)
    assert wanted.plan == Plan("multistep", (80.0, 0.5))
    assert (wanted.count, wanted.seed, wanted.first_sample, wanted.labels) == (2, (1 << 64) - 1, 0, (3, 3))
    nothing = images(prompt="", n=None, size=None, seed=None, response_format=None)
    assert (nothing.plan, nothing.count, nothing.labels) == (Plan("multistep", (80.0,)), 1, (0,))
    assert images(prompt="", n=3).labels == (0, 1, 2)
    assert images(MODELS[1], prompt="").labels is None
    assert len({images(prompt="").seed for _ in range(8)}) == 8
    assert all(0 <= images(prompt="").seed < 1 << 32 for _ in range(8))


def test_samples():
    wanted = samples(count=3, first_sample=4, sampler="heun", steps=3)
    assert wanted.plan.sampler == "heun"
    assert len(wanted.plan.levels) == 4
    assert wanted.plan.levels[-1] == 0.0
    assert wanted.labels == (4, 5, 6)
    assert samples(count=2, class_labels=[7, 1]).labels == (7, 1)
    assert samples(sigmas=[80, 0.25]).plan == Plan("multistep", (80.0, 0.25))
    assert samples(timesteps=[0, 22]).plan.levels == tuple(preconditioning.Consistency().grid(40)[i] for i in (0, 22))
    assert samples().count == 1


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({}, 400, "prompt", "prompt: Field required"),
        ({"prompt": 3}, 400, "prompt", "should be a valid string"),
        ({"prompt": "a cat"}, 400, "prompt", "the number of a class, 0 … 9, or empty; got 'a cat'"),
        ({"prompt": "10"}, 400, "prompt", "0 … 9"),
        ({"prompt": "-1"}, 400, "prompt", "0 … 9"),
        ({"prompt": "٣"}, 400, "prompt", "0 … 9"),
        ({"prompt": "9" * 5000}, 400, "prompt", "999…"),
        ({"prompt": "", "n": 9}, 400, "n", "at most 8 samples a request, got 9"),
        ({"prompt": "", "n": 0}, 400, "n", "greater than or equal to 1"),
        ({"prompt": "", "n": 1.5}, 400, "n", "valid integer"),
        ({"prompt": "", "n": "2"}, 400, "n", "valid integer"),
        ({"prompt": "", "n": True}, 400, "n", "valid integer"),
        ({"prompt": "", "size": "256x256"}, 400, "size", "draws 8x8, not '256x256'"),
        ({"prompt": "", "response_format": "url"}, 400, "response_format", "take b64_json"),
        ({"prompt": "", "model": "dall-e-2"}, 404, "model", "no model 'dall-e-2': this service has 'digits'"),
        ({"prompt": "", "quality": "hd"}, 400, "quality", "there is no field 'quality'"),
        ({"prompt": "", "seed": -1}, 400, "seed", "greater than or equal to 0"),
        ({"prompt": "", "seed": 1 << 64}, 400, "seed", "less than"),
        ({"prompt": "", "steps": 21}, 400, "steps", "at most 20, got 21"),
        ({"prompt": "", "sampler": "plms"}, 400, "sampler", "samplers are onestep, multistep, heun"),
        ({"prompt": "", "sampler": "onestep", "steps": 2}, 400, "steps", "onestep takes one step"),
    ],
)
def test_images_that_cannot_be(body, status, param, message):
    with pytest.raises(ApiError) as refused:
        images(**body)
    assert (refused.value.status, refused.value.param) == (status, param)
    assert message in refused.value.message
    assert len(refused.value.message) < 600


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"count": 9}, "count", "at most 8 samples"),
        ({"class_labels": 10}, "class_labels", "0 … 9, got 10"),
        ({"class_labels": [1, 2]}, "class_labels", "or 1 of them"),
        ({"class_labels": 1 << 40}, "class_labels", "less than"),
        ({"sigmas": []}, "sigmas", "at least 1 level"),
        ({"sigmas": [1, 2]}, "sigmas", "must decrease"),
        ({"sigmas": [1e300, 1]}, "sigmas.0", "less than or equal to 1000000"),
        ({"sigmas": [0.5] * 21}, "sigmas", "at most 20, got 21"),
        ({"sigmas": [80], "steps": 1}, "steps", "one of steps, timesteps and sigmas"),
        ({"timesteps": [0, 40]}, "timesteps", "in 0 … 39"),
        ({"first_sample": (1 << 32) - 1, "count": 2}, "first_sample", "0 … 4294967295"),
        ({"format": "gif"}, "format", "'png' or 'npz'"),
        ({"columns": 0}, "columns", "greater than or equal to 1"),
    ],
)
def test_samples_that_cannot_be(body, param, message):
    with pytest.raises(ApiError) as refused:
        samples(**body)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert message in refused.value.message


def test_models_that_make_no_pictures():
    flow, audio, video = MODELS[1:]
    with pytest.raises(ApiError, match="no classes and reads no text"):
        images(flow, prompt="3")
    for model in (audio, video):
        with pytest.raises(ApiError, match="are no images: POST /v1/samples"):
            images(model, prompt="")
    with pytest.raises(ApiError, match="cannot be drawn: take npz"):
        samples(audio)
    assert samples(audio, format="npz").labels == (0,)
    assert samples(video).count == 1
    with pytest.raises(ApiError, match="samplers are onestep, multistep, euler, heun, dpm2; got 'ddim'"):
        samples(flow, sampler="ddim")
    with pytest.raises(ApiError, match="whole number"):
        samples(audio, sigmas=[3.5], format="npz")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "", "n": NaN}',
        b'{"prompt": "", "n": 1e999}',
        b'{"prompt": "", "seed": ' + b"9" * 20000 + b"}",
        b"[" * 60000,
        b'{"a":' * 10000,
        b'{"prompt": "" "n": 1}',
        b'\xef\xbb\xbf{"prompt": ""}',
    ],
    ids=lambda data: repr(data[:24]),
)
def test_bytes_that_are_no_body(data):
    for kind in (ImagesBody, SamplesBody):
        with pytest.raises(ApiError) as refused:
            read(kind, data)
        assert refused.value.status == 400
        json.dumps(refused.value.body()).encode()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.sampled_from("a3é中\0\ud800 "), max_size=4),
    lambda x: st.lists(x, max_size=3),
)
levels = st.lists(st.floats(0, 1000) | st.integers(0, 50) | anything, max_size=4)
FIELDS = {
    "prompt": st.sampled_from(["", "3", "10", "cat"]) | anything,
    "n": st.integers(-1, 9) | anything,
    "count": st.integers(-1, 9) | anything,
    "size": st.sampled_from(["8x8", "auto", "1x1"]) | anything,
    "model": st.just("digits") | anything,
    "response_format": st.sampled_from(["b64_json", "url"]) | anything,
    "class_labels": st.integers(-1, 10) | st.lists(st.integers(0, 10), max_size=3) | anything,
    "steps": st.integers(0, 22) | anything,
    "timesteps": st.lists(st.integers(-1, 50), max_size=4) | anything,
    "sigmas": levels | anything,
    "sampler": st.sampled_from(["onestep", "multistep", "heun", "progdist", "ddim"]) | anything,
    "seed": st.integers(-1, 1 << 65) | anything,
    "first_sample": st.integers(0, 1 << 33) | anything,
    "format": st.sampled_from(["png", "npz"]) | anything,
    "columns": st.integers(-1, 9) | anything,
}
bodies = st.fixed_dictionaries({}, optional=FIELDS)


@contextlib.contextmanager
def refusals():
    """Within the block a client's mistake may be found, which can be told in JSON, and nothing else."""
    try:
        yield
    except ApiError as error:
        json.dumps(error.body()).encode()
        if not 400 <= error.status < 500:
            raise


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies, st.sampled_from(MODELS))
def test_whatever_is_asked_is_possible_or_refused(body, model):
    for kind, find in ((ImagesBody, Reader.images), (SamplesBody, Reader.samples)):
        for only in ({name: body[name] for name in body if name in kind.model_fields}, body):
            wanted = None
            with refusals():
                wanted = find(Reader(model, LIMITS), read(kind, json.dumps(only).encode()))
            if wanted is not None:
                assert 1 <= wanted.count <= LIMITS.count
                assert (wanted.labels is None) == (model.num_classes is None)
                assert all(math.isfinite(level) for level in wanted.plan.levels)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes(data):
    for kind in (ImagesBody, SamplesBody):
        with refusals():
            read(kind, data)
