# SPDX-License-Identifier: GPL-2.0
"""The demo with both controllers as units of a systemd, as `make install` leaves them.

Its systemd is the first process of namespaces of its own (processes, mounts, control groups) and knows only the units that
matter here. The two units of the one machine get what differs between two hosts from a drop-in each.
"""

import json
import os
import signal
import subprocess

import report
from hosts import ALPHA_IP, BETA_IP, PORT, REMUSCTL, TOP, Failed, gone, listens, sh, tell
from takeover import Takeover

CONFIG = "/etc/remus"
LOGS = "/var/log/remus"
UNITS = "/run/demo-units"
GROUP = "/sys/fs/cgroup/demo-units"
# What the installed units and the journal want, and nothing else of a whole system.
TARGETS = ("sysinit", "basic", "shutdown", "network-online", "multi-user")
JOURNAL = ("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket")
# Sooner than the unit's minute.
WATCHDOG_S = 8


def main_process(group, number):
    """The process of one of systemd's control groups that has this number in there, by its number out here; 0 if none has."""
    try:
        with open(f"{GROUP}{group}/cgroup.procs", encoding="ascii") as file:
            pids = file.read().split()
        for pid in pids:
            with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
                if f"NSpid:\t{pid}\t{number}\n" in file:
                    return int(pid)
    except OSError:
        pass
    return 0


class Unit:
    """The main process of a unit, in the place of a `Popen`."""

    def __init__(self, name, group, number):
        self.name, self.group = name, group
        self.pid = main_process(group, number)
        if not self.pid:
            raise Failed(f"{name} has no process")
        self.returncode = None

    def poll(self):
        if self.returncode is None and gone(self.pid):
            self.returncode = 255
        return self.returncode

    def kill(self):
        pass

    def wait(self, timeout=None):
        """Systemd ends with the run, and all its processes with it."""


