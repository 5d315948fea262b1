// SPDX-License-Identifier: GPL-2.0-or-later

//! How many clients are served at once: each has a thread, and nobody who connects often may take all
//! threads there are.

use std::sync::Arc;

/// A number of seats.
pub struct Seats {
    token: Arc<()>,
    most: usize,
}

/// One of them, taken until it is dropped.
pub struct Seat {
    _token: Arc<()>,
}

impl Seats {
    /// So many.
    pub fn new(most: usize) -> Self {
        Self {
            token: Arc::new(()),
            most,
        }
    }

    /// Takes one, if one is free. To be called by one thread.
    pub fn take(&self) -> Option<Seat> {
        (Arc::strong_count(&self.token) <= self.most).then(|| Seat {
            _token: Arc::clone(&self.token),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_there_are() {
        let seats = Seats::new(2);
        let one = seats.take().unwrap();
        let _two = seats.take().unwrap();
        assert!(seats.take().is_none());
        drop(one);
        assert!(seats.take().is_some());
    }
}
