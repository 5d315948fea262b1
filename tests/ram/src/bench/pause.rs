// SPDX-License-Identifier: GPL-2.0

//! How long a guest is paused: by the pages that it wrote, copied on write or all at once; and what a
//! pause of QEMU consists of.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use remus_ram::guest::{Guest, Job};

use crate::memory::{buffer, scattered, timed, Memory};
use crate::qemu::Qemu;
use crate::stats::{slope, Figure, Series, Target};
use crate::Bench;

/// Pages written in an epoch.
const COUNTS: [usize; 4] = [500, 2_000, 4_000, 8_000];
/// The first pages of the memory, which the guest writes all the time that it runs.
const HOT: u32 = 16;
/// How long it runs before it is paused.
const RUN: Duration = Duration::from_millis(5);
/// Memory of the machine that QEMU runs, in MiB, and pages of it written in an epoch.
const QEMU_MIB: u64 = 128;
const QEMU_PAGES: usize = 2_000;

/// What the guest's thread is told.
enum Order {
    /// Write these pages, which begin with the hot ones, and run on.
    Write(Vec<u64>),
    /// Run on.
    Run,
}

/// The guest in a thread of its own. It answers each order, and each stop, with the time at which it
/// was about to run again, or had stopped.
struct Running<'a> {
    orders: Sender<Order>,
    answers: Receiver<Result<Instant>>,
    stop: &'a AtomicBool,
}

impl Running<'_> {
    fn order(&self, order: Order) -> Result<Instant> {
        self.orders.send(order).ok().context("the guest is gone")?;
        self.answers.recv().context("the guest is gone")?
    }

    fn stop(&self) -> Result<Instant> {
        self.stop.store(true, Ordering::Release);
        self.answers.recv().context("the guest is gone")?
    }
}

/// The guest's thread.
fn obey(
    guest: &mut Guest,
    orders: &Receiver<Order>,
    answers: &Sender<Result<Instant>>,
    stop: &AtomicBool,
) {
    let listed = |guest: &mut Guest, count| {
        let (from, value) = (0, 7);
        guest.run(Job::Listed { from, count, value })
    };
    let mut follow = |order| -> Result<()> {
        if let Order::Write(pages) = order {
            guest.list(0, &pages)?;
            listed(guest, pages.len() as u32)?;
        }
        // Nobody listens any more if the other side has failed.
        let _ = answers.send(Ok(Instant::now()));
        while !stop.swap(false, Ordering::Acquire) {
            listed(guest, HOT)?;
        }
        let _ = answers.send(Ok(Instant::now()));
        Ok(())
    };
    while let Ok(order) = orders.recv() {
        if let Err(error) = follow(order) {
            let _ = answers.send(Err(error));
            return;
        }
    }
}

/// One pause, in microseconds.
struct Pause {
    whole: f64,
    stop: f64,
    seal: f64,
    resume: f64,
}

/// Has so many pages written, and pauses. With `copy` all of them are read before the guest runs on.
fn pause(
    memory: &Memory,
    guest: &Running<'_>,
    pages: Vec<u64>,
    copy: bool,
    buffer: &mut [u8],
) -> Result<Pause> {
    let count = pages.len();
    guest.order(Order::Write(pages))?;
    thread::sleep(RUN);
    let begin = Instant::now();
    guest.stop()?;
    let stopped = Instant::now();
    let done = memory.seal_of(count)?;
    let sealed = Instant::now();
    if copy {
        let read = memory.read_out(done.epoch, buffer)?;
        ensure!(read == count, "READ delivered {read} of {count} pages");
    }
    let before = Instant::now();
    let resumed = guest.order(Order::Run)?;
    if !copy {
        let read = memory.read_out(done.epoch, buffer)?;
        ensure!(read == count, "READ delivered {read} of {count} pages");
    }
    memory.commit(done.epoch)?;
    guest.stop()?;
    let us = |from: Instant, to: Instant| (to - from).as_nanos() as f64 / 1e3;
    Ok(Pause {
        whole: us(begin, resumed),
        stop: us(begin, stopped),
        seal: us(stopped, sealed),
        resume: us(before, resumed),
    })
}

