# SPDX-License-Identifier: GPL-2.0
"""What the kernel tests share: registration, the module, the kernel's log, clean-up."""
import contextlib
import errno
import fnmatch
import gzip
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback

import netlink
from ram import check, close_all, libc

LONG = bool(os.environ.get("REMUS_LONG"))
DEBUG = os.environ.get("REMUS_FLAVOUR") == "debug"
TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MODULE = os.environ.get("REMUS_MODULE") or f"{TOP}/build/module{'-debug' if DEBUG else ''}/remus_buf.ko"
SEED = int(os.environ.get("REMUS_SEED") or random.SystemRandom().randrange(1 << 31))


def scaled(short, long=None):
    """How often to do something: `long` with --long."""
    return (long or short * 10) if LONG else short


class Skip(Exception):
    """A test that cannot run here, and why."""


class Timeout(BaseException):
    """A test that took too long."""


TESTS = []


def test(fn=None, *, loaded=True, seconds=600):
    """Registers a test. `loaded`: with the module freshly loaded, and unloaded afterwards. After `seconds` it hangs: many
    times what it takes, as the machine may be an emulated one on a busy host."""
    def register(f):
        TESTS.append((f"{f.__module__.removeprefix('t_')}.{f.__name__}", f, loaded, seconds))
        return f
    return register(fn) if fn else register


# Claims


def same(got, want, what=""):
    if got != want:
        raise AssertionError(f"{what}: got {short(got)}, want {short(want)}")


def true(condition, what):
    if not condition:
        raise AssertionError(what)


def short(value):
    text = repr(value)
    return text if len(text) < 600 else text[:450] + " … " + text[-120:]


def setting(stack, path, value):
    """Writes to a file below /proc/sys or /sys, until the end of the test."""
    with open(path, "r+", encoding="ascii") as f:
        old = f.read()

        def back():
            with open(path, "w", encoding="ascii") as again:
                again.write(old)
        stack.callback(back)
        f.seek(0)
        f.write(str(value))


