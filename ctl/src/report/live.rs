// SPDX-License-Identifier: GPL-2.0-or-later

//! The Unix socket of a running `protect` or `standby`, in the run directory: a request is a line of JSON,
//! and so is its answer.
//!
//! ```text
//! {"do":"status"}                               → {"ok":{"role":"primary", …}}
//! {"do":"set","pace":{"interval-ms":50}}        → {"ok":"…"} or {"error":"…"}
//! {"do":"set","pace":{"on-output":{"floor-ms":10}}}
//! {"do":"set","pace":{"target-latency-ms":20}}
//! {"do":"failover"}
//! {"do":"unprotect"}
//! {"do":"events"}                               → {"ok":"…"}, then events, until the client leaves
//! ```
//!
//! The socket is also what keeps a second controller away from the same domain.

use std::fs::{self, DirBuilder};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use crate::peer::stream::lock;
use crate::primary::pace::Pace;
use crate::report::seats::Seats;
use crate::report::trace::ms;
use crate::report::{Rates, Report};

/// Most clients at once.
const CLIENTS: usize = 32;
/// Longest request, in bytes.
const REQUEST_MAX: u64 = 4096;
/// How long a client may take to say what it wants, and to take a piece of the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a planned switch may take.
const FAILOVER: Duration = Duration::from_secs(60);
/// How long the other orders may take.
const ORDER: Duration = Duration::from_secs(10);

/// How many pages went out how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PageKinds {
    /// All bytes 0.
    pub zero: u64,
    /// As the standby has it.
    pub unchanged: u64,
    /// As the difference from what the standby has.
    pub delta: u64,
    /// As that difference, compressed.
    pub packed: u64,
    /// Compressed.
    pub lz4: u64,
    /// As it is.
    pub raw: u64,
}

/// How much of the changes of disks is held on the primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct DiskLevel {
    /// Bytes.
    pub held: u64,
    /// Most bytes that are held: the guest's writes wait then.
    pub bound: u64,
    /// Changes that wait.
    pub waiting: usize,
}

/// How far the first copy is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Progress {
    /// It is the disks that are copied, in chunks of 64 KiB in the place of pages.
    pub disks: bool,
    /// Which pass over the memory this is, from 1.
    pub pass: u64,
    /// Pages sent in this pass.
    pub pages_done: u64,
    /// Pages of this pass.
    pub pages_total: u64,
    /// Bytes sent in a second.
    pub bytes_per_s: f64,
    /// How long it will take, if nothing changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<f64>,
}

impl Progress {
    /// What is copied.
    pub fn what(&self) -> String {
        match self.disks {
            true => "disks".to_owned(),
            false => format!("pass {}", self.pass),
        }
    }
}

/// What a running controller does. Times are in milliseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Live {
    /// `primary` or `standby`.
    pub role: String,
    /// Where it is in its life, such as `replicating`, `waiting`, `taken-over`.
    pub state: String,
    /// Process that says this.
    pub pid: u32,
    /// The other host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// `tls` or `plain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secured: Option<String>,
    /// When the other host was last heard.
    #[serde(skip)]
    pub heard: Option<Instant>,
    /// How long that is ago. Filled in when somebody asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heard_ms_ago: Option<f64>,
    /// The guest runs on without a standby, and nothing is held.
    pub alone: bool,
    /// Name that the domain has on the primary, if it is another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protects: Option<String>,
    /// The newest epoch that the standby holds.
    pub epoch: u64,
    /// How many epochs that was since the start.
    pub epochs: u64,
    /// What decides when an epoch ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pace: Option<String>,
    /// The interval reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval_reached_ms: Option<f64>,
    /// What keeps epochs from coming when they are due: `pause`, or `replication`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limited_by: Option<String>,
    /// How long the guest stood still for the last epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause_ms: Option<f64>,
    /// Pages of the last epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_pages: Option<u64>,
    /// From seal to commit of the last epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit_lag_ms: Option<f64>,
    /// Epochs sealed and not acknowledged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<u64>,
    /// How far the first copy is, while it is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_copy: Option<Progress>,
    /// Changes of disks that the standby does not have in its images yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<DiskLevel>,
    /// Pages of epochs in a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_pages_per_s: Option<f64>,
    /// Bytes of epochs on the wire in a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wire_bytes_per_s: Option<f64>,
    /// Bytes of the last epoch on the wire, for each of its pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_page: Option<f64>,
    /// How many pages went out how, since the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pages: Option<PageKinds>,
    /// The silence after which the other host counts as dead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<f64>,
    /// The virtual machine's process, if this one started it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<u32>,
}

