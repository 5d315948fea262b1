# SPDX-License-Identifier: GPL-2.0
"""The kernel tree's own netlink client against the family, by docs/netlink/remus.yaml alone."""
import contextlib
import json
import os
import subprocess
import sys
import time

import netlink
from harness import TOP, Kid, Skip, same, test, true, until
from net import Line
from netlink import ATTR, CMD, EVENTS, GUEST, Genl, options
from ram import PAGE, Ram

YNL = os.environ.get("REMUS_SOURCE", "")
SPEC = f"{TOP}/docs/netlink/remus.yaml"
SCHEMA = f"{YNL}/Documentation/netlink/genetlink.yaml"
CLI = [sys.executable, f"{YNL}/tools/net/ynl/pyynl/cli.py", "--output-json", "--spec"]


def library():
    """The client as a library."""
    if not os.path.isdir(f"{YNL}/tools/net/ynl/pyynl"):
        raise Skip("the sources of this kernel are not here")
    sys.path.insert(0, f"{YNL}/tools/net/ynl/pyynl")
    try:
        from lib import ynl
    finally:
        sys.path.pop(0)
    ynl.GenlProtocol.genl_family_name_to_id = {}  # the module was loaded anew since
    return ynl


def client():
    """A client. The specification was compared with the schema before."""
    return library().YnlFamily(SPEC, "")


def cli(*words, spec=SPEC, schema="", fails=False):
    """Runs cli.py; returns what it prints, as JSON if it is."""
    library()
    done = subprocess.run([*CLI, spec, "--schema", schema, *words], capture_output=True, text=True, check=False)
    if (done.returncode != 0) != fails:
        raise AssertionError(f"cli.py {words}: {done.returncode} {done.stdout} {done.stderr}")
    return done.stdout + done.stderr if fails else [json.loads(line) for line in done.stdout.splitlines()]


def operations():
    import yaml
    with open(SPEC, encoding="utf-8") as f:
        spec = yaml.safe_load(f)
    return spec, {o["name"]: o for o in spec["operations"]["list"]}


@test
def schema(_):
    """The specification is a valid one, strictly; one with another word in it is not."""
    cli("--validate", schema=SCHEMA)
    with open(SPEC, encoding="utf-8") as f:
        text = f.read()
    for old, new in ("protocol: genetlink", "protocol: genetlink\nversion: 1"), ("type: flag", "type: flug"), ("    mcgrp:", "    group:"):
        true(old in text, f"{old} is in the specification")
        with open("/tmp/remus.yaml", "w", encoding="utf-8") as f:
            f.write(text.replace(old, new, 1))
        try:
            library().SpecFamily("/tmp/remus.yaml", SCHEMA)
        except Exception as error:  # jsonschema's own
            same(type(error).__name__, "ValidationError", str(error))
        else:
            raise AssertionError(f"{new} is valid")


@test
def numbers(_):
    """These tests' own tables, the specification and the client agree."""
    family = client()
    same({n: o.req_value for n, o in family.msgs.items()}, {**CMD, **EVENTS}, "operations")
    same({n: a.value for n, a in family.attr_sets["remus"].items()}, ATTR, "attributes")
    same(sorted(n for n, a in family.attr_sets["remus"].items() if a["type"] == "string"), sorted(netlink.TEXTS), "strings")
    same(sorted(n for n, a in family.attr_sets["remus"].items() if a["type"] == "flag"), sorted(netlink.FLAGS), "flags")


