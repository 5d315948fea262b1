// SPDX-License-Identifier: GPL-2.0-or-later

//! Models of the kernel side and of a guest, and a connection that can be made to fail.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Result};
use remus_core::epoch::Epochs;
use remus_core::uapi::ram::{self, PAGE_SIZE, RECORD_SIZE};
use remus_proto::frame;

use crate::host::kernel::{Domain, Done, Guest, Image, Kernel, Machine, Pages, Seal};
use crate::peer::stream::lock;

/// How a guest's memory is looked at; it has to stand still if told so.
pub type Look = Arc<dyn Fn(bool) -> Vec<u8> + Send + Sync>;

/// What the kernel would know of a domain.
pub struct Book {
    pub epochs: Epochs,
    /// Memory at each seal, kept for ever to compare with.
    pub snapshots: BTreeMap<u64, Vec<u8>>,
    pub dirty: BTreeMap<u64, Vec<u64>>,
    /// Commits that were made, in order.
    pub commits: Vec<u64>,
    /// When they began.
    pub begun: Vec<Instant>,
    last: Vec<u8>,
    /// Seals with the guest standing still before each epoch's: the number of its state.
    pub saves: BTreeMap<u64, usize>,
    /// Pages of aborted epochs.
    folded: Vec<u64>,
    /// Nothing is held.
    pub passing: bool,
}

/// A kernel that finds out what was written by comparing. Clones are the same kernel.
#[derive(Clone)]
pub struct Model {
    pub book: Arc<Mutex<Book>>,
    look: Look,
    /// Calls of each kind that still succeed.
    pub seals: Arc<AtomicU64>,
    pub reads: Arc<AtomicU64>,
    pub commits: Arc<AtomicU64>,
    /// How many commits have passed here, their last step. None does while this is held.
    pub gate: Arc<Mutex<usize>>,
    /// The standby cannot resume what it is handed.
    pub unable: Arc<AtomicBool>,
    /// Epochs that all of the memory was sealed in.
    pub fulls: Arc<Mutex<Vec<u64>>>,
}

impl Model {
    pub fn new(look: Look) -> Self {
        let book = Book {
            epochs: Epochs::new(),
            snapshots: BTreeMap::new(),
            dirty: BTreeMap::new(),
            commits: Vec::new(),
            begun: Vec::new(),
            last: Vec::new(),
            saves: BTreeMap::new(),
            folded: Vec::new(),
            passing: false,
        };
        let many = || Arc::new(AtomicU64::new(u64::MAX));
        Self {
            book: Arc::new(Mutex::new(book)),
            look,
            seals: many(),
            reads: many(),
            commits: many(),
            gate: Arc::default(),
            unable: Arc::default(),
            fulls: Arc::default(),
        }
    }

    fn spend(what: &AtomicU64, name: &str) -> Result<()> {
        let less = |left: u64| {
            if left == u64::MAX {
                Some(left)
            } else {
                left.checked_sub(1)
            }
        };
        match what.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less) {
            Ok(_) => Ok(()),
            Err(_) => bail!("{name} was made to fail"),
        }
    }
}

impl Kernel for Model {
    fn get(&mut self, domain: &str) -> Result<Domain> {
        let book = lock(&self.book);
        Ok(Domain {
            domain: domain.into(),
            open_epoch: book.epochs.open(),
            committed_epoch: book.epochs.committed(),
            sealed_epochs: book.epochs.sealed(),
            ..Domain::default()
        })
    }

    fn seal(&mut self, domain: &str, how: Seal) -> Result<Done> {
        Self::spend(&self.seals, "seal")?;
        let now = (self.look)(!how.keep_passthrough);
        let mut book = lock(&self.book);
        let Ok(epoch) = book.epochs.seal() else {
            bail!("refused")
        };
        book.passing &= how.keep_passthrough;
        if how.full {
            lock(&self.fulls).push(epoch);
        }
        if !how.keep_passthrough {
            let nth = book.saves.len();
            book.saves.insert(epoch, nth);
        }
        let old = |i: usize| book.last.get(i * PAGE_SIZE..(i + 1) * PAGE_SIZE);
        let dirty: Vec<u64> = now
            .chunks(PAGE_SIZE)
            .enumerate()
            .filter(|(i, page)| {
                if how.full {
                    page.iter().any(|b| *b != 0)
                } else {
                    old(*i) != Some(page) || book.folded.contains(&(*i as u64))
                }
            })
            .map(|(i, _)| i as u64)
            .collect();
        let dirty_pages = dirty.len() as u64;
        book.folded.clear();
        book.last.clone_from(&now);
        book.snapshots.insert(epoch, now);
        book.dirty.insert(epoch, dirty);
        Ok(Done {
            domain: domain.into(),
            epoch,
            dirty_pages,
            ..Done::default()
        })
    }

