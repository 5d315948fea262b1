// SPDX-License-Identifier: GPL-2.0-or-later

//! What a controller says of itself: one [`Report`], through which all of it goes.
//!
//! | who listens | by |
//! |---|---|
//! | a person at a terminal | [`bar`], during the first copy |
//! | a person, the journal | [`say!`](crate::say), [`say`] |
//! | `status`, `top`, `set` and the like | the socket of [`live`] |
//! | `events` | the same socket, which [`listeners`] feed |
//! | a file | [`trace`] |
//! | Prometheus | [`metrics`] |
//! | systemd | [`service`] |

pub mod bar;
pub mod listeners;
pub mod live;
pub mod metrics;
pub mod say;
pub mod seats;
pub mod service;
pub mod trace;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;
use serde_json::{json, Map, Value};

use crate::peer::stream::lock;
use crate::report::bar::Bar;
use crate::report::listeners::{Events, Listeners};
use crate::report::live::{PageKinds, Progress, Shared};
use crate::report::metrics::Metrics;
use crate::report::service::Pulse;
use crate::report::trace::{unix_ms, Lines};

/// Time over which rates are taken.
const SPAN: Duration = Duration::from_secs(2);

/// A committed epoch on the primary. Times are in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Epoch {
    /// Its number.
    pub epoch: u64,
    /// Since the last seal.
    pub interval_ms: Option<f64>,
    /// How long the guest stood still.
    pub pause_ms: f64,
    /// Of that, until it stood.
    pub stop_ms: f64,
    /// Of that, sealing.
    pub seal_ms: f64,
    /// Of that, copying its pages, if they are copied in the pause.
    pub copy_ms: f64,
    /// Of that, saving the devices' state.
    pub save_ms: f64,
    /// Of that, until it ran again.
    pub cont_ms: f64,
    /// Its pages.
    pub dirty_pages: u64,
    /// Its bytes on the wire.
    pub bytes: u64,
    /// Packets that its commit released.
    pub packets: u64,
    /// From seal to commit.
    pub commit_lag_ms: f64,
    /// Epochs that were then sealed and not committed.
    pub in_flight: u64,
    /// What kept it from coming when it was due: `pause` or `replication`.
    pub limited_by: Option<&'static str>,
    /// Reading its pages.
    pub read_ms: f64,
    /// Encoding them.
    pub encode_ms: f64,
    /// Sending them.
    pub send_ms: f64,
    /// How many pages went out how.
    #[serde(flatten)]
    pub kinds: PageKinds,
}

/// An epoch that has been applied on the standby. Times are in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Applied {
    /// Its number.
    pub epoch: u64,
    /// Its pages.
    pub pages: u64,
    /// Its bytes.
    pub bytes: u64,
    /// From its first frame until it was whole.
    pub stage_ms: f64,
    /// Putting its pages into the memory.
    pub apply_ms: f64,
    /// Putting its changes into the images of disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks_ms: Option<f64>,
}

/// All that a controller says of itself. Clones are the same one.
#[derive(Clone, Default)]
pub struct Report {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    file: Option<Lines>,
    live: Shared,
    listeners: Listeners,
    metrics: Metrics,
    pulse: Pulse,
    bar: Bar,
    recent: Mutex<Recent>,
}

impl Report {
    /// Appends events to the file at `trace`, if there is one, too.
    pub fn open(trace: Option<&Path>) -> Result<Self> {
        let inner = Inner {
            file: trace.map(Lines::open).transpose()?,
            ..Inner::default()
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// What `status` shows.
    pub fn live(&self) -> &Shared {
        &self.inner.live
    }

    /// What Prometheus is told.
    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    /// Events from now on, until this is dropped or not read for too long.
    pub fn listen(&self) -> Events {
        self.inner.listeners.listen()
    }

    /// Tells an event with the members of `fields`, an object.
    pub fn event(&self, event: &str, fields: Value) {
        if event == "takeover" {
            self.inner.metrics.take_over();
        }
        if self.inner.file.is_none() && self.inner.listeners.is_empty() {
            return;
        }
        let mut line = Map::new();
        line.insert("event".into(), event.into());
        line.insert("t_ms".into(), unix_ms().into());
        if let Value::Object(fields) = fields {
            line.extend(fields);
        }
        let line = format!("{}\n", Value::Object(line));
        if let Some(file) = &self.inner.file {
            file.write(&line);
        }
        self.inner.listeners.tell(&line);
    }

    /// How far the first copy is.
    pub fn copied(&self, progress: Progress) {
        self.inner.bar.show(&progress);
        lock(&self.inner.live).first_copy = Some(progress);
    }

    /// Tells of a committed epoch, in order.
    pub fn epoch(&self, epoch: &Epoch) {
        self.inner.bar.end();
        self.event("epoch", json!(epoch));
        self.inner.metrics.epoch(epoch);
        let rates = lock(&self.inner.recent).add(epoch.dirty_pages, epoch.bytes, epoch.interval_ms);
        let first = {
            let mut live = lock(&self.inner.live);
            live.epoch = epoch.epoch;
            live.epochs += 1;
            live.interval_reached_ms = epoch.interval_ms;
            live.pause_ms = Some(epoch.pause_ms);
            live.dirty_pages = Some(epoch.dirty_pages);
            live.commit_lag_ms = Some(epoch.commit_lag_ms);
            live.in_flight = Some(epoch.in_flight);
            live.limited_by = epoch.limited_by.map(str::to_owned);
            live.first_copy = None;
            live.add_kinds(&epoch.kinds);
            live.set_rates(&rates);
            live.epochs == 1
        };
        if first {
            service::ready(&format!("protected since epoch {}", epoch.epoch));
        }
    }

    /// Tells of an epoch that the standby has applied.
    pub fn applied(&self, applied: &Applied) {
        self.event("epoch", json!(applied));
        self.inner.metrics.applied(applied);
        let rates = lock(&self.inner.recent).add(applied.pages, applied.bytes, None);
        let mut live = lock(&self.inner.live);
        live.state = "replicating".into();
        live.epoch = applied.epoch;
        live.epochs += 1;
        live.dirty_pages = Some(applied.pages);
        live.set_rates(&rates);
    }

    /// The other host was heard just now.
    pub fn heard(&self) {
        lock(&self.inner.live).heard = Some(Instant::now());
    }

    /// The calling loop goes round. Once this was called, it has to be called again and again: systemd's
    /// watchdog is held off for as long as it is.
    pub fn alive(&self) {
        self.inner.pulse.beat();
    }

    /// Holds off systemd's watchdog, if there is one, for as long as [`Self::alive`] is called.
    pub fn start_watchdog(&self) -> Result<()> {
        let report = self.clone();
        service::watchdog(move |limit| report.inner.pulse.beats(limit))
    }
}

/// The last epochs.
#[derive(Default)]
struct Recent {
    epochs: VecDeque<(Instant, u64, u64)>,
}

/// How much there is in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Pages written.
    pub pages: Option<f64>,
    /// Bytes on the wire.
    pub bytes: Option<f64>,
    /// Bytes on the wire for each page of the last epoch.
    pub bytes_per_page: Option<f64>,
}

impl Recent {
    /// Adds an epoch that took `interval_ms`, if that is known.
    fn add(&mut self, pages: u64, bytes: u64, interval_ms: Option<f64>) -> Rates {
        self.add_at(Instant::now(), pages, bytes, interval_ms)
    }

