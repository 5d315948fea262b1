# SPDX-License-Identifier: GPL-2.0
"""What tc with its plugin says agrees with netlink; passthrough, as people switch it. tests/tdc has the rest of tc."""
import contextlib
import errno
import json
import os
import re
import subprocess

import netlink
from harness import TOP, fails, same, test, true
from net import Line
from netlink import Genl
from t_packets import each

PLUGIN = f"{TOP}/build/tc"


def run(words):
    true(os.path.exists(f"{PLUGIN}/q_remus.so"), "the plugin is built")
    return subprocess.run(["tc", *words.split()], env={**os.environ, "TC_LIB_DIR": PLUGIN}, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def tc(words):
    done = run(words)
    same((done.returncode, done.stdout), (0, ""), words)


def refused(words, sentence):
    done = run(words)
    true(done.returncode == 2 and sentence in done.stdout, f"{words}: {done.returncode} {done.stdout}")


def shown(line):
    """The device's qdisc as JSON has it; the words say the same."""
    done = run(f"-s -j qdisc show dev {line.device}")
    same(done.returncode, 0, done.stdout)
    (got,) = json.loads(done.stdout)
    words = run(f"-s qdisc show dev {line.device}").stdout
    flat = {**got, **got["options"]}
    for pattern, key in ((r" domain (\S+) ", "domain"), (r" limit (\d+)p ", "limit_packets"), (r"\n  mode (\w+) ", "mode"),
                         (r" open (\d+) ", "open_epoch"), (r" sealed (\d+) ", "sealed_epochs"), (r" committed (\d+) ", "committed_epoch"),
                         (r"\n  held (\d+)p ", "held_packets"), (r" dropped_limit (\d+) ", "dropped_limit"),
                         (r" dropped_memory (\d+) ", "dropped_memory"), (r" dropped_discarded (\d+) ", "dropped_discarded")):
        match = re.search(pattern, words)
        true(match and match[1] == str(flat[key]), f"{key} {flat[key]} in {words}")
    return got


def send_beyond(line, *numbers):
    """Sends what is over the limit: whoever sends out of the device himself is told."""
    for n in numbers:
        with fails(errno.ENOBUFS) if line.kind == "egress" else contextlib.nullcontext():
            line.send(n)


def agree(line, genl):
    """All that both tell is the same."""
    got, view = shown(line), genl.get(line.name)
    same({"open-epoch": got["open_epoch"], "committed-epoch": got["committed_epoch"], "sealed-epochs": got["sealed_epochs"],
          "packets": got["held_packets"], "bytes": got["held_bytes"],
          "dropped": got["dropped_limit"] + got["dropped_memory"] + got["dropped_discarded"]},
         {key: view[key] for key in ("open-epoch", "committed-epoch", "sealed-epochs", "packets", "bytes", "dropped")}, "tc and netlink")
    raw = line.rtnl.qdisc_get(line.device)["options"]
    same((got["options"]["domain"].encode() + b"\0", got["options"]["limit_packets"], got["options"]["limit_bytes"]),
         (raw[netlink.TCA_DOMAIN], netlink.number(raw[netlink.TCA_LIMIT_PACKETS]), netlink.number(raw[netlink.TCA_LIMIT_BYTES])), "options")
    same((got["direction"], got["options"]["direction"]), ("egress" if line.kind == "egress" else "guest",) * 2, "direction")
    return got


@each()
def agrees_with_netlink(stack, kind):
    """Through some epochs, and beyond a limit."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind, add=False)
    # The bridge's and veth's ends do not look like a guest's.
    tc(f"qdisc add dev {line.device} remus direction {'egress' if kind == 'egress' else 'guest'} limit 6p limit 5g")
    got = agree(line, genl)
    same((got["held_packets"], got["hold_max_ns"], got["options"]["limit_bytes"], got["mode"]), (0, 0, 5 << 30, "holding"), "at first")
    line.send(1, 2, 3)
    got = agree(line, genl)
    same(got["held_packets"], 3, "held")
    true(got["held_memory"] > got["held_bytes"], f"memory {got}")
    genl.seal(line.name)
    line.send(4)
    genl.seal(line.name)
    line.send(5, 6)
    send_beyond(line, 7, 8, 9)
    got = agree(line, genl)
    same((got["open_epoch"], got["sealed_epochs"], got["held_packets"], got["dropped_limit"]), (3, 2, 6, 3), "beyond the limit")
    genl.commit(line.name, 1)
    line.receiver.expect([1, 2, 3], "epoch 1")
    got = agree(line, genl)
    same((got["committed_epoch"], got["sealed_epochs"], got["held_packets"]), (1, 1, 3), "after a commit")
    true(0 < got["hold_last_ns"] <= got["hold_max_ns"] < 60 * 10**9, f"hold times {got}")
    genl.commit(line.name, 2)
    line.receiver.expect([4], "epoch 2")
    agree(line, genl)
    tc(f"qdisc del dev {line.device} remus")


@each()
def passthrough_until_the_next_seal(stack, kind):
    """Everything passes until the seal; from then on it is held, and leaves with its epoch."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind, add=False)
    tc(f"qdisc add dev {line.device} remus direction {'egress' if kind == 'egress' else 'guest'} passthrough")
    line.send(1, 2, 3)
    line.receiver.expect([1, 2, 3], "nothing is held before the first seal")
    got = agree(line, genl)
    same((got["mode"], got["options"]["passthrough"], got["held_packets"]), ("passing", True, 0), "before the seal")
    genl.seal(line.name)
    got = agree(line, genl)
    same((got["mode"], got["options"]["passthrough"]), ("holding", False), "after the seal")
    line.send(4, 5)
    line.receiver.nothing("the seal ended the passing")
    genl.seal(line.name)
    genl.commit(line.name, 2)
    line.receiver.expect([4, 5], "epoch 2")


@each()
def passthrough_by_change(stack, kind):
    """A change lets go of what the open epoch holds, unless sealed epochs wait; hold holds again."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind, add=False)
    change = f"qdisc change dev {line.device} remus"
    tc(f"qdisc add dev {line.device} remus direction {'egress' if kind == 'egress' else 'guest'}")
    line.send(1, 2)
    genl.seal(line.name)
    line.send(3)
    refused(f"{change} passthrough", "sealed epochs wait")
    same(agree(line, genl)["mode"], "holding", "after the refused change")
    line.receiver.nothing("the change was refused")
    genl.abort(line.name, 1)
    tc(f"{change} passthrough")
    line.receiver.expect([1, 2, 3], "what the open epoch held")
    line.send(4)
    line.receiver.expect([4], "it passes")
    same(agree(line, genl)["mode"], "passing", "after the change")
    tc(f"{change} limit 9p")
    same(agree(line, genl)["mode"], "passing", "a change of something else")
    tc(f"{change} hold")
    line.send(5)
    line.receiver.nothing("it holds again")
    got = agree(line, genl)
    same((got["mode"], got["held_packets"]), ("holding", 1), "after hold")
    genl.seal(line.name)
    genl.commit(line.name, got["open_epoch"])
    line.receiver.expect([5], "and commits")


@test
def limits_apply_at_once(stack):
    """A change of the limits counts for the next packet; what is held stays."""
    genl = stack.enter_context(Genl())
    line = Line(stack, "egress", add=False)
    change = f"qdisc change dev {line.device} remus"
    tc(f"qdisc add dev {line.device} remus")
    line.send(1, 2, 3)
    tc(f"{change} limit 2p")
    send_beyond(line, 4)
    same((agree(line, genl)["held_packets"], agree(line, genl)["dropped_limit"]), (3, 1), "fewer packets")
    tc(f"{change} limit 9p limit 1k")
    send_beyond(line, 5)
    same((agree(line, genl)["held_packets"], agree(line, genl)["dropped_limit"]), (3, 2), "less memory")
    tc(f"{change} limit 1m")
    line.send(6)
    same((agree(line, genl)["held_packets"], agree(line, genl)["dropped_limit"]), (4, 2), "more again")
    genl.seal(line.name)
    genl.commit(line.name, 1)
    line.receiver.expect([1, 2, 3, 6], "all that was held")
