// SPDX-License-Identifier: GPL-2.0-or-later

//! What of a write has to be sent: nothing where the standby has it already, as its sums say, and no
//! bytes where they are zero.

use remus_proto::disk::{Change, Record, Sum, CHUNK, DATA_MAX};

use crate::peer::sum::sum;

/// Most bytes in a record: whole chunks.
const RUN_MAX: usize = DATA_MAX / CHUNK * CHUNK;
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// What the standby's image of a disk has.
pub struct Known {
    size: u64,
    /// Nothing for a chunk that was changed since, or of which nothing was said.
    sums: Vec<Option<Sum>>,
}

impl Known {
    /// Nothing yet, of a disk with `size` bytes.
    pub fn new(size: u64) -> Self {
        let chunks = size.div_ceil(CHUNK as u64) as usize;
        Self {
            size,
            sums: vec![None; chunks],
        }
    }

    /// Takes in the sums of chunk `first` and those that follow. What is past the end is ignored.
    pub fn learn(&mut self, first: u64, sums: &[Sum]) {
        let from = usize::try_from(first).unwrap_or(usize::MAX);
        let known = self.sums.get_mut(from..).unwrap_or_default();
        for (known, sum) in known.iter_mut().zip(sums) {
            *known = Some(*sum);
        }
    }

    /// Whether something is known of every chunk.
    #[cfg(test)]
    pub fn complete(&self) -> bool {
        self.sums.iter().all(Option::is_some)
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the chunk that `piece` writes is there already. If not, it is forgotten.
    fn has(&mut self, piece: &Piece<'_>) -> bool {
        let chunk = (piece.offset / CHUNK as u64) as usize;
        let Some(known) = self.sums.get_mut(chunk) else {
            return false;
        };
        if known.is_some() && *known == piece.sum {
            return true;
        }
        *known = None;
        false
    }

    /// Forgets all chunks that a range touches.
    pub fn forget(&mut self, offset: u64, length: u32) {
        let chunk = |at: u64| (at / CHUNK as u64) as usize;
        let end = offset.saturating_add(length.into()).min(self.size);
        if offset < end {
            let range = chunk(offset)..=chunk(end - 1);
            self.sums.get_mut(range).unwrap_or_default().fill(None);
        }
    }
}

/// The part of a write that is in one chunk.
pub struct Piece<'a> {
    offset: u64,
    data: &'a [u8],
    zero: bool,
    /// If it is all of the chunk, and sums were asked for.
    sum: Option<Sum>,
}

/// Takes a write apart. `size` of the disk if sums are of use.
pub fn pieces(offset: u64, data: &[u8], size: Option<u64>) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let (mut offset, mut rest) = (offset, data);
    while !rest.is_empty() {
        let into = (offset % CHUNK as u64) as usize;
        let (data, after) = rest.split_at(rest.len().min(CHUNK - into));
        let end = offset + data.len() as u64;
        let whole = into == 0 && (data.len() == CHUNK || Some(end) == size);
        pieces.push(Piece {
            offset,
            data,
            zero: ZEROS.starts_with(data),
            sum: (whole && size.is_some()).then(|| sum(data)),
        });
        (offset, rest) = (end, after);
    }
    pieces
}

