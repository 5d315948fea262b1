# SPDX-License-Identifier: GPL-2.0
"""Load and unload."""
import contextlib
import errno
import os
import subprocess

import harness
import net
import netlink
import ram
from harness import fails, is_loaded, load, module_users, same, scaled, test, true, unload, until


def residue():
    """What a loaded module adds to the system."""
    out = {}
    with contextlib.suppress(OSError):
        netlink.Genl().close()
        out["family"] = True
    for path in "/dev/remus", "/sys/module/remus_buf":
        if os.path.exists(path):
            out[path] = True
    with open("/proc/misc") as f:
        if "remus" in f.read():
            out["misc"] = True
    return out


@test(loaded=False)
def twenty_times(_):
    """Load, use a little, unload: no residue, no growth."""
    same(residue(), {}, "before")
    free = None
    for i in range(scaled(20)):
        load()
        true("family" in residue(), "the family is there")
        with netlink.Genl() as genl:
            same(genl.dump(), [], "a fresh module's domains")
            if i % 2:
                genl.new("web", 1 << 20)
                genl.seal("web")
            # Even iterations unload at once; odd ones with a domain that is in nobody's use.
        unload(wait=5)
        same(residue(), {}, f"after unload {i + 1}")
        if i == 4:
            free = harness.memory_free()
    until(lambda: free - harness.memory_free() < 24 << 20, "no memory is gone after the unloads")


@test(loaded=False)
def by_insmod(_):
    """insmod and rmmod as people do it; no other module is needed; the aliases are there."""
    path = harness.MODULE
    info = subprocess.run(["modinfo", path], capture_output=True, text=True, check=True).stdout
    fields = [line.split(None, 1) for line in info.splitlines() if ":" in line]
    values = {}
    for name, *value in fields:
        values.setdefault(name.rstrip(":"), []).append(value[0].strip() if value else "")
    same(values.get("depends", [""]), [""], "modules it depends on")
    for alias in "net-sch-remus", "net-pf-16-proto-16-family-remus":
        true(alias in values.get("alias", []), f"alias {alias}: {values.get('alias')}")
    true(values.get("license", [""])[0].startswith("GPL"), f"licence {values.get('license')}")
    before = open("/proc/modules").read().split()
    true("remus_buf" not in before, "not loaded at first")
    subprocess.run(["insmod", path], check=True)
    true(is_loaded(), "loaded")
    with fails(errno.EEXIST):
        load()
    subprocess.run(["rmmod", "remus_buf"], check=True)
    true(not is_loaded(), "unloaded")


@test
def refused_while_in_use(stack):
    """No unload while a qdisc or an open RAM device exists; both work on after the attempt."""
    genl = stack.enter_context(netlink.Genl())
    same(module_users(), 0, "users of a fresh module")
    line = net.Line(stack, "egress")
    with fails(errno.EAGAIN, errno.EBUSY):
        unload()
    line.send(1)
    genl.seal(line.name)
    genl.commit(line.name, 1)
    line.receiver.expect([1], "after the refused unload")
    line.remove()
    same(module_users(), 0, "users after the qdisc is gone")

    genl.new("web", 1 << 20)
    with ram.Ram("web") as device:
        with fails(errno.EAGAIN, errno.EBUSY):
            unload()
        m = device.map()
        m.write(5000, b"x")
        os.close(device.fd)
        device.fd = -1
        # Only the mapping is left.
        with fails(errno.EAGAIN, errno.EBUSY):
            unload()
        same(m.read(5000, 1), b"x", "memory after the refused unload")
    until(lambda: module_users() == 0, "users are gone")
    # With a domain, with memory and sealed epochs, that nobody uses.
    genl.seal("web")
    genl.close()
    unload(wait=5)
    true(not os.path.exists("/dev/remus/web"), "the device is gone")
    load()


@test
def dev_nodes(stack):
    """The device node comes and goes with its domain, 0600, size as told."""
    genl = stack.enter_context(netlink.Genl())
    reply = genl.new("web.1_a-B", 3 << 20)
    same(reply["device"], "remus/web.1_a-B", "device")
    path = "/dev/" + reply["device"]
    node = os.stat(path)
    same(oct(node.st_mode), oct(0o020600), "mode")
    same((node.st_uid, node.st_gid), (0, 0), "owner")
    genl.new("plain")
    true(not os.path.exists("/dev/remus/plain"), "a domain without memory has no device")
    genl.delete("plain")
    genl.delete("web.1_a-B")
    true(not os.path.exists(path), "the node is gone")
    longest = "n" * 31
    genl.new(longest, 4096)
    with ram.Ram(longest) as device:
        same(os.lseek(device.fd, 0, os.SEEK_END), 4096, "size")
    genl.delete(longest)
