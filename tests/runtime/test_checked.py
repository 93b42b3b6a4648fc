"""The checked dataclasses of manifests and passports: what they refuse, and why, is what strict pydantic models do."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
import pytest

from moebius_runtime.bundle.checked import Field, SchemaError, StrictModel, first_problem
from moebius_runtime.bundle.json_files import StrictModel as PydanticModel
from moebius_runtime.bundle.manifest import Manifest, read_manifest

NAMES = Literal["one", "two", "three"]


@dataclass(frozen=True, kw_only=True)
class Part(StrictModel):
    size: Annotated[int, Field(ge=1, le=1 << 40)]
    name: Annotated[str, Field(pattern=r"^[a-z]{1,4}$")] = "a"

    def _check(self) -> None:
        if self.size == 13:
            raise ValueError("13 is\nrefused")


@dataclass(frozen=True, kw_only=True)
class Whole(StrictModel):
    switch: bool
    count: int
    share: Annotated[float, Field(gt=0, lt=1)]
    limit: Annotated[float, Field(ge=-1.5, le=100)]
    text: Annotated[str, Field(min_length=1, max_length=5)]
    kind: NAMES
    version: Literal[1]
    maybe: Annotated[str, Field(max_length=3)] | None
    numbers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=3)]
    parts: Annotated[dict[NAMES, Part], Field(max_length=2)]
    first: Part | None = None


class PydanticPart(PydanticModel):
    size: Annotated[int, pydantic.Field(ge=1, le=1 << 40)]
    name: Annotated[str, pydantic.Field(pattern=r"^[a-z]{1,4}$")] = "a"

    @pydantic.model_validator(mode="after")
    def _check(self) -> PydanticPart:
        if self.size == 13:
            raise ValueError("13 is\nrefused")
        return self


class PydanticWhole(PydanticModel):
    switch: bool
    count: int
    share: Annotated[float, pydantic.Field(gt=0, lt=1)]
    limit: Annotated[float, pydantic.Field(ge=-1.5, le=100)]
    text: Annotated[str, pydantic.Field(min_length=1, max_length=5)]
    kind: NAMES
    version: Literal[1]
    maybe: Annotated[str, pydantic.Field(max_length=3)] | None
    numbers: Annotated[list[Annotated[int, pydantic.Field(ge=0)]], pydantic.Field(min_length=1, max_length=3)]
    parts: Annotated[dict[NAMES, PydanticPart], pydantic.Field(max_length=2)]
    first: PydanticPart | None = None


SOUND: dict[str, Any] = {
    "switch": True,
    "count": -3,
    "share": 0.5,
    "limit": 2,
    "text": "abc",
    "kind": "two",
    "version": 1,
    "maybe": None,
    "numbers": [0, 5],
    "parts": {"one": {"size": 3, "name": "b"}, "three": {"size": 4}},
    "first": {"size": 7},
}
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 13, 1 << 40, (1 << 40) + 1, 10**30, 0.0, 0.5, 1.0, -1.5, -1.6, 100.5, 1e300),
    *(float("nan"), float("inf"), 10**400, "", "a", "abcd", "abcde", "abcdef", "abc\n", "one", "1", "é", "two\x00"),
    *([], [1], [1, 2, 3, 4], [-1, "x", 1.0], [[]], {}, {"size": 1}, {"size": 13}, {"size": 0, "name": "B", "x": 1}),
    *({"one": {"size": 1}}, {"four": {"size": 1}}, {"one": {}, "two": {"size": "1"}, "three": {"size": 2}}),
]


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in pairs for place in ((*path, key), *places(value, (*path, key)))]


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    content = copy.deepcopy(SOUND)
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


def ours(content: Any) -> dict[str, Any] | list[tuple[tuple[Any, ...], str]]:
    """What is read, or (place, message) of each problem."""
    try:
        return Whole.model_validate(content).model_dump()
    except SchemaError as error:
        return [(problem.loc, problem.msg) for problem in error.problems]


def pydantics(content: Any) -> dict[str, Any] | list[tuple[tuple[Any, ...], str]]:
    try:
        return PydanticWhole.model_validate_json(json.dumps(content)).model_dump(mode="json")
    except pydantic.ValidationError as error:
        return [(problem["loc"], problem["msg"]) for problem in error.errors()]


@pytest.mark.parametrize("path", places(SOUND), ids=lambda path: ".".join(map(str, path)))
def test_problems_and_values_are_those_of_pydantic(path):
    for value in VALUES:
        content = changed(path, value)
        if path == ("version",):  # pydantic takes True and 1.0 for 1
            assert (type(ours(content)) is dict) == (type(value) is int and value == 1), value
            continue
        assert repr(ours(content)) == repr(pydantics(content)), value


@pytest.mark.parametrize("name", [*SOUND, "colour"])
def test_missing_and_unknown_fields_are_those_of_pydantic(name):
    content = copy.deepcopy(SOUND) | {"colour": 1, "\n": 2}
    del content[name]
    assert repr(ours(content)) == repr(pydantics(content))


def test_a_field_with_a_default_may_be_absent():
    """A manifest of an earlier version has none of the later fields; no two objects share a default."""

    @dataclass(frozen=True, kw_only=True)
    class Later(StrictModel):
        old: int
        parts: dict[NAMES, Part] = field(default_factory=dict)
        size: int | None = None

    first, second = Later.model_validate({"old": 1}), Later.model_validate({"old": 2})
    assert (first.parts, first.size) == ({}, None)
    first.parts["one"] = Part(size=1)
    assert second.parts == {}
    assert Later.model_validate(first.model_dump()) == first


def test_half_of_a_surrogate_pair_is_no_text():
    for path in (("text",), ("parts", "one", "name")):
        assert ours(changed(path, "\ud800")) == [(path, "Input should be a valid string, it is not Unicode")]


def test_constructors_check_as_the_reader_does():
    part = Part(size=1)
    assert part == Part.model_validate({"size": 1, "name": "a"})
    assert Whole.model_validate(SOUND | {"first": part}).first is part
    for values in ({"size": "1"}, {"size": 13}, {"size": 1, "name": 2}):
        with pytest.raises(SchemaError):
            Part(**values)
    with pytest.raises(TypeError):
        Part(size=1, colour=2)
    with pytest.raises(SchemaError, match=r"first: Input should be an object"):
        Whole(**Whole.model_validate(SOUND).model_dump() | {"first": 3})


def test_copies_are_new_objects_and_the_original_stays():
    whole = Whole.model_validate(SOUND)
    assert whole.model_copy(update={"count": 4}).count == 4
    assert whole.count == -3
    dumped = whole.model_dump()
    dumped["numbers"].append(9)
    assert whole.numbers == [0, 5]
    with pytest.raises(AttributeError):
        whole.count = 3  # type: ignore[misc]


def test_the_first_problem_on_one_line():
    with pytest.raises(SchemaError) as caught:
        Whole.model_validate(changed(("parts", "one"), {"size": 13}) | {"count": 1.0})
    assert first_problem(caught.value) == "count: Input should be a valid integer, got 1.0 (and 1 more)"
    with pytest.raises(SchemaError) as caught:
        Whole.model_validate(changed(("parts", "one", "size"), 13))
    assert first_problem(caught.value).startswith("parts.one: Value error, 13 is refused, got {'size': 13")
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SchemaError) as caught:
        Whole.model_validate(changed(("count",), deep))
    assert first_problem(caught.value).startswith("count: Input should be a valid integer, got ")
    while deep:  # else the interpreter would free it by recursion
        deep = deep.pop()


def test_an_annotation_that_is_not_checked_is_an_error_of_the_programmer():
    @dataclass(frozen=True, kw_only=True)
    class Odd(StrictModel):
        place: complex

    with pytest.raises(TypeError, match="complex"):
        Odd.model_validate({"place": 1})


def test_every_field_of_a_manifest_is_checked(toy_bundle):
    """A value of another type at any place is refused."""
    content = read_manifest(toy_bundle.path).model_dump()
    assert Manifest.model_validate(content).model_dump() == content
    for path in places(content):
        wrong = copy.deepcopy(content)
        inner: Any = wrong
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = 1j
        with pytest.raises(SchemaError):
            Manifest.model_validate(wrong)
