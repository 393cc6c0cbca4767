"""Checking what a model wrote against the schema that was asked for.

The schemas are the caller's and the checks run in the event loop, so all of it is bounded: a schema
has at most 256 kB, and every check draws from a budget of steps. What would cost more is not
checked: the value is accepted, and the log says `schema.too_costly`. Refused up front are schemas
that are none, and references that leave the schema or lead nowhere.

A `pattern`, also one of `patternProperties`, is enforced only where its worst case is certainly
cheap: at most 500 characters, no quantified group, no backreference, no lookaround, no flag, at
most two unbounded quantifiers, few alternatives, and a text of at most 2,000 characters (less for
two unbounded quantifiers without `^`). Beside a property pattern that is not enforced,
`additionalProperties` is not either; `unevaluatedProperties` is not in any schema that has
`patternProperties`. `format` is never asserted.
"""

# Schemas are any JSON, and jsonschema makes its classes at run time.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import orjson
import structlog
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from openinteractions.errors import Invalid
from openinteractions.loop.excerpt import cut_middle
from openinteractions.loop.plain_schema import plain_size
from openinteractions.models.port import Json

_log = structlog.get_logger(__name__)

# The contract ignores these, in function parameters and in response schemas (§12.2).
_IGNORED = frozenset(
    {
        "minLength",
        "maxLength",
        "minProperties",
        "maxProperties",
        "uniqueItems",
        "contains",
        "minContains",
        "maxContains",
    }
)
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"enum", "const", "default", "examples", "example", "required"})
_MESSAGE_CHARS = 300
_MAX_SCHEMA_BYTES = 256_000
_CHECK_STEPS = 50_000
"""For a value; a step is about ten microseconds."""
_BUILD_STEPS = 200_000
"""For a schema itself: the meta-schema, where it is asked, takes some thirty for each object."""
_PLAIN_STEPS = 4
"""For each object of a schema that is valid at a glance; the walk takes one more."""
_MAX_DEPTH = 130
"""Of schemas within each other while checking; at most five or six stack frames for each."""
_PATTERN_CHARS = 500
_PATTERN_UNBOUNDED = 2
_TEXT_CHARS = 2_000
_PATTERN_COST = 5_000_000
"""The most that one search may take, in the matcher's own, far smaller steps."""


