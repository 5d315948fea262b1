#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""A client of Redis that holds one TCP connection and never forgives.

    client.py ADDRESS PORT RECORDS SUMMARY [ledger]

Says "ready" and waits for SIGUSR1. Then it sends INCR, one at a time, and checks that each reply is the
previous one plus 1. Every reply becomes a line of RECORDS: time (Unix, s), latency (ms), value. On SIGTERM
it asks once more for the value, and for something that the server's machine needs its timers for, and writes
SUMMARY:

    requests    INCRs that were answered
    lost        acknowledged INCRs that the server does not know any more (the value went back)
    duplicated  INCRs that were applied more than once (the value jumped)

With "ledger" it adds entries 1, 2, 3, ... to a list instead: the reply is how many there are, and in the end
it asks for all of them.
    connection  "kept", or "broken", with the reason in `error`
"""

import json
import select
import signal
import socket
import sys
import time


# For an answer at the end, in seconds: after an outage TCP may try again only this much later.
PATIENCE = 30


class Broken(Exception):
    """The connection is of no more use."""


class Client:
    def __init__(self, address, port, records, ledger):
        self.records, self.ledger = records, ledger
        self.stop = False
        self.buffer = b""
        self.value = 0
        self.counts = {"requests": 0, "lost": 0, "duplicated": 0}
        self.socket = self.connect(address, port)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)

    @staticmethod
    def connect(address, port):
        """Nothing is promised yet, so here a second try is fair: a guest on an emulated machine may take
        longer to answer ARP than the kernel waits."""
        end = time.monotonic() + 60
        while True:
            try:
                return socket.create_connection((address, port), timeout=60)
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def line(self, patience=None):
        """The next line from the server; None if told to stop, or after `patience` seconds."""
        end = None if patience is None else time.monotonic() + patience
        while b"\r\n" not in self.buffer:
            if (self.stop and end is None) or (end is not None and time.monotonic() > end):
                return None
            if select.select([self.socket], [], [], 0.1)[0]:
                try:
                    data = self.socket.recv(4096)
                except OSError as e:
                    raise Broken(f"connection failed: {e.strerror}") from e
                if not data:
                    raise Broken("the server closed the connection")
                self.buffer += data
        line, self.buffer = self.buffer.split(b"\r\n", 1)
        return line

    def number(self, line):
        if not line.startswith(b":"):
            raise Broken(f"the server answered {line[:80]!r}, not a number")
        return int(line[1:])

    def run(self):
        self.socket.sendall(b"DEL demo ledger\r\n")
        reply = self.line(60)
        if reply != b":0":
            raise Broken(f"the server answered {reply!r} to DEL")
        while not self.stop:
            begin = time.monotonic()
            self.socket.sendall(b"RPUSH ledger %d\r\n" % (self.value + 1) if self.ledger else b"INCR demo\r\n")
            reply = self.line()
            if reply is None:
                break
            now, value = time.time(), self.number(reply)
            latency = (time.monotonic() - begin) * 1000
            self.counts["requests"] += 1
            self.check(value, self.value + 1)
            self.value = value
            self.records.write(f"{now:.6f} {latency:.3f} {value}\n")
            self.records.flush()

    def check(self, value, expected):
        if value > expected:
            self.counts["duplicated"] += value - expected
        elif value < expected:
            self.counts["lost"] += expected - value

    def check_ledger(self, count):
        """Entries 1, 2, 3, ... that it was told of, each once, in this order."""
        entries = []
        for _ in range(count):
            # Its length, and the entry itself.
            self.line(PATIENCE)
            entries.append(int(self.line(PATIENCE) or 0))
        known = set(entries)
        self.counts["lost"] += len(set(range(1, self.value + 1)) - known)
        self.counts["duplicated"] += len(entries) - len(known)
        if entries != sorted(entries):
            raise Broken("the ledger is out of order")

    def last_word(self):
        """An INCR may be on its way: its reply comes first, and then the value itself must agree."""
        self.socket.sendall(b"LRANGE ledger 0 -1\r\n" if self.ledger else b"GET demo\r\n")
        while True:
            line = self.line(PATIENCE)
            if line is None:
                raise Broken("no answer at the end")
            if line.startswith(b":"):
                self.check(self.number(line), self.value + 1)
                self.counts["requests"] += 1
                self.value = self.number(line)
            elif line.startswith(b"$"):
                text = self.line(PATIENCE)
                self.check(int(text or 0), self.value)
                break
            elif line.startswith(b"*"):
                self.check_ledger(int(line[1:]))
                break
        # INCRs alone would be answered by a machine that has lost its timers.
        self.socket.sendall(b"BLPOP nothing 0.05\r\n")
        if self.line(PATIENCE) != b"*-1":
            raise Broken("the server's timers do not run")


def main():
    address, port, records, summary, *ledger = sys.argv[1:]
    result = {"connection": "kept", "error": None}
    with open(records, "w", encoding="ascii") as file:
        client = None

        def stop(*_):
            if client is not None:
                client.stop = True
            else:
                sys.exit(1)

        signal.signal(signal.SIGTERM, stop)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        print("ready", flush=True)
        signal.sigwait([signal.SIGUSR1])
        try:
            client = Client(address, int(port), file, ledger == ["ledger"])
            client.run()
            client.last_word()
        except (Broken, OSError) as e:
            result = {"connection": "broken", "error": str(e)}
        result |= client.counts if client else {"requests": 0, "lost": 0, "duplicated": 0}
    with open(summary, "w", encoding="ascii") as file:
        json.dump(result, file)


main()
