"""Secrets at rest, and signatures: the one place that touches cryptographic primitives."""

import base64
import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

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


class Sealer:
    """Encrypts values for storage: AES-256-GCM, bound to what they are for.

    A sealed value is a nonce and a ciphertext. `purpose` is authenticated, so that a value that was
    moved to another row or column does not open.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal(self, plain: bytes, *, purpose: str) -> bytes:
        """Encrypt."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, purpose.encode())

    def open(self, sealed: bytes, *, purpose: str) -> bytes:
        """Decrypt.

        Raises:
            SetupError: It was sealed with another master key, or for something else.
        """
        try:
            return self._cipher.decrypt(
                sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], purpose.encode()
            )
        except InvalidTag:
            raise SetupError(
                "a stored secret does not open: OI_MASTER_KEY (or master.key in the data folder) "
                "is not the one that it was sealed with"
            ) from None


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
            file.write(base64.b64encode(os.urandom(_KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
    return _decoded(path.read_text("ascii").strip(), str(path))


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
