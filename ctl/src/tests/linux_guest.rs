// SPDX-License-Identifier: GPL-2.0-or-later

//! Both hosts with real QEMUs, real nbdkit, and Linux in the guest: fio writes one disk and verifies it all the
//! time, a ledger on the other tells of each entry once that is on the disk, and whoever hosts the guest dies at
//! random moments. The survivor is protected in turn, towards the dead host's old images.
//!
//! What the guest tells is held by epoch, as the kernel's module holds packets, so the client knows of what a
//! client behind the network knows of, and no more.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{bail, Result};
use remus_core::uapi::ram::PAGE_SIZE;
use ring::digest::{digest, SHA256};
use rustix::fs::{fallocate, FallocateFlags};
use rustix::process::{kill_process, Pid, Signal};

use super::guest_with_disk::{callers, channel_to};
use super::machine::{connect, directory, Killed};
use super::model::{until, Model, Patient, Random};
use crate::args::Loss;
use crate::config::disk::{Disk, Durability, Format};
use crate::host::kernel::{Domain, Done, Kernel, Seal};
use crate::host::qmp::Qmp;
use crate::host::ram::Ram;
use crate::host::vmm::Vmm;
use crate::peer::stream::lock;
use crate::primary::disks::Disks;
use crate::primary::keep::keep;
use crate::primary::link::introduce;
use crate::primary::pace::Pace;
use crate::primary::pipeline::Encoding;
use crate::primary::protect::{Parts, Plan};
use crate::report::live::{Ask, Order};
use crate::report::Report;
use crate::standby::caller::Callers;
use crate::standby::disks::{Spec, Store};
use crate::standby::serve::{self as standby, serve, Handover, Held, Offer};
use crate::standby::takeover::take_over;

const MEMORY: u64 = 96 << 20;
/// Bytes of each disk.
const DISK: u64 = 16 << 20;
/// Their names: the ledger's is on virtio-blk, fio's on virtio-scsi.
const DISKS: [&str; 2] = ["ledger", "fio"];
/// Bytes of their changes that either side holds.
const BOUND: u64 = 16 << 20;
const DOMAIN: &str = "linux";
/// Nothing takes nearly as long, even on a busy host.
const LONG: Duration = Duration::from_secs(300);
/// Longer than a busy host keeps either side from saying that it is alive; if it does not, that is a take-over
/// like any other.
const TIMEOUT: Duration = Duration::from_secs(3);
/// What the guest says when something is not as it has to be.
const TROUBLE: [&str; 7] = [
    "FAILED",
    "Kernel panic",
    "EXT4-fs error",
    "EXT4-fs warning",
    "JBD2",
    "I/O error",
    "BUG:",
];

/// What was told to the client: `<N>` for each entry, `<still>` at the end.
#[derive(Default)]
struct Client {
    /// The beginning of what has not come whole yet.
    word: Option<Vec<u8>>,
    /// The newest entry.
    told: u64,
    ended: bool,
    /// Told what cannot be.
    wrong: Option<String>,
}

impl Client {
    fn hear(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'<' => self.word = Some(Vec::new()),
                b'>' => {
                    if let Some(word) = self.word.take() {
                        self.take(&String::from_utf8_lossy(&word));
                    }
                }
                byte => {
                    if let Some(word) = &mut self.word {
                        word.push(*byte);
                    }
                }
            }
        }
    }

    fn take(&mut self, word: &str) {
        match word.parse::<u64>() {
            Ok(entry) if entry > self.told => self.told = entry,
            Err(_) if word == "still" => self.ended = true,
            _ => {
                let told = self.told;
                let wrong = format!("the client is told of <{word}> after entry {told}");
                self.wrong.get_or_insert(wrong);
            }
        }
    }
}

/// What one machine has told, by epoch.
struct Output {
    /// It is not protected yet: nothing is held.
    passing: bool,
    open: Vec<u8>,
    sealed: BTreeMap<u64, Vec<u8>>,
    client: Arc<Mutex<Client>>,
}

