"""What a forward may ask of its values, to decide by it: answered as for tensors, or the forward is left as it is; what
is assumed of inputs is checked at each call.
"""

from __future__ import annotations

import collections.abc
import functools
import logging
import numbers
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen
from fastgen.acceleration.program import Program

from .networks import prepared
from .test_left_alone import reasons


class Asks(nn.Module):
    """One of two branches, by the answer."""

    def __init__(self, ask):
        super().__init__()
        self.ask, self.first, self.second = ask, nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = torch.relu(self.first(x))
        return y if self.ask(self, x, y) else torch.relu(self.second(y)) + 1


def matches(module, x, y):
    match y:
        case Tensor():
            return True
        case _:
            return False


def tries(module, x, y):
    try:
        return y.missing
    except AttributeError:
        return True


@functools.singledispatch
def dispatched(value):
    return False


@dispatched.register
def _(value: Tensor):
    return True


QUESTIONS = {
    "is a tensor": lambda m, x, y: isinstance(x, Tensor) and isinstance(y, Tensor),
    "is a tensor or nothing": lambda m, x, y: isinstance(y, Tensor | None),
    "is several": lambda m, x, y: isinstance(y, list | tuple),
    "is iterable": lambda m, x, y: isinstance(y, collections.abc.Iterable),
    "is a sequence": lambda m, x, y: isinstance(y, collections.abc.Sequence),
    "is a number": lambda m, x, y: isinstance(x.shape[0], numbers.Number),
    "a size is an integer": lambda m, x, y: isinstance(y.shape[0], int),
    "a shape is a torch.Size": lambda m, x, y: isinstance(y.shape, torch.Size),
    "is a parameter": lambda m, x, y: isinstance(m.first.weight, nn.Parameter) and not isinstance(x, nn.Parameter),
    "of a dtype": lambda m, x, y: isinstance(y, torch.FloatTensor),
    "type": lambda m, x, y: type(y) is Tensor,
    "type of the input": lambda m, x, y: type(x) == Tensor,  # noqa: E721
    "subclass": lambda m, x, y: issubclass(type(y), Tensor),
    "type of a parameter": lambda m, x, y: type(m.first.weight) is nn.Parameter,
    "type of a module": lambda m, x, y: type(m) is Asks,
    "type in a table": lambda m, x, y: {Tensor: True}.get(type(y), False),
    "__class__": lambda m, x, y: y.__class__ is Tensor,
    "torch.is_tensor": lambda m, x, y: torch.is_tensor(y),
    "torch.jit.isinstance": lambda m, x, y: torch.jit.isinstance(x, Tensor) and torch.jit.isinstance(y, Tensor),
    "torch.jit.isinstance of a list": lambda m, x, y: torch.jit.isinstance([x, y], list[Tensor]),
    "match": matches,
    "singledispatch": lambda m, x, y: dispatched(y),
    "callable": lambda m, x, y: callable(y),
    "hasattr": lambda m, x, y: hasattr(y, "shape") and not hasattr(y, "missing"),
    "try": tries,
    "gradient": lambda m, x, y: y.grad_fn is None,
    "gradient of a parameter": lambda m, x, y: m.first.weight.grad is None,
    "traced by torch.fx": lambda m, x, y: torch.fx._symbolic_trace._is_fx_tracing_flag,
    "a proxy": lambda m, x, y: isinstance(x, torch.fx.Proxy),
    "dtype": lambda m, x, y: x.dtype == torch.float32,
    "other dtype": lambda m, x, y: y.dtype in (torch.float16, torch.bfloat16),
    "device": lambda m, x, y: x.device.type != "cpu",
    "cuda": lambda m, x, y: y.is_cuda,
    "cuda in a name": lambda m, x, y: "cuda" in x.device.type,
    "this device": lambda m, x, y: x.device == torch.device("cpu"),
    "in a tensor": lambda m, x, y: 100.0 in x,
    "batch": lambda m, x, y: x.shape[0] >= 3,
    "batch by size": lambda m, x, y: y.size(0) == 1,
    "batch by length": lambda m, x, y: len(y) == 1,
    "elements": lambda m, x, y: y.numel() * 2 > 2**31,
    "dimensions": lambda m, x, y: len(x.shape) == 4 and y.ndim == 4 and len(y.shape[2:]) == 2,
    "sizes": lambda m, x, y: x.shape[2] > 5,
    "contiguous": lambda m, x, y: y.is_contiguous(),
    "requires_grad": lambda m, x, y: x.requires_grad,
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("gradients", [False, True], ids=["without gradients", "with gradients"])
def test_the_same_branch(question, gradients):
    torch.manual_seed(0)
    network = prepared(Asks(QUESTIONS[question]))
    fast = fastgen.accelerate(network)
    with torch.set_grad_enabled(gradients):
        for n in (1, 3):
            x = torch.randn(n, 4, 6, 5)
            torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    module = sys.modules[__name__]
    assert not any(name in vars(module) for name in ("type", "isinstance", "callable", "len"))


FUSED = ["is a tensor", "type", "subclass", "torch.jit.isinstance", "match", "singledispatch", "callable", "__class__"]
FUSED += [
    "cuda in a name",
    "this device",
    "dtype",
    "other dtype",
    "device",
    "cuda",
    "batch",
    "batch by size",
    "batch by length",
    "elements",
    "dimensions",
]


@torch.no_grad()
@pytest.mark.parametrize("question", FUSED)
def test_what_is_known_does_not_stop_fusion(question):
    fast = fastgen.accelerate(prepared(Asks(QUESTIONS[question])))
    assert [entry.what for entry in fast.fastgen_report.fused][:1] == ["Conv2d + relu"]
    assert set(reasons(fast).values()) <= {"never called in forward"}


@torch.no_grad()
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("question", "n", "dtype"), [("batch", 3, torch.float32), ("dtype", 1, torch.float64)])
def test_other_inputs_than_assumed(question, n, dtype, caplog):
    """Run the original, without a warning, and do not spoil what was made for the others."""
    network = prepared(Asks(QUESTIONS[question]))
    fast = fastgen.accelerate(network)
    expected = torch.ones(1, 4, 6, 5)
    expected = fast(expected)
    x, others = torch.randn(n, 4, 6, 5, dtype=dtype), (network.to(dtype), fast.to(dtype))
    with caplog.at_level(logging.INFO, logger="fastgen"):
        torch.testing.assert_close(others[1](x), others[0](x))
    assert "other device, dtype or number" in caplog.text or dtype != torch.float32
    assert torch.equal(fast.to(torch.float32)(torch.ones(1, 4, 6, 5)), expected)


