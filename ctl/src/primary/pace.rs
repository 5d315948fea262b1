// SPDX-License-Identifier: GPL-2.0

//! When to end an epoch.

use std::fmt;
use std::time::Duration;

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
    /// So that what waits for a reply waits about this much longer than without protection.
    Latency {
        /// The time that is added to a reply, on average.
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
