"""Tries everything that code in a sandbox must not be able to do; prints what each try gave.

The answer to each is `refused`, or `open` and what was reached.
"""

import ctypes
import errno
import json
import os
import socket
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
TRIES = {}


def attempt(function):
    TRIES[function.__name__] = function
    return function


def call(number, *arguments):
    """A system call; raises what it refuses with."""
    given = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, errno.errorcode.get(code, str(code)))
    return result


def write(path, text="x"):
    with open(path, "w") as file:
        file.write(text)


@attempt
def become_root():
    os.setuid(0)


@attempt
def become_another_user():
    os.setresuid(1001, 1001, 1001)


@attempt
def join_a_group():
    os.setgroups([0])


@attempt
def own_a_file_as_root():
    write("/tmp/owned")
    os.chown("/tmp/owned", 0, 0)


@attempt
def gain_by_setuid():
    """A set-user-id copy of a program; its owner is ourselves, so look for anybody else's."""
    for folder in ("/usr", "/bin", "/sbin", "/opt", "/lib", "/var", "/etc"):
        for root, _, names in os.walk(folder):
            for name in names:
                try:
                    found = os.lstat(os.path.join(root, name))
                except OSError:
                    continue
                if (found.st_mode & 0o170000) == 0o100000 and found.st_mode & 0o6000:
                    return os.path.join(root, name)
    raise PermissionError("none")


@attempt
def gain_by_file_capabilities():
    write("/workspace/capable")
    os.setxattr("/workspace/capable", "security.capability", bytes(20))


@attempt
def write_the_root():
    for path in ("/x", "/usr/bin/x", "/etc/x", "/opt/x", "/var/x", "/lib/x", "/root/x", "/home/x"):
        try:
            write(path)
        except OSError:
            continue
        return path
    raise PermissionError("nowhere")


@attempt
def change_what_is_trusted():
    for path in ("/etc/ssl/certs/ca-certificates.crt", "/etc/hosts", "/etc/resolv.conf"):
        try:
            os.close(os.open(path, os.O_WRONLY))
        except OSError:
            continue
        return path
    raise PermissionError("nothing")


@attempt
def write_kernel_settings():
    for root in ("/proc/sys", "/sys"):
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                if os.access(path, os.W_OK):
                    try:
                        os.close(os.open(path, os.O_WRONLY))
                    except OSError:
                        continue
                    return path
    raise PermissionError("nothing")


@attempt
def write_dangerous_proc_files():
    for path in ("/proc/sysrq-trigger", "/proc/kcore", "/proc/kmsg", "/proc/self/uid_map"):
        try:
            os.close(os.open(path, os.O_WRONLY))
            write(path, "0 0 1")
        except OSError:
            continue
        return path
    raise PermissionError("nothing")


@attempt
def read_kernel_memory():
    for path in ("/dev/mem", "/dev/kmem", "/dev/port", "/proc/kcore", "/proc/kmsg", "/proc/keys"):
        try:
            with open(path, "rb") as file:
                if file.read(16):
                    return path
        except OSError:
            continue
    raise PermissionError("nothing")


@attempt
def write_cgroups():
    for folder, _, names in os.walk("/sys/fs/cgroup"):
        for name in names:
            if name in ("cgroup.procs", "tasks", "release_agent", "memory.limit_in_bytes"):
                try:
                    os.close(os.open(os.path.join(folder, name), os.O_WRONLY))
                except OSError:
                    continue
                return os.path.join(folder, name)
    raise PermissionError("nothing")


@attempt
def see_devices():
    harmless = {"null", "zero", "full", "random", "urandom", "tty", "console", "ptmx"}
    found = []
    for root, folders, names in os.walk("/dev"):
        folders[:] = [each for each in folders if each not in ("pts", "shm", "mqueue", "fd")]
        found += [
            os.path.join(root, name)
            for name in names
            if name not in harmless and not os.path.islink(os.path.join(root, name))
        ]
    if not found:
        raise PermissionError("none")
    return found


@attempt
def make_a_device():
    os.mknod("/workspace/disk", 0o060600, os.makedev(254, 0))


@attempt
def make_a_device_in_memory():
    os.mknod("/tmp/disk", 0o020600, os.makedev(1, 1))


@attempt
def mount_something():
    if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "mount")


@attempt
def mount_the_new_way():
    call(430, ctypes.c_char_p(b"tmpfs"), 0)


@attempt
def take_a_mount_away():
    if libc.umount2(b"/workspace", 2):
        raise OSError(ctypes.get_errno(), "umount")


@attempt
def clone_a_tree():
    call(428, -100, ctypes.c_char_p(b"/"), 1)


@attempt
def change_the_root():
    os.chroot("/tmp")


@attempt
def enter_the_init_namespaces():
    with open("/proc/1/ns/mnt") as file:
        if libc.setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")


