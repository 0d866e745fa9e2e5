"""A forward that runs rewritten code as long as the module is what it was when the code was written."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastgen import backends
from fastgen._hooks import HOOKS
from fastgen.acceleration import blocks
from fastgen.acceleration.recorder import arguments
from fastgen.acceleration.states import guarded, state, unchanged

_log = logging.getLogger("fastgen")


class Source(NamedTuple):
    """Generated code; `names` are its globals, modules by their names as only these can be pickled."""

    text: str
    names: dict[str, Any]
    modules: dict[str, str]
    assumes: bool  # something of inputs
    one_image: bool  # or several, where it is assumed
    draws: bool  # random numbers
    off: tuple[str, ...]  # as of `Trace`

    @classmethod
    def of(
        cls,
        graph: fx.Graph,
        root: torch.nn.Module,
        one_image: bool = False,
        draws: bool = False,
        off: tuple[str, ...] = (),
    ) -> Source:
        code = graph.python_code("self")
        names = {name: value for name, value in code.globals.items() if not isinstance(value, ModuleType)}
        modules = {name: value.__name__ for name, value in code.globals.items() if isinstance(value, ModuleType)}
        assumes = any(node.target in (blocks.assume, blocks.expect_rank, blocks.expect_plain) for node in graph.nodes)
        return cls(_with_direct_paths(code.src, graph, root), names, modules, assumes, one_image, draws, off)

    def function(self) -> Any:
        scope = {**self.names, **{name: _module(path) for name, path in self.modules.items()}}
        code: CodeType = compile(self.text, "<fastgen.accelerate>", "exec")
        exec(code, scope)
        return _without(self.off, scope["forward"]) if self.off else scope["forward"]


def _without(off: tuple[str, ...], forward: Callable[..., Any]) -> Callable[..., Any]:
    def switched(*args: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for name in off:
                if name == "gradients":
                    stack.enter_context(torch.no_grad())
                elif torch.is_autocast_enabled(name):
                    stack.enter_context(torch.autocast(name, enabled=False))
            return forward(*args)

    return switched


def _with_direct_paths(text: str, graph: fx.Graph, root: torch.nn.Module) -> str:
    """The code, fetching parameters and buffers without `torch.nn.Module.__getattr__`, and each module once.

    That is Python code, called for each name in a path; for one image it takes as long as a small layer.
    """
    places, kept = {}, {}
    for node in graph.nodes:
        if node.target is blocks.keep:
            owner, attribute, value = node.args
            steps = "".join(f"._modules[{part!r}]" for part in owner.split(".") if part)
            kept[f"    {node.name}"] = f"self{steps}.{attribute}", value.name
        if node.op != "get_attr":
            continue
        *path, name = str(node.target).split(".")
        module = root.get_submodule(".".join(path))
        members = next((kind for kind in ("_parameters", "_buffers") if name in getattr(module, kind)), None)
        if members is not None:
            places[f"    {node.name}"] = path, f".{members}[{name!r}]"
    prefix = "_at"
    while prefix in text:
        prefix += "_"
    lines = []
    at: dict[tuple[str, ...], str] = {(): "self"}  # what holds a module
    for line in text.split("\n"):
        assigned = line.partition(" = ")[0]
        if assigned in places:
            path, member = places[assigned]
            for i, part in enumerate(path):
                if (here := tuple(path[: i + 1])) not in at:
                    at[here] = f"{prefix}{len(at)}"
                    lines.append(f"    {at[here]} = {at[tuple(path[:i])]}._modules[{part!r}]")
            line = f"{assigned} = {at[tuple(path)]}{member}"
        elif assigned in kept:
            attribute, value = kept[assigned]
            line = f"    {attribute} = {value};{line.partition(';')[2]}"
        lines.append(line)
    return "\n".join(lines)


def _places(path: str) -> list[str]:
    """A path and all that lead to it."""
    names = path.split(".")
    return ["", *(".".join(names[: i + 1]) for i in range(len(names) if path else 0))]


def _module(path: str) -> ModuleType:
    import importlib

    return importlib.import_module(path)


_MOST_OTHERS = 64
_MOST_TRACED = 16  # forwards for constants as arguments, at the second such call, or for several images, at the first
_MOST_ASKED = 64
_CONSTANTS = (bool, int, float, str, type(None))
_Key = tuple[Any, ...]  # the names of arguments that are tensors; or these, constants, and whether for several images
_State = tuple[torch.nn.Module, dict[str, Any]]  # of `state`


def _parts(key: _Key) -> tuple[Any, ...]:
    """The names of arguments that are tensors, constants, and whether for several images."""
    return key if len(key) == 3 and isinstance(key[0], tuple) else (key, (), False)


def _is_recorded() -> bool:
    """Whether something of PyTorch looks at every operation, as ``torch.export`` does."""
    return _get_current_dispatch_mode() is not None


def _kind_of(tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """What code may assume of inputs."""
    return tuple((name, type(x), x.dtype, x.device, x.dim(), x.shape[:1]) for name, x in tensors.items())


class _Guard(NamedTuple):
    """A module as it was, in terms that ``torch.compile`` can follow; `values` is None where there are none."""

    path: tuple[str, ...]
    values: dict[str, Any] | None
    members: dict[str, torch.nn.Module | None]
    hooks: dict[str, int]
    forward: Any  # where it is one of the module's own

    @classmethod
    def of(cls, place: str, module: torch.nn.Module, before: dict[str, Any]) -> _Guard:
        hooks = {name: len(getattr(module, name)) for name in HOOKS}
        path = tuple(filter(None, place.split(".")))
        return cls(path, guarded(before), dict(module._modules), hooks, before.get("forward"))

    def holds(self, root: Any) -> bool:
        module = root
        for name in self.path:
            if name not in module._modules:
                return False
            module = module._modules[name]
        now = module.__dict__
        if self.values is None or now.get("forward") != self.forward or module.forward is None:  # read to be guarded
            return False
        return (
            len(module._modules) == len(self.members)
            and all(name in module._modules and module._modules[name] is self.members[name] for name in self.members)
            and all(len(now[name]) == self.hooks[name] for name in self.hooks)
            and all(name in now and now[name] == self.values[name] for name in self.values)
        )


class Program:
    """Its `forward` stands in the ``__dict__`` of a module whose class, members and parameters are left as they are.

    `sources` has code for sets of arguments that are tensors, the others being at their defaults; for those in `later`
    it is made at their first call, as long as all modules are as they were. Calls that no code is for, and all calls
    once a watched module has changed (training mode, hooks, other members or attributes), run the forward of the
    module's class.
    """

    _forward: Any

    def __new__(cls, *_: Any) -> Program:
        program = super().__new__(cls)  # with code of its own, as torch.compile limits how often a code is compiled
        code = cls.run.__code__.replace(co_name="forward")
        program._forward = FunctionType(code, cls.run.__globals__, "forward")
        return program

    def __init__(
        self,
        root: torch.nn.Module,
        sources: dict[_Key, Source],
        kinds: dict[tuple[str, str], Any] | None = None,
        later: Iterable[_Key] = (),
    ) -> None:
        self.root = root
        self.sources = sources
        self.later = set(later)
        self.kinds: list[tuple[tuple[str, ...], str, Any]] = []
        self._expect(kinds or {})
        self.defaults = arguments(root)
        parameters = inspect.signature(type(root).forward).parameters
        self.positional = sum(parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY for name in self.defaults)
        self.takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        self.states: list[_State] = []
        self.changing: list[_State] = []  # of modules that get further attributes
        self.before: list[_State] = []  # of all, to make further code by
        self.guards: list[_Guard] = []
        self.told = False
        self.others: set[tuple[Any, ...]] = set()  # codes, and kinds of inputs for which these are not
        self.tried: set[_Key] = set()  # further arguments that code was made for, or could not be
        self.asked: set[_Key] = set()  # those seen once: a number that changes at every call is not worth code
        self.watched: set[str] = set()
        self.kept: set[tuple[str, str]] = set()
        self._seen: Any = None
        self._compile()

    def remember(self, states: dict[torch.nn.Module, dict[str, Any] | None]) -> None:
        """Further code is made as long as all modules are as they were in `states`: for what they become it might be
        wrong once they are the same again, as after ``.eval()``. None is made with modules that cannot be compared.
        """
        before = [(part, states[part]) for part in self.root.modules()]
        self.before = [(part, known) for part, known in before if known is not None]
        if len(self.before) < len(before):
            self.before = []

    def watch(self, paths: Iterable[str], kept: Iterable[tuple[str, str]] = ()) -> None:
        """From now on the modules there must stay as they are, but for the attributes that the code itself sets."""
        self.watched, self.kept = set(paths), set(kept)
        places = sorted({place for path in self.watched for place in _places(path)})
        self._seen = None  # it refers to the states
        self.states, self.changing, self.guards = [], [], []
        for place in places:
            module, names = self.root.get_submodule(place), {name for path, name in self.kept if path == place}
            before = {name: value for name, value in state(module).items() if name not in names}
            (self.changing if names else self.states).append((module, before))
            self.guards.append(_Guard.of(place, module, before))
        self._look()

    def _expect(self, kinds: dict[tuple[str, str], Any]) -> None:
        found = [(tuple(path.split(".")), name, kind) for (path, name), kind in kinds.items()]
        self.kinds += [kind for kind in found if kind not in self.kinds]

    def _look(self) -> None:
        """At the states in native code, if there is any, which says at once whether all is as it was."""
        self._seen = None if backends.import_error("_cpu") else backends.native_cpu().SeenAttributes(self.states)

    @property
    def forward(self) -> MethodType:
        return MethodType(self._forward, self)

    @classmethod
    def of(cls, module: torch.nn.Module) -> Program | None:
        found = getattr(module.__dict__.get("forward"), "__self__", None)
        return found if isinstance(found, Program) else None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        call = self._given(args, kwargs)
        if call is None:
            return type(self.root).forward(self.root, *args, **kwargs)
        first, tensors = call
        if torch.compiler.is_compiling():
            self._make_first(first)
            source = self.sources[first] if first in self.functions else None
            if source is not None and not source.assumes and not source.off and self._holds_compiled():
                return self.functions[first](self.root, *tensors.values())
            return type(self.root).forward(self.root, *args, **kwargs)
        if torch._C._is_tracing():  # by torch.jit.trace, whose graph is run without us
            return type(self.root).forward(self.root, *args, **kwargs)
        if not self._holds():
            self._tell("has changed since (training mode, hooks, members or attributes)")
            return type(self.root).forward(self.root, *args, **kwargs)
        for key in self._keys(first):
            function = self.functions.get(key)
            if function is None or (self.others and (key, _kind_of(tensors)) in self.others):
                continue
            source = self.sources[key]
            if source.draws and source.assumes and not all(tensor.is_cpu for tensor in tensors.values()):
                continue  # what the other generators have drawn is not taken back
            drawn = torch.get_rng_state() if source.draws else None
            try:
                return function(self.root, *tensors.values())
            except blocks.OtherThanAssumed as reason:
                self._tell(str(reason))
                if len(self.others) < _MOST_OTHERS:
                    self.others.add((key, _kind_of(tensors)))
            except Exception as error:
                problem = str(error)  # without what it refers to
                if drawn is not None:
                    torch.set_rng_state(drawn)
                result = type(self.root).forward(self.root, *args, **kwargs)  # or the error that the user knows
                self._tell(f"failed where the original did not: {problem}", warn=True)
                self.functions.pop(key, None)  # not to fail again at every call
                return result
            if drawn is not None:
                torch.set_rng_state(drawn)
        return type(self.root).forward(self.root, *args, **kwargs)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Key, dict[str, Tensor]] | None:
        """What code for a call is found by, and the arguments that are tensors; None of other values than constants."""
        if len(args) > self.positional:
            return None
        given = dict(zip(self.defaults, args))  # noqa: B905  (torch.compile of PyTorch 2.9 takes any for true)
        for name, value in kwargs.items():
            if name in given or (name not in self.defaults and not self.takes_any):
                return None
            given[name] = value
        tensors: dict[str, Tensor] = {}
        constants = []
        for name, default in self.defaults.items():
            value = given.pop(name, default)
            if isinstance(value, Tensor):
                tensors[name] = value
            elif default is inspect.Parameter.empty:
                if value is not None:  # another object, or missing
                    return None
            elif value is not default:
                constants.append((name, value))
        if not constants and not given:
            return tuple(tensors), tensors
        constants += given.items()
        if not all(type(value) in _CONSTANTS for _, value in constants):
            return None
        return (tuple(tensors), tuple((name, type(value), value) for name, value in constants), False), tensors

    def _keys(self, key: _Key) -> Iterator[_Key]:
        """Of code for a call, and of the same for several images, which is made where it is needed."""
        if self._is_there(key):
            yield key
            if key in self.sources and self.sources[key].one_image:
                names, constants, _ = _parts(key)
                if self._is_there(key := (names, constants, True)):
                    yield key

    def _is_there(self, key: _Key) -> bool:
        if key in self.functions:
            return True
        if key in self.later:
            return self._make(key)
        if key in self.tried or len(self.tried) >= _MOST_TRACED or not isinstance(next(iter(key), ""), tuple):
            return False
        _, constants, several = key
        if constants and not several and key not in self.asked:
            self.asked = {key, *(self.asked if len(self.asked) < _MOST_ASKED else ())}
            return False
        return self._make(key)

    def _make(self, key: _Key) -> bool:
        from fastgen.acceleration.rewrite import rewritten  # which is built on this

        if _is_recorded() or not self.before or not all(unchanged(*state) for state in self.before):
            return False
        if key in self.later:
            self.later.discard(key)  # which another thread may have done
        else:
            self.tried.add(key)
        names, constants, several = _parts(key)
        found = rewritten(self.root, names, {name: value for name, _, value in constants}, several)
        if found is None:
            return False
        self.sources[key], self.functions[key] = found.source, found.source.function()
        self._expect(found.kinds)
        self.watch(self.watched | found.watched, self.kept | found.kept)
        return True

    def _make_first(self, key: _Key) -> None:
        if key in self.later:
            self._make(key)

    # torch.compiler.assume_constant_result, without importing the compiler
    _make_first._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _holds(self) -> bool:
        if torch.nn.modules.module._has_any_global_hook():
            return False
        still = self._seen is not None and self._seen.still()
        to_see = self.changing if still else self.states + self.changing
        return all(unchanged(module, before) for module, before in to_see) and self._kinds_hold()

    def _holds_compiled(self) -> bool:
        """`_holds` for ``torch.compile``, which makes guards of what it sees compared."""
        if torch.nn.modules.module._has_any_global_hook():
            return False
        return all(guard.holds(self.root) for guard in self.guards) and self._kinds_hold()

    def _kinds_hold(self) -> bool:
        for path, name, kind in self.kinds:
            found: Any = self.root
            for part in path:
                found = getattr(found, part, None)
            if getattr(found, name, None) != kind:
                return False
        return True

    def _tell(self, what: str, warn: bool = False) -> None:
        if not self.told:
            text = f"accelerated {type(self.root).__name__} {what}; its own forward runs"
            warnings.warn(text, RuntimeWarning, stacklevel=4) if warn else _log.info(text)
        self.told = True

    def _compile(self) -> None:
        self.functions = {names: source.function() for names, source in self.sources.items()}
        self._forward.__signature__ = inspect.signature(type(self.root).forward)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("functions", "_forward", "_seen")}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update(kept)
        self._compile()
        self._look()
