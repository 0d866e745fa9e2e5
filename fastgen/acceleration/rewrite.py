from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fastgen.acceleration.chains import fuse
from fastgen.acceleration.layout import keep_contiguous
from fastgen.acceleration.linears import fuse_linears
from fastgen.acceleration.pickling import make_picklable
from fastgen.acceleration.program import Program, Source
from fastgen.acceleration.recorder import is_torch_layer
from fastgen.acceleration.report import Entry, Report
from fastgen.acceleration.sizes import drop_unused
from fastgen.acceleration.states import Incomparable, state
from fastgen.acceleration.tracing import Untraceable, trace, variants
from fastgen.acceleration.writes import asks_late, draws


def accelerate(module: nn.Module) -> nn.Module:
    """A copy of a module in eval mode that computes the same, convolution, norm and activation in one.

    The copy is of the same class, with the same members, parameters, state dict and methods; only the forward of what
    could be traced is replaced, by code that calls `fastgen.ops.conv_transpose2d_bn_act` or `conv2d_bn_act` for a
    convolution and the BatchNorm or InstanceNorm with running statistics and the activation that follow it (each of
    them optional), and `group_norm_act` for a group or instance norm without and its activation. On the CPU a
    convolution after an upsampling that repeats pixels reads what was upsampled, and large linear layers in a row, with
    norms on running statistics and activations, are one call for a few rows. Modules, functions and methods are
    recognised alike, through any number of containers. Weights may be changed afterwards (optimiser,
    ``load_state_dict``, ``.to()``); packed and folded weights follow.

    Weights computed from parameters and buffers alone are kept until these change. Weights of each sample, a parameter
    scaled by sample and channel with samples as groups (StyleGAN2), become one convolution of scaled images, and small
    filters from a buffer, the same for all channels, `upfirdn2d`.

    Left alone is whatever is not known to be equal: norms by statistics of the batch, dropout in training mode, hooks,
    other weights that are computed in forward, intermediate results that are used elsewhere. What cannot be traced
    (control flow on data, ``no_grad`` around a part, another result where gradients or autocast are on) keeps its own
    forward, its submodules are looked at one by one.

    Where the copy is no longer what it was, the forward of the class runs: after ``.train()``, until ``.eval()``, and
    for good where a hook, a member or an attribute of a module that takes part was added or changed, be it a value deep
    in a configuration. So does it for arguments that are neither tensors, constants nor defaults; for inputs of another
    device, dtype or number of dimensions than the forward was traced for, where it asks for these; and under
    ``torch.compile`` where a module has attributes that cannot be followed there (objects, containers in containers).
    What lies outside of the module, globals and ``os.environ``, is read once.

    Parts of a network that is traced whole, and further optional arguments, are traced at the first call of their own;
    so are several images where the forward asks for one, and numbers, texts and None as arguments at the second, up to
    16 of them.

    Args:
        module: any module; it is not modified, and shares no memory with the copy.

    Returns:
        The copy, with ``fastgen_report``, a `Report` of what was fused, what was not, and why. Results of fused blocks
        are contiguous where the module's own code, or the caller, sees them.

    Raises:
        TypeError: not a module, one that `copy.deepcopy` refuses, or one of ``torch.compile``, which comes after.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if type(module).__name__ == "OptimizedModule":
        raise TypeError("module was made by torch.compile: accelerate the module first, then compile it")
    result = _copy(module)
    found = _Found()
    programs = list(_programs(result, found))
    for program, *_ in programs:
        program.root.__dict__["forward"] = program.forward
    result.fastgen_report = found.report  # type: ignore[assignment]
    states = {part: _state(part, found.kept_within(path)) for path, part in result.named_modules()}
    for program, path, watched in programs:
        program.watch(watched, found.kept_within(path))
        program.remember(states)
    return result


def _copy(module: nn.Module, values: bool = True) -> nn.Module:
    """A deep copy without programs; computed tensors, which weight norm leaves as attributes, are copied as values.
    Without `values` the copy has the same tensors.
    """
    memo = {id(tensor): tensor if not values else tensor.detach().clone() for tensor in _tensors(module, values)}
    try:
        result = copy.deepcopy(module, memo)
    except Exception as error:
        raise TypeError(f"module cannot be copied: {error}") from error
    for part in result.modules():
        if Program.of(part) is not None:
            del part.__dict__["forward"]
        if parametrize.is_parametrized(part):
            make_picklable(part)
    return result


def _tensors(module: nn.Module, values: bool) -> list[Tensor]:
    attributes = [value for part in module.modules() for value in part.__dict__.values() if isinstance(value, Tensor)]
    if values:
        return [tensor for tensor in attributes if not tensor.is_leaf]
    return [*module.parameters(), *module.buffers(), *attributes]


@dataclass
class _Found:
    """What there is so far: for the user; the modules that take part in code, and which of their attributes that sets,
    by path and name; and what could not be traced, and why.
    """

    report: Report = field(default_factory=Report)
    take_part: set[str] = field(default_factory=set)
    kept: set[tuple[str, str]] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, other: _Rewritten, path: str) -> None:
        self.report.merge(other.report)
        if other.report.fused:
            self.take_part |= {_join(path, inner) for inner in other.take_part}
            self.kept |= {(_join(path, inner), name) for inner, name in other.kept}

    def has_all_of(self, part: nn.Module, path: str) -> bool:
        """Whether all that may be fused there takes part in some code, so that further code is no news to the user."""
        return all(_join(path, inner) in self.take_part for inner, it in part.named_modules() if _may_fuse(it))

    def kept_within(self, path: str) -> set[tuple[str, str]]:
        start = f"{path}." if path else ""
        return {(f"{at}."[len(start) : -1], name) for at, name in self.kept if f"{at}.".startswith(start)}


def _join(path: str, inner: str) -> str:
    return f"{path}.{inner}".strip(".")


def _programs(root: nn.Module, found: _Found) -> Iterator[tuple[Program, str, set[str]]]:
    """Programs for the root and every container in it, for each may be called alone; where, and what to watch."""
    report, reasons = found.report, found.reasons
    for path, part in root.named_modules():
        if not is_torch_layer(part) and any(_may_fuse(inner) for inner in part.modules()):
            yield from _program(part, path, found)
    reached = report.paths()
    for path, part in root.named_modules():
        if not is_torch_layer(part) and path in reasons and path not in reached and _has_kernels(part):
            report.skipped.append(Entry(path, type(part).__name__, reasons[path]))
        if isinstance(part, _ConvNd) and path not in reached:
            if type(part) is nn.ConvTranspose2d and not part.training:
                yield from _program(part, path, found)
            if path not in report.paths():
                parent = max((p for p in reasons if not p or path.startswith(p + ".")), key=len, default=None)
                why = (
                    "never called in forward"
                    if parent is None
                    else f"called by {parent or 'the module'}: {reasons[parent]}"
                )
                report.skipped.append(Entry(path, type(part).__name__, why))


def _may_fuse(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd | nn.Linear) or _has_kernels(module)


def _has_kernels(module: nn.Module) -> bool:
    return any(not is_lazy(weight) and weight.dim() >= 4 for weight in module.parameters(recurse=False))


def _program(part: nn.Module, path: str, found: _Found) -> Iterator[tuple[Program, str, set[str]]]:
    sources: dict[tuple[Any, ...], Source] = {}
    kinds: dict[tuple[str, str], Any] = {}
    watched: set[str] = {""}
    later: list[tuple[str, ...]] = []
    try:
        choices = variants(part)
    except Untraceable as reason:
        found.reasons[path] = str(reason)
        return
    for names in choices:
        if found.has_all_of(part, path):
            later.append(names)  # a network of many containers in containers has many that nobody calls alone
            continue
        try:
            new = _rewrite(part, path, names)
        except Untraceable as reason:
            found.reasons.setdefault(path, str(reason))
            continue
        found.add(new, path)
        if new.report.fused:
            sources[names] = new.source
            watched |= new.watched
            kinds |= new.kinds
    if sources or later:
        yield Program(part, sources, kinds, later), path, watched


def _state(part: nn.Module, kept: set[tuple[str, str]]) -> dict[str, Any] | None:
    """But for its attributes that may change; None where they cannot be compared."""
    try:
        return {name: value for name, value in state(part).items() if ("", name) not in kept}
    except Incomparable:
        return None


class _Rewritten(NamedTuple):
    """Code, what was fused for it, the modules that take part, and what it relies on."""

    source: Source
    report: Report
    take_part: set[str]
    watched: set[str]
    kinds: dict[tuple[str, str], Any]
    kept: set[tuple[str, str]]


def _rewrite(
    part: nn.Module, path: str, names: tuple[str, ...], constants: dict[str, Any] | None = None, several: bool = False
) -> _Rewritten:
    traced = trace(part, names, constants, several)
    if asks_late(traced):
        raise Untraceable("it decides by its inputs after it has written to memory or drawn random numbers")
    random = any(draws(node, traced) for node in traced.graph.nodes)
    layers = {str(node.target) for node in traced.graph.nodes if is_torch_layer(node.meta.get("layer"))}
    report, bypassed = fuse(traced, path)
    linears, more = fuse_linears(traced, path)
    report.fused += linears.fused
    bypassed |= more
    keep_contiguous(traced)
    drop_unused(traced.graph)
    source = Source.of(traced.graph, part, traced.asked_for_images and not several, random, traced.off)
    open_to_view = traced.inlined | traced.read
    return _Rewritten(source, report, open_to_view | layers, open_to_view | bypassed, traced.kinds, traced.kept)


def rewritten(root: nn.Module, names: tuple[str, ...], constants: dict[str, Any], several: bool) -> _Rewritten | None:
    """The same of a module of which a `Program` has code for other arguments; None if nothing would be fused."""
    try:
        found = _rewrite(_copy(root, values=False), "", names, constants, several)
    except Untraceable:
        return None
    return found if found.report.fused else None
