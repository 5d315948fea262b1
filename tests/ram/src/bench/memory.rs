// SPDX-License-Identifier: GPL-2.0

//! A domain with memory that is fully touched, and any pages of it.

use std::time::Instant;

use anyhow::{ensure, Context, Result};
use rand::seq::index;
use rand::Rng;
use remus_ram::abi::RECORD;
use remus_ram::device::Device;
use remus_ram::map::Map;
use remus_ram::netlink::{Client, Done};
use remus_ram::PAGE;

/// Records in a batch of READ.
pub const BATCH: usize = 256;

/// The memory. The domain goes when this is dropped.
pub struct Memory {
    /// Mapping of all of it in this process.
    pub map: Map,
    /// Its device.
    pub device: Device,
    domain: Domain,
}

struct Domain {
    client: Client,
    name: String,
}

impl Memory {
    /// Creates a domain with so many MiB, every page of which is written once and committed.
    pub fn new(name: &str, mib: u64) -> Result<Self> {
        let pages = mib * ((1 << 20) / PAGE as u64);
        let client = Client::connect()?;
        client.create(name, pages * PAGE as u64, 0, 0)?;
        let domain = Domain {
            client,
            name: name.into(),
        };
        let device = Device::open(name, pages)?;
        let memory = Self {
            map: device.map(true)?,
            device,
            domain,
        };
        touch(&memory.map);
        let epoch = memory.seal()?.epoch;
        memory.commit(epoch)?;
        Ok(memory)
    }

    /// Pages in it.
    pub fn pages(&self) -> u64 {
        self.device.pages()
    }

    /// Seals.
    pub fn seal(&self) -> Result<Done> {
        self.domain.client.seal(&self.domain.name, false)
    }

    /// Seals an epoch that must hold so many pages.
    pub fn seal_of(&self, pages: usize) -> Result<Done> {
        let done = self.seal()?;
        ensure!(
            done.dirty_pages == pages as u64,
            "an epoch in which {pages} pages were written holds {}",
            done.dirty_pages
        );
        Ok(done)
    }

    /// Commits.
    pub fn commit(&self, epoch: u64) -> Result<Done> {
        self.domain.client.commit(&self.domain.name, epoch)
    }

    /// Reads all pages of a sealed epoch out. Returns how many there were.
    pub fn read_out(&self, epoch: u64, buffer: &mut [u8]) -> Result<usize> {
        let (mut count, mut cursor) = (0, 0);
        loop {
            let batch = self
                .device
                .read(epoch, cursor..u64::MAX, buffer, 0)
                .with_context(|| format!("READ of epoch {epoch}"))?;
            count += batch.count;
            match batch.next {
                Some(next) => cursor = next,
                None => return Ok(count),
            }
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // The device is closed before: fields go in their order.
        if let Err(error) = self.client.delete(&self.name) {
            eprintln!("ram-bench: {error:#}");
        }
    }
}

/// A buffer for READ.
pub fn buffer() -> Vec<u8> {
    vec![1; BATCH * RECORD]
}

/// Writes every page.
pub fn touch(map: &Map) {
    for page in 0..map.length() / PAGE {
        map.write_pages(&[page as u64], page as u64 + 1);
    }
}

/// `count` different pages out of `pages`, in any order.
pub fn scattered(rng: &mut impl Rng, pages: u64, count: usize) -> Vec<u64> {
    index::sample(rng, pages as usize, count)
        .into_iter()
        .map(|n| n as u64)
        .collect()
}

/// What `f` returns, and how long it took in nanoseconds.
pub fn timed<T>(f: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let begin = Instant::now();
    let value = f()?;
    Ok((value, begin.elapsed().as_nanos() as f64))
}
