// SPDX-License-Identifier: GPL-2.0-or-later

//! What a port holds, by epoch: counts, not packets.
//!
//! A seal and a commit say how many packets they are about without looking at one. Each packet is
//! counted for the open epoch as it comes; a seal writes the open count down; a commit strikes out
//! what is written down up to its epoch; an abort adds it to the open count again. The cost is that of
//! the epochs concerned, never of the packets.
//!
//! Only epochs with packets are written down, so there are never more records than packets held. The
//! caller lends the room for them, and more of it while nothing is lost ([`Ledger::wants_room`]),
//! because a packet may come where nothing can be allocated.

use core::ops::DerefMut;

/// Packets, and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Packets.
    pub packets: u64,
    /// Bytes of these packets.
    pub bytes: u64,
}

impl Sum {
    /// Sums over what is in memory do not overflow: not checked, as it is for each packet.
    fn add(&mut self, other: Self) {
        self.packets = self.packets.wrapping_add(other.packets);
        self.bytes = self.bytes.wrapping_add(other.bytes);
    }

    fn sub(&mut self, other: Self) {
        self.packets -= other.packets;
        self.bytes -= other.bytes;
    }
}

/// What is held for one epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The epoch.
    pub epoch: u64,
    /// What is held for it.
    pub sum: Sum,
    /// When the first packet came, in nanoseconds of the caller's clock.
    pub since: u64,
}

/// The ledger of a port.
///
/// # Invariants
///
/// - The `len` records from `head` on, around the end of `room`, have ascending epochs below
///   `open.epoch`, and each has a packet.
/// - `head` is below the length of `room`, or 0; `len` is at most that length.
/// - `sealed` is the sum over them.
pub struct Ledger<S> {
    room: S,
    head: usize,
    len: usize,
    open: Record,
    sealed: Sum,
}

impl<S: DerefMut<Target = [Record]>> Ledger<S> {
    /// An empty ledger; `room` is for its first records.
    pub fn new(room: S, open_epoch: u64) -> Self {
        Self {
            room,
            head: 0,
            len: 0,
            open: Record {
                epoch: open_epoch,
                ..Record::default()
            },
            sealed: Sum::default(),
        }
    }

    /// All that is held and not committed.
    pub fn held(&self) -> Sum {
        let mut held = self.sealed;
        held.add(self.open.sum);
        held
    }

    /// How much room to lend before the next seal, if there may be too little: that seal, and a packet
    /// of the epoch after it that is faster than the seal of that, take a record each.
    pub fn wants_room(&self) -> Option<usize> {
        let now = self.room.len();
        (now < self.len + 2).then_some((now * 2).max(8))
    }

    /// Moves into other room. Returns the room that is not used any more: the old one, or `room` if
    /// that is not larger.
    pub fn lend(&mut self, mut room: S) -> S {
        if room.len() <= self.room.len() {
            return room;
        }
        for i in 0..self.len {
            if let (Some(from), Some(to)) = (self.at(i), room.get_mut(i)) {
                *to = from;
            }
        }
        self.head = 0;
        core::mem::replace(&mut self.room, room)
    }

    /// Counts a packet for `epoch`, which is not before the open one. True if it is the first one of
    /// that epoch.
    pub fn hold(&mut self, epoch: u64, bytes: u64, now: impl FnOnce() -> u64) -> bool {
        if epoch > self.open.epoch {
            self.turn(epoch);
        }
        let first = self.open.sum.packets == 0;
        if first {
            self.open.since = now();
        }
        self.open.sum.add(Sum { packets: 1, bytes });
        first
    }

    /// Counts a packet as [`hold`](Self::hold) does, if it is not the first one of its epoch. False if it is: it is not
    /// counted then.
    #[inline]
    pub fn hold_another(&mut self, epoch: u64, bytes: u64) -> bool {
        let another = epoch == self.open.epoch && self.open.sum.packets > 0;
        if another {
            self.open.sum.add(Sum { packets: 1, bytes });
        }
        another
    }

    /// `epoch` is sealed. Returns what is held for it.
    pub fn seal(&mut self, epoch: u64) -> Sum {
        if self.open.epoch <= epoch {
            let sum = self.open.sum;
            self.open.epoch = epoch;
            self.turn(epoch + 1);
            return sum;
        }
        // A packet of the next epoch was faster.
        match self.len.checked_sub(1).and_then(|last| self.at(last)) {
            Some(record) if record.epoch == epoch => record.sum,
            _ => Sum::default(),
        }
    }

    /// `epoch` and all before it are committed. Returns what was held for them, and since when.
    pub fn commit(&mut self, epoch: u64) -> (Sum, Option<u64>) {
        let (mut sum, mut since) = (Sum::default(), None);
        while let Some(record) = self.at(0).filter(|r| r.epoch <= epoch) {
            sum.add(record.sum);
            since = since.or(Some(record.since));
            self.head = self.place(1);
            self.len -= 1;
        }
        self.sealed.sub(sum);
        (sum, since)
    }

    /// All epochs sealed after `newest` are part of the open one from now on. Returns what was held
    /// for them.
    pub fn abort(&mut self, newest: u64) -> Sum {
        let mut sum = Sum::default();
        while let Some(record) = self.len.checked_sub(1).and_then(|last| self.at(last)) {
            if record.epoch <= newest {
                break;
            }
            sum.add(record.sum);
            self.open.since = record.since;
            self.len -= 1;
        }
        self.sealed.sub(sum);
        self.open.sum.add(sum);
        sum
    }

    /// All that was held is gone. Returns what that was.
    pub fn discard(&mut self) -> Sum {
        let held = self.held();
        self.len = 0;
        self.open.sum = Sum::default();
        self.sealed = Sum::default();
        held
    }

    /// Writes the open count down, and opens `epoch`.
    fn turn(&mut self, epoch: u64) {
        let (record, at) = (self.open, self.len);
        if record.sum.packets > 0 {
            self.sealed.add(record.sum);
            if at < self.room.len() {
                let place = self.place(at);
                if let Some(to) = self.room.get_mut(place) {
                    *to = record;
                    self.len += 1;
                }
            } else if let Some(last) = self.slot(at.wrapping_sub(1)) {
                // Without room (see `wants_room`) two epochs count as the later one.
                last.epoch = record.epoch;
                last.sum.add(record.sum);
            }
        }
        self.open = Record {
            epoch,
            ..Record::default()
        };
    }

    /// Where the record is, or will be, that is so many after the first; at most as many as there is room for.
    fn place(&self, index: usize) -> usize {
        let (place, size) = (self.head + index, self.room.len());
        if place < size {
            place
        } else {
            place - size
        }
    }

    fn slot(&mut self, index: usize) -> Option<&mut Record> {
        if index >= self.len {
            return None;
        }
        let place = self.place(index);
        self.room.get_mut(place)
    }

    fn at(&self, index: usize) -> Option<Record> {
        if index >= self.len {
            return None;
        }
        self.room.get(self.place(index)).copied()
    }
}