/// What each further page adds to the pause, copied on write and copied at once.
pub fn by_pages(bench: &mut Bench, guest: &mut Guest) -> Result<()> {
    let big = &bench.big;
    let rounds: Vec<_> = bench.rounds().collect();
    let rng = &mut bench.rng;
    let stop = AtomicBool::new(false);
    // By mode: copied on write, copied at once.
    let mut slopes = [Series::default(), Series::default()];
    let mut least = slopes.clone();
    let mut most = slopes.clone();
    let mut parts = [Series::default(), Series::default(), Series::default()];
    thread::scope(|scope| -> Result<()> {
        let (orders, ordered) = channel();
        let (answered, answers) = channel();
        let stop = &stop;
        scope.spawn(move || obey(guest, &ordered, &answered, stop));
        let running = Running {
            orders,
            answers,
            stop,
        };
        let mut buffer = buffer();
        for round in rounds {
            let mut points = [vec![], vec![]];
            for count in COUNTS {
                for turn in 0..2 {
                    let mode = (round.number as usize + turn) % 2;
                    let hot = u64::from(HOT);
                    let mut pages: Vec<u64> = (0..hot).collect();
                    let others = scattered(rng, big.pages() - hot, count - HOT as usize);
                    pages.extend(others.iter().map(|page| page + hot));
                    let pause = pause(big, &running, pages, mode == 1, &mut buffer)?;
                    points[mode].push((count as f64, pause.whole));
                    if !round.counts {
                        continue;
                    }
                    if count == COUNTS[0] {
                        least[mode].push(pause.whole / 1e3);
                    }
                    if count == COUNTS[3] {
                        most[mode].push(pause.whole / 1e3);
                        if mode == 0 {
                            parts[0].push(pause.stop / 1e3);
                            parts[1].push(pause.seal / 1e3);
                            parts[2].push(pause.resume / 1e3);
                        }
                    }
                }
            }
            if round.counts {
                for (slopes, points) in slopes.iter_mut().zip(&points) {
                    slopes.push(slope(points));
                }
            }
        }
        // The hot pages of the last pause are in the open epoch.
        let epoch = big.seal()?.epoch;
        big.commit(epoch).map(drop)
    })?;
    let figure = Figure::new(
        &slopes[0].over(&slopes[1]),
        Target::AtMost(0.5),
        "what each page from 500 to 8,000 adds to the pause of this benchmark's KVM guest: copied on \
         write, by all pages READ before it runs on; 1 GiB, scattered",
    )
    .beside("copy on write, a page", "us", &slopes[0])
    .beside("copied at once, a page", "us", &slopes[1])
    .beside("copy on write, 500 pages", "ms", &least[0])
    .beside("copied at once, 500 pages", "ms", &least[1])
    .beside("copy on write, 8,000 pages", "ms", &most[0])
    .beside("copied at once, 8,000 pages", "ms", &most[1])
    .beside("of 8,000: stop", "ms", &parts[0])
    .beside("of 8,000: seal, whole call", "ms", &parts[1])
    .beside("of 8,000: resume", "ms", &parts[2]);
    bench.add("pause_slope_cow_vs_copy", figure);
    Ok(())
}

/// What a pause of a stock QEMU consists of.
pub fn parts(bench: &mut Bench) -> Result<()> {
    let memory = Memory::new("bench-qemu", QEMU_MIB)?;
    let mut qemu = Qemu::start("bench-qemu", QEMU_MIB)?;
    let [mut stop, mut seal, mut state, mut resume, mut whole] =
        [(); 5].map(|()| Series::default());
    let mut pages_sealed = Series::default();
    let mut bytes = Series::default();
    for round in bench.rounds() {
        // Above what the firmware uses, and written by another process than QEMU.
        let pages = scattered(&mut bench.rng, memory.pages() / 2, QEMU_PAGES);
        let pages: Vec<u64> = pages.iter().map(|p| p + memory.pages() / 4).collect();
        memory.map.write_pages(&pages, round.number);
        thread::sleep(RUN);
        let ((stop_ns, done, seal_ns, saved, resume_ns), took) = timed(|| {
            let ((), stop_ns) = timed(|| qemu.command("stop"))?;
            let (done, seal_ns) = timed(|| memory.seal())?;
            let saved = timed(|| qemu.save_state())?;
            let ((), resume_ns) = timed(|| qemu.command("cont"))?;
            Ok((stop_ns, done, seal_ns, saved, resume_ns))
        })?;
        if done.dirty_pages < QEMU_PAGES as u64 {
            bail!("an epoch of {QEMU_PAGES} pages holds {}", done.dirty_pages);
        }
        memory.commit(done.epoch)?;
        if round.counts {
            stop.push(stop_ns / 1e6);
            seal.push(seal_ns / 1e6);
            state.push(saved.1 / 1e6);
            resume.push(resume_ns / 1e6);
            whole.push(took / 1e6);
            pages_sealed.push(done.dirty_pages as f64);
            bytes.push(saved.0 as f64 / 1e3);
        }
    }
    let figure = Figure::new(
        &whole,
        Target::None,
        "pause of a QEMU q35 machine by QMP: stop, seal, xen-save-devices-state, cont; milliseconds",
    )
    .beside("stop", "ms", &stop)
    .beside("seal, whole call", "ms", &seal)
    .beside("device state", "ms", &state)
    .beside("resume", "ms", &resume)
    .beside("pages sealed", "pages", &pages_sealed)
    .beside("size of the device state", "kB", &bytes);
    bench.add("pause_parts_ms", figure);
    Ok(())
}