def namespace(flag):
    def unshare():
        call(272, flag)

    def clone():
        pid = call(56, flag | 17, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    def clone3():
        pid = call(435, struct.pack("11Q", flag, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88)
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    return unshare, clone, clone3


for _name, _flag in {
    "user": 0x10000000, "mount": 0x20000, "net": 0x40000000, "pid": 0x20000000, "ipc": 0x8000000,
    "uts": 0x4000000, "cgroup": 0x2000000,
}.items():  # fmt: skip
    for _way, _function in zip(("unshare", "clone", "clone3"), namespace(_flag), strict=True):
        TRIES[f"{_way}_a_{_name}_namespace"] = _function


def family(number, kind):
    def open_socket():
        socket.socket(number, kind, 0).close()

    return open_socket


for _name, (_number, _kind) in {
    "packet": (17, socket.SOCK_RAW), "vsock": (40, socket.SOCK_STREAM), "alg": (38, 5),
    "bluetooth": (31, socket.SOCK_RAW), "tipc": (30, socket.SOCK_STREAM),
    "can": (29, socket.SOCK_RAW),
    "rds": (21, 5), "xdp": (44, socket.SOCK_RAW), "kcm": (41, 2), "key": (15, socket.SOCK_RAW),
    "raw_ipv4": (2, socket.SOCK_RAW), "raw_ipv6": (10, socket.SOCK_RAW),
}.items():  # fmt: skip
    TRIES[f"open_a_{_name}_socket"] = family(_number, _kind)


@attempt
def add_an_address():
    """Netlink can be asked, but changes nothing."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.bind((0, 0))
        body = struct.pack("=BBHiII", 0, 0, 0, 1, 0, 1)  # lo: down
        netlink.send(struct.pack("=IHHII", 16 + len(body), 16, 5, 1, 0) + body)
        answer = netlink.recv(4096)
        code = -struct.unpack_from("=i", answer, 16)[0]
        if code:
            raise OSError(code, "netlink")


@attempt
def set_up_io_uring():
    call(425, 8, ctypes.create_string_buffer(120))


@attempt
def load_bpf():
    call(321, 0, ctypes.create_string_buffer(64), 64)


@attempt
def open_perf_events():
    call(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)


@attempt
def catch_page_faults():
    call(323, 0)


@attempt
def add_a_key():
    call(248, b"user", b"name", b"value", 5, -2)


@attempt
def read_keyrings():
    call(250, 0, -4, 1)


@attempt
def read_the_kernel_log():
    call(103, 10, None, 0)


@attempt
def load_a_module():
    call(313, 0, b"", 0)


@attempt
def load_a_kernel():
    call(246, 0, 0, 0, 0)


@attempt
def open_by_handle():
    call(304, -100, ctypes.create_string_buffer(struct.pack("Ii", 8, 1) + bytes(8)), 0)


@attempt
def set_the_clock():
    call(227, 0, struct.pack("qq", 0, 0))


@attempt
def set_the_host_name():
    call(170, b"x", 1)


@attempt
def reboot():
    call(169, 0xFEE1DEAD, 672274793, 0, 0)


@attempt
def swap():
    call(167, b"/workspace/swap", 0)


@attempt
def account():
    call(163, b"/workspace/acct")


@attempt
def use_ports_of_the_machine():
    call(173, 0, 1, 1)


@attempt
def raise_priority():
    os.setpriority(os.PRIO_PROCESS, 0, -10)


@attempt
def become_real_time():
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))


@attempt
def lift_a_hard_limit():
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (10**6, 10**6))


@attempt
def dump_core():
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))


@attempt
def hide_from_the_oom_killer():
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")


@attempt
def make_foreign_system_calls():
    """x32: another table of calls, past a filter by number."""
    call(0x40000000 + 39)


def main():
    answers = {}
    for name, function in TRIES.items():
        try:
            reached = function()
        except (OSError, ValueError) as error:
            answers[name] = "refused"
            del error
        else:
            answers[name] = f"open {'' if reached is None else reached}".rstrip()
    fields = dict(
        line.split(":", 1) for line in open("/proc/self/status").read().splitlines() if ":" in line
    )
    identity = {
        key: fields[key].split()
        for key in ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb",
                    "NoNewPrivs", "Seccomp")
    }  # fmt: skip
    mounts = [line.split() for line in open("/proc/self/mountinfo")]
    print(
        json.dumps(
            {
                "tries": answers,
                "identity": identity,
                "mounts": [[each[4], each[5], each[3]] for each in mounts],
                "interfaces": sorted(os.listdir("/sys/class/net")),
                "processes": sorted(int(each) for each in os.listdir("/proc") if each.isdigit()),
            }
        )
    )
    sys.stdout.flush()


main()
