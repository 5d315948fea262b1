// SPDX-License-Identifier: GPL-2.0-or-later

//! Both hosts with real QEMUs, real nbdkit and a guest that writes to its disk all the time: whatever
//! happens to the connection, the standby's image is that of the epoch that it holds.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;
use ring::digest::{digest, SHA256};
use rustix::process::{kill_process, Pid, Signal};

use super::machine::{self, command, connect, counter, directory, memory_file, Killed};
use super::model::{flaky, until, Failure, Model, Patient, Random};
use crate::args::Loss;
use crate::config::disk::{Disk, Durability, Format};
use crate::host::kernel::Guest;
use crate::host::qmp::Qmp;
use crate::host::ram::Ram;
use crate::host::vmm::Vmm;
use crate::peer::channel::{Channel, Way};
use crate::peer::door::Limits;
use crate::peer::stream::lock;
use crate::primary::disks::{self, Disks};
use crate::primary::keep::keep;
use crate::primary::link::introduce;
use crate::primary::pace::Pace;
use crate::primary::protect::{self, Parts, Plan};
use crate::report::live::{Ask, Order};
use crate::report::Report;
use crate::standby::caller::{Caller, Callers};
use crate::standby::disks::tests::model::World;
use crate::standby::disks::{Spec, Store};
use crate::standby::serve::{self as standby, serve, Held, Lost};
use crate::standby::takeover::take_over;

/// Bytes of the disk: more than the program reaches.
const DISK: usize = 9 << 20;
const LONG: Duration = Duration::from_secs(120);
const TIMEOUT: Duration = Duration::from_millis(1500);

/// Counts in memory, and writes each number to three sectors of the first 8 MiB of the disk, at a place
/// that depends on it, through the BIOS:
///
/// ```text
///        xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7c00
/// again: inc dword [0x7000]
///        mov eax, [0x7000]; mov [0x8000], eax
///        imul eax, eax, 0x9e3779b1; shr eax, 18; mov [packet + 8], eax
///        mov si, packet; mov dl, 0x80; mov ax, 0x4300; int 0x13
///        jmp again
/// packet: 16 bytes: 3 sectors from 0:0x8000 to the sector at packet + 8
/// ```
const PROGRAM: [u8; 65] = [
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0x66, 0xff, 0x06, 0x00, 0x70, 0x66, 0xa1,
    0x00, 0x70, 0x66, 0xa3, 0x00, 0x80, 0x66, 0x69, 0xc0, 0xb1, 0x79, 0x37, 0x9e, 0x66, 0xc1, 0xe8,
    0x12, 0x66, 0xa3, 0x39, 0x7c, 0xbe, 0x31, 0x7c, 0xb2, 0x80, 0xb8, 0x00, 0x43, 0xcd, 0x13, 0xeb,
    0xd8, 0x10, 0x00, 0x03, 0x00, 0x00, 0x80, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00,
];

/// A QEMU's command with the disk `image`.
fn with_disk(ram: &Path, floppy: &Path, qmp: &Path, image: &Path) -> Vec<String> {
    let mut command = command(ram, floppy, qmp);
    let image = image.display();
    command.extend(
        [
            "-boot",
            "a",
            "-blockdev",
            &format!("driver=file,filename={image},node-name=file0"),
            "-blockdev",
            "driver=raw,file=file0,node-name=disk0",
            "-device",
            "virtio-blk-pci,drive=disk0",
        ]
        .map(str::to_owned),
    );
    command
}

/// What the primary's image was at each save.
type Sums = Arc<Mutex<Vec<Vec<u8>>>>;

/// A guest whose image is looked at while it stands still.
struct Watched {
    qmp: Qmp,
    image: PathBuf,
    sums: Sums,
}

impl Guest for Watched {
    fn pause(&mut self) -> Result<()> {
        self.qmp.pause()
    }

    fn save(&mut self) -> Result<Vec<u8>> {
        lock(&self.sums).push(sum(&self.image));
        self.qmp.save()
    }

