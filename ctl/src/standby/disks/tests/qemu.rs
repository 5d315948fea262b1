// SPDX-License-Identifier: GPL-2.0-or-later

//! With QEMU's own programs: its locks, a machine that waits, qcow2 images. Where no FUSE can be mounted the
//! last are skipped, as `make test` counts.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use remus_proto::disk::{Change, Record};

use super::super::{Durability, Format, Spec, Store};
use super::{changes, raw, read, Content, Random};
use crate::host::kernel::{Guest, Machine, Successor};
use crate::host::qmp::Qmp;
use crate::host::vmm::Vmm;

const SIZE: u64 = 1 << 20;

fn open(specs: &[Spec], folder: &Path) -> anyhow::Result<Store> {
    let journal = folder.join("guest.journal");
    Store::open(specs, &journal, Durability::Memory, SIZE)
}

/// What has to be installed.
const NEEDED: &str = "these tests need QEMU: apt install qemu-system-x86 qemu-utils";

/// What `qemu-io` says of a command on an image.
fn qemu_io(format: &str, path: &Path, command: &str) -> (bool, String) {
    let done = Command::new("qemu-io")
        .args(["-f", format, "-c", command])
        .arg(path)
        .output()
        .unwrap();
    let text = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn one_writer_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let specs = raw(folder, &[SIZE]);
    let path = &specs[0].path;
    let mut other = Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect(NEEDED);
    let mut orders = other.stdin.take().unwrap();
    orders.write_all(b"write 0 512\n").unwrap();
    let mut said = BufReader::new(other.stdout.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("wrote 512/512")));
    let why = format!("{:#}", open(&specs, folder).err().unwrap());
    assert!(why.contains("0.img is in use"), "{why}");
    drop(orders);
    other.wait().unwrap();

    let store = open(&specs, folder).unwrap();
    let (done, text) = qemu_io("raw", path, "write 0 512");
    assert!(!done && text.contains("Failed to get"), "{text}");
    store.close().unwrap();
    let (done, text) = qemu_io("raw", path, "write 0 512");
    assert!(done, "{text}");
}

/// A machine that is ended with this.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A small machine's command with a disk.
fn machine(image: &Path) -> Vec<String> {
    let blockdev = format!(
        r#"{{"driver":"raw","node-name":"disk0","file":{{"driver":"file","filename":"{}"}}}}"#,
        image.display()
    );
    let words = "qemu-system-x86_64 -machine q35 -accel tcg -m 16 -nodefaults -display none \
                 -device virtio-blk-pci,drive=disk0 -blockdev";
    let words = words.split_whitespace().map(str::to_owned);
    words.chain([blockdev]).collect()
}

/// The waiting machine has the image open and no lock on it, until it is let run.
#[test]
fn a_waiting_machine() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let specs = raw(folder, &[SIZE]);
    // A machine to get a state from, with an image of its own.
    let there = tempfile::tempdir().unwrap();
    let first = raw(there.path(), &[SIZE]);
    let command = machine(&first[0].path);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let primary = Command::new(&command[0])
        .args(&command[1..])
        .args(["-S", "-global", "migration.send-configuration=off"])
        .args([
            "-chardev",
            "socket,id=q,fd=0",
            "-mon",
            "chardev=q,mode=control",
        ])
        .stdin(std::os::fd::OwnedFd::from(theirs))
        .spawn()
        .expect(NEEDED);
    let primary = Ends(primary);
    let state = Qmp::over(ours).unwrap().save().unwrap();
    drop(primary);

    let store = open(&specs, folder).unwrap();
    store.begin_copy(1, 1).unwrap();
    let qmp = folder.join("qmp");
    let mut command = machine(&specs[0].path);
    let socket = format!("unix:{},server=on,wait=off", qmp.display());
    command.extend(["-qmp".into(), socket]);
    let (mut vmm, mut qmp) = Vmm::start(&command, &qmp, &folder.join("log")).unwrap();
    let mut random = Random::new(4);
    let mut content = read(&specs);
    store
        .stage(changes(&mut random, &mut content, 30, 4000))
        .unwrap();
    store.seal(1).unwrap();
    store.apply(1).unwrap();
    // A standby that crashed can open them again while it waits.
    drop(store);
    let store = open(&specs, folder).unwrap();
    assert!(store.whole().is_some());
    store.hand_over().unwrap();
    qmp.load(&state).unwrap();
    Successor::resume(&mut qmp).unwrap();
    assert!(qmp.runs().unwrap());
    vmm.ready().unwrap();
    let why = format!("{:#}", open(&specs, folder).err().unwrap());
    assert!(why.contains("in use"), "{why}");
    drop(vmm);
    assert!(read(&specs) == content);
    assert_eq!(open(&specs, folder).unwrap().whole(), None);
}

