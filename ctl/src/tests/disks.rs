// SPDX-License-Identifier: GPL-2.0-or-later

//! The primary's disks with a real QEMU and a real nbdkit: what a receiver makes of the disk stream.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use remus_proto::disk::{Change, Record, CHUNK};
use remus_proto::frame::HEADER_SIZE;
use serde_json::json;

use super::machine::{connect, directory, Killed};
use super::model::{until, Random};
use crate::host::qmp::Qmp;
use crate::peer::sum::sum;
use crate::primary::disks::copy::Known;
use crate::primary::disks::mirror;
use crate::primary::disks::queue::{Cursor, Next, Queue};
use crate::primary::disks::server::Server;
use crate::primary::disks::Disk;

/// Bytes of the disk: not a whole number of chunks.
const SIZE: usize = (4 << 20) + 5 * 512;
const LONG: Duration = Duration::from_secs(60);
const AT_ONCE: Duration = Duration::ZERO;

/// A QEMU with a disk whose processors never run, its mirror, and a receiver.
struct Rig {
    qmp: Qmp,
    server: Option<Server>,
    queue: Arc<Queue>,
    disk: Disk,
    source: PathBuf,
    qcow2: bool,
    _qemu: Killed,
    dir: tempfile::TempDir,
}

impl Rig {
    /// With a raw image or one in qcow2; a queue of so many bytes.
    fn new(qcow2: bool, bound: u64, discard: bool) -> Self {
        let dir = directory();
        let at = |name: &str| dir.path().join(name);
        let mut content = vec![0; SIZE];
        // Zeros in the middle.
        fill(&mut content[..SIZE / 4], 1);
        fill(&mut content[SIZE / 2..], 2);
        fs::write(at("raw"), &content).unwrap();
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-accel", "tcg", "-machine", "pc", "-m", "8M", "-S"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", at("qmp").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("these tests need QEMU: apt install qemu-system-x86");
        let qemu = Killed(qemu);
        let mut qmp = connect(&at("qmp"));
        let mut run = |command: &str, arguments| {
            qmp.execute(command, arguments).unwrap();
        };
        let source = at(if qcow2 { "qcow2" } else { "raw" });
        let unmap = if discard { "unmap" } else { "ignore" };
        let file = |name: &str, path: &Path| json!({"driver": "file", "node-name": name, "filename": path, "discard": unmap});
        if qcow2 {
            fs::write(&source, "").unwrap();
            run("blockdev-add", file("f", &source));
            let empty = json!({"driver": "qcow2", "file": "f", "size": SIZE});
            run(
                "blockdev-create",
                json!({"job-id": "create", "options": empty}),
            );
            ended(&mut qmp);
            let mut run = |command: &str, arguments| {
                qmp.execute(command, arguments).unwrap();
            };
            run("job-dismiss", json!({"id": "create"}));
            run(
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": "disk0", "file": "f", "discard": unmap}),
            );
            run("blockdev-add", file("content", &at("raw")));
            run(
                "blockdev-backup",
                json!({"job-id": "fill", "device": "content", "target": "disk0", "sync": "full"}),
            );
            ended(&mut qmp);
        } else {
            run("blockdev-add", file("f", &source));
            run(
                "blockdev-add",
                json!({"driver": "raw", "node-name": "disk0", "file": "f", "discard": unmap}),
            );
        }
        let device = json!({"driver": "virtio-blk-pci", "drive": "disk0", "id": "vd"});
        qmp.execute("device_add", device).unwrap();
        let size = mirror::size(&mut qmp, "disk0").unwrap();
        assert_eq!(size, SIZE as u64);
        let disk = Disk {
            name: "root".into(),
            node: "disk0".into(),
            size,
        };
        let queue = Arc::new(Queue::new(bound));
        let mut rig = Self {
            qmp,
            server: None,
            queue,
            disk,
            source,
            qcow2,
            _qemu: qemu,
            dir,
        };
        rig.serve();
        rig
    }

    fn serve(&mut self) {
        self.server = None;
        let disks = [self.disk.clone()];
        let server = Server::start(self.dir.path(), "web", &disks, &self.queue);
        self.server = Some(server.unwrap());
    }

    fn mirror(&mut self) {
        let socket = self.server.as_ref().unwrap().socket().to_owned();
        mirror::start(&mut self.qmp, &self.disk, &socket).unwrap();
    }

