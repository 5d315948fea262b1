// SPDX-License-Identifier: GPL-2.0-or-later

//! Which epochs a domain has: the open one, the sealed ones, the newest committed one.
//!
//! ```text
//!         seal                 commit N (N sealed): every sealed epoch ≤ N
//!  open ────────▶ sealed ─────────────────────────────────────────────▶ committed
//!    ▲               │
//!    └───────────────┘ abort N (N sealed): N and every epoch sealed after it become part of
//!                      the open one; their numbers are never used again
//! ```
//!
//! An abort takes everything sealed after N along, because an epoch can only be replicated on top of
//! the one before it.
//!
//! Data that is tagged with the number of the epoch in which it arrived needs no new tag when that
//! epoch is aborted: an aborted number is never committed, so "tag ≤ committed" holds for exactly
//! the data that may be released. `tests` in the controller's core crate hold this to a model.

/// How many gaps between sealed epochs are remembered. A gap appears when a seal follows an abort
/// while older sealed epochs still wait.
pub const MAX_RUNS: usize = 32;

/// Why a command on an epoch was refused. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The epoch is the open one: it has to be sealed first.
    Open,
    /// The epoch was committed before.
    Committed,
    /// The epoch was aborted: it is part of a later one.
    Aborted,
    /// The domain has not come to this epoch yet.
    Future,
    /// Epochs start at 1.
    Zero,
    /// Too many aborts while older epochs wait: commit or abort these first.
    TooManyGaps,
    /// The numbers are used up.
    Exhausted,
}

/// Consecutive sealed epochs, both ends included.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u64,
    last: u64,
}

/// The epochs of a domain.
///
/// # Invariants
///
/// - `runs[..len]` is ascending, and there is a gap between one run and the next.
/// - Every number in `runs[..len]` is above `committed` and below `open`.
#[derive(Clone, Debug)]
pub struct Epochs {
    open: u64,
    committed: u64,
    runs: [Run; MAX_RUNS],
    len: usize,
}

impl Epochs {
    /// A domain that never sealed: epoch 1 is open.
    pub const fn new() -> Self {
        Self {
            open: 1,
            committed: 0,
            runs: [Run { first: 0, last: 0 }; MAX_RUNS],
            len: 0,
        }
    }

    /// The open epoch.
    pub fn open(&self) -> u64 {
        self.open
    }

    /// The newest committed epoch, 0 if there is none.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// The newest epoch that is sealed or committed, 0 if there is none. All that came later belongs to
    /// the open one, whatever epoch was open when it came.
    pub fn newest(&self) -> u64 {
        self.runs().last().map_or(self.committed, |r| r.last)
    }

    /// How many epochs are sealed.
    pub fn sealed(&self) -> u64 {
        self.runs().iter().map(|r| r.last - r.first + 1).sum()
    }

    /// Whether `epoch` is sealed, and why it is not.
    pub fn check_sealed(&self, epoch: u64) -> Result<(), Refused> {
        if epoch == 0 {
            Err(Refused::Zero)
        } else if epoch > self.open {
            Err(Refused::Future)
        } else if epoch == self.open {
            Err(Refused::Open)
        } else if epoch <= self.committed {
            Err(Refused::Committed)
        } else if self
            .runs()
            .iter()
            .any(|r| r.first <= epoch && epoch <= r.last)
        {
            Ok(())
        } else {
            Err(Refused::Aborted)
        }
    }

    /// Whether [`seal`](Self::seal) would succeed.
    pub fn check_seal(&self) -> Result<(), Refused> {
        if self.open == u64::MAX {
            Err(Refused::Exhausted)
        } else if self.len == MAX_RUNS && !self.extends_last_run() {
            Err(Refused::TooManyGaps)
        } else {
            Ok(())
        }
    }

    /// Seals the open epoch and opens the next one. Returns the sealed one.
    pub fn seal(&mut self) -> Result<u64, Refused> {
        self.check_seal()?;
        let sealed = self.open;
        if self.extends_last_run() {
            if let Some(run) = self.runs[..self.len].last_mut() {
                run.last = sealed;
            }
        } else if let Some(run) = self.runs.get_mut(self.len) {
            *run = Run {
                first: sealed,
                last: sealed,
            };
            self.len += 1;
        }
        self.open = sealed + 1;
        Ok(sealed)
    }

    /// Commits `epoch` and every sealed epoch before it.
    pub fn commit(&mut self, epoch: u64) -> Result<(), Refused> {
        self.check_sealed(epoch)?;
        self.committed = epoch;
        let gone = self.runs().iter().filter(|r| r.last <= epoch).count();
        self.runs.copy_within(gone..self.len, 0);
        self.len -= gone;
        if let Some(run) = self.runs[..self.len].first_mut() {
            run.first = run.first.max(epoch + 1);
        }
        Ok(())
    }

    /// Folds `epoch` and every epoch sealed after it into the open one.
    pub fn abort(&mut self, epoch: u64) -> Result<(), Refused> {
        self.check_sealed(epoch)?;
        self.len = self.runs().iter().filter(|r| r.first < epoch).count();
        if let Some(run) = self.runs[..self.len].last_mut() {
            run.last = run.last.min(epoch - 1);
        }
        Ok(())
    }

    fn runs(&self) -> &[Run] {
        self.runs.get(..self.len).unwrap_or(&[])
    }

    fn extends_last_run(&self) -> bool {
        self.runs().last().is_some_and(|r| r.last + 1 == self.open)
    }
}

impl Default for Epochs {
    fn default() -> Self {
        Self::new()
    }
}
