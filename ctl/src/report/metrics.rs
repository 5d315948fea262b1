// SPDX-License-Identifier: GPL-2.0-or-later

//! Metrics for Prometheus, as OpenMetrics text over HTTP.

use std::borrow::Cow;
use std::fmt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{exponential_buckets, Histogram};
use prometheus_client::registry::{Registry, Unit};

use crate::peer::stream::lock;
use crate::report::live::{Live, PageKinds};
use crate::report::seats::Seats;
use crate::report::{Applied, Epoch, Report};

/// How long a client may take, all in all.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest request.
const REQUEST_MAX: usize = 4096;
/// Most clients at once.
const CLIENTS: usize = 8;

type Label = [(&'static str, &'static str); 1];

/// What is counted. Clones are the same.
#[derive(Clone)]
pub struct Metrics {
    pause: Histogram,
    lag: Histogram,
    interval: Histogram,
    epochs: Counter,
    pages: Family<Label, Counter>,
    bytes: Counter,
    packets: Counter,
    takeovers: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        // From a quarter of a millisecond to eight seconds.
        let times = || Histogram::new(exponential_buckets(0.000_25, 2.0, 16));
        Self {
            pause: times(),
            lag: times(),
            interval: times(),
            epochs: Counter::default(),
            pages: Family::default(),
            bytes: Counter::default(),
            packets: Counter::default(),
            takeovers: Counter::default(),
        }
    }
}

impl Metrics {
    /// Counts a committed epoch.
    pub fn epoch(&self, epoch: &Epoch) {
        self.pause.observe(epoch.pause_ms / 1000.0);
        self.lag.observe(epoch.commit_lag_ms / 1000.0);
        if let Some(interval) = epoch.interval_ms {
            self.interval.observe(interval / 1000.0);
        }
        self.packets.inc_by(epoch.packets);
        self.add(epoch.bytes);
        let PageKinds {
            zero,
            unchanged,
            delta,
            packed,
            lz4,
            raw,
        } = epoch.kinds;
        let kinds = [
            ("zero", zero),
            ("unchanged", unchanged),
            ("delta", delta),
            ("packed", packed),
            ("lz4", lz4),
            ("raw", raw),
        ];
        for (kind, count) in kinds {
            self.pages.get_or_create(&[("kind", kind)]).inc_by(count);
        }
    }

    /// Counts an applied epoch.
    pub fn applied(&self, applied: &Applied) {
        self.add(applied.bytes);
        self.pages
            .get_or_create(&[("kind", "applied")])
            .inc_by(applied.pages);
    }

    fn add(&self, bytes: u64) {
        self.epochs.inc();
        self.bytes.inc_by(bytes);
    }

    /// Counts a take-over.
    pub fn take_over(&self) {
        self.takeovers.inc();
    }

