// SPDX-License-Identifier: GPL-2.0-or-later

//! What replicating a disk costs on this host's own processor: a real QEMU whose guest has no processors,
//! a real nbdkit, both hosts' controllers as threads of this process, connected through the loopback.
//! `qemu-img bench` writes and reads in the guest's place, to an export of its disk by QEMU.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, UNIX_EPOCH};

use ring::digest::{digest, SHA256};
use serde_json::{json, Value};

use super::guest_with_disk::{callers_by, stand_by};
use super::machine::{self, connect, directory, memory_file, Killed};
use super::model::{until, Model};
use crate::config::disk::{Disk, Durability, Format};
use crate::host::qmp::Qmp;
use crate::peer::channel::{Channel, Way};
use crate::peer::identity::{Identity, Pair};
use crate::peer::stream::lock;
use crate::primary::disks::queue::Queue;
use crate::primary::disks::Disks;
use crate::primary::link::introduce;
use crate::primary::pace::Pace;
use crate::primary::protect::{self, Parts, Plan};
use crate::report::Report;
use crate::standby::caller::Callers;
use crate::standby::disks::{Spec, Store};

/// Bytes of the disk.
const SIZE: u64 = 256 << 20;
/// As `disk_buffer` is without being set.
const BOUND: u64 = 256 << 20;
const INTERVAL: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(120);
const TIMEOUT: Duration = Duration::from_secs(5);

/// What `qemu-img bench` is to do, one request at a time.
struct Load {
    name: &'static str,
    writes: bool,
    /// Bytes of a request, and from one to the next.
    size: u64,
    step: u64,
    count: u64,
    /// After so many requests the disk is flushed; 0: never.
    flush: u64,
}

const LOADS: [Load; 3] = [
    Load {
        name: "seq_write",
        writes: true,
        size: 1 << 20,
        step: 1 << 20,
        count: 2048,
        flush: 0,
    },
    // Meets each block once before any of them twice.
    Load {
        name: "scattered",
        writes: true,
        size: 4096,
        step: (1 << 20) + 4096,
        count: 4000,
        flush: 1,
    },
    Load {
        name: "seq_read",
        writes: false,
        size: 1 << 20,
        step: 1 << 20,
        count: 4096,
        flush: 0,
    },
];
const WAYS: [&str; 5] = [
    "unprotected",
    "mirror",
    "mirror_tls",
    "protected_plain",
    "protected",
];