impl Output {
    /// Of the machine that writes to the socket at `path`.
    fn of(path: &Path, client: &Arc<Mutex<Client>>) -> (Arc<Mutex<Self>>, UnixStream) {
        let output = Arc::new(Mutex::new(Self {
            passing: true,
            open: Vec::new(),
            sealed: BTreeMap::new(),
            client: Arc::clone(client),
        }));
        let stream = UnixStream::connect(path).unwrap();
        let (mut from, to) = (stream.try_clone().unwrap(), Arc::clone(&output));
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                // What comes after a seal, though it was sent before, counts to the next epoch.
                lock(&to).add(&bytes[..count]);
            }
        });
        (output, stream)
    }

    fn add(&mut self, bytes: &[u8]) {
        if self.passing {
            lock(&self.client).hear(bytes);
        } else {
            self.open.extend(bytes);
        }
    }

    fn seal(&mut self, epoch: u64, keep_passing: bool) {
        self.passing &= keep_passing;
        self.sealed.insert(epoch, std::mem::take(&mut self.open));
    }

    fn commit(&mut self, epoch: u64) {
        let left = self.sealed.split_off(&(epoch + 1));
        for bytes in std::mem::replace(&mut self.sealed, left).into_values() {
            lock(&self.client).hear(&bytes);
        }
    }

    fn abort(&mut self, epoch: u64) {
        let aborted = self.sealed.split_off(&epoch);
        let open = std::mem::take(&mut self.open);
        self.open = aborted.into_values().flatten().chain(open).collect();
    }
}

/// The kernel of one primary, which also knows the disks at each seal. It forgets what was committed.
#[derive(Clone)]
struct Host {
    model: Model,
    output: Arc<Mutex<Output>>,
    images: [PathBuf; 2],
    disks: Arc<Mutex<BTreeMap<u64, [Vec<u8>; 2]>>>,
}

impl Kernel for Host {
    fn get(&mut self, domain: &str) -> Result<Domain> {
        self.model.get(domain)
    }

    fn seal(&mut self, domain: &str, how: Seal) -> Result<Done> {
        let done = self.model.seal(domain, how)?;
        if !how.keep_passthrough {
            // The guest stands still.
            let images = self.images.each_ref().map(|path| fs::read(path).unwrap());
            lock(&self.disks).insert(done.epoch, images);
        }
        lock(&self.output).seal(done.epoch, how.keep_passthrough);
        Ok(done)
    }

    fn commit(&mut self, domain: &str, epoch: u64) -> Result<Done> {
        let done = self.model.commit(domain, epoch)?;
        lock(&self.output).commit(epoch);
        lock(&self.disks).retain(|e, _| *e >= epoch);
        let mut book = lock(&self.model.book);
        book.snapshots.retain(|e, _| *e >= epoch);
        book.dirty.retain(|e, _| *e >= epoch);
        Ok(done)
    }

    fn abort(&mut self, domain: &str, epoch: u64) -> Result<Done> {
        let done = self.model.abort(domain, epoch)?;
        lock(&self.output).abort(epoch);
        Ok(done)
    }

    fn set_passthrough(&mut self, _: &str, _: bool) -> Result<()> {
        bail!("nobody asks for that here")
    }
}

/// A QEMU.
enum Process {
    First(Killed),
    Next(Vmm),
}

impl Process {
    /// Kills it, and waits until nothing of it is left.
    fn kill(&mut self) {
        match self {
            Self::First(child) => {
                child.0.kill().unwrap();
                child.0.wait().unwrap();
            }
            Self::Next(vmm) => {
                let pid = Pid::from_raw(vmm.pid().try_into().unwrap()).unwrap();
                if vmm.ended().unwrap().is_none() {
                    kill_process(pid, Signal::KILL).unwrap();
                }
                while vmm.ended().unwrap().is_none() {
                    thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }
}

/// A machine that is the guest, or waits to be it.
struct Machine {
    /// Directory of its host.
    dir: PathBuf,
    process: Process,
    qmp: Option<Qmp>,
    output: Arc<Mutex<Output>>,
    port: UnixStream,
}

impl Machine {
    fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("console")).unwrap()).into_owned()
    }

    /// How many rounds fio has ended on this host since it is the guest's.
    fn rounds(&self) -> usize {
        self.console().matches("fio verified round").count()
    }
}

