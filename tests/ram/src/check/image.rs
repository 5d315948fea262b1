// SPDX-License-Identifier: GPL-2.0

//! A full copy of a memory, and how one is compared with another.

use std::os::unix::fs::FileExt;

use anyhow::{bail, Result};
use remus_ram::device::Device;
use remus_ram::map::Map;
use remus_ram::PAGE;

/// Bytes of a page that a failure shows.
const SHOWN: usize = 16;

/// The copy.
pub struct Image(Vec<u8>);

impl Image {
    /// Zeros, as a memory is at first.
    pub fn zeros(length: usize) -> Self {
        Self(vec![0; length])
    }

    /// What a mapping shows now.
    pub fn of_map(map: &Map) -> Self {
        let mut bytes = vec![0; map.length()];
        map.read(0, &mut bytes);
        Self(bytes)
    }

    /// What `pread` returns now.
    pub fn of_file(device: &Device) -> Result<Self> {
        let mut bytes = vec![0; device.length()];
        device.file().read_exact_at(&mut bytes, 0)?;
        Ok(Self(bytes))
    }

    /// Content of a page.
    pub fn page(&self, page: u64) -> &[u8] {
        &self.0[page as usize * PAGE..][..PAGE]
    }

    /// The pages that do not only hold zeros.
    pub fn used(&self) -> impl Iterator<Item = u64> + '_ {
        let pages = self.0.chunks_exact(PAGE).enumerate();
        pages
            .filter(|(_, page)| page.iter().any(|&b| b != 0))
            .map(|(n, _)| n as u64)
    }

    /// The first page that differs.
    pub fn differs(&self, other: &Self) -> Option<u64> {
        if self.0 == other.0 {
            return None;
        }
        (0..(self.0.len() / PAGE) as u64).find(|&n| self.page(n) != other.page(n))
    }

    /// That `found` is this page. An error says what differs.
    pub fn expect(&self, page: u64, found: &[u8]) -> Result<()> {
        let expected = self.page(page);
        if expected == found {
            return Ok(());
        }
        let differ = expected.iter().zip(found).filter(|(a, b)| a != b).count();
        let Some(at) = expected.iter().zip(found).position(|(a, b)| a != b) else {
            bail!("page {page} has {} bytes", found.len());
        };
        let end = (at + SHOWN).min(PAGE);
        bail!(
            "page {page} differs in {differ} bytes, from byte {at} on: expected {}, found {}",
            hex(&expected[at..end]),
            hex(&found[at..end])
        )
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
