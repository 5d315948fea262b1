#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What a client makes the guest do: Redis in it is all that it takes.

    load.py replies ADDRESS FILE    INCR, one at a time; a line of FILE for each reply: time (Unix, s), latency (ms)
    load.py cpu ADDRESS             how many loops of a computing script take a while, which is all it does
    load.py cpu ADDRESS LOOPS       such scripts, so many asked for at once that the guest never has to wait
    load.py memory ADDRESS          scripts that write random blocks over 16 MiB, which no compression makes smaller
    load.py count ADDRESS           for each line of standard input, how often each command was called, as JSON

Ends on SIGTERM, or with an error.
"""

import json
import random
import signal
import socket
import sys
import time

PORT = 6379
# Of a computing script, in the guest: short beside what is measured, long beside a request.
SLICE_S = 0.02
BLOCK, BLOCKS, AREA = 4096, 16, 16 << 20

COMPUTE = "local x = 1 for i = 1, ARGV[1] do x = (x * 1103515245 + 12345) % 2147483648 end return x"
WRITE = """
local first, step = tonumber(ARGV[1]), tonumber(ARGV[2])
for i = first, first + 63 do
    redis.call('SETRANGE', 'area', (i * 4096) % 16777216, redis.call('GET', 'block:' .. (i + step) % 16))
end
return 1"""


class Redis:
    """One connection."""

    def __init__(self, address):
        end = time.monotonic() + 60
        while True:
            try:
                self.socket = socket.create_connection((address, PORT), timeout=60)
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
        # A guest under load may take its time; whoever started this knows how long to wait.
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def send(self, *words):
        words = [w if isinstance(w, bytes) else str(w).encode() for w in words]
        self.socket.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))

    def fill(self):
        data = self.socket.recv(65536)
        if not data:
            sys.exit("the server closed the connection")
        self.buffer += data

    def reply(self):
        while b"\r\n" not in self.buffer:
            self.fill()
        line, self.buffer = self.buffer.split(b"\r\n", 1)
        if line.startswith(b"-"):
            sys.exit(f"the server answered {line.decode(errors='replace')}")
        if line.startswith(b"$") and line != b"$-1":
            length = int(line[1:])
            while len(self.buffer) < length + 2:
                self.fill()
            line, self.buffer = self.buffer[:length], self.buffer[length + 2:]
        return line

    def call(self, *words):
        self.send(*words)
        return self.reply()


def replies(redis, path):
    with open(path, "w", encoding="ascii", buffering=1) as file:
        while True:
            begin = time.monotonic()
            redis.call("INCR", "replies")
            file.write(f"{time.time():.6f} {1000 * (time.monotonic() - begin):.3f}\n")


def pipeline(redis, depth, make):
    for _ in range(depth):
        redis.send(*make())
    while True:
        redis.reply()
        redis.send(*make())


def elapsed(redis, loops):
    begin = time.monotonic()
    redis.call("EVAL", COMPUTE, 0, loops)
    return time.monotonic() - begin


def compute(redis, loops):
    if loops is None:
        # Asked for while nothing is held; afterwards all rounds take the same.
        loops = 1000
        while True:
            took = min(elapsed(redis, loops) for _ in range(5))
            if took > SLICE_S:
                print(max(1, int(loops * SLICE_S / took)), flush=True)
                return
            loops *= 2
    pipeline(redis, 64, lambda: ("EVAL", COMPUTE, 0, loops))


def write(redis):
    for n in range(BLOCKS):
        redis.call("SET", f"block:{n}", random.randbytes(BLOCK))
    redis.call("SETRANGE", "area", AREA - 1, "x")
    at = 0

    def make():
        nonlocal at
        at += 64
        # Another block each time that the same place is written.
        return "EVAL", WRITE, 0, at - 64, at // (AREA // BLOCK)
    pipeline(redis, 4, make)


def count(redis):
    for _ in sys.stdin:
        calls = {}
        for line in redis.call("INFO", "commandstats").decode().splitlines():
            if line.startswith("cmdstat_"):
                name, _, rest = line[len("cmdstat_"):].partition(":calls=")
                calls[name] = int(rest.split(",")[0])
        print(json.dumps({"t": time.time(), "calls": calls}), flush=True)


def main():
    kind, address, *rest = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    redis = Redis(address)
    match kind:
        case "replies":
            replies(redis, rest[0])
        case "cpu":
            compute(redis, int(rest[0]) if rest else None)
        case "memory":
            write(redis)
        case "count":
            count(redis)
        case _:
            sys.exit(f"unknown load '{kind}'")


main()
