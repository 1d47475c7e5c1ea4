"""Latency of samplers beside the quality of what they draw, so that speed is compared at equal quality."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import ConsistencyModel
from .classifier import Classifier
from .quality import Quality, evaluate

#: Seconds of a batch up to which one is drawn that is not timed.
SHORT = 0.05


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way of sampling: a model by its name in the table, a sampler and its steps.

    `decoder` makes images of the latents [N, C, *spatial] that some models draw.
    """

    name: str
    model: ConsistencyModel
    sampler: str
    steps: int
    decoder: Callable[[Tensor], Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class Latency:
    """What was measured of a plan.

    Attributes:
        model: the plan's name for it.
        sampler: name of the sampler.
        steps: its steps.
        evaluations: calls of the network a batch, counted.
        seconds: median time of a batch.
        fastest: time of the fastest batch.
        slowest: time of the slowest batch.
        samples_per_second: batch size over the median.
        quality: of all the batches' samples; None without a classifier.
        batch_size: samples a batch.
        first: time of the plan's first batch, with what is allocated, compiled and captured for it; what other plans
            of the same model have prepared before is prepared.
        rounds: time of each batch.
        decoding: median time of a batch in the decoder, which `seconds` has in it; None without one.
    """

    model: str
    sampler: str
    steps: int
    evaluations: int
    seconds: float
    fastest: float
    slowest: float
    samples_per_second: float
    quality: Quality | None
    batch_size: int = 1
    first: float | None = None
    rounds: tuple[float, ...] = ()
    decoding: float | None = None


def measure(
    plans: Sequence[Plan],
    *,
    batch_size: int,
    rounds: int,
    seed: int = 0,
    classifier: Classifier | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Latency]:
    """Time every plan `rounds` times, in turn, so that a slow moment of the machine falls on all of them alike.

    A round draws the next batch_size samples of the run of `seed`; the first batch of each plan (allocation,
    compilation, capture) is timed apart. A plan whose batches take less than `SHORT` seconds draws one before each that
    is timed, since the plan before it has taken the caches. All samples of a plan go into its quality. Ctrl-C ends the
    rounds: the rows are of those that were done, and without plans that have none.

    Args:
        plans: what to measure.
        batch_size: samples a batch.
        rounds: batches a plan.
        seed: of the noise.
        classifier: measures the samples, of which it needs two; None leaves quality out.
        progress: called with (batches done, batches in all).

    Raises:
        FloatingPointError: samples that are not finite; nothing is reported of such a run.
    """
    firsts = [_timed(plan, batch_size, 0, seed)[0][1] for plan in plans]
    evaluations = _evaluations(plans)
    # A network that is accelerated is made ready again once the counting hook is gone.
    short = [_timed(plan, batch_size, 0, seed)[0][1] < SHORT for plan in plans]
    # Of each batch its seconds, those in the decoder and its samples, in one: Ctrl-C comes between any two statements.
    done: list[list[tuple[float, float, Tensor]]] = [[] for _ in plans]
    try:
        for i in range(rounds):
            for k, plan in enumerate(plans):
                if short[k]:
                    _timed(plan, batch_size, i * batch_size, seed)
                (sampled, elapsed), drawn = _timed(plan, batch_size, i * batch_size, seed)
                if not torch.isfinite(drawn).all():
                    what = f"{plan.name} {plan.sampler} {plan.steps}"
                    raise FloatingPointError(f"{what} gave samples that are not finite")
                done[k].append((elapsed, elapsed - sampled, drawn.cpu()))
                if progress is not None:
                    progress(i * len(plans) + k + 1, rounds * len(plans))
    except KeyboardInterrupt:
        if not done[0]:
            raise
    rows = []
    for i, (plan, batches) in enumerate(zip(plans, done, strict=True)):
        if not batches:
            continue
        times, decoding, samples = zip(*batches, strict=True)
        median = statistics.median(times)
        labels = torch.arange(len(times) * batch_size) % (plan.model.num_classes or 1)
        measured = classifier is not None and len(labels) > 1
        quality = evaluate(torch.cat(samples), labels, classifier) if measured else None  # type: ignore[arg-type]
        rows.append(
            Latency(
                plan.name,
                plan.sampler,
                plan.steps,
                evaluations[i],
                median,
                min(times),
                max(times),
                batch_size / median,
                quality,
                batch_size,
                firsts[i],
                times,
                None if plan.decoder is None else statistics.median(decoding),
            )
        )
    return rows


def _evaluations(plans: Sequence[Plan]) -> list[int]:
    """How many times each plan evaluates its network, counted by hooks: what is timed has none.

    One for all plans of a network: an accelerated one is captured anew when a hook comes or goes, or a list changes
    that its hooks write to.
    """
    calls, found = itertools.count(), []

    def note(*_: Any) -> None:
        next(calls)

    networks = {id(plan.model.unet): plan.model.unet for plan in plans}
    hooks = [network.register_forward_pre_hook(note) for network in networks.values()]
    try:
        for plan in plans:
            before = next(calls)
            plan.model.sample(1, sampler=plan.sampler, steps=plan.steps)
            found.append(next(calls) - before - 1)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _timed(plan: Plan, batch_size: int, first_sample: int, seed: int) -> tuple[tuple[float, float], Tensor]:
    """The seconds until the samples are there, those until they are decoded, and what came of it."""
    synchronize = torch.cuda.synchronize if plan.model.device.type == "cuda" else lambda: None
    synchronize()
    begin = time.perf_counter()
    drawn = plan.model.sample(batch_size, sampler=plan.sampler, steps=plan.steps, seed=seed, first_sample=first_sample)
    synchronize()
    sampled = time.perf_counter() - begin
    if plan.decoder is None:
        return (sampled, sampled), drawn
    with torch.inference_mode():
        drawn = plan.decoder(drawn)
    synchronize()
    return (sampled, time.perf_counter() - begin), drawn


def equal_quality(row: Latency, baselines: Sequence[Latency]) -> Latency | None:
    """The fastest baseline that is at least as good as `row`; None where there is none, or nothing was measured.

    At least as good: Fréchet distances to both real sets no larger, and an accuracy no more than half a percent lower.
    """
    if row.quality is None:
        return None
    good = [
        other
        for other in baselines
        if other.quality is not None
        and other.quality.accuracy >= row.quality.accuracy - 0.005
        and other.quality.frechet_train <= row.quality.frechet_train
        and other.quality.frechet_test <= row.quality.frechet_test
    ]
    return min(good, key=lambda other: other.seconds, default=None)
