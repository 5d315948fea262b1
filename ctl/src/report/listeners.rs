// SPDX-License-Identifier: GPL-2.0-or-later

//! Who hears events as they happen. Whoever is slow is left behind: no epoch waits for a listener.

use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::peer::stream::lock;

/// Most events that wait for a listener.
const BACKLOG: usize = 1024;

/// All listeners.
#[derive(Default)]
pub struct Listeners(Mutex<Vec<SyncSender<Arc<str>>>>);

/// What one of them hears.
pub struct Events(mpsc::Receiver<Arc<str>>);

/// A listener was too slow, and hears nothing more.
#[derive(Debug)]
pub struct LeftBehind;

impl Listeners {
    /// A new one.
    pub fn listen(&self) -> Events {
        let (sender, receiver) = mpsc::sync_channel(BACKLOG);
        lock(&self.0).push(sender);
        Events(receiver)
    }

    /// Whether nobody listens.
    pub fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }

    /// Tells all of them. Never waits.
    pub fn tell(&self, line: &str) {
        let mut all = lock(&self.0);
        if !all.is_empty() {
            let line: Arc<str> = line.into();
            all.retain(|listener| listener.try_send(Arc::clone(&line)).is_ok());
        }
    }
}

impl Events {
    /// The next event, a line; nothing if none comes in time.
    pub fn next(&self, patience: Duration) -> Result<Option<Arc<str>>, LeftBehind> {
        match self.0.recv_timeout(patience) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(LeftBehind),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slow_are_left_behind() {
        let all = Listeners::default();
        all.tell("nobody\n");
        let (slow, gone) = (all.listen(), all.listen());
        drop(gone);
        for _ in 0..=BACKLOG {
            all.tell("x\n");
        }
        assert!(all.is_empty());
        for _ in 0..BACKLOG {
            assert_eq!(&*slow.next(Duration::ZERO).unwrap().unwrap(), "x\n");
        }
        assert!(slow.next(Duration::ZERO).is_err());
    }
}
