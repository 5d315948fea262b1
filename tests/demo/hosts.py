# SPDX-License-Identifier: GPL-2.0
"""Two hosts as network namespaces on one bridge, and a guest on one of them: what the demo and the measurement
of replication run in, inside the virtual machine of scripts/vm.sh.

                     bridge "lan"
       ┌─────────────────┼──────────────────┐
    alpha0             beta0              client0
  ┌────┴─ alpha ───┐ ┌───┴─ beta ─────┐ ┌───┴─ client ─┐
  │ uplink─br─tap-a│ │ uplink─br─tap-b│ │ client.py    │
  │ guest, protect │ │ standby        │ └──────────────┘
  └────────────────┘ └────────────────┘
"""

import fcntl
import functools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import report
from disks import Disks

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
REMUSCTL = f"{TOP}/build/cargo/release/remusctl"
MODULE = f"{TOP}/build/module/remus_buf.ko"
REPORT = f"{TOP}/build/report"
GUEST_IP, ALPHA_IP, BETA_IP, CLIENT_IP = (f"10.77.0.{n}" for n in (2, 11, 12, 3))
GUEST_MAC = "52:54:00:77:00:02"
PORT = 7072
# A shell in a guest that has disks.
SHELL_PORT = 9
# Other than what is usual, so that it shows where the file's limits hold.
HOT_MIB = 12
GUEST_BOOT_LIMIT = 300
LOOK = (
    "info status", "info registers", "info lapic", "info irq", "info virtio",
    "info virtio-queue-status /machine/peripheral-anon/device[0] 0",
    "info virtio-queue-status /machine/peripheral-anon/device[0] 1",
)  # fmt: skip
TERMINAL = sys.stdout.isatty()


class Failed(Exception):
    """The demo cannot go on; the message is one sentence for the person who runs it."""


def sh(*command, check=True, namespace=None):
    if namespace:
        command = ("ip", "netns", "exec", namespace, *command)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise Failed(f"'{' '.join(command)}' failed: {(done.stderr or done.stdout).strip()}")
    return done


def ip_batch(lines, namespace=None):
    command = ["ip", *(("-n", namespace) if namespace else ()), "-batch", "-"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"cannot set up the network: {done.stderr.strip()}")


def members(namespace):
    """Processes of a network namespace."""
    inode = os.stat(f"/run/netns/{namespace}").st_ino
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.stat(f"/proc/{entry}/ns/net").st_ino == inode:
                    found.append(int(entry))
            except OSError:
                pass
    return found


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def gone(pid):
    """Whether a process does nothing any more; its parent may not have looked at it yet."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return True


def link_down(interface):
    """By ioctl: no process to start at the moment of the kill."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        name = struct.pack("16sh14x", interface.encode(), 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(s, 0x8913, name))[1]
        fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", interface.encode(), flags & ~1))


def listens(pid, port):
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{pid}/net/{table}", encoding="ascii") as file:
                for line in file:
                    words = line.split()
                    if len(words) > 3 and words[1].endswith(f":{port:04X}") and words[3] == "0A":
                        return True
        except OSError:
            pass
    return False


def tail(path, lines=6):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return "".join(file.readlines()[-lines:]).strip()
    except OSError:
        return ""


def tail_of(text, lines=6):
    return "\n".join(text.strip().splitlines()[-lines:])


def ask_monitor(path, *commands):
    """What a QEMU says to commands of its human monitor."""
    text = b""
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(3)
            s.connect(path)
            s.sendall("".join(f"{command}\n" for command in commands).encode())
            while text.count(b"(qemu)") <= len(commands) and (data := s.recv(65536)):
                text += data
    except OSError as e:
        text += str(e).encode()
    # It echoes as if to a terminal.
    return re.sub(r"\x1b\[[0-9]*[A-Z]", "", text.decode(errors="replace")).replace("\r", "")