    /// All of it, and what `live` says, as OpenMetrics text.
    pub fn text(&self, domain: &str, live: &Live) -> Result<String, fmt::Error> {
        let label =
            |name: &'static str, value: &str| (Cow::Borrowed(name), Cow::Owned(value.to_owned()));
        let labels = [label("domain", domain), label("role", &live.role)];
        let mut registry = Registry::with_prefix_and_labels("remus", labels.into_iter());
        let all = &mut registry;
        let seconds = || Unit::Seconds;
        all.register_with_unit(
            "pause",
            "How long the guest stood still for an epoch",
            seconds(),
            self.pause.clone(),
        );
        all.register_with_unit(
            "commit_lag",
            "From the seal of an epoch to its commit",
            seconds(),
            self.lag.clone(),
        );
        all.register_with_unit(
            "epoch_interval",
            "From seal to seal",
            seconds(),
            self.interval.clone(),
        );
        all.register(
            "epochs",
            "Epochs that the standby holds, since the start",
            self.epochs.clone(),
        );
        all.register(
            "pages",
            "Pages sent, by how they were encoded, or applied",
            self.pages.clone(),
        );
        all.register_with_unit(
            "wire",
            "Bytes of epochs on the wire",
            Unit::Bytes,
            self.bytes.clone(),
        );
        all.register(
            "packets_released",
            "Packets that commits have released",
            self.packets.clone(),
        );
        all.register(
            "takeovers",
            "Take-overs by this process",
            self.takeovers.clone(),
        );
        let mut gauge = |name: &str, help: &str, value: u64| {
            let gauge = Gauge::<i64>::default();
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
            all.register(name, help, gauge);
        };
        gauge(
            "epoch",
            "The newest epoch that the standby holds",
            live.epoch,
        );
        gauge(
            "epochs_in_flight",
            "Epochs sealed and not committed",
            live.in_flight.unwrap_or(0),
        );
        gauge(
            "dirty_pages",
            "Pages of the last epoch",
            live.dirty_pages.unwrap_or(0),
        );
        gauge(
            "alone",
            "1 if the guest runs on without a standby",
            live.alone.into(),
        );
        gauge(
            "protected",
            "1 if the standby could take over now",
            live.is_protected().into(),
        );
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// Serves the metrics of `domain` until the process ends. Returns the address, as `address` may leave
/// the port to the kernel.
pub fn serve(address: SocketAddr, domain: &str, report: &Report) -> Result<SocketAddr> {
    let listener = TcpListener::bind(address).with_context(|| {
        format!("cannot serve metrics on {address}: choose another with --metrics ADDR:PORT")
    })?;
    let address = listener.local_addr()?;
    let (domain, report) = (Arc::<str>::from(domain), report.clone());
    let accept = move || {
        let seats = Seats::new(CLIENTS);
        for client in listener.incoming() {
            let (Ok(client), Some(seat)) = (client, seats.take()) else {
                // Also when there are no file descriptors left, which may take a while.
                thread::sleep(Duration::from_millis(10));
                continue;
            };
            let (domain, report) = (Arc::clone(&domain), report.clone());
            let work = move || {
                let _ = answer(client, &domain, &report);
                drop(seat);
            };
            let _ = thread::Builder::new().name("scrape".into()).spawn(work);
        }
    };
    thread::Builder::new()
        .name("metrics".into())
        .spawn(accept)?;
    Ok(address)
}

/// Answers one request, and closes.
fn answer(mut client: TcpStream, domain: &str, report: &Report) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || request.len() > REQUEST_MAX {
            return Ok(());
        }
        client.set_read_timeout(Some(left))?;
        let mut piece = [0; 512];
        match client.read(&mut piece)? {
            0 => return Ok(()),
            n => request.extend_from_slice(piece.get(..n).unwrap_or(&[])),
        }
    }
    let head = String::from_utf8_lossy(&request);
    let mut words = head.split_whitespace();
    let asked = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let (status, kind, body) = match asked {
        ("GET", "/metrics") => {
            let live = lock(report.live()).clone();
            let text = report.metrics().text(domain, &live)?;
            (
                "200 OK",
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                text,
            )
        }
        ("GET", _) => (
            "404 Not Found",
            "text/plain",
            "metrics are at /metrics\n".into(),
        ),
        _ => ("405 Method Not Allowed", "text/plain", "only GET\n".into()),
    };
    client.set_write_timeout(Some(PATIENCE))?;
    let answer = format!(
        "HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    client.write_all(answer.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        // It may have heard enough before the end.
        let _ = stream.write_all(request);
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    }

    #[test]
    fn over_http() {
        let report = Report::default();
        {
            let mut live = lock(report.live());
            (live.role, live.state) = ("primary".into(), "replicating".into());
        }
        let address = serve("127.0.0.1:0".parse().unwrap(), "web", &report).unwrap();
        report.epoch(&Epoch {
            epoch: 5,
            interval_ms: Some(100.0),
            pause_ms: 3.0,
            bytes: 1000,
            kinds: PageKinds {
                delta: 9,
                ..PageKinds::default()
            },
            ..Epoch::default()
        });
        report.event("takeover", serde_json::json!({}));
        let silent = TcpStream::connect(address).unwrap();
        let text = ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(text.starts_with("HTTP/1.0 200 OK\r\n"), "{text}");
        let both = "domain=\"web\",role=\"primary\"";
        for line in [
            "# TYPE remus_pause_seconds histogram",
            &format!("remus_pause_seconds_bucket{{{both},le=\"0.004\"}} 1"),
            &format!("remus_pause_seconds_count{{{both}}} 1"),
            &format!("remus_commit_lag_seconds_count{{{both}}} 1"),
            &format!("remus_epoch_interval_seconds_count{{{both}}} 1"),
            &format!("remus_epochs_total{{{both}}} 1"),
            &format!("remus_wire_bytes_total{{{both}}} 1000"),
            &format!("remus_pages_total{{{both},kind=\"delta\"}} 9"),
            &format!("remus_takeovers_total{{{both}}} 1"),
            &format!("remus_epoch{{{both}}} 5"),
            &format!("remus_alone{{{both}}} 0"),
            &format!("remus_protected{{{both}}} 1"),
            "# EOF",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
        assert!(ask(address, b"GET / HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 404"));
        assert!(ask(address, b"POST /metrics HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 405"));
        // Rubbish and silence are dropped in the end, and harm nobody.
        assert_eq!(ask(address, &vec![b'x'; 3 * REQUEST_MAX]), "");
        drop(silent);
    }
}