    fn state(&mut self) -> mirror::State {
        let disks = [self.disk.clone()];
        mirror::states(&mut self.qmp, &disks).unwrap().remove(0)
    }

    /// Copies until all is mirrored.
    fn copy(&mut self, cursor: &mut Cursor, target: &mut Target) {
        until("the copy", LONG, || {
            target.drain(&self.queue, cursor);
            self.state().synced
        });
        // The last of it may have come after it was looked for.
        target.drain(&self.queue, cursor);
    }

    /// Has qemu-io do `line` on the guest's disk. What it says of it goes to QEMU's output.
    fn io(&mut self, line: &str) {
        self.io_of("-d vd/virtio-backend", line);
    }

    fn io_of(&mut self, device: &str, line: &str) {
        let line = json!({"command-line": format!("qemu-io {device} \"{line}\"")});
        let told = self.qmp.execute("human-monitor-command", line).unwrap();
        assert_eq!(told, json!(""), "it knows neither device nor command");
    }

    /// What the guest's disk has. One in qcow2 must not be mirrored just now.
    fn content(&mut self) -> Vec<u8> {
        self.io("flush");
        if !self.qcow2 {
            return fs::read(&self.source).unwrap();
        }
        let out = self.dir.path().join("out");
        fs::write(&out, vec![0xdd; SIZE]).unwrap();
        let node = json!({"driver": "file", "node-name": "out", "filename": out});
        self.qmp.execute("blockdev-add", node).unwrap();
        let backup = json!({"job-id": "read", "device": "disk0", "target": "out", "sync": "full"});
        self.qmp.execute("blockdev-backup", backup).unwrap();
        ended(&mut self.qmp);
        self.qmp
            .execute("blockdev-del", json!({"node-name": "out"}))
            .unwrap();
        fs::read(out).unwrap()
    }
}

/// Waits for the end of a job of QEMU's.
fn ended(qmp: &mut Qmp) {
    until("the end of a job", LONG, || {
        let jobs = qmp.execute("query-jobs", json!({})).unwrap();
        let concluded = |job: &serde_json::Value| job["status"] == "concluded";
        jobs.as_array().unwrap().iter().all(concluded)
    });
}

fn fill(bytes: &mut [u8], seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    bytes.iter_mut().for_each(|b| *b = random.next() as u8);
}

/// A receiver of the disk stream, which writes everything at once.
struct Target {
    image: Vec<u8>,
    /// Bytes of changes that came, with their heads.
    received: usize,
    /// What came: epochs of frames, marks negative.
    frames: Vec<i64>,
    discards: usize,
}

impl Target {
    fn new(image: Vec<u8>) -> Self {
        Self {
            image,
            received: 0,
            frames: Vec::new(),
            discards: 0,
        }
    }

    fn empty() -> Self {
        Self::new(vec![0xee; SIZE])
    }

    /// Takes all that there is.
    fn drain(&mut self, queue: &Queue, cursor: &mut Cursor) {
        let mut frame = Vec::new();
        loop {
            match queue.next(cursor, &mut frame, AT_ONCE) {
                Next::Nothing => return,
                Next::Over => panic!("the cursor is not the newest"),
                Next::Seal(epoch) => self.frames.push(-(epoch as i64)),
                Next::Changes(epoch) => {
                    self.frames.push(epoch as i64);
                    let mut payload = &frame[HEADER_SIZE..];
                    self.received += payload.len();
                    while !payload.is_empty() {
                        self.write(&Record::decode(&mut payload).unwrap());
                    }
                }
            }
        }
    }

    fn write(&mut self, record: &Record<'_>) {
        assert_eq!(record.disk, 0);
        let at = record.offset as usize;
        let to = &mut self.image[at..at + record.change.length() as usize];
        match record.change {
            Change::Write(data) => to.copy_from_slice(data),
            Change::Zero(_) => to.fill(0),
            Change::Discard(_) => {
                self.discards += 1;
                to.fill(0);
            }
        }
    }

    fn sums(&self) -> Vec<Known> {
        let mut known = Known::new(SIZE as u64);
        let sums: Vec<_> = self.image.chunks(CHUNK).map(sum).collect();
        known.learn(0, &sums);
        assert!(known.complete());
        vec![known]
    }
}