class Teller:
    """Says what happens as it happens; on a terminal with a live line below."""

    def __init__(self):
        self.start = time.monotonic()
        self.lock = threading.Lock()
        self.shown = False

    def __call__(self, text):
        with self.lock:
            clear = "\r\033[K" if self.shown else ""
            self.shown = False
            print(f"{clear}{time.monotonic() - self.start:7.1f} s  {text}", flush=True)

    def live(self, text):
        """A state that the next one overwrites; elsewhere than on a terminal a line now and then."""
        if not TERMINAL:
            self(text)
            return
        with self.lock:
            self.shown = True
            print(f"\r\033[K{time.monotonic() - self.start:7.1f} s  {text}", end="", flush=True)


tell = Teller()

@functools.cache
def knows(command, flag):
    """Whether remusctl has this option."""
    return re.search(rf"(^|\s){flag}\b", sh(REMUSCTL, command, "--help", check=False).stdout) is not None


def leave_first_processor():
    """Keeps guests off the first processor of an emulated machine.

    QEMU's emulation (10.0.2 and 10.0.13, and its source of 2026) of FXRSTOR and XRSTOR, on whichever processor, reads, changes and writes the first one's
    `hflags2` without a lock (cpu_clear_ignne, target/i386/tcg/system/fpu_helper.c). When that one executes VMRUN or leaves
    a guest meanwhile, the flag for nested page tables is as it was before: the guest, or the machine around it, goes on in the
    other's page tables, and is reset, hangs or stops with a fault.
    """
    if os.environ.get("REMUS_ACCEL") == "tcg":
        os.sched_setaffinity(0, set(range(1, os.cpu_count())))


