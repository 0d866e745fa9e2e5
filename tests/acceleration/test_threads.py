"""Tracing replaces functions of PyTorch for a while: other threads must not notice, and all must be as it was."""

from __future__ import annotations

from threading import Event, Thread

import torch
from torch import nn

import fastgen

from .networks import block, prepared


class Calling(nn.Module):
    """Does something in its forward, once."""

    def __init__(self):
        super().__init__()
        self.block = block(3, 4)

    def forward(self, x):
        for action in ACTIONS.pop(type(self), []):
            action()
        return self.block(x)


ACTIONS: dict[type, list] = {}


def in_a_thread(function):
    thread = Thread(target=function)
    thread.start()
    return thread


@torch.no_grad()
def test_other_threads_run_their_modules():
    network, x, results = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.randn(4, 3), []

    def run():
        results.append(network(x) + torch.zeros(4, 2) + network[0].bias)

    ACTIONS[Calling] = [lambda: in_a_thread(run).join()]
    assert fastgen.accelerate(prepared(Calling())).fastgen_report.fused
    assert not ACTIONS
    torch.testing.assert_close(results[0], network(x) + network[0].bias)


@torch.no_grad()
def test_two_threads_accelerate():
    """Unless one waits for the other, the first restores what the second replaces, which restores it replaced."""

    class Other(Calling):
        pass

    zeros, began, ended, reports = torch.zeros, Event(), Event(), []

    def accelerate():
        reports.append(fastgen.accelerate(prepared(Other())).fastgen_report)

    ACTIONS[Calling] = [lambda: threads.append(in_a_thread(accelerate)), lambda: began.wait(0.2)]
    ACTIONS[Other] = [began.set, lambda: ended.wait(0.2)]
    threads: list[Thread] = []
    reports.append(fastgen.accelerate(prepared(Calling())).fastgen_report)
    ended.set()
    threads[0].join()
    assert torch.zeros is zeros
    assert [len(report.fused) for report in reports] == [1, 1]
