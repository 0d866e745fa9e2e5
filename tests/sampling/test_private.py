"""The user's module is nobody's but the user's: it stays as it was, and other threads may run it."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastgen import bits_per_dim, models
from fastgen.sampling import Categorical, Sampler, UnsupportedModel, audit, naive_sample
from fastgen.sampling.subject import private

from .networks import LEVELS, InPlaceMasks, MaskedInPlace

GIVEN = {"image_shape": (1, 5, 4), "head": Categorical(LEVELS)}


class Remembers(nn.Module):
    """Keeps a channel of ones from the first call, as the common port of PixelCNN++ does, and what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = MaskedInPlace("A", 2, LEVELS, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.ones: Tensor | None = None
        self.modes: list[bool] = []
        self.during: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        if self.ones is None:
            self.ones = torch.ones_like(x)
        self.during()
        self.modes.append(self.training)
        return self.drop(self.conv(torch.cat([x, self.ones], dim=1)))


class Shared:
    """A function that copies of a module share, whatever it refers to."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def __call__(self) -> object:
        return self.function()

    def __deepcopy__(self, memo: dict) -> Shared:
        return self


@pytest.mark.parametrize(
    "run",
    [
        lambda m: Sampler(m, **GIVEN).sample(3),
        lambda m: naive_sample(m, 3, **GIVEN),
        lambda m: audit(m, torch.ones(3, 1, 5, 4, dtype=torch.uint8), **GIVEN),
    ],
    ids=["sampler", "naive", "audit"],
)
def test_module_is_not_touched(run: Callable) -> None:
    """Neither afterwards nor in the meantime, where a thread that trains it would see another mode or a hook."""
    module = Remembers().train()
    module.conv.eval()
    seen = []

    def look() -> None:
        parts = list(module.modules())
        seen.append([m.training for m in parts] + [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parts])

    module.during = Shared(look)
    run(module)
    assert seen and all(s == [True, False, True, 0, 0, 0] for s in seen)
    assert module.ones is None and not module.modes
    assert module(torch.zeros(7, 1, 5, 4)).shape == (7, LEVELS, 5, 4)


def test_bits_per_dim_leaves_submodules_in_their_modes() -> None:
    model = models.PixelCNNpp(image_shape=(1, 4, 4), num_filters=4, num_blocks=1, dropout=0.5).train()
    part = next(iter(model.children()))
    part.eval()
    bits_per_dim(model, torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    assert model.training and not part.training


def test_threads_with_one_model() -> None:
    model = models.GatedPixelCNN(image_shape=(1, 4, 3), num_filters=4, num_blocks=2, levels=7).train()
    expected, threads = Sampler(model).sample(3), torch.get_num_threads()
    found: list[object] = []

    def work() -> None:
        try:
            found.append(Sampler(model).sample(3))
            found.append(naive_sample(model, 3))
        except BaseException as error:
            found.append(error)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(isinstance(x, Tensor) and torch.equal(x, expected) for x in found), found
    assert len(found) == 12 and all(m.training for m in model.modules()) and torch.get_num_threads() == threads


def test_compilations_take_turns() -> None:
    """The default dtype and the number of threads, which they change, are those of the process."""
    module, running, most = Remembers(), [0], [0]

    def overlap() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        running[0] -= 1

    module.during = Shared(overlap)
    workers = [threading.Thread(target=Sampler, args=(module,), kwargs=GIVEN) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1]


def test_private_copy_shares_tensors() -> None:
    module = Remembers()
    module.table = {"a": [torch.ones(2)]}
    module.conv = nn.utils.weight_norm(module.conv)  # its weight is no parameter, and no leaf
    twin = private(module)
    assert twin is not module and twin.table is not module.table
    assert twin.table["a"][0] is module.table["a"][0] and twin.conv.weight is module.conv.weight
    assert all(a is b for a, b in zip(twin.parameters(), module.parameters(), strict=True))


def held_by_a_function() -> nn.Module:
    """A copy would share the function, and so run the original's dropout in training mode."""
    module = Remembers()
    module.block = nn.Sequential(module.conv, module.drop)
    module.forward = lambda x: module.block(torch.cat([x, torch.ones_like(x)], dim=1))
    return module


def not_copied() -> nn.Module:
    module = Remembers()
    module.lock = threading.Lock()
    return module


@pytest.mark.parametrize("make", [held_by_a_function, not_copied], ids=lambda f: f.__name__)
def test_module_that_cannot_be_copied(make: Callable[[], nn.Module]) -> None:
    module = make().train()
    assert private(module) is module
    images = Sampler(module, **GIVEN).sample(3)
    module.ones = None  # of another batch
    assert torch.equal(images, naive_sample(module, 3, **GIVEN))
    assert all(m.training for m in module.modules())


def test_compiled_modules_run_uncompiled() -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("compiles")

    network = InPlaceMasks().eval()
    expected = Sampler(network, **GIVEN).sample(3)
    nested = torch.compile(nn.Sequential(torch.compile(network, backend=refuse)), backend=refuse)
    inside = nn.Sequential(nested, nn.Identity())
    in_place = copy.deepcopy(network)
    in_place.compile(backend=refuse)
    for module in (torch.compile(network, backend=refuse), inside, in_place):
        assert torch.equal(Sampler(module, **GIVEN).sample(3), expected)
        assert torch.equal(naive_sample(module, 3, **GIVEN), expected)
    model = models.PixelCNN(image_shape=(1, 3, 3), levels=4, num_filters=2, num_blocks=1, num_features=2)
    compiled, images = torch.compile(model, backend=refuse), Sampler(model).sample(2)
    assert torch.equal(Sampler(compiled).sample(2), images)
    assert bits_per_dim(compiled, images) == bits_per_dim(model, images)


class Forwards(nn.Module):
    """Attributes that it lacks are those of the module inside."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name) if name == "inside" else getattr(self.inside, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) * 3


def test_wrapper_of_a_compiled_module_stays() -> None:
    network = InPlaceMasks().eval()
    wrapper = Forwards(torch.compile(network))
    images = Sampler(wrapper, **GIVEN).sample(3)
    assert torch.equal(images, Sampler(Forwards(network), **GIVEN).sample(3))
    assert not torch.equal(images, Sampler(network, **GIVEN).sample(3))


def test_names_in_errors_are_those_of_the_module() -> None:
    module = nn.Sequential(MaskedInPlace("A", 1, LEVELS, 3, padding=1), nn.Softmax(1), nn.Conv2d(LEVELS, LEVELS, 1))
    with pytest.raises(UnsupportedModel, match="module '1'"):
        Sampler(module, **GIVEN)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_samplers_are_not_copied(duplicate: Callable) -> None:
    sampler = Sampler(InPlaceMasks(), **GIVEN)
    with pytest.raises(TypeError, match=r"a Sampler cannot be copied or pickled: make a new one of its model"):
        duplicate(sampler)


def test_samplers_say_what_they_are() -> None:
    expected = "Sampler(InPlaceMasks, 1x5x4, Categorical(levels=5, input_range=(-1.0, 1.0)), reference)"
    assert repr(Sampler(InPlaceMasks(), **GIVEN, backend="reference")) == expected


def test_weights_are_blanked_in_the_module_itself() -> None:
    """What a forward writes into its weights, it writes into the module's own, as a call would."""
    module = InPlaceMasks()
    with torch.no_grad():
        module.a.weight.fill_(1)
    Sampler(module, **GIVEN)
    assert torch.equal(module.a.weight, module.a.mask)