    fn commit(&mut self, domain: &str, epoch: u64) -> Result<Done> {
        Self::spend(&self.commits, "commit")?;
        let begun = Instant::now();
        let mut book = lock(&self.book);
        if let Err(e) = book.epochs.commit(epoch) {
            bail!("refused: {e:?}");
        }
        book.commits.push(epoch);
        book.begun.push(begun);
        drop(book);
        *lock(&self.gate) += 1;
        Ok(Done {
            domain: domain.into(),
            epoch,
            packets: 1,
            ..Done::default()
        })
    }

    fn abort(&mut self, domain: &str, epoch: u64) -> Result<Done> {
        let mut book = lock(&self.book);
        let open = book.epochs.open();
        if let Err(e) = book.epochs.abort(epoch) {
            bail!("refused: {e:?}");
        }
        let pages: Vec<u64> = (epoch..open).flat_map(|e| book.dirty[&e].clone()).collect();
        book.folded.extend(pages);
        drop(book);
        Ok(Done {
            domain: domain.into(),
            epoch,
            ..Done::default()
        })
    }

    fn set_passthrough(&mut self, _: &str, on: bool) -> Result<()> {
        let mut book = lock(&self.book);
        if on && !book.passing && book.epochs.sealed() > 0 {
            bail!("refused: sealed epochs wait");
        }
        book.passing = on;
        Ok(())
    }
}

impl Pages for Model {
    fn read(&mut self, epoch: u64, cursor: &mut u64, buffer: &mut [u8]) -> Result<usize> {
        Self::spend(&self.reads, "read")?;
        let book = lock(&self.book);
        assert!(
            book.epochs.check_sealed(epoch).is_ok(),
            "read of epoch {epoch}, not sealed"
        );
        let (memory, dirty) = (&book.snapshots[&epoch], &book.dirty[&epoch]);
        let mut count = 0;
        // Few at a time, for more frames and more places to fail in.
        let from = *cursor;
        for &page in dirty.iter().filter(|p| **p >= from).take(7) {
            let content = &memory[page as usize * PAGE_SIZE..][..PAGE_SIZE];
            let to = &mut buffer[count * RECORD_SIZE..][..RECORD_SIZE];
            frame::record(page, content.try_into().unwrap(), to.try_into().unwrap());
            count += 1;
            *cursor = page + 1;
        }
        if count == 0 {
            *cursor = ram::END;
        }
        Ok(count)
    }
}

/// A guest of threads and bytes: it writes to its memory while it runs, and its device state is a
/// number that goes up with each write.
pub struct Toy {
    pub memory: Arc<Mutex<(Vec<u8>, u64)>>,
    pub running: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
    /// Saves that still succeed.
    pub saves: u64,
    /// The state at each save.
    pub saved: Arc<Mutex<Vec<u64>>>,
}

impl Toy {
    pub fn new(pages: usize, seed: u64) -> Self {
        let memory = Arc::new(Mutex::new((vec![0; pages * PAGE_SIZE], 0)));
        let running = Arc::new(AtomicBool::new(true));
        let over = Arc::new(AtomicBool::new(false));
        let (m, r, o) = (Arc::clone(&memory), Arc::clone(&running), Arc::clone(&over));
        thread::spawn(move || {
            let mut random = Random(seed);
            while !o.load(Ordering::SeqCst) {
                for _ in 0..20 {
                    let mut memory = lock(&m);
                    // Looked at under the lock: nothing is written once the pause is over.
                    if r.load(Ordering::SeqCst) {
                        memory.1 += 1;
                        let (at, value) = (random.below(pages * PAGE_SIZE), random.next() as u8);
                        memory.0[at] = value;
                    }
                }
                thread::sleep(Duration::from_micros(300));
            }
        });
        Self {
            memory,
            running,
            over,
            saves: u64::MAX,
            saved: Arc::default(),
        }
    }

