// SPDX-License-Identifier: GPL-2.0-or-later

//! Memories, and content for them.

#![allow(dead_code, clippy::unwrap_used)]

use remus_core::uapi::ram::{PAGE_SIZE, RECORD_SIZE};
use remus_proto::frame::record;
use remus_proto::pages::{Image, Page};

/// xorshift64*: the same everywhere from the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub fn bytes(&mut self, to: &mut [u8]) {
        to.iter_mut().for_each(|byte| *byte = self.next() as u8);
    }

    /// Content that no codec makes shorter.
    pub fn page(&mut self) -> Page {
        let mut page = [0; PAGE_SIZE];
        self.bytes(&mut page);
        page
    }

    /// Content that LZ4 makes much shorter.
    pub fn text(&mut self) -> Page {
        const WORDS: &[u8] = b"the page of memory standby is sent epoch return 0123456789";
        let mut page = [0; PAGE_SIZE];
        for piece in page.chunks_mut(8) {
            let at = self.below(WORDS.len() - 8);
            piece.copy_from_slice(&WORDS[at..at + 8]);
        }
        page
    }
}

/// A memory, of pages from 0 on. Pages outside of it are an error.
#[derive(Clone, Debug, PartialEq)]
pub struct Memory(pub Vec<Page>);

impl Memory {
    pub fn new(pages: usize, fill: u8) -> Self {
        Self(vec![[fill; PAGE_SIZE]; pages])
    }

    /// Records of these pages, which ascend.
    pub fn records(&self, pages: impl IntoIterator<Item = usize>) -> Vec<u8> {
        records(pages.into_iter().map(|page| (page as u64, &self.0[page])))
    }
}

impl Image for Memory {
    type Error = u64;

    fn read(&mut self, page: u64, to: &mut Page) -> Result<(), u64> {
        *to = *self.0.get(page as usize).ok_or(page)?;
        Ok(())
    }

    fn write(&mut self, page: u64, content: &Page) -> Result<(), u64> {
        *self.0.get_mut(page as usize).ok_or(page)? = *content;
        Ok(())
    }
}

/// Page records, as the kernel hands them out.
pub fn records<'a>(pages: impl IntoIterator<Item = (u64, &'a Page)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (page, content) in pages {
        let mut out = [0; RECORD_SIZE];
        record(page, content, &mut out);
        bytes.extend(out);
    }
    bytes
}
