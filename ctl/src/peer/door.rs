// SPDX-License-Identifier: GPL-2.0-or-later

//! A listener that strangers cannot block.
//!
//! Each connection gets a short-lived thread of its own, and one deadline for all until it has
//! introduced itself. There are only so many at once; where one more comes, another is cut: first one
//! that has not shown yet who it is, of the address that has most of them, the oldest. So whoever
//! fills the door from elsewhere only ever cuts its own, and the primary gets in.
//!
//! ```text
//!   accept ──▶ thread: handshake, introduction ──▶ next()
//!     └── cuts who is overdue or too many  └── fails: counted, told at most once a second
//! ```

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{poll, PollFd, PollFlags, Timespec};

use crate::peer::channel::{Channel, Way};
use crate::peer::stream::lock;
use crate::say;

/// How often the door looks for who is overdue, and whether it is to close.
const TICK: Duration = Duration::from_millis(50);
/// Pause after a failure to accept, such as for want of file descriptors.
const RESPITE: Duration = Duration::from_millis(100);
/// How often refusals are told.
const TELL: Duration = Duration::from_secs(1);

/// What a door puts up with.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most connections that are not introduced yet.
    pub at_once: usize,
    /// How long an introduction may take, handshake and all.
    pub patience: Duration,
    /// Most that are introduced and wait for [`Door::next`]; where one more comes, the oldest goes.
    pub waiting: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            at_once: 32,
            patience: Duration::from_secs(10),
            waiting: 4,
        }
    }
}

/// A listener; what its guests' introductions returned comes out of [`Door::next`].
pub struct Door<T> {
    inside: Arc<Inside<T>>,
    acceptor: Option<JoinHandle<()>>,
}

struct Inside<T> {
    limits: Limits,
    hall: Mutex<Hall<T>>,
    /// Something in the hall has changed.
    changed: Condvar,
}

struct Hall<T> {
    closing: bool,
    guests: Vec<Guest>,
    /// Threads that have not ended.
    threads: usize,
    introduced: VecDeque<(T, SocketAddr)>,
    next_id: u64,
    refusals: Refusals,
}

/// A connection that is not introduced yet.
struct Guest {
    id: u64,
    address: SocketAddr,
    since: Instant,
    /// It has proved that it is the other host.
    known: bool,
    stream: TcpStream,
}

