"""The Triton kernel of `nearest_code` against exact distances."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fastgen import ops
from fastgen.kernels import nearest_code as kernel
from tests.ops.test_nearest_code import LAYOUTS, by_hand, close_codes, features, rows_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(x, codes, device):
    return kernel.nearest_code(x.to(device), codes.to(device)).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [1, 3, 17, 65])
def test_integers_and_ties(depth, dtype, device):
    """Nothing is rounded: the lowest index of many equal ones."""
    for count, shape in [(1, (3, 7)), (2, (5,)), (17, (2, 5, 3)), (50, (2, 1, 17))]:
        x, codes = features(shape, depth).round().to(dtype), torch.randn(count, depth).round().to(dtype)
        codes[count // 2 :] = codes[: count - count // 2].clone()
        actual = run(x, codes, device)
        assert actual.dtype == torch.int64
        assert torch.equal(actual, by_hand(x, codes)), (count, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [3, 70])
def test_as_accurate_as_pytorch(depth, dtype, device):
    """How much farther the chosen codes are than the nearest: of lower precisions, no more than of their values in
    float32.
    """
    spread = 1e-6 if dtype == torch.float32 else 0.05
    x, codes = torch.randn(100, depth).to(dtype), close_codes(60, depth, spread=spread).to(dtype)
    exact = torch.cdist(x.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    x32, codes32 = x.float(), codes.float()
    plain = (x32.square().sum(1, keepdim=True) - 2 * x32 @ codes32.T + codes32.square().sum(1)).argmin(1)
    excess = exact - exact.amin(1, keepdim=True)
    theirs, ours = (float(excess.gather(1, i[:, None]).sum()) for i in (plain, run(x, codes, device)))
    assert ours <= 2 * theirs, (ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits(layout, device):
    x, codes = features((2, 5, 7), 17), close_codes(40, 17)
    expected = run(x, codes, device)
    arranged = LAYOUTS[layout](x.to(device))
    if arranged.is_neg():
        arranged = arranged.resolve_neg()  # as PyTorch does for operators
    assert torch.equal(kernel.nearest_code(arranged, codes.to(device)).cpu(), expected)
    assert torch.equal(kernel.nearest_code(arranged, codes.T.contiguous().to(device).T).cpu(), expected)
    assert torch.equal(run(rows_of(x), codes, device), expected.flatten())


def test_bits_do_not_depend_on_the_batch(device):
    x, codes = torch.randn(40, 70), close_codes(50, 70)
    expected = run(x, codes, device)
    assert torch.equal(torch.cat([run(part, codes, device) for part in x.split(7)]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(dtype, device):
    """As in the other backends: index 0 for vectors, never taken of codes."""
    x, codes = features((3, 7), 40).to(dtype), torch.randn(20, 40).to(dtype)
    x[1, 33, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    codes[::5, 2] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])
    usable = torch.arange(20)[codes.isfinite().all(1)]
    expected = usable[by_hand(x.nan_to_num(0, 0, 0), codes[usable])]
    expected[1, :3] = 0
    assert torch.equal(run(x, codes, device), expected)
    assert run(x, torch.full_like(codes, torch.nan), device).eq(0).all()
    assert run(x, torch.full_like(codes, torch.inf), device).eq(0).all()
    huge = torch.finfo(dtype).max
    assert run(torch.full((9, 3), huge), torch.full((5, 3), huge), device).eq(0).all()


@pytest.mark.parametrize("shape", [(0,), (2, 0, 4)], ids=str)
def test_empty(shape, device):
    assert run(features(shape, 3), torch.randn(5, 3), device).shape == shape


def test_as_a_backend(device, triton_backend):
    codes = torch.randn(20, 5)
    expected = torch.randint(20, (2, 3, 4))
    x = (codes[expected] + 0.001 * torch.randn(2, 3, 4, 5)).movedim(-1, 1)
    assert torch.equal(ops.nearest_code(x.to(device), codes.to(device)).cpu(), expected)
    opcheck(torch.ops.fastgen.nearest_code.default, (x.to(device), codes.to(device)))