/// A raw disk that was copied, and a queue of so many bytes.
fn copied(bound: u64) -> (Rig, Target, Cursor) {
    let mut rig = Rig::new(false, bound, false);
    let mut target = Target::empty();
    let mut cursor = rig.queue.copy(Vec::new());
    rig.mirror();
    rig.copy(&mut cursor, &mut target);
    (rig, target, cursor)
}

fn same(a: &[u8], b: &[u8]) {
    assert_eq!(a.len(), b.len());
    let differ = a.iter().zip(b).position(|(a, b)| a != b);
    assert_eq!(differ, None, "the first byte that differs");
}

fn copies_and_goes_on(qcow2: bool) {
    let mut rig = Rig::new(qcow2, 64 << 20, true);
    let mut target = Target::empty();
    let mut cursor = rig.queue.copy(Vec::new());
    rig.mirror();
    // Writes while it is copied.
    rig.io("write -P 0x11 0 4k");
    rig.io("write -P 0x12 4193280 1024");
    rig.copy(&mut cursor, &mut target);
    rig.qmp.execute("stop", json!({})).unwrap();
    target.drain(&rig.queue, &mut cursor);
    if !qcow2 {
        same(&rig.content(), &target.image);
    }
    assert!(target.frames.iter().all(|epoch| *epoch == 0));
    // With no zeros first, nor anything sent twice, and zeros in few bytes.
    assert!(target.received < SIZE - SIZE / 8, "{}", target.received);
    rig.queue.seal(7);
    target.frames.clear();

    rig.io("write -P 0x5a 64k 128k");
    rig.io("write -P 0x5b 512 512");
    rig.io("flush");
    rig.queue.seal(8);
    rig.io("write -z 1M 64k");
    // QEMU's mirror lets no discard through, to either side.
    rig.io("discard 2M 192k");
    rig.io("write -P 0x5c 65k 1k");
    target.drain(&rig.queue, &mut cursor);
    assert_eq!(target.frames, [-7, 8, -8, 9]);
    rig.queue.seal(9);
    rig.io("write -f -P 0x5d 3M 1k");
    target.drain(&rig.queue, &mut cursor);
    assert_eq!(target.frames, [-7, 8, -8, 9, -9, 10]);
    assert!(rig.state().synced);
    assert!(rig.queue.applied(9));
    assert!(rig.queue.level().held > 1024);
    assert!(rig.queue.level().held < 2048);

    // The guest keeps its node, and nothing of ours is left.
    mirror::cancel(&mut rig.qmp).unwrap();
    same(&rig.content(), &target.image);
    rig.io("write -P 0x77 0 512");
    target.drain(&rig.queue, &mut cursor);
    assert!(rig.content()[..512].iter().all(|b| *b == 0x77));
    assert_ne!(target.image[0], 0x77);
    let told = mirror::states(&mut rig.qmp, &[rig.disk.clone()]).unwrap_err();
    assert!(told.to_string().contains("does not mirror"), "{told}");
    mirror::cancel(&mut rig.qmp).unwrap();
}

#[test]
fn raw_disk() {
    copies_and_goes_on(false);
}

#[test]
fn qcow2_disk() {
    copies_and_goes_on(true);
}

#[test]
fn no_such_node() {
    let mut rig = Rig::new(false, 1 << 20, false);
    let told = mirror::size(&mut rig.qmp, "disk1").unwrap_err().to_string();
    assert!(told.contains("disk1") && told.contains("disk0"), "{told}");
    rig.disk.node = "disk1".into();
    let socket = rig.server.as_ref().unwrap().socket().to_owned();
    let told = mirror::start(&mut rig.qmp, &rig.disk, &socket).unwrap_err();
    assert!(format!("{told:#}").contains("disk1"), "{told:#}");
    // Which leaves nothing behind.
    rig.disk.node = "disk0".into();
    rig.queue.copy(Vec::new());
    rig.mirror();
    // A disk that nbdkit does not know.
    rig.disk.name = "other".into();
    let told = mirror::start(&mut rig.qmp, &rig.disk, &socket);
    assert!(told.is_err());
}