/// A [`Live`] that several threads keep up to date.
pub type Shared = Arc<Mutex<Live>>;

impl Live {
    /// Whether the standby could take over now.
    pub fn is_protected(&self) -> bool {
        self.state == "replicating" && self.epochs > 0 && !self.alone
    }

    /// Adds pages of an epoch.
    pub fn add_kinds(&mut self, kinds: &PageKinds) {
        let all = self.pages.get_or_insert_default();
        all.zero += kinds.zero;
        all.unchanged += kinds.unchanged;
        all.delta += kinds.delta;
        all.packed += kinds.packed;
        all.lz4 += kinds.lz4;
        all.raw += kinds.raw;
    }

    /// Sets what there is in a second.
    pub fn set_rates(&mut self, rates: &Rates) {
        self.dirty_pages_per_s = rates.pages.map(f64::round);
        self.wire_bytes_per_s = rates.bytes.map(f64::round);
        self.bytes_per_page = rates.bytes_per_page.map(f64::round);
    }

    /// As it is at this moment.
    fn now(&self) -> Self {
        Self {
            heard_ms_ago: self.heard.map(|heard| ms(heard.elapsed())),
            ..self.clone()
        }
    }
}

/// A pace, as requests name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum PaceName {
    IntervalMs(u64),
    #[serde(rename_all = "kebab-case")]
    OnOutput {
        floor_ms: u64,
    },
    TargetLatencyMs(u64),
}

impl From<Pace> for PaceName {
    fn from(pace: Pace) -> Self {
        let millis = |d: Duration| d.as_millis() as u64;
        match pace {
            Pace::Fixed(interval) => Self::IntervalMs(millis(interval)),
            Pace::OnOutput { floor } => Self::OnOutput {
                floor_ms: millis(floor),
            },
            Pace::Latency { target } => Self::TargetLatencyMs(millis(target)),
        }
    }
}

impl TryFrom<PaceName> for Pace {
    type Error = String;

    fn try_from(name: PaceName) -> Result<Self, String> {
        let span = |ms: u64| match ms {
            1..=3_600_000 => Ok(Duration::from_millis(ms)),
            _ => Err(format!(
                "{ms} ms is no pace: it has to be from 1 to 3600000"
            )),
        };
        Ok(match name {
            PaceName::IntervalMs(ms) => Self::Fixed(span(ms)?),
            PaceName::OnOutput { floor_ms } => Self::OnOutput {
                floor: span(floor_ms)?,
            },
            PaceName::TargetLatencyMs(ms) => Self::Latency { target: span(ms)? },
        })
    }
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
enum Request {
    Status,
    Set { pace: PaceName },
    Failover,
    Unprotect,
    Events,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Ok(Value),
    Error(String),
}

/// What a running controller is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// End epochs by this from now on.
    Pace(Pace),
    /// Have the standby take over.
    Failover,
    /// End protection in good order.
    Unprotect,
}

/// That, and where the answer goes: what was done, or why it was not. Who asked may have gone.
pub struct Order {
    /// What to do.
    pub ask: Ask,
    /// Where the answer goes.
    pub reply: mpsc::Sender<Result<String, String>>,
}

/// Where the socket of `domain` is.
fn socket(run_dir: &Path, domain: &str) -> PathBuf {
    run_dir.join(format!("{domain}.sock"))
}

/// A socket that answers for a domain, until it is dropped.
pub struct Station {
    path: PathBuf,
}

