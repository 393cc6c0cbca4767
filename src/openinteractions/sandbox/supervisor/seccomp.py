"""A system call filter that the supervisor puts on itself, and thereby on everything it starts.

It needs no privilege, and closes what container engines leave open: io_uring, rare socket
families, namespaces, mounts, keyrings, BPF, perf, userfaultfd, foreign instruction sets.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _ARCH, _ARGUMENT = 0, 4, 16
_X32 = 0x40000000
_NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWTIME, -NS, -CGROUP, -UTS, -IPC, -USER, -PID, -NET."""
_FAMILIES = (0, 1, 2, 10, 16)
"""Unspecified, unix, IPv4, IPv6, netlink: what programs need. Not vsock, alg, packet and so on."""

_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COMMON = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "mount_setattr": 442,
}
_DENIED: dict[str, dict[str, int]] = {
    "x86_64": {
        "unshare": 272,
        "setns": 308,
        "mount": 165,
        "umount2": 166,
        "pivot_root": 155,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "bpf": 321,
        "perf_event_open": 298,
        "userfaultfd": 323,
        "kexec_load": 246,
        "kexec_file_load": 320,
        "init_module": 175,
        "finit_module": 313,
        **_COMMON,
    },
    "aarch64": {
        "unshare": 97,
        "setns": 268,
        "mount": 40,
        "umount2": 39,
        "pivot_root": 41,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "bpf": 280,
        "perf_event_open": 241,
        "userfaultfd": 282,
        "kexec_load": 104,
        "kexec_file_load": 294,
        "init_module": 105,
        "finit_module": 273,
        **_COMMON,
    },
}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_CLONE = {"x86_64": 56, "aarch64": 220}
_ABSENT = (425, 426, 427, 435)
"""io_uring; clone3, whose flags a filter cannot see: programs do without where it is absent."""

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_MODE_FILTER = 2

Instruction = tuple[int, int, int, int]


def program(machine: str) -> list[Instruction]:
    """The filter for one processor family."""
    absent, denied = _ERRNO | errno.ENOSYS, _ERRNO | errno.EPERM
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT[machine]),
        (_RETURN, 0, 0, absent),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        code += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, absent)]
    for number in _ABSENT:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, absent)]
    for number in _DENIED[machine].values():
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, denied)]
    code += [
        (_EQUAL, 0, 4, _CLONE[machine]),
        (_LOAD, 0, 0, _ARGUMENT),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, denied),
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 0, 2 + len(_FAMILIES), _SOCKET[machine]),
        (_LOAD, 0, 0, _ARGUMENT),
    ]
    # Each match jumps over the rest of the families and the refusal.
    code += [(_EQUAL, len(_FAMILIES) - i, 0, family) for i, family in enumerate(_FAMILIES)]
    return [*code, (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT), (_RETURN, 0, 0, _ALLOW)]


def install() -> str:
    """Install the filter; say `installed`, or why it could not be.

    Also makes this process one that its own user's other processes cannot look into.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    machine = platform.machine()
    if machine not in _AUDIT:
        return f"not known for {machine}"
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return f"no_new_privs: {os.strerror(ctypes.get_errno())}"
    code = program(machine)
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    filters = struct.pack("HxxxxxxP", len(code), ctypes.addressof(packed))
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.create_string_buffer(filters)):
        return f"refused: {os.strerror(ctypes.get_errno())}"
    return "installed"
