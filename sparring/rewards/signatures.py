"""What a reward function takes, and how a batch of samples becomes its keyword arguments.

A function gets only the keywords that its signature names (all of them with **kwargs). Its
keyword-only parameters are its knobs. A class is built from its knobs first; the instance is then
called like a function.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from sparring.errors import RewardError

CONTEXT = (
    "prompts",
    "completions",
    "completion_ids",
    "prefills",
    "finish_reasons",
    "group_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "judged",
)
"""Keywords that Sparring itself offers to every reward function, beside the data's columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A flat batch of completions to judge: every list has one entry a completion, groups adjacent.

    columns: the data's other columns by name, `reference` among them.
    """

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]] | None
    prefills: list[str]
    finish_reasons: list[str | None]
    group_ids: list[int]
    columns: Mapping[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The names that a function takes: by position or keyword, by keyword alone (its knobs)."""

    names: frozenset[str]
    required: frozenset[str]
    knobs: frozenset[str]
    required_knobs: frozenset[str]
    takes_all: bool
    is_async: bool


def parameters_of(function: Callable[..., Any]) -> Parameters:
    """Read `function`'s signature (for a callable object: of its __call__)."""
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    plain: dict[str, bool] = {}
    knobs: dict[str, bool] = {}
    takes_all = False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind == inspect.Parameter.POSITIONAL_ONLY:
            raise RewardError(
                f"reward function '{name_of(function)}' takes '{name}' by position only; "
                "rewards are called with keywords, so drop the '/'"
            )
        has_default = parameter.default is not inspect.Parameter.empty
        if parameter.kind in positional or name in CONTEXT or name == "reference":
            if parameter.kind != inspect.Parameter.VAR_POSITIONAL:
                plain[name] = has_default
        elif parameter.kind == inspect.Parameter.KEYWORD_ONLY:
            knobs[name] = has_default
        elif parameter.kind == inspect.Parameter.VAR_KEYWORD:
            takes_all = True
    called = function if inspect.isroutine(function) else type(function).__call__
    return Parameters(
        names=frozenset(plain),
        required=frozenset(name for name, has_default in plain.items() if not has_default),
        knobs=frozenset(knobs),
        required_knobs=frozenset(name for name, has_default in knobs.items() if not has_default),
        takes_all=takes_all,
        is_async=inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(function),
    )


def name_of(function: Callable[..., Any]) -> str:
    """A name for messages: the function's own, or its class's."""
    return str(getattr(function, "__name__", type(function).__name__))


def fit(name: str, function: Callable[..., Any], knobs: Mapping[str, Any]) -> Callable[..., Any]:
    """Check `knobs` against `function`; a class is built from them, a function stays as it is."""
    if isinstance(function, type):
        check_knobs(name, function, knobs, constructor_knobs(function))
        try:
            instance: Callable[..., Any] = function(**knobs)
        except TypeError as error:
            raise RewardError(f"reward '{name}' cannot be built: {error}") from error
        if not callable(instance):
            raise RewardError(f"reward '{name}' is a class without __call__")
        parameters_of(instance)
        return instance
    parameters = parameters_of(function)
    check_knobs(name, function, knobs, parameters.knobs)
    missing = sorted(parameters.required_knobs - frozenset(knobs))
    if missing:
        raise RewardError(
            f"reward '{name}' needs a value for '{missing[0]}' in its [[reward]] table "
            "(a keyword-only parameter without default); a data column comes before the '*'"
        )
    return function


def check_knobs(
    name: str, function: Callable[..., Any], given: Mapping[str, Any], allowed: Iterable[str]
) -> None:
    """Raise RewardError for a knob that `function` does not take, or a value of the wrong type."""
    known = sorted(allowed)
    hints = _hints(function)
    for knob, value in given.items():
        if knob not in known:
            takes = ", ".join(known) or "no knobs"
            raise RewardError(f"reward '{name}' takes no '{knob}'; it takes {takes}")
        if knob in hints and not _fits(value, hints[knob]):
            raise RewardError(
                f"reward '{name}': {knob} = {value!r} is not allowed; "
                f"allowed: {_spell(hints[knob])}"
            )


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of a function, a constructor or an object's __call__; {} if unreadable."""
    if inspect.isclass(function):
        target: Any = function.__init__
    else:
        target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers alone
        return {}


def constructor_knobs(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters that a reward class is built from."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters
    return frozenset(name for name, parameter in parameters.items() if parameter.kind in kinds)


def bind(
    name: str,
    parameters: Parameters,
    offered: Mapping[str, Any],
    columns: Mapping[str, list[Any]],
    knobs: Mapping[str, Any],
) -> dict[str, Any]:
    """The keyword arguments of one call: what is offered, the columns, the knobs.

    Raises RewardError where a parameter has no source, or a column has the name of a knob or of an
    offered keyword that the function takes.
    """
    clash = sorted((parameters.knobs | frozenset(knobs)) & frozenset(columns))
    if clash:
        raise RewardError(
            f"reward '{name}': the data has a column '{clash[0]}', and the function has a knob "
            "(a keyword-only parameter) of that name; rename one of them"
        )
    shadowed = sorted(parameters.names & frozenset(columns) & frozenset(CONTEXT))
    if shadowed:
        raise RewardError(
            f"reward '{name}': the data has a column '{shadowed[0]}', a name that Sparring gives "
            f"to every reward; rename the column (such names: {', '.join(CONTEXT)})"
        )
    everything = {**columns, **offered}
    missing = sorted(parameters.required - frozenset(everything))
    if missing:
        have = ", ".join(sorted(columns)) or "none"
        raise RewardError(
            f"reward '{name}' needs '{missing[0]}', which the data does not have; columns: {have}; "
            f"always there: {', '.join(key for key in CONTEXT if key in offered)}"
        )
    if parameters.takes_all:
        return {**everything, **knobs}
    return {**{key: everything[key] for key in parameters.names if key in everything}, **knobs}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a recipe's value fits a parameter's annotation; unknown annotations let all pass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments and type(value) in {type(argument) for argument in arguments}
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin in (list, tuple, Sequence):
        members = [argument for argument in arguments if argument is not Ellipsis]
        return isinstance(value, list | tuple) and all(
            any(_fits(item, member) for member in members) for item in value
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    return value is None if hint is type(None) else True


def _spell(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(repr(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_spell(argument) for argument in arguments)
    if origin in (list, tuple, Sequence):
        members = [_spell(argument) for argument in arguments if argument is not Ellipsis]
        return f"a list of {' or '.join(members)}"
    names = {float: "a number", int: "a whole number", str: "a string", bool: "true or false"}
    return names.get(hint, str(getattr(hint, "__name__", hint)))