@contextlib.contextmanager
def fails(*codes):
    """The body raises OSError with one of these errnos."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise AssertionError(f"{error!r} instead of {[errno.errorcode[c] for c in codes]}") from error
        return
    raise AssertionError(f"no error instead of {[errno.errorcode[c] for c in codes]}")


def until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)


# The module


def load(path=None):
    fd = os.open(path or MODULE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check(libc.syscall(313, fd, b"", 0))
    finally:
        os.close(fd)


def unload(wait=0.0):
    """Unloads; with `wait`, tries again that long while it is in use."""
    end = time.monotonic() + wait
    while True:
        try:
            check(libc.syscall(176, b"remus_buf", os.O_NONBLOCK))
            return
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EAGAIN) or time.monotonic() > end:
                raise
            time.sleep(0.02)


def is_loaded():
    return os.path.exists("/sys/module/remus_buf")


def module_users():
    with open("/sys/module/remus_buf/refcnt") as f:
        return int(f.read())


# The kernel's log

BAD = re.compile(
    r"WARNING|\bBUG\b|KASAN|KCSAN|UBSAN|kmemleak: .*new suspected|possible recursive locking|circular locking"
    r"|suspicious RCU|INFO: task|INFO: trying|sleeping function|invalid wait context|inconsistent lock state"
    r"|refcount|Oops|general protection|rcu: INFO|soft lockup|hard LOCKUP|ODEBUG|waiting for .* to become free"
    r"|panicked|[Oo]ut of memory|oom-kill|page allocation failure|Bad page|Bad rss-counter|bad: scheduling"
    r"|lock held when returning|nobody cared|stack guard|list_(add|del) corruption|leaked reference"
    r"|still has locks held|Call Trace|DEBUG_LOCKS_WARN|Freeing (unknown|alive)|destroy.*still has objects", 0)


class Log:
    """The kernel's log since the last look."""

    def __init__(self):
        self.fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.ignore = None
        self.kept = []
        self.news()

    def keep(self):
        """Takes in what has come: in a long test the kernel's ring may overrun before its end."""
        self.kept = self.news()

    def news(self):
        out, self.kept = self.kept, []
        while True:
            try:
                record = os.read(self.fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return out
            except BrokenPipeError:
                out.append("WARNING: (the kernel's log overran)")
                continue
            out.append(record.split(";", 1)[-1].split("\n")[0])

    def trouble(self):
        """The lines from the first bad one on."""
        lines = self.news()
        for i, line in enumerate(lines):
            if BAD.search(line) and not (self.ignore and self.ignore.search(line)):
                return lines[max(0, i - 2):i + 45]
        return []


LOG = None


def say(text):
    """A line into the kernel's log, so that a panic can be told which test it was in."""
    with contextlib.suppress(OSError), open("/dev/kmsg", "w") as f:
        f.write(f"remus-test: {text}\n")


# Clean-up

OWN = ("t-", "br-t")


def sweep():
    """Removes whatever an earlier test has left; what it should not have."""
    with contextlib.suppress(OSError), netlink.Rtnl() as rtnl:
        for name in rtnl.names():
            if name.startswith(OWN):
                with contextlib.suppress(OSError):
                    rtnl.delete(name)
    with contextlib.suppress(OSError), netlink.Genl() as genl:
        # A namespace that only held packets keep alive goes when they go.
        for domain in genl.dump():
            with contextlib.suppress(OSError):
                genl.commit(domain["domain"], genl.seal(domain["domain"])["epoch"])
        for _ in range(50):
            for domain in genl.dump():
                with contextlib.suppress(OSError):
                    genl.delete(domain["domain"])
            if not genl.dump():
                break
            time.sleep(0.1)


def oom_score(score):
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write(str(score))


class Kid:
    """A child process that runs a function; it is killed at the end of the test if need be."""

    all = []

    def __init__(self, function, *args):
        self.read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                signal.alarm(0)
                os.close(self.read)
                oom_score(1000)
                result = function(*args)
                os.write(write, repr(result).encode())
                code = 0
            except BaseException:
                with contextlib.suppress(OSError):
                    os.write(write, b"!" + traceback.format_exc().encode())
            finally:
                os._exit(code)
        os.close(write)
        self.status = None
        Kid.all.append(self)

    def alive(self):
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
        return self.status is None

    def kill(self, sig=signal.SIGKILL):
        if self.alive():
            os.kill(self.pid, sig)

    def reap(self):
        """Waits for it without looking at what it says."""
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        os.close(self.read)
        Kid.all.remove(self)

    def result(self):
        """Waits; returns what the function returned, or raises what it raised."""
        data = b""
        while chunk := os.read(self.read, 1 << 16):
            data += chunk
        self.reap()
        if self.status or data[:1] == b"!":
            raise AssertionError(f"child {self.status:#x}: {data[1:].decode()}")
        return eval(data.decode())  # noqa: S307 - our own repr


# Running


def run_one(function, loaded, seconds):
    def late(*_):
        raise Timeout(f"took more than {seconds} s")
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        if loaded:
            if not is_loaded():
                load()
            left = netlink.Genl().dump()
            true(not left, f"domains at the beginning: {left}")
        random.seed(SEED)
        with contextlib.ExitStack() as stack:
            function(stack)
            del stack
        if loaded:
            with netlink.Genl() as genl:
                left = genl.dump()
            true(not left, f"domains are left behind: {left}")
            unload(wait=60)
    finally:
        signal.alarm(0)


def memory_free():
    """What could be used: the page cache comes and goes by itself."""
    with open("/proc/meminfo") as f:
        return int(re.search(r"MemAvailable:\s+(\d+)", f.read())[1]) * 1024


KMEMLEAK = "/sys/kernel/debug/kmemleak"


def kmemleak_start():
    """Whether the kernel looks for leaks. From now on only when told to: a scan takes seconds."""
    try:
        with open(KMEMLEAK, "w") as f:
            f.write("scan=off\n")
        return True
    except OSError:
        return False


def jiffies():
    """What the kernel stamps its objects with."""
    with gzip.open("/proc/config.gz", "rt") as f:
        hz = int(re.search(r"^CONFIG_HZ=(\d+)", f.read(), re.M)[1])
    with open("/proc/uptime") as f:
        return (1 << 32) - 300 * hz + int(float(f.read().split()[0]) * hz)


def kmemleak_report(since):
    """Objects made after `since` that nothing refers to."""
    time.sleep(6)  # younger ones do not count
    # An object is suspected when its content has not changed between two scans. The only reference to one that is
    # in use may be in a register just then: what is leaked is so in each of many scans.
    for _ in range(10):
        for _ in range(2):
            with open(KMEMLEAK, "w") as f:
                f.write("scan\n")
        with open(KMEMLEAK) as f:
            objects = re.split(r"(?m)^(?=unreferenced object)", f.read())[1:]
        objects = [o for o in objects if int(re.search(r"jiffies (\d+)", o)[1]) >= since]
        if not objects:
            break
        time.sleep(1)
    return objects


def main(patterns, listing):
    global LOG
    chosen = [t for t in TESTS if not patterns or any(fnmatch.fnmatch(t[0], f"*{p}*") for p in patterns)]
    if listing:
        print("\n".join(t[0] for t in chosen))
        return 0
    LOG = Log()
    for path in ("/proc/sys/net/ipv6/conf/default/disable_ipv6", "/proc/sys/net/ipv6/conf/all/disable_ipv6"):
        with contextlib.suppress(OSError), open(path, "w") as f:
            f.write("1")
    # Whatever a test does to the machine's memory, it is not this process that ends for it.
    oom_score(-1000)
    # Fast, and the same each time.
    global MODULE
    shutil.copy(MODULE, "/tmp/remus_buf.ko")
    MODULE = "/tmp/remus_buf.ko"
    kmemleak = kmemleak_start()
    since = jiffies() if kmemleak else 0
    print(f"# {os.uname().release} {os.environ.get('REMUS_FLAVOUR')} {os.environ.get('REMUS_ACCEL')}, seed {SEED}, "
          f"kmemleak {'on' if kmemleak else 'off'}{', long' if LONG else ''}", flush=True)
    passed = failed = skipped = 0
    begin = time.monotonic()
    for name, function, loaded, seconds in chosen:
        start, why = time.monotonic(), None
        say(name)
        try:
            run_one(function, loaded, seconds * (4 if LONG else 1))
        except Skip as skip:
            skipped += 1
            print(f"ok {name} # SKIP {skip}", flush=True)
            with contextlib.suppress(OSError):
                sweep()
                unload(wait=2)
            continue
        except (Exception, Timeout) as error:
            detail = traceback.format_exc()
            # What came first counts, not what the clean-up then stumbled over.
            while error.__context__ and not error.__suppress_context__:
                error = error.__context__
            why = f"{type(error).__name__}: {error}"
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "t_" in f.filename]
            if frames:
                why += f" (line {frames[-1].lineno})"
        for kid in list(Kid.all):
            kid.kill()
            kid.reap()
        close_all()
        if why:
            sweep()
            with contextlib.suppress(OSError):
                unload(wait=5)
        trouble = LOG.trouble()
        if trouble and not why:
            why, detail = "the kernel complains: " + next((t for t in trouble if BAD.search(t)), "?"), ""
        took = time.monotonic() - start
        if why:
            failed += 1
            print(f"not ok {name}: {' '.join(why.split())}")
            for line in detail.splitlines() + trouble:
                print(f"#   {line}")
        else:
            passed += 1
            print(f"ok {name} # {took:.1f} s")
        sys.stdout.flush()
    # What no single test would see.
    why = None
    if kmemleak and (passed or failed):
        report = kmemleak_report(since)
        if report:
            why = "\n".join("".join(report).splitlines()[:160])
        print("not ok kmemleak: objects are leaked" if why else "ok kmemleak")
    else:
        print("ok kmemleak # SKIP not in this kernel, or not on its command line")
    if why:
        print("#   " + why.replace("\n", "\n#   "))
        failed += 1
    elif kmemleak:
        passed += 1
    with contextlib.suppress(OSError), open("/proc/lockdep_stats") as f:
        alive = re.search(r"debug_locks:\s+(\d)", f.read())
        if alive and alive[1] != "1":
            print("not ok lockdep: it has turned itself off")
            failed += 1
        elif alive:
            print("ok lockdep")
            passed += 1
    print(f"# {skipped} skipped, {time.monotonic() - begin:.0f} s")
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0