    pub fn look(&self) -> Look {
        let (memory, running) = (Arc::clone(&self.memory), Arc::clone(&self.running));
        Arc::new(move |still| {
            assert!(
                !still || !running.load(Ordering::SeqCst),
                "sealed while the guest runs"
            );
            lock(&memory).0.clone()
        })
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

impl Guest for Toy {
    fn pause(&mut self) -> Result<()> {
        let _wait = lock(&self.memory);
        self.running.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>> {
        assert!(!self.running.load(Ordering::SeqCst));
        if self.saves == 0 {
            bail!("save was made to fail");
        }
        self.saves -= 1;
        let state = lock(&self.memory).1;
        lock(&self.saved).push(state);
        Ok(state.to_le_bytes().to_vec())
    }

    fn resume(&mut self) -> Result<()> {
        self.running.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn runs(&mut self) -> Result<bool> {
        Ok(self.running.load(Ordering::SeqCst))
    }

    fn quit(&mut self) -> Result<()> {
        self.over.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn ended(&mut self) -> Option<String> {
        None
    }
}

/// Memory on the standby.
pub struct Copy(pub Vec<u8>);

impl Copy {
    fn page(&mut self, page: u64) -> &mut [u8] {
        &mut self.0[page as usize * PAGE_SIZE..][..PAGE_SIZE]
    }
}

impl Image for Copy {
    fn read(&mut self, page: u64, to: &mut [u8; PAGE_SIZE]) -> Result<()> {
        to.copy_from_slice(self.page(page));
        Ok(())
    }

    fn write(&mut self, page: u64, content: &[u8; PAGE_SIZE]) -> Result<()> {
        self.page(page).copy_from_slice(content);
        Ok(())
    }
}

/// A machine that waits for ever.
pub struct Patient;

impl Machine for Patient {
    fn ready(&mut self) -> Result<()> {
        Ok(())
    }
}

/// How a connection fails.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    /// Both sides see it closed.
    Close,
    /// It takes no more data and delivers none.
    Stall,
    /// A byte is changed.
    Flip,
    /// It takes 4 kB in 60 ms.
    Slow,
}

/// A connection to whoever listens at `to`, that fails after `budget` more bytes towards it; with
/// `usize::MAX` not yet.
pub fn flaky(to: SocketAddr, budget: Arc<AtomicUsize>, failure: Failure) -> TcpStream {
    let front = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(front.local_addr().unwrap()).unwrap();
    let (mut inner, _) = front.accept().unwrap();
    let mut far = TcpStream::connect(to).unwrap();
    let (mut back_from, mut back_to) = (far.try_clone().unwrap(), inner.try_clone().unwrap());
    let stalled = Arc::new(AtomicBool::new(false));
    let deaf = Arc::clone(&stalled);
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(n) = back_from.read(&mut bytes) {
            if deaf.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_secs(3));
                break;
            }
            if n == 0 || back_to.write_all(&bytes[..n]).is_err() {
                break;
            }
        }
        let _ = back_to.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        loop {
            let mut left = budget.load(Ordering::SeqCst);
            let want = bytes.len().min(left.max(1));
            let Ok(n) = inner.read(&mut bytes[..want]) else {
                break;
            };
            if n == 0 {
                break;
            }
            if left == 0 {
                match failure {
                    Failure::Close => break,
                    Failure::Stall => {
                        stalled.store(true, Ordering::SeqCst);
                        thread::sleep(Duration::from_secs(3));
                        break;
                    }
                    Failure::Slow => {}
                    Failure::Flip => {
                        bytes[0] ^= 4;
                        left = usize::MAX;
                        budget.store(left, Ordering::SeqCst);
                    }
                }
            }
            if matches!(failure, Failure::Slow) {
                thread::sleep(Duration::from_millis(60));
            }
            if left < usize::MAX {
                budget.store(left - n.min(left), Ordering::SeqCst);
            }
            if far.write_all(&bytes[..n]).is_err() {
                break;
            }
        }
        let _ = far.shutdown(Shutdown::Both);
        let _ = inner.shutdown(Shutdown::Both);
    });
    near
}

/// Waits until something holds, or fails.
pub fn until(what: &str, patience: Duration, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < patience, "{what} did not come about");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A small generator of numbers (xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
