// SPDX-License-Identifier: GPL-2.0-or-later

//! From a sealed epoch to the wire, each stage on a thread of its own.
//!
//! ```text
//!  reader ──batch of records──▶ encoder 0 ──frame──▶ sender ──▶ data stream
//!    │                    └───▶ encoder 1 ──frame──▶   │
//!    └────────── what comes next, in order ────────────┘
//! ```
//!
//! Every encoder sees every batch and encodes its share of the pages, so each page has one encoder, which
//! alone knows what the standby has of it. The sender takes one frame of each encoder a batch: what
//! goes out is in order without anybody sorting.
//!
//! Memory: each channel holds at most [`AHEAD`] things, so at most `2 * AHEAD + 2` batches and
//! `AHEAD + 2` frames an encoder exist, of at most 1 MiB each; beyond that a stage waits for the next.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::Scope;
use std::time::{Duration, Instant};

use anyhow::{bail, Error, Result};
use remus_core::uapi::ram::{self, RECORD_SIZE};
use remus_proto::frame::{EpochBegin, EpochEnd, Kind, HEADER_SIZE, PAYLOAD_MAX};
use remus_proto::pages::{Counts, Encoder, Options, Share, BATCH_RECORDS};

use crate::host::kernel::Pages;
use crate::peer::stream::{lock, Sender, Unsent};
use crate::threads::spawn;

/// How many things may wait between two stages.
const AHEAD: usize = 2;
/// Least bytes of a frame that says something about the link.
const TELLING: usize = 1 << 14;

/// How pages are encoded.
#[derive(Clone, Copy, Debug)]
pub struct Encoding {
    /// Threads.
    pub encoders: usize,
    /// Bytes for what the standby has, of all encoders together.
    pub cache_bytes: usize,
    /// Send pages as they are.
    pub raw: bool,
}

/// An epoch, or a pass of the first copy, that is to be sent.
pub struct Job {
    /// The sealed epoch.
    pub epoch: u64,
    /// The epoch on top of which it goes.
    pub base: u64,
    /// How many pages it has.
    pub dirty_pages: u64,
    /// Its device state; empty for a pass.
    pub state: Vec<u8>,
    /// Its pages, if they were copied in the pause.
    pub copied: Option<Vec<Batch>>,
}

/// What was sent of a [`Job`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    /// Bytes on the wire, with all that goes with the pages.
    pub bytes: u64,
    /// How the pages went.
    pub counts: Counts,
    /// Time in which pages were read.
    pub read: Duration,
    /// Time in which they were encoded, of all encoders together.
    pub encode: Duration,
    /// Time in which frames were sent.
    pub send: Duration,
}

/// What the pipeline tells while it runs, from its threads.
pub trait Watcher: Sync {
    /// So many pages of `epoch` are out, in so many bytes.
    fn progress(&self, epoch: u64, pages: u64, bytes: u64);
    /// All but the end of `epoch` is out.
    fn sent(&self, epoch: u64, sent: &Sent);
    /// The standby takes nothing more.
    fn unsent(&self, error: &Error);
    /// This side cannot go on.
    fn failed(&self, error: Error);
}

/// Records of pages, in a buffer that is used again when nobody looks at it any more.
pub struct Batch {
    buffer: Vec<u8>,
    length: usize,
    pool: Arc<Pool>,
}

impl Batch {
    fn records(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or(&[])
    }

    fn pages(&self) -> u64 {
        (self.length / RECORD_SIZE) as u64
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.pool.put(std::mem::take(&mut self.buffer));
    }
}

/// Buffers that wait to be used again.
#[derive(Default)]
struct Pool(Mutex<Vec<Vec<u8>>>);

impl Pool {
    fn take(&self) -> Vec<u8> {
        lock(&self.0).pop().unwrap_or_default()
    }

    fn put(&self, buffer: Vec<u8>) {
        lock(&self.0).push(buffer);
    }
}

/// Reads the pages of sealed epochs in batches.
pub struct Batches<'a> {
    pages: &'a mut dyn Pages,
    pool: Arc<Pool>,
}

impl<'a> Batches<'a> {
    /// Reads from `pages`.
    pub fn new(pages: &'a mut dyn Pages) -> Self {
        Self {
            pages,
            pool: Arc::default(),
        }
    }