impl Guest {
    /// Wakes its thread, which then fails.
    fn cut(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

#[derive(Default)]
struct Refusals {
    count: u64,
    told: Option<Instant>,
    untold: u64,
}

impl Refusals {
    /// What to tell of a refusal now, if anything.
    fn add(&mut self, now: Instant, who: &str, why: &str) -> Option<String> {
        self.count += 1;
        if self.told.is_some_and(|t| now.duration_since(t) < TELL) {
            self.untold += 1;
            return None;
        }
        self.told = Some(now);
        let more = match std::mem::take(&mut self.untold) {
            0 => String::new(),
            n => format!(" (and {n} more since the last such line)"),
        };
        Some(format!("refused {who}: {why}{more}"))
    }
}

impl<T: Send + 'static> Door<T> {
    /// Lets guests in at `listener`. Each `introduction` is to read what its guest says first; it
    /// fails when its time is over, as the connection is shut down then.
    pub fn open(
        listener: TcpListener,
        way: Way,
        limits: Limits,
        introduction: impl Fn(Channel) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        // Who has gone again before it was accepted must not make this wait for another.
        listener
            .set_nonblocking(true)
            .context("cannot set up the listener")?;
        let inside = Arc::new(Inside {
            limits,
            hall: Mutex::new(Hall {
                closing: false,
                guests: Vec::new(),
                threads: 0,
                introduced: VecDeque::new(),
                next_id: 0,
                refusals: Refusals::default(),
            }),
            changed: Condvar::new(),
        });
        let host = Host {
            inside: Arc::clone(&inside),
            listener,
            way,
            introduction: Arc::new(introduction),
        };
        let acceptor = thread::Builder::new()
            .name("door".into())
            .spawn(move || host.run())
            .context("cannot start a thread")?;
        Ok(Self {
            inside,
            acceptor: Some(acceptor),
        })
    }

    /// The next that is introduced, and its address; waits for one for at most `timeout`.
    pub fn next(&self, timeout: Duration) -> Option<(T, SocketAddr)> {
        let hall = lock(&self.inside.hall);
        let none = |hall: &mut Hall<T>| hall.introduced.is_empty();
        let (mut hall, _) = self
            .inside
            .changed
            .wait_timeout_while(hall, timeout, none)
            .ok()?;
        hall.introduced.pop_front()
    }

    /// How many were refused so far.
    #[cfg(test)]
    pub fn refused(&self) -> u64 {
        lock(&self.inside.hall).refusals.count
    }
}

impl<T> Drop for Door<T> {
    fn drop(&mut self) {
        let mut hall = lock(&self.inside.hall);
        hall.closing = true;
        hall.guests.drain(..).for_each(Guest::cut);
        drop(hall);
        self.inside.changed.notify_all();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        // Their connections are cut, so they end at once, unless an introduction does other things.
        let hall = lock(&self.inside.hall);
        let _ = self
            .inside
            .changed
            .wait_timeout_while(hall, self.inside.limits.patience, |h| h.threads > 0);
    }
}

/// What the accepting thread has.
struct Host<T, F> {
    inside: Arc<Inside<T>>,
    listener: TcpListener,
    way: Way,
    introduction: Arc<F>,
}

impl<T, F> Host<T, F>
where
    T: Send + 'static,
    F: Fn(Channel) -> Result<T> + Send + Sync + 'static,
{
    fn run(self) {
        let tick = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(TICK.subsec_nanos()),
        };
        loop {
            let _ = poll(
                &mut [PollFd::new(&self.listener, PollFlags::IN)],
                Some(&tick),
            );
            let hall = lock(&self.inside.hall);
            if hall.closing {
                return;
            }
            self.inside.cut_overdue(hall);
            match self.listener.accept() {
                Ok((stream, address)) => self.receive(stream, address),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                // It has gone again.
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::ConnectionAborted | ErrorKind::Interrupted
                    ) => {}
                Err(e) => {
                    self.inside
                        .refuse("a connection", &format!("cannot accept it: {e}"));
                    // One that is in nobody's way may hold what is missing.
                    self.inside.cut_one(lock(&self.inside.hall));
                    thread::sleep(RESPITE);
                }
            }
        }
    }

    fn receive(&self, stream: TcpStream, address: SocketAddr) {
        let since = Instant::now();
        let clone = match stream.try_clone() {
            Ok(clone) => clone,
            Err(e) => {
                let why = format!("cannot accept it: {e}");
                return self.inside.refuse(&address.to_string(), &why);
            }
        };
        let mut hall = lock(&self.inside.hall);
        if hall.guests.len() >= self.inside.limits.at_once {
            self.inside.cut_one(hall);
            hall = lock(&self.inside.hall);
        }
        // Threads of those that were cut end soon; strangers that come faster than that wait.
        let most = 2 * self.inside.limits.at_once;
        if let Ok((waited, _)) = self
            .inside
            .changed
            .wait_timeout_while(hall, RESPITE, |h| h.threads >= most && !h.closing)
        {
            hall = waited;
        } else {
            return;
        }
        if hall.closing || hall.threads >= most {
            drop(hall);
            return self
                .inside
                .refuse(&address.to_string(), "too many connections at once");
        }
        let id = hall.next_id;
        hall.next_id += 1;
        hall.threads += 1;
        hall.guests.push(Guest {
            id,
            address,
            since,
            known: false,
            stream: clone,
        });
        drop(hall);
        let inside = Arc::clone(&self.inside);
        let (way, introduction) = (self.way.clone(), Arc::clone(&self.introduction));
        let attend = move || {
            let ending = Ending(&inside, id);
            let patience = inside.limits.patience;
            let known = || inside.is_known(id);
            let result = Channel::accept_known(stream, &way, patience, known)
                .and_then(|channel| introduction(channel));
            inside.finish(id, address, since, result);
            drop(ending);
        };
        if let Err(e) = thread::Builder::new().name("guest".into()).spawn(attend) {
            lock(&self.inside.hall).threads -= 1;
            self.inside.remove(id);
            self.inside
                .refuse(&address.to_string(), &format!("cannot start a thread: {e}"));
        }
    }
}