    fn resume(&mut self) -> Result<()> {
        Guest::resume(&mut self.qmp)
    }

    fn runs(&mut self) -> Result<bool> {
        self.qmp.runs()
    }

    fn quit(&mut self) -> Result<()> {
        self.qmp.quit()
    }

    fn ended(&mut self) -> Option<String> {
        self.qmp.ended()
    }

    fn qmp(&mut self) -> Option<&mut Qmp> {
        Some(&mut self.qmp)
    }
}

fn sum(image: &Path) -> Vec<u8> {
    digest(&SHA256, &fs::read(image).unwrap()).as_ref().to_vec()
}

/// A guest on its primary, and what a standby of it needs.
struct Scene {
    dir: tempfile::TempDir,
    first: Killed,
    model: Model,
    sums: Sums,
    guest: Option<Watched>,
    plan: Plan,
    disks: Option<Disks>,
    /// Ends its protection.
    stop: Arc<AtomicBool>,
}

impl Scene {
    /// `bound`: bytes of changes that the primary holds.
    fn new(bound: u64) -> Self {
        let dir = directory();
        let at = |name: &str| dir.path().join(name);
        for ram in ["a.ram", "b.ram"] {
            memory_file(&at(ram));
        }
        let mut floppy = PROGRAM.to_vec();
        floppy.resize(510, 0);
        floppy.extend([0x55, 0xaa]);
        floppy.resize(1_474_560, 0);
        fs::write(at("floppy"), floppy).unwrap();
        // The standby has some of it, and other things. A part is zeros.
        let mut random = Random(77);
        let mut disk: Vec<u8> = (0..DISK).map(|_| random.next() as u8).collect();
        disk[DISK / 4..DISK / 2].fill(0);
        fs::write(at("a.img"), &disk).unwrap();
        disk[DISK / 3..].fill(7);
        fs::write(at("b.img"), &disk).unwrap();

        let start = with_disk(&at("a.ram"), &at("floppy"), &at("a.qmp"), &at("a.img"));
        let first = machine::start(&start);
        let mut qmp = connect(&at("a.qmp"));
        let ram = at("a.ram");
        until("the program", LONG, || counter(&ram) > 3);
        let configured = [Disk {
            name: "root".into(),
            node: "disk0".into(),
            path: at("a.img"),
            format: Format::Raw,
        }];
        let list = Disks::find(&mut qmp, &configured).unwrap();
        let disks = Disks::serve(dir.path(), "count", &list, bound).unwrap();
        let sums = Sums::default();
        let plan = Plan {
            disks: list,
            ..machine::plan(TIMEOUT)
        };
        let guest = Watched {
            qmp,
            image: at("a.img"),
            sums: Arc::clone(&sums),
        };
        Self {
            model: Model::new(Arc::new(move |_| fs::read(&ram).unwrap())),
            first,
            sums,
            guest: Some(guest),
            plan,
            disks: Some(disks),
            stop: Arc::default(),
            dir,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Protects it, over connections that `connect` makes.
    fn protect(
        &mut self,
        mut connect: impl FnMut() -> Result<Channel> + Send + 'static,
        orders: Receiver<Order>,
    ) -> JoinHandle<protect::End> {
        let link = introduce(&self.plan, &mut connect).unwrap();
        let plan = self.plan.clone();
        let mut parts = Parts {
            guest: Box::new(self.guest.take().unwrap()),
            sealer: Box::new(self.model.clone()),
            committer: Box::new(self.model.clone()),
            pages: Box::new(self.model.clone()),
            disks: self.disks.take(),
            hearing: None,
            report: Report::open(Some(&self.at("trace"))).unwrap(),
            orders,
            stop: Arc::clone(&self.stop),
        };
        thread::spawn(move || keep(&plan, &mut parts, &mut connect, link, Loss::Hold))
    }

    fn store(&self, durability: Durability, bound: u64) -> Store {
        let spec = Spec {
            name: "root".into(),
            path: self.at("b.img"),
            format: Format::Raw,
        };
        Store::open(&[spec], &self.at("b.journal"), durability, bound).unwrap()
    }

    fn commits(&self) -> usize {
        lock(&self.model.book).commits.len()
    }

    /// Ends its protection in good order: the standby has the disk of the epoch that it holds.
    fn end(&self, protecting: JoinHandle<protect::End>, receiving: JoinHandle<(Held, Store)>) {
        self.stop.store(true, Ordering::SeqCst);
        let end = protecting.join().unwrap();
        assert!(matches!(end, protect::End::Asked), "{end}");
        let (held, store) = receiving.join().unwrap();
        same_disk(&self.model, &self.sums, held.epoch, &store);
    }
}

/// Serves one caller.
fn serve_one(
    caller: Caller,
    callers: &Callers,
    ram: &Path,
    disks: Option<&Store>,
    held: &mut Held,
) -> standby::End {
    let mut parts = standby::Parts {
        callers,
        image: &mut Ram::open(ram).unwrap(),
        disks,
        machine: &mut Patient,
        report: &Report::default(),
        stop: &AtomicBool::new(false),
        tick: &|| {},
    };
    serve(caller, &machine::offer(TIMEOUT), held, &mut parts)
}

/// Serves the callers that come until one is dead or says good-bye; `lost` is called when a connection is
/// lost, with the epoch that is held.
pub(super) fn stand_by(
    callers: &Callers,
    ram: &Path,
    store: &Store,
    lost: &dyn Fn(u64),
) -> (Held, Option<Lost>) {
    let mut held = Held::default();
    let mut next = None;
    loop {
        let caller = match next.take() {
            Some(caller) => caller,
            None => Box::new(callers.next(LONG).expect("nobody calls").0),
        };
        match serve_one(*caller, callers, ram, Some(store), &mut held) {
            standby::End::Lost(now) if now.given_up => return (held, Some(now)),
            standby::End::Lost(mut now) => {
                lost(held.epoch);
                next = now.again.take();
            }
            standby::End::Bye(_) => return (held, None),
            standby::End::Other(caller) => {
                // It had nothing whole yet.
                assert_eq!(held.epoch, 0);
                held = Held::default();
                next = Some(caller);
            }
            // Its connection was lost before it had said who it is.
            standby::End::Refused(_) => {}
            standby::End::Failed(e) => panic!("failed: {e:#}"),
            standby::End::Handover(primary) => {
                primary.resumed();
                return (held, None);
            }
            standby::End::Asked => panic!("not asked for"),
        }
    }
}

/// A standby that serves whoever comes, until one says good-bye, and where it listens.
fn standing_by(ram: PathBuf, store: Store) -> (SocketAddr, JoinHandle<(Held, Store)>) {
    let (callers, address) = callers();
    let receiving = thread::spawn(move || {
        let (held, _) = stand_by(&callers, &ram, &store, &|_| {});
        (held, store)
    });
    (address, receiving)
}

pub(super) fn callers() -> (Callers, SocketAddr) {
    callers_by(&Way::Plain)
}

pub(super) fn callers_by(way: &Way) -> (Callers, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let callers = Callers::open(listener, way.clone(), Limits::default(), Caller::meet).unwrap();
    (callers, address)
}

pub(super) fn channel_to(address: SocketAddr) -> Result<(Channel, TcpStream)> {
    let stream = TcpStream::connect(address)?;
    let other = stream.try_clone()?;
    Ok((Channel::connect(stream, &Way::Plain, TIMEOUT)?, other))
}

/// The image at `epoch` is what the primary's was when that was sealed.
fn same_disk(model: &Model, sums: &Sums, epoch: u64, store: &Store) {
    let nth = lock(&model.book).saves[&epoch];
    let image = store.checksum().unwrap();
    assert_eq!(
        image[0].as_slice(),
        lock(sums)[nth],
        "the disk of epoch {epoch}"
    );
    assert_eq!(store.whole().map(|stamp| stamp.epoch), Some(epoch));
}

#[test]
fn disk_survives_its_host() {
    let mut scene = Scene::new(64 << 20);
    let (ram, image) = (scene.at("b.ram"), scene.at("b.img"));
    let waiting = with_disk(&ram, &scene.at("floppy"), &scene.at("b.qmp"), &image);
    let (mut vmm, mut successor) =
        Vmm::start(&waiting, &scene.at("b.qmp"), &scene.at("b.log")).unwrap();
    let store = scene.store(Durability::Memory, 64 << 20);
    let (callers, address) = callers();
    let of = ram.clone();
    let receiving = thread::spawn(move || {
        let (held, lost) = stand_by(&callers, &of, &store, &|_| {});
        (held, lost, store)
    });
    let connect = move || channel_to(address).map(|(channel, _)| channel);
    let protecting = scene.protect(connect, channel().1);
    until("20 commits", LONG, || scene.commits() >= 20);
    scene.first.0.kill().unwrap();
    let primary = protecting.join().unwrap();
    assert!(matches!(primary, protect::End::Failed(_)), "{primary}");

    let (held, lost, store) = receiving.join().unwrap();
    same_disk(&scene.model, &scene.sums, held.epoch, &store);
    let (at, before) = (counter(&ram), sum(&image));
    let heard = lost.unwrap().heard;
    let report = Report::default();
    take_over(&mut successor, &held, Some(store), heard, &report).unwrap();
    until("the guest to write to its disk again", LONG, || {
        counter(&ram) > at && sum(&image) != before
    });
    assert!(vmm.ended().unwrap().is_none());
}

/// Runs a guest whose connection is lost `cuts` times at random moments, for `away`, and compares its disk
/// each time. Returns how often the disk was copied.
fn comes_back(cuts: usize, bound: u64, durability: Durability, away: Duration) -> usize {
    let mut scene = Scene::new(bound);
    let store = Arc::new(scene.store(durability, bound));
    let (callers, address) = callers();
    let (ram, model, sums) = (
        scene.at("b.ram"),
        scene.model.clone(),
        Arc::clone(&scene.sums),
    );
    let held = Arc::clone(&store);
    let compared = Arc::new(Mutex::new(BTreeMap::new()));
    let seen = Arc::clone(&compared);
    let receiving = thread::spawn(move || {
        stand_by(&callers, &ram, &held, &|epoch| {
            // While a copy is under way nothing is whole.
            if epoch > 0 && held.whole().is_some() {
                same_disk(&model, &sums, epoch, &held);
                *lock(&seen).entry(epoch).or_insert(0) += 1;
            }
        })
    });
    let streams: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
    let (kept, gone) = (Arc::clone(&streams), Arc::new(AtomicBool::new(false)));
    let away_now = Arc::clone(&gone);
    let connect = move || {
        if away_now.load(Ordering::SeqCst) {
            anyhow::bail!("the link is down");
        }
        let (channel, stream) = channel_to(address)?;
        lock(&kept).push(stream);
        Ok(channel)
    };
    let protecting = scene.protect(connect, channel().1);
    let mut random = Random(0x5eed);
    for cut in 0..cuts {
        let target = scene.commits() + 2 + random.below(8);
        until("commits", LONG, || scene.commits() >= target);
        gone.store(true, Ordering::SeqCst);
        // One of the three streams, or all.
        let mut streams = lock(&streams);
        let count = streams.len();
        for (n, stream) in streams.drain(..).enumerate() {
            if cut % 4 == 3 || n + 3 == count + cut % 4 {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
        drop(streams);
        thread::sleep(away);
        gone.store(false, Ordering::SeqCst);
    }
    let target = scene.commits() + 3;
    until("commits at the end", LONG, || scene.commits() >= target);
    scene.stop.store(true, Ordering::SeqCst);
    let end = protecting.join().unwrap();
    assert!(matches!(end, protect::End::Asked), "{end}");
    let (held, _) = receiving.join().unwrap();
    same_disk(&scene.model, &scene.sums, held.epoch, &store);
    let compared = lock(&compared);
    assert!(!compared.is_empty());
    eprintln!("disks compared at epochs {:?}", compared.keys());
    let trace = fs::read_to_string(scene.at("trace")).unwrap();
    trace.matches("\"disks-copied\"").count()
}

/// What the guest writes ends epochs long before their time.
#[test]
fn a_half_full_buffer_ends_the_epoch() {
    let bound = 128 << 10;
    let mut scene = Scene::new(bound);
    scene.plan.pace = Pace::Fixed(Duration::from_secs(3600));
    let store = scene.store(Durability::Memory, 64 << 20);
    let (address, receiving) = standing_by(scene.at("b.ram"), store);
    let connect = move || channel_to(address).map(|(channel, _)| channel);
    let protecting = scene.protect(connect, channel().1);
    until("epochs", LONG, || scene.commits() >= 5);
    scene.end(protecting, receiving);
}

/// A planned switch: the guest stands still at the epoch that the standby has.
#[test]
fn disk_is_handed_over() {
    let mut scene = Scene::new(64 << 20);
    let store = scene.store(Durability::Memory, 64 << 20);
    let (address, receiving) = standing_by(scene.at("b.ram"), store);
    let connect = move || channel_to(address).map(|(channel, _)| channel);
    let (order, orders) = channel();
    let protecting = scene.protect(connect, orders);
    until("commits", LONG, || scene.commits() >= 3);
    let (reply, answer) = channel();
    let ask = Ask::Failover;
    order.send(Order { ask, reply }).unwrap();
    let answer = answer.recv_timeout(LONG).unwrap();
    assert!(answer.is_ok(), "{answer:?}");
    let end = protecting.join().unwrap();
    assert!(matches!(end, protect::End::HandedOver), "{end}");
    let (held, store) = receiving.join().unwrap();
    same_disk(&scene.model, &scene.sums, held.epoch, &store);
    assert_eq!(
        store.checksum().unwrap()[0].as_slice(),
        sum(&scene.at("a.img")),
        "both hosts have the same disk"
    );
}

/// The standby's process is killed: what begins in its place has the images of a whole epoch, and no memory.
#[test]
fn disk_after_a_new_standby() {
    let mut scene = Scene::new(64 << 20);
    let (ram, store) = (scene.at("b.ram"), scene.store(Durability::Memory, 64 << 20));
    let (callers, address) = callers();
    let streams: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
    let kept = Arc::clone(&streams);
    let connect = move || {
        let (channel, stream) = channel_to(address)?;
        lock(&kept).push(stream);
        Ok(channel)
    };
    let killed = Arc::new(AtomicBool::new(false));
    let kill = Arc::clone(&killed);
    let (journal, image) = (scene.at("b.journal"), scene.at("b.img"));
    let receiving = thread::spawn(move || {
        // It ends where a connection is lost, without a word to its journal.
        let first = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            stand_by(&callers, &ram, &store, &|_| {
                kill.store(true, Ordering::SeqCst);
                std::panic::resume_unwind(Box::new(()));
            })
        }));
        assert!(first.is_err());
        drop(store);
        memory_file(&ram);
        let spec = Spec {
            name: "root".into(),
            path: image,
            format: Format::Raw,
        };
        let store = Store::open(&[spec], &journal, Durability::Memory, 64 << 20).unwrap();
        assert!(store.whole().is_some());
        let (held, _) = stand_by(&callers, &ram, &store, &|_| {});
        (held, store)
    });
    let protecting = scene.protect(connect, channel().1);
    until("commits", LONG, || scene.commits() >= 5);
    for stream in lock(&streams).drain(..) {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
    until("the end of the standby", LONG, || {
        killed.load(Ordering::SeqCst)
    });
    let target = scene.commits() + 5;
    until("commits", LONG, || scene.commits() >= target);
    scene.end(protecting, receiving);
}

/// The disk stream is cut in the middle of the first copy, which begins anew.
#[test]
fn disk_after_a_copy_that_was_cut_off() {
    // So little that QEMU has not written all before it is sent.
    const BOUND: u64 = 1 << 20;
    let mut scene = Scene::new(BOUND);
    let store = scene.store(Durability::Memory, BOUND);
    let (address, receiving) = standing_by(scene.at("b.ram"), store);
    let (mut streams, left) = (0, Arc::new(AtomicUsize::new(1 << 20)));
    let budget = Arc::clone(&left);
    let connect = move || {
        streams += 1;
        // After those for control and for data.
        if streams != 3 {
            return channel_to(address).map(|(channel, _)| channel);
        }
        let stream = flaky(address, Arc::clone(&budget), Failure::Close);
        Channel::connect(stream, &Way::Plain, TIMEOUT)
    };
    let protecting = scene.protect(connect, channel().1);
    until("commits", LONG, || scene.commits() >= 3);
    assert_eq!(left.load(Ordering::SeqCst), 0, "it was cut");
    scene.end(protecting, receiving);
    let trace = fs::read_to_string(scene.at("trace")).unwrap();
    assert!(trace.contains("\"standby-lost\""), "{trace}");
    assert_eq!(trace.matches("\"disks-copied\"").count(), 1);
}

/// The standby's file system is full, with so many blocks at the first copy, or after it: the standby says so
/// and ends, and the guest goes on.
fn no_space(blocks: u64, afterwards: bool) {
    let mut scene = Scene::new(64 << 20);
    let world = World::of(vec![("root".into(), DISK as u64)]);
    world.set_free(blocks);
    let store = world.open(Durability::Memory, 64 << 20).unwrap();
    let (ram, (callers, address)) = (scene.at("b.ram"), callers());
    let receiving = thread::spawn(move || {
        let (caller, _) = callers.next(LONG).expect("nobody calls");
        let mut held = Held::default();
        match serve_one(caller, &callers, &ram, Some(&store), &mut held) {
            standby::End::Failed(e) => format!("{e:#}"),
            _ => panic!("it did not fail"),
        }
    });
    let connect = move || channel_to(address).map(|(channel, _)| channel);
    let protecting = scene.protect(connect, channel().1);
    if afterwards {
        until("commits", LONG, || scene.commits() >= 3);
        world.fill();
    }
    until("the standby's end", LONG, || receiving.is_finished());
    let told = receiving.join().unwrap();
    let want = "there is no space for the image of root: free some";
    assert!(told.contains(want), "{told}");
    let (ram, image) = (scene.at("a.ram"), scene.at("a.img"));
    until("what the primary says", LONG, || {
        let trace = fs::read_to_string(scene.at("trace")).unwrap();
        trace.contains("\"standby-lost\"") && trace.contains(want)
    });
    let (at, before) = (counter(&ram), sum(&image));
    until("the guest to write on", LONG, || {
        counter(&ram) > at && sum(&image) != before
    });
    scene.stop.store(true, Ordering::SeqCst);
    let end = protecting.join().unwrap();
    assert!(matches!(end, protect::End::Asked), "{end}");
}

/// nbdkit is killed, in the first copy or after it: that ends protection and is said, and the guest goes on.
fn without_nbdkit(in_copy: bool) {
    const BOUND: u64 = 1 << 20;
    let mut scene = Scene::new(BOUND);
    let nbdkit = scene.disks.as_ref().unwrap().nbdkit();
    let (ram, store) = (scene.at("b.ram"), scene.store(Durability::Memory, BOUND));
    let (callers, address) = callers();
    let receiving = thread::spawn(move || stand_by(&callers, &ram, &store, &|_| {}));
    let mut streams = 0;
    let connect = move || {
        streams += 1;
        if !in_copy || streams != 3 {
            return channel_to(address).map(|(channel, _)| channel);
        }
        let stream = flaky(
            address,
            Arc::new(AtomicUsize::new(usize::MAX)),
            Failure::Slow,
        );
        Channel::connect(stream, &Way::Plain, TIMEOUT)
    };
    let protecting = scene.protect(connect, channel().1);
    if in_copy {
        let (copy, before) = (scene.at("b.img"), sum(&scene.at("b.img")));
        until("the copy to begin", LONG, || sum(&copy) != before);
        assert_eq!(scene.commits(), 0);
    } else {
        until("commits", LONG, || scene.commits() >= 3);
    }
    let pid = Pid::from_raw(nbdkit as i32).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    until("the end of protection", LONG, || protecting.is_finished());
    let end = protecting.join().unwrap();
    let told = format!("{end}");
    assert!(matches!(end, protect::End::Failed(_)), "{told}");
    assert!(
        told.contains("nbdkit") && told.contains("protect the guest again"),
        "{told}"
    );
    let (ram, image) = (scene.at("a.ram"), scene.at("a.img"));
    let (at, before) = (counter(&ram), sum(&image));
    until("the guest to write on", LONG, || {
        counter(&ram) > at && sum(&image) != before
    });
    receiving.join().unwrap();
}

#[test]
fn without_nbdkit_in_the_first_copy() {
    without_nbdkit(true);
}

#[test]
fn without_nbdkit_afterwards() {
    without_nbdkit(false);
}

#[test]
fn no_space_for_the_first_copy() {
    no_space(100, false);
}

#[test]
fn no_space_for_an_epoch() {
    no_space(1 << 20, true);
}

/// Disks that the two hosts' configurations do not have in common: both sides say what is to be done.
#[test]
fn disks_that_differ_are_refused() {
    const SIZE: u64 = 1 << 20;
    for (here, there, primary, standby) in [
        (
            Some(SIZE),
            Some(2 * SIZE),
            "create an image of",
            "create an image of",
        ),
        (Some(SIZE), None, "has no disks: use the same on both", ""),
        (
            None,
            Some(SIZE),
            "",
            "brings no disks, but there are some here",
        ),
    ] {
        let dir = directory();
        let at = |name: &str| dir.path().join(name);
        let (ram, (callers, address)) = (at("ram"), callers());
        memory_file(&ram);
        let store = there.map(|size| {
            fs::File::create(at("img")).unwrap().set_len(size).unwrap();
            let spec = Spec {
                name: "root".into(),
                path: at("img"),
                format: Format::Raw,
            };
            Store::open(&[spec], &at("journal"), Durability::Memory, SIZE).unwrap()
        });
        let receiving = thread::spawn(move || {
            let (caller, _) = callers.next(LONG).expect("nobody calls");
            serve_one(caller, &callers, &ram, store.as_ref(), &mut Held::default())
        });
        let disk = |size| disks::Disk {
            name: "root".into(),
            node: "disk0".into(),
            size,
        };
        let plan = Plan {
            disks: here.map(disk).into_iter().collect(),
            ..machine::plan(TIMEOUT)
        };
        let mut connect = move || channel_to(address).map(|(channel, _)| channel);
        let link = introduce(&plan, &mut connect);
        if primary.is_empty() {
            assert!(link.is_ok());
        } else {
            let told = format!("{:#}", link.as_ref().err().unwrap());
            assert!(told.contains(primary), "{told}");
        }
        match receiving.join().unwrap() {
            standby::End::Refused(e) => {
                let told = format!("{e:#}");
                assert!(!standby.is_empty() && told.contains(standby), "{told}");
            }
            standby::End::Lost(_) => assert!(standby.is_empty()),
            _ => panic!("{here:?} and {there:?}"),
        }
    }
}

#[test]
fn disk_after_lost_connections() {
    let copies = comes_back(8, 64 << 20, Durability::Disk, Duration::ZERO);
    assert_eq!(copies, 1, "what was lost on the way is sent again, no more");
}

/// The guest writes more than is held, so QEMU has to note what it was, and copy it later.
#[test]
fn disk_after_a_long_loss() {
    let copies = comes_back(2, 1 << 16, Durability::Memory, Duration::from_secs(2));
    assert_eq!(copies, 3, "what QEMU noted is copied");
}