/// A QEMU with a disk, and a client's way to it.
struct Rig {
    qmp: Qmp,
    qemu: Killed,
    ways: (Way, Way),
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = match std::env::var_os("REMUS_SPEED_DIR") {
            Some(path) => tempfile::tempdir_in(path).unwrap(),
            None => directory(),
        };
        let at = |name: &str| dir.path().join(name);
        let direct = match std::env::var_os("REMUS_SPEED_DIRECT") {
            Some(_) => "on",
            None => "off",
        };
        // All blocks are there before, so that nobody has to find room for them.
        for image in ["a.img", "b.img", "far.img"] {
            fs::write(at(image), vec![0x11; SIZE as usize]).unwrap();
        }
        memory_file(&at("b.ram"));
        let monitor = |name: &str| format!("unix:{},server=on,wait=off", at(name).display());
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-accel", "tcg", "-machine", "none", "-S"])
            .args(["-qmp", &monitor("control"), "-qmp", &monitor("qmp")])
            .arg("-blockdev")
            .arg(format!(
                "driver=file,filename={},node-name=file0,cache.direct={direct}",
                at("a.img").display()
            ))
            .args(["-blockdev", "driver=raw,file=file0,node-name=disk0"])
            // It keeps the buffers that it has had. Otherwise it is as it happens whether each costs page faults.
            .env("MALLOC_MMAP_THRESHOLD_", (32 << 20).to_string())
            .env("MALLOC_TRIM_THRESHOLD_", (1 << 30).to_string())
            .stdin(Stdio::null())
            .spawn();
        let qemu = Killed(qemu.expect("this needs QEMU: apt install qemu-system-x86"));
        let mut qmp = connect(&at("control"));
        let address = json!({"type": "unix", "data": {"path": at("nbd")}});
        let export = json!({"type": "nbd", "id": "guest", "node-name": "disk0", "name": "disk0", "writable": true});
        qmp.execute("nbd-server-start", json!({"addr": address}))
            .unwrap();
        qmp.execute("block-export-add", export).unwrap();
        let pair = Pair::make("alpha", "beta").unwrap();
        let way = |n: usize| {
            Way::Tls(Arc::new(
                Identity::parse(pair.halves[n].1.as_bytes()).unwrap(),
            ))
        };
        Self {
            qmp,
            qemu,
            ways: (way(0), way(1)),
            dir,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Does what `load` says, and returns for how long that took.
    fn run(&self, load: &Load) -> f64 {
        let mut bench = Command::new("qemu-img");
        bench.args(["bench", "-f", "raw", "-d", "1"]);
        if load.writes {
            // Zeros would not be sent as they are.
            bench.args(["-w", "--pattern=90"]);
        }
        for (option, value) in [("-s", load.size), ("-S", load.step), ("-c", load.count)] {
            bench.args([option, &value.to_string()]);
        }
        if load.flush > 0 {
            bench.arg(format!("--flush-interval={}", load.flush));
        }
        bench.arg(format!(
            "nbd+unix:///disk0?socket={}",
            self.at("nbd").display()
        ));
        let out = bench
            .output()
            .expect("this needs qemu-img: apt install qemu-utils");
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        let word = said.split("Run completed in ").nth(1).unwrap();
        word.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Measures all loads. `nbdkit`: its process; `queue`: what the standby may lack.
    fn measure(&self, nbdkit: Option<u32>, queue: Option<&Queue>) -> Value {
        let mut out = json!({});
        for load in &LOADS {
            for image in ["a.img", "b.img", "far.img"] {
                // What came before is not to be written while this is measured.
                File::open(self.at(image)).unwrap().sync_all().unwrap();
            }
            let busy = || {
                let of = |pid| busy(&format!("/proc/{pid}/stat"));
                let qemu = of(self.qemu.0.id());
                [qemu, nbdkit.map_or(0.0, of), of(std::process::id())]
            };
            let (before, from) = (busy(), now_ms());
            let took = self.run(load);
            let (to, ended) = (now_ms(), Instant::now());
            let settled = |queue: &Queue| queue.level().held == 0;
            until("the standby to have it all", LONG, || {
                queue.is_none_or(settled)
            });
            let settled = took + ended.elapsed().as_secs_f64();
            let bytes = (load.size * load.count) as f64;
            let per = match load.flush {
                0 => bytes / f64::from(1 << 20),
                _ => load.count as f64,
            };
            let cpu: Vec<f64> = busy()
                .iter()
                .zip(before)
                .map(|(now, b)| (now - b) * 1000.0 / per)
                .collect();
            out[load.name] = json!({
                "bytes_per_s": bytes / took, "iops": load.count as f64 / took,
                "settled_bytes_per_s": bytes / settled, "ms": [from, to],
                "cpu_ms": {"qemu": cpu[0], "nbdkit": cpu[1], "controllers": cpu[2]},
            });
        }
        out
    }

    fn mirror(&mut self, tls: bool) -> Value {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port().to_string();
        drop(free);
        let mut nbdkit = Command::new("nbdkit");
        nbdkit.args([
            "--foreground",
            "--exit-with-parent",
            "--ipaddr",
            "127.0.0.1",
            "--port",
            &port,
        ]);
        let mut node = json!({
            "driver": "nbd", "node-name": "far", "server": {"type": "inet", "host": "127.0.0.1", "port": port},
        });
        if tls {
            let keys = self.at("keys.psk");
            // The names are QEMU's.
            fs::write(&keys, format!("qemu:{}\n", "5a".repeat(32))).unwrap();
            nbdkit
                .arg("--tls=require")
                .arg(format!("--tls-psk={}", keys.display()));
            let creds = json!({"qom-type": "tls-creds-psk", "id": "tls", "endpoint": "client", "dir": self.dir.path()});
            self.qmp.execute("object-add", creds).unwrap();
            node["tls-creds"] = json!("tls");
        }
        nbdkit
            .arg("file")
            .arg(self.at("far.img"))
            .stdin(Stdio::null());
        let nbdkit = Killed(
            nbdkit
                .spawn()
                .expect("this needs nbdkit: apt install nbdkit"),
        );
        until("nbdkit", LONG, || {
            self.qmp.execute("blockdev-add", node.clone()).is_ok()
        });
        let job = json!({"job-id": "far", "device": "disk0", "target": "far", "sync": "full", "copy-mode": "write-blocking"});
        self.qmp.execute("blockdev-mirror", job).unwrap();
        let mut jobs = || self.qmp.execute("query-block-jobs", json!({})).unwrap();
        until("the mirror", LONG, || {
            let job = &jobs()[0];
            job["ready"] == true && job["actively-synced"] == true
        });
        let out = self.measure(Some(nbdkit.0.id()), None);
        self.same("far.img");
        let mut ask = |command, arguments| self.qmp.execute(command, arguments).unwrap();
        ask("block-job-cancel", json!({"device": "far", "force": true}));
        until("the mirror's end", LONG, || {
            ask("query-block-jobs", json!({})) == json!([])
        });
        ask("blockdev-del", json!({"node-name": "far"}));
        if tls {
            ask("object-del", json!({"id": "tls"}));
        }
        out
    }

    fn protected(&mut self, ways: &(Way, Way)) -> Value {
        let standby = Standby::start(self, &ways.1);
        let mut qmp = connect(&self.at("qmp"));
        let disk = Disk {
            name: "root".into(),
            node: "disk0".into(),
            path: self.at("a.img"),
            format: Format::Raw,
        };
        let list = Disks::find(&mut qmp, &[disk]).unwrap();
        let disks = Disks::serve(self.dir.path(), "count", &list, BOUND).unwrap();
        let (queue, nbdkit) = (Arc::clone(&disks.queue), disks.nbdkit());
        let plan = Plan {
            disks: list,
            pace: Pace::Fixed(INTERVAL),
            ..machine::plan(TIMEOUT)
        };
        // Memory is not what is measured.
        let (model, stop) = (
            Model::new(Arc::new(|_| Vec::new())),
            Arc::new(AtomicBool::new(false)),
        );
        let (address, way, trace) = (standby.address, ways.0.clone(), self.at("trace"));
        let mut connect = move || Channel::connect(TcpStream::connect(address)?, &way, TIMEOUT);
        let link = introduce(&plan, &mut connect).unwrap();
        let mut parts = Parts {
            guest: Box::new(qmp),
            sealer: Box::new(model.clone()),
            committer: Box::new(model.clone()),
            pages: Box::new(model.clone()),
            disks: Some(disks),
            hearing: None,
            report: Report::open(Some(&trace)).unwrap(),
            orders: channel().1,
            stop: Arc::clone(&stop),
        };
        let protecting = thread::spawn(move || {
            let mut pace = plan.pace;
            let end = protect::run(&plan, &mut parts, link, &mut pace);
            if let Some(disks) = parts.disks.take() {
                disks.end(parts.guest.qmp()).unwrap();
            }
            end
        });
        let commits = || lock(&model.book).commits.len();
        until("epochs", LONG, || commits() > 2 || protecting.is_finished());
        let mut out = self.measure(Some(nbdkit), Some(&queue));
        stop.store(true, Ordering::SeqCst);
        let end = protecting.join().unwrap();
        assert!(matches!(end, protect::End::Asked), "{end}");
        standby.receiving.join().unwrap();
        self.same("b.img");
        let pauses = pauses(&trace);
        for load in &LOADS {
            let got = &mut out[load.name];
            let within =
                |at: &f64| (got["ms"][0].as_f64()..got["ms"][1].as_f64()).contains(&Some(*at));
            let mut all: Vec<f64> = pauses
                .iter()
                .filter(|(at, _)| within(at))
                .map(|(_, pause)| *pause)
                .collect();
            all.sort_by(f64::total_cmp);
            got["pause_ms"] = json!(all.get(all.len() / 2));
        }
        out
    }

    /// The copy has what the disk has.
    fn same(&self, copy: &str) {
        let sum = |name| digest(&SHA256, &fs::read(self.at(name)).unwrap());
        assert_eq!(sum("a.img").as_ref(), sum(copy).as_ref());
    }
}

/// The other host.
struct Standby {
    address: SocketAddr,
    receiving: JoinHandle<()>,
}

impl Standby {
    fn start(rig: &Rig, way: &Way) -> Self {
        let spec = Spec {
            name: "root".into(),
            path: rig.at("b.img"),
            format: Format::Raw,
        };
        let store = Store::open(&[spec], &rig.at("b.journal"), Durability::Memory, BOUND).unwrap();
        let (callers, address): (Callers, _) = callers_by(way);
        let ram = rig.at("b.ram");
        let receiving = thread::spawn(move || {
            stand_by(&callers, &ram, &store, &|_| {});
            store.close().unwrap();
        });
        Self { address, receiving }
    }
}

/// Seconds that a process has spent on processors.
fn busy(stat: &str) -> f64 {
    let stat = fs::read_to_string(stat).unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks = |n: usize| fields[n].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / rustix::param::clock_ticks_per_second() as f64
}

/// Milliseconds since 1970.
fn now_ms() -> f64 {
    UNIX_EPOCH.elapsed().unwrap().as_secs_f64() * 1000.0
}

/// When each pause of the guest was, and how long it was, in ms.
fn pauses(trace: &Path) -> Vec<(f64, f64)> {
    let text = fs::read_to_string(trace).unwrap();
    fs::remove_file(trace).unwrap();
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line["event"] == "epoch")
        .filter_map(|line| Some((line["t_ms"].as_f64()?, line["pause_ms"].as_f64()?)))
        .collect()
}

/// Prints a line of JSON for each way in each of `REMUS_SPEED_ROUNDS`.
#[test]
#[ignore = "measures: tests/bench/disk/run --only native"]
fn disk_speed() {
    let rounds = std::env::var("REMUS_SPEED_ROUNDS").map_or(1, |n| n.parse().unwrap());
    let mut rig = Rig::new();
    let tls = rig.ways.clone();
    // A QEMU that has just started is slower.
    rig.measure(None, None);
    for round in 0..rounds {
        for turn in 0..WAYS.len() {
            // Which comes first changes from round to round.
            let way = WAYS[(turn + round) % WAYS.len()];
            let got = match way {
                "mirror" => rig.mirror(false),
                "mirror_tls" => rig.mirror(true),
                "protected_plain" => rig.protected(&(Way::Plain, Way::Plain)),
                "protected" => rig.protected(&tls),
                _ => rig.measure(None, None),
            };
            println!(
                "{}",
                json!({"kind": "native", "round": round + 1, "way": way, "got": got})
            );
        }
    }
}