/// What the plugin makes of all that a client of NBD may ask.
#[test]
fn the_plugin() {
    let mut rig = Rig::new(false, 64 << 20, false);
    let mut target = Target::empty();
    let socket = rig.server.as_ref().unwrap().socket().to_owned();
    let server = json!({"type": "unix", "path": socket});
    let mut node = |export: &str, name: &str| {
        let node = json!({
            "driver": "nbd", "server": server, "export": export, "node-name": name, "discard": "unmap",
        });
        rig.qmp.execute("blockdev-add", node)
    };
    assert!(node("boot", "other").is_err());
    node("root", "direct").unwrap();
    assert_eq!(mirror::size(&mut rig.qmp, "direct").unwrap(), SIZE as u64);
    // There is no copy yet.
    rig.io_of("direct", "write -P 7 0 512");
    let mut cursor = rig.queue.copy(Vec::new());
    for line in [
        "write -P 1 512 1M",
        "write -f -P 2 0 512",
        "write -z 64k 64k",
        "write -z -u 192k 64k",
        "flush",
    ] {
        rig.io_of("direct", line);
    }
    target.drain(&rig.queue, &mut cursor);
    assert_eq!(target.discards, 0);
    let mut want = vec![0xee; SIZE];
    want[..512].fill(2);
    want[512..512 + (1 << 20)].fill(1);
    want[64 << 10..128 << 10].fill(0);
    want[192 << 10..256 << 10].fill(0);
    same(&want, &target.image);
    rig.io_of("direct", "discard 2M 192k");
    target.drain(&rig.queue, &mut cursor);
    assert_eq!(target.discards, 1);
    want[2 << 20..(2 << 20) + (192 << 10)].fill(0);
    same(&want, &target.image);
}

/// A standby that has nearly everything gets only what differs.
#[test]
fn sums_save_bytes() {
    let mut rig = Rig::new(false, 64 << 20, false);
    let mut target = Target::new(rig.content());
    target.image[100 * 1024] ^= 1;
    target.image[SIZE - 1] ^= 1;
    let mut cursor = rig.queue.copy(target.sums());
    rig.mirror();
    rig.io("write -P 0x33 1M 512");
    rig.copy(&mut cursor, &mut target);
    rig.queue.seal(1);
    target.drain(&rig.queue, &mut cursor);
    same(&rig.content(), &target.image);
    assert!(target.received > CHUNK);
    // Two chunks that differed, the last of them short, the write, and its chunk again perhaps.
    assert!(target.received < 3 * CHUNK, "{}", target.received);
    // Afterwards what is written goes, whatever it is.
    let before = target.received;
    rig.io("write -P 0x33 1M 512");
    target.drain(&rig.queue, &mut cursor);
    assert_eq!(target.received, before + 16 + 512);
}

/// Without a standby the guest goes on, and what was missed is copied when there is one again.
#[test]
fn tracks_and_goes_on() {
    let (mut rig, mut target, mut cursor) = copied(64 << 20);
    rig.queue.seal(1);
    rig.io("write -P 0x21 0 64k");
    rig.queue.seal(2);
    rig.io("write -P 0x22 128k 64k");
    // It holds epoch 1 when it is lost; the rest is still here.
    assert_eq!(rig.queue.resume(0).map(drop), None);
    let mut frame = Vec::new();
    until("the mark of epoch 1", LONG, || {
        match rig.queue.next(&mut cursor, &mut frame, AT_ONCE) {
            Next::Changes(0) => {
                let mut payload = &frame[HEADER_SIZE..];
                while !payload.is_empty() {
                    target.write(&Record::decode(&mut payload).unwrap());
                }
                false
            }
            next => next == Next::Over || next == Next::Seal(1),
        }
    });
    rig.queue.unseal(1);
    rig.queue.track();
    for round in 0..3 {
        rig.io("write -P 0x23 256k 64k");
        rig.io("write -P 0x24 3M 512");
        rig.io(&format!("write -P {} 1M 300k", 0x30 + round));
    }
    until("the job to stop", LONG, || rig.state().stopped);
    assert!(!rig.state().synced);
    // A pause does not wait for it either.
    rig.qmp.execute("cont", json!({})).unwrap();
    rig.qmp.execute("stop", json!({})).unwrap();

    let mut cursor = rig.queue.copy_on(1).unwrap();
    let disk = rig.disk.clone();
    mirror::resume(&mut rig.qmp, &disk).unwrap();
    target.frames.clear();
    target.received = 0;
    rig.copy(&mut cursor, &mut target);
    assert!(target.received < SIZE / 4, "{}", target.received);
    rig.queue.seal(9);
    rig.io("write -P 0x25 0 512");
    target.drain(&rig.queue, &mut cursor);
    same(&rig.content(), &target.image);
    let (copied, after) = target.frames.split_at(target.frames.len() - 2);
    assert!(copied.iter().all(|epoch| *epoch == 0));
    assert_eq!(after, [-9, 10]);
}

