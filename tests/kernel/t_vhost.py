# SPDX-License-Identifier: GPL-2.0
"""The kernel's vhost-net writes to a guest's memory: buffers and the ring of used ones, from a thread of its own.

As the guest's virtio driver does (virtio 1.2, 2.7, split virtqueues), but without a guest: the ring lies in the
domain's memory, its addresses are offsets in that.
"""
import fcntl
import os
import random
import struct
import subprocess

from harness import SEED, Skip, same, scaled, test, true, until
from machine import Machine
from net import SIZE, Sender, TapSender
from netlink import Rtnl
from ram import PAGE

# include/uapi/linux/vhost.h
SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 0x4008AF00, 0xAF01, 0x4008AF03
VRING_NUM, VRING_ADDR, VRING_BASE, VRING_KICK, VRING_CALL = 0x4008AF10, 0x4028AF11, 0x4008AF12, 0x4008AF20, 0x4008AF21
NET_BACKEND = 0x4008AF30
VNET_HDR = 0x4000
# Pages of the descriptors, of the two rings, and of the first buffer; a buffer is a page.
DESCRIPTORS, AVAIL, USED, BUFFERS = 0, 1, 2, 8
NUM = 16
HEADER = 10


class Vhost:
    """The receive queue of a guest with the memory of `machine`, behind the tap device `name`."""

    def __init__(self, stack, machine, name):
        self.m, self.offered = machine, 0
        tap = TapSender(name, VNET_HDR)
        stack.callback(tap.close)
        with Rtnl() as rtnl:
            rtnl.set(name, up=True)
        self.fd = os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, self.fd)
        for n in range(NUM):
            machine.write(DESCRIPTORS * PAGE + 16 * n, struct.pack("=QIHH", (BUFFERS + n) * PAGE, PAGE, 2, 0))
        fcntl.ioctl(self.fd, SET_OWNER)
        fcntl.ioctl(self.fd, SET_FEATURES, struct.pack("=Q", 0))
        base = machine.map.addr
        fcntl.ioctl(self.fd, SET_MEM_TABLE, struct.pack("=IIQQQQ", 1, 0, 0, machine.pages * PAGE, base, 0))
        fcntl.ioctl(self.fd, VRING_NUM, struct.pack("=II", 0, NUM))
        fcntl.ioctl(self.fd, VRING_BASE, struct.pack("=II", 0, 0))
        fcntl.ioctl(self.fd, VRING_ADDR, struct.pack(
            "=IIQQQQ", 0, 0, base + DESCRIPTORS * PAGE, base + USED * PAGE, base + AVAIL * PAGE, 0))
        for request in VRING_KICK, VRING_CALL:
            event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, event)
            fcntl.ioctl(self.fd, request, struct.pack("=Ii", 0, event))
        fcntl.ioctl(self.fd, NET_BACKEND, struct.pack("=Ii", 0, tap.fd))
        # Before its descriptors are closed: it takes a reference of the tap's socket.
        stack.callback(fcntl.ioctl, self.fd, NET_BACKEND, struct.pack("=Ii", 0, -1))

    def used(self):
        return struct.unpack("=H", self.m.map.read(USED * PAGE + 2, 2))[0]

    def offer(self, count):
        """The guest makes buffers available: a write of its own."""
        for n in range(self.offered, self.offered + count):
            self.m.write(AVAIL * PAGE + 4 + 2 * (n % NUM), struct.pack("=H", n % NUM))
        self.offered += count
        self.m.write(AVAIL * PAGE + 2, struct.pack("=H", self.offered & 0xFFFF))

    def receive(self, sender, count):
        """So many frames come in for buffers that are there; the model has what was written."""
        before = self.used()
        numbers = [(before + n) & 0xFFFF for n in range(count)]
        sender.send(*numbers)
        # Nothing is written after the index.
        until(lambda: self.used() == (before + count) & 0xFFFF, f"{count} frames in guest memory")
        pages = [BUFFERS + n % NUM for n in numbers]
        for page in {USED, *pages}:
            self.m.wrote(page * PAGE, self.m.map.page(page))
        for n, page in zip(numbers, pages):
            same(struct.unpack_from("!I", self.m.image[page], HEADER + 14)[0], n, f"number of the frame in page {page}")
            same(self.m.image[page][HEADER + SIZE:HEADER + SIZE + 8], bytes(8), "what follows the frame")


@test(seconds=600)
def vhost_writes(stack):
    """Each epoch has the pages that vhost wrote in it, as they were at its seal, while vhost writes on."""
    for name in "tun", "vhost_net":
        if subprocess.run(["modprobe", name], stderr=subprocess.DEVNULL, check=False).returncode:
            raise Skip(f"this kernel has no module {name}")
    m, rng = Machine(stack, BUFFERS + NUM), random.Random(SEED)
    vhost = Vhost(stack, m, "t-vhost")
    sender = Sender("t-vhost")
    stack.callback(sender.close)
    vhost.offer(NUM)
    # The first time it also says in the ring that it needs no notice.
    vhost.receive(sender, 1)
    m.commit(m.seal())
    for _ in range(scaled(40, 4000)):
        vhost.receive(sender, rng.randint(1, 4))
        epoch = m.seal()
        true(USED in m.sealed[epoch] and DESCRIPTORS not in m.sealed[epoch], "what vhost wrote, and no more")
        # The sealed epoch has not been read: what vhost writes now must not change it.
        vhost.receive(sender, rng.randint(1, 4))
        m.check(epoch)
        vhost.offer(NUM - (vhost.offered - vhost.used()) % 0x10000)
        if rng.random() < 0.8:
            m.commit(epoch)
        else:
            m.abort(epoch)
    true(m.genl.get("web")["cow-copies"] > 0, "vhost's writes made copies")
