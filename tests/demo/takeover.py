# SPDX-License-Identifier: GPL-2.0
"""One guest, one death of its host, as a client sees it."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import report
from hosts import (
    ALPHA_IP,
    GUEST_IP,
    HERE,
    PORT,
    REMUSCTL,
    Failed,
    Hosts,
    ask_monitor,
    gone,
    kill,
    link_down,
    listens,
    members,
    sh,
    tail,
    tell,
)

# A frame that a commit has let go before the death may still be on its way through the kernel.
GRACE_S = 0.5
# For the last round of fio, and what else a guest does before its disks are still, in seconds.
STILL_LIMIT = 900


class Takeover(Hosts):
    """One guest, one death of its host."""

    def __init__(self, number, options, kill=None, logs="demo"):
        super().__init__(f"{logs}-{number}", options, f"{logs}/run-{number}")
        self.number = number
        self.kill = kill or options.kill[(number - 1) % len(options.kill)]
        self.again = None
        self.first = None
        self.dead = 0.0
        # What is wrong with the disks, and why that could not be found out.
        self.disk_faults, self.trouble = None, None
        self.replies = report.records(self.path("client.records"))

    def alive(self, name):
        if name == "client" and self.processes[name].poll() is not None:
            raise Failed(f"the client gave up: {self.summary().get('error')}")
        super().alive(name)

    def protect(self):
        if self.options.disks:
            # A planned switch is the one after which the primary's images are those of the epoch that goes on, too.
            self.add_disks(self.options.disks, self.number, overlay=self.kill == "failover")
        self.start_guest()
        # Started while nothing is measured yet.
        self.sniff("alpha")
        self.sniff("beta")
        self.start(
            "client",
            [sys.executable, f"{HERE}/client.py", GUEST_IP, "6379", self.path("client.records"), self.path("client.json"),
             *(["ledger"] if self.disks else [])],
            "client",
        )
        self.guest_up()
        for name in ("sniff-alpha", "sniff-beta", "client"):
            self.wait_for(f"the start of {name}", lambda n=name: "ready" in tail(f"{self.logs}/{n}.log"), 60, name)
        self.start_standby()
        self.standby_is_as_described()
        self.start_protect()

    def state(self):
        replies = self.replies.read()
        last = f", the last in {replies[-1][1]:.0f} ms" if replies else ""
        return f"{len(self.epochs())} epochs, {len(replies)} replies{last}"

    def run(self):
        o = self.options
        self.protect()
        client = self.processes["client"]
        client.send_signal(signal.SIGUSR1)
        self.wait_for("the client's first reply", self.replies.read, 90, "client", "protect", "standby")
        tell("client: connected, one INCR after the other")
        low, high = (3, 8) if o.runs > 1 else (8, 10)
        self.watch(random.uniform(low, high), "qemu", "standby", "protect", "client")
        if self.kill == "failover":
            self.change_pace()

        what = {
            "all": "everything on alpha is killed and its link cut",
            "remusctl": "only remusctl on alpha is killed; guest and link stay",
            "qemu": "only QEMU on alpha is killed",
            "standby": "everything on beta is killed",
            "partition": "the way between alpha and beta is cut; both still reach the client",
            "failover": "nothing dies; alpha is told to hand the guest over",
        }[self.kill]
        before = self.state()
        # "ip netns exec" becomes the program itself, so these are the programs' own pids.
        victims = {
            "all": members("alpha"),
            "remusctl": [self.processes["protect"].pid],
            "qemu": [self.processes["qemu"].pid],
            "standby": members("beta"),
        }.get(self.kill, [])
        # A host that loses power closes no connection: with the link cut first only silence tells of its
        # death. With the processes first, the kernel may still close their connections.
        link_first = self.kill == "all" and (o.runs == 1 or random.random() < 0.5)
        self.killed = time.time()
        if link_first:
            link_down("alpha0")
        kill(victims)
        if self.kill == "all":
            link_down("alpha0")
            while left := members("alpha"):
                kill(left)
        if self.kill == "partition":
            self.partition()
        # On a busy host the kill itself takes a while.
        while not all(gone(pid) for pid in victims):
            time.sleep(0.002)
        self.dead = time.time()
        if victims:
            self.first = "link" if link_first else "processes"
        tell(f"{'KILL' if victims else 'NOW'}: {what} ({before})")

        def went_on():
            return self.resumed() and [r for r in self.replies.read() if r[0] >= self.resumed()]

        try:
            if self.kill == "standby":
                self.protect_again()
            if self.kill == "failover":
                self.hand_over()
            after = self.wait_for("a reply after that", went_on, o.timeout / 1000 + 60, "client")
            tell(f"client: its connection goes on, first reply {(after[0][0] - self.killed) * 1000:.0f} ms after the kill")
            self.watch(o.after or (3 if o.runs > 1 else 5), "client")
            known = len(self.replies.read())
            self.wait_for("another reply", lambda: len(self.replies.read()) > known, 60, "client")
            if self.kill == "partition":
                self.gave_up()
            if self.kill == "all":
                self.taken_over()
        except Failed as e:
            tell(str(e))
            self.look()
        # An outage longer than the patience above is one all the same.
        client.terminate()
        try:
            client.wait(120)
        except subprocess.TimeoutExpired:
            client.kill()
        for host in ("alpha", "beta"):
            self.processes[f"sniff-{host}"].terminate()
            self.processes[f"sniff-{host}"].wait()
        if self.disks:
            try:
                self.check_disks()
            except Failed as e:
                tell(str(e))
                self.trouble = str(e)
        return self.result()

    def close_standby(self):
        """Ends the standby when it has applied everything: not before it was closed is all of a qcow2 image in its file."""
        name = "standby-back" if "standby-back" in self.processes else "standby"
        trace = report.trace(self.path(f"{name}.trace"))
        known = len(trace.read())
        later = lambda: sum(e.get("event") == "epoch" for e in trace.read()[known:])  # noqa: E731
        self.wait_for("three more epochs on the standby", lambda: later() >= 3, 60, name)
        standby = self.processes[name]
        standby.terminate()
        standby.wait(60)

    def check_disks(self):
        """The guest ends what it does and unmounts its disks; then what is on them is looked at from the host."""
        name = self.active()
        try:
            self.ask_guest("/bin/disk still", STILL_LIMIT)
        finally:
            # Also of one that was cut off and runs on: it must not notice.
            for machine in "web", "web-b":
                wrong = [line for line in self.console(machine) if "FIO FAILED" in line]
                self.blame(wrong[0] if wrong else None, machine)
        rounds = sum("fio verified round" in line for line in self.console(name))
        if self.kill == "standby" or "protect-back" in self.processes:
            self.close_standby()
            self.blame(self.disks.differ(), "on the two hosts")
        if self.kill == "failover":
            # Neither guest has written to what is compared since the switch.
            self.quit("web")
            self.blame(self.disks.differ(), "at the switch")
        self.quit(name)
        self.blame(self.disks.faults(name, self.summary()["requests"]), "in the end")
        if not self.disk_faults:
            tell(f"disks: clean, every entry that the client was told of is there, {rounds} rounds verified on this host")

    def blame(self, faults, when):
        """Keeps the first fault, and goes on."""
        if faults:
            tell(f"disks, {when}: {faults}")
            self.disk_faults = self.disk_faults or f"{when}: {faults}"

    def console(self, name):
        """Lines that a machine has written."""
        try:
            with open(f"{self.sockets}/{name}.console", encoding="utf-8", errors="replace") as file:
                return file.read().splitlines()
        except FileNotFoundError:
            return []

    def quit(self, name):
        """Ends a machine; what it has not written to its images yet, it writes."""
        path = f"{self.sockets}/{name}.monitor"
        ask_monitor(path, "quit")
        self.wait_for(f"the end of {name}", lambda: "Connection refused" in ask_monitor(path) or not os.path.exists(path), 60)

    def change_pace(self):
        """Other rules for when an epoch ends, while the guest is protected: it goes on answering under each."""
        for words in ("--on-output", "--floor", "5"), ("--target-latency", "60"), ("-i", str(self.options.interval)):
            known = len(self.replies.read())
            self.ctl("alpha", "set", "web", *words)
            watched = ("qemu", "standby", "protect", "client")
            self.wait_for(f"replies with {words[0]}", lambda k=known: len(self.replies.read()) > k + 5, 60, *watched)
            pace = json.loads(self.ctl("alpha", "status", "web", "-j").stdout)["controller"]["pace"]
            last = [f"{reply[1]:.0f}" for reply in self.replies.read()[-3:]]
            tell(f"alpha: an epoch ends {pace}; the last replies in {', '.join(last)} ms")

    def hand_over(self):
        """The planned switch: alpha's controller ends in good order, and beta's runs the guest."""
        self.ctl("alpha", "failover", "web")
        protect = self.processes["protect"]
        self.wait_for("the end of protect", lambda: protect.poll() is not None, self.options.timeout / 1000 + 60)
        if protect.returncode != 0:
            raise Failed(f"remusctl protect ended with {protect.returncode}, not 0, when it had handed the guest over")

    def noticed_loss(self):
        """The primary notices that its standby is lost, and lives on."""
        lost = lambda: any(e.get("event") == "standby-lost" for e in self.primary.read())  # noqa: E731
        self.wait_for("the primary's notice", lost, self.options.timeout / 1000 + 60, "qemu", "protect")
        tell("alpha: the standby's loss is noticed; the guest runs on, its output is held")

    def gave_up(self):
        """A primary that is cut off is mute, and ends when it can hear that it was replaced."""
        self.noticed_loss()
        self.partition(heal=True)
        protect = self.processes["protect"]
        self.wait_for("the end of protect", lambda: protect.poll() is not None, self.options.timeout / 1000 + 60)
        if protect.returncode != 3:
            raise Failed(f"remusctl protect ended with {protect.returncode}, not 3, when it had been replaced")
        self.alive("qemu")
        tell("alpha: the way is open again; protect has heard of the take-over and ended")

    def protect_again(self):
        """The primary has lost its standby: it must stay mute until it has another one."""
        self.noticed_loss()
        self.watch(2, "qemu", "client")
        self.again = time.time()
        known = len(self.epochs())
        self.ctl("beta", "domain", "del", "web-b")
        self.start_standby()
        self.wait_for("protection by it", lambda: len(self.epochs()) > known, 120, "qemu", "standby", "protect")

    def taken_over(self):
        """What else is looked at when the standby has replaced a host that died."""
        if self.options.back:
            self.protect_back()

    def protect_back(self):
        """The machine that was taken over is protected by the host that had died, without a restart."""
        o = self.options
        known = len(self.replies.read())
        # What alpha hears of the guest from here on is not what it sends.
        self.processes["sniff-alpha"].terminate()
        self.processes["sniff-alpha"].wait()
        sh("ip", "link", "set", "alpha0", "up")
        self.ctl("alpha", "domain", "del", "web")
        self.describe("web-b", "web")
        standby = self.start(
            "standby-back",
            [REMUSCTL, "standby", "--keys", self.keys("alpha"), "--config", f"{self.logs}/web-b.toml", "--as", "web", "--port", "tap-a",
             "--listen", f"{ALPHA_IP}:{PORT}", "--timeout", str(o.timeout), "--trace", self.path("standby-back.trace")],
            "alpha", REMUS_RUN_DIR=self.run_dir("alpha"),
        )  # fmt: skip
        self.wait_for("the standby's start", lambda: listens(standby.pid, PORT), 60, "standby-back")
        # It leaves the machine, and its QMP socket, to whoever protects it now.
        self.processes["standby"].terminate()
        self.processes["standby"].wait(20)
        self.ctl("beta", "domain", "set", "web-b", "--port", "tap-b", "--passthrough")
        trace = report.trace(self.path("protect-back.trace"))
        self.start(
            "protect-back",
            [REMUSCTL, "protect", "web-b", "--keys", self.keys("beta"), "--qmp", f"{self.run_dir('beta')}/web-b.qmp", "--to", f"{ALPHA_IP}:{PORT}",
             *self.with_disks("web-b"), "-i", str(o.interval), "--timeout", str(o.timeout), "--trace", self.path("protect-back.trace")],
            "beta", REMUS_RUN_DIR=self.run_dir("beta"),
        )  # fmt: skip
        begin = time.monotonic()
        watched = ("standby-back", "protect-back", "client")
        self.wait_for("protection the other way", lambda: any(e.get("event") == "epoch" for e in trace.read()), 120, *watched)
        tell(f"beta: protected by alpha after {time.monotonic() - begin:.1f} s, without a restart")
        self.wait_for("replies under it", lambda: len(self.replies.read()) > known + 20, 30, *watched)
        self.watch(2, *watched)

    def resumed(self):
        """When the guest could be heard again (Unix, s): taken over, or protected again."""
        if self.kill == "standby":
            return self.again
        event = self.takeover()
        return (event["t_ms"] - event.get("announce_ms", 0)) / 1000 if event else None

    def noticed(self):
        """When the standby began to take over (Unix, s)."""
        event = self.takeover()
        return self.resumed() - (event["load_ms"] + event["resume_ms"]) / 1000 if event else None

    def summary(self):
        """What the client says of itself."""
        try:
            with open(self.path("client.json"), encoding="ascii") as file:
                return json.load(file)
        except (OSError, ValueError):
            return {
                "requests": len(self.replies.read()),
                "lost": 0,
                "duplicated": 0,
                "connection": "broken",
                "error": f"it left no summary: {tail(f'{self.logs}/client.log')}",
            }

    def result(self):
        replies = self.replies.read()
        summary = self.summary()
        resumed = self.resumed()
        earlier = [r for r in replies if resumed is None or r[0] < resumed]
        later = [r for r in replies if resumed is not None and r[0] >= resumed]
        outage = (later[0][0] - earlier[-1][0]) * 1000 if earlier and later else None
        if not later and summary["connection"] == "kept":
            summary |= {"connection": "broken", "error": "no reply after the kill"}
        frames, event = self.frames("alpha"), self.takeover()
        if self.kill in ("partition", "failover"):
            # It may speak until the standby takes over, and not a moment longer.
            mute = self.noticed() or self.dead + GRACE_S
        else:
            # Only a bound: what was let go by the last commit may come within the grace.
            mute = self.dead + GRACE_S
        leaked = [t for t in frames if t > mute and not (self.again and t > self.again)]
        first = next((t for t in self.frames("beta") if resumed is not None and t >= resumed), None)
        return {
            "epochs": self.epochs(),
            "replies": replies,
            "killed": self.killed,
            "resumed": resumed,
            "first_after": later[0][0] if later else None,
            "outage_ms": None if outage is None else round(outage, 1),
            "requests": summary["requests"],
            "lost": summary["lost"],
            "duplicated": summary["duplicated"],
            "connection": summary["connection"],
            "error": summary.get("error") or self.trouble,
            "disks": str(self.disks) if self.disks else None,
            "disk_faults": self.disk_faults,
            "frames_from_alpha": len(frames),
            "frames_after_kill": len(leaked),
            "kill": self.kill,
            "died_first": self.first,
            "boot_s": round(self.boot_s, 1),
            "takeover": {k: v for k, v in event.items() if k not in ("event", "t_ms")} if event else None,
            # Of the guest on beta, and from when the standby began to take over.
            "first_packet_ms": None if first is None else round((first - resumed) * 1000, 1),
            "after_detection_ms": None if first is None or event is None else round((first - self.noticed()) * 1000, 1),
        }


def good(result):
    return (
        result["connection"] == "kept"
        and result["lost"] == 0
        and result["duplicated"] == 0
        and result["frames_after_kill"] == 0
        and result["disk_faults"] is None
        and result["error"] is None
        and (result["takeover"] is None) == (result["kill"] == "standby")
        and result["outage_ms"] is not None
    )
