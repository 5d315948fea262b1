// SPDX-License-Identifier: GPL-2.0-or-later

//! Putting whole epochs into the image.

use std::sync::mpsc::Receiver as Queue;
use std::time::Instant;

use anyhow::{anyhow, Error, Result};
use remus_core::uapi::ram::PAGE_SIZE;
use remus_proto::frame::Kind;
use remus_proto::pages::{self, Scratch};

use super::disks::Store;
use super::serve::{Held, Offer};
use super::stage::Work;
use crate::host::kernel::Image;
use crate::peer::stream::Sender;
use crate::report::trace::ms;
use crate::report::{Applied, Report};
use crate::say;

/// An image as the codec wants it.
struct Memory<'a>(&'a mut dyn Image);

impl pages::Image for Memory<'_> {
    type Error = Error;

    fn read(&mut self, page: u64, to: &mut [u8; PAGE_SIZE]) -> Result<()> {
        self.0.read(page, to)
    }

    fn write(&mut self, page: u64, content: &[u8; PAGE_SIZE]) -> Result<()> {
        self.0.write(page, content)
    }
}

/// Applies what was staged, in order, until no more comes.
pub(crate) fn apply_all(
    todo: &Queue<Work>,
    image: &mut dyn Image,
    offer: &Offer,
    held: &mut Held,
    disks: Option<(&Store, &Sender)>,
    report: &Report,
) -> Result<()> {
    let limit = offer.memory / PAGE_SIZE as u64;
    let mut scratch = Scratch::new();
    let mut apply = |frame: &[u8]| -> Result<()> {
        pages::apply(frame, limit, &mut scratch, &mut Memory(image))
            .map_err(|e| anyhow!("{e:#}: the image is torn, nothing can be resumed from it"))?;
        Ok(())
    };
    for work in todo {
        let stage = match work {
            Work::Pages(frame) => {
                apply(&frame)?;
                continue;
            }
            Work::Whole(stage) => stage,
        };
        let begin = Instant::now();
        for frame in &stage.frames {
            apply(frame)?;
        }
        let took = begin.elapsed();
        if let Some((store, sender)) = disks {
            store.apply(stage.epoch)?;
            // A primary that does not hear this keeps the changes, and no harm is done.
            let _ = sender.send(Kind::DiskApplied, stage.epoch, &[]);
        }
        let disks_took = begin.elapsed() - took;
        let first = held.epoch == 0;
        (held.epoch, held.state) = (stage.epoch, stage.state);
        report.applied(&Applied {
            epoch: stage.epoch,
            pages: stage.pages,
            bytes: stage.bytes,
            stage_ms: ms(stage.staged - stage.begin),
            apply_ms: ms(took),
            disks_ms: disks.map(|_| ms(disks_took)),
        });
        if first {
            say!(
                "epoch {} is here: {} is protected",
                held.epoch,
                offer.domain
            );
        }
    }
    Ok(())
}
