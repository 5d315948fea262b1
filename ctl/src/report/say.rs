// SPDX-License-Identifier: GPL-2.0-or-later

//! What is said in words: to a person on standard error, or to the journal if that is the journal, with
//! the fields `DOMAIN`, `EPOCH` and `PEER`.

use std::fmt::Arguments;
use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock, TryLockError};

use log::{Level, Record};
use systemd_journal_logger::{connected_to_journal, JournalLog};

use crate::report::live::Shared;

/// What this process is about.
static SUBJECT: Mutex<Option<(String, Shared)>> = Mutex::new(None);

/// From now on, all that is said is about `domain`, whose state is in `live`.
pub fn about(domain: &str, live: &Shared) {
    if let Ok(mut subject) = SUBJECT.lock() {
        *subject = Some((domain.to_owned(), Arc::clone(live)));
    }
}

/// Says something.
pub fn say(text: Arguments<'_>) {
    tell(Level::Info, text);
}

/// Says why something failed.
pub fn error(text: Arguments<'_>) {
    tell(Level::Error, text);
}

fn tell(level: Level, text: Arguments<'_>) {
    static JOURNAL: OnceLock<Option<JournalLog>> = OnceLock::new();
    let journal = JOURNAL.get_or_init(|| match connected_to_journal() {
        true => JournalLog::new().ok(),
        false => None,
    });
    let told = journal.as_ref().is_some_and(|journal| {
        let fields = fields();
        let record = Record::builder()
            .level(level)
            .target("remusctl")
            .args(text)
            .key_values(&fields)
            .build();
        journal.journal_send(&record).is_ok()
    });
    if !told {
        let _ = writeln!(std::io::stderr(), "remusctl: {text}");
    }
}

/// The journal's fields.
fn fields() -> Vec<(&'static str, String)> {
    let mut fields = Vec::new();
    if let Some((domain, live)) = SUBJECT.lock().ok().as_deref().and_then(Option::as_ref) {
        fields.push(("DOMAIN", domain.clone()));
        // Whoever speaks may hold it, and a message is worth more than its epoch.
        let live = match live.try_lock() {
            Ok(live) => Some(live),
            Err(TryLockError::Poisoned(live)) => Some(live.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if let Some(live) = live {
            if live.epoch > 0 {
                fields.push(("EPOCH", live.epoch.to_string()));
            }
            fields.extend(live.peer.clone().map(|peer| ("PEER", peer)));
        }
    }
    fields
}

/// Says something to the person who started this, or to the journal.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => { $crate::report::say::say(format_args!($($arg)*)) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::stream::lock;

    #[test]
    fn what_the_journal_gets() {
        let live = Shared::default();
        about("web", &live);
        lock(&live).epoch = 3;
        lock(&live).peer = Some("beta".into());
        let want = [("DOMAIN", "web"), ("EPOCH", "3"), ("PEER", "beta")];
        let got = fields();
        let got: Vec<_> = got.iter().map(|(k, v)| (*k, v.as_str())).collect();
        assert_eq!(got, want);
        // Not even whoever holds it is kept from speaking.
        let held = lock(&live);
        assert_eq!(fields().len(), 1);
        drop(held);
    }
}
