// SPDX-License-Identifier: GPL-2.0

//! The checker's loop: pause, seal, copy, run on, compare, decide.

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use remus_ram::bits::Bits;
use remus_ram::device::{records, Bitmap, Device};
use remus_ram::map::Map;
use remus_ram::netlink::Client;
use remus_ram::PAGE;
use serde_json::{json, Value};

use crate::crew::Crew;
use crate::image::Image;
use crate::pattern::random;
use crate::reader::{Expected, Outcome, Plan, Reading};
use crate::Options;

/// Most epochs that are sealed at once.
const DEPTH: usize = 4;
/// Longest time between two seals, in microseconds.
const LONGEST: u64 = 20_000;
/// After so many rounds what is seldom is done once even if chance has not had it so far.
const SURE: u64 = 20;

/// A domain with memory that goes when this is dropped.
pub struct Domain {
    client: Client,
    name: String,
    pages: u64,
    hot_limit: u64,
}

impl Domain {
    /// Creates it; so many copies may be kept, 0 for any number, and so many pages may be hot.
    pub fn create(name: &str, pages: u64, cow_limit: u64, hot_limit: u64) -> Result<Self> {
        let client = Client::connect()?;
        let page = PAGE as u64;
        client.create(name, pages * page, cow_limit * page, hot_limit * page)?;
        Ok(Self {
            client,
            name: name.into(),
            pages,
            hot_limit,
        })
    }

    fn open(&self) -> Result<Device> {
        Device::open(&self.name, self.pages)
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // A failed run shows why it failed, not what it left.
        let _ = self.client.delete(&self.name);
    }
}

/// A sealed epoch.
struct Sealed {
    expected: Arc<Expected>,
    bitmap: Bitmap,
    reading: Reading,
}

/// What a run did.
#[derive(Default)]
struct Totals {
    pages: u64,
    guest_jobs: u64,
    steps: u64,
    committed: u64,
    aborted: u64,
    full: u64,
    standing: usize,
    copies: u64,
    waits: u64,
    read_again: u64,
    stale: u64,
    hot: u64,
    unchanged: u64,
    cold: u64,
}

/// The standby: a memory that only gets whole epochs.
struct Standby<'a> {
    domain: &'a Domain,
    device: Device,
    map: Map,
}

/// The primary, and what is known about it.
struct Check<'a> {
    domain: &'a Domain,
    device: Arc<Device>,
    standby: Standby<'a>,
    crew: Crew,
    rng: ChaCha8Rng,
    sealed: VecDeque<Sealed>,
    /// Pages of aborted epochs, which count to the open one.
    carried: Bits,
    /// The memory at the last seal.
    last: Arc<Expected>,
    totals: Totals,
}

/// Does a whole run. Returns what it came to.
pub fn run(options: &Options, seed: u64) -> Result<Value> {
    let pages = options
        .pages
        .unwrap_or(options.memory * ((1 << 20) / PAGE as u64));
    ensure!(
        pages.is_power_of_two(),
        "--memory and --pages take a power of two"
    );
    // In the order in which they may go: devices and writers before domains.
    let (limit, hot) = (options.cow_limit, options.hot_limit);
    let domain = Domain::create(&options.domain, pages, limit, hot)?;
    let second = Domain::create(&format!("{}-standby", options.domain), pages, 0, 0)?;
    let guests = usize::from(!options.no_guest);
    let crew = Crew::start(&options.domain, pages, seed, options.writers, guests)?;
    let device = second.open()?;
    let mut check = Check {
        device: Arc::new(domain.open()?),
        standby: Standby {
            map: device.map(false)?,
            device,
            domain: &second,
        },
        domain: &domain,
        crew,
        rng: random(seed, 0, 0, 2),
        sealed: VecDeque::new(),
        carried: Bits::new(pages),
        last: Arc::new(Expected {
            epoch: 0,
            pages: Bits::new(pages),
            reference: Image::zeros(pages as usize * PAGE),
        }),
        totals: Totals::default(),
    };
    check.crew.go(0)?;
    let mut round = 0;
    // With a limit until somebody had to wait for it, however slow the writers are.
    let waited = |check: &Check<'_>| options.cow_limit == 0 || check.totals.waits > 0;
    while round < options.epochs || !waited(&check) && round < 20 * options.epochs {
        check
            .round(round)
            .with_context(|| format!("round {round}"))?;
        round += 1;
        if round % 100 == 0 {
            eprintln!("# {round} epochs");
        }
    }
    check.commit(check.sealed.len()).context("at the end")?;
    Ok(check.report(round))
}

