// SPDX-License-Identifier: GPL-2.0-or-later

//! The changes of the disks, in the order in which QEMU made them, until the standby has them.
//!
//! A stretch of records with marks in it, one where each epoch ends:
//!
//! ```text
//!  forgotten │ records of 7  ▼7  of 8  ▼8   of the epoch that is open │
//!          start              ▲cursor of the sender                  end
//! ```
//!
//! ```text
//!           copy()                seal()             track()
//!  Tracking ──────▶ Copying ──────────────▶ Keeping ─────────▶ Tracking
//!           copy_on()    │                                        ▲
//!                        └───────────── track() ──────────────────┘
//! ```
//!
//! - *Tracking*: no change is taken; QEMU notes what it could not mirror. What was kept stays.
//! - *Copying*: changes go out as epoch 0, and are forgotten when they are sent. If the connection is
//!   lost the copy has to begin anew.
//! - *Keeping*: all that the standby may not have is kept, up to a bound; beyond it whoever brings a
//!   change waits.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use remus_proto::disk::{Change, Record};
use remus_proto::frame::{HEADER_SIZE, PAYLOAD_MAX};

use super::copy::{self, Known};
use crate::peer::stream::lock;
use crate::report::live::DiskLevel;

/// Who sends is woken for so many bytes, or for a seal; what is less goes out when it next looks by itself. So
/// a small change costs no frame of its own, and a seal has little left to send.
const BATCH: u64 = 128 << 10;

/// The changes of a guest's disks.
pub struct Queue {
    inner: Mutex<Inner>,
    /// There is something to send.
    news: Condvar,
    /// There may be room again.
    room: Condvar,
    bound: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Tracking,
    Copying,
    Keeping,
}

/// The end of an epoch.
#[derive(Clone, Copy)]
struct Mark {
    epoch: u64,
    /// Bytes of records before it, since the beginning of time.
    at: u64,
}

/// Whole records, at most as many as fit into a frame.
struct Block {
    start: u64,
    bytes: Vec<u8>,
}

impl Block {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

struct Inner {
    state: State,
    blocks: VecDeque<Block>,
    /// All before is forgotten.
    start: u64,
    end: u64,
    marks: VecDeque<Mark>,
    /// Where the last copy ended: what is before goes out as epoch 0.
    whole: Option<Mark>,
    /// The newest epoch that was sealed.
    sealed: u64,
    /// The newest epoch whose mark went to the standby.
    sent: u64,
    /// How far the sender is.
    taken: u64,
    /// The newest epoch that the standby has in its images.
    applied: u64,
    /// Which cursor may go on.
    round: u64,
    known: Vec<Known>,
    /// How many of [`Through`] there are.
    through: usize,
    waiting: usize,
    /// There is no standby just now.
    alone: bool,
}

/// How far the sender is. Of no use any more after a later one was made.
#[derive(Debug)]
pub struct Cursor {
    round: u64,
    at: u64,
    /// The newest epoch whose mark was sent, or need not be.
    sealed: u64,
}

/// What is to be sent next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Changes of this epoch; 0 in a copy.
    Changes(u64),
    /// The mark of this epoch.
    Seal(u64),
    /// Nothing yet.
    Nothing,
    /// Nothing ever, with this cursor.
    Over,
}

/// A change is not taken: QEMU is to note what it was about.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("there is no standby that takes changes of disks")
    }
}

impl std::error::Error for Refused {}

impl Queue {
    /// An empty one, tracking, that holds `bound` bytes.
    pub fn new(bound: u64) -> Self {
        Self {
            inner: Mutex::new(Inner {
                state: State::Tracking,
                blocks: VecDeque::new(),
                start: 0,
                end: 0,
                marks: VecDeque::new(),
                whole: None,
                sealed: 0,
                sent: 0,
                taken: 0,
                applied: 0,
                round: 0,
                known: Vec::new(),
                through: 0,
                waiting: 0,
                alone: false,
            }),
            news: Condvar::new(),
            room: Condvar::new(),
            bound,
        }
    }

    /// Begins a copy of whole disks, forgetting all else. `known`: what the standby's images have, in
    /// the order of the disks, or nothing.
    pub fn copy(&self, known: Vec<Known>) -> Cursor {
        let mut inner = lock(&self.inner);
        inner.clear();
        inner.state = State::Copying;
        inner.known = known;
        let at = inner.start;
        self.cursor(&mut inner, at)
    }

