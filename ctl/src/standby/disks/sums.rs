// SPDX-License-Identifier: GPL-2.0-or-later

//! Sums of images. Holes are known to be zeros, so they are not read.

use std::ops::Range;

use anyhow::{Context, Result};
use remus_proto::disk::{Sums, CHUNK};

use super::image::Image;
use crate::peer::sum::sum;

/// A chunk of an image.
struct Chunk<'a> {
    length: usize,
    /// What it holds; nothing if it is zeros in a hole.
    data: Option<&'a [u8]>,
}

/// Chunks of an image, one after the other.
struct Chunks<'a> {
    image: &'a Image,
    at: u64,
    /// The next range that is no hole; nothing if there is none.
    data: Option<Range<u64>>,
    buffer: Vec<u8>,
}

impl<'a> Chunks<'a> {
    fn new(image: &'a Image) -> Self {
        Self {
            image,
            at: 0,
            data: Some(0..0),
            buffer: vec![0; CHUNK],
        }
    }

    fn next(&mut self) -> Result<Option<Chunk<'_>>> {
        let (start, end) = (self.at, (self.at + CHUNK as u64).min(self.image.size));
        if start == end {
            return Ok(None);
        }
        self.at = end;
        let length = (end - start) as usize;
        let failed = || format!("cannot read the image of {}", self.image.name);
        while let Some(data) = self.data.as_ref().filter(|data| data.end <= start) {
            let from = data.end.max(start);
            self.data = self.image.medium.data(from).with_context(failed)?;
        }
        if self.data.as_ref().is_none_or(|data| data.start >= end) {
            return Ok(Some(Chunk { length, data: None }));
        }
        let chunk = &mut self.buffer[..length];
        self.image.medium.read(chunk, start).with_context(failed)?;
        Ok(Some(Chunk {
            length,
            data: Some(chunk),
        }))
    }
}

/// Hands out the sums of all chunks of an image, as many at a time as fit into a frame.
pub(super) fn send(
    image: &Image,
    disk: u16,
    send: &mut dyn FnMut(Sums) -> Result<()>,
) -> Result<()> {
    let zeros = sum(&[0; CHUNK]);
    let mut chunks = Chunks::new(image);
    let mut batch = Sums {
        disk,
        first: 0,
        sums: Vec::new(),
    };
    while let Some(Chunk { length, data }) = chunks.next()? {
        batch.sums.push(match data {
            Some(data) => sum(data),
            None if length == CHUNK => zeros,
            None => sum(&vec![0; length]),
        });
        if batch.sums.len() == Sums::MAX {
            let first = batch.first + batch.sums.len() as u64;
            send(Sums {
                sums: std::mem::take(&mut batch.sums),
                ..batch
            })?;
            batch.first = first;
        }
    }
    match batch.sums.is_empty() {
        true => Ok(()),
        false => send(batch),
    }
}

/// The SHA-256 of a whole disk.
#[cfg(test)]
pub type Whole = [u8; 32];

/// The sum of all of an image.
#[cfg(test)]
pub(super) fn whole(image: &Image) -> Result<Whole> {
    use ring::digest::{Context as Hash, SHA256};

    static ZEROS: [u8; CHUNK] = [0; CHUNK];
    let mut hash = Hash::new(&SHA256);
    let mut chunks = Chunks::new(image);
    while let Some(Chunk { length, data }) = chunks.next()? {
        hash.update(data.unwrap_or(&ZEROS[..length]));
    }
    let mut sum = Whole::default();
    sum.copy_from_slice(hash.finish().as_ref());
    Ok(sum)
}