    /// The next batch of `epoch`; nothing after the last. `cursor` starts at 0.
    pub fn next(&mut self, epoch: u64, cursor: &mut u64) -> Result<Option<Batch>> {
        if *cursor == ram::END {
            return Ok(None);
        }
        let mut buffer = self.pool.take();
        buffer.resize(BATCH_RECORDS * RECORD_SIZE, 0);
        let count = self.pages.read(epoch, cursor, &mut buffer)?;
        let length = count * RECORD_SIZE;
        if length > buffer.len() {
            bail!("the kernel claims to have handed out {count} pages at once");
        }
        let batch = Batch {
            buffer,
            length,
            pool: Arc::clone(&self.pool),
        };
        if count == 0 && *cursor != ram::END {
            bail!("the kernel handed out no page of epoch {epoch}");
        }
        Ok((count > 0).then_some(batch))
    }

    /// All pages of `epoch`, at once.
    pub fn all(&mut self, epoch: u64) -> Result<Vec<Batch>> {
        let (mut all, mut cursor) = (Vec::new(), 0);
        while let Some(batch) = self.next(epoch, &mut cursor)? {
            all.push(batch);
        }
        Ok(all)
    }
}

/// What the sender does next.
enum Step {
    Begin {
        epoch: u64,
        base: u64,
    },
    /// One frame of each encoder.
    Batch {
        /// Pages of the epoch up to here.
        pages: u64,
    },
    End {
        epoch: u64,
        state: Vec<u8>,
        read: Duration,
    },
}

/// A frame of pages: room for the header, then the payload.
struct Encoded {
    frame: Vec<u8>,
    counts: Counts,
    took: Duration,
}

/// What a byte costs on the link, in nanoseconds, as the sender measures it.
#[derive(Default)]
struct Cost(AtomicU64);

impl Cost {
    fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }

    fn learn(&self, bytes: usize, took: Duration) {
        let now = took.as_nanos() as f64 / bytes as f64;
        let before = self.get();
        let next = if before == 0.0 {
            now
        } else {
            before + (now - before) / 16.0
        };
        self.0.store(next.to_bits(), Ordering::Relaxed);
    }
}

/// Starts the stages; without `batches`, jobs have to bring their pages. They end when what is returned is dropped, or on trouble, of which `watcher` is told.
pub fn start<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    batches: Option<Batches<'scope>>,
    data: Sender,
    encoding: Encoding,
    watcher: &'scope dyn Watcher,
) -> Result<SyncSender<Job>> {
    let cost: Arc<Cost> = Arc::default();
    let frames: Arc<Pool> = Arc::default();
    let of = encoding.encoders.max(1);
    let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
    for index in 0..of {
        let (input, batches) = sync_channel::<Arc<Batch>>(AHEAD);
        let (output, encoded) = sync_channel(AHEAD);
        inputs.push(input);
        outputs.push(encoded);
        let encoder = Encoder::new(Options {
            share: Share {
                index: index as u64,
                of: of as u64,
            },
            cache_bytes: encoding.cache_bytes / of,
            raw: encoding.raw,
        });
        let (cost, frames) = (Arc::clone(&cost), Arc::clone(&frames));
        spawn(scope, &format!("encoder {index}"), move || {
            if let Err(e) = encode(encoder, &batches, &output, &frames, &cost, of) {
                watcher.failed(e);
            }
        })?;
    }
    let (next, steps) = sync_channel(AHEAD);
    // The loop bounds the epochs in flight, and with them what waits here.
    let (jobs, queue) = sync_channel::<Job>(1 << 12);
    spawn(scope, "reader", move || {
        if let Err(e) = read(&queue, batches, &inputs, &next) {
            watcher.failed(e);
        }
    })?;
    spawn(scope, "sender", move || {
        let mut stage = Sending {
            data,
            outputs,
            frames,
            cost,
            watcher,
            sent: Sent::default(),
        };
        match stage.run(&steps) {
            Ok(()) => {}
            Err(e) if e.is::<Unsent>() => watcher.unsent(&e),
            Err(e) => watcher.failed(e),
        }
    })?;
    Ok(jobs)
}