    /// Begins a copy of what was missed while tracking, after what is still held, for a standby whose
    /// images are whole and of epoch `after`. Nothing if that does not suffice: [`Self::copy`] does.
    pub fn copy_on(&self, after: u64) -> Option<Cursor> {
        let mut inner = lock(&self.inner);
        let at = inner.position(after)?;
        inner.marks.clear();
        inner.whole = None;
        inner.state = State::Copying;
        inner.forget(at);
        Some(self.cursor(&mut inner, at))
    }

    /// Goes on over a new connection, to a standby whose images are whole and of epoch `after`. Nothing if
    /// what it lacks is not here.
    pub fn resume(&self, after: u64) -> Option<Cursor> {
        let mut inner = lock(&self.inner);
        if inner.state != State::Keeping {
            return None;
        }
        let at = inner.position(after)?;
        let mut cursor = self.cursor(&mut inner, at);
        (cursor.sealed, inner.sent) = (after, after);
        Some(cursor)
    }

    /// Takes no more changes, until a copy begins. Those that wait are refused.
    pub fn track(&self) {
        self.stop_taking(&mut lock(&self.inner));
    }

    fn stop_taking(&self, inner: &mut Inner) {
        if inner.whole.is_none() {
            inner.clear();
        }
        inner.state = State::Tracking;
        inner.known = Vec::new();
        // Whoever sends is to end.
        inner.round += 1;
        self.room.notify_all();
        self.news.notify_all();
    }

    /// Appends a change. Waits while it is full. A write may be longer than a record on the wire can be.
    pub fn push(&self, record: Record<'_>) -> Result<(), Refused> {
        let Record { disk, offset, .. } = record;
        let at = usize::from(disk);
        let Change::Write(data) = record.change else {
            let mut inner = lock(&self.inner);
            if let Some(known) = inner.known.get_mut(at) {
                known.forget(offset, record.change.length());
            }
            return self.append(inner, &record);
        };
        let size = lock(&self.inner).known.get(at).map(Known::size);
        let pieces = copy::pieces(offset, data, size);
        let records = copy::records(disk, data, &pieces, lock(&self.inner).known.get_mut(at));
        for record in records {
            self.append(lock(&self.inner), &record)?;
        }
        Ok(())
    }

    fn append(&self, mut inner: MutexGuard<'_, Inner>, record: &Record<'_>) -> Result<(), Refused> {
        let length = record.encoded_len() as u64;
        inner.waiting += 1;
        while inner.state != State::Tracking
            && inner.through == 0
            && inner.held() > 0
            && inner.held() + length > self.bound
        {
            if inner.alone {
                self.stop_taking(&mut inner);
                break;
            }
            self.news.notify_one();
            inner = self
                .room
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        inner.waiting -= 1;
        if inner.state == State::Tracking {
            return Err(Refused);
        }
        inner.append(record);
        if inner.end.saturating_sub(inner.taken) >= BATCH {
            self.news.notify_one();
        }
        Ok(())
    }

    /// Whether the epoch that is open should end because of how much is held.
    pub fn is_half_full(&self) -> bool {
        let inner = lock(&self.inner);
        inner.state == State::Keeping && inner.held() > self.bound / 2
    }

    /// The standby is lost. What is held stays for when it is back, but from when it is full on changes are
    /// not taken any more.
    pub fn lost(&self) {
        let mut inner = lock(&self.inner);
        inner.alone = true;
        if inner.waiting > 0 {
            self.stop_taking(&mut inner);
        }
    }

    /// While this is held no change waits. The guest has to be paused within: its pause ends only
    /// when all that is under way was taken, full or not.
    pub fn let_through(&self) -> Through<'_> {
        lock(&self.inner).through += 1;
        self.room.notify_all();
        Through(self)
    }

    /// Marks the end of `epoch`. To be called while the guest stands still. Ends a copy, which must be
    /// complete. Nothing happens while tracking.
    pub fn seal(&self, epoch: u64) {
        let mut inner = lock(&self.inner);
        let mark = Mark {
            epoch,
            at: inner.end,
        };
        match inner.state {
            State::Tracking => return,
            State::Copying => {
                inner.whole = Some(mark);
                inner.known = Vec::new();
                inner.state = State::Keeping;
            }
            State::Keeping => {}
        }
        inner.marks.push_back(mark);
        inner.sealed = epoch;
        self.news.notify_one();
    }

