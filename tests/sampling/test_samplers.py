import json
import math

import pytest
import torch

from cmfast import sampling
from cmfast.noise import GaussianNoise

from ..fixture_files import tensors

DATA, METADATA = tensors("samplers_18")
STEPS = int(METADATA["steps"])
SIGMAS = sampling.karras_sigmas(STEPS)


def denoiser(x, sigma):
    """The exact denoiser of Gaussian data with mean mu and standard deviation sd."""
    s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
    return (DATA["sd"] ** 2 * x + s**2 * DATA["mu"]) / (DATA["sd"] ** 2 + s**2)


def recorded(name):
    return lambda like, draw: DATA[f"{name}.noise"][draw - 1]


CHURN = json.loads(METADATA["samplers"])["heun_churn"]
PUBLISHED = {
    "heun": lambda x: sampling.sample_heun(denoiser, x, SIGMAS),
    "heun_churn": lambda x: sampling.sample_heun(denoiser, x, SIGMAS, noise=recorded("heun_churn"), **CHURN),
    "euler": lambda x: sampling.sample_euler(denoiser, x, SIGMAS),
    "dpm": lambda x: sampling.sample_dpm2(denoiser, x, SIGMAS),
    "ancestral": lambda x: sampling.sample_ancestral(denoiser, x, SIGMAS, noise=recorded("ancestral")),
    "onestep": lambda x: sampling.sample_onestep(denoiser, x, SIGMAS),
    "progdist": lambda x: sampling.sample_progdist(denoiser, x, sampling.karras_sigmas(STEPS + 1)),
    "multistep0": lambda x: sampling.sample_multistep(denoiser, x, SIGMAS[:1], noise=recorded("multistep0")),
    "multistep1": lambda x: sampling.sample_multistep(
        denoiser, x, [SIGMAS[0], SIGMAS[9]], noise=recorded("multistep1")
    ),
}
GRID_SAMPLERS = ["heun", "euler", "dpm2", "dpmpp_2m", "ancestral", "ddim", "progdist"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_outputs_of_the_published_samplers(name):
    error = (PUBLISHED[name](DATA["x_T"]) - DATA[f"{name}.out"]).abs().max()
    assert error < 1e-6


def test_karras_sigmas():
    assert sampling.karras_sigmas(18) == pytest.approx(DATA["sigmas"].tolist(), rel=1e-6)
    assert sampling.karras_sigmas(19) == pytest.approx(DATA["sigmas_progdist"].tolist(), rel=1e-6)
    assert sampling.karras_sigmas(1) == [pytest.approx(80.0), 0.0]
    assert all(type(s) is float for s in SIGMAS)


def exact(x, sigma, sigma_end):
    """The solution of the probability-flow ODE for Gaussian data: x - mu scales as √(sd² + σ²)."""
    ratio = torch.sqrt((DATA["sd"] ** 2 + sigma_end**2) / (DATA["sd"] ** 2 + sigma**2))
    return DATA["mu"] + ratio * (x - DATA["mu"])


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm2", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler, order):
    """Halving the steps' length divides the error by 2^order, on a grid that ends above zero."""
    x, function = DATA["x_T"], sampling.SAMPLERS[sampler]
    errors = []
    for n in (64, 128):
        grid = sampling.karras_sigmas(n, 0.5, 80.0)[:-1]
        errors.append((function(denoiser, x, grid) - exact(x, 80.0, grid[-1])).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2.0**order, rel=0.15)


@pytest.mark.parametrize("eta", [-1.0, 1.5])
def test_a_share_of_noise_is_a_share(eta):
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got"):
        sampling.sample_ddim(denoiser, torch.randn(1, 3, 4, 4), SIGMAS, eta=eta)


def test_ddim_without_noise_is_euler_and_with_all_of_it_ancestral():
    x, noise = DATA["x_T"], recorded("ancestral")
    torch.testing.assert_close(
        sampling.sample_ddim(denoiser, x, SIGMAS), sampling.sample_euler(denoiser, x, SIGMAS), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        sampling.sample_ddim(denoiser, x, SIGMAS, noise=noise, eta=1.0), DATA["ancestral.out"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("sampler", ["ancestral", "heun", "dpm2", "multistep"])
def test_stochastic_samplers_keep_the_distribution(sampler):
    """Many samples of one pixel: the mean and the standard deviation of the data, within sampling error."""
    mu, sd = DATA["mu"].flatten()[0].item(), DATA["sd"].item()

    def pixel(x, sigma):
        s = sigma.reshape(-1, 1)
        return (sd**2 * x + s**2 * mu) / (sd**2 + s**2)

    x = 80.0 * torch.randn(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"s_churn": 20.0} if sampler in ("heun", "dpm2") else {}
    noise = GaussianNoise(seed=1)
    if sampler == "multistep":  # the exact consistency function of these data

        def consistent(x, sigma):
            s = sigma.reshape(-1, 1)
            return mu + (x - mu) * sd / torch.sqrt(sd**2 + s**2)

        out = sampling.sample_multistep(consistent, x, [80.0, 10.0, 1.0], noise=noise, sigma_min=0.0)
    else:
        out = sampling.SAMPLERS[sampler](pixel, x, sampling.karras_sigmas(400), noise=noise, **options)
    assert out.mean().item() == pytest.approx(mu, abs=5 * sd / math.sqrt(len(x)) + 0.01)
    assert out.std().item() == pytest.approx(sd, rel=0.05)


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_reproducible_by_seed(sampler):
    function = sampling.SAMPLERS[sampler]
    levels = [80.0] if sampler == "onestep" else [80.0, 1.0] if sampler == "multistep" else SIGMAS
    runs = [function(denoiser, DATA["x_T"], levels, noise=GaussianNoise(seed)) for seed in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    stochastic = sampler in ("multistep", "ancestral")
    assert torch.equal(runs[0], runs[2]) == (not stochastic)


@pytest.mark.parametrize(("sampler", "options"), [("multistep", {}), ("ancestral", {}), ("heun", {"s_churn": 20.0})])
def test_seeds_on_the_device(sampler, options):
    function, levels = sampling.SAMPLERS[sampler], [80.0, 5.0, 1.0] if sampler == "multistep" else SIGMAS
    seed, first = 2**33 + 5, 3
    noises = GaussianNoise(seed, first), GaussianNoise(torch.tensor(seed), torch.tensor([first]))
    runs = [function(denoiser, DATA["x_T"], levels, noise=noise, **options) for noise in noises]
    assert torch.equal(*runs)


@pytest.mark.parametrize("sampler", ["multistep", "ancestral"])
def test_without_noise_torchs_generator_is_used(sampler):
    function, levels = sampling.SAMPLERS[sampler], [80.0, 1.0] if sampler == "multistep" else SIGMAS
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(function(denoiser, DATA["x_T"], levels))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_callback_and_progress(sampler, capsys):
    few = sampler in ("onestep", "multistep")
    levels = [80.0, 1.0][: 1 if sampler == "onestep" else 2] if few else SIGMAS
    seen = []
    out = sampling.SAMPLERS[sampler](denoiser, DATA["x_T"], levels, callback=seen.append, progress=True)
    count = len(levels) if few else STEPS - (sampler == "progdist")
    assert [entry["i"] for entry in seen] == list(range(count))
    assert [entry["sigma"] for entry in seen] == levels[:count]
    assert [entry["sigma_hat"] for entry in seen] == levels[:count]
    assert torch.equal(seen[-1]["x"], out)
    assert all(entry["denoised"].shape == out.shape for entry in seen)
    assert sampler == "onestep" or f"{count}/{count}" in capsys.readouterr().err
    sampling.SAMPLERS[sampler](denoiser, DATA["x_T"], levels)
    assert capsys.readouterr().err == ""


def test_churn_is_reported():
    seen = []
    sampling.sample_heun(denoiser, DATA["x_T"], SIGMAS, noise=recorded("heun_churn"), callback=seen.append, **CHURN)
    raised = [entry["sigma_hat"] > entry["sigma"] for entry in seen]
    assert raised == [CHURN["s_tmin"] <= s <= CHURN["s_tmax"] for s in SIGMAS[:-1]]


class HostDenoiser:
    """A denoiser with the optional methods; counts how it is called."""

    def __init__(self):
        self.floats, self.steps = 0, 0

    def __call__(self, x, sigma):
        raise AssertionError("a host denoiser must be called with floats")

    def at(self, x, sigma):
        assert type(sigma) is float
        self.floats += 1
        return denoiser(x, torch.tensor([sigma], dtype=x.dtype))

    def step(self, x, sigma, sigma_next, noise, draw):
        self.steps += 1
        denoised = denoiser(x, torch.tensor([sigma], dtype=x.dtype))
        return denoised, denoised + math.sqrt(sigma_next**2 - 0.002**2) * noise(x, draw)


def test_host_denoisers_get_floats():
    host = HostDenoiser()
    out = sampling.sample_multistep(host, DATA["x_T"], [SIGMAS[0], SIGMAS[9]], noise=recorded("multistep1"))
    torch.testing.assert_close(out, DATA["multistep1.out"], rtol=0, atol=1e-6)
    assert (host.floats, host.steps) == (1, 1)
    sampling.sample_heun(host, DATA["x_T"], SIGMAS)
    assert host.floats == 1 + 2 * STEPS - 1


@pytest.mark.parametrize("sampler", GRID_SAMPLERS)
@pytest.mark.parametrize("sigmas", [[1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [1.0, -1.0], [1.0], [], [math.nan, 0.0]])
def test_bad_grids(sampler, sigmas):
    with pytest.raises(ValueError, match="sigmas"):
        sampling.SAMPLERS[sampler](denoiser, DATA["x_T"], sigmas)


@pytest.mark.parametrize("sampler", ["multistep", "onestep"])
def test_levels_of_few_steps_are_positive_and_the_first_is_enough(sampler):
    function = sampling.SAMPLERS[sampler]
    with pytest.raises(ValueError, match="must be positive, got 0"):
        function(denoiser, DATA["x_T"], [0.0])
    assert torch.equal(function(denoiser, DATA["x_T"], [2.0]), denoiser(DATA["x_T"], torch.tensor([2.0])))


def test_a_grid_may_end_above_zero():
    x = DATA["x_T"]
    out = sampling.sample_euler(denoiser, x, [2.0, 1.0])
    expected = x + (1.0 - 2.0) / 2.0 * (x - denoiser(x, torch.tensor([2.0])))
    torch.testing.assert_close(out, expected)
    assert torch.equal(sampling.sample_progdist(denoiser, x, [2.0, 1.0]), out)
    assert torch.equal(sampling.sample_progdist(denoiser, x, [2.0, 1.0, 0.0]), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_denoisers_get_their_level_for_every_sample(dtype):
    """[N] in float32, float64 for float64 samples."""
    seen = []
    x = torch.zeros(3, 1, 2, 2, dtype=dtype)
    sampling.sample_onestep(lambda x, sigma: seen.append(sigma) or x, x, [0.7])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(seen[0], torch.full((3,), 0.7, dtype=wide))
    assert seen[0].dtype == wide


def test_draws_count_from_one():
    for sampler, options in (("ancestral", {}), ("heun", {"s_churn": 1.0}), ("dpm2", {"s_churn": 1.0})):
        draws = []
        noise = lambda like, draw, draws=draws: draws.append(draw) or torch.zeros_like(like)  # noqa: E731
        sampling.SAMPLERS[sampler](denoiser, DATA["x_T"], [4.0, 2.0, 1.0, 0.0], noise=noise, **options)
        assert draws == ([1, 2] if sampler == "ancestral" else [1, 2, 3])
    draws.clear()
    sampling.sample_multistep(denoiser, DATA["x_T"], [4.0, 2.0, 1.0], noise=noise)
    assert draws == [1, 2]


@pytest.mark.parametrize("sampler", [sampling.sample_heun, sampling.sample_dpm2])
def test_churn_adds_the_noise_between_the_two_levels(sampler):
    """√(σ̂² - σ²) · s_noise · z, and the whole of it where nothing else is said: s_tmin 0, s_tmax ∞, s_noise 1."""
    seen = []
    noise = lambda like, draw: torch.ones_like(like)  # noqa: E731
    x, levels = torch.zeros(1, 1, 2, 2, dtype=torch.float64), [4.0, 2.0, 0.0]
    for options, factor in (({}, 1.0), ({"s_noise": 0.5}, 0.5)):
        seen.clear()
        sampler(lambda x, sigma: seen.append(x) or x, x, levels, noise=noise, s_churn=0.5, **options)
        assert seen[0].unique().item() == pytest.approx(factor * math.sqrt((4 * 1.25) ** 2 - 4**2))
    for s_churn in (0.0, -1.0):
        seen.clear()
        sampler(lambda x, sigma: seen.append(x) or x, x, levels, noise=noise, s_churn=s_churn)
        assert seen[0].abs().max() == 0


def test_an_eta_between_adds_that_share_of_the_noise():
    """Song et al. 2020, equation 16: σ_up = eta · σ' · √(1 - σ'²/σ²), and the step goes down to √(σ'² - σ_up²)."""
    x = torch.full((1, 1, 2, 2), 3.0, dtype=torch.float64)
    noise = lambda like, draw: torch.ones_like(like)  # noqa: E731
    out = sampling.sample_ddim(lambda x, sigma: 0 * x, x, [4.0, 2.0], noise=noise, eta=0.5)
    up = 0.5 * 2.0 * math.sqrt(1 - 0.25)
    assert out.unique().item() == pytest.approx(3.0 * math.sqrt(2.0**2 - up**2) / 4.0 + up)


@pytest.mark.parametrize("sampler", ["multistep", "onestep"])
@pytest.mark.parametrize("sigmas", [[0.0], [-1.0], [], [math.inf], [1.0, 2.0], [2.0, 2.0], [1.0, math.nan]])
def test_bad_levels(sampler, sigmas):
    with pytest.raises(ValueError, match="sigmas"):
        sampling.SAMPLERS[sampler](denoiser, DATA["x_T"], sigmas)


@pytest.mark.parametrize(
    "arguments",
    [
        *((0,), (5, 0.0), (5, 2.0, 1.0), (5, 1.0, 1.0), (5, 0.1, 1.0, 0.0), (5, 1, math.inf)),
        *((5, 0.1, 1.0, math.nan), (5, 0.1, 1.0, math.inf)),
    ],
)
def test_bad_schedules(arguments):
    with pytest.raises(ValueError, match="karras_sigmas"):
        sampling.karras_sigmas(*arguments)


def test_one_step_takes_a_grid():
    """Of which the first level counts."""
    expected = sampling.sample_onestep(denoiser, DATA["x_T"], SIGMAS[:1])
    assert torch.equal(sampling.sample_onestep(denoiser, DATA["x_T"], SIGMAS), expected)
    assert torch.equal(sampling.sample_onestep(denoiser, DATA["x_T"], torch.tensor(SIGMAS)), expected)


@pytest.mark.parametrize("sampler", [sampling.sample_heun, sampling.sample_dpm2])
@pytest.mark.parametrize(
    "wrong", [{"s_churn": math.nan}, {"s_tmin": math.nan}, {"s_tmax": math.nan}, {"s_noise": math.inf}], ids=str
)
def test_churn_by_no_numbers(sampler, wrong):
    with pytest.raises(ValueError, match="s_churn, s_tmin and s_tmax must be numbers and s_noise finite, got"):
        sampler(denoiser, DATA["x_T"], SIGMAS, **{"s_churn": 1.0} | wrong)


@pytest.mark.parametrize("sigma_min", [-0.1, math.nan, math.inf])
def test_a_least_level_that_is_none(sigma_min):
    with pytest.raises(ValueError, match="sigma_min must be at least 0 and finite, got"):
        sampling.sample_multistep(denoiser, DATA["x_T"], [2.0, 1.0], sigma_min=sigma_min)


def test_tensor_levels_are_read_once():
    x = DATA["x_T"]
    assert torch.equal(
        sampling.sample_euler(denoiser, x, torch.tensor(SIGMAS, dtype=torch.float64)),
        sampling.sample_euler(denoiser, x, SIGMAS),
    )


def test_near_sigma_min_less_noise_is_added():
    """The denoised sample stands at sigma_min: √(τ² - sigma_min²) brings it to τ (Song et al. 2023, algorithm 1)."""
    x = torch.zeros(1, 1, 2, 2)
    noise = lambda like, draw: torch.ones_like(like)  # noqa: E731
    seen = []
    sampling.sample_multistep(lambda x, sigma: seen.append(x) or torch.zeros_like(x), x, [1.0, 0.003], noise=noise)
    assert seen[1].unique().item() == pytest.approx(math.sqrt(0.003**2 - 0.002**2), rel=1e-5)
    sampling.sample_multistep(lambda x, sigma: seen.append(x) or torch.zeros_like(x), x, [1.0, 0.002], noise=noise)
    assert seen[3].unique().item() == 0.0


@pytest.mark.parametrize("sampler", [sampling.sample_heun, sampling.sample_dpm2])
def test_churn_is_that_of_the_paper(sampler):
    """Karras et al. 2022, algorithm 2: γ = min(s_churn / N, √2 - 1) for levels in [s_tmin, s_tmax], both included."""
    levels, seen = [8.0, 4.0, 2.0, 1.0, 0.0], []
    noise = lambda like, draw: torch.zeros_like(like)  # noqa: E731
    for s_churn, gamma in ((0.8, 0.8 / 4), (100.0, math.sqrt(2) - 1)):
        seen.clear()
        sampler(
            lambda x, sigma: x,
            torch.zeros(1, 1, 2, 2),
            levels,
            noise=noise,
            s_churn=s_churn,
            s_tmin=2.0,
            s_tmax=4.0,
            callback=lambda step: seen.append(step["sigma_hat"]),
        )
        assert seen == pytest.approx([8.0, 4.0 * (1 + gamma), 2.0 * (1 + gamma), 1.0])
