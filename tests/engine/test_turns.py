"""Threads beside one another, and one alone."""

import threading
import time

import pytest
import torch

import cmfast
from cmfast.engine.turns import Turns

from .test_parts import CLOSE, Net, X, call


def run(*functions):
    threads = [threading.Thread(target=f, daemon=True) for f in functions]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads), "threads wait for one another"


@pytest.mark.parametrize("beside_first", [False, True])
def test_who_is_alone_is_alone(beside_first):
    turns, inside, found = Turns(), [], []

    def work():
        for _ in range(30):
            with turns.beside(), turns.beside():
                inside.append("beside")
                if beside_first:
                    inside.remove("beside")
                    alone()
                    inside.append("beside")
                time.sleep(1e-4)
                inside.remove("beside")
            alone()

    def alone():
        with turns.alone(), turns.alone(), turns.beside():
            found.append(list(inside))
            inside.append("alone")
            time.sleep(1e-4)
            inside.remove("alone")

    run(*[work] * 4)
    assert found
    assert not any(found)
    assert not inside


def test_several_are_beside_at_a_time():
    turns, barrier = Turns(), threading.Barrier(3, timeout=30)

    def work():
        with turns.beside():
            barrier.wait()

    run(*[work] * 3)
    assert not barrier.broken


def test_networks_that_share_modules_are_captured_in_turns():
    """Nothing is captured before the threads begin; each shape is met by several of them at once."""
    net = Net().eval()
    networks = [cmfast.accelerate(net), cmfast.accelerate(net)]
    inputs = [X[:, :, : 4 + i] for i in range(3)]
    expected = [call(net, x, scale=0.0) for x in inputs]
    wrong = []

    def work(fast, order):
        for i in order:
            y = fast(inputs[i], scale=0.0)["y"]
            if not torch.allclose(y, expected[i], **CLOSE):
                wrong.append(i)

    run(*(lambda fast=fast, order=order: work(fast, order) for fast in networks for order in ((0, 1, 2), (2, 1, 0))))
    assert not wrong
    assert all(m._compiled_call_impl is None for m in net.modules())


def test_who_wants_to_be_alone_does_not_wait_for_ever():
    """Two that are beside in turn leave no moment in which nobody is."""
    turns, done = Turns(), threading.Event()

    def beside():
        while not done.is_set():
            with turns.beside():
                time.sleep(0.01)

    threads = [threading.Thread(target=beside, daemon=True) for _ in range(2)]
    for t in threads:
        t.start()
    began = time.perf_counter()
    with turns.alone():
        took = time.perf_counter() - began
    done.set()
    for t in threads:
        t.join(30)
    assert took < 5


def test_courtesy_is_no_deadlock():
    """One that is beside waits for a helper, which would be beside too, while a third wants to be alone."""
    turns, waiting = Turns(), threading.Event()

    def alone():
        waiting.set()
        with turns.alone():
            pass

    def beside():
        with turns.beside():
            third = threading.Thread(target=alone, daemon=True)
            third.start()
            waiting.wait()
            time.sleep(0.1)
            helper = threading.Thread(target=lambda: turns.beside().__enter__(), daemon=True)
            helper.start()
            helper.join(20)
            assert not helper.is_alive()

    run(beside)
