"""TCP as the kernel sees it: what a network namespace lost and sent again, and the sockets of a process."""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from latencyprism.host.held import HeldFile

COUNTED = {
    ("Tcp", "RetransSegs"): "tcp_segments_sent_again",
    ("Tcp", "OutSegs"): "tcp_segments_sent",
    ("TcpExt", "TCPTimeouts"): "tcp_timeouts",
    ("TcpExt", "ListenOverflows"): "tcp_accept_overflows",
    ("TcpExt", "ListenDrops"): "tcp_accept_drops",
    ("TcpExt", "TCPBacklogDrop"): "tcp_backlog_drops",
}
"""What is read of /proc/PID/net/snmp and netstat, and its name here; all cumulative."""

ESTABLISHED, LISTEN = 1, 10
_NETLINK_DIAGNOSTICS, _BY_FAMILY, _DUMP, _DONE, _ERROR = 4, 20, 0x301, 3, 2
_INFO = 2
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI48s")
_MESSAGE = struct.Struct("=BBBBHH16s16s8I")
_ATTRIBUTE = struct.Struct("=HH")
_SOCKET = re.compile(r"socket:\[(\d+)\]$")
_RTT_AT, _RETRANS_AT = 68, 100
_MOST_SOCKETS = 4096


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """``unread_bytes``: received, not yet read by the process; ``unsent_bytes``: written, not yet
    acknowledged by the peer. Of a listening socket they are the connections that wait for ``accept`` and the
    most that may. ``rtt_us`` smoothed; ``sent_again``: segments, over its life."""

    local_port: int
    remote: str
    state: int
    unread_bytes: int
    unsent_bytes: int
    inode: int
    rtt_us: int | None
    sent_again: int | None


def parse_counters(data: bytes) -> dict[str, int]:
    """Those of ``COUNTED`` that are in the content of a ``snmp`` or ``netstat`` file."""
    found: dict[str, int] = {}
    lines = data.decode("ascii", "replace").splitlines()
    for names, values in zip(lines[::2], lines[1::2]):
        kind, _, names = names.partition(":")
        for name, value in zip(names.split(), values.partition(":")[2].split()):
            known = COUNTED.get((kind, name))
            if known is not None and value.lstrip("-").isdigit():
                found[known] = int(value)
    return found


class NetworkCounters:
    """``COUNTED`` of the network namespace that ``pid`` lives in, read again and again."""

    def __init__(self, pid: int) -> None:
        self._files = [HeldFile(f"/proc/{pid}/net/{name}") for name in ("snmp", "netstat")]

    def read(self) -> dict[str, int]:
        """Cumulative; empty where they may not be read."""
        found: dict[str, int] = {}
        for held in self._files:
            found |= parse_counters(held.read() or b"")
        return found

    def close(self) -> None:
        for held in self._files:
            held.close()


def sockets_of(pid: int) -> list[TcpSocket] | None:
    """The TCP sockets of a process; None if it lives in another network namespace, its descriptors may not
    be listed, or the kernel has no socket diagnostics."""
    inodes = socket_inodes(pid)
    try:
        if inodes is None or os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino:
            return None
        if not inodes:
            return []
        families = (socket.AF_INET, socket.AF_INET6)
        return [each for family in families for each in _dump(family) if each.inode in inodes]
    except OSError:
        return None


def socket_inodes(pid: int) -> set[int] | None:
    """Inodes of all sockets that a process holds; None if its descriptors may not be listed."""
    folder = f"/proc/{pid}/fd"
    found: set[int] = set()
    try:
        names = os.listdir(folder)
    except OSError:
        return None
    for name in names[: 1 << 16]:
        try:
            match = _SOCKET.match(os.readlink(f"{folder}/{name}"))
        except OSError:
            continue
        if match is not None:
            found.add(int(match[1]))
    return found


def _dump(family: int) -> Iterator[TcpSocket]:
    """Every listening and established socket of this namespace."""
    states = 1 << ESTABLISHED | 1 << LISTEN
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (_INFO - 1), 0, states, bytes(48))
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_DIAGNOSTICS
    ) as link:
        link.settimeout(1.0)
        link.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _DUMP, 1, 0) + body)
        seen = 0
        while seen < _MOST_SOCKETS:
            data, at = link.recv(1 << 16), 0
            while at + _HEADER.size <= len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, at)
                if kind in (_DONE, _ERROR) or length < _HEADER.size:
                    return
                yield parse_socket(data[at + _HEADER.size : at + length])
                seen += 1
                at += (length + 3) & ~3


def parse_socket(message: bytes) -> TcpSocket:
    """One ``inet_diag_msg`` with its attributes; struct.error if it is cut off."""
    fields = _MESSAGE.unpack_from(message)
    family, state = fields[0], fields[1]
    local, remote = socket.ntohs(fields[4]), socket.ntohs(fields[5])
    address = fields[7][:4] if family == socket.AF_INET else fields[7]
    unread, unsent, inode = fields[12], fields[13], fields[15]
    info = _attribute(message[_MESSAGE.size :], _INFO)
    has = len(info) >= _RETRANS_AT + 4 and state == ESTABLISHED
    return TcpSocket(
        local_port=local,
        remote=f"{socket.inet_ntop(family, address)}:{remote}",
        state=state,
        unread_bytes=unread,
        unsent_bytes=unsent,
        inode=inode,
        rtt_us=int.from_bytes(info[_RTT_AT : _RTT_AT + 4], "little") if has else None,
        sent_again=int.from_bytes(info[_RETRANS_AT : _RETRANS_AT + 4], "little") if has else None,
    )


def _attribute(data: bytes, wanted: int) -> bytes:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        if kind == wanted:
            return data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return b""
