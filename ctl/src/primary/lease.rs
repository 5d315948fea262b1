// SPDX-License-Identifier: GPL-2.0-or-later

//! How long the standby is known not to take over.

use std::time::{Duration, Instant};

/// A lease that the standby gives without knowing.
///
/// It waits for its timeout after it has heard something, and what it sends back tells what it has
/// heard; see the protocol.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    /// What stamps count from.
    start: Instant,
    /// The standby's timeout.
    timeout: Duration,
    /// The newest stamp that came back.
    echo: Duration,
}

impl Lease {
    /// A lease from a standby with this timeout, which has answered to what was sent at `start`.
    pub fn new(start: Instant, timeout: Duration) -> Self {
        Self {
            start,
            timeout,
            echo: Duration::ZERO,
        }
    }

    /// A stamp for now. Never 0.
    pub fn stamp(&self) -> u64 {
        Self::stamp_of(self.start.elapsed())
    }

    fn stamp_of(since_start: Duration) -> u64 {
        (since_start.as_micros() as u64).saturating_add(1)
    }

    /// The standby has sent a stamp back; 0 is none.
    pub fn came_back(&mut self, stamp: u64) {
        if stamp > 0 {
            self.echo = self.echo.max(Duration::from_micros(stamp - 1));
        }
    }

    /// Whether the standby cannot have taken over yet.
    pub fn holds(&self) -> bool {
        self.holds_after(self.start.elapsed())
    }

    fn holds_after(&self, since_start: Duration) -> bool {
        since_start < self.echo.saturating_add(self.timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn lease() {
        let mut lease = Lease::new(Instant::now(), 80 * MS);
        assert!(lease.holds_after(79 * MS));
        lease.came_back(0);
        assert!(!lease.holds_after(80 * MS), "nothing newer was seen");
        let first = Lease::stamp_of(90 * MS);
        assert!(first > 0 && Lease::stamp_of(Duration::ZERO) > 0);
        lease.came_back(first);
        assert!(lease.holds_after(169 * MS) && !lease.holds_after(170 * MS));
        lease.came_back(Lease::stamp_of(140 * MS));
        lease.came_back(first);
        assert!(lease.holds_after(219 * MS), "the newest counts");
        assert!(!lease.holds_after(220 * MS));
        // By the clock.
        let mut lease = Lease::new(Instant::now(), 3600 * 1000 * MS);
        assert!(lease.holds() && lease.stamp() > 0);
        lease.timeout = Duration::ZERO;
        assert!(!lease.holds());
        // Rubbish from the other side makes no panic.
        lease.came_back(u64::MAX);
    }
}
