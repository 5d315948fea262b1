// SPDX-License-Identifier: GPL-2.0-or-later

//! The content of a qcow2 image as a file: a `qemu-storage-daemon` of QEMU shows it through FUSE.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use rustix::io::Errno;
use rustix::mount::{unmount, UnmountFlags};
use rustix::process::{kill_process, Pid, Signal};
use serde_json::json;

/// How long the daemon may take to show the image, and to put it away.
const PATIENCE: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(10);

/// An image that is shown. Dropped, the daemon has written all of it and has ended.
pub(super) struct Export {
    child: Child,
    mount: PathBuf,
}

impl Export {
    /// Shows the qcow2 image `path` as the file `mount`.
    pub(super) fn start(path: &Path, mount: &Path) -> Result<Self> {
        // What a daemon that was killed left.
        if fs::metadata(mount).is_err_and(|e| Errno::from_io_error(&e) == Some(Errno::NOTCONN)) {
            unmount(mount, UnmountFlags::DETACH)
                .with_context(|| format!("cannot unmount {}", mount.display()))?;
        }
        let below = OpenOptions::new()
            .create(true)
            .append(true)
            .open(mount)
            .and_then(|file| file.metadata())
            .with_context(|| format!("cannot create {}", mount.display()))?;
        let image = json!({
            "driver": "qcow2", "node-name": "disk", "discard": "unmap",
            "file": {"driver": "file", "filename": path, "discard": "unmap"},
        });
        let export = json!({
            "type": "fuse", "id": "disk", "node-name": "disk", "mountpoint": mount,
            "writable": true, "growable": false, "allow-other": "off",
        });
        // setpriv (util-linux) makes it end with the thread that starts it.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "qemu-storage-daemon"])
            .args(["--blockdev", &image.to_string()])
            .args(["--export", &export.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Not in the terminal's group: it has to outlive what ends this process, for a moment.
            .process_group(0)
            .spawn()
            .context("cannot start setpriv: install util-linux")?;
        let mut export = Self {
            child,
            mount: mount.to_owned(),
        };
        let deadline = Instant::now() + PATIENCE;
        while fs::metadata(mount)?.dev() == below.dev() {
            if let Some(status) = export.child.try_wait()? {
                let mut words = String::new();
                if let Some(mut stderr) = export.child.stderr.take() {
                    stderr.read_to_string(&mut words)?;
                }
                bail!(
                    "qemu-storage-daemon (Debian: qemu-utils) cannot show {} ({status}): {}",
                    path.display(),
                    words.trim()
                );
            }
            if Instant::now() > deadline {
                bail!(
                    "qemu-storage-daemon does not show {}: see whether this host has FUSE (/dev/fuse)",
                    path.display()
                );
            }
            thread::sleep(TICK);
        }
        Ok(export)
    }

    /// The file.
    pub(super) fn mount(&self) -> &Path {
        &self.mount
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        }
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(TICK);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.mount);
    }
}