/// Reads the pages of each job. Who cannot pass something on ends without a word: the next stage has
/// told the reason.
fn read(
    queue: &Receiver<Job>,
    mut batches: Option<Batches<'_>>,
    inputs: &[SyncSender<Arc<Batch>>],
    next: &SyncSender<Step>,
) -> Result<()> {
    for job in queue {
        let (epoch, base) = (job.epoch, job.base);
        if next.send(Step::Begin { epoch, base }).is_err() {
            return Ok(());
        }
        let (mut count, mut cursor, mut read) = (0, 0, Duration::ZERO);
        let mut copied = job.copied.map(VecDeque::from);
        loop {
            let begin = Instant::now();
            let batch = match (&mut copied, &mut batches) {
                (Some(copied), _) => copied.pop_front(),
                (None, Some(batches)) => batches.next(epoch, &mut cursor)?,
                (None, None) => None,
            };
            read += begin.elapsed();
            let Some(batch) = batch else {
                break;
            };
            count += batch.pages();
            let (pages, batch) = (count, Arc::new(batch));
            let passed_on = inputs.iter().all(|i| i.send(Arc::clone(&batch)).is_ok());
            drop(batch);
            if !passed_on || next.send(Step::Batch { pages }).is_err() {
                return Ok(());
            }
        }
        if count != job.dirty_pages {
            bail!(
                "the kernel handed out {count} of the {} pages of epoch {epoch}",
                job.dirty_pages
            );
        }
        let state = job.state;
        if next.send(Step::End { epoch, state, read }).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

fn encode(
    mut encoder: Encoder,
    batches: &Receiver<Arc<Batch>>,
    output: &SyncSender<Encoded>,
    frames: &Pool,
    cost: &Cost,
    sharers: usize,
) -> Result<()> {
    for batch in batches {
        let begin = Instant::now();
        let (mut frame, mut counts) = (frames.take(), Counts::default());
        frame.clear();
        frame.resize(HEADER_SIZE, 0);
        // They share it.
        encoder.set_link(cost.get() * sharers as f64);
        encoder.encode(batch.records(), &mut frame, &mut counts)?;
        drop(batch);
        let took = begin.elapsed();
        let encoded = Encoded {
            frame,
            counts,
            took,
        };
        if output.send(encoded).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// The last stage.
struct Sending<'a> {
    data: Sender,
    outputs: Vec<Receiver<Encoded>>,
    frames: Arc<Pool>,
    cost: Arc<Cost>,
    watcher: &'a dyn Watcher,
    sent: Sent,
}

impl Sending<'_> {
    fn run(&mut self, steps: &Receiver<Step>) -> Result<()> {
        let mut now = 0;
        for step in steps {
            match step {
                Step::Begin { epoch, base } => {
                    (now, self.sent) = (epoch, Sent::default());
                    self.frame(Kind::EpochBegin, epoch, &EpochBegin { base }.encode())?;
                }
                Step::Batch { pages } => {
                    if !self.batch(now)? {
                        return Ok(());
                    }
                    self.watcher.progress(now, pages, self.sent.bytes);
                }
                Step::End { epoch, state, read } => {
                    self.sent.read = read;
                    self.end(epoch, &state)?;
                }
            }
        }
        Ok(())
    }

    fn frame(&mut self, kind: Kind, epoch: u64, payload: &[u8]) -> Result<()> {
        let begin = Instant::now();
        self.sent.bytes += self.data.send(kind, epoch, payload)? as u64;
        self.sent.send += begin.elapsed();
        Ok(())
    }

    /// Sends the pages of a batch; nothing if an encoder has ended.
    fn batch(&mut self, epoch: u64) -> Result<bool> {
        for output in &self.outputs {
            let Ok(Encoded {
                mut frame,
                counts,
                took,
            }) = output.recv()
            else {
                return Ok(false);
            };
            self.sent.counts += counts;
            self.sent.encode += took;
            if frame.len() > HEADER_SIZE {
                let begin = Instant::now();
                let bytes = self.data.send_in_place(Kind::Pages, epoch, &mut frame)?;
                let took = begin.elapsed();
                self.sent.bytes += bytes as u64;
                self.sent.send += took;
                if bytes >= TELLING {
                    self.cost.learn(bytes, took);
                }
            }
            self.frames.put(frame);
        }
        Ok(true)
    }

    fn end(&mut self, epoch: u64, state: &[u8]) -> Result<()> {
        for piece in state.chunks(PAYLOAD_MAX) {
            self.frame(Kind::DeviceState, epoch, piece)?;
        }
        let end = EpochEnd {
            pages: self.sent.counts.entries(),
            state: state.len() as u64,
        }
        .encode();
        self.sent.bytes += (HEADER_SIZE + end.len()) as u64;
        // Before the end is out: the acknowledgement may be here before the call is back.
        self.watcher.sent(epoch, &self.sent);
        self.data.send(Kind::EpochEnd, epoch, &end)?;
        Ok(())
    }
}