class Units(Takeover):
    """One guest, one death of its host; the controllers are units."""

    def __init__(self, number, options):
        super().__init__(number, options)
        # The one place that both units may write to, and so may be looked for afterwards.
        os.makedirs(LOGS, mode=0o700, exist_ok=True)
        self.primary = report.trace(f"{LOGS}/protect.trace")
        self.secondary = report.trace(f"{LOGS}/standby.trace")

    def boot(self):
        """Installs what has been built, and starts the systemd."""
        sh("env", "DESTDIR=", f"{TOP}/scripts/install.sh")
        os.makedirs(UNITS)
        os.makedirs(GROUP)
        for target in TARGETS:
            with open(f"{UNITS}/{target}.target", "w", encoding="ascii") as file:
                file.write(f"[Unit]\nDescription={target}\nDefaultDependencies=no\n")
        for unit in JOURNAL:
            os.symlink(f"/lib/systemd/system/{unit}", f"{UNITS}/{unit}")
        # What is mounted, and so each network namespace, is seen in there.
        sh("mount", "--make-rshared", "/")
        begin = (
            f"echo $$ >{GROUP}/cgroup.procs && exec unshare --cgroup --pid --fork --kill-child --mount --mount-proc --propagation slave sh -c '"
            "umount /sys/fs/cgroup && mount -t cgroup2 cgroup /sys/fs/cgroup && exec env -i container=demo PATH=/usr/sbin:/usr/bin:/sbin:/bin "
            f"SYSTEMD_UNIT_PATH={UNITS}:/usr/local/lib/systemd/system "
            "/lib/systemd/systemd --system --unit=multi-user.target --log-target=console --show-status=0'"
        )
        self.start("systemd", ["sh", "-c", begin], None)
        self.wait_for("the start of systemd", lambda: self.inside("systemctl", "is-system-running", check=False).stdout == "running\n", 60, "systemd")
        self.inside("systemctl", "start", *JOURNAL[1:])
        tell("systemd is up")

    def inside(self, *command, check=True):
        """Runs a command where systemd and its units are."""
        # It moves into a group of its own as soon as it can.
        first = main_process("/init.scope", 1)
        if not first:
            return subprocess.CompletedProcess(command, 1, "", "")
        return sh("nsenter", "-t", str(first), "--mount", "--pid", "--cgroup", *command, check=check)

    def property(self, unit, name):
        return self.inside("systemctl", "show", "-P", name, unit).stdout.strip()

    def unit(self, name):
        return Unit(name, self.property(name, "ControlGroup"), self.property(name, "MainPID"))

    def start_unit(self, name, kind, host, words):
        """Starts a unit with these options beyond the file's; it has started when it says that it is ready."""
        unit = f"remus-{kind}@web.service"
        os.makedirs(f"{UNITS}/{unit}.d", exist_ok=True)
        with open(f"{UNITS}/{unit}.d/host.conf", "w", encoding="utf-8") as file:
            file.write(
                f"[Service]\nNetworkNamespacePath=/run/netns/{host}\nWatchdogSec={WATCHDOG_S}\n"
                f"Environment=\"REMUS_OPTIONS={' '.join(words)} --trace {LOGS}/{kind}.trace\"\n"
            )
        self.inside("systemctl", "daemon-reload")
        done = self.inside("systemctl", "start", unit, check=False)
        if done.returncode != 0:
            raise Failed(f"{unit} does not start: {done.stderr.strip()} {self.said(unit)}")
        self.processes[name] = self.unit(unit)

    def said(self, unit):
        """The last that a unit has said to the journal."""
        return self.inside("journalctl", "-q", "--no-pager", "-o", "cat", "-n", "6", "-u", unit, check=False).stdout.strip()

    def run_dir(self, host):
        return "/run/remus"

    def alive(self, name):
        process = self.processes[name]
        if isinstance(process, Unit) and process.poll() is not None:
            raise Failed(f"{process.name} has ended: {self.said(process.name)}")
        super().alive(name)

    def keys(self, host):
        os.makedirs(CONFIG, mode=0o700, exist_ok=True)
        if not os.path.exists(f"{CONFIG}/{host}.pem"):
            sh(REMUSCTL, "keys", "make", "--names", "alpha,beta", "--out", CONFIG)
        return f"{CONFIG}/{host}.pem"

    def start_standby(self):
        self.boot()
        keys = self.keys("beta")
        sh("cp", f"{self.logs}/web.toml", f"{CONFIG}/web.toml")
        words = ["--keys", keys, "--as", "web-b", "--port", "tap-b", "--listen", f"{BETA_IP}:{PORT}"]
        self.start_unit("standby", "standby", "beta", words)
        if not listens(self.processes["standby"].pid, PORT):
            raise Failed("the standby's unit has started, and it does not listen")
        tell("beta: the standby's unit is ready, and listens")
        self.outlives_a_hang()

    def outlives_a_hang(self):
        """A standby that hangs is ended by systemd's watchdog, and another one stands by."""
        old = self.processes["standby"]
        os.kill(old.pid, signal.SIGSTOP)

        def another():
            return self.property(old.name, "NRestarts") == "1" and self.property(old.name, "ActiveState") == "active"

        self.wait_for("another standby", another, 90, "systemd")
        self.processes["standby"] = self.unit(old.name)
        tell("beta: the standby hung, and its watchdog had it started again")

    def start_protect(self, *how):
        words = ["--keys", self.keys("alpha"), "--qmp", f"{self.sockets}/web.qmp", "--to", f"{BETA_IP}:{PORT}", *how]
        self.start_unit("protect", "protect", "alpha", words)
        if not self.epochs():
            raise Failed("the unit of protect has started, and the standby holds no epoch")
        tell(f"alpha: the unit of protect is ready: {self.property('remus-protect@web.service', 'StatusText')}")
        self.wait_for("the standby's word in the journal", lambda: self.entries("remus-standby@web.service"), 30, "protect", "standby")

    def entries(self, unit):
        """What a unit has said to the journal with all the fields that documents promise."""
        text = self.inside("journalctl", "-q", "--no-pager", "-o", "json", "-u", unit).stdout
        return [e for e in map(json.loads, text.splitlines()) if {"DOMAIN", "EPOCH", "PEER", "PRIORITY"} <= e.keys()]

    def taken_over(self):
        """The machine that was taken over outlives the controller that started it."""
        unit = self.processes["standby"].name
        known = len(self.replies.read())
        self.inside("systemctl", "stop", unit)
        if self.property(unit, "Result") != "success":
            raise Failed(f"the standby's unit ended with {self.property(unit, 'Result')}: {self.said(unit)}")
        self.wait_for("a reply without a controller", lambda: len(self.replies.read()) > known + 10, 60, "client")
        tell("beta: the standby's unit is stopped, and the guest lives on")

    def end(self):
        if "systemd" in self.processes:
            with open(f"{self.logs}/journal.log", "w", encoding="utf-8") as file:
                file.write(self.inside("journalctl", "-q", "--no-pager", check=False).stdout)
            for kind in ("protect", "standby"):
                subprocess.run(["cp", f"{LOGS}/{kind}.trace", self.logs], check=False)
        super().end()
