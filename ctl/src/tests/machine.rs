// SPDX-License-Identifier: GPL-2.0-or-later

//! The whole loop with real QEMUs (emulated, so that it runs anywhere), on files in the place of the
//! RAM device: a program that counts in memory goes on where the last epoch left it.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use remus_core::uapi::ram::PAGE_SIZE;

use super::model::{until, Model, Patient};
use crate::host::kernel::Guest;
use crate::host::qmp::Qmp;
use crate::host::ram::Ram;
use crate::host::vmm::Vmm;
use crate::peer::channel::{Channel, Way};
use crate::peer::door::Limits;
use crate::peer::stream::lock;
use crate::primary::link::introduce;
use crate::primary::pace::Pace;
use crate::primary::pipeline::Encoding;
use crate::primary::protect::{self, Parts, Plan};
use crate::report::Report;
use crate::standby::caller::{Caller, Callers};
use crate::standby::serve::{self as standby, serve, Held, Offer};
use crate::standby::takeover::take_over;

/// Nothing takes nearly as long, even on a busy host.
const PATIENCE: Duration = Duration::from_secs(120);
pub const MEMORY: u64 = 8 << 20;
/// Where the program counts.
const COUNTER: u64 = 0x7000;

/// A process that is killed when the test ends, however that is.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A boot sector: xor ax, ax; mov ds, ax; again: inc dword [0x7000]; jmp again.
fn boot_sector(path: &Path) {
    let mut sector = vec![
        0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xff, 0x06, 0x00, 0x70, 0xeb, 0xf9,
    ];
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1_474_560, 0);
    fs::write(path, sector).unwrap();
}

pub fn command(ram: &Path, floppy: &Path, qmp: &Path) -> Vec<String> {
    let (ram, floppy, qmp) = (ram.display(), floppy.display(), qmp.display());
    [
        "qemu-system-x86_64",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-accel",
        "tcg",
        "-machine",
        "pc,memory-backend=ram",
        "-m",
        "8M",
        "-object",
        &format!("memory-backend-file,id=ram,size={MEMORY},mem-path={ram},share=on"),
        "-drive",
        &format!("if=floppy,format=raw,readonly=on,file={floppy}"),
        "-qmp",
        &format!("unix:{qmp},server=on,wait=off"),
    ]
    .map(str::to_owned)
    .to_vec()
}

pub fn memory_file(path: &Path) {
    fs::File::create(path).unwrap().set_len(MEMORY).unwrap();
}

pub fn counter(path: &Path) -> u32 {
    let mut bytes = [0; 4];
    fs::File::open(path)
        .unwrap()
        .read_exact_at(&mut bytes, COUNTER)
        .unwrap();
    u32::from_le_bytes(bytes)
}

/// Starts such a machine.
pub fn start(command: &[String]) -> Killed {
    let child = Command::new(&command[0])
        .args(&command[1..])
        .stdin(Stdio::null())
        .spawn();
    Killed(child.expect("these tests need QEMU: apt install qemu-system-x86"))
}

/// How it is protected.
pub fn plan(timeout: Duration) -> Plan {
    Plan {
        domain: "count".into(),
        memory: MEMORY,
        generation: 1,
        run: 1,
        pace: Pace::Fixed(Duration::from_millis(50)),
        timeout,
        depth: 4,
        encoding: Encoding {
            encoders: 2,
            cache_bytes: MEMORY as usize,
            raw: false,
        },
        copy_in_pause: false,
        disks: Vec::new(),
    }
}

/// What its standby serves.
pub fn offer(timeout: Duration) -> Offer {
    Offer {
        domain: "count".into(),
        memory: MEMORY,
        timeout,
    }
}

/// Connects to a QEMU that is starting: its socket is there a moment before it listens.
pub fn connect(path: &Path) -> Qmp {
    let mut connected = None;
    until("the QMP socket", PATIENCE, || {
        connected = Qmp::connect(path).ok();
        connected.is_some()
    });
    connected.unwrap()
}

/// Directory in memory, gone at the end.
pub fn directory() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("remus-test")
        .tempdir_in("/dev/shm")
        .unwrap()
}

