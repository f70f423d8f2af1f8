"""What a foreign argument means here: tables of data, and the one place that holds calls to them.

Each argument of TRL, PEFT, vLLM or Unsloth is one of three:

    honoured     it does here what it does there; `why` says through what
    immaterial   no number of a run depends on it here; a changed one is accepted and said once
    refused      only its default (or `also`) is accepted; `why` is the reason, `native` the way

Nothing is passed over in silence. The tables themselves are in *_table.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, Literal

from sparring.errors import UserError

Kind = Literal["honoured", "immaterial", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One argument: its default there, what becomes of it here, and why.

    allowed: of an honoured one, the values that it may have (empty: any). also: of a refused one,
    values beside the default that ask for nothing else.
    """

    default: Any
    kind: Kind
    why: str
    native: str = ""
    allowed: tuple[Any, ...] = ()
    also: tuple[Any, ...] = ()


Table = Mapping[str, Argument]


def honoured(default: Any, why: str, *allowed: Any) -> Argument:
    """An argument that does here what it does there."""
    return Argument(default=default, kind="honoured", why=why, allowed=allowed)


def immaterial(default: Any, why: str) -> Argument:
    """An argument on which no number depends here."""
    return Argument(default=default, kind="immaterial", why=why)


def refused(default: Any, why: str, native: str, also: Iterable[Any] = ()) -> Argument:
    """An argument whose default alone is accepted."""
    return Argument(default=default, kind="refused", why=why, native=native, also=tuple(also))


@cache
def say_once(line: str) -> None:
    """A line for people on standard error, the same one only once in a process."""
    sys.stderr.write(f"sparring.compat: {line}\n")
    sys.stderr.flush()


def check(title: str, table: Table, values: Mapping[str, Any]) -> None:
    """Hold the arguments of one call to its table: UserError where one is refused or unknown."""
    for name, value in values.items():
        if name not in table:
            known = ", ".join(sorted(table))
            raise UserError(f"{title} takes no '{name}'; it takes {known}")
        argument = table[name]
        if is_same(value, argument.default):
            continue
        if argument.kind == "refused" and not any(is_same(value, one) for one in argument.also):
            raise UserError(
                f"{title}: {name} = {_shown(value)} is refused: {argument.why}; {argument.native}"
            )
        if argument.kind == "immaterial":
            say_once(f"{title}: {name} = {_shown(value)} changes nothing here: {argument.why}")
        if argument.allowed and not any(is_same(value, one) for one in argument.allowed):
            allowed = ", ".join(repr(one) for one in argument.allowed)
            raise UserError(
                f"{title}: {name} = {_shown(value)} is refused: allowed are {allowed}"
                f" ({argument.why})"
            )


def with_defaults(title: str, table: Table, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one call, defaults filled in, held to the table."""
    check(title, table, given)
    return {name: argument.default for name, argument in table.items()} | dict(given)


def is_same(value: Any, default: Any) -> bool:
    """Whether two values are one: an enum is its value, True is not 1."""
    value = getattr(value, "value", value)
    if isinstance(value, bool) != isinstance(default, bool):
        return False
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return list(value) == list(default)
    return (type(value) is type(default) and value == default) or _are_equal_numbers(value, default)


def _are_equal_numbers(value: Any, default: Any) -> bool:
    numbers = (int, float)
    return isinstance(value, numbers) and isinstance(default, numbers) and value == default


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Arguments:
    """Base of the configurations: dataclasses whose fields are a table's names."""

    def __post_init__(self) -> None:
        """Hold what was given to the table."""
        check(type(self).__name__, table_of(type(self)), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Every argument with its value, enums as plain values."""
        return {
            one.name: getattr(getattr(self, one.name), "value", getattr(self, one.name))
            for one in fields(self)  # type: ignore[arg-type]
        }


def table_of(config: type) -> Table:
    """The table that a configuration class was built from."""
    found: Table = config.TABLE  # type: ignore[attr-defined]
    return found


def build_config(name: str, table: Table, doc: str) -> Any:
    """A dataclass with the table's names and defaults; output_dir may be given by position."""
    entries = [(key, Any, _field(argument.default)) for key, argument in table.items()]
    made = make_dataclass(name, entries, bases=(Arguments,), namespace={"TABLE": table})
    made.__doc__, made.__module__ = doc, "sparring.compat"
    return made


def _field(default: Any) -> Any:
    if isinstance(default, list | dict):
        copy: Callable[[], Any] = default.copy
        return field(default_factory=copy)
    return field(default=default)


def adopt(given: Any, config: Any, moved: Mapping[str, Any]) -> Any:
    """The arguments of a trainer as `config`: one of ours, or a foreign dataclass of such names.

    A foreign one (transformers.TrainingArguments, TRL's own configuration) gives the fields in
    which it differs from its defaults. moved: arguments that older scripts give to the trainer
    itself; None where they do not.
    """
    moved = {name: value for name, value in moved.items() if value is not None}
    if given is None:
        return config(**moved)
    if isinstance(given, config):
        for name, value in moved.items():
            setattr(given, name, value)
        given.__post_init__()
        return given
    if not hasattr(given, "__dataclass_fields__"):
        raise UserError(
            f"args is a {type(given).__name__}; {config.__name__} of sparring.compat is taken, or a"
            " dataclass with such fields"
        )
    changed = {}
    for one in fields(given):
        value = getattr(given, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if one.init and not is_same(value, default) and not _is_derived(one.name, value, config):
            changed[one.name] = getattr(value, "value", value)
    return config(**changed, **moved)


def _is_derived(name: str, value: Any, config: Any) -> bool:
    """Whether a foreign dataclass filled this field in by itself, or ours starts from the same."""
    table = table_of(config)
    if name in ("accelerator_config", "fsdp_config", "local_rank", "deepspeed_plugin", "run_name"):
        return True
    return name in table and is_same(value, table[name].default)
