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
        (self.start.elapsed().as_micros() as u64).saturating_add(1)
    }

    /// The standby has sent a stamp back; 0 is none.
    pub fn came_back(&mut self, stamp: u64) {
        if stamp > 0 {
            self.echo = self.echo.max(Duration::from_micros(stamp - 1));
        }
    }

    /// Whether the standby cannot have taken over yet.
    pub fn holds(&self) -> bool {
        self.start.elapsed() < self.echo.saturating_add(self.timeout)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn lease() {
        let mut lease = Lease::new(Instant::now(), Duration::from_millis(80));
        assert!(lease.holds());
        thread::sleep(Duration::from_millis(90));
        lease.came_back(0);
        assert!(!lease.holds(), "nothing newer was seen");
        let first = lease.stamp();
        assert!(first > 0);
        lease.came_back(first);
        assert!(lease.holds());
        thread::sleep(Duration::from_millis(50));
        let second = lease.stamp();
        lease.came_back(second);
        lease.came_back(first);
        thread::sleep(Duration::from_millis(50));
        assert!(lease.holds(), "the newest counts");
        thread::sleep(Duration::from_millis(40));
        assert!(!lease.holds());
        // Rubbish from the other side makes no panic.
        lease.came_back(u64::MAX);
    }
}