impl Check<'_> {
    /// One epoch, from running to running on, and what is due of older ones.
    fn round(&mut self, round: u64) -> Result<()> {
        thread::sleep(Duration::from_micros(self.rng.random_range(0..LONGEST)));
        let steps = self.crew.pause()?;
        for (guest, steps) in self.crew.guests().zip(&steps) {
            if guest {
                self.totals.guest_jobs += steps;
            } else {
                self.totals.steps += steps;
            }
        }
        let written = self.crew.written(round, &steps);
        let sealed = self.seal(&written, round + 1)?;
        self.totals.pages += sealed.expected.pages.count();
        self.sealed.push_back(sealed);
        self.totals.standing = self.totals.standing.max(self.sealed.len());
        let counts = self.domain.client.counts(&self.domain.name)?;
        self.totals.copies = self.totals.copies.max(counts.snapshot);
        self.totals.waits = counts.waits;
        self.totals.hot = self.totals.hot.max(counts.hot);
        self.decide(round)
    }

    /// Seals the epoch in which `written` was written since the last seal or abort, and lets the
    /// writers run on with round `next`.
    fn seal(&mut self, written: &Bits, next: u64) -> Result<Sealed> {
        let mut expected = written.clone();
        let pages = expected.length();
        expected.merge(&self.carried);
        let mut least = std::mem::replace(&mut self.carried, Bits::new(pages));

        let due = self.totals.full == 0 && next > SURE;
        let full = self.sealed.is_empty() && (self.rng.random_range(0..15) == 0 || due);
        let reference_by_map = self.rng.random();
        let before = self.domain.client.counts(&self.domain.name)?;
        let open = expected.count();
        let done = self.domain.client.seal(&self.domain.name, full)?;
        let epoch = done.epoch;
        ensure!(epoch > self.last.epoch, "epoch {epoch} came again");
        let reference = if reference_by_map {
            Image::of_map(&self.device.map(false)?)
        } else {
            Image::of_file(&self.device)?
        };
        self.crew.go(next)?;

        // From here on the writers run.
        let bitmap = self.device.bitmap(epoch)?;
        let found = self.set(epoch, &bitmap)?;
        if full {
            self.totals.full += 1;
            least = expected;
            reference.used().for_each(|page| least.insert(page));
            if let Some(page) = least.first_not_in(&found) {
                bail!("epoch {epoch}, full: page {page} exists and is not in the bitmap");
            }
            expected = found;
        } else if self.domain.hot_limit > 0 {
            let changed = |page: &u64| self.last.reference.page(*page) != reference.page(*page);
            let changed = written.iter().filter(changed).collect::<Vec<_>>();
            changed.into_iter().for_each(|page| least.insert(page));
            if let Some(page) = least.first_not_in(&found) {
                bail!("epoch {epoch}: page {page} has changed and is not in the bitmap");
            }
            // What is there besides was hot until now; what is missing has not changed.
            let mut all = expected.clone();
            all.merge(&found);
            let cold = all.count() - expected.count();
            ensure!(
                cold <= self.domain.hot_limit,
                "epoch {epoch}: {cold} pages in the bitmap were not written"
            );
            self.totals.cold += cold;
            self.totals.unchanged += all.count() - found.count();
            expected = found;
        } else {
            same_set(epoch, &found, &expected)?;
        }
        // After the set, of which a difference names a page. Hot pages are not known before.
        ensure!(
            before.dirty == open || self.domain.hot_limit > 0 && before.dirty < open,
            "epoch {epoch}: domain-get said {} pages before the seal, where {open} were written",
            before.dirty
        );
        ensure!(
            done.dirty_pages == expected.count() && bitmap.pages() == expected.count(),
            "epoch {epoch} has {} pages, seal said {} and BITMAP {}",
            expected.count(),
            done.dirty_pages,
            bitmap.pages()
        );
        // What nobody has written has not changed.
        for page in (0..pages).filter(|&page| !written.contains(page)) {
            self.last
                .reference
                .expect(page, reference.page(page))
                .with_context(|| format!("epoch {epoch}: not written, and yet"))?;
        }
        let expected = Arc::new(Expected {
            epoch,
            pages: expected,
            reference,
        });
        self.last = expected.clone();
        let plan = Plan::random(&mut self.rng, pages);
        Ok(Sealed {
            reading: Reading::start(self.device.clone(), expected.clone(), plan),
            expected,
            bitmap,
        })
    }

    /// Commits or aborts some of the sealed epochs, or none.
    fn decide(&mut self, round: u64) -> Result<()> {
        let due = self.totals.aborted == 0 && round > SURE;
        if self.rng.random_range(0..12) == 0 || due {
            let from = self.rng.random_range(0..self.sealed.len());
            return self.abort(from);
        }
        let depth = self.rng.random_range(0..=DEPTH);
        if self.sealed.len() > depth {
            let least = self.sealed.len().saturating_sub(DEPTH).max(1);
            let count = self.rng.random_range(least..=self.sealed.len());
            self.commit(count)?;
        }
        Ok(())
    }

    /// Applies the `count` oldest sealed epochs to the standby and commits them, at once.
    fn commit(&mut self, count: usize) -> Result<()> {
        let mut done = Vec::new();
        for sealed in self.sealed.drain(..count) {
            let expected = sealed.expected;
            let epoch = expected.epoch;
            match sealed.reading.outcome()? {
                Outcome::Gone => bail!("epoch {epoch} was gone before it was committed"),
                Outcome::Read(batches, again) => {
                    self.totals.read_again += again.same;
                    self.totals.stale += again.stale;
                    self.standby
                        .apply(&expected, &batches, self.rng.random())
                        .with_context(|| format!("standby, epoch {epoch} applied"))?;
                }
            }
            done.push((expected, sealed.bitmap));
        }
        let Some((newest, _)) = done.last() else {
            return Ok(());
        };
        // Stable for as long as it is mapped: before the commit, and after it.
        let early = self.rng.random();
        if early {
            self.stable(&done)?;
        }
        self.domain.client.commit(&self.domain.name, newest.epoch)?;
        self.totals.committed += done.len() as u64;
        if !early {
            self.stable(&done)?;
        }
        done.iter().try_for_each(|(e, _)| self.not_sealed(e.epoch))
    }

    /// Aborts the sealed epochs from the one at `from` on.
    fn abort(&mut self, from: usize) -> Result<()> {
        let first = self.sealed[from].expected.epoch;
        self.domain.client.abort(&self.domain.name, first)?;
        let mut done = Vec::new();
        for sealed in self.sealed.drain(from..) {
            // What was read until then has to be right all the same.
            sealed.reading.outcome()?;
            self.carried.merge(&sealed.expected.pages);
            done.push((sealed.expected, sealed.bitmap));
        }
        self.totals.aborted += done.len() as u64;
        self.stable(&done)?;
        done.iter().try_for_each(|(e, _)| self.not_sealed(e.epoch))
    }

    /// That the mapped sets are what they were.
    fn stable(&self, epochs: &[(Arc<Expected>, Bitmap)]) -> Result<()> {
        epochs.iter().try_for_each(|(expected, bitmap)| {
            same_set(
                expected.epoch,
                &self.set(expected.epoch, bitmap)?,
                &expected.pages,
            )
            .context("the bitmap has changed while it was mapped")
        })
    }

    /// That an epoch can no longer be read.
    fn not_sealed(&self, epoch: u64) -> Result<()> {
        let mut buffer = vec![0; remus_ram::abi::RECORD];
        match self.device.read(epoch, 0..u64::MAX, &mut buffer, 0) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
            other => bail!("epoch {epoch} is not sealed any more, and READ returned {other:?}"),
        }
        ensure!(
            self.device.bitmap(epoch).is_err(),
            "epoch {epoch} is not sealed any more, and BITMAP finds it"
        );
        Ok(())
    }

    fn set(&self, epoch: u64, bitmap: &Bitmap) -> Result<Bits> {
        match bitmap.bits() {
            Ok(bits) => Ok(bits),
            Err(page) => bail!("epoch {epoch}: page {page} in the bitmap is beyond the end"),
        }
    }

    fn report(&self, epochs: u64) -> Value {
        let t = &self.totals;
        json!({
            "epochs": epochs,
            "pages": t.pages,
            "process_steps": t.steps,
            "guest_jobs": t.guest_jobs,
            "committed": t.committed,
            "aborted": t.aborted,
            "full": t.full,
            "most_sealed": t.standing,
            "most_copies": t.copies,
            "waits": t.waits,
            "read_again": t.read_again,
            "stale": t.stale,
            "most_hot": t.hot,
            "hot_unchanged": t.unchanged,
            "turned_cold": t.cold,
        })
    }
}