    fn add_at(&mut self, now: Instant, pages: u64, bytes: u64, interval_ms: Option<f64>) -> Rates {
        self.epochs.push_back((now, pages, bytes));
        // What came before the span only says when it begins.
        while self.epochs.get(1).is_some_and(|e| now - e.0 > SPAN) {
            self.epochs.pop_front();
        }
        let (all_pages, all_bytes) = self
            .epochs
            .iter()
            .skip(1)
            .fold((0, 0), |sum, e| (sum.0 + e.1, sum.1 + e.2));
        let passed = self
            .epochs
            .front()
            .map_or(0.0, |e| (now - e.0).as_secs_f64());
        let (span, sum_pages, sum_bytes) = match interval_ms {
            // The only one.
            Some(ms) if self.epochs.len() == 1 => (ms / 1000.0, pages, bytes),
            _ => (passed, all_pages, all_bytes),
        };
        let per_second = |sum: u64| (span > 0.0).then(|| sum as f64 / span);
        Rates {
            pages: per_second(sum_pages),
            bytes: per_second(sum_bytes),
            bytes_per_page: (pages > 0).then(|| bytes as f64 / pages as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The names that tests/demo/report.py and others read.
    #[test]
    fn trace_fields() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        let report = Report::open(Some(&path)).unwrap();
        let events = report.listen();
        report.epoch(&Epoch {
            epoch: 7,
            interval_ms: Some(100.0),
            kinds: PageKinds {
                zero: 1,
                delta: 2,
                ..PageKinds::default()
            },
            ..Epoch::default()
        });
        let text = fs::read_to_string(&path).unwrap();
        let line: Value = serde_json::from_str(&text).unwrap();
        let names: Vec<_> = line.as_object().unwrap().keys().cloned().collect();
        for name in [
            "event",
            "t_ms",
            "epoch",
            "interval_ms",
            "pause_ms",
            "stop_ms",
            "seal_ms",
            "copy_ms",
            "save_ms",
            "cont_ms",
            "dirty_pages",
            "bytes",
            "packets",
            "commit_lag_ms",
            "in_flight",
            "limited_by",
            "read_ms",
            "encode_ms",
            "send_ms",
            "zero",
            "unchanged",
            "delta",
            "packed",
            "lz4",
            "raw",
        ] {
            assert!(names.iter().any(|n| n == name), "{name} in {names:?}");
        }
        assert_eq!(names.len(), 25, "{names:?}");
        assert_eq!(*events.next(Duration::ZERO).unwrap().unwrap(), text);
        let live = lock(report.live());
        assert_eq!((live.epoch, live.epochs), (7, 1));
        assert_eq!(live.pages.unwrap().delta, 2);
    }

    #[test]
    fn rates() {
        let mut recent = Recent::default();
        let begin = Instant::now();
        let first = recent.add_at(begin, 100, 4096 * 50, Some(100.0));
        assert_eq!(first.pages, Some(1000.0));
        assert_eq!(first.bytes_per_page, Some(2048.0));
        let later = begin + Duration::from_millis(20);
        let second = recent.add_at(later, 100, 1000, Some(20.0));
        assert!(
            second.pages.is_some_and(|r| (r - 5000.0).abs() < 1.0),
            "{second:?}"
        );
        assert_eq!(Recent::default().add(0, 0, None), Rates::default());
    }
}