fn images(dir: &Path) -> [PathBuf; 2] {
    DISKS.map(|name| dir.join(format!("{name}.img")))
}

/// How the guest leaves its host.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Death {
    /// All of the host, at once.
    Host,
    /// Its QEMU; what protects it says so.
    Qemu,
    /// Nothing but the link: the guest runs on where it was, unheard.
    Partition,
    /// It is handed over.
    Handover,
}

struct Scene {
    /// Two hosts below it.
    root: tempfile::TempDir,
    client: Arc<Mutex<Client>>,
    random: Random,
    generation: u64,
}

impl Scene {
    fn new(seed: u64) -> Self {
        let root = directory();
        for host in ["a", "b"] {
            let dir = root.path().join(host);
            fs::create_dir(&dir).unwrap();
            for image in images(&dir) {
                fs::File::create(image).unwrap().set_len(DISK).unwrap();
            }
        }
        Self {
            root,
            client: Arc::default(),
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            generation: 1,
        }
    }

    fn told(&self) -> u64 {
        lock(&self.client).told
    }

    /// QEMU's command on a host, whose memory is all zeros.
    fn command(dir: &Path) -> Vec<String> {
        let variable = |name: &str| {
            std::env::var(name)
                .unwrap_or_else(|_| panic!("{name} is not set: this is a part of scripts/test.sh"))
        };
        let at = |name: &str| dir.join(name).display().to_string();
        let _ = fs::remove_file(dir.join("ram"));
        let ram = fs::File::create(dir.join("ram")).unwrap();
        ram.set_len(MEMORY).unwrap();
        let memory = format!(
            "memory-backend-file,id=ram,size={MEMORY},mem-path={},share=on",
            at("ram")
        );
        let append = format!(
            "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check random.trust_cpu=on remus.ledger=1 {}",
            variable("REMUS_GUEST_WORDS")
        );
        let megabytes = format!("{}M", MEMORY >> 20);
        let mut command: Vec<String> = [
            // It ends with this test, however that ends.
            "setpriv",
            "--pdeathsig",
            "KILL",
            "qemu-system-x86_64",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-machine",
            "pc,memory-backend=ram",
            "-m",
            &megabytes,
            "-object",
            &memory,
            "-kernel",
            &variable("REMUS_GUEST_KERNEL"),
            "-initrd",
            &variable("REMUS_GUEST_INITRAMFS"),
            "-append",
            &append,
            "-serial",
            &format!("file:{}", at("console")),
            "-serial",
            &format!("unix:{},server=on,wait=off", at("port")),
            "-qmp",
            &format!("unix:{},server=on,wait=off", at("qmp")),
            "-device",
            "virtio-scsi-pci,id=scsi",
        ]
        .map(str::to_owned)
        .to_vec();
        let devices = ["virtio-blk-pci", "scsi-hd,bus=scsi.0"];
        for ((name, image), device) in DISKS.iter().zip(images(dir)).zip(devices) {
            command.extend([
                "-blockdev".to_owned(),
                format!(
                    "driver=file,filename={},node-name={name}-file",
                    image.display()
                ),
                "-blockdev".to_owned(),
                format!("driver=raw,file={name}-file,node-name={name}"),
                "-device".to_owned(),
                format!("{device},drive={name}"),
            ]);
        }
        command
    }

    /// The guest, which boots.
    fn boot(&self) -> Machine {
        let dir = self.root.path().join("a");
        let command = Self::command(&dir);
        let process = Command::new(&command[0])
            .args(&command[1..])
            .stdin(Stdio::null())
            .spawn()
            .expect("this test needs QEMU: apt install qemu-system-x86");
        let process = Process::First(Killed(process));
        let qmp = connect(&dir.join("qmp"));
        let (output, port) = Output::of(&dir.join("port"), &self.client);
        Machine {
            dir,
            process,
            qmp: Some(qmp),
            output,
            port,
        }
    }

