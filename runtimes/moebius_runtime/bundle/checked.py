"""Dataclasses that check themselves: the base of the manifest and of the engine passport.

Both files may come from anybody. Every field is checked when an object is read or constructed: its type (nothing is
converted except an integer for a float), its range, its length, its pattern; unknown fields are refused. The rules and
the messages are those of a strict pydantic model, without its import and the building of its validators, which took
most of the runtime's import time. A field is `bool`, `int`, `float`, `str`, a `Literal`, `list[T]`, `dict[str, T]`,
another `StrictModel`, a union of these, or `Annotated[T, Field(...)]`; any other annotation is a `TypeError`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Location = tuple[str | int, ...]
Model = TypeVar("Model", bound="StrictModel")
UNKNOWN = "Extra inputs are not permitted"
"""The message of a field that is not in the schema."""


@dataclass(frozen=True)
class Field:
    """Limits of a value: range of a number; length of a text, list or object; pattern of a whole text."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    pattern: str | None = None


@dataclass(frozen=True)
class Problem:
    """What is wrong with one value. `loc` is the path of keys and indices to it."""

    loc: Location
    msg: str
    input: Any


class SchemaError(ValueError):
    """Every problem of a value that was read or constructed; its text has one line per problem."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"{'.'.join(map(str, one.loc)) or 'content'}: {one.msg}" for one in problems))

    def errors(self) -> list[dict[str, Any]]:
        """The problems in the form of pydantic's errors."""
        return [vars(problem) for problem in self.problems]


class StrictModel:
    """Base of checked objects. A subclass is a `@dataclass(frozen=True, kw_only=True)`.

    The constructor and `model_validate` check every field, then call `_check`. The methods have pydantic's names, so
    that these objects are used like the pydantic models of the other packages.

    Raises:
        SchemaError: by the constructor and `model_validate`.
    """

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        _fill(self, {field.name: getattr(self, field.name) for field in fields(self)}, (), problems)  # type: ignore[arg-type]
        if problems:
            raise SchemaError(problems)

    def _check(self) -> None:
        """Checks that concern several fields; raises `ValueError`."""

    @classmethod
    def model_validate(cls: type[Model], content: Any) -> Model:
        """Returns the checked object of a dictionary, as JSON gives it."""
        problems: list[Problem] = []
        model: Model = _checker(cls)(content, (), problems)
        if problems:
            raise SchemaError(problems)
        return model

    @classmethod
    def model_construct(cls: type[Model], **values: Any) -> Model:
        """Returns an object without any check."""
        model = object.__new__(cls)
        for name, value in values.items():
            object.__setattr__(model, name, value)
        return model

    def model_copy(self: Model, *, update: dict[str, Any]) -> Model:
        """Returns a copy with some fields replaced, without any check."""
        model = copy(self)
        for name, value in update.items():
            object.__setattr__(model, name, value)
        return model

    def model_dump(self, *, mode: Literal["json", "python"] = "json") -> dict[str, Any]:
        """Returns the fields as new dictionaries and lists, the same in both modes."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


def first_problem(error: Exception) -> str:
    """The first problem of an error on one line, and the number of further ones.

    Args:
        error: `SchemaError`, pydantic's `ValidationError`, or any other exception, whose text is taken.
    """
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return in_one_line(error)
    problems = errors()
    first = problems[0]
    where = ".".join(shortened(part).strip("'") for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where or 'content'}: {in_one_line(first['msg'])}, got {shortened(first.get('input'))}{more}"


def shortened(value: object) -> str:
    """The `repr` of a value, at most 40 characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."


def in_one_line(problem: object) -> str:
    """The text of a problem on one line, at most 300 characters."""
    return " ".join(str(problem).split())[:300]


_Check = Callable[[Any, Location, list[Problem]], Any]
"""Returns the checked value. Appends what is wrong to the list; the value returned is then of no use."""


def _default_of(field: dataclasses.Field[Any]) -> Callable[[], Any] | None:
    """Makes the field's default; None where the field is required."""
    if field.default_factory is not MISSING:
        return field.default_factory
    return None if field.default is MISSING else lambda: field.default


@cache
def _checkers(cls: type[Any]) -> dict[str, tuple[_Check, Callable[[], Any] | None]]:
    """(check, default) of each field. Annotations are evaluated at the first use of a class, not at its import."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: (_checker(hints[field.name]), _default_of(field)) for field in fields(cls)}


def _fill(model: StrictModel, content: dict[str, Any], loc: Location, problems: list[Problem]) -> None:
    """Sets every field of a new object to its checked value."""
    before = len(problems)
    kind: Any = type(model)  # mypy takes a dataclass's type for unhashable
    checkers = _checkers(kind)
    for name, (check, default) in checkers.items():
        if name in content:
            object.__setattr__(model, name, check(content[name], (*loc, name), problems))
        elif default is None:
            problems.append(Problem((*loc, name), "Field required", content))
        else:
            object.__setattr__(model, name, default())
    for name in content:
        if name not in checkers:
            problems.append(Problem((*loc, name), UNKNOWN, content[name]))
    if len(problems) == before:
        try:
            model._check()
        except ValueError as error:
            problems.append(Problem(loc, f"Value error, {error}", content))


def _checker(hint: Any) -> _Check:
    """The check of an annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        check = _checker(arguments[0])
        return _both(check, [limit for field in arguments[1:] if isinstance(field, Field) for limit in _limits(field)])
    if origin in (Union, UnionType):
        return _any_of({_json_type(one): _checker(one) for one in arguments})
    if origin is Literal:
        return _literal(arguments)
    if origin is list:
        return _list(_checker(arguments[0]))
    if origin is dict:
        return _dict(_checker(arguments[0]), _checker(arguments[1]))
    if isinstance(hint, type) and issubclass(hint, StrictModel):
        return _model(hint)
    if hint not in _PLAIN:
        raise TypeError(f"{hint} is not a type that a checked field can have")
    return _PLAIN[hint]


