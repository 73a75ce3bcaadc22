"""What systemd is told, where it started us."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """sd_notify(3). Nothing happens where systemd did not start us."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def ping_interval() -> float | None:
    """Seconds between two signs of life, twice per period of WatchdogSec=; None where nobody waits for one."""
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6 or None
