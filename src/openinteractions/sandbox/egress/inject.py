"""What is added to requests on their way out, and what must not get out: credentials.

A sandbox never holds a secret. Bearer tokens and transforms are put into the heads of requests
here; for an environment variable the sandbox has a placeholder, which becomes the value here,
toward the hosts and in the places that the credential names, and which stops a request elsewhere.
"""

import asyncio
import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias
from urllib.parse import quote, quote_plus

from openinteractions.errors import AppError
from openinteractions.sandbox.egress.http1 import MAX_HEAD, BadMessage, Fields, Request
from openinteractions.sandbox.egress.policy import (
    Blocked,
    Rule,
    is_header_name,
    is_header_value,
    matches,
)

Location: TypeAlias = Literal["header", "query", "body"]

_MARK = b"__GEMINI_CRED_"
_REDACTED = b"[redacted]"
_MIN_SECRET = 8
_MOST_IN_HEAD = 16
_MOST_GROWTH = 512 * 1024
"""Every value fits, in any spelling: 32,768 characters are at most 393,216 bytes."""
_MOST_HELD = 64 << 20
_PAUSE = 256
# These steer the client's parser. A transform of `Accept` or `Accept-Encoding` is no secret there.
_STEERING = frozenset({b"content-encoding", b"content-type"})
_PUBLIC = re.compile(
    rb"(?:(?:application|audio|font|image|message|model|multipart|text|video)/[a-z0-9.+-]+)?"
    rb"(?:; ?)?(?:charset=[a-z0-9-]+)?|(?:(?:br|deflate|gzip|identity|zstd)(?:, ?|$))+",
    re.IGNORECASE,
)
_WORDS = re.compile(rb"[A-Za-z-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bearer:
    """A token for a header; for OAuth 2, a fresh one."""

    token: str = field(repr=False)
    header_name: str = "Authorization"
    prefix: str = "Bearer"
    """Before the token, with a space between; empty: nothing."""
    kind: Literal["bearer"] = "bearer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placeholder:
    """The value behind a placeholder."""

    value: str = field(repr=False)
    trusted_domains: tuple[str, ...]
    """As in allowlists. The value goes to no other hosts: where there are none, to nobody."""
    locations: frozenset[Location]
    kind: Literal["placeholder"] = "placeholder"


Injection: TypeAlias = Bearer | Placeholder


class Vault(Protocol):
    """Where credentials are kept. Asked at each request, so that rotation acts at once."""

    async def credential(self, environment_id: str, credential_id: str) -> Injection | None:
        """The credential as it is now; None if there is none, or it is revoked.

        Raises:
            AppError: It cannot be had now; the message says why, without secrets.
        """
        ...


def placeholder(credential_id: str) -> str:
    """What a sandbox has in the place of a credential's value."""
    return f"{_MARK.decode()}{credential_id}__"


class Variables:
    """The credentials that an environment has as variables."""

    def __init__(self, credential_ids: Iterable[str] = ()) -> None:
        self.ids: Mapping[bytes, str] = {
            placeholder(each).encode(): each for each in dict.fromkeys(credential_ids)
        }
        """Credential by its placeholder."""
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, longest_first)) or b"(?!)")
        self._longest = len(longest_first[0]) if longest_first else 0

    def __bool__(self) -> bool:
        return bool(self.ids)

    def find(self, text: bytes) -> Iterator[re.Match[bytes]]:
        """All placeholders in a text, in order."""
        return self._pattern.finditer(text) if _MARK in text else iter(())

    def undecided(self, text: bytes) -> int:
        """From where on a text may hold a placeholder that its continuation completes."""
        tail_at = max(0, len(text) - self._longest + 1)
        whole = [each for each in self.find(text) if each.end() > tail_at]
        at = text.find(b"_", tail_at)
        while at >= 0:
            around = next((each for each in whole if each.start() < at < each.end()), None)
            if around is None:
                tail = text[at:]
                if any(each != tail and each.startswith(tail) for each in self.ids):
                    return at
            at = text.find(b"_", at + 1 if around is None else around.end())
        return len(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """Where a request goes."""

    environment_id: str
    host: str
    is_secure: bool
    """Over TLS, with the host verified."""
    rule: Rule


class Secrets:
    """The values that one request was given."""

    def __init__(self) -> None:
        self._shown_as: dict[bytes, bytes] = {}
        self._words: set[bytes] = set()
        self.size = 0
        """Bytes that are remembered."""

    def add(self, value: str, shown_as: bytes = _REDACTED, *, may_be_words: bool = False) -> None:
        """Remember a value.

        Args:
            value: As it is.
            shown_as: What a response shows in its place.
            may_be_words: Whether words alone (`identity`, `content-type`) may be in the names of a
                response's fields.
        """
        plain = value.encode()
        if len(plain) < _MIN_SECRET:
            return
        for spelling in (plain, quote(value, safe="").encode(), base64.b64encode(plain)):
            if len(spelling) <= MAX_HEAD and spelling not in self._shown_as:
                self._shown_as[spelling] = shown_as
                self.size += len(spelling)
            if may_be_words and _WORDS.fullmatch(spelling):
                self._words.add(spelling)
            else:
                self._words.discard(spelling)

    def redacted(self, fields: Fields) -> Fields:
        """A response's fields without these values.

        Raises:
            BadMessage: The name of one has such a value.
        """
        if not self._shown_as:
            return fields
        for name in (name.lower() for name, _ in fields):
            short = (each for each in self._shown_as if len(each) <= len(name))
            if any(each.lower() in name for each in short if each not in self._words):
                raise BadMessage("the name of a header field repeats a secret of the request")
        return [
            (name, self.hidden(value, is_steering=name.lower() in _STEERING))
            for name, value in fields
        ]

    def hidden(self, text: bytes, *, is_steering: bool = False) -> bytes:
        """A text of a response's head without these values.

        Args:
            text: Any.
            is_steering: Whether it says how the body is to be read; what every answer may say of
                that is no secret.
        """
        for secret, shown_as in self._shown_as.items():
            if secret in text and not (is_steering and _PUBLIC.fullmatch(secret)):
                text = text.replace(secret, shown_as)
        return text


class Room:
    """What all requests of an environment that are on their way hold of credentials' values."""

    def __init__(self, most: int = _MOST_HELD) -> None:
        self.left = most


class Injector:
    """Gives one request what its rule and the environment's variables say."""

    def __init__(
        self, vault: Vault, variables: Variables, hop: Hop, room: Room | None = None
    ) -> None:
        """Nothing is given yet. To be closed.

        Args:
            vault: Has the credentials.
            variables: Of the environment.
            hop: Where the request goes.
            room: Shared by the environment's requests.
        """
        self._vault = vault
        self._variables = variables
        self.hop = hop
        self._room = room or Room()
        self._held = 0
        self._known: dict[str, Injection] = {}
        self._spelled: dict[tuple[bytes, Location, _Spelling], bytes] = {}
        self._in_head = 0
        self._growth = 0
        self.secrets = Secrets()
        self._used: dict[str, None] = {}

    @property
    def credential(self) -> str | None:
        """The ids of the credentials that the request got, in their order."""
        return ", ".join(self._used) or None

    async def apply(self, request: Request, fields: Fields) -> tuple[bytes, Fields]:
        """The target and fields that go out.

        Args:
            request: As it came.
            fields: Those of its fields that are to go out.

        Raises:
            Blocked: A placeholder is where it may not be, or a credential cannot be used.
        """
        target = request.target
        if self._variables:
            target = await self._target(request.target)
            fields = [await self._field(name, value) for name, value in fields]
        rule = self.hop.rule
        if rule.adds and not self.hop.is_secure:
            raise Blocked(
                f"the rule for {rule.domain} adds a credential or headers to requests, which is "
                "done over https only; use https://."
            )
        added: dict[bytes, tuple[bytes, bytes]] = {}
        if rule.credential is not None:
            name, value = await self._bearer(rule.credential)
            added[name.lower().encode()] = (name.encode(), value.encode())
        for name, value in rule.transform:
            self._remember(value)
            self._hold()
            added[name.lower().encode()] = (name.encode(), value.encode())
        kept = [each for each in fields if each[0].lower() not in added]
        return target, [*kept, *added.values()]

    async def _bearer(self, credential_id: str) -> tuple[str, str]:
        found = await self._credential(credential_id)
        if found.kind != "bearer":
            raise Blocked(
                f"the credential '{credential_id}' is an environment variable's, which a network "
                "rule cannot add; give it to the environment as a variable (env)."
            )
        value = f"{found.prefix} {found.token}" if found.prefix else found.token
        if not is_header_value(value) or not is_header_name(found.header_name):
            raise Blocked(f"the credential '{credential_id}' cannot be put into a header.")
        self._used[credential_id] = None
        self.secrets.add(found.token)
        self._hold()
        return found.header_name, value

    def _remember(self, value: str) -> None:
        """Of `Bearer abc`, also `abc` is a secret."""
        self.secrets.add(value, may_be_words=True)
        _, space, rest = value.partition(" ")
        if space:
            self.secrets.add(rest.strip(), may_be_words=True)

    async def _target(self, target: bytes) -> bytes:
        path, mark, query = target.partition(b"?")
        for found in self._variables.find(path):
            raise self._misplaced(found[0], "the path of a URL")
        return path + mark + await self._swapped(query, "query", _for_query)

    async def _field(self, name: bytes, value: bytes) -> tuple[bytes, bytes]:
        for found in self._variables.find(name):
            raise self._misplaced(found[0], "the name of a header")
        scheme, space, rest = value.partition(b" ")
        if space and scheme.lower() == b"basic" and name.lower() == b"authorization":
            return name, await self._basic(value, rest)
        return name, await self._swapped(value, "header", _for_header)

    async def _basic(self, value: bytes, encoded: bytes) -> bytes:
        """Name and password hide in base64."""
        try:
            pair = base64.b64decode(encoded.strip(), validate=True)
        except binascii.Error:
            return await self._swapped(value, "header", _for_header)
        swapped = await self._swapped(pair, "header", _as_it_is)
        if swapped == pair:
            return value
        result = base64.b64encode(swapped)
        self.secrets.add(result.decode())
        self._hold()
        return b"Basic " + result

    async def _swapped(self, text: bytes, location: Location, spell: "_Spelling") -> bytes:
        """A text with values for its placeholders."""
        parts: list[bytes] = []
        at = 0
        for number, found in enumerate(self._variables.find(text), start=1):
            mark = found[0]
            value = self._spelled.get((mark, location, spell))
            if value is None:
                value = spell(await self._value(mark, location)).encode()
                self._spelled[mark, location, spell] = value
            self._bound(location, len(value) - len(mark))
            parts += [text[at : found.start()], value]
            at = found.end()
            if number % _PAUSE == 0:
                # A body can have tens of thousands; others want to run, too.
                await asyncio.sleep(0)
        return b"".join([*parts, text[at:]])

    def _bound(self, location: Location, growth: int) -> None:
        """What a request may become is bounded: all of it is held here."""
        self._in_head += location != "body"
        self._growth += max(0, growth)
        if self._in_head > _MOST_IN_HEAD:
            raise Blocked(
                f"a request can have at most {_MOST_IN_HEAD} placeholders of credentials in its "
                "URL and headers."
            )
        if self._growth > _MOST_GROWTH:
            raise Blocked(
                "the values of credentials would make the request longer by more than "
                f"{_MOST_GROWTH} bytes; send fewer placeholders."
            )
        self._hold()

    def _hold(self) -> None:
        """Take room for what came to be."""
        more = self._growth + self.secrets.size - self._held
        if more > self._room.left:
            raise Blocked(
                "this environment's requests that are on their way hold too many values of "
                "credentials; wait for their answers."
            )
        self._room.left -= more
        self._held += more

    def close(self) -> None:
        """Give the room back."""
        self._room.left += self._held
        self._held = 0

    async def _value(self, mark: bytes, location: Location) -> str:
        """A placeholder's value, if it may be here."""
        credential_id = self._variables.ids[mark]
        if not self.hop.is_secure:
            raise self._misplaced(mark, "a request without TLS; use https://")
        found = await self._credential(credential_id)
        if found.kind != "placeholder":
            raise Blocked(f"the credential '{credential_id}' is not an environment variable's.")
        if not matches(found.trusted_domains, self.hop.host):
            raise Blocked(
                f"the credential '{credential_id}' must not be sent to {self.hop.host}; its owner "
                "can change its trusted_domains."
            )
        if location not in found.locations:
            allowed = ", ".join(sorted(found.locations))
            raise Blocked(
                f"the credential '{credential_id}' must not be sent in the {location} of a "
                f"request, only in: {allowed}; its owner can change its injection_location."
            )
        self._used[credential_id] = None
        self.secrets.add(found.value, mark)
        self._hold()
        return found.value

    def _misplaced(self, mark: bytes, where: str) -> Blocked:
        return Blocked(f"the credential '{self._variables.ids[mark]}' must not be sent in {where}.")

    async def _credential(self, credential_id: str) -> Injection:
        found = self._known.get(credential_id)
        if found is None:
            try:
                found = await self._vault.credential(self.hop.environment_id, credential_id)
            except AppError as error:
                raise Blocked(
                    f"the credential '{credential_id}' cannot be used now: {error.message}"
                ) from error
        if found is None:
            raise Blocked(
                f"the credential '{credential_id}' does not exist any more, or is revoked; its "
                "owner can give it again."
            )
        self._known[credential_id] = found
        return found

    async def may_swap_in_body(self) -> bool:
        """Whether a body may get a value, and so another length."""
        if not self.hop.is_secure:
            return False
        for credential_id in self._variables.ids.values():
            try:
                found = await self._credential(credential_id)
            except Blocked:
                continue
            if (
                found.kind == "placeholder"
                and "body" in found.locations
                and matches(found.trusted_domains, self.hop.host)
            ):
                return True
        return False

    def body(self, content_type: bytes) -> "BodySwap | None":
        """What a body has to go through; None where there is nothing to look for."""
        return BodySwap(self._swap_body, self._variables, content_type) if self._variables else None

    async def _swap_body(self, text: bytes, spell: "_Spelling") -> bytes:
        return await self._swapped(text, "body", spell)


class _Spelling(Protocol):
    def __call__(self, value: str, /) -> str: ...


class _Swap(Protocol):
    async def __call__(self, text: bytes, spell: _Spelling, /) -> bytes: ...


class BodySwap:
    """Swaps placeholders in a body that comes in pieces, also across their edges."""

    def __init__(self, swap: _Swap, variables: Variables, content_type: bytes) -> None:
        self._swap = swap
        self._variables = variables
        self._spell = _for_content(content_type.partition(b";")[0].strip().lower())
        self._held = b""

    async def feed(self, piece: bytes, *, is_last: bool = False) -> bytes:
        """What can be sent after another piece; all that is left, after the last.

        Raises:
            Blocked: A placeholder may not be sent in this body.
        """
        text = self._held + piece
        cut = len(text) if is_last else self._variables.undecided(text)
        self._held = text[cut:]
        return await self._swap(text[:cut], self._spell)


def _for_header(value: str) -> str:
    if not is_header_value(value):
        raise Blocked("a credential's value has characters that a header cannot have.")
    return value


def _for_query(value: str) -> str:
    return quote(value, safe="")


def _as_it_is(value: str) -> str:
    return value


def _for_json(value: str) -> str:
    return json.dumps(value)[1:-1]


def _for_content(mime_type: bytes) -> _Spelling:
    """How a value is written in a body of this type."""
    if mime_type == b"application/x-www-form-urlencoded":
        return quote_plus
    if mime_type == b"application/json" or mime_type.endswith(b"+json"):
        return _for_json
    return _as_it_is
