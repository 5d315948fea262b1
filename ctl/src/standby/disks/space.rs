// SPDX-License-Identifier: GPL-2.0-or-later

//! Space that was promised to sealed epochs: once one is acknowledged, writing it must not fail for
//! want of it, so no discard that is applied meanwhile may give it back.

use std::collections::VecDeque;
use std::ops::Range;

use anyhow::{Context, Result};

use super::image::Image;

/// File systems give space out in multiples of this, or of more.
const BLOCK: u64 = 4096;

/// A range of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) disk: usize,
    pub(super) range: Range<u64>,
}

/// What each sealed epoch writes, the oldest first.
#[derive(Default)]
pub(super) struct Promises {
    epochs: VecDeque<(u64, Vec<Extent>)>,
}

impl Promises {
    /// Takes the space that the writes of an epoch need, or fails and promises nothing. `held` is how
    /// many bytes are to be written in all.
    pub(super) fn add(
        &mut self,
        epoch: u64,
        writes: Vec<Extent>,
        images: &[Image],
        held: u64,
    ) -> Result<()> {
        let extents = merge(writes, images);
        for extent in &extents {
            let image = images.get(extent.disk).context("a change of no disk")?;
            let done = image.medium.reserve(extent.range.clone(), held);
            done.map_err(|e| image.unwritten(e))?;
        }
        self.epochs.push_back((epoch, extents));
        Ok(())
    }

    /// Forgets the epochs up to `epoch`.
    pub(super) fn kept(&mut self, epoch: u64) {
        self.epochs.retain(|(number, _)| *number > epoch);
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.epochs.clear();
    }

    /// The pieces of a range, in order, and whether each is promised.
    pub(super) fn split(&self, disk: usize, range: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let mut taken = Vec::new();
        for (_, extents) in &self.epochs {
            let first = extents.partition_point(|e| (e.disk, e.range.end) <= (disk, range.start));
            taken.extend(
                extents[first..]
                    .iter()
                    .take_while(|e| e.disk == disk && e.range.start < range.end)
                    .map(|e| e.range.clone()),
            );
        }
        taken.sort_by_key(|taken| taken.start);
        let mut pieces = Vec::new();
        let mut at = range.start;
        for taken in taken {
            let (start, end) = (taken.start.max(at), taken.end.min(range.end));
            if start >= end {
                continue;
            }
            if at < start {
                pieces.push((at..start, false));
            }
            pieces.push((start..end, true));
            at = end;
        }
        if at < range.end {
            pieces.push((at..range.end, false));
        }
        pieces
    }
}

/// Whole blocks, in order, without overlap.
fn merge(mut extents: Vec<Extent>, images: &[Image]) -> Vec<Extent> {
    extents.sort_by_key(|e| (e.disk, e.range.start));
    let mut merged: Vec<Extent> = Vec::new();
    for Extent { disk, range } in extents {
        let size = images.get(disk).map_or(u64::MAX, |image| image.size);
        let start = range.start / BLOCK * BLOCK;
        let end = range.end.next_multiple_of(BLOCK).min(size);
        match merged.last_mut() {
            Some(last) if last.disk == disk && start <= last.range.end => {
                last.range.end = last.range.end.max(end);
            }
            _ => merged.push(Extent {
                disk,
                range: start..end,
            }),
        }
    }
    merged
}