    /// The epochs after `after` were taken back: what they had belongs to the one that is open.
    pub fn unseal(&self, after: u64) {
        let mut inner = lock(&self.inner);
        while inner.marks.back().is_some_and(|mark| mark.epoch > after) {
            inner.marks.pop_back();
        }
    }

    /// The standby has all up to `epoch` in its images: forgets it. Whether that can be: it had to be sent.
    #[must_use]
    pub fn applied(&self, epoch: u64) -> bool {
        let mut inner = lock(&self.inner);
        if epoch > inner.sent {
            return false;
        }
        inner.applied = inner.applied.max(epoch);
        while let Some(mark) = inner.marks.front().copied() {
            if mark.epoch > epoch {
                break;
            }
            inner.marks.pop_front();
            inner.forget(mark.at);
        }
        self.room.notify_all();
        true
    }

    /// What is to be sent next; waits for `patience` if there is nothing. Of changes, `frame` gets
    /// [`HEADER_SIZE`] bytes for the header, and the payload; of a seal, only those.
    pub fn next(&self, cursor: &mut Cursor, frame: &mut Vec<u8>, patience: Duration) -> Next {
        let deadline = Instant::now() + patience;
        frame.clear();
        frame.resize(HEADER_SIZE, 0);
        let mut inner = lock(&self.inner);
        loop {
            let next = inner.next(cursor, frame);
            if next != Next::Nothing {
                inner.taken = cursor.at;
                match next {
                    Next::Changes(0) => {
                        inner.forget(cursor.at);
                        self.room.notify_all();
                    }
                    Next::Seal(epoch) => inner.sent = epoch,
                    _ => {}
                }
                return next;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Next::Nothing;
            }
            inner = self
                .news
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// How full it is.
    pub fn level(&self) -> DiskLevel {
        let inner = lock(&self.inner);
        DiskLevel {
            held: inner.held(),
            bound: self.bound,
            waiting: inner.waiting,
        }
    }

    fn cursor(&self, inner: &mut Inner, at: u64) -> Cursor {
        inner.round += 1;
        inner.taken = at;
        inner.alone = false;
        // Whoever sends with an older one is to end.
        self.news.notify_all();
        self.room.notify_all();
        Cursor {
            round: inner.round,
            at,
            sealed: inner.sealed,
        }
    }
}

/// See [`Queue::let_through`].
pub struct Through<'a>(&'a Queue);

impl Drop for Through<'_> {
    fn drop(&mut self) {
        lock(&self.0.inner).through -= 1;
    }
}

impl Inner {
    fn held(&self) -> u64 {
        self.end - self.start
    }

    fn clear(&mut self) {
        self.marks.clear();
        self.whole = None;
        self.forget(self.end);
    }

    fn forget(&mut self, to: u64) {
        self.start = self.start.max(to);
        while self
            .blocks
            .front()
            .is_some_and(|block| block.end() <= self.start)
        {
            self.blocks.pop_front();
        }
    }

    /// From where on a standby at epoch `after` needs what is here; nothing if it needs more. Changes
    /// that it has already may be among it (of an epoch that was taken back): made again in order
    /// they do no harm.
    fn position(&self, after: u64) -> Option<u64> {
        let whole = self
            .whole
            .filter(|whole| whole.epoch.max(self.applied) <= after)?;
        let mark = self.marks.iter().rev().find(|mark| mark.epoch <= after);
        Some(mark.unwrap_or(&whole).at.max(self.start))
    }

    fn append(&mut self, record: &Record<'_>) {
        let length = record.encoded_len();
        let fits = |block: &&mut Block| block.bytes.len() + length <= PAYLOAD_MAX;
        match self.blocks.back_mut().filter(fits) {
            Some(block) => record.encode(&mut block.bytes),
            None => {
                let mut bytes = Vec::with_capacity(length);
                record.encode(&mut bytes);
                self.blocks.push_back(Block {
                    start: self.end,
                    bytes,
                });
            }
        }
        self.end += length as u64;
    }