impl Station {
    /// Opens the socket for `domain`, answers on it with what `report` says, and passes on what is to
    /// be done as `orders`. Fails if a running controller has it already.
    pub fn open(
        run_dir: &Path,
        domain: &str,
        report: &Report,
        orders: mpsc::Sender<Order>,
    ) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(run_dir)
            .with_context(|| format!("cannot create {}", run_dir.display()))?;
        let path = socket(run_dir, domain);
        let listener = match UnixListener::bind(&path) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => {
                // Whoever listens lives, even if it has no time to say more.
                if UnixStream::connect(&path).is_ok() {
                    let who = status(&path).map_or_else(
                        |_| "controller".to_owned(),
                        |other| format!("{}, process {}", other.role, other.pid),
                    );
                    bail!("{domain} already has a running {who} here: end it first");
                }
                // Its process was killed.
                fs::remove_file(&path)?;
                UnixListener::bind(&path)
            }
            other => other,
        };
        let listener = listener.with_context(|| format!("cannot open {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("cannot close {} to others", path.display()))?;
        let report = report.clone();
        let accept = move || {
            let seats = Seats::new(CLIENTS);
            for client in listener.incoming() {
                let (Ok(client), Some(seat)) = (client, seats.take()) else {
                    // Also when there are no file descriptors left, which may take a while.
                    thread::sleep(Duration::from_millis(10));
                    continue;
                };
                let (report, orders) = (report.clone(), orders.clone());
                let work = move || {
                    // Whoever does not want the answer needs none.
                    let _ = attend(client, &report, &orders);
                    drop(seat);
                };
                let _ = thread::Builder::new().name("client".into()).spawn(work);
            }
        };
        // Ends with the process.
        thread::Builder::new().name("status".into()).spawn(accept)?;
        Ok(Self { path })
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Serves one client: one request, one answer, and events if it wants them.
fn attend(mut client: UnixStream, report: &Report, orders: &mpsc::Sender<Order>) -> Result<()> {
    // For a moment, before its mode was set, the socket was open to more.
    let uid = socket_peercred(&client)?.uid;
    if !uid.is_root() && uid != geteuid() {
        bail!("not for user {}", uid.as_raw());
    }
    client.set_write_timeout(Some(PATIENCE))?;
    let line = match read_line(&client) {
        Ok(line) => line,
        Err(e) => return write(&mut client, &Answer::Error(format!("{e:#}"))),
    };
    let order = |ask, patience| match order(orders, ask, patience) {
        Ok(done) => Answer::Ok(done.into()),
        Err(why) => Answer::Error(why),
    };
    let answer = match serde_json::from_slice(&line) {
        Ok(Request::Status) => Answer::Ok(json!(lock(report.live()).now())),
        Ok(Request::Set { pace }) => match pace.try_into() {
            Ok(pace) => order(Ask::Pace(pace), ORDER),
            Err(why) => Answer::Error(why),
        },
        Ok(Request::Failover) => order(Ask::Failover, FAILOVER),
        Ok(Request::Unprotect) => order(Ask::Unprotect, ORDER),
        Ok(Request::Events) => return stream_events(client, report),
        Err(e) => Answer::Error(format!("not a request: {e}")),
    };
    write(&mut client, &answer)
}

/// Reads a line; a client that sends it byte by byte gets no more time than any other.
fn read_line(client: &UnixStream) -> Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    let mut line = Vec::new();
    let mut client = client;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("no request came in time");
        }
        client.set_read_timeout(Some(left))?;
        let mut piece = [0; 512];
        let n = client.read(&mut piece).context("no request came")?;
        line.extend_from_slice(piece.get(..n).unwrap_or(&[]));
        if n == 0 || line.contains(&b'\n') {
            return Ok(line);
        }
        if line.len() as u64 > REQUEST_MAX {
            bail!("the request is too long");
        }
    }
}

fn write(client: &mut UnixStream, answer: &Answer) -> Result<()> {
    let text = format!("{}\n", serde_json::to_string(answer)?);
    Ok(client.write_all(text.as_bytes())?)
}

/// Has the controller do something.
fn order(orders: &mpsc::Sender<Order>, ask: Ask, patience: Duration) -> Result<String, String> {
    let (reply, done) = mpsc::channel();
    let gone =
        || "this controller takes no orders now: see what it does with remusctl status".to_owned();
    orders.send(Order { ask, reply }).map_err(|_| gone())?;
    match done.recv_timeout(patience) {
        Ok(result) => result,
        Err(RecvTimeoutError::Disconnected) => Err(gone()),
        Err(RecvTimeoutError::Timeout) => Err(format!(
            "no answer within {} s; it may still come to be done: see remusctl status",
            patience.as_secs()
        )),
    }
}

