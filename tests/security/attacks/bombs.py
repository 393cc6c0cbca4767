"""Uses up one thing of the machine, as much as it gets; the first argument says which."""

import contextlib
import ctypes
import mmap
import os
import resource
import signal
import socket
import sys
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
STAY_S = 600


def say(*words):
    print(*words, flush=True)


def forks():
    """Every process forks, for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    say("begun")
    while True:
        with contextlib.suppress(OSError):
            os.fork()


def hidden_forks():
    """The same by those who have taken off every mark, left the session and lost the parent."""
    resource.setrlimit(resource.RLIMIT_RTTIME, (1 << 40, -1))
    if os.fork():
        os._exit(0)
    os.setsid()
    again = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    os.execve(sys.executable, [sys.executable, "-c", again], {})


def threads():
    say("begun")
    count = 0
    with contextlib.suppress(RuntimeError):
        while True:
            threading.Thread(target=time.sleep, args=(STAY_S,), daemon=True).start()
            count += 1
    say(count)
    time.sleep(3)


def memory():
    """Anonymous memory, by one process."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")
    say("begun")
    held = []
    while True:
        held.append(b"x" * (8 << 20))


def many_memories():
    """Anonymous memory, by processes that each hold less than the supervisor."""
    say("begun")
    while True:
        if os.fork() == 0:
            held = mmap.mmap(-1, 6 << 20)
            held.write(b"x" * (6 << 20))
            time.sleep(STAY_S)


def memory_files():
    """Memory that belongs to no process' address space."""
    say("begun")
    block = b"x" * (1 << 20)
    while True:
        fd = os.memfd_create("hog")
        for _ in range(16):
            os.write(fd, block)


def shared_memory():
    """Segments that stay when their maker has died."""
    libc.shmat.restype = ctypes.c_void_p
    say("begun")
    while True:
        number = libc.shmget(0, 16 << 20, 0o1600)
        if number < 0:
            say("refused")
            return
        address = libc.shmat(number, None, 0)
        ctypes.memset(address, 1, 16 << 20)
        libc.shmdt(ctypes.c_void_p(address))


def files():
    """Descriptors: all of this process, then by more processes."""
    say("begun")
    children = 0
    while children < 40:
        with contextlib.suppress(OSError):
            while True:
                os.open("/dev/null", os.O_RDONLY)
        with contextlib.suppress(OSError):
            while True:
                socket.socketpair()
        if os.fork():
            break
        children += 1
    time.sleep(3)


def burn():
    """Every processor, by many processes."""
    for _ in range(int(sys.argv[2])):
        if os.fork() == 0:
            break
    say("begun")
    until = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < until:
        sum(range(10000))


def flood():
    """Output without end."""
    block = b"y" * (1 << 20)
    left = int(sys.argv[2])
    while left > 0:
        left -= os.write(1, block[: min(left, len(block))])
    os.write(2, b"done\n")


def connections():
    """Connections to the ways out, all at once, and silence on each."""
    held = []
    with contextlib.suppress(OSError):
        while len(held) < 2000:
            for port in (3128, 80, 443):
                one = socket.create_connection(("127.0.0.1", port), timeout=2)
                one.send(b"GET / HTTP/1.1\r\nHost: ")
                held.append(one)
    say(len(held))
    time.sleep(float(sys.argv[2]))


globals()[sys.argv[1]]()
