#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""An independent witness: when did which frame of a station enter through an interface?

    sniff.py INTERFACE MAC FILE

Writes a line for every frame that comes in from MAC: time (Unix, s, taken by the kernel), length.
Says "ready" when it listens; ends on SIGTERM.
"""

import signal
import socket
import struct
import sys

SO_TIMESTAMPNS = 35
PACKET_OUTGOING = 4


def main():
    interface, mac, name = sys.argv[1:]
    mac = bytes.fromhex(mac.replace(":", ""))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sniffer.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sniffer.bind((interface, 0))
    print("ready", flush=True)
    with open(name, "w", encoding="ascii", buffering=1) as file:
        while True:
            try:
                frame, extra, _, address = sniffer.recvmsg(128, 256)
            except OSError as e:
                # The interface goes down at the end of its host.
                if e.errno == 100:
                    continue
                raise
            if address[2] == PACKET_OUTGOING or frame[6:12] != mac:
                continue
            for level, kind, data in extra:
                if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
                    seconds, nanoseconds = struct.unpack("qq", data[:16])
                    file.write(f"{seconds + nanoseconds / 1e9:.6f} {len(frame)}\n")


main()