/// The records for those pieces of a write of `data` that the standby does not have, as few as can be.
pub fn records<'a>(
    disk: u16,
    data: &'a [u8],
    pieces: &[Piece<'a>],
    mut known: Option<&mut Known>,
) -> Vec<Record<'a>> {
    let mut records = Vec::new();
    // Of the run that grows: where it is on the disk, where in the data, its length.
    let mut run: Option<(u64, usize, usize, bool)> = None;
    let mut at = 0;
    let mut end = |run: Option<(u64, usize, usize, bool)>| {
        let Some((offset, at, length, zero)) = run else {
            return;
        };
        let change = match data.get(at..at + length) {
            Some(_) if zero => Change::Zero(length as u32),
            Some(bytes) => Change::Write(bytes),
            None => return,
        };
        records.push(Record {
            disk,
            offset,
            change,
        });
    };
    for piece in pieces {
        let length = piece.data.len();
        let has = known.as_deref_mut().is_some_and(|known| known.has(piece));
        run = match run {
            run if has => {
                end(run);
                None
            }
            Some((offset, from, so_far, zero))
                if zero == piece.zero && (zero || so_far + length <= RUN_MAX) =>
            {
                Some((offset, from, so_far + length, zero))
            }
            run => {
                end(run);
                Some((piece.offset, at, length, piece.zero))
            }
        };
        at += length;
    }
    end(run);
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: u16 = 3;

    fn plan(offset: u64, data: &[u8], known: Option<&mut Known>) -> Vec<(u64, u32, char)> {
        let size = known.as_ref().map(|k| k.size());
        records(DISK, data, &pieces(offset, data, size), known)
            .iter()
            .map(|record| {
                assert_eq!(record.disk, DISK);
                let kind = match record.change {
                    Change::Write(bytes) => {
                        let at = (record.offset - offset) as usize;
                        assert_eq!(bytes, &data[at..at + bytes.len()]);
                        assert!(bytes.len() <= DATA_MAX);
                        'w'
                    }
                    Change::Zero(_) => 'z',
                    Change::Discard(_) => 'd',
                };
                (record.offset, record.change.length(), kind)
            })
            .collect()
    }

    #[test]
    fn writes_are_taken_apart() {
        const C: u32 = CHUNK as u32;
        assert_eq!(plan(512, &[1; 512], None), [(512, 512, 'w')]);
        assert_eq!(plan(512, &[0; 512], None), [(512, 512, 'z')]);
        assert_eq!(plan(0, &[], None), []);
        // Zeros among other bytes, a chunk of them.
        let mut data = vec![1; 4 * CHUNK];
        data[CHUNK..2 * CHUNK].fill(0);
        let c = u64::from(C);
        assert_eq!(
            plan(c, &data, None),
            [(c, C, 'w'), (2 * c, C, 'z'), (3 * c, 2 * C, 'w')]
        );
        // More than a frame takes.
        assert_eq!(
            plan(0, &vec![7; 16 * CHUNK], None),
            [(0, 15 * C, 'w'), (15 * c, C, 'w')]
        );
        assert_eq!(
            plan(c / 2, &vec![0; 40 * CHUNK], None),
            [(c / 2, 40 * C, 'z')]
        );
    }

    #[test]
    fn what_the_standby_has_is_left_out() {
        const C: u32 = CHUNK as u32;
        let c = u64::from(C);
        // Three chunks and a half.
        let size = 3 * c + c / 2;
        let data: Vec<u8> = (0..size).map(|i| (i / 1000) as u8).collect();
        let sums: Vec<Sum> = data.chunks(CHUNK).map(sum).collect();
        let all = || {
            let mut known = Known::new(size);
            assert!(!known.complete());
            known.learn(1, &sums[1..]);
            assert!(!known.complete());
            known.learn(0, &sums);
            assert!(known.complete());
            known.learn(4, &sums);
            known.learn(u64::MAX, &sums);
            known
        };
        assert_eq!(plan(0, &data, Some(&mut all())), []);
        // One differs, and only it goes; then it is not taken for known any more.
        let mut known = all();
        let mut other = data.clone();
        other[CHUNK + 5] ^= 1;
        assert_eq!(plan(0, &other, Some(&mut known)), [(c, C, 'w')]);
        assert_eq!(plan(0, &data, Some(&mut known)), [(c, C, 'w')]);
        // A part of a chunk goes, and so does all of it afterwards, even with what it had.
        let mut known = all();
        let part = &data[CHUNK..CHUNK + 512];
        assert_eq!(plan(c, part, Some(&mut known)), [(c, 512, 'w')]);
        assert_eq!(plan(0, &data, Some(&mut known)), [(c, C, 'w')]);
        // The short one at the end.
        let mut known = all();
        assert_eq!(plan(3 * c, &data[3 * CHUNK..], Some(&mut known)), []);
        known.forget(size - 1, 100);
        let last = (3 * c, C / 2, 'w');
        assert_eq!(plan(3 * c, &data[3 * CHUNK..], Some(&mut known)), [last]);
        // Forgotten ranges, also past the end.
        let mut known = all();
        known.forget(c - 1, 2);
        known.forget(size, 5);
        known.forget(u64::MAX - 3, 5);
        assert_eq!(plan(0, &data, Some(&mut known)), [(0, 2 * C, 'w')]);
    }
}