def _json_type(hint: Any) -> type:
    """The type of the JSON value that an annotation takes."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _json_type(get_args(hint)[0])
    if origin is Literal:
        return type(get_args(hint)[0])
    plain = origin or hint
    return dict if issubclass(plain, StrictModel) else plain


def _both(check: _Check, limits: list[tuple[Callable[[Any], bool], Callable[[Any], str]]]) -> _Check:
    """A check, then limits on what it returned."""

    def checked(value: Any, loc: Location, problems: list[Problem]) -> Any:
        before = len(problems)
        result = check(value, loc, problems)
        if len(problems) == before:
            for holds, message in limits:
                if not holds(result):
                    problems.append(Problem(loc, message(result), value))
                    break
        return result

    return checked


def _limits(field: Field) -> Iterator[tuple[Callable[[Any], bool], Callable[[Any], str]]]:
    """(whether it holds, message) of each limit."""
    ge, gt, le, lt, least, most = field.ge, field.gt, field.le, field.lt, field.min_length, field.max_length
    if ge is not None:
        yield lambda value: value >= ge, lambda _: f"Input should be greater than or equal to {ge:.15g}"
    if gt is not None:
        yield lambda value: value > gt, lambda _: f"Input should be greater than {gt:.15g}"
    if le is not None:
        yield lambda value: value <= le, lambda _: f"Input should be less than or equal to {le:.15g}"
    if lt is not None:
        yield lambda value: value < lt, lambda _: f"Input should be less than {lt:.15g}"
    if least is not None:
        yield lambda value: len(value) >= least, lambda value: _length(value, f"at least {least}", least)
    if most is not None:
        yield lambda value: len(value) <= most, lambda value: _length(value, f"at most {most}", most)
    if field.pattern is not None:
        # `fullmatch`, because `$` of `re` also matches before a last newline.
        pattern = re.compile(field.pattern)
        message = f"String should match pattern '{field.pattern}'"
        yield lambda value: pattern.fullmatch(value) is not None, lambda _: message


def _length(value: Any, limit: str, number: int) -> str:
    if isinstance(value, str):
        return f"String should have {limit} character{'s' * (number != 1)}"
    kind = "List" if isinstance(value, list) else "Dictionary"
    return f"{kind} should have {limit} item{'s' * (number != 1)} after validation, not {len(value)}"


def _any_of(checks: dict[type, _Check]) -> _Check:
    """The check of the member that takes the value's type, else of the first, whose message then describes it."""
    first = next(iter(checks.values()))

    def checked(value: Any, loc: Location, problems: list[Problem]) -> Any:
        kind = dict if isinstance(value, StrictModel) else type(value)
        return checks.get(kind, first)(value, loc, problems)

    return checked


def _literal(choices: tuple[Any, ...]) -> _Check:
    names = [repr(choice) for choice in choices]
    message = f"Input should be {' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}"
    known = {(type(choice), choice) for choice in choices}  # True is not 1

    def checked(value: Any, loc: Location, problems: list[Problem]) -> Any:
        if not isinstance(value, (str, int)) or (type(value), value) not in known:
            problems.append(Problem(loc, message, value))
        return value

    return checked


def _list(item: _Check) -> _Check:
    def checked(value: Any, loc: Location, problems: list[Problem]) -> Any:
        if type(value) is not list:
            problems.append(Problem(loc, "Input should be a valid array", value))
            return value
        return [item(one, (*loc, index), problems) for index, one in enumerate(value)]

    return checked


def _dict(key: _Check, item: _Check) -> _Check:
    def checked(value: Any, loc: Location, problems: list[Problem]) -> Any:
        if type(value) is not dict:
            problems.append(Problem(loc, "Input should be an object", value))
            return value
        return {
            key(name, (*loc, name, "[key]"), problems): item(one, (*loc, name), problems) for name, one in value.items()
        }

    return checked


def _model(cls: type[StrictModel]) -> _Check:
    def checked(value: Any, loc: Location, problems: list[Problem]) -> Any:
        if isinstance(value, cls):
            return value
        if type(value) is not dict:
            problems.append(Problem(loc, "Input should be an object", value))
            return value
        model = object.__new__(cls)
        _fill(model, value, loc, problems)
        return model

    return checked


def _of_type(kind: type, words: str) -> _Check:
    def checked(value: Any, loc: Location, problems: list[Problem]) -> Any:
        if type(value) is not kind:
            problems.append(Problem(loc, f"Input should be {words}", value))
        return value

    return checked


def _number(value: Any, loc: Location, problems: list[Problem]) -> Any:
    if type(value) is int:
        try:
            return float(value)
        except OverflowError:
            problems.append(Problem(loc, "Input should be a finite number", value))
            return value
    if type(value) is not float:
        problems.append(Problem(loc, "Input should be a valid number", value))
    elif not math.isfinite(value):
        problems.append(Problem(loc, "Input should be a finite number", value))
    return value


def _text(value: Any, loc: Location, problems: list[Problem]) -> Any:
    if type(value) is not str:
        problems.append(Problem(loc, "Input should be a valid string", value))
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no file of ours can hold
        problems.append(Problem(loc, "Input should be a valid string, it is not Unicode", value))
    return value


_PLAIN: dict[Any, _Check] = {
    bool: _of_type(bool, "a valid boolean"),
    int: _of_type(int, "a valid integer"),
    NoneType: _of_type(NoneType, "None"),
    float: _number,
    str: _text,
}


def _plain(value: Any) -> Any:
    if isinstance(value, StrictModel):
        return value.model_dump()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value
