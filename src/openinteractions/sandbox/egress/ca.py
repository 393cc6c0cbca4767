"""The installation's own certificate authority, which sandboxes trust and nobody else."""

import asyncio
import os
import ssl
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from openinteractions import clock
from openinteractions.sandbox.egress import hosts

_FILE = "egress-ca.pem"
_LIFE = timedelta(days=3650)
_RENEW_BEFORE = timedelta(days=30)
_LEAF_LIFE = timedelta(days=2)
_LEAF_USE = timedelta(days=1)
_SKEW = timedelta(hours=1)
_MAX_LEAVES = 1024
_ROOTS = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
    "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


class Authority:
    """Issues a certificate for each host whose TLS is opened."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        # One key for all leaves: it never leaves this process, and signing is all that is left.
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._contexts: OrderedDict[str, tuple[float, ssl.SSLContext]] = OrderedDict()
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)
        """Its certificate, to be trusted in sandboxes."""

    async def context(self, host: str) -> ssl.SSLContext:
        """What a server of this host would have; kept for a day."""
        now = clock.now().timestamp()
        kept = self._contexts.get(host)
        if kept is not None and kept[0] > now:
            self._contexts.move_to_end(host)
            return kept[1]
        context = await asyncio.to_thread(self._make, host)
        self._contexts[host] = (now + _LEAF_USE.total_seconds(), context)
        while len(self._contexts) > _MAX_LEAVES:
            self._contexts.popitem(last=False)
        return context

    def bundle(self, paths: Sequence[Path] | None = None) -> bytes:
        """Root certificates and this one, for `/etc/ssl/certs/ca-certificates.crt` in sandboxes.

        Args:
            paths: Files of roots; all are taken. The system's, if left out.
        """
        if paths is None:
            system = [ssl.get_default_verify_paths().cafile, *_ROOTS]
            paths = [Path(each) for each in system if each and Path(each).is_file()][:1]
        parts = [path.read_bytes().rstrip(b"\n") + b"\n" for path in paths]
        return b"".join([*parts, self.pem])

    def _make(self, host: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        leaf = self._leaf(host).public_bytes(serialization.Encoding.PEM)
        # Browsers that pin the authority's key want to see it in the chain.
        _load(context, _key_pem(self._leaf_key) + leaf + self.pem)
        return context

    def _leaf(self, host: str) -> x509.Certificate:
        literal = hosts.address(host)
        name = x509.DNSName(host) if literal is None else x509.IPAddress(literal)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            _builder(self._leaf_key.public_key(), "Sandbox egress", self._certificate.subject)
            .not_valid_after(clock.now() + _LEAF_LIFE)
            .add_extension(x509.SubjectAlternativeName([name]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage("digital_signature"), critical=True)
            .add_extension(usage, critical=False)
            .add_extension(issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def load_or_make(folder: Path) -> Authority:
    """The authority kept in a folder; a new one where there is none, or it ends soon.

    Several processes may do this at once: all get the same one.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / _FILE
    kept = _read(path)
    if kept is not None:
        return kept
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".egress-ca-") as file:
        key = ec.generate_private_key(ec.SECP256R1())
        file.write(_key_pem(key) + _authority(key).public_bytes(serialization.Encoding.PEM))
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(file.name, path)
        except FileExistsError:
            kept = _read(path)
    kept = kept or _read(path)
    assert kept is not None
    return kept


def _read(path: Path) -> Authority | None:
    """What is in the file. One that ends soon is put aside, and is then not there."""
    try:
        pem = path.read_bytes()
    except FileNotFoundError:
        return None
    key = serialization.load_pem_private_key(pem, None)
    certificate = x509.load_pem_x509_certificate(pem)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    if certificate.not_valid_after_utc - clock.now() < _RENEW_BEFORE:
        path.unlink(missing_ok=True)
        return None
    return Authority(key, certificate)


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "OpenInteractions sandbox egress")])
    return (
        _builder(key.public_key(), "OpenInteractions sandbox egress", name)
        .not_valid_after(clock.now() + _LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign", "digital_signature"), critical=True)
        .sign(key, hashes.SHA256())
    )


def _builder(
    key: ec.EllipticCurvePublicKey, common_name: str, issuer: x509.Name
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(clock.now() - _SKEW)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*granted: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in granted for usage in _USAGES})


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    """Give a context its key and chain; `ssl` reads them only from files."""
    with tempfile.NamedTemporaryFile(prefix="egress-", dir=_memory()) as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)


def _memory() -> str | None:
    """A folder that is no disk, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - files there are 0600
