from __future__ import annotations

import copy
from collections.abc import Iterator
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
    (control flow on data, ``no_grad`` inside, another result where gradients or autocast are on) keeps its own forward,
    its submodules are looked at one by one.

    Where the copy is no longer what it was, the forward of the class runs: after ``.train()``, until ``.eval()``, and
    for good where a hook, a member or an attribute of a module that takes part was added or changed, be it a value deep
    in a configuration. So does it for arguments that are neither tensors, constants nor defaults; for inputs of another
    device, dtype or number of dimensions than the forward was traced for, where it asks for these; and under
    ``torch.compile`` where a module has attributes that cannot be followed there (objects, containers in containers).
    Numbers, texts and None as arguments are traced at the second such call, several images where the forward asks for
    one at the first, up to 16 of them. What lies outside of the module, globals and ``os.environ``, is read once.

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
    report = Report()
    programs = list(_programs(result, report))
    for program, *_ in programs:
        program.root.__dict__["forward"] = program.forward
    result.fastgen_report = report  # type: ignore[assignment]
    for program, watched, kept in programs:
        program.watch(watched, kept)
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


_Watched = tuple[Program, set[str], set[tuple[str, str]]]  # paths, and attributes there that may change


def _programs(root: nn.Module, report: Report) -> Iterator[_Watched]:
    """Programs for the root and every container in it, for each may be called alone, with what to watch."""
    reasons: dict[str, str] = {}
    for path, part in root.named_modules():
        if not is_torch_layer(part) and any(_may_fuse(inner) for inner in part.modules()):
            yield from _program(part, path, report, reasons)
    reached = report.paths()
    for path, part in root.named_modules():
        if not is_torch_layer(part) and path in reasons and path not in reached and _has_kernels(part):
            report.skipped.append(Entry(path, type(part).__name__, reasons[path]))
        if isinstance(part, _ConvNd) and path not in reached:
            if type(part) is nn.ConvTranspose2d and not part.training:
                yield from _program(part, path, report, reasons)
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


def _program(part: nn.Module, path: str, report: Report, reasons: dict[str, str]) -> Iterator[_Watched]:
    sources: dict[tuple[Any, ...], Source] = {}
    kinds: dict[tuple[str, str], Any] = {}
    watched: set[str] = {""}
    kept: set[tuple[str, str]] = set()
    try:
        choices = variants(part)
    except Untraceable as reason:
        reasons[path] = str(reason)
        return
    for names in choices:
        try:
            found = _rewrite(part, path, names)
        except Untraceable as reason:
            reasons.setdefault(path, str(reason))
            continue
        report.merge(found.report)
        if found.report.fused:
            sources[names] = found.source
            watched |= found.watched
            kinds |= found.kinds
            kept |= found.kept
    if sources:
        yield Program(part, sources, kinds), watched, kept


class _Rewritten(NamedTuple):
    """Code, what was fused for it, and what it relies on."""

    source: Source
    report: Report
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
    report, bypassed = fuse(traced, path)
    linears, more = fuse_linears(traced, path)
    report.fused += linears.fused
    bypassed |= more
    keep_contiguous(traced)
    drop_unused(traced.graph)
    source = Source.of(traced.graph, part, traced.asked_for_images and not several, random)
    return _Rewritten(source, report, traced.inlined | traced.read | bypassed, traced.kinds, traced.kept)


def rewritten(root: nn.Module, names: tuple[str, ...], constants: dict[str, Any], several: bool) -> _Rewritten | None:
    """The same of a module of which a `Program` has code for other arguments; None if nothing would be fused."""
    try:
        found = _rewrite(_copy(root, values=False), "", names, constants, several)
    except Untraceable:
        return None
    return found if found.report.fused else None