/// Counts a thread as ended, even one that panicked.
struct Ending<'a, T>(&'a Inside<T>, u64);

impl<T> Drop for Ending<'_, T> {
    fn drop(&mut self) {
        self.0.remove(self.1);
        lock(&self.0.hall).threads -= 1;
        self.0.changed.notify_all();
    }
}

impl<T> Inside<T> {
    /// Takes a guest off the list; whether it was there still, and was not cut.
    fn remove(&self, id: u64) -> bool {
        let mut hall = lock(&self.hall);
        let before = hall.guests.len();
        hall.guests.retain(|g| g.id != id);
        hall.guests.len() < before
    }

    fn is_known(&self, id: u64) {
        for guest in &mut lock(&self.hall).guests {
            guest.known |= guest.id == id;
        }
    }

    fn finish(&self, id: u64, address: SocketAddr, since: Instant, result: Result<T>) {
        let kept = self.remove(id);
        let why = match result {
            Ok(introduced) if kept => {
                let mut hall = lock(&self.hall);
                if hall.closing {
                    return;
                }
                let oldest = match hall.introduced.len() >= self.limits.waiting.max(1) {
                    true => hall.introduced.pop_front(),
                    false => None,
                };
                hall.introduced.push_back((introduced, address));
                drop(hall);
                self.changed.notify_all();
                match oldest {
                    // Whoever it was has most likely come again since.
                    Some((_, oldest)) => {
                        let why = "nobody attended to it, and others came";
                        return self.refuse(&oldest.to_string(), why);
                    }
                    None => return,
                }
            }
            Err(e) if kept => format!("{e:#}"),
            _ if since.elapsed() >= self.limits.patience => {
                "it did not introduce itself in time".to_owned()
            }
            _ => "too many connections at once".to_owned(),
        };
        self.refuse(&address.to_string(), &why);
    }

    fn refuse(&self, who: &str, why: &str) {
        let mut hall = lock(&self.hall);
        if hall.closing {
            return;
        }
        let text = hall.refusals.add(Instant::now(), who, why);
        drop(hall);
        if let Some(text) = text {
            say!("{text}");
        }
    }

    fn cut_overdue(&self, mut hall: MutexGuard<'_, Hall<T>>) {
        let patience = self.limits.patience;
        while let Some(at) = hall
            .guests
            .iter()
            .position(|g| g.since.elapsed() >= patience)
        {
            hall.guests.remove(at).cut();
        }
    }

    /// Cuts the guest that is least likely to be the primary.
    fn cut_one(&self, mut hall: MutexGuard<'_, Hall<T>>) {
        let guests = &hall.guests;
        let of_its_address = |g: &Guest| {
            let same = |other: &&Guest| !other.known && other.address.ip() == g.address.ip();
            guests.iter().filter(same).count()
        };
        let victim = guests
            .iter()
            .enumerate()
            .min_by_key(|(_, g)| (g.known, std::cmp::Reverse(of_its_address(g)), g.since))
            .map(|(at, _)| at);
        if let Some(at) = victim {
            hall.guests.remove(at).cut();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::process::{setrlimit, Resource, Rlimit};

    use super::*;
    use crate::peer::identity::{Identity, Pair};

    const SECOND: Duration = Duration::from_secs(1);
    /// Nothing takes nearly as long, even on a busy host.
    const MINUTE: Duration = Duration::from_secs(60);

    fn until(what: &str, mut holds: impl FnMut() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < MINUTE, "{what} did not come about");
            thread::sleep(SECOND / 100);
        }
    }

    fn way(pair: &Pair, n: usize) -> Way {
        Way::Tls(Arc::new(
            Identity::parse(pair.halves[n].1.as_bytes()).unwrap(),
        ))
    }