def enforced(schema: Any) -> Any:  # noqa: ANN401 - any JSON
    """A schema as it is enforced: ignored keywords out, upper-case type names lowered."""
    if isinstance(schema, list):
        return [enforced(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: Json = {}
    for key, value in schema.items():
        if key in _IGNORED:
            continue
        if key == "type":
            result[key] = _lower(value)
        elif key in _VALUES:
            result[key] = value
        elif key in _MAPS and isinstance(value, dict):
            result[key] = {name: enforced(item) for name, item in value.items()}
        else:
            result[str(key)] = enforced(value)
    if result.pop("nullable", False) is True and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


def _lower(value: Any) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(value, str):
        return value.lower()
    if isinstance(value, list):
        return [_lower(item) for item in value]
    return value


def require_schema(schema: Json, field: str, *, steps: int = _BUILD_STEPS) -> None:
    """Refuse a schema that is none, is too large, or refers to what it does not hold.

    Args:
        schema: What is to be checked.
        field: Where it stands, for the message.
        steps: What the check may take; one is about ten microseconds.

    Raises:
        Invalid: The message names the field and what is wrong.
    """
    try:
        _validator(_dumped(schema), steps)
    except _BadSchemaError as error:
        where = "".join(f".{part}" for part in error.path)
        message = str(error)[:_MESSAGE_CHARS]
    except (_TooCostlyError, RecursionError):
        where, message = "", "the schema is too large or too deep to be checked."
    else:
        return
    raise Invalid(f"Invalid value at '{field}{where}': {message}")


class _TooCostlyError(Exception):
    """The budget is used up."""


class _BadSchemaError(Exception):
    """The schema is none."""

    def __init__(self, message: str, path: Iterable[Any] = ()) -> None:
        super().__init__(message)
        self.path = tuple(path)


# ---- the budget


@dataclass(slots=True)
class _Budget:
    left: int
    patterns: "Mapping[str, _Pattern | None]" = field(default_factory=dict)
    """Those of the schema, by their text; None and absent ones are not enforced."""
    has_property_patterns: bool = False
    depth: int = 0


_budget: ContextVar[_Budget] = ContextVar("schema_budget")


@contextmanager
def _budgeted(budget: _Budget) -> Generator[_Budget]:
    token = _budget.set(budget)
    try:
        yield budget
    finally:
        _budget.reset(token)


@contextmanager
def _deeper() -> Generator[None]:
    """One level further down.

    The interpreter's own limit must not be reached: the maps of `referencing` panic there.
    """
    budget = _budget.get()
    if budget.depth >= _MAX_DEPTH:
        raise RecursionError
    budget.depth += 1
    try:
        yield
    finally:
        budget.depth -= 1


def _spend(steps: int) -> None:
    budget = _budget.get()
    budget.left -= steps
    if budget.left < 0:
        raise _TooCostlyError


# ---- patterns


@dataclass(frozen=True, slots=True)
class _Pattern:
    regex: re.Pattern[str]
    factor: int
    """How many ways there are through alternatives and bounded quantifiers."""
    power: int
    """How many places range over the whole text: unbounded quantifiers, and an open start."""

    def finds(self, text: str) -> bool | None:
        """Whether the text matches; None if finding out may be too costly."""
        cost = self.factor * (len(text) + 1) ** self.power + len(text)
        if len(text) > _TEXT_CHARS or cost > _PATTERN_COST:
            return None
        _spend(cost // 500)
        return self.regex.search(text) is not None


_TOKEN = re.compile(
    r"(?P<odd>\\[1-9]|\(\?(?!:))|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<or>\|)"
    r"|(?P<times>[*+?]|\{(?P<least>\d*)(?P<comma>,)?(?P<most>\d*)\})[?+]?|.",
    re.DOTALL,
)


def _pattern(text: str) -> _Pattern | None:
    """A pattern with what it may cost; None if it is not certainly cheap.

    Raises:
        re.error: It is short and plain, and no pattern.
    """
    if len(text) > _PATTERN_CHARS:
        return None
    tokens = list(_TOKEN.finditer(text))
    kinds = [_kind(token) for token in tokens]
    if "odd" in kinds or any(pair == ("close", "times") for pair in pairwise(kinds)):
        return None
    times = [_times(token) for token in tokens if token["times"]]
    unbounded = sum(most is None for _, most in times)
    if unbounded > _PATTERN_UNBOUNDED:
        return None
    ways, is_one = _alternatives(kinds)
    for least, most in times:
        ways *= most if most is not None and most > least else 1
    run = len(text) + sum(least for least, _ in times)
    is_open = not (is_one and text.startswith("^"))
    return _Pattern(re.compile(text), ways * (1 + run // 16), unbounded + is_open)


def _kind(token: re.Match[str]) -> str:
    for kind in ("odd", "open", "close", "or", "times"):
        if token[kind]:
            return kind
    return "any"


def _alternatives(kinds: list[str]) -> tuple[int, bool]:
    """How many ways there are at most through all groups; whether the whole is one alternative."""
    ways, bars = 1, [0]
    for kind in kinds:
        if kind == "open":
            bars.append(0)
        elif kind == "or":
            bars[-1] += 1
        elif kind == "close" and len(bars) > 1:
            ways *= bars.pop() + 1
    for count in bars:
        ways *= count + 1
    return ways, bars == [0]


def _times(token: re.Match[str]) -> tuple[int, int | None]:
    """How often a quantifier repeats, at least and at most."""
    sign = token["times"]
    if sign == "?":
        return 0, 2  # Two ways.
    if sign in "*+":
        return 0, None
    least = int(token["least"] or 0)
    if token["comma"] is None:
        return least, least
    return least, int(token["most"]) if token["most"] else None


# ---- keywords


def _pattern_keyword(_validator: Any, text: str, value: Any, _schema: Any) -> Iterator[Any]:  # noqa: ANN401
    found = _budget.get().patterns.get(text)
    if found and isinstance(value, str) and found.finds(value) is False:
        yield ValidationError(f"{value!r} does not match {text!r}")


def _pattern_properties(validator: Any, patterns: Json, value: Any, _schema: Any) -> Iterator[Any]:  # noqa: ANN401
    if not isinstance(value, dict):
        return
    for text, schema in patterns.items():
        found = _budget.get().patterns.get(text)
        if found is None:
            continue
        for name, item in value.items():
            _spend(1)
            if found.finds(str(name)):
                yield from validator.descend(item, schema, path=name, schema_path=text)


def _additional_properties(validator: Any, extra: Any, value: Any, schema: Json) -> Iterator[Any]:  # noqa: ANN401
    if not isinstance(value, dict):
        return
    patterns = [_budget.get().patterns.get(text) for text in schema.get("patternProperties", ())]
    rest: Json = {}
    for name, item in value.items():
        _spend(len(patterns))
        matched = [p and p.finds(str(name)) for p in patterns]
        if None in matched:
            return
        if True not in matched:
            rest[name] = item
    known = {"properties": schema.get("properties", {})}
    yield from _ORIGINAL["additionalProperties"](validator, extra, rest, known) or ()


def _unevaluated_properties(validator: Any, extra: Any, value: Any, schema: Json) -> Iterator[Any]:  # noqa: ANN401
    if not _budget.get().has_property_patterns:
        yield from _ORIGINAL["unevaluatedProperties"](validator, extra, value, schema) or ()


def _nothing(*_: object) -> None:
    return None


def _cost(keyword: str, wanted: Any, value: Any) -> int:  # noqa: ANN401 - any JSON
    """What a keyword takes beside the schemas below it, which are counted on their own."""
    if keyword in {"$ref", "$dynamicRef"}:
        text = str(wanted)
        return 2 + len(text) // 50 + text.count("/") ** 2 // 16
    if keyword in {"enum", "const", "dependentRequired"}:
        size = _nodes(wanted)
    else:
        size = sum(len(x) for x in (wanted, value) if isinstance(x, (list, dict)))
        mixed = keyword == "uniqueItems" and not all(
            isinstance(x, str) for x in (value if isinstance(value, list) else ())
        )
        if mixed or keyword.startswith("unevaluated"):
            size *= size
    return 1 + size // 16


def _nodes(value: Any) -> int:  # noqa: ANN401 - any JSON
    count, todo = 0, [value]
    while todo:
        item = todo.pop()
        count += 1
        if isinstance(item, (list, dict)):
            todo.extend(item.values() if isinstance(item, dict) else item)
    return count


def _shortened(error: ValidationError) -> str:
    """Its message; one about the length of a list does not show the list."""
    if error.validator in ("minItems", "maxItems") and isinstance(error.instance, list):
        bound = "at most" if error.validator == "maxItems" else "at least"
        return f"it has {len(error.instance)} items, and may have {bound} {error.validator_value}"
    return cut_middle(error.message, _MESSAGE_CHARS)


def _counted(keyword: str, check: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    def counting(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[Any]:  # noqa: ANN401
        _spend(_cost(keyword, wanted, value))
        for error in check(validator, wanted, value, schema) or ():
            # A message shows the whole value: many of them are costly, and none is kept.
            _spend(1 + len(error.message) // 256)
            error.message = _shortened(error)
            yield error

    return counting


def _counting(keywords: dict[str, Callable[..., Any]]) -> Any:  # noqa: ANN401 - a class made by jsonschema
    """A validator class all of whose steps are counted."""
    counted = {name: _counted(name, check) for name, check in (_ORIGINAL | keywords).items()}
    made: Any = extend(Draft202012Validator, counted)
    descend: Any = made.descend
    iter_errors: Any = made.iter_errors

    def counted_descend(self: Any, instance: Any, schema: Any, *a: Any, **kw: Any) -> Iterator[Any]:  # noqa: ANN401
        _spend(1)
        if schema is False:
            yield ValidationError("False schema does not allow a value here")
            return
        with _deeper():
            yield from descend(self, instance, schema, *a, **kw)

    def counted_errors(self: Any, instance: Any) -> Iterator[Any]:  # noqa: ANN401
        _spend(1)
        if self.schema is False:
            yield ValidationError("False schema does not allow a value here")
            return
        with _deeper():
            yield from iter_errors(self, instance)

    def evolve(self: Any, *, schema: Any, _resolver: Any = None) -> Any:  # noqa: ANN401
        # The one of jsonschema changes to the (uncounted) class that a `$schema` names.
        return made(schema, registry=self._registry, _resolver=_resolver or self._resolver)

    made.descend, made.iter_errors, made.evolve = counted_descend, counted_errors, evolve
    return made


_ORIGINAL: dict[str, Callable[..., Any]] = dict(Draft202012Validator.VALIDATORS)
_Meta = _counting({})
_Checker = _counting(
    {
        "pattern": _pattern_keyword,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "unevaluatedProperties": _unevaluated_properties,
        "format": _nothing,
        # `enforced` takes these out; a reference may still lead to where it did not look.
        **dict.fromkeys(_IGNORED & _ORIGINAL.keys(), _nothing),
    }
)
_META: Any = _Meta(Draft202012Validator.META_SCHEMA, registry=Registry())


# ---- schemas


@dataclass(frozen=True, slots=True)
class _Validator:
    checker: Any
    patterns: Mapping[str, _Pattern | None]
    has_property_patterns: bool

    def first_error(self, value: Any) -> ValidationError | None:  # noqa: ANN401 - any JSON
        with _budgeted(_Budget(_CHECK_STEPS, self.patterns, self.has_property_patterns)):
            return next(iter(self.checker.iter_errors(value)), None)


def _dumped(schema: Json) -> bytes:
    try:
        dumped = orjson.dumps(schema, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:
        raise _BadSchemaError(f"the schema cannot be followed ({error}).") from None
    if len(dumped) > _MAX_SCHEMA_BYTES:
        raise _TooCostlyError
    return dumped


@lru_cache(maxsize=32)
def _validator(schema: bytes, steps: int) -> _Validator:
    document = enforced(orjson.loads(schema))
    with _budgeted(_Budget(steps)):
        _require_valid(document, ())
        resource = DRAFT202012.create_resource(document)
        try:
            uri = resource.id() or ""
            # An empty registry: a `$ref` to somewhere else is an error, never a request.
            # Crawled once, here, and not again for each reference to an anchor.
            registry: Any = Registry().with_resource(uri, resource).crawl()
            resolver = registry.resolver(uri)
        except (Unresolvable, ValueError) as error:
            raise _BadSchemaError(f"an '$id' cannot be read ({error}).") from None
        walk = _Walk(document)
        walk.all(resolver)
    checker = _Checker(document, registry=registry, _resolver=resolver)
    return _Validator(checker, walk.patterns, b'"patternProperties"' in schema)


def _require_valid(document: Any, path: tuple[Any, ...]) -> None:  # noqa: ANN401 - any JSON
    size = plain_size(document)
    if size is not None:
        _spend(_PLAIN_STEPS * size)
        return
    for error in _META.iter_errors(document):
        raise _BadSchemaError(error.message, (*path, *error.absolute_path))


_Place = tuple[Any, Any, tuple[Any, ...]]
"""A schema, the resolver of the references in it, and where it stands."""


class _Walk:
    """All schemas of a document, also those that only a reference leads to."""

    def __init__(self, document: Any) -> None:  # noqa: ANN401 - any JSON
        self.patterns: dict[str, _Pattern | None] = {}
        self._document = document
        self._seen: set[int] = set()
        self._valid = {id(document)}
        for name in ("$defs", "definitions"):
            if isinstance(document, dict):
                self._valid |= {id(item) for item in document.get(name, {}).values()}

    def all(self, resolver: Any) -> None:  # noqa: ANN401 - of referencing
        todo: list[_Place] = [(self._document, resolver, ())]
        while todo:
            node, base, path = todo.pop()
            _spend(1)
            if isinstance(node, list):
                todo += [(item, base, (*path, n)) for n, item in enumerate(node)]
            if not isinstance(node, dict) or id(node) in self._seen:
                continue
            self._seen.add(id(node))
            if node is not self._document and isinstance(node.get("$id"), str):
                base = base.in_subresource(DRAFT202012.create_resource(node))
            for key, value in node.items():
                todo += self._below(key, value, base, (*path, key))

    def _below(self, key: str, value: Any, base: Any, path: tuple[Any, ...]) -> list[_Place]:  # noqa: ANN401
        if key in {"$ref", "$dynamicRef"} and isinstance(value, str):
            return [self._target(value, base, path)]
        if key == "pattern" and isinstance(value, str):
            self._add(value, path)
        if key in _MAPS and isinstance(value, dict):
            for text in value if key == "patternProperties" else ():
                self._add(text, path)
            return [(item, base, (*path, name)) for name, item in value.items()]
        return [] if key in _VALUES else [(value, base, path)]

    def _target(self, ref: str, base: Any, path: tuple[Any, ...]) -> _Place:  # noqa: ANN401
        _spend(_cost("$ref", ref, None))
        nowhere = _BadSchemaError(
            f"the schema refers to something it does not define ({ref[:100]!r}).", path
        )
        if not ref.startswith("#"):
            raise nowhere
        try:
            found = base.lookup(ref)
        except (Unresolvable, ValueError, TypeError, LookupError, AttributeError):
            raise nowhere from None
        if not isinstance(found.contents, (dict, bool)):
            raise nowhere
        if id(found.contents) not in self._valid:
            self._valid.add(id(found.contents))
            _require_valid(found.contents, path)
        return found.contents, found.resolver, path

    def _add(self, text: str, path: tuple[Any, ...]) -> None:
        if text in self.patterns:
            return
        # Compiling has a price of its own.
        _spend(20 * min(len(text), _PATTERN_CHARS))
        try:
            self.patterns[text] = _pattern(text)
        except (re.error, OverflowError) as error:
            raise _BadSchemaError(f"{text[:100]!r} is not a 'regex' ({error}).", path) from None


def mismatch(value: Any, schema: Json) -> str | None:  # noqa: ANN401 - any JSON
    """Why a JSON value does not obey a schema, in words a model understands.

    None if it does, and if that is too costly to find out.
    """
    try:
        error = _validator(_dumped(schema), _BUILD_STEPS).first_error(value)
    except _TooCostlyError:
        _log.warning("schema.too_costly")
        return None
    except (_BadSchemaError, Unresolvable) as problem:
        return str(problem)[:_MESSAGE_CHARS]
    except RecursionError:
        return "the schema, or the value, goes deeper than can be followed"
    if error is None:
        return None
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path)
    # What is wrong with the value stands behind it.
    return cut_middle(f"at ${where}: {error.message}", _MESSAGE_CHARS)


def text_mismatch(text: str, schema: Json) -> str | None:
    """Why a text is not one JSON document of this schema; None if it is."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return f"it is not one JSON document ({error})"
    return mismatch(value, schema)


def arguments_mismatch(arguments: Mapping[str, Any], tool: Json | None) -> str | None:
    """Why a call's arguments do not obey its function's parameters; None if they do."""
    if tool is None:
        return "there is no function of this name"
    parameters = tool.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        return None
    return mismatch(dict(arguments), parameters)