    fn next(&self, cursor: &mut Cursor, frame: &mut Vec<u8>) -> Next {
        if cursor.round != self.round {
            return Next::Over;
        }
        let mark = self.marks.iter().find(|mark| mark.epoch > cursor.sealed);
        if let Some(mark) = mark.filter(|mark| mark.at <= cursor.at) {
            cursor.sealed = mark.epoch;
            return Next::Seal(mark.epoch);
        }
        let whole = match self.state {
            State::Keeping => self.whole.map_or(0, |whole| whole.at),
            _ => u64::MAX,
        };
        let (epoch, limit) = match mark {
            _ if cursor.at < whole => (0, whole),
            Some(mark) => (mark.epoch, mark.at),
            None => (self.sealed + 1, u64::MAX),
        };
        let at = self
            .blocks
            .partition_point(|block| block.end() <= cursor.at);
        let Some(block) = self.blocks.get(at) else {
            return Next::Nothing;
        };
        let from = cursor.at.saturating_sub(block.start) as usize;
        let to = block.end().min(limit).saturating_sub(block.start) as usize;
        let bytes = block.bytes.get(from..to).unwrap_or_default();
        frame.extend_from_slice(bytes);
        cursor.at += bytes.len() as u64;
        Next::Changes(epoch)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 64;
    const AT_ONCE: Duration = Duration::ZERO;

    fn write(offset: u64, data: &[u8]) -> Record<'_> {
        Record {
            disk: 0,
            offset,
            change: Change::Write(data),
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(usize, u8),
        Discard(usize, u32),
        Seal,
        /// So many frames arrive.
        Deliver(usize),
        /// The standby applies so many epochs that it has, and says so.
        Apply(usize),
        /// The connection is lost and another made: what the standby keeps of the epochs that it has
        /// beyond those applied, and how many of them the primary takes back all the same.
        Lose(usize, usize),
        /// It is lost for longer: so many changes are not taken.
        Miss(Vec<(usize, u8)>, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let change = || (0..SIZE - 4, 1..=255u8);
        prop_oneof![
            6 => change().prop_map(|(at, byte)| Step::Write(at, byte)),
            1 => (0..SIZE, 1..9u32).prop_map(|(at, n)| Step::Discard(at, n)),
            4 => Just(Step::Seal),
            4 => (1..5usize).prop_map(Step::Deliver),
            3 => (1..3usize).prop_map(Step::Apply),
            1 => (0..4usize, 0..3usize).prop_map(|(a, b)| Step::Lose(a, b)),
            1 => (prop::collection::vec(change(), 0..4), 0..4usize)
                .prop_map(|(missed, keep)| Step::Miss(missed, keep)),
        ]
    }

    /// A guest with a mirror, and a standby that follows the protocol.
    struct Model {
        queue: Queue,
        cursor: Cursor,
        disk: Vec<u8>,
        /// What the disk was at each seal.
        snapshots: Vec<(u64, Vec<u8>)>,
        sealed: u64,
        /// The epoch that ended the last copy, once there is one.
        base: u64,
        image: Vec<u8>,
        /// The epoch of the image; 0 if it is not whole.
        whole: u64,
        open: Vec<Vec<u8>>,
        held: Vec<(u64, Vec<Vec<u8>>)>,
    }

    fn apply(image: &mut [u8], payload: &[u8]) {
        let mut payload = payload;
        while !payload.is_empty() {
            let record = Record::decode(&mut payload).unwrap();
            let at = record.offset as usize;
            let to = &mut image[at..at + record.change.length() as usize];
            match record.change {
                Change::Write(data) => to.copy_from_slice(data),
                _ => to.fill(0),
            }
        }
    }

    impl Model {
        fn new() -> Self {
            let queue = Queue::new(u64::MAX);
            let cursor = queue.copy(Vec::new());
            let mut model = Self {
                queue,
                cursor,
                disk: vec![1; SIZE],
                snapshots: Vec::new(),
                sealed: 0,
                base: u64::MAX,
                image: vec![9; SIZE],
                whole: 0,
                open: Vec::new(),
                held: Vec::new(),
            };
            model.mirror();
            model
        }

        /// What a mirror job does from its start until it is ready.
        fn mirror(&mut self) {
            for (i, part) in self.disk.chunks(16).enumerate() {
                self.queue.push(write(i as u64 * 16, part)).unwrap();
            }
        }

        fn deliver(&mut self) -> bool {
            let mut frame = Vec::new();
            match self.queue.next(&mut self.cursor, &mut frame, AT_ONCE) {
                Next::Nothing => return false,
                Next::Over => panic!("the newest cursor is over"),
                Next::Changes(0) => {
                    assert!(self.held.is_empty() && self.open.is_empty());
                    self.whole = 0;
                    apply(&mut self.image, &frame[HEADER_SIZE..]);
                }
                Next::Changes(epoch) => {
                    let last = self.held.last().map_or(self.whole, |held| held.0);
                    assert!(epoch > last, "{epoch} after {last}");
                    self.open.push(frame[HEADER_SIZE..].to_vec());
                }
                Next::Seal(epoch) => {
                    self.held.push((epoch, std::mem::take(&mut self.open)));
                    if self.whole == 0 {
                        self.apply();
                    }
                }
            }
            true
        }

        fn apply(&mut self) -> bool {
            if self.held.is_empty() {
                return false;
            }
            let (epoch, changes) = self.held.remove(0);
            for payload in changes {
                apply(&mut self.image, &payload);
            }
            self.whole = epoch;
            let (_, want) = self.snapshots.iter().find(|s| s.0 == epoch).unwrap();
            assert_eq!(want, &self.image, "epoch {epoch}");
            true
        }

        /// The connection ends; the standby keeps and applies `keep` of the epochs that it holds.
        fn lose(&mut self, keep: usize) {
            self.open.clear();
            self.held.truncate(keep);
            while self.apply() {}
        }

        fn run(&mut self, step: &Step) {
            match step {
                Step::Write(at, byte) => {
                    self.disk[*at..*at + 4].fill(*byte);
                    self.queue.push(write(*at as u64, &[*byte; 4])).unwrap();
                }
                Step::Discard(at, length) => {
                    let length = (*length).min((SIZE - at) as u32);
                    self.disk[*at..*at + length as usize].fill(0);
                    let change = Change::Discard(length);
                    let (disk, offset) = (0, *at as u64);
                    let record = Record {
                        disk,
                        offset,
                        change,
                    };
                    self.queue.push(record).unwrap();
                }
                Step::Seal => {
                    self.sealed += 1;
                    self.base = self.base.min(self.sealed);
                    self.snapshots.push((self.sealed, self.disk.clone()));
                    self.queue.seal(self.sealed);
                }
                Step::Deliver(frames) => {
                    for _ in 0..*frames {
                        self.deliver();
                    }
                }
                Step::Apply(epochs) => {
                    for _ in 0..*epochs {
                        self.apply();
                    }
                    assert!(self.queue.applied(self.whole));
                }
                Step::Lose(keep, back) => {
                    self.lose(*keep);
                    // At least what it has not got, perhaps what it has but did not say.
                    self.queue.unseal(self.whole.saturating_sub(*back as u64));
                    self.cursor = match self.queue.resume(self.whole) {
                        Some(cursor) => cursor,
                        None => {
                            // Never without need.
                            assert!(self.whole < self.base, "{} {}", self.whole, self.base);
                            self.base = u64::MAX;
                            let cursor = self.queue.copy(Vec::new());
                            self.mirror();
                            cursor
                        }
                    };
                }
                Step::Miss(missed, keep) => {
                    self.lose(*keep);
                    self.queue.unseal(self.whole);
                    self.queue.track();
                    for (at, byte) in missed {
                        self.disk[*at..*at + 4].fill(*byte);
                        let refused = self.queue.push(write(*at as u64, &[*byte; 4]));
                        assert_eq!(refused, Err(Refused));
                    }
                    self.queue.seal(self.sealed + 1);
                    let base = std::mem::replace(&mut self.base, u64::MAX);
                    match self.queue.copy_on(self.whole) {
                        Some(cursor) => {
                            self.cursor = cursor;
                            for (at, _) in missed {
                                let now = &self.disk[*at..*at + 4];
                                self.queue.push(write(*at as u64, now)).unwrap();
                            }
                        }
                        None => {
                            assert!(self.whole < base, "{} {base}", self.whole);
                            self.cursor = self.queue.copy(Vec::new());
                            self.mirror();
                        }
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

        /// Whatever happens, each epoch that the standby has is what the disk was at its seal.
        #[test]
        fn epochs_arrive_whole(steps in prop::collection::vec(step(), 1..60)) {
            let mut model = Model::new();
            for step in &steps {
                model.run(step);
            }
            model.run(&Step::Seal);
            while model.deliver() {}
            while model.apply() {}
            prop_assert_eq!(model.whole, model.sealed);
            prop_assert_eq!(&model.image, &model.disk);
            prop_assert!(model.queue.applied(model.whole));
            prop_assert_eq!(model.queue.level().held, 0);
        }
    }

    /// Sends all that there is.
    fn send(queue: &Queue, cursor: &mut Cursor) {
        while queue.next(cursor, &mut Vec::new(), AT_ONCE) != Next::Nothing {}
    }

    #[test]
    fn an_old_cursor_is_over() {
        let queue = Queue::new(1000);
        let mut old = queue.copy(Vec::new());
        queue.seal(1);
        let mut new = queue.resume(1).unwrap();
        let mut frame = Vec::new();
        assert_eq!(queue.next(&mut old, &mut frame, AT_ONCE), Next::Over);
        assert_eq!(queue.next(&mut new, &mut frame, AT_ONCE), Next::Nothing);
        queue.track();
        assert_eq!(queue.next(&mut new, &mut frame, AT_ONCE), Next::Over);
        assert!(queue.resume(1).is_none());
    }

    #[test]
    fn an_image_that_is_too_old() {
        let queue = Queue::new(1000);
        let mut cursor = queue.copy(Vec::new());
        for epoch in 1..4 {
            queue.seal(epoch);
            queue.push(write(0, &[1; 84])).unwrap();
        }
        // What was not sent cannot be there, and is not forgotten.
        assert!(!queue.applied(1));
        assert_eq!(queue.level().held, 300);
        send(&queue, &mut cursor);
        assert!(queue.applied(2));
        assert!(!queue.applied(4));
        assert!(queue.resume(1).is_none());
        assert!(queue.resume(2).is_some());
    }

    #[test]
    fn a_full_one_makes_changes_wait() {
        let queue = Queue::new(300);
        let mut cursor = queue.copy(Vec::new());
        queue.seal(1);
        let until_waiting = |waiting| {
            while queue.level().waiting != waiting {
                thread::yield_now();
            }
        };
        thread::scope(|scope| {
            let push = || scope.spawn(|| queue.push(write(0, &[1; 84])));
            assert!(!queue.is_half_full());
            for _ in 0..3 {
                assert_eq!(push().join().unwrap(), Ok(()));
            }
            assert!(queue.is_half_full());
            assert_eq!(queue.level().held, 300);
            // Room is made by what was applied.
            let waits = push();
            until_waiting(1);
            queue.seal(2);
            send(&queue, &mut cursor);
            assert!(queue.applied(2));
            assert_eq!(waits.join().unwrap(), Ok(()));
            assert_eq!(queue.level().held, 100);
            // In a pause nothing waits.
            for _ in 0..2 {
                assert_eq!(push().join().unwrap(), Ok(()));
            }
            let waits = push();
            until_waiting(1);
            let through = queue.let_through();
            assert_eq!(waits.join().unwrap(), Ok(()));
            assert_eq!(push().join().unwrap(), Ok(()));
            drop(through);
            assert_eq!(queue.level().held, 500);
            // Without a standby it is refused.
            let waits = push();
            until_waiting(1);
            queue.lost();
            assert_eq!(waits.join().unwrap(), Err(Refused));
            // In a copy it waits for the sender.
            cursor = queue.copy(Vec::new());
            for _ in 0..3 {
                assert_eq!(push().join().unwrap(), Ok(()));
            }
            let waits = push();
            until_waiting(1);
            let next = queue.next(&mut cursor, &mut Vec::new(), AT_ONCE);
            assert_eq!(next, Next::Changes(0));
            assert_eq!(waits.join().unwrap(), Ok(()));
        });
        // One that is larger than all of it goes when there is nothing else.
        let mut frame = Vec::new();
        while queue.next(&mut cursor, &mut frame, AT_ONCE) != Next::Nothing {}
        assert_eq!(queue.push(write(0, &[1; 1000])), Ok(()));
    }
}
