"""The suites: what they call useful work, counted by brute force, and that their quick cases run."""

from __future__ import annotations

import pytest
import torch

from bench import __main__ as command
from bench import conv_transpose2d_bn_act, crowded, logistic_mixture_nll, masked_conv2d, sampling
from bench.harness import gate, rows


@pytest.mark.parametrize(("height", "width", "kernel"), [(4, 5, 3), (1, 1, 3), (3, 2, 7), (6, 6, 1)])
def test_useful_flops_by_counting(height, width, kernel):
    """One multiply-add per output, open weight and input that exists."""
    mask = torch.rand(3, 2, kernel, kernel, generator=torch.Generator().manual_seed(0)) < 0.5
    products, half = 0, kernel // 2
    for y in range(height):
        for x in range(width):
            for ky in range(kernel):
                for kx in range(kernel):
                    if 0 <= y + ky - half < height and 0 <= x + kx - half < width:
                        products += int(mask[:, :, ky, kx].sum())
    assert masked_conv2d.useful_flops(mask, 5, height, width) == 2 * 5 * products


@pytest.mark.parametrize(
    "suite",
    [conv_transpose2d_bn_act, crowded, logistic_mixture_nll, masked_conv2d, sampling],
    ids=lambda module: module.__name__,
)
@pytest.mark.parametrize("quick", [True, False])
def test_case_names_are_unique(suite, quick):
    names = [case.name for case in suite.cases(quick)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "suite", ["conv_transpose2d_bn_act", "crowded", "logistic_mixture_nll", "masked_conv2d", "sampling"]
)
def test_quick_run(suite, tmp_path, monkeypatch, capsys):
    """The whole path but the tests of the operation, which run beside this one."""
    monkeypatch.setattr(gate, "run_tests", lambda paths, checkout: None)
    threads = torch.get_num_threads()
    try:
        assert command.main([suite, "--quick", "--threads", "1", "--results", str(tmp_path)]) == 0, (
            capsys.readouterr().err
        )
    finally:
        torch.set_num_threads(threads)
    found = rows.read(tmp_path / f"{suite}-quick.jsonl")
    assert "fastgen" in {row["provider"] for row in found}
    for row in found:
        rows.check(row)
        assert row["flops"] > 0
        assert (row["provider"] == "fastgen") <= bool(row["speedup"])
