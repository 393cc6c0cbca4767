"""Looks for another sandbox from the inside: its files, processes, sockets, memory. Prints JSON."""

import ctypes
import glob
import json
import os
import socket
import sys

SECRET = sys.argv[1][::-1].encode()
OTHER = sys.argv[2]
libc = ctypes.CDLL(None, use_errno=True)
found = []


def holds(path):
    try:
        with open(path, "rb") as file:
            return SECRET in file.read(1 << 20)
    except OSError:
        return False


def connects(family, address):
    with socket.socket(family) as one:
        one.settimeout(1)
        return one.connect_ex(address) == 0


for folder in (
    "/workspace", "/.agents", "/home", "/tmp", "/run", "/var", "/mnt", "/media", "/srv", "/root",
    "/dev/shm",
):  # fmt: skip
    for root, _, names in os.walk(folder, followlinks=False):
        found += [path for path in (os.path.join(root, each) for each in names) if holds(path)]
for path in glob.glob("/proc/[0-9]*/root/workspace/*") + glob.glob("/proc/[0-9]*/cwd/*"):
    if holds(path):
        found.append(path)
for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
    if str(os.getpid()) not in path and "self" not in path and holds(path):
        found.append(path)
for climb in range(1, 12):
    for name in (f"environments/{OTHER}/root/workspace/secret", f"{OTHER}/root/workspace/secret"):
        if holds("/workspace/" + "../" * climb + name):
            found.append(name)
for name in ("/dev/loop*", "/dev/sd*", "/dev/vd*", "/dev/dm-*", "/dev/block/*"):
    found += glob.glob(name)
if connects(socket.AF_UNIX, "\0neighbour"):
    found.append("an abstract socket")
if connects(socket.AF_INET, ("127.0.0.1", 5555)):
    found.append("a port")
if libc.shmget(0x5EC4E7, 0, 0) >= 0:
    found.append("shared memory")
if libc.msgget(0x5EC4E7, 0) >= 0:
    found.append("a message queue")
print(json.dumps(found))
