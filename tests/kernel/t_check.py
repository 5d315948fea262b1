# SPDX-License-Identifier: GPL-2.0
"""The RAM device against ram-check (tests/ram), which shares no source with the module or with these tests."""
import json
import os
import subprocess

import harness
from harness import DEBUG, SEED, Skip, same, scaled, test, true

CHECKER = f"{harness.TOP}/build/ram/ram-check"


def ram_check(stack, *arguments):
    """Runs the checker; returns what it did."""
    kid = subprocess.Popen([CHECKER, "--seed", str(SEED), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end():
        # Its writers end when their input does.
        kid.kill()
        kid.wait()
    stack.callback(end)
    out, said = kid.communicate()
    true(kid.returncode == 0, f"ram-check: {said.strip()}")
    return json.loads(out)


def epochs():
    return scaled(40 if DEBUG else 100, 2000)


@test(seconds=1800)
def processes_and_guest(stack):
    if not os.path.exists("/dev/kvm"):
        raise Skip("there is no /dev/kvm in this machine")
    count = epochs()
    done = ram_check(stack, "--epochs", str(count))
    same(done["epochs"], count, "epochs")
    same(done["committed"] + done["aborted"], count, "every epoch is decided")
    # That it was a test at all.
    for what in "pages", "process_steps", "guest_jobs", "committed", "aborted", "full", "most_copies", "read_again", "stale":
        true(done[what] > 0, f"{what} in {done}")
    true(done["most_sealed"] > 1, f"several epochs at once: {done}")


@test(seconds=1800)
def limited(stack):
    """With room for few copies writers wait for the readers, and all is as exact as without."""
    if not os.path.exists("/dev/kvm"):
        raise Skip("there is no /dev/kvm in this machine")
    limit = 24
    done = ram_check(stack, "--epochs", str(scaled(25, 400)), "--cow-limit", str(limit), "--memory", "4")
    true(done["waits"] > 0, f"waits: {done}")
    # Each of the writers may be about to see that there is no room.
    true(0 < done["most_copies"] <= limit + 8, f"copies: {done}")


@test(seconds=1800)
def hot_pages(stack):
    """Pages that are compared instead of write-protected: what has changed is in the epoch, as it was at the seal."""
    if not os.path.exists("/dev/kvm"):
        raise Skip("there is no /dev/kvm in this machine")
    done = ram_check(stack, "--epochs", str(epochs()), "--hot-limit", "200", "--memory", "2")
    for what in "most_hot", "hot_unchanged", "committed", "aborted", "full", "guest_jobs":
        true(done[what] > 0, f"{what} in {done}")


@test(seconds=1800)
def one_page(stack):
    """The smallest memory: every writer writes the same page all the time."""
    done = ram_check(stack, "--epochs", str(scaled(25, 400)), "--pages", "1", "--no-guest")
    true(done["most_copies"] > 0, f"copies: {done}")