/// Streams events until the client leaves, or is too slow.
fn stream_events(mut client: UnixStream, report: &Report) -> Result<()> {
    let events = report.listen();
    write(&mut client, &Answer::Ok("events follow".into()))?;
    loop {
        match events.next(Duration::from_millis(500)) {
            Ok(Some(line)) => client.write_all(line.as_bytes())?,
            Ok(None) => {
                let at_once = Timespec::default();
                let mut fds = [PollFd::new(&client, PollFlags::RDHUP)];
                if poll(&mut fds, Some(&at_once))? > 0 {
                    return Ok(());
                }
            }
            Err(_) => return Ok(()),
        }
    }
}

/// Sends a request and waits for the first line of the answer.
fn request(
    path: &Path,
    request: Request,
    patience: Duration,
) -> Result<(Value, BufReader<UnixStream>)> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(patience + PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let line = format!("{}\n", serde_json::to_string(&request)?);
    stream.write_all(line.as_bytes())?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    match serde_json::from_str(&line).context("its answer makes no sense")? {
        Answer::Ok(value) => Ok((value, reader)),
        Answer::Error(why) => Err(anyhow!(why)),
    }
}

fn status(path: &Path) -> Result<Live> {
    let (value, _) = request(path, Request::Status, PATIENCE)?;
    Ok(serde_json::from_value(value)?)
}

/// Has the controller of `domain` do something, and returns what it says of it.
pub fn command(run_dir: &Path, domain: &str, ask: Ask) -> Result<String> {
    let (what, patience) = match ask {
        Ask::Pace(pace) => (Request::Set { pace: pace.into() }, ORDER),
        Ask::Failover => (Request::Failover, FAILOVER),
        Ask::Unprotect => (Request::Unprotect, ORDER),
    };
    let (value, _) = reach(run_dir, domain, what, patience)?;
    Ok(value.as_str().unwrap_or("done").to_owned())
}

/// The events of `domain` from now on, one a line.
pub fn events(run_dir: &Path, domain: &str) -> Result<BufReader<UnixStream>> {
    let (_, reader) = reach(run_dir, domain, Request::Events, PATIENCE)?;
    reader.get_ref().set_read_timeout(None)?;
    Ok(reader)
}

fn reach(
    run_dir: &Path,
    domain: &str,
    what: Request,
    patience: Duration,
) -> Result<(Value, BufReader<UnixStream>)> {
    let path = socket(run_dir, domain);
    request(&path, what, patience).map_err(|e| {
        match e.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
            Some(ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                anyhow!("no controller of {domain} runs here: see remusctl status, or start it with remusctl protect or standby")
            }
            Some(ErrorKind::PermissionDenied) => {
                anyhow!("{} may not be opened: run it as root", path.display())
            }
            _ => e.context(format!("the controller of {domain}")),
        }
    })
}