@test
def policies(_):
    """What the running kernel says that it accepts is what the specification says, for each command and way."""
    family = client()
    _, ops = operations()
    for name, op in ops.items():
        if "event" in op:
            continue
        for way in "do", "dump":
            if way not in op:
                continue
            want = {}
            for attribute in op[way].get("request", {}).get("attributes", []):
                kind = family.attr_sets["remus"][attribute]["type"]
                want[attribute] = {"uint": {"type": "uint"}, "flag": {"type": "flag"},
                                   "string": {"type": "nul-string", "max-length": 31}}[kind]
            policy = family.get_policy(name, way)
            got = {n: policy[n].to_dict() for n in policy} if policy is not None else None
            for attribute, entry in (got or {}).items():
                if entry["type"] == "uint":
                    # The whole range, as the kernel puts it.
                    same((entry.pop("min-value", 0), entry.pop("max-value", (1 << 64) - 1)), (0, (1 << 64) - 1), attribute)
            same(got or {}, want, f"{name}, {way}")


@test
def command_line(stack):
    """cli.py --do and --dump: the rest is in the library, and Python takes its time to start here."""
    genl = stack.enter_context(Genl())
    genl.new("web", 1 << 20)
    stack.callback(genl.delete, "web")
    said = cli("--do", "domain-new", "--json", '{"domain": "web"}', fails=True)
    true("there is a domain 'web' already" in said and "'bad-attr': '.domain'" in said, said)
    web = genl.get("web") | {"cow-policy": "throttle"}  # the client knows its name
    same(cli("--dump", "domain-get"), [[web]], "domain-get")


@test
def do_and_dump(stack):
    """Each command, and refusals."""
    genl = stack.enter_context(Genl())
    family = client()

    def refused(call, what, **attrs):
        try:
            reply = call(**attrs)
        except library().NlError as error:
            true(what in str(error), f"{error}: {what}")
        else:
            raise AssertionError(f"no error but {reply} instead of: {what}")

    def do(name, **attrs):
        return family.do(name, {k.replace("_", "-"): v for k, v in attrs.items()})
    do("domain-new", domain="web", memory=1 << 20)
    stack.callback(genl.delete, "web")
    refused(lambda: do("domain-get"), "the domain's name is missing")
    refused(lambda: do("domain-get"), "'miss-type': 'domain'")
    line = Line(stack, "guest", domain="web")
    line.send(1, 2)
    same(do("epoch-seal", domain="web", full=True)["packets"], 2, "epoch-seal")
    line.send(3)
    same(do("epoch-seal", domain="web")["epoch"], 2, "epoch-seal")
    same(do("epoch-abort", domain="web", epoch=2)["packets"], 1, "epoch-abort")
    reply = do("domain-set", domain="web", limit_packets=100, limit_bytes=99999999999)
    same((reply["limit-packets"], reply["limit-bytes"]), (100, 99999999999), "domain-set")
    port, = family.dump("port-get", {"domain": "web"})
    same((port["port"], port["direction"], port["packets"], port["domain"]), (line.device, "guest", 3, "web"), "port-get")
    refused(lambda: family.dump("port-get", {"domain": "nobody"}), "there is no domain 'nobody'")
    same(do("epoch-commit", domain="web", epoch=1)["packets"], 2, "epoch-commit")
    line.receiver.expect([1, 2], "epoch 1")
    same(do("discard", domain="web")["packets"], 1, "discard")
    line.remove()
    do("domain-new", domain="gone")
    same([d["domain"] for d in family.dump("domain-get", {})], ["web", "gone"], "domain-get")
    same([d["domain"] for d in family.dump("domain-get", {"domain": "gone"})], ["gone"], "domain-get of one")
    same(do("domain-del", domain="gone"), None, "domain-del")


