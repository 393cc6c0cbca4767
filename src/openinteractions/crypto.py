"""Secrets at rest, and signatures: the one place that touches cryptographic primitives."""

import base64
import contextlib
import hashlib
import hmac
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from openinteractions.errors import SetupError

_KEY_BYTES = 32
_NONCE_BYTES = 12
_RSA_BITS = 2048
_FILE = "master.key"

FOLLOWED_S = 1.0
"""A process seals with a key that was replaced in its file for no longer than this."""


class Sealer:
    """Encrypts values for storage: AES-256-GCM, bound to what they are for.

    A sealed value is a nonce and a ciphertext. `purpose` is authenticated, so that a value that was
    moved to another row or column does not open. Values are sealed with the current key, and open
    with older ones too, so that the key can be changed while processes run.
    """

    def __init__(
        self,
        key: bytes,
        old: Sequence[bytes] = (),
        *,
        reread: Callable[[], Sequence[bytes]] | None = None,
    ) -> None:
        """A sealer with these keys.

        Args:
            key: Seals; 32 bytes.
            old: Open what was sealed before.
            reread: Gives the keys as they are now, the current one first.
        """
        self._reread = reread
        self._looked = time.monotonic()
        self._take((key, *old))

    def seal(self, plain: bytes, *, purpose: str) -> bytes:
        """Encrypt with the current key."""
        self._follow()
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._ciphers[0].encrypt(nonce, plain, purpose.encode())

    def open(self, sealed: bytes, *, purpose: str) -> bytes:
        """Decrypt.

        Raises:
            SetupError: It was sealed with a key that is not known, or for something else.
        """
        plain = self._opened(self._ciphers, sealed, purpose)
        if plain is None and self._look():
            plain = self._opened(self._ciphers, sealed, purpose)
        if plain is None:
            raise SetupError(
                "a stored secret does not open: OI_MASTER_KEY (or master.key in the data folder) "
                "is not the one that it was sealed with, and OI_OLD_MASTER_KEYS does not have it"
            )
        return plain

    def resealed(self, sealed: bytes, *, purpose: str) -> bytes | None:
        """The same value under the current key; None if it is already.

        Raises:
            SetupError: As in `open`.
        """
        if self._opened(self._ciphers[:1], sealed, purpose) is not None:
            return None
        return self.seal(self.open(sealed, purpose=purpose), purpose=purpose)

    def broker_token(self) -> str:
        """What clients of the sandbox broker show it."""
        self._follow()
        return broker_token(self._keys[0])

    def is_broker_token(self, text: str) -> bool:
        """Whether a client that shows this has one of the keys."""
        self._follow()
        shown, found = text.encode(), False
        for key in self._keys:
            found |= hmac.compare_digest(broker_token(key).encode(), shown)
        return found

    def _follow(self) -> None:
        if time.monotonic() - self._looked > FOLLOWED_S:
            self._look()

    def _take(self, keys: Sequence[bytes]) -> None:
        self._keys = tuple(keys)
        self._ciphers = [AESGCM(key) for key in self._keys]

    def _look(self) -> bool:
        """Look for other keys; whether there are."""
        self._looked = time.monotonic()
        keys = self._keys if self._reread is None else tuple(self._reread())
        if keys == self._keys:
            return False
        self._take(keys)
        return True

    @staticmethod
    def _opened(ciphers: Sequence[AESGCM], sealed: bytes, purpose: str) -> bytes | None:
        nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        for cipher in ciphers:
            # Shorter than any sealed value: it has no room for a nonce and a tag.
            with contextlib.suppress(InvalidTag, ValueError):
                return cipher.decrypt(nonce, rest, purpose.encode())
        return None


def sealer(configured: str | None, old: Sequence[str], home: Path) -> Sealer:
    """The sealer of a process: with the configured keys, or with those of the data folder's file.

    The file is followed: a key that is changed beside a running process is used from then on.

    Args:
        configured: OI_MASTER_KEY; None means the file.
        old: OI_OLD_MASTER_KEYS.
        home: The data folder.

    Raises:
        SetupError: A key is not 32 bytes of base64.
    """
    others = [_decoded(text, "a key of OI_OLD_MASTER_KEYS") for text in old]
    key = master_key(configured, home)
    if configured:
        return Sealer(key, others)
    path = home / _FILE
    known = _read(path)

    def reread() -> Sequence[bytes]:
        nonlocal known
        # What is known stays good where the file is away, or about to be replaced.
        with contextlib.suppress(OSError, SetupError):
            known = _read(path)
        return (*known, *others)

    return Sealer(known[0], (*known[1:], *others), reread=reread)


