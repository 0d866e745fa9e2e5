"""What PyTorch was asked for is found by its older and its newer settings, and convolutions get what products have."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastgen._float32 import convolutions_like_products, float32_products
from fastgen.sampling import Categorical
from fastgen.sampling.subject import make_subject

newer = pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the older settings only")


@pytest.mark.parametrize(("asked", "found"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_the_older_setting(asked: str, found: str) -> None:
    torch.set_float32_matmul_precision(asked)
    try:
        assert float32_products() == found
    finally:
        torch.set_float32_matmul_precision("highest")


NEWER = """
import torch
from fastgen._float32 import convolutions_like_products, float32_products
from fastgen.sampling import Categorical
from fastgen.sampling.subject import make_subject
torch.backends.cuda.matmul.fp32_precision = products = {products!r}
conv = torch.backends.cudnn.conv
before = conv.fp32_precision
assert float32_products() == products
with convolutions_like_products():
    assert conv.fp32_precision == products
assert conv.fp32_precision == before
"""


@newer
@pytest.mark.parametrize("products", ["ieee", "tf32"])
def test_the_newer_setting(products: str) -> None:
    """In a process of its own: the older one may not be read afterwards."""
    subprocess.run([sys.executable, "-c", NEWER.format(products=products)], check=True)


@newer
def test_the_last_of_several_threads_restores_it() -> None:
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    first, second = convolutions_like_products(), convolutions_like_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert conv.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert conv.fp32_precision == before


def test_settings_are_left_as_they_were() -> None:
    before = torch.backends.cudnn.allow_tf32
    with convolutions_like_products():
        pass
    assert torch.backends.cudnn.allow_tf32 == before
    assert torch.get_float32_matmul_precision() == "highest"


@newer
def test_a_forward_pass_that_samples_or_audits_has_no_tf32_that_nobody_asked_for() -> None:
    found: list[str] = []

    class Model(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found.append(torch.backends.cudnn.conv.fp32_precision)
            return super().forward(x)

    subject = make_subject(Model(1, 3, 1), (1, 2, 2), Categorical(3), None)
    subject.params(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), None, {})
    assert found == ["ieee"]
