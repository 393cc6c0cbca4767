"""What the tree tells of a file: its `Entry`, and its MIME type.

A link that leads to a file or folder of the tree is told as that file or folder; one that leads
nowhere, out of the environment or in circles is told as a `symlink`. Pipes, sockets and devices do
not exist here: they are neither listed nor found.
"""

import errno
import functools
import mimetypes
import os
import stat
from dataclasses import dataclass, replace
from typing import Final

from openinteractions.sandbox.files import kernel
from openinteractions.sandbox.files.beneath import closing, locate, reopen
from openinteractions.sandbox.files.paths import Parts, shown
from openinteractions.sandbox.port import Entry

_SNIFF_BYTES: Final = 1024
_UNKNOWN: Final = "application/octet-stream"
_TEXT: Final = "text/plain"
_PRINTABLE_CONTROLS: Final = b"\t\n\r\f\b\x1b"
_UTF8_TAIL: Final = 3
"""Bytes of a character that the end of the sniffed piece may have cut off."""
_ARCHIVED: Final = {
    "gzip": "application/gzip",
    "bzip2": "application/x-bzip2",
    "xz": "application/x-xz",
    "compress": "application/x-compress",
    "br": "application/x-brotli",
}
_MORE: Final = {
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".gz": "application/gzip",
    ".ipynb": "application/x-ipynb+json",
    ".jsonl": "application/x-ndjson",
    ".log": _TEXT,
    ".md": "text/markdown",
    ".parquet": "application/vnd.apache.parquet",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ".rst": "text/x-rst",
    ".toml": "application/toml",
    ".ts": "text/x-typescript",
    ".webp": "image/webp",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ".xz": "application/x-xz",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
    ".zst": "application/zstd",
}
# The host's own tables stay out: the same file has the same type on every machine.
_types = mimetypes.MimeTypes(filenames=())
for _ending, _kind in _MORE.items():
    _types.add_type(_kind, _ending)


@dataclass(frozen=True, slots=True)
class Found:
    """An open reference to what a path names, links followed where they lead somewhere."""

    fd: int
    """The holder closes it."""
    status: kernel.Stat

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.status.mode)

    @property
    def is_folder(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.status.mode)


def find(root: int, parts: Parts) -> Found:
    """What a path names: a file, a folder, or a link that leads to neither.

    Raises:
        FileNotFoundError: It names nothing, or a pipe, socket or device.
        OSError: A link before the path's end leads out of the environment.
    """
    try:
        fd = locate(root, parts)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.EXDEV, errno.ELOOP}:
            raise
        fd = _locate_itself(root, parts)
    try:
        status = kernel.stat(fd)
        if _is_told(status.mode):
            return Found(fd, status)
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    raise FileNotFoundError(errno.ENOENT, "no file, folder or link")


def _locate_itself(root: int, parts: Parts) -> int:
    try:
        return locate(root, parts, follow=False)
    except NotADirectoryError:
        raise FileNotFoundError(errno.ENOENT, "a file has nothing below it") from None


def _is_told(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)


def entry_at(root: int, parts: Parts) -> Entry:
    """The entry of a path; raises as `find` does."""
    found = find(root, parts)
    with closing(found.fd):
        entry = entry_of(found, parts)
    link = _link_at(root, parts)
    return entry if link is None else replace(entry, link=link)


def _link_at(root: int, parts: Parts) -> str | None:
    """What a link says; None where a path names none."""
    try:
        with closing(locate(root, parts, follow=False)) as fd:
            if stat.S_ISLNK(kernel.stat(fd).mode):
                return os.readlink(b"", dir_fd=fd).decode(errors="replace")
    except OSError:
        # It has changed since.
        pass
    return None


def entry_of(found: Found, parts: Parts) -> Entry:
    """The entry of what was found at a path."""
    head = _head(found) if found.is_file and needs_sniffing(parts) else b""
    return described(parts, found.status, head)


def entry_in(root: int, folder: int, parts: Parts) -> Entry | None:
    """The entry of a folder's child, for listings; None if it is gone, or no file."""
    status = _lstat(folder, parts[-1])
    if status is None or not _is_told(status.mode):
        return None
    is_plain = stat.S_ISDIR(status.mode) or not needs_sniffing(parts)
    if is_plain and not stat.S_ISLNK(status.mode):
        return described(parts, status, b"")
    try:
        return entry_at(root, parts)
    except OSError:
        return None


def _lstat(folder: int, name: bytes) -> kernel.Stat | None:
    try:
        return kernel.stat(folder, name)
    except FileNotFoundError:
        return None


def described(parts: Parts, status: kernel.Stat, head: bytes) -> Entry:
    """The entry of a file with this status that begins with these bytes."""
    is_file = stat.S_ISREG(status.mode)
    is_folder = stat.S_ISDIR(status.mode)
    return Entry(
        path=shown(parts),
        type="file" if is_file else "directory" if is_folder else "symlink",
        size_bytes=0 if is_folder else status.size,
        mime_type=mime_type(parts, head) if is_file else None,
        created=status.created,
        modified=status.modified,
    )


def _head(found: Found) -> bytes:
    try:
        with closing(reopen(found.fd, os.O_RDONLY)) as fd:
            return os.pread(fd, _SNIFF_BYTES, 0)
    except OSError:
        return b"\0"


def needs_sniffing(parts: Parts) -> bool:
    """Whether the name alone does not tell the type."""
    return _by_name(parts) is None


def mime_type(parts: Parts, head: bytes) -> str:
    """The type of a file by its name, else by how it begins."""
    kind = _by_name(parts)
    if kind is None:
        kind = _TEXT if _looks_like_text(head) else _UNKNOWN
    return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind


def _by_name(parts: Parts) -> str | None:
    _, *endings = parts[-1].lstrip(b".").rsplit(b".", 2)
    return _by_endings(b".".join(endings))


@functools.lru_cache(maxsize=1024)
def _by_endings(endings: bytes) -> str | None:
    """The type for `tar.gz`, `txt` and so on."""
    # A full URL would be taken apart at its colon; this is a name.
    name = "x." + endings.decode(errors="replace").replace(":", "_")
    kind, packed = _types.guess_type(name)
    return _ARCHIVED.get(packed, _UNKNOWN) if packed else kind


def _looks_like_text(head: bytes) -> bool:
    head = head[:_SNIFF_BYTES]
    if any(byte < ord(" ") and byte not in _PRINTABLE_CONTROLS for byte in head):
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return len(head) == _SNIFF_BYTES and error.start >= _SNIFF_BYTES - _UTF8_TAIL
    return True