/// When nbdkit dies the guest goes on; with another one the mirror does.
#[test]
fn nbdkit_dies() {
    let (mut rig, mut target, mut cursor) = copied(64 << 20);
    rig.queue.seal(1);
    let server = rig.server.as_mut().unwrap();
    let pid = rustix::process::Pid::from_raw(server.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    until("its end", LONG, || server.ended().unwrap().is_some());
    rig.io("write -P 0x41 1M 64k");
    assert!(!rig.state().synced);

    rig.serve();
    // With its end the queue takes nothing more.
    assert_eq!(
        rig.queue.next(&mut cursor, &mut Vec::new(), AT_ONCE),
        Next::Over
    );
    let mut cursor = rig.queue.copy_on(1).unwrap();
    let disk = rig.disk.clone();
    until("the copy", LONG, || {
        target.drain(&rig.queue, &mut cursor);
        let state = rig.state();
        if state.stopped {
            mirror::resume(&mut rig.qmp, &disk).unwrap();
        }
        state.synced
    });
    rig.queue.seal(2);
    target.drain(&rig.queue, &mut cursor);
    same(&rig.content(), &target.image);
}

/// A pause leaves no write unanswered: what the disk has is in the queue.
#[test]
fn a_pause_is_whole() {
    let (mut rig, mut target, mut cursor) = copied(64 << 20);
    let mut random = Random(11);
    for epoch in 1..20 {
        rig.qmp.execute("cont", json!({})).unwrap();
        for _ in 0..8 {
            let (at, byte) = (random.next() % 60 * 64, random.next() % 255);
            rig.io(&format!("aio_write -P {byte} {at}k 100k"));
        }
        rig.qmp.execute("stop", json!({})).unwrap();
        rig.queue.seal(epoch);
        target.drain(&rig.queue, &mut cursor);
        assert_eq!(target.frames.last(), Some(&-(epoch as i64)));
        // As it is: nothing that would wait for a write.
        same(&fs::read(&rig.source).unwrap(), &target.image);
        assert!(rig.state().synced);
        assert!(rig.queue.applied(epoch));
        assert_eq!(rig.queue.level().held, 0);
    }
}

/// At the bound a write waits, and goes on when there is room; a pause ends all the same.
#[test]
fn a_full_queue_makes_writes_wait() {
    const BOUND: u64 = 256 << 10;
    let (mut rig, mut target, mut cursor) = copied(BOUND);
    rig.queue.seal(1);
    target.drain(&rig.queue, &mut cursor);
    assert!(rig.queue.applied(1));
    rig.qmp.execute("cont", json!({})).unwrap();
    assert!(!rig.queue.is_half_full());
    rig.io("aio_write -P 0x61 0 200k");
    rig.io("aio_write -P 0x62 1M 200k");
    until("a write that waits", LONG, || rig.queue.level().waiting > 0);
    // Half of it was reached, so that it is sealed early.
    assert!(rig.queue.is_half_full());
    assert!(rig.queue.level().held <= BOUND);
    let through = rig.queue.let_through();
    rig.qmp.execute("stop", json!({})).unwrap();
    drop(through);
    rig.queue.seal(2);
    assert!(rig.queue.level().held > BOUND);
    assert_eq!(rig.queue.level().waiting, 0);
    rig.qmp.execute("cont", json!({})).unwrap();
    rig.io("aio_write -P 0x63 2M 4k");
    until("another", LONG, || rig.queue.level().waiting > 0);
    target.drain(&rig.queue, &mut cursor);
    assert_ne!(target.image[2 << 20], 0x63);
    assert!(rig.queue.applied(2));
    until("room", LONG, || rig.queue.level().waiting == 0);
    rig.qmp.execute("stop", json!({})).unwrap();
    target.drain(&rig.queue, &mut cursor);
    assert!(rig.state().synced);
    same(&rig.content(), &target.image);
}
