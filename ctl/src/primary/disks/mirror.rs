// SPDX-License-Identifier: GPL-2.0-or-later

//! What is asked of the primary's QEMU: mirror jobs, one a disk, called `remus-NAME`, as is the block
//! node of what they mirror to.
//!
//! A job writes all of the disk once, and from its start on every write of the guest, which waits for
//! our answer (`copy-mode=write-blocking`). When we answer with an error it notes what was missed and
//! stops, while the guest goes on.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};

use super::Disk;
use crate::host::kernel::Guest;
use crate::host::qmp::Qmp;

/// Before the name of a disk, what our jobs and nodes are called.
const PREFIX: &str = "remus-";
/// Bytes that QEMU notes and copies at once: a chunk.
const GRANULARITY: u64 = remus_proto::disk::CHUNK as u64;
/// How long a job may take to end.
const END: Duration = Duration::from_secs(20);
const TICK: Duration = Duration::from_millis(10);

/// How far a disk's mirror is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Bytes that were copied, and that are to be; the latter grows while the guest writes.
    pub done: u64,
    pub total: u64,
    /// All that the guest has written, and is answered for, was taken by us.
    pub synced: bool,
    /// It has met an error and waits for [`resume`].
    pub stopped: bool,
}

/// Bytes of block node `node`.
pub fn size(qmp: &mut Qmp, node: &str) -> Result<u64> {
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
    let nodes = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
    let named = |n: &Value| Some(n.get("node-name")?.as_str()?.to_owned());
    if let Some(found) = nodes.iter().find(|n| named(n).as_deref() == Some(node)) {
        let size = found.pointer("/image/virtual-size").and_then(Value::as_u64);
        return size.with_context(|| format!("QEMU does not say how large node {node} is"));
    }
    // QEMU names nodes that have no name with a #.
    let names: Vec<String> = nodes
        .iter()
        .filter_map(named)
        .filter(|name| !name.starts_with('#'))
        .collect();
    match names.as_slice() {
        [] => bail!(
            "QEMU has no block node {node}, nor any with a name: start it with -blockdev …,node-name={node}"
        ),
        names => bail!(
            "QEMU has no block node {node}: say one of those that it has, {}",
            names.join(", ")
        ),
    }
}

/// The block nodes that devices of the guest write to.
pub fn written(qmp: &mut Qmp) -> Result<Vec<String>> {
    let devices = qmp.execute("query-block", json!({}))?;
    let node = |device: &Value| {
        let inserted = device.get("inserted")?;
        let writable = inserted.get("ro")?.as_bool() == Some(false);
        let name = inserted.get("node-name")?.as_str()?;
        writable.then(|| name.to_owned())
    };
    Ok(devices
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(node)
        .collect())
}

/// Begins to mirror `disk` to nbdkit at `socket`.
pub fn start(qmp: &mut Qmp, disk: &Disk, socket: &Path) -> Result<()> {
    let id = id(&disk.name);
    let target = json!({
        "driver": "nbd",
        "node-name": id,
        "server": {"type": "unix", "path": socket},
        "export": disk.name,
        // A mirror that lets what the guest discards through lets it through to both sides; none does up to
        // QEMU 10.
        "discard": "unmap",
    });
    qmp.execute("blockdev-add", target)?;
    let job = json!({
        "job-id": id,
        "device": disk.node,
        "target": id,
        "sync": "full",
        "copy-mode": "write-blocking",
        "on-target-error": "stop",
        "granularity": GRANULARITY,
        "auto-dismiss": true,
    });
    let started = qmp.execute("blockdev-mirror", job);
    if started.is_err() {
        let _ = qmp.execute("blockdev-del", json!({"node-name": id}));
    }
    started
        .map(drop)
        .with_context(|| format!("QEMU cannot mirror disk {}", disk.name))
}

/// How far the mirrors of `disks` are, in their order. Fails if one has ended.
pub fn states(qmp: &mut Qmp, disks: &[Disk]) -> Result<Vec<State>> {
    let jobs = jobs(qmp)?;
    disks.iter().map(|disk| state(&jobs, &disk.name)).collect()
}

fn state(jobs: &[Value], name: &str) -> Result<State> {
    let job = jobs
        .iter()
        .find(|job| job.get("device").and_then(Value::as_str) == Some(&id(name)));
    let Some(job) = job else {
        bail!("QEMU does not mirror disk {name} any more: see its log");
    };
    let number = |key: &str| job.get(key).and_then(Value::as_u64).unwrap_or(0);
    let synced = job.get("actively-synced").and_then(Value::as_bool);
    let synced =
        synced.context("this QEMU is too old to replicate disks: 8.2 is the first that can")?;
    let ready = job.get("ready").and_then(Value::as_bool) == Some(true);
    let status = job.get("io-status").and_then(Value::as_str);
    let stopped = status.is_some_and(|status| status != "ok");
    Ok(State {
        done: number("offset"),
        total: number("len"),
        synced: ready && synced && !stopped,
        stopped,
    })
}

/// Lets the mirror of `disk` go on after an error, with what it has missed.
pub fn resume(qmp: &mut Qmp, disk: &Disk) -> Result<()> {
    qmp.execute("block-job-resume", json!({"device": id(&disk.name)}))
        .map(drop)
}

/// Ends what an earlier controller or this one has begun, of all disks. The guest goes on, on the nodes
/// that it had. Nothing that the jobs write may wait for room in the queue meanwhile.
pub fn cancel(qmp: &mut Qmp) -> Result<()> {
    let jobs = jobs(qmp)?;
    let ids: Vec<&str> = jobs.iter().filter_map(|job| ours(job, "device")).collect();
    if !ids.is_empty() {
        // A write of the guest that is under way at the end of a job makes QEMU (10.0) write to memory
        // that it has given back, and it dies sooner or later. In a pause there is none.
        let runs = qmp.runs()?;
        if runs {
            qmp.pause()?;
        }
        let ended = end(qmp, &ids);
        if runs {
            Guest::resume(qmp)?;
        }
        ended?;
    }
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
    for node in nodes.as_array().into_iter().flatten() {
        if let Some(id) = ours(node, "node-name") {
            qmp.execute("blockdev-del", json!({"node-name": id}))?;
        }
    }
    Ok(())
}

/// Ends these jobs, and returns when they are gone.
fn end(qmp: &mut Qmp, ids: &[&str]) -> Result<()> {
    for id in ids {
        // It may end by itself at this moment.
        let _ = qmp.execute("block-job-cancel", json!({"device": id, "force": true}));
    }
    let deadline = Instant::now() + END;
    while let Some(id) = jobs(qmp)?.iter().find_map(|job| ours(job, "device")) {
        if Instant::now() > deadline {
            bail!("QEMU does not end its job {id}: end it with block-job-cancel");
        }
        thread::sleep(TICK);
    }
    Ok(())
}

fn jobs(qmp: &mut Qmp) -> Result<Vec<Value>> {
    match qmp.execute("query-block-jobs", json!({}))? {
        Value::Array(jobs) => Ok(jobs),
        _ => bail!("QEMU does not list its block jobs"),
    }
}

/// What `thing` is called by `key`, if it is of ours.
fn ours<'a>(thing: &'a Value, key: &str) -> Option<&'a str> {
    let name = thing.get(key)?.as_str()?;
    name.starts_with(PREFIX).then_some(name)
}

fn id(name: &str) -> String {
    format!("{PREFIX}{name}")
}