@torch.no_grad()
def test_a_reason_names_the_line():
    fast = fastgen.accelerate(prepared(Asks(QUESTIONS["sizes"])))
    (reason, *_) = [r for r in reasons(fast).values() if "control flow" in r]
    assert "control flow that depends on data: return y if self.ask(self, x, y)" in reason
    assert "(test_questions.py, line " in reason


@torch.no_grad()
def test_a_program_that_fails_is_not_tried_again(monkeypatch):
    network = prepared(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    fast = fastgen.accelerate(network)
    program = fast.forward.__self__
    calls = []

    def broken(*args):
        calls.append(args)
        raise RuntimeError("broken")

    monkeypatch.setattr(program, "functions", dict.fromkeys(program.functions, broken))
    x = torch.randn(1, 4, 3, 3)
    with pytest.warns(RuntimeWarning, match="failed where the original did not: broken"):
        torch.testing.assert_close(fast(x), network(x))
    torch.testing.assert_close(fast(x), network(x))
    assert len(calls) == 1


class OtherBranch(nn.Module):
    """A norm that is called with more than it takes, where a second tensor is given."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x, latents=None):
        x = self.conv(x)
        x = self.norm(x) if latents is None else self.norm(x, latents)
        return self.last(x)


@torch.no_grad()
def test_a_branch_that_would_fail():
    network = prepared(OtherBranch())
    fast, x = fastgen.accelerate(network), torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError):
        fast(x, x)


class Careful(nn.Module):
    """Looks at the kind of what it takes before each convolution."""

    def __init__(self, upsample):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 3, padding=1), nn.ConvTranspose2d(6, 4, 4, 2)])
        self.upsample = nn.Upsample(scale_factor=2) if upsample else None

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            if i == 1 and self.upsample is not None:
                x = self.upsample(x)
            if x.dtype != torch.float32:
                x = x.float()
            if x.device != layer.weight.device:
                raise ValueError
            x = torch.relu(layer(x))
            if x.device.type == "cuda":
                x = x.clone()
        return x


@torch.no_grad()
@pytest.mark.parametrize("upsample", [False, True])
def test_questions_between_blocks_do_not_part_them(upsample):
    network = prepared(Careful(upsample))
    fast, x = fastgen.accelerate(network), torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)
    ((source),) = Program.of(fast).sources.values()
    assert source.text.count("conv_sequence_conv_bn_act_sequence(") == 1
    assert "upsample(" not in source.text
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            torch.testing.assert_close(fast(x), network(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(fast(x.double()), network(x.double()))


class AsksLate(nn.Module):
    """After something that must not be done twice."""

    def __init__(self, before):
        super().__init__()
        self.conv, self.last, self.before = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), before

    def forward(self, x):
        x = self.before(x)
        x = torch.relu(self.conv(x))
        if x.shape[0] > 1:
            x = x + x.mean(0, keepdim=True)
        return self.last(x)


def add_to_a_part(x):
    x[:, :1].add_(1)
    return x


LATE = {
    "in place": lambda x: F.leaky_relu(x, 0.2, inplace=True),
    "method": lambda x: x.mul_(2),
    "part": add_to_a_part,
    "random": lambda x: x + torch.randn_like(x),
}


@torch.no_grad()
@pytest.mark.parametrize("before", LATE)
@pytest.mark.parametrize("n", [1, 3])
def test_questions_after_writes(before, n):
    network = prepared(AsksLate(LATE[before]))
    fast, results = fastgen.accelerate(network), []
    for module in (network, fast):
        torch.manual_seed(0)
        x = torch.randn(n, 4, 6, 5)
        results.append((module(x), x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def grow(x):
    while x.shape[0] < 4:
        x = torch.cat([x, x])
    return x


def flatten(x):
    while x.dim() > 2:
        x = x.mean(-1)
    return x


def ask_for_ever(x):
    while x.shape[0] < 4:
        pass
    return x


@torch.no_grad()
@pytest.mark.parametrize("loop", [grow, flatten])
def test_loops_end(loop):
    network = prepared(nn.Sequential(nn.Conv2d(4, 4, 3), Applied(loop)))
    fast, x = fastgen.accelerate(network), torch.randn(1, 4, 6, 5)
    torch.testing.assert_close(fast(x), network(x))


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_loop_without_end_is_given_up():
    class Waits(Applied):
        def __init__(self):
            super().__init__(ask_for_ever)
            self.conv = nn.Conv2d(4, 4, 3)

    assert "while x.shape[0] < 4" in reasons(fastgen.accelerate(prepared(Waits())))["conv"]


@torch.no_grad()
def test_kinds_of_inputs_that_were_not_assumed_are_remembered():
    network = prepared(Asks(QUESTIONS["batch"]))
    fast = fastgen.accelerate(network)
    program, x = Program.of(fast), torch.randn(3, 4, 6, 5)
    calls = []
    program.functions = {
        names: lambda *args, function=function: calls.append(args) or function(*args)
        for names, function in program.functions.items()
    }
    for _ in range(3):
        torch.testing.assert_close(fast(x), network(x))
    assert len(calls) == 1
    fast(x[:1])
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("question", ["type of the input", "is no parameter"])
def test_inputs_of_other_types(question):
    ask = {**QUESTIONS, "is no parameter": lambda m, x, y: not isinstance(x, nn.Parameter)}[question]
    network = prepared(Asks(ask))
    fast, x = fastgen.accelerate(network), torch.randn(2, 4, 6, 5)
    for kind in (torch.Tensor, nn.Parameter):
        torch.testing.assert_close(fast(x.as_subclass(kind)), network(x.as_subclass(kind)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("question", ["batch", "dtype"])
def test_compiled_with_what_is_assumed(question):
    network = prepared(Asks(QUESTIONS[question]))
    compiled = torch.compile(fastgen.accelerate(network), fullgraph=True, backend="aot_eager")
    for n in (1, 3):
        x = torch.randn(n, 4, 6, 5)
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)