#[test]
fn survives_its_host() {
    let dir = directory();
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    let (primary_ram, standby_ram, floppy) = (at("a.ram"), at("b.ram"), at("floppy"));
    memory_file(&primary_ram);
    memory_file(&standby_ram);
    boot_sector(&floppy);

    let mut first = start(&command(&primary_ram, &floppy, &at("a.qmp")));
    let mut guest = connect(&at("a.qmp"));
    guest.check_memory(&primary_ram, MEMORY).unwrap();
    let wrong = guest
        .check_memory(&standby_ram, MEMORY)
        .unwrap_err()
        .to_string();
    assert!(wrong.contains("does not have"), "{wrong}");
    assert!(guest.check_memory(&primary_ram, 2 * MEMORY).is_err());
    until("the program", PATIENCE, || counter(&primary_ram) > 0);

    let waiting = command(&standby_ram, &floppy, &at("b.qmp"));
    let (mut vmm, mut successor) = Vmm::start(&waiting, &at("b.qmp"), &at("b.log")).unwrap();

    let copy = primary_ram.clone();
    let model = Model::new(Arc::new(move |_| fs::read(&copy).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let callers = Callers::open(listener, Way::Plain, Limits::default(), Caller::meet).unwrap();
    let trace_path = at("trace");
    // Nobody has to wait for it here.
    let timeout = PATIENCE;
    let plan = plan(timeout);
    let ram = standby_ram.clone();
    let receiving = thread::spawn(move || {
        let offer = offer(timeout);
        let (mut held, mut image) = (Held::default(), Ram::open(&ram).unwrap());
        let mut parts = standby::Parts {
            callers: &callers,
            image: &mut image,
            disks: None,
            machine: &mut Patient,
            report: &Report::default(),
            stop: &AtomicBool::new(false),
            tick: &|| {},
        };
        let (caller, _) = callers.next(PATIENCE).unwrap();
        let end = serve(caller, &offer, &mut held, &mut parts);
        (end, held)
    });
    let mut connect = move || Channel::connect(TcpStream::connect(address)?, &Way::Plain, timeout);
    let link = introduce(&plan, &mut connect).unwrap();
    let mut parts = Parts {
        guest: Box::new(guest),
        sealer: Box::new(model.clone()),
        committer: Box::new(model.clone()),
        pages: Box::new(model.clone()),
        disks: None,
        hearing: None,
        report: Report::open(Some(&trace_path)).unwrap(),
        orders: channel().1,
        stop: Arc::default(),
    };
    let protecting = thread::spawn(move || {
        let mut pace = plan.pace;
        protect::run(&plan, &mut parts, link, &mut pace)
    });
    until("20 commits", PATIENCE, || {
        lock(&model.book).commits.len() >= 20
    });
    first.0.kill().unwrap();

    // Its machine is gone without a word, so the loop ends, and the standby takes over.
    let primary = protecting.join().unwrap();
    assert!(matches!(primary, protect::End::Failed(_)), "{primary}");
    let (end, held) = receiving.join().unwrap();
    let standby::End::Lost(lost) = end else {
        panic!("not lost")
    };
    // It has said so.
    assert!(lost.given_up, "{}", lost.why);
    let book = lock(&model.book);
    assert!(*book.commits.last().unwrap() <= held.epoch);
    let image = fs::read(&standby_ram).unwrap();
    let want = &book.snapshots[&held.epoch];
    let differ = image
        .chunks(PAGE_SIZE)
        .zip(want.chunks(PAGE_SIZE))
        .filter(|(a, b)| a != b);
    assert_eq!(differ.count(), 0, "S4");
    drop(book);

    let before = counter(&standby_ram);
    assert!(before > 0);
    let phases = take_over(&mut successor, &held, None, lost.heard, &Report::default()).unwrap();
    assert_eq!((phases.epoch, phases.generation), (held.epoch, 2));
    assert_eq!(successor.status().unwrap(), "running");
    until("the count to go on", PATIENCE, || {
        counter(&standby_ram) > before
    });
    assert!(vmm.ended().unwrap().is_none());

    // Every epoch is in the trace, and says how long the guest stood still.
    let trace = fs::read_to_string(&trace_path).unwrap();
    let lines: Vec<serde_json::Value> = trace
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let epochs: Vec<_> = lines.iter().filter(|l| l["event"] == "epoch").collect();
    assert!(epochs.len() >= 20);
    assert_eq!(
        lines[0]["event"], "pass",
        "the first copy went while it ran"
    );
    for line in &epochs {
        assert!(line["pause_ms"].as_f64().unwrap() > 0.0);
    }
    eprintln!("{phases:?} {}", lines[lines.len() - 1]);
}

/// A guest that is shut down is told from one whose host died.
#[test]
fn shutdown_is_not_death() {
    let dir = directory();
    let (ram, floppy, qmp) = (
        dir.path().join("ram"),
        dir.path().join("f"),
        dir.path().join("q"),
    );
    memory_file(&ram);
    boot_sector(&floppy);
    let _first = start(&command(&ram, &floppy, &qmp));
    let mut guest = connect(&qmp);
    let sizes: Vec<usize> = (0..30)
        .map(|_| {
            guest.pause().unwrap();
            let state = guest.save().unwrap();
            Guest::resume(&mut guest).unwrap();
            state.len()
        })
        .collect();
    assert!(
        sizes
            .iter()
            .all(|s| *s > 1000 && s.abs_diff(sizes[0]) < 20_000),
        "{sizes:?}"
    );
    assert_eq!(guest.ended(), None);
    guest.execute("quit", serde_json::json!({})).unwrap();
    until("the end", PATIENCE, || guest.pause().is_err());
    assert_eq!(guest.ended().as_deref(), Some("host-qmp-quit"));
}