class Hosts:
    """Two hosts and a client, a guest on alpha, and logs."""

    def __init__(self, name, options, logs):
        leave_first_processor()
        self.name, self.options = name, options
        # Set by add_disks.
        self.disks, self.disk_words = None, ""
        # Logs and traces are looked at from the host afterwards, sockets must not be on 9p.
        self.logs = f"{TOP}/build/{logs}"
        self.sockets = f"/run/{name}"
        subprocess.run(["rm", "-rf", self.logs], check=True)
        os.makedirs(self.logs)
        os.makedirs(self.sockets)
        # Written at high pace, so in memory while it runs; copied to the logs at the end.
        self.fast = self.sockets
        self.processes = {}
        self.primary = report.trace(self.path("protect.trace"))
        self.secondary = report.trace(self.path("standby.trace"))
        # Without keys.
        self.plain = False

    def path(self, name):
        return f"{self.fast}/{name}"

    def start(self, name, command, namespace, **env):
        log = open(f"{self.logs}/{name}.log", "ab")  # pylint: disable=consider-using-with
        command = ["ip", "netns", "exec", namespace, *command] if namespace else command
        process = subprocess.Popen(  # pylint: disable=consider-using-with
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | env,
        )
        log.close()
        self.processes[name] = process
        return process

    def alive(self, name):
        if self.processes[name].poll() is not None:
            raise Failed(
                f"{name} ended with exit status {self.processes[name].returncode}"
                f" (log: {os.path.relpath(self.logs, TOP)}/{name}.log): {tail(f'{self.logs}/{name}.log')}"
            )
        if name == "qemu" and "KVM internal error" in tail(f"{self.logs}/qemu.log", 100):
            raise Failed(f"KVM has given the guest up: {os.path.relpath(self.logs, TOP)}/qemu.log")

    def wait_for(self, what, condition, seconds, *watched):
        end = time.monotonic() + seconds
        while True:
            result = condition()
            if result:
                return result
            for name in watched:
                self.alive(name)
            if time.monotonic() > end:
                raise Failed(f"{what} did not happen within {seconds} s; the logs are in {os.path.relpath(self.logs, TOP)}.")
            time.sleep(0.1)

    def network(self):
        lines = ["link add name lan type bridge stp_state 0 forward_delay 0", "link set lan up"]
        for name in ("alpha", "beta", "client"):
            lines += [
                f"netns add {name}",
                f"link add name {name}0 type veth peer name uplink netns {name}",
                f"link set {name}0 master lan",
                f"link set {name}0 up",
            ]
        ip_batch(lines)
        for name, address, tap in (("alpha", ALPHA_IP, "tap-a"), ("beta", BETA_IP, "tap-b")):
            lines = [
                "link set lo up",
                "link add name br0 type bridge stp_state 0 forward_delay 0",
                f"tuntap add {tap} mode tap",
                f"link set {tap} master br0",
                "link set uplink master br0",
                f"link set {tap} up",
                "link set uplink up",
                "link set br0 up",
                f"addr add {address}/24 dev br0",
            ]
            ip_batch(lines, name)
        ip_batch(["link set lo up", "link set uplink up", f"addr add {CLIENT_IP}/24 dev uplink"], "client")

    def add_disks(self, formats, turn, verify=True, overlay=False):
        """The guest to come gets disks of these formats, see Disks; with `verify` it writes and reads all the time."""
        bus = "device" if self.options.machine == "microvm" else "pci"
        self.disks = Disks(formats, f"{self.sockets}/disks", turn, bus, overlay)
        self.disk_words = " remus.disk=1" + (" remus.fio=1" if verify else "")
        self.disks.make()
        tell(f"alpha: the guest's disks are {self.disks}")

    def config(self):
        """The one description of the domain that both hosts read; returns how to start its guest on alpha."""
        o = self.options
        kernel = f"{os.environ['REMUS_KERNEL']}/arch/x86/boot/bzImage"
        words = (
            # No RTC, no i8042 in this machine: the kernel would look for them for seconds.
            "console=ttyS0 quiet panic=-1 8250.nr_uarts=1 tsc=reliable no_timer_check "
            f"initcall_blacklist=cmos_init,i8042_init remus.ip={GUEST_IP}/24{self.disk_words}"
        )
        machine = {
            "microvm": ("microvm,acpi=off,rtc=off", "virtio-net-device"),
            # Its doorbell among the I/O ports: half the guests ended at the first touch of one in memory (reset_by_emulation).
            "q35": ("q35", "virtio-net-pci,romfile=,modern-pio-notify=on"),
        }
        board, nic = machine[o.machine]
        command = [
            "qemu-system-x86_64", "-name", "{name}", "-machine", f"{board},memory-backend=ram",
            "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", f"{o.memory}M",
            "-object", "memory-backend-file,id=ram,size={memory},mem-path={ram},share=on",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-kernel", kernel, "-initrd", o.guest, "-append", words,
            "-serial", f"file:{self.sockets}/{{name}}.console",
            "-qmp", "unix:{qmp},server=on,wait=off",
            # For `look`: remusctl keeps the other one.
            "-monitor", f"unix:{self.sockets}/{{name}}.monitor,server=on,wait=off",
            "-netdev", "tap,id=net,ifname={port},script=no,downscript=no" + (",vhost=on" if o.vhost else ""),
            "-device", f"{nic},netdev=net,mac={GUEST_MAC}",
        ]  # fmt: skip
        self.machine = command
        self.describe("web", "web-b")
        command = command + (self.disks.arguments("web") if self.disks else [])
        places = {"name": "web", "memory": str(o.memory << 20), "ram": "/dev/remus/web",
                  "qmp": f"{self.sockets}/web.qmp", "port": "tap-a"}  # fmt: skip
        for key, value in places.items():
            command = [word.replace("{" + key + "}", value) for word in command]
        return command

    def standby_is_as_described(self):
        """The waiting domain has what the file says of its memory, not what is usual."""
        # It opens the disks before it makes the domain.
        ready = lambda: any(e.get("event") == "standby-ready" for e in self.secondary.read())  # noqa: E731
        self.wait_for("the standby's machine", ready, 60, "standby")
        limit = json.loads(self.ctl("beta", "domain", "show", "web-b", "--json").stdout)["hot-limit"]
        if limit != HOT_MIB << 20:
            raise Failed(f"the file gives hot pages {HOT_MIB} MiB, and the standby's domain has {limit} bytes for them")

    def describe(self, here, there):
        """Writes HERE.toml: the domain of this name, which the other host runs under the other name."""
        o = self.options
        command, mine, theirs = self.machine, "", ""
        if self.disks:
            command = command + self.disks.arguments(there, placeholders=True)
            mine, theirs = self.disks.tables(here, there)
        # A JSON array of strings is a TOML array of strings.
        text = (
            f'name = "{here}"\nmemory = "{o.memory}M"\nports = ["tap-a"]\n'
            f'interval_ms = {o.interval}\ntimeout_ms = {o.timeout}\nhot_limit = "{HOT_MIB}M"\n\n'
            f"{mine}[vmm]\ncommand = {json.dumps(command)}\n\n[standby]\nports = [\"tap-b\"]\n{theirs}"
        )
        with open(f"{self.logs}/{here}.toml", "w", encoding="utf-8") as file:
            file.write(text)

    def with_disks(self, name):
        """How protect gets to know the disks."""
        return ["--config", f"{self.logs}/{name}.toml"] if self.disks else []

    def ask_guest(self, script, seconds):
        """Runs a script in a guest that has disks; returns what it prints."""
        command = ["ip", "netns", "exec", "client", "busybox", "nc", GUEST_IP, str(SHELL_PORT)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        words, begin = f"({script}) </dev/null 2>&1; echo \"status $?\"\n", time.monotonic()
        # Who would notice the guest's end.
        owner = self.processes.get("qemu" if self.active() == "web" else "standby")
        if owner and owner.poll() is not None:
            # A standby leaves its machine alone once that is protected again.
            owner = None
        try:
            while True:
                try:
                    out, err = process.communicate(words, timeout=2)
                    break
                except subprocess.TimeoutExpired:
                    # They are on their way.
                    words = None
                    if time.monotonic() - begin > seconds:
                        raise Failed(f"the guest did not end '{script}' within {seconds} s") from None
                    if owner and owner.poll() is not None:
                        raise Failed(f"the guest ended while it was to do '{script}'") from None
        finally:
            process.kill()
        said, _, status = out.rpartition("status ")
        if status.strip() != "0":
            raise Failed(f"'{script}' failed in the guest: {tail_of(out or err)}")
        return said

    def keys(self, host):
        """Its half of a pair of keys, which are made when the first one is asked for."""
        if not os.path.exists(f"{self.sockets}/{host}.pem"):
            sh(REMUSCTL, "keys", "make", "--names", "alpha,beta", "--out", self.sockets)
        return f"{self.sockets}/{host}.pem"

    def security(self, host):
        """How a controller gets to know its keys, or that it is to do without."""
        return ["-F"] if self.plain else ["--keys", self.keys(host)]

    def run_dir(self, host):
        """Where a host's controllers have their sockets."""
        return f"/run/remus-{host}"

    def ctl(self, namespace, *arguments, check=True):
        return sh("env", f"REMUS_RUN_DIR={self.run_dir(namespace)}", REMUSCTL, *arguments, namespace=namespace, check=check)

    def start_guest(self):
        """Starts the guest on alpha; guest_up() waits for it."""
        o = self.options
        self.network()
        vmm = self.config()
        self.ctl("alpha", "domain", "add", "web", "--memory", f"{o.memory}M", "--port", "tap-a")
        tell(f"alpha: starting the guest, {o.memory} MiB under KVM, Redis in it")
        self.begun = time.monotonic()
        self.start("qemu", vmm, "alpha")

    def guest_up(self):
        console = f"{self.sockets}/web.console"
        self.wait_for("the guest's boot", lambda: "READY" in tail(console, 3), GUEST_BOOT_LIMIT, "qemu")
        self.boot_s = time.monotonic() - self.begun
        tell(f"alpha: the guest is up after {self.boot_s:.1f} s")

    def sniff(self, host):
        """Notes when which frame of the guest comes from a host."""
        self.start(f"sniff-{host}", [sys.executable, f"{HERE}/sniff.py", f"{host}0", GUEST_MAC, self.path(f"{host}.frames")], None)

    def frames(self, host):
        """Times of the guest's frames from a host (Unix, s)."""
        with open(self.path(f"{host}.frames"), encoding="ascii") as file:
            return [float(line.split()[0]) for line in file if line.endswith("\n")]

    def start_standby(self):
        o = self.options
        standby = self.start(
            "standby",
            [REMUSCTL, "standby", *self.security("beta"), "--config", f"{self.logs}/web.toml", "--as", "web-b", "--port", "tap-b",
             "--listen", f"{BETA_IP}:{PORT}", "--timeout", str(o.timeout), "--trace", self.path("standby.trace")],
            "beta", REMUS_RUN_DIR=self.run_dir("beta"),
        )  # fmt: skip
        self.wait_for("the standby's start", lambda: listens(standby.pid, PORT), 60, "standby")
        tell("beta: the standby listens")

    def start_protect(self, *how):
        """Protects the guest, with these options instead of an interval if there are any."""
        o = self.options
        known = len(self.epochs())
        self.start(
            "protect",
            [REMUSCTL, "protect", "web", *self.security("alpha"), "--qmp", f"{self.sockets}/web.qmp", "--to", f"{BETA_IP}:{PORT}",
             *self.with_disks("web"), *(how or ("-i", str(o.interval))), "--timeout", str(o.timeout), "--trace", self.path("protect.trace")],
            "alpha", REMUS_RUN_DIR=self.run_dir("alpha"),
        )  # fmt: skip
        begin = time.monotonic()
        self.wait_for("the first epoch", lambda: len(self.epochs()) > known, 120, "qemu", "standby", "protect")
        first = self.epochs()[known]
        tell(
            f"alpha: protected after {time.monotonic() - begin:.1f} s"
            f" (first copy: {first.get('dirty_pages')} pages, {first.get('bytes', 0) / 1e6:.1f} MB)"
        )

    def partition(self, heal=False):
        """Cuts the way between the two hosts, and nothing else: each still reaches, and is reached by, the clients."""
        verb = "del" if heal else "add"
        for host, other in (("alpha", BETA_IP), ("beta", ALPHA_IP)):
            ip_batch([f"route {verb} blackhole {other}/32"], host)

    def epochs(self):
        return [e for e in self.primary.read() if e.get("event") == "epoch"]

    def watch(self, seconds, *watched):
        """Let it run, and say how it goes."""
        end, shown = time.monotonic() + seconds, 0.0
        while time.monotonic() < end:
            for name in watched:
                self.alive(name)
            if time.monotonic() - shown >= (0.5 if TERMINAL else 4):
                shown = time.monotonic()
                tell.live(self.state())
            time.sleep(max(0.0, min(0.1, end - time.monotonic())))

    def look(self):
        """No reply came: note where frames still go and what the guest does, for whoever wants to know why."""
        name = self.active()
        with open(f"{self.logs}/look.txt", "w", encoding="utf-8") as file:
            for _ in range(2):
                file.write(f"# guest\n{ask_monitor(f'{self.sockets}/{name}.monitor', *LOOK)}\n")
            file.write(f"# its console\n{tail(f'{self.sockets}/{name}.console', 40)}\n")
            for path in [f"{self.logs}/{name}.log" for name in self.processes] + [f"{self.run_dir('beta')}/web-b.vmm.log"]:
                file.write(f"# {os.path.basename(path)}\n{tail(path, 8)}\n")
            for namespace, command in (
                (None, ["bridge", "fdb", "show", "br", "lan"]),
                ("beta", ["bridge", "fdb", "show", "br", "br0"]),
                ("client", ["ip", "neigh"]),
                ("client", ["ss", "-tnoi"]),
                ("beta", ["ip", "-s", "link", "show", "tap-b"]),
                ("beta", ["tc", "-s", "qdisc", "show"]),
                ("client", ["ping", "-c", "3", "-W", "1", GUEST_IP]),
                ("client", ["ss", "-tnoi"]),
                ("beta", ["ip", "-s", "link", "show", "tap-b"]),
                (None, ["dmesg", "--ctime"]),
            ):
                done = sh(*command, namespace=namespace, check=False)
                file.write(f"# {namespace or 'root'}: {' '.join(command)}\n{done.stdout}{done.stderr}\n")
        with open(f"{self.logs}/look.txt", encoding="utf-8") as file:
            print("".join(f"# | {line}" for line in file), flush=True)

    def reset_by_emulation(self):
        """Whether the guest has ended by a triple fault, of which its kernel says nothing, on an emulated processor.

        What `leave_first_processor` keeps away did that to one guest in fifteen. What the guest's kernel gives up by itself it says on
        its console. Or KVM gives up first: as the tables that CR3 points to are outside of the guest's memory, which no page that was
        lost or torn could do to a register; or as it takes an access to a device's register for part of an event's delivery. It looks at
        the type of the last event, but not at whether that is valid (svm_check_emulate_instruction()), and the emulated processor
        leaves there that of an exception which was delivered long ago (QEMU's do_interrupt_all(), do_vmexit()). Where KVM knows the register already it only tries again.
        """
        if os.environ.get("REMUS_ACCEL") == "kvm":
            return False
        told = "".join(tail(f"{self.logs}/{name}.log") for name in self.processes)
        ended = "(guest-reset)" in told or "has ended (exit status: 0)" in told or self.processes["qemu"].returncode == 0
        words = "".join(tail(f"{self.logs}/{name}.console", 1000) for name in ("web", "web-b"))
        given_up = "".join(tail(f"{self.logs}/{name}.log", 100) for name in ("qemu", "web-b.vmm"))

        def foreign(address):
            found = re.search(rf"KVM internal error{address}", given_up, re.DOTALL)
            return bool(found) and int(found[1], 16) >= self.options.memory << 20

        # The fourth number is the access's address (kvm_prepare_event_vectoring_exit()).
        delivery, tables = r"\. Suberror: 3\n.*?data\[3\]: 0x([0-9a-f]+)", ".*?CR3=([0-9a-f]+)"
        return (ended or foreign(delivery) or foreign(tables)) and "Kernel panic" not in words

    def takeover(self):
        """What the standby says of its take-over."""
        events = [e for e in self.secondary.read() if e.get("event") == "takeover"]
        return events[0] if events else None

    def active(self):
        """The name of the machine that should answer."""
        return "web" if self.takeover() is None else "web-b"

    def state(self):
        """What goes on, in a few words."""
        return f"{len(self.epochs())} epochs"

    def end(self):
        """End what this run has started; whatever is in the two hosts' namespaces is its own."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        for namespace in ("alpha", "beta", "client"):
            while os.path.exists(f"/run/netns/{namespace}") and (left := members(namespace)):
                kill(left)
                time.sleep(0.02)
        for process in self.processes.values():
            process.wait()
        for namespace, domain in (("alpha", "web"), ("beta", "web-b")):
            if os.path.exists(f"/run/netns/{namespace}"):
                self.ctl(namespace, "domain", "del", domain, check=False)
        for namespace in ("alpha", "beta", "client"):
            sh("ip", "netns", "del", namespace, check=False)
            # A dead namespace takes its veth along, but not at once.
            sh("ip", "link", "del", f"{namespace}0", check=False)
        sh("ip", "link", "del", "lan", check=False)
        for path in [f"{self.sockets}/{name}" for name in os.listdir(self.sockets)] + [f"{self.run_dir('beta')}/web-b.vmm.log"]:
            if os.path.isfile(path):
                subprocess.run(["cp", path, self.logs], check=False)
        subprocess.run(["rm", "-rf", self.sockets], check=False)
