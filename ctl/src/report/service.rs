// SPDX-License-Identifier: GPL-2.0-or-later

//! What systemd is told, if it started this: that it is ready, that it lives.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use sd_notify::NotifyState;

/// Ready: a standby when it listens and its machine waits, a primary when the standby holds a whole epoch.
pub fn ready(status: &str) {
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// What is shown beside the unit.
pub fn status(status: &str) {
    let _ = sd_notify::notify(&[NotifyState::Status(status)]);
}

/// About to end.
pub fn stopping(status: &str) {
    let _ = sd_notify::notify(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Pings systemd's watchdog, if there is one, for as long as `lives` says so of the time given to it.
pub fn watchdog(lives: impl Fn(Duration) -> bool + Send + 'static) -> Result<()> {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return Ok(());
    };
    let ping = move || loop {
        if lives(limit / 2) {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
        thread::sleep(limit / 4);
    };
    // Ends with the process.
    thread::Builder::new().name("watchdog".into()).spawn(ping)?;
    Ok(())
}

/// When a loop last went round.
pub struct Pulse {
    start: Instant,
    /// Milliseconds after `start`; 0 if never.
    last: AtomicU64,
}

impl Default for Pulse {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            last: AtomicU64::new(0),
        }
    }
}

impl Pulse {
    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// Now.
    pub fn beat(&self) {
        self.last.store(self.now().max(1), Ordering::Relaxed);
    }

    /// Whether it did within `limit`. A loop that has not begun is not late.
    pub fn beats(&self, limit: Duration) -> bool {
        match self.last.load(Ordering::Relaxed) {
            0 => true,
            last => self.now().saturating_sub(last) <= limit.as_millis() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pulse() {
        let pulse = Pulse::default();
        assert!(pulse.beats(Duration::ZERO), "not begun");
        pulse.beat();
        assert!(pulse.beats(Duration::from_secs(10)));
        thread::sleep(Duration::from_millis(30));
        assert!(!pulse.beats(Duration::from_millis(10)));
    }
}