    type Introduced = (String, Channel);

    /// What is first said has to be five letters.
    fn introduction(channel: Channel) -> Result<Introduced> {
        let (mut reader, _writer, handle) = channel.split();
        let mut name = [0; 5];
        reader.read_exact(&mut name).context("it says nothing")?;
        let name = String::from_utf8(name.to_vec())?;
        anyhow::ensure!(name == "hello", "it says {name:?}");
        Ok((name, handle.into_channel()))
    }

    fn door(way: Way, limits: Limits) -> (Door<Introduced>, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (
            Door::open(listener, way, limits, introduction).unwrap(),
            address,
        )
    }

    fn come(address: SocketAddr, way: &Way) -> Result<Channel> {
        let stream = TcpStream::connect(address)?;
        let channel = Channel::connect(stream, way, MINUTE)?;
        let (_r, mut writer, handle) = channel.split();
        writer.write_all(b"hello")?;
        Ok(handle.into_channel())
    }

    /// The right peer, who comes again when it is cut, as the primary does.
    fn gets_in(door: &Door<Introduced>, address: SocketAddr, way: &Way) {
        until("its introduction", || {
            let Ok(_channel) = come(address, way) else {
                return false;
            };
            let introduced = door.next(SECOND);
            introduced.is_some_and(|((name, _), _)| name == "hello")
        });
    }

