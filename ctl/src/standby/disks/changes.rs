// SPDX-License-Identifier: GPL-2.0-or-later

//! Payloads of changes: whether they fit the disks, where they write, and writing them.

use std::ops::Range;
use std::sync::Mutex;

use anyhow::{bail, Context, Result};
use remus_proto::disk::{Change, Record};

use super::image::Image;
use super::medium::zeros;
use super::space::{Extent, Promises};
use crate::peer::stream::lock;

/// The records of a payload.
fn each(mut payload: &[u8], mut what: impl FnMut(Record<'_>) -> Result<()>) -> Result<()> {
    while !payload.is_empty() {
        let record =
            Record::decode(&mut payload).context("a payload of disk changes is damaged")?;
        what(record)?;
    }
    Ok(())
}

fn range(record: &Record<'_>) -> Range<u64> {
    record.offset..record.offset.saturating_add(record.change.length().into())
}

/// Whether all of `payload` is within the disks.
pub(super) fn check(payload: &[u8], disks: &[(String, u64)]) -> Result<()> {
    each(payload, |record| {
        let Some((name, size)) = disks.get(usize::from(record.disk)) else {
            bail!("a change of disk {}, which the guest has not", record.disk);
        };
        let end = range(&record).end;
        if end > *size {
            bail!("a change of {name} up to byte {end}, which has {size} bytes");
        }
        Ok(())
    })
}

/// The ranges that `payload` writes, added to `extents`. A range that is cleared needs no space.
pub(super) fn writes(payload: &[u8], extents: &mut Vec<Extent>) -> Result<()> {
    each(payload, |record| {
        if let Change::Write(_) = record.change {
            extents.push(Extent {
                disk: record.disk.into(),
                range: range(&record),
            });
        }
        Ok(())
    })
}

/// Writes `payload`, which was checked, to the images.
pub(super) fn write(payload: &[u8], images: &[Image], promises: &Mutex<Promises>) -> Result<()> {
    each(payload, |record| {
        let disk = usize::from(record.disk);
        let image = images.get(disk).context("a change of no disk")?;
        let done = match record.change {
            Change::Write(data) => image.medium.write(data, record.offset),
            Change::Zero(_) | Change::Discard(_) => {
                // Space that was promised to what comes later stays.
                let promises = lock(promises);
                let pieces = promises.split(disk, range(&record));
                pieces
                    .into_iter()
                    .try_for_each(|(piece, promised)| match promised {
                        true => zeros(image.medium.as_ref(), piece),
                        false => image.medium.clear(piece),
                    })
            }
        };
        done.map_err(|e| image.unwritten(e))
    })
}
