"""A process without any network but its own loopback, where the system lets one be made.

It binds native code too, which patching Python's sockets does not. Elsewhere the command runs as it is.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess


def loopback_up() -> None:
    """Switch on the loopback interface, which a new network namespace has switched off."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        flags = struct.pack("16sh14x", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(any_socket, 0x8914, flags)  # SIOCSIFFLAGS


def without_network(*command: str) -> list[str]:
    """``command`` in a network namespace of its own, where this system lets one be made; else as it is."""
    prefix = ["unshare", "--user", "--map-root-user", "--net"]
    try:
        usable = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    except OSError:
        usable = False
    return [*prefix, *command] if usable else list(command)


def has_network() -> bool:
    """Whether there is any interface beside loopback."""
    return any(name != "lo" for _, name in socket.if_nameindex())
