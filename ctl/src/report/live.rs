// SPDX-License-Identifier: GPL-2.0

//! What a running `protect` or `standby` says of itself, on a Unix socket in the run directory.
//!
//! The socket is also what keeps a second one away from the same domain.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::peer::stream::lock;

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
    /// Name that the domain has on the primary, if it is another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protects: Option<String>,
    /// The newest epoch that the standby holds.
    pub epoch: u64,
    /// How many epochs that was since the start.
    pub epochs: u64,
    /// The interval asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<f64>,
    /// The interval reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval_reached_ms: Option<f64>,
    /// What keeps epochs from coming at the interval asked for: `pause`, or `replication`.
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
    /// The silence after which the other host counts as dead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<f64>,
    /// The virtual machine's process, if this one started it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<u32>,
}

/// A [`Live`] that several threads keep up to date.
pub type Shared = Arc<Mutex<Live>>;

/// Where the socket of `domain` is.
fn socket(run_dir: &Path, domain: &str) -> PathBuf {
    run_dir.join(format!("{domain}.sock"))
}

/// A socket that answers for a domain, until it is dropped.
pub struct Station {
    path: PathBuf,
}

impl Station {
    /// Opens the socket for `domain`, and answers on it with `live`. Fails if a running controller
    /// has it already.
    pub fn open(run_dir: &Path, domain: &str, live: Shared) -> Result<Self> {
        fs::create_dir_all(run_dir)
            .with_context(|| format!("cannot create {}", run_dir.display()))?;
        let path = socket(run_dir, domain);
        let listener = match UnixListener::bind(&path) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => {
                if let Ok(other) = ask(&path) {
                    let (role, pid) = (other.role, other.pid);
                    bail!(
                        "{domain} already has a running {role} here, process {pid}: end it first"
                    );
                }
                // Its process was killed.
                fs::remove_file(&path)?;
                UnixListener::bind(&path)
            }
            other => other,
        };
        let listener = listener.with_context(|| format!("cannot open {}", path.display()))?;
        let answer = move || {
            for client in listener.incoming() {
                let Ok(mut client) = client else {
                    thread::sleep(Duration::from_millis(100));
                    continue;
                };
                let text = serde_json::to_string(&*lock(&live)).unwrap_or_default();
                let _ = client.set_write_timeout(Some(Duration::from_secs(1)));
                let _ = writeln!(client, "{text}");
            }
        };
        // Ends with the process.
        thread::Builder::new().name("status".into()).spawn(answer)?;
        Ok(Self { path })
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn ask(path: &Path) -> Result<Live> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

/// What the controllers that run on this host say, by domain.
pub fn all(run_dir: &Path) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(run_dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.file_stem().map(|n| n.to_string_lossy().into_owned());
        if path.extension().is_some_and(|e| e == "sock") {
            if let (Some(name), Ok(live)) = (name, ask(&path)) {
                found.push((name, serde_json::to_value(live).unwrap_or(Value::Null)));
            }
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let live = Shared::default();
        lock(&live).role = "standby".into();
        let station = Station::open(dir.path(), "web", Arc::clone(&live)).unwrap();
        let error = Station::open(dir.path(), "web", Arc::clone(&live))
            .err()
            .unwrap();
        assert!(
            error.to_string().contains("already has a running standby"),
            "{error}"
        );
        assert_eq!(all(dir.path())[0].1["role"], "standby");
        drop(station);
        assert!(all(dir.path()).is_empty());
        // A socket whose process is gone is in nobody's way.
        drop(UnixListener::bind(dir.path().join("web.sock")).unwrap());
        Station::open(dir.path(), "web", live).unwrap();
    }
}