def master_key(configured: str | None, home: Path) -> bytes:
    """The key that seals secrets: the configured one, or a file in the data folder, made if absent.

    Raises:
        SetupError: The configured key, or the file, is not 32 bytes of base64.
    """
    if configured:
        return _decoded(configured, "OI_MASTER_KEY")
    path = home / _FILE
    home.mkdir(parents=True, exist_ok=True)
    # Written aside and then linked: of several processes that start at once one makes the key, and
    # none reads half of it.
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=home, prefix=_FILE) as file:
            _write(file, [os.urandom(_KEY_BYTES)])
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
    return _read(path)[0]


def add_master_key(home: Path, new: str | None) -> bytes:
    """Make a new key the current one of the data folder's file; those before it stay, and open.

    Where the file has several keys already, a change was begun and not ended: without `new`, the
    one that it was begun with is gone on with.

    Args:
        home: The data folder.
        new: The new key in base64; None means a fresh one.

    Returns:
        The current key.

    Raises:
        SetupError: `new`, or the file, is not 32 bytes of base64.
    """
    master_key(None, home)
    known = _read(home / _FILE)
    if new is None and len(known) > 1:
        return known[0]
    key = os.urandom(_KEY_BYTES) if new is None else _decoded(new, "the new key")
    _replace(home / _FILE, [key, *(one for one in known if one != key)])
    return key


def drop_old_master_keys(home: Path, key: bytes) -> int:
    """Leave only the current key in the data folder's file; how many others there were.

    Raises:
        SetupError: `key` is not the current one any more: somebody else changes it too.
    """
    known = _read(home / _FILE)
    if known[0] != key:
        raise SetupError(f"{home / _FILE} was changed meanwhile: run the command again")
    if len(known) > 1:
        _replace(home / _FILE, [key])
    return len(known) - 1


def _read(path: Path) -> list[bytes]:
    """The keys of a file, one a line, the current one first."""
    return [_decoded(line, str(path)) for line in path.read_text("ascii").split()] or [
        _decoded("", str(path))
    ]


def _replace(path: Path, keys: Sequence[bytes]) -> None:
    before = path.stat()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_FILE, delete=False) as file:
        try:
            _write(file, keys)
            if os.geteuid() == 0:
                # The server may run as somebody else, who has to be able to read it.
                os.chown(file.name, before.st_uid, before.st_gid)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(file: IO[bytes], keys: Sequence[bytes]) -> None:
    file.write(b"".join(base64.b64encode(key) + b"\n" for key in keys))
    file.flush()
    os.fsync(file.fileno())


def broker_token(key: bytes) -> str:
    """What the sandbox broker's clients show it: whoever has the master key can make it.

    Args:
        key: The master key.
    """
    return hmac.new(key, b"openinteractions broker v1", hashlib.sha256).hexdigest()


def _decoded(text: str, source: str) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise SetupError(
            f"{source} is not 32 bytes in base64: make one with `openssl rand -base64 32`"
        )
    return key


class TokenSigner:
    """Signs JSON Web Tokens with RS256 (RFC 7515, RFC 7519)."""

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self._key = key
        self.kid = hashlib.sha256(self._public_der()).hexdigest()[:16]
        """Names the key in a token's header and in the key set."""

    @classmethod
    def generate(cls) -> "TokenSigner":
        """A signer with a fresh key."""
        return cls(rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS))

    @classmethod
    def load(cls, der: bytes) -> "TokenSigner":
        """A signer from `dump`'s bytes."""
        key = serialization.load_der_private_key(der, None)
        assert isinstance(key, rsa.RSAPrivateKey)
        return cls(key)

    def dump(self) -> bytes:
        """The private key (PKCS #8, DER); seal it before it is stored."""
        return self._key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def sign(self, claims: dict[str, Any]) -> str:
        """A token with these claims."""
        header = _part({"alg": "RS256", "kid": self.kid, "typ": "JWT"})
        message = f"{header}.{_part(claims)}"
        signature = self._key.sign(message.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{message}.{_base64url(signature)}"

    def jwk(self) -> dict[str, str]:
        """The public key, as an entry of a JSON Web Key Set."""
        numbers = self._key.public_key().public_numbers()
        return {
            "kty": "RSA",
            "alg": "RS256",
            "use": "sig",
            "kid": self.kid,
            "n": _base64url(numbers.n.to_bytes(_RSA_BITS // 8, "big")),
            "e": _base64url(numbers.e.to_bytes(3, "big")),
        }

    def _public_der(self) -> bytes:
        return self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )


def _part(value: dict[str, Any]) -> str:
    return _base64url(orjson.dumps(value))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