fn qcow2(path: &Path, size: u64) -> Spec {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size.to_string())
        .status();
    assert!(made.expect(NEEDED).success());
    Spec {
        name: "root".into(),
        path: path.into(),
        format: Format::Qcow2,
    }
}

/// Whether this host can mount by FUSE at all, whatever we do with it; says if not, past the capturing of
/// what tests print.
fn have_fuse(folder: &Path) -> bool {
    let mount = folder.join("probe");
    std::fs::write(&mount, [0; 512]).unwrap();
    let node = format!("driver=file,node-name=n,filename={}", mount.display());
    let other = folder.join("probe.mount");
    std::fs::write(&other, "").unwrap();
    let export = format!("type=fuse,id=e,node-name=n,mountpoint={}", other.display());
    let mut child = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &node, "--export", &export])
        .args(["--pidfile", "probe.pid"])
        .current_dir(folder)
        .stderr(Stdio::piped())
        .spawn()
        .expect(NEEDED);
    // It writes that file when all else is done.
    let deadline = Instant::now() + Duration::from_secs(60);
    let works = loop {
        if folder.join("probe.pid").exists() {
            break true;
        }
        if child.try_wait().unwrap().is_some() || Instant::now() > deadline {
            break false;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let pid = rustix::process::Pid::from_child(&child);
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    let ended = child.wait_with_output().unwrap();
    if !works {
        let why = String::from_utf8_lossy(&ended.stderr);
        let told = writeln!(
            std::io::stderr(),
            "\nok qcow2 images # SKIP no FUSE: {}",
            why.trim()
        );
        told.unwrap();
    }
    works
}

#[test]
fn a_qcow2_image() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    if !have_fuse(folder) {
        return;
    }
    // A name that means something in QEMU's options.
    let path = folder.join("a,b=c.qcow2");
    let specs = [qcow2(&path, SIZE)];
    let store = open(&specs, folder).unwrap();
    assert_eq!(store.sizes(), [("root".into(), SIZE)]);
    store.begin_copy(1, 1).unwrap();
    let mut random = Random::new(8);
    let mut content: Content = vec![vec![0; SIZE as usize]];
    store
        .copy(&changes(&mut random, &mut content, 30, 9000))
        .unwrap();
    store
        .stage(changes(&mut random, &mut content, 30, 9000))
        .unwrap();
    // All of a cluster, which the image then does not need any more.
    let mut gone = Vec::new();
    let record = Record {
        disk: 0,
        offset: 0,
        change: Change::Discard(1 << 17),
    };
    record.encode(&mut gone);
    content[0][..1 << 17].fill(0);
    store.stage(gone).unwrap();
    store.seal(3).unwrap();
    store.apply(3).unwrap();
    let sums = store.checksum().unwrap();
    let why = format!("{:#}", open(&specs, folder).err().unwrap());
    assert!(why.contains("lock"), "{why}");
    assert_eq!(store.checksum().unwrap(), sums);
    store.close().unwrap();
    assert!(!folder.join("guest.journal.disk0").exists());

    // As another program reads it.
    let flat = folder.join("flat");
    let done = Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([&path, &flat])
        .status();
    assert!(done.unwrap().success());
    assert!(std::fs::read(&flat).unwrap() == content[0]);
    let store = open(&specs, folder).unwrap();
    assert_eq!(store.whole().map(|stamp| stamp.epoch), Some(3));
    assert_eq!(store.checksum().unwrap(), sums);
    drop(store);

    let not = [Spec {
        format: Format::Qcow2,
        ..raw(folder, &[SIZE])[0].clone()
    }];
    let why = format!("{:#}", open(&not, folder).err().unwrap());
    assert!(why.contains("not in qcow2 format"), "{why}");
}
