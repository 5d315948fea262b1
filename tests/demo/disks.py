# SPDX-License-Identifier: GPL-2.0
"""The guest's disks: an image of each on each host, how QEMU and remusctl are told of them, and what must be on
them in the end.

Images are in memory, a directory for each host, named like the machine there: DIRECTORY/web/disk0.raw on alpha and
DIRECTORY/web-b/disk0.raw on beta.
"""

import os
import re
import shutil
import subprocess

MIB = 192
FORMATS = "raw", "qcow2"
# An entry of the ledger in Redis' append-only file.
ENTRY = re.compile(rb"\$5\r\nRPUSH\r\n\$6\r\nledger\r\n\$\d+\r\n(\d+)\r\n")


def run(*command):
    """A program's exit status and what it says."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout.strip()


class Disks:
    """All disks of one guest."""

    def __init__(self, formats, directory, turn, bus, overlay=False):
        """Devices take turns: virtio-blk and virtio-scsi alternate, and `turn` says which comes first. With `overlay`
        the standby's guest leaves its images as they were when it took over, and writes to files above them."""
        self.formats, self.directory, self.bus, self.overlay = formats, directory, bus, overlay
        self.scsi = [(number + turn) % 2 == 1 for number in range(len(formats))]

    def __str__(self):
        return ", ".join(f"{form} on {'virtio-scsi' if scsi else 'virtio-blk'}" for form, scsi in zip(self.formats, self.scsi))

    def names(self):
        return [f"disk{number}" for number in range(len(self.formats))]

    def image(self, machine, number):
        """What remusctl keeps the same on both hosts."""
        return f"{self.directory}/{machine}/disk{number}.{self.formats[number]}"

    def written(self, machine, number):
        """What the guest on that host writes to."""
        return f"{self.directory}/{machine}/disk{number}.above" if self.overlay and machine == "web-b" else self.image(machine, number)

    def make(self):
        """Empty images."""
        for machine in "web", "web-b":
            os.makedirs(f"{self.directory}/{machine}")
            for number, form in enumerate(self.formats):
                self.create(self.image(machine, number), form)
                if self.written(machine, number) != self.image(machine, number):
                    self.create(self.written(machine, number), "qcow2")

    @staticmethod
    def create(path, form):
        status, said = run("qemu-img", "create", "-q", "-f", form, path, f"{MIB}M")
        if status:
            raise OSError(said)

    def arguments(self, machine, placeholders=False):
        """QEMU's, for this machine; with placeholders for the images' paths, as in the configuration."""
        words = []
        if any(self.scsi):
            words += ["-device", f"virtio-scsi-{self.bus},id=scsi"]
        for number, form in enumerate(self.formats):
            name = f"disk{number}"
            path = f"{{disk:{name}}}" if placeholders else self.image(machine, number)
            if self.written(machine, number) == self.image(machine, number):
                node = f"driver={form},file.driver=file,file.filename={path},file.discard=unmap"
            else:
                node = (f"driver=qcow2,file.driver=file,file.filename={self.written(machine, number)},"
                        # It is written until this machine goes on.
                        f"backing.driver={form},backing.read-only=on,backing.file.driver=file,backing.file.filename={path},"
                        "backing.file.locking=off")
            device = "scsi-hd,bus=scsi.0" if self.scsi[number] else f"virtio-blk-{self.bus}"
            words += ["-blockdev", f"node-name={name},discard=unmap,{node}", "-device", f"{device},drive={name}"]
        return words

    def tables(self, here, there):
        """The domain's disks in TOML, and those of its standby."""
        mine = "".join(
            f'[[disk]]\nname = "{name}"\nnode = "{name}"\npath = "{self.image(here, number)}"\n'
            f'format = "{self.formats[number]}"\n\n'
            for number, name in enumerate(self.names()))
        theirs = "".join(f'{name} = "{self.image(there, number)}"\n' for number, name in enumerate(self.names()))
        return mine, f"\n[standby.disks]\n{theirs}"

    def differ(self):
        """What is not the same in both hosts' images, or None."""
        for number, form in enumerate(self.formats):
            one, other = (self.image(machine, number) for machine in ("web", "web-b"))
            status, said = run("qemu-img", "compare", "-U", "-f", form, "-F", form, one, other)
            if status:
                return f"disk{number}: {said}"
        return None

    def faults(self, machine, acknowledged):
        """What is wrong with the disks of a machine that has unmounted them, and has acknowledged so many entries; or None."""
        kept = None
        for number, form in enumerate(self.formats):
            path = self.written(machine, number)
            raw = f"{self.directory}/check"
            if path.endswith(".raw"):
                raw = path
            else:
                form = "qcow2"
                if path != self.image(machine, number):
                    # Which is not written in it: QEMU was told.
                    status, said = run("qemu-img", "rebase", "-u", "-f", form, "-b", self.image(machine, number), "-F", self.formats[number], path)
                    if status:
                        return f"disk{number}: {said}"
                for words in ["check", "-q", "-f", form, path], ["convert", "-f", form, "-O", "raw", path, raw]:
                    status, said = run("qemu-img", *words)
                    if status:
                        return f"disk{number}: qemu-img {words[0]}: {said}"
            status, said = run("e2fsck", "-fn", raw)
            if status:
                return f"disk{number}: e2fsck: {' '.join(said.splitlines()[:6])}"
            entries = self.entries(raw)
            if entries:
                kept = entries
        kept = kept or []
        # One more may have been on its way when the client gave up.
        if kept != list(range(1, len(kept) + 1)) or len(kept) not in (acknowledged, acknowledged + 1):
            return f"the ledger on disk has {len(kept)} entries, the last ones {kept[-3:]}; the client was told of 1 to {acknowledged}"
        return None

    def entries(self, raw):
        """The ledger in the append-only file on a file system, if it is there."""
        out = f"{self.directory}/files"
        os.makedirs(out)
        try:
            run("debugfs", "-R", f"rdump /appendonlydir {out}", raw)
            text = b""
            for base, _, names in os.walk(out):
                for name in names:
                    if name.endswith(".incr.aof"):
                        with open(f"{base}/{name}", "rb") as file:
                            text += file.read()
            return [int(number) for number in ENTRY.findall(text)]
        finally:
            shutil.rmtree(out)