/// What the controllers that run on this host say, by domain.
pub fn all(run_dir: &Path) -> Vec<(String, Live)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(run_dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.file_stem().map(|n| n.to_string_lossy().into_owned());
        if path.extension().is_some_and(|e| e == "sock") {
            if let (Some(name), Ok(live)) = (name, status(&path)) {
                found.push((name, live));
            }
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Epoch;

    fn open(dir: &Path, report: &Report) -> Result<(Station, mpsc::Receiver<Order>)> {
        let (sender, orders) = mpsc::channel();
        Ok((Station::open(dir, "web", report, sender)?, orders))
    }

    fn raw(dir: &Path, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(socket(dir, "web")).unwrap();
        // It may have heard enough before the end.
        let _ = stream.write_all(request);
        let mut line = String::new();
        let _ = BufReader::new(stream).read_line(&mut line);
        line
    }

    #[test]
    fn one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let report = Report::default();
        lock(report.live()).role = "standby".into();
        report.heard();
        let station = open(dir.path(), &report).unwrap();
        let error = open(dir.path(), &report).err().unwrap();
        assert!(
            error.to_string().contains("already has a running standby"),
            "{error}"
        );
        let (name, live) = all(dir.path()).remove(0);
        assert_eq!((name.as_str(), live.role.as_str()), ("web", "standby"));
        assert!(live.heard_ms_ago.is_some());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&socket(dir.path(), "web")), 0o600);
        drop(station);
        assert!(all(dir.path()).is_empty());
        // One that does not answer, but lives.
        let mute = UnixListener::bind(dir.path().join("web.sock")).unwrap();
        assert!(open(dir.path(), &report).is_err());
        drop(mute);
        fs::remove_file(dir.path().join("web.sock")).unwrap();
        // A socket whose process is gone is in nobody's way.
        drop(UnixListener::bind(dir.path().join("web.sock")).unwrap());
        open(dir.path(), &report).unwrap();
    }

    #[test]
    fn directory_is_closed_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("run");
        let _station = open(&inner, &Report::default()).unwrap();
        assert_eq!(
            fs::metadata(inner).unwrap().permissions().mode() & 0o777,
            0o700
        );
    }

    #[test]
    fn orders() {
        let dir = tempfile::tempdir().unwrap();
        let (_station, orders) = open(dir.path(), &Report::default()).unwrap();
        let paces = [
            Pace::Fixed(Duration::from_millis(50)),
            Pace::OnOutput {
                floor: Duration::from_millis(5),
            },
            Pace::Latency {
                target: Duration::from_millis(20),
            },
        ];
        let controller = thread::spawn(move || {
            for pace in paces {
                let order = orders.recv().unwrap();
                assert_eq!(order.ask, Ask::Pace(pace));
                order.reply.send(Ok(pace.to_string())).unwrap();
            }
            let order = orders.recv().unwrap();
            assert_eq!(order.ask, Ask::Failover);
            order
                .reply
                .send(Err("the standby is not ready".into()))
                .unwrap();
            assert_eq!(orders.recv().unwrap().ask, Ask::Unprotect);
        });
        for pace in paces {
            let said = command(dir.path(), "web", Ask::Pace(pace)).unwrap();
            assert_eq!(said, pace.to_string());
        }
        let error = command(dir.path(), "web", Ask::Failover).unwrap_err();
        assert!(format!("{error:#}").contains("not ready"), "{error:#}");
        // One that ends without a word, and one that has ended.
        let error = command(dir.path(), "web", Ask::Unprotect).unwrap_err();
        assert!(format!("{error:#}").contains("no orders"), "{error:#}");
        controller.join().unwrap();
        assert!(command(dir.path(), "web", Ask::Failover).is_err());
        let error = command(dir.path(), "db", Ask::Failover).unwrap_err();
        assert!(error.to_string().contains("no controller of db"), "{error}");
    }

    #[test]
    fn rubbish_and_silence_do_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let (_station, orders) = open(dir.path(), &Report::default()).unwrap();
        let silent: Vec<_> = (0..5)
            .map(|_| UnixStream::connect(socket(dir.path(), "web")).unwrap())
            .collect();
        for bad in [
            &b"rubbish\n"[..],
            b"{}\n",
            b"{\"do\":\"dance\"}\n",
            b"{\"do\":\"set\"}\n",
            b"{\"do\":\"set\",\"pace\":{\"interval-ms\":0}}\n",
            b"{\"do\":\"set\",\"pace\":{\"interval-ms\":-1}}\n",
            b"\xff\xfe\n",
            &[b'x'; 3 * REQUEST_MAX as usize],
        ] {
            let answer = raw(dir.path(), bad);
            assert!(
                answer.is_empty() || answer.starts_with("{\"error\":"),
                "{answer}"
            );
        }
        assert!(raw(dir.path(), b"{\"do\":\"status\"}\n").starts_with("{\"ok\":{"));
        assert!(orders.try_recv().is_err(), "nothing of it was an order");
        drop(silent);
    }

    #[test]
    fn events_follow() {
        let dir = tempfile::tempdir().unwrap();
        let report = Report::default();
        let (_station, _orders) = open(dir.path(), &report).unwrap();
        let mut reader = events(dir.path(), "web").unwrap();
        let slow = events(dir.path(), "web").unwrap();
        report.event("hello", json!({"x": 1}));
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&event["event"], &event["x"]), (&json!("hello"), &json!(1)));
        // One that does not read holds up neither the controller nor the other one.
        drop(reader);
        for _ in 0..20_000 {
            report.epoch(&Epoch::default());
        }
        assert!(raw(dir.path(), b"{\"do\":\"status\"}\n").starts_with("{\"ok\":{"));
        drop(slow);
    }
}
