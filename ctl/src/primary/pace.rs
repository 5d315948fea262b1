// SPDX-License-Identifier: GPL-2.0-or-later

//! When to end an epoch.

use std::fmt;
use std::time::{Duration, Instant};

/// Shortest and longest time between two epochs that a stated delay may lead to.
const SHORTEST: Duration = Duration::from_millis(5);
const LONGEST: Duration = Duration::from_secs(2);
/// What a stated delay begins with.
const FIRST: Duration = Duration::from_millis(25);
/// Most time that output waits for more of it before it ends an epoch.
const LINGER: Duration = Duration::from_millis(25);
/// A guest whose pauses are long gets as much time of its own, up to this.
const OWN_TIME: Duration = Duration::from_millis(100);

/// What decides when the next epoch ends. It can be changed while a guest is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// So long after the last one.
    Fixed(Duration),
    /// As soon as the guest has sent something (Kemari's way), but not sooner than `floor` after the
    /// last one. A guest that sends nothing is let alone until it has written very much.
    OnOutput {
        /// Least time between two.
        floor: Duration,
    },
    /// So that the first that the guest sends in an epoch is held for about this long.
    Latency {
        /// The time that is added to a reply.
        target: Duration,
    },
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(interval) => write!(f, "every {} ms", interval.as_millis()),
            Self::OnOutput { floor } => {
                write!(f, "on output, at least {} ms apart", floor.as_millis())
            }
            Self::Latency { target } => {
                write!(f, "so that replies take {} ms longer", target.as_millis())
            }
        }
    }
}

/// Decides when the next epoch ends, by a [`Pace`] and by how the last ones went.
#[derive(Clone, Copy, Debug)]
pub struct Pacer {
    pace: Pace,
    /// When the last pause began.
    begin: Instant,
    /// Not before: a guest whose pauses take as long as the interval still has to get somewhere.
    least: Instant,
    /// Time between two epochs for [`Pace::Latency`].
    adapted: Duration,
    /// How long output waits for more: a guest acknowledges a request before it answers it, and if each had an
    /// epoch of its own, the answer would wait for two pauses.
    linger: Duration,
}

impl Pacer {
    /// Begins with `pace`.
    pub fn new(pace: Pace) -> Self {
        let now = Instant::now();
        Self {
            pace,
            begin: now,
            least: now,
            adapted: FIRST,
            linger: Duration::ZERO,
        }
    }

    /// What was last asked for.
    pub fn pace(&self) -> Pace {
        self.pace
    }

    /// Another pace from now on.
    pub fn set(&mut self, pace: Pace) {
        self.pace = pace;
    }

    /// Time from one epoch to the next that is aimed at.
    pub fn interval(&self) -> Duration {
        match self.pace {
            Pace::Fixed(interval) => interval,
            Pace::OnOutput { floor } => floor,
            Pace::Latency { .. } => self.adapted,
        }
    }

    /// The guest was paused at `begin`, for so long. Returns whether that, and not what was asked for,
    /// decides when the next epoch may end.
    pub fn paused(&mut self, begin: Instant, pause: Duration) -> bool {
        let own = match self.pace {
            Pace::Fixed(interval) => pause.min(interval),
            Pace::OnOutput { .. } | Pace::Latency { .. } => pause.min(OWN_TIME),
        };
        self.begin = begin;
        self.linger = (pause / 4).min(LINGER);
        self.least = begin + pause + own;
        self.least > begin + self.interval()
    }

    /// When the next epoch has to end; never, if nothing asks for it. `output`: since when packets wait.
    pub fn due(&self, output: Option<Instant>) -> Option<Instant> {
        let regular = self.least.max(self.begin + self.interval());
        match (self.pace, output) {
            (Pace::OnOutput { .. }, None) => None,
            (Pace::OnOutput { .. }, Some(since)) => Some(regular.max(since + self.linger)),
            _ => Some(regular),
        }
    }

    /// When the next epoch may end at the earliest, if there is a reason to hurry.
    pub fn least(&self) -> Instant {
        self.least
    }

    /// An epoch was committed whose first packet was held for so long.
    pub fn held(&mut self, hold: Duration) {
        if let Pace::Latency { target } = self.pace {
            let off = (target.as_secs_f64() - hold.as_secs_f64()) / 4.0;
            let next = (self.adapted.as_secs_f64() + off).clamp(0.0, 1e6);
            self.adapted = Duration::from_secs_f64(next).clamp(SHORTEST, LONGEST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn fixed() {
        let mut pacer = Pacer::new(Pace::Fixed(20 * MS));
        let begin = Instant::now();
        assert!(!pacer.paused(begin, 5 * MS));
        assert_eq!(pacer.due(None), Some(begin + 20 * MS));
        assert!(
            pacer.paused(begin, 15 * MS),
            "half of the time is the guest's"
        );
        assert_eq!(pacer.due(None), Some(begin + 30 * MS));
        assert!(pacer.paused(begin, 100 * MS));
        assert_eq!(pacer.due(None), Some(begin + 120 * MS));
    }

    #[test]
    fn on_output() {
        let mut pacer = Pacer::new(Pace::OnOutput { floor: 10 * MS });
        let begin = Instant::now();
        pacer.paused(begin, MS);
        assert_eq!(pacer.due(None), None);
        assert_eq!(pacer.due(Some(begin)), Some(begin + 10 * MS));
        pacer.paused(begin, 8 * MS);
        assert_eq!(pacer.due(Some(begin)), Some(begin + 16 * MS));
        // The answer may follow what was sent first.
        let late = begin + 50 * MS;
        assert_eq!(pacer.due(Some(late)), Some(late + 2 * MS));
        pacer.paused(begin, 300 * MS);
        let late = begin + 900 * MS;
        assert_eq!(pacer.due(Some(late)), Some(late + LINGER));
    }

    /// A client that sends the next request when it has its reply waits for one interval, or for half of
    /// one and the way to the standby if it sends when it likes.
    #[test]
    fn latency_is_met() {
        for (target, share, way) in [(40, 1.0, 0), (40, 0.5, 12), (7, 1.0, 3), (500, 1.0, 30)] {
            let mut pacer = Pacer::new(Pace::Latency {
                target: target * MS,
            });
            let mut hold = Duration::ZERO;
            for _ in 0..100 {
                hold = pacer.interval().mul_f64(share) + way * MS;
                pacer.held(hold);
            }
            let off = hold.as_secs_f64() / (target * MS).as_secs_f64();
            assert!((0.95..1.25).contains(&off), "{target} ms: {hold:?}");
        }
        // What cannot be met comes as near as it gets.
        let mut pacer = Pacer::new(Pace::Latency { target: MS });
        (0..100).for_each(|_| pacer.held(30 * MS));
        assert_eq!(pacer.interval(), SHORTEST);
        (0..100).for_each(|_| pacer.held(Duration::ZERO));
        assert!(pacer.interval() > SHORTEST);
    }
}
