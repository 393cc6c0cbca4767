"""Looks for texts in all that can be read; they come backwards, so as not to be found in here."""

import json
import os
import sys

NEEDLES = [each[::-1].encode() for each in sys.argv[1:]]
# The image's own programs, made before there was any secret.
SKIPPED = {"/proc", "/sys", "/usr", "/lib", "/lib64", "/bin", "/sbin", "/dev"}
LIMIT = 64 << 20


def look(path):
    try:
        with open(path, "rb") as file:
            rest = b""
            for _ in range(LIMIT >> 20):
                piece = file.read(1 << 20)
                if not piece:
                    return
                for number, needle in enumerate(NEEDLES):
                    if needle in rest + piece:
                        FOUND.append([path, number])
                        return
                rest = piece[-256:]
    except OSError:
        return


FOUND = []
COUNT = 0
for root, folders, names in os.walk("/"):
    folders[:] = [each for each in folders if os.path.join(root, each) not in SKIPPED]
    for name in names:
        path = os.path.join(root, name)
        if os.path.isfile(path):
            COUNT += 1
            look(path)
for pid in (each for each in os.listdir("/proc") if each.isdigit()):
    for name in ("environ", "cmdline", "mountinfo", "maps", "cgroup", "mem", "auxv"):
        if (pid, name) != (str(os.getpid()), "mem"):
            look(f"/proc/{pid}/{name}")
for root, _, names in os.walk("/dev/shm"):
    for name in names:
        look(os.path.join(root, name))
for path in ("/proc/cmdline", "/proc/mounts", "/proc/keys", "/proc/kallsyms", "/proc/version"):
    look(path)
print(json.dumps({"found": FOUND, "files": COUNT}))