@test
def replies(stack):
    """Each reply has attributes of the specification's list for it, and each of the list is in some reply."""
    family = client()
    _, ops = operations()
    seen = {}

    def note(key, got):
        seen.setdefault(key, set()).update(got or ())
        return got

    def do(name, **attrs):
        return note((name, "do"), family.do(name, {k.replace("_", "-"): v for k, v in attrs.items()}))
    genl = stack.enter_context(Genl())
    do("domain-new", domain="web", memory=1 << 20)
    stack.callback(genl.delete, "web")
    line = Line(stack, "guest", domain="web")
    line.rtnl.qdisc_change(line.device, options=options(passthrough=1))
    for port in family.dump("port-get", {}):
        note(("port-get", "dump"), port)
    line.send(1)
    owner = Genl()
    owner.set("web", own=True)
    do("domain-get", domain="web")
    note(("domain-get", "dump"), family.dump("domain-get", {})[0])
    owner.close()
    until(lambda: "orphaned" in genl.get("web"), "the domain is orphaned")
    do("domain-get", domain="web")
    note(("domain-get", "dump"), family.dump("domain-get", {})[0])
    do("domain-set", domain="web", own=True)
    do("epoch-seal", domain="web")
    do("epoch-commit", domain="web", epoch=1)
    do("epoch-seal", domain="web")
    do("epoch-abort", domain="web", epoch=2)
    do("discard", domain="web")
    family.sock.close()
    until(lambda: "orphaned" in genl.get("web"), "the domain is orphaned")
    family = client()
    do("domain-set", domain="web")
    line.remove()
    optional = {"domain-new": {"owner", "orphaned"}}
    for (name, way), got in seen.items():
        want = set(ops[name][way]["reply"]["attributes"])
        same(got - want, set(), f"{name}, {way}: beyond the specification")
        same(want - got - optional.get(name, set()), set(), f"{name}, {way}: never seen")
    todo = {(n, w) for n, o in ops.items() for w in ("do", "dump") if w in o and "reply" in o[w]} - set(seen)
    same(todo, set(), "replies that were not looked at")


@test
def subscribe(stack):
    """--subscribe events, while each of them is caused."""
    library()
    genl = stack.enter_context(Genl())
    process = subprocess.Popen([*CLI, SPEC, "--no-schema", "--subscribe", "events", "--duration", "10000"],
                               stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    stack.callback(process.wait)
    stack.callback(process.kill)

    def ready():
        with open("/proc/net/netlink", encoding="ascii") as f:
            return any(row.split()[1] == "16" and int(row.split()[3], 16) for row in f.readlines()[1:])
    until(ready, "the client has subscribed", 60)
    os.set_blocking(process.stdout.fileno(), False)
    genl.new("web", 1 << 20, cow_limit=1, cow_policy=2)
    line = Line(stack, "guest", domain="web", packets=4)
    line.send(*range(6))
    owner = Genl()
    owner.set("web", own=True)
    owner.close()
    got, rest = {}, b""

    def all_of(names):
        nonlocal rest
        with contextlib.suppress(BlockingIOError):
            rest += os.read(process.stdout.fileno(), 1 << 16)
        *lines, rest = rest.split(b"\n")
        for text in lines:
            event = json.loads(text)
            true(event["name"] not in got, f"{event['name']} came twice in one epoch")
            got[event["name"]] = event["msg"]
        return set(names) <= set(got)
    until(lambda: all_of(["output-pending", "buffer-high", "overflow", "controller-gone"]), f"four events, got {got}")
    with Ram("web") as device, device.map() as memory:
        for policy, event in (2, "cow-abort"), (1, "cow-wait"):
            genl.set("web", cow_policy=policy)
            memory.write(0, bytes(2 * PAGE))
            epoch = genl.seal("web")["epoch"]
            # There is room for the first page's old content, not for the second's.
            writer = Kid(memory.write, 0, bytes(2 * PAGE))
            until(lambda name=event: all_of([name]), f"{event}, got {got}")
            if policy == 1:
                genl.abort("web", epoch)
            writer.result()
    line.remove()
    genl.delete("web")
    until(lambda: all_of(["domain-gone"]), f"the last event, got {got}")
    time.sleep(0.1)
    all_of([])
    _, ops = operations()
    for name in EVENTS:
        same(set(got[name]), set(ops[name]["event"]["attributes"]), f"attributes of {name}")
        same(got[name]["domain"], "web", f"domain of {name}")
    same(got["overflow"]["dropped"] > 0, True, "dropped")
    same(len(got), len(EVENTS), "events")
    same(line.direction, GUEST, "direction")