impl Standby<'_> {
    /// Applies an epoch's records and compares all of the memory with the reference. The standby is a
    /// memory like the primary: what is applied must be what its own epoch then holds.
    fn apply(
        &self,
        expected: &Expected,
        batches: &[(Vec<u8>, usize)],
        compare_by_map: bool,
    ) -> Result<()> {
        for (buffer, count) in batches {
            for (page, content) in records(buffer, *count) {
                self.device
                    .file()
                    .write_all_at(content, page * PAGE as u64)
                    .with_context(|| format!("pwrite of page {page}"))?;
            }
        }
        let image = if compare_by_map {
            Image::of_map(&self.map)
        } else {
            Image::of_file(&self.device)?
        };
        if let Some(page) = expected.reference.differs(&image) {
            expected.reference.expect(page, image.page(page))?;
        }
        let client = &self.domain.client;
        let epoch = client.seal(&self.domain.name, false)?.epoch;
        let bits = match self.device.bitmap(epoch)?.bits() {
            Ok(bits) => bits,
            Err(page) => bail!("page {page} in the bitmap is beyond the end"),
        };
        same_set(epoch, &bits, &expected.pages)?;
        client.commit(&self.domain.name, epoch).map(drop)
    }
}

/// That a set is what it should be. An error names a page.
fn same_set(epoch: u64, found: &Bits, expected: &Bits) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let described = |page: Option<u64>| page.map_or("none".into(), |p| format!("page {p}"));
    bail!(
        "epoch {epoch}: {} pages in the bitmap, {} expected; first one missing: {}; first one too many: {}",
        found.count(),
        expected.count(),
        described(expected.first_not_in(found)),
        described(found.first_not_in(expected))
    )
}