    /// One that waits on the other host.
    fn wait(&self, primary: &Machine) -> Machine {
        let other = if primary.dir.ends_with("a") { "b" } else { "a" };
        let dir = self.root.path().join(other);
        let command = Self::command(&dir);
        let (vmm, qmp) = Vmm::start(&command, &dir.join("qmp"), &dir.join("log")).unwrap();
        let (output, port) = Output::of(&dir.join("port"), &self.client);
        Machine {
            dir,
            process: Process::Next(vmm),
            qmp: Some(qmp),
            output,
            port,
        }
    }

    /// Waits for something while `machine` is the guest, and fails if that says that anything is wrong.
    fn until(&self, what: &str, machine: &Machine, mut holds: impl FnMut() -> bool) {
        let begin = Instant::now();
        loop {
            let wrong = lock(&self.client).wrong.clone();
            let console = machine.console();
            let line = |text: &&str| TROUBLE.iter().any(|trouble| text.contains(trouble));
            let wrong = wrong.or(console.lines().find(line).map(str::to_owned));
            if wrong.is_none() && holds() {
                return;
            }
            if wrong.is_some() || begin.elapsed() > LONG {
                let wrong = wrong.unwrap_or_else(|| "it takes for ever".into());
                let told = self.told();
                panic!("{what}: {wrong}; entry {told} was told of last; the guest's console:\n{console}");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has the machine `survivor` stand by for `primary`.
    fn protect(
        &self,
        primary: &mut Machine,
        survivor: &Machine,
        durability: Durability,
    ) -> Protection {
        let specs: Vec<Spec> = DISKS
            .iter()
            .zip(images(&survivor.dir))
            .map(|(name, path)| Spec {
                name: (*name).into(),
                path,
                format: Format::Raw,
            })
            .collect();
        let store = Store::open(&specs, &survivor.dir.join("journal"), durability, BOUND).unwrap();
        let (callers, address) = callers();
        let ram = survivor.dir.join("ram");
        let receiving = thread::spawn(move || stand_by(&callers, &ram, store));

        let mut qmp = primary.qmp.take().unwrap();
        let configured: Vec<Disk> = specs
            .iter()
            .zip(images(&primary.dir))
            .map(|(spec, path)| Disk {
                name: spec.name.clone(),
                node: spec.name.clone(),
                path,
                format: Format::Raw,
            })
            .collect();
        let list = Disks::find(&mut qmp, &configured).unwrap();
        let plan = Plan {
            domain: DOMAIN.into(),
            memory: MEMORY,
            generation: self.generation,
            run: self.generation.into(),
            pace: Pace::Fixed(Duration::from_millis(200)),
            timeout: TIMEOUT,
            depth: 4,
            encoding: Encoding {
                encoders: 1,
                cache_bytes: MEMORY as usize,
                raw: false,
            },
            copy_in_pause: false,
            disks: list.clone(),
        };
        let look = primary.dir.join("ram");
        let host = Host {
            model: Model::new(Arc::new(move |_| fs::read(&look).unwrap())),
            output: Arc::clone(&primary.output),
            images: images(&primary.dir),
            disks: Arc::default(),
        };
        let (orders, to_obey) = channel();
        let mut parts = Parts {
            guest: Box::new(qmp),
            sealer: Box::new(host.clone()),
            committer: Box::new(host.clone()),
            pages: Box::new(host.model.clone()),
            disks: Some(Disks::serve(&primary.dir, DOMAIN, &list, BOUND).unwrap()),
            hearing: None,
            report: Report::default(),
            orders: to_obey,
            stop: Arc::default(),
        };
        let streams: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let (kept, down) = (Arc::clone(&streams), Arc::new(AtomicBool::new(false)));
        let is_down = Arc::clone(&down);
        let protecting = thread::spawn(move || {
            let mut connect = || {
                if is_down.load(Ordering::SeqCst) {
                    bail!("the link is down");
                }
                let (channel, stream) = channel_to(address)?;
                lock(&kept).push(stream);
                Ok(channel)
            };
            let link = introduce(&plan, &mut connect).unwrap();
            let end = keep(&plan, &mut parts, &mut connect, link, Loss::Hold);
            eprintln!("# protection ended: {end}");
        });
        Protection {
            host,
            receiving,
            protecting,
            streams,
            down,
            orders,
        }
    }

    /// Protects the guest until it leaves its host like this, and has the other host take over. `cut`: the
    /// connection is lost once before. Returns the survivor, and what there is to say.
    fn round(
        &mut self,
        mut primary: Machine,
        death: Death,
        cut: bool,
        durability: Durability,
    ) -> (Machine, String) {
        let mut survivor = self.wait(&primary);
        let protection = self.protect(&mut primary, &survivor, durability);
        // A busy host may keep one side from hearing of the other for too long: then it is over sooner.
        let over = || protection.receiving.is_finished() || protection.protecting.is_finished();
        let commits = || lock(&protection.host.model.book).commits.len();
        self.until("the first epoch", &primary, || over() || commits() > 0);
        let (told, rounds) = (self.told(), primary.rounds());
        if cut {
            let target = commits() + 1 + self.random.below(5);
            self.until("commits", &primary, || over() || commits() >= target);
            protection.disconnect();
            let target = commits() + 1;
            let what = "a commit after a lost connection";
            self.until(what, &primary, || over() || commits() >= target);
        }
        self.until("a round of fio and entries, protected", &primary, || {
            over() || (primary.rounds() > rounds && self.told() > told)
        });
        let target = commits() + 1 + self.random.below(8);
        self.until("commits", &primary, || over() || commits() >= target);
        // Anywhere in an epoch, or while one is on its way, or just when it is sealed.
        let span = [400, 60, 5][self.random.below(3)];
        if span < 400 {
            let sealed = || lock(&protection.host.model.book).epochs.sealed() > 0;
            until("an epoch on its way", LONG, || over() || sealed());
        }
        thread::sleep(Duration::from_millis(self.random.below(span) as u64));
        let by_itself = over();
        let mut answer = None;
        match death {
            Death::Host => {
                protection.separate();
                primary.process.kill();
            }
            Death::Qemu => primary.process.kill(),
            Death::Partition => protection.separate(),
            Death::Handover => answer = Some(protection.hand_over()),
        }
        self.until("the take-over", &primary, || {
            // Refused if the connection was lost just now.
            if let Some(Ok(Err(_))) = answer.as_ref().map(Receiver::try_recv) {
                answer = Some(protection.hand_over());
            }
            protection.receiving.is_finished()
        });
        let Protection {
            host,
            receiving,
            protecting,
            ..
        } = protection;
        let over = receiving.join().unwrap();

        // What was told and not committed is never heard.
        let told = self.told();
        let (epoch, store) = (over.held.epoch, over.store);
        let last = lock(&host.model.book).commits.last().copied().unwrap_or(0);
        assert!(last <= epoch, "{last} was committed, and {epoch} is held");
        same(&host, &survivor, epoch, &store);
        let copies = images(self.root.path());
        for (image, copy) in images(&survivor.dir).iter().zip(&copies) {
            fs::copy(image, copy).unwrap();
        }
        if over.handover.is_some() {
            for (here, there) in images(&survivor.dir).iter().zip(&host.images) {
                let alike = fs::read(here).unwrap() == fs::read(there).unwrap();
                assert!(alike, "{}: the other host has another", here.display());
            }
        }
        lock(&self.client).word = None;
        let qmp = survivor.qmp.as_mut().unwrap();
        let report = Report::default();
        take_over(qmp, &over.held, Some(store), over.heard, &report).unwrap();
        if let Some(primary) = over.handover {
            primary.resumed();
        }
        self.generation = over.held.generation + 1;

        let entries = ledger(&copies, told);
        self.until("entries after the take-over", &survivor, || {
            self.told() > told + 3
        });
        // Where it still ran, nobody has heard it meanwhile.
        primary.process.kill();
        protecting.join().unwrap();
        let how = match death {
            _ if by_itself => "lost by itself",
            Death::Host => "host killed",
            Death::Qemu => "QEMU killed",
            Death::Partition => "link cut for good",
            Death::Handover => "handed over",
        };
        let cut = match cut {
            true => "connection lost once, then ",
            false => "",
        };
        let newest = lock(&host.model.book).epochs.open() - 1;
        let words = format!(
            "{cut}{how}; resumed from epoch {epoch} of {newest}, {last} committed; the client was told of {told} entries, \
             {entries} are on disk"
        );
        (survivor, words)
    }
}

/// A guest that is protected.
struct Protection {
    host: Host,
    receiving: JoinHandle<Over>,
    protecting: JoinHandle<()>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    down: Arc<AtomicBool>,
    orders: Sender<Order>,
}

impl Protection {
    /// Ends all connections.
    fn disconnect(&self) {
        for stream in lock(&self.streams).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Ends them for good.
    fn separate(&self) {
        self.down.store(true, Ordering::SeqCst);
        self.disconnect();
    }

    /// Asks for a planned switch.
    fn hand_over(&self) -> Receiver<Result<String, String>> {
        let (reply, answer) = channel();
        let ask = Ask::Failover;
        let _ = self.orders.send(Order { ask, reply });
        answer
    }
}

/// All of `epoch` is on the survivor's host, and nothing else.
fn same(host: &Host, survivor: &Machine, epoch: u64, store: &Store) {
    let want = lock(&host.disks).remove(&epoch).unwrap();
    let sums = store.checksum().unwrap();
    for ((name, want), (sum, image)) in DISKS
        .iter()
        .zip(&want)
        .zip(sums.iter().zip(images(&survivor.dir)))
    {
        let have = fs::read(image).unwrap();
        let blocks = want.chunks(512).zip(have.chunks(512)).enumerate();
        let differ = blocks.filter(|(_, (want, have))| want != have);
        let differ: Vec<usize> = differ.map(|(number, _)| number).collect();
        assert!(
            differ.is_empty(),
            "disk {name} of epoch {epoch}: sectors {differ:?} differ"
        );
        assert_eq!(
            digest(&SHA256, want).as_ref(),
            sum,
            "disk {name} of epoch {epoch}"
        );
    }
    assert_eq!(store.whole().map(|stamp| stamp.epoch), Some(epoch));
    let memory = fs::read(survivor.dir.join("ram")).unwrap();
    let book = lock(&host.model.book);
    let pages = memory
        .chunks(PAGE_SIZE)
        .zip(book.snapshots[&epoch].chunks(PAGE_SIZE));
    assert_eq!(
        pages.filter(|(a, b)| a != b).count(),
        0,
        "pages of epoch {epoch}"
    );
}

/// What a standby ends with.
struct Over {
    held: Held,
    heard: Instant,
    store: Store,
    handover: Option<Handover>,
}

/// Serves callers until the primary counts as dead, or hands the guest over.
fn stand_by(callers: &Callers, ram: &Path, store: Store) -> Over {
    let offer = Offer {
        domain: DOMAIN.into(),
        memory: MEMORY,
        timeout: TIMEOUT,
    };
    let (mut held, mut image) = (Held::default(), Ram::open(ram).unwrap());
    let (mut next, mut lost) = (None, None::<standby::Lost>);
    loop {
        // Without a whole epoch there is nothing to take over: it waits on.
        let whole = held.epoch > 0 && store.whole().is_some_and(|s| s.epoch == held.epoch);
        let deadline = lost
            .as_ref()
            .filter(|_| whole)
            .map(|lost| match lost.given_up {
                true => Instant::now(),
                false => lost.heard + TIMEOUT,
            });
        let patience = deadline.map_or(LONG, |d| d.saturating_duration_since(Instant::now()));
        let called = match next.take() {
            Some(caller) => Some(caller),
            None => callers.next(patience).map(|(caller, _)| Box::new(caller)),
        };
        let Some(caller) = called else {
            let heard = lost.expect("nobody calls").heard;
            return Over {
                held,
                heard,
                store,
                handover: None,
            };
        };
        let mut parts = standby::Parts {
            callers,
            image: &mut image,
            disks: Some(&store),
            machine: &mut Patient,
            report: &Report::default(),
            stop: &AtomicBool::new(false),
            tick: &|| {},
        };
        match serve(*caller, &offer, &mut held, &mut parts) {
            standby::End::Lost(mut now) => {
                next = now.again.take();
                lost = Some(now);
            }
            standby::End::Handover(primary) => {
                return Over {
                    held,
                    heard: Instant::now(),
                    store,
                    handover: Some(primary),
                }
            }
            standby::End::Other(caller) => {
                assert_eq!(held.epoch, 0, "the primary begins anew");
                held = Held::default();
                // What had come may have been given back since; remusctl begins with another machine.
                let ram = fs::OpenOptions::new().write(true).open(ram).unwrap();
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&ram, hole, 0, MEMORY).unwrap();
                next = Some(caller);
            }
            standby::End::Refused(_) => {}
            standby::End::Failed(e) => panic!("the standby failed: {e:#}"),
            standby::End::Bye(why) => panic!("protection ended: {why}"),
            standby::End::Asked => panic!("nobody has asked"),
        }
    }
}

/// What a program says that has to succeed; `good` are its exit codes.
fn program(good: &[i32], name: &str, arguments: &[&str], file: &Path) -> Vec<u8> {
    let mut command = Command::new(name);
    command
        .args(arguments)
        .arg(file)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    let done = command
        .output()
        .unwrap_or_else(|e| panic!("{name}: {e}: apt install e2fsprogs"));
    let code = done.status.code().unwrap_or(-1);
    let text = String::from_utf8_lossy(&done.stdout);
    assert!(
        good.contains(&code),
        "{name} {arguments:?} {}: {code}\n{text}",
        file.display()
    );
    done.stdout
}

/// Checks copies of the images; returns how many entries the ledger has, which are at least those told of.
fn ledger(copies: &[PathBuf; 2], told: u64) -> u64 {
    for copy in copies {
        // What a mount would do: the journal of the file system, and files that were being deleted. 1: it has.
        program(&[0, 1], "e2fsck", &["-p"], copy);
        program(&[0], "e2fsck", &["-fn"], copy);
    }
    let text = program(&[0], "debugfs", &["-R", "cat /ledger"], &copies[0]);
    let text = String::from_utf8(text).unwrap();
    let entries: Vec<Option<u64>> = text.lines().map(|line| line.trim().parse().ok()).collect();
    let count = entries.len() as u64;
    let want: Vec<Option<u64>> = (1..=count).map(Some).collect();
    assert!(entries == want, "the ledger on disk is damaged:\n{text}");
    assert!(
        count >= told,
        "the client was told of entry {told}, and {count} are on disk"
    );
    count
}

/// `REMUS_TAKEOVERS` take-overs (20) at moments that follow from `REMUS_SEED`.
#[test]
#[ignore = "a step of its own in scripts/test.sh: needs a kernel and an initramfs"]
fn linux_survives_its_hosts() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().unwrap())
    };
    let takeovers = number("REMUS_TAKEOVERS").unwrap_or(20);
    let seed = number("REMUS_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    assert!(
        takeovers > 0,
        "REMUS_TAKEOVERS is 0: nothing would be tested"
    );
    println!("# REMUS_SEED={seed} REMUS_TAKEOVERS={takeovers}");
    let mut scene = Scene::new(seed);
    let mut guest = scene.boot();
    scene.until("the guest's first round of fio", &guest, || {
        guest.rounds() > 0 && scene.told() > 0
    });
    let deaths = [
        Death::Host,
        Death::Qemu,
        Death::Partition,
        Death::Host,
        Death::Handover,
    ];
    let deaths = (1..=takeovers).zip(deaths.into_iter().cycle());
    for (n, death) in deaths {
        let durability = match n / 2 % 2 {
            0 => Durability::Memory,
            _ => Durability::Disk,
        };
        let begin = Instant::now();
        let (survivor, words) = scene.round(guest, death, n % 4 == 0, durability);
        let took = begin.elapsed().as_secs();
        println!("ok {n} - take-over {n} in {took} s: {words}");
        guest = survivor;
    }
    // In good order.
    let rounds = guest.rounds();
    scene.until("a round of fio at the end", &guest, || {
        guest.rounds() > rounds
    });
    guest.port.write_all(b"still\n").unwrap();
    scene.until("the guest's end", &guest, || lock(&scene.client).ended);
    guest.process.kill();
    let told = scene.told();
    assert_eq!(ledger(&images(&guest.dir), told), told);
    println!(
        "# {told} entries, all there; the file systems are clean, and fio found what it wrote"
    );
}