    /// Does something again and again while the right peer comes, for all kinds of strangers, until more
    /// than `refused` were.
    fn despite(stranger: impl Fn(SocketAddr) + Sync, strangers: usize, refused: u64) {
        let pair = Pair::make("alpha", "beta").unwrap();
        let limits = Limits {
            patience: 2 * SECOND,
            ..Limits::default()
        };
        let (door, address) = door(way(&pair, 1), limits);
        let stop = AtomicBool::new(false);
        thread::scope(|s| {
            for _ in 0..strangers {
                s.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        stranger(address);
                    }
                });
            }
            thread::sleep(SECOND / 2);
            for _ in 0..3 {
                gets_in(&door, address, &way(&pair, 0));
            }
            until("enough refusals", || door.refused() > refused);
            stop.store(true, Ordering::Relaxed);
            // Nobody waits for an answer any more.
            drop(door);
        });
    }

    /// A stranger, who does not go by himself while the right peer waits.
    fn raw(address: SocketAddr) -> Option<TcpStream> {
        let stream = TcpStream::connect(address).ok()?;
        stream.set_read_timeout(Some(2 * MINUTE)).unwrap();
        Some(stream)
    }

    #[test]
    fn despite_garbage() {
        despite(
            |address| {
                let Some(mut stream) = raw(address) else {
                    return;
                };
                let _ = stream.write_all(&[0xa5; 3000]);
                let _ = stream.read(&mut [0; 100]);
            },
            4,
            3,
        );
    }

    #[test]
    fn despite_silence() {
        despite(
            |address| {
                // Held until the door cuts it.
                if let Some(mut stream) = raw(address) {
                    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
                }
            },
            48,
            0,
        );
    }

    /// The first bytes of a client's hello.
    fn hello() -> Vec<u8> {
        let pair = Pair::make("alpha", "beta").unwrap();
        let Way::Tls(identity) = way(&pair, 0) else {
            panic!();
        };
        let mut bytes = Vec::new();
        let mut conn =
            rustls::ClientConnection::new(identity.client(), identity.other_name()).unwrap();
        conn.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn despite_crumbs_and_halves() {
        let hello = hello();
        let n = std::sync::atomic::AtomicUsize::new(0);
        despite(
            |address| {
                let Some(mut stream) = raw(address) else {
                    return;
                };
                if n.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                    // A half handshake: a whole hello, and then nothing.
                    let _ = stream.write_all(&hello);
                    while stream.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {}
                } else {
                    for byte in &hello {
                        if stream.write_all(&[*byte]).is_err() {
                            break;
                        }
                        thread::sleep(SECOND / 4);
                    }
                }
            },
            40,
            0,
        );
    }

    #[test]
    fn despite_two_hundred_at_once() {
        despite(
            |address| {
                let many: Vec<_> = (0..200).filter_map(|_| raw(address)).collect();
                thread::sleep(SECOND / 10);
                drop(many);
            },
            1,
            100,
        );
    }

    #[test]
    fn despite_other_clients() {
        let other = Pair::make("alpha", "beta").unwrap();
        let ways = [way(&other, 0), Way::Plain];
        let n = std::sync::atomic::AtomicUsize::new(0);
        despite(
            |address| {
                let n = n.fetch_add(1, Ordering::Relaxed);
                if let Ok(channel) = come(address, &ways[n % 2]) {
                    // Only the plain one believes that it is in.
                    assert!(n % 2 == 1);
                    let (mut reader, ..) = channel.split();
                    assert!(reader.read(&mut [0]).map_or(true, |n| n == 0));
                }
            },
            3,
            3,
        );
    }

    /// A hello that offers TLS 1.2 alone, the way such clients send it, is refused by an alert.
    #[test]
    fn tls_12_is_refused() {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        // No session, three suites of TLS 1.2, no compression, and the extensions such a client needs.
        body.extend([0, 0, 6, 0xc0, 0x2b, 0xc0, 0x2f, 0xc0, 0x30, 1, 0]);
        let extensions = [
            0, 10, 0, 4, 0, 2, 0, 23, 0, 11, 0, 2, 1, 0, 0, 13, 0, 4, 0, 2, 4, 3, 0, 23, 0, 0,
        ];
        body.extend([0, extensions.len() as u8]);
        body.extend(extensions);
        let mut record = vec![22, 3, 1, 0, body.len() as u8 + 4, 1, 0, 0, body.len() as u8];
        record.extend(body);

        let pair = Pair::make("alpha", "beta").unwrap();
        let (door, address) = door(way(&pair, 1), Limits::default());
        let mut stream = raw(address).unwrap();
        stream.write_all(&record).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        // Fatal, protocol version.
        assert_eq!(answer, [0x15, 3, 3, 0, 2, 2, 70]);
        until("the refusal", || door.refused() == 1);
        assert!(door.next(Duration::ZERO).is_none());
        gets_in(&door, address, &way(&pair, 0));
    }

    /// Who has shown its certificate has no more time than others, but is not cut for them.
    #[test]
    fn one_deadline() {
        let pair = Pair::make("alpha", "beta").unwrap();
        // Long enough for the handshake, on any host.
        let patience = 5 * SECOND;
        let limits = Limits {
            patience,
            ..Limits::default()
        };
        let (door, address) = door(way(&pair, 1), limits);
        let start = Instant::now();
        let stream = TcpStream::connect(address).unwrap();
        let channel = Channel::connect(stream, &way(&pair, 0), MINUTE).unwrap();
        let strangers: Vec<_> = (0..60).filter_map(|_| raw(address)).collect();
        let (mut reader, _w, handle) = channel.split();
        handle.set_read_timeout(Some(MINUTE)).unwrap();
        match reader.read(&mut [0]) {
            Ok(n) => assert_eq!(n, 0),
            Err(e) => assert_ne!(e.kind(), ErrorKind::WouldBlock, "it was not cut"),
        }
        assert!(start.elapsed() >= patience, "{:?}", start.elapsed());
        drop(strangers);
        assert!(door.next(Duration::ZERO).is_none());
    }

    #[test]
    fn plain_too_and_newest_first() {
        let limits = Limits {
            waiting: 2,
            ..Limits::default()
        };
        let (door, address) = door(Way::Plain, limits);
        assert!(door.next(SECOND / 20).is_none());
        let guests: Vec<_> = (0..5)
            .map(|n| {
                let channel = come(address, &Way::Plain).unwrap();
                until("its introduction", || {
                    let hall = lock(&door.inside.hall);
                    hall.introduced.len() as u64 + hall.refusals.count == n + 1
                });
                channel
            })
            .collect();
        let own = |n: usize| guests[n].handle().stream().local_addr().unwrap();
        for n in [3, 4] {
            assert_eq!(door.next(Duration::ZERO).unwrap().1, own(n));
        }
        assert!(door.next(SECOND / 20).is_none());
        assert_eq!(door.refused(), 3);
    }

    /// Nothing is left of a door, neither threads nor the port.
    #[test]
    fn closes_at_once() {
        let pair = Pair::make("alpha", "beta").unwrap();
        // An address of its own: no other test may take the port when it is free.
        let listener = TcpListener::bind("127.0.7.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let limits = Limits {
            patience: 10 * MINUTE,
            ..Limits::default()
        };
        let door = Door::open(listener, way(&pair, 1), limits, introduction).unwrap();
        let silent: Vec<_> = (0..20).map(|_| raw(address).unwrap()).collect();
        until("all are in", || lock(&door.inside.hall).guests.len() == 20);
        let inside = Arc::downgrade(&door.inside);
        let start = Instant::now();
        drop(door);
        assert!(start.elapsed() < MINUTE, "{:?}", start.elapsed());
        assert!(TcpStream::connect(address).is_err());
        until("the end of its threads", || inside.upgrade().is_none());
        drop(silent);
    }

    /// What [`few_descriptors`] runs in a process of its own, as the limit is a whole process's.
    #[test]
    #[ignore = "a part of few_descriptors"]
    fn behind_few_descriptors() {
        let Ok(keys) = std::env::var("REMUS_TEST_KEYS") else {
            return;
        };
        let way = Way::Tls(Arc::new(Identity::parse(keys.as_bytes()).unwrap()));
        let limits = Limits {
            patience: 2 * SECOND,
            ..Limits::default()
        };
        let (door, address) = door(way, limits);
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(30),
                maximum: Some(30),
            },
        )
        .unwrap();
        println!("\nlistens {address}");
        let start = Instant::now();
        assert!(door.next(MINUTE).is_some());
        until("enough refusals", || door.refused() > 10);
        let spent = start.elapsed();
        let short = std::fs::read_to_string("/proc/self/stat").unwrap();
        let ticks: u64 = short
            .split(' ')
            .skip(13)
            .take(2)
            .map(|t| t.parse::<u64>().unwrap())
            .sum();
        // Hundredths of a second of processor time. What spins takes all that there is.
        let busy = SECOND / 100 * u32::try_from(ticks).unwrap();
        assert!(busy < spent / 2, "{busy:?} in {spent:?}");
    }

    /// Strangers that use all descriptors up neither end the door nor make it spin.
    #[test]
    fn few_descriptors() {
        let pair = Pair::make("alpha", "beta").unwrap();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "peer::door::tests::behind_few_descriptors"])
            .args(["--ignored", "--nocapture"])
            .env("REMUS_TEST_KEYS", &pair.halves[1].1)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut said = |what: &str| {
            let line = lines.find_map(|l| l.unwrap().strip_prefix(what).map(str::to_owned));
            line.unwrap()
        };
        let address: SocketAddr = said("listens ").parse().unwrap();
        let mut strangers: Vec<_> = (0..60).filter_map(|_| raw(address)).collect();
        thread::sleep(2 * SECOND);
        strangers.extend((0..60).filter_map(|_| raw(address)));
        let (way, mut mine) = (way(&pair, 0), None);
        until("its introduction", || {
            mine = come(address, &way).ok();
            mine.is_some()
        });
        lines.for_each(drop);
        assert!(child.wait().unwrap().success());
        drop((mine, strangers));
    }

    #[test]
    fn told_once_a_second() {
        let mut refusals = Refusals::default();
        let start = Instant::now();
        let text = refusals.add(start, "1.2.3.4:5", "why").unwrap();
        assert_eq!(text, "refused 1.2.3.4:5: why");
        for _ in 0..7 {
            assert!(refusals.add(start + TELL / 2, "x", "y").is_none());
        }
        let text = refusals.add(start + TELL, "x", "y").unwrap();
        assert_eq!(text, "refused x: y (and 7 more since the last such line)");
        assert_eq!(refusals.count, 9);
    }
}
