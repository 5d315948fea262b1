// SPDX-License-Identifier: GPL-2.0-or-later

//! The waiting virtual machine's process.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use rustix::process::{kill_process, Pid, Signal};

use crate::host::kernel::Machine;
use crate::host::qmp::Qmp;

/// How long it may take to open its QMP socket.
const START: Duration = Duration::from_secs(30);
/// What makes QEMU wait for a state instead of booting.
const INCOMING: [&str; 5] = [
    "-incoming",
    "defer",
    "-S",
    "-global",
    "migration.send-configuration=off",
];

/// A virtual machine that this process has started. It is ended when this is dropped, unless it was
/// let go.
pub struct Vmm {
    child: Option<Child>,
    pid: u32,
    log: PathBuf,
    qmp: PathBuf,
}

impl Vmm {
    /// Starts `command` with what makes it wait for a state, and connects to its QMP socket `qmp`.
    /// What it prints goes to the file `log`.
    pub fn start(command: &[String], qmp: &Path, log: &Path) -> Result<(Self, Qmp)> {
        let (program, arguments) = command.split_first().context("vmm.command is empty")?;
        if Qmp::connect(qmp).is_ok() {
            let qmp = qmp.display();
            bail!(
                "a virtual machine is already there at {qmp}, left by an earlier standby: end it"
            );
        }
        let _ = fs::remove_file(qmp);
        let output =
            File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = Command::new(program)
            .args(arguments)
            .args(INCOMING)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // Not in the terminal's group: what ends this process must not end the machine.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {program} (vmm.command)"))?;
        let pid = child.id();
        let mut vmm = Self {
            child: Some(child),
            pid,
            log: log.into(),
            qmp: qmp.into(),
        };
        let deadline = Instant::now() + START;
        loop {
            if let Some(status) = vmm.ended()? {
                bail!("{program} ended at once ({status}): {}", vmm.last_words());
            }
            if qmp.exists() {
                // It may exist a moment before it listens.
                if let Ok(mut connection) = Qmp::connect(qmp) {
                    connection.prepare_incoming()?;
                    return Ok((vmm, connection));
                }
            }
            if Instant::now() > deadline {
                bail!(
                    "{program} does not open {}: vmm.command needs -qmp unix:{{qmp}},server=on,wait=off",
                    qmp.display()
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        match &mut self.child {
            Some(child) => child.try_wait().context("cannot watch the virtual machine"),
            None => Ok(None),
        }
    }

    /// The end of what it printed.
    pub fn last_words(&self) -> String {
        let mut text = Vec::new();
        if let Ok(mut file) = File::open(&self.log) {
            let length = file.metadata().map(|m| m.len()).unwrap_or(0);
            let _ = file.seek(SeekFrom::Start(length.saturating_sub(600)));
            let _ = file.take(600).read_to_end(&mut text);
        }
        let text = String::from_utf8_lossy(&text);
        match text.trim() {
            "" => format!("it said nothing (log: {})", self.log.display()),
            words => words.to_owned(),
        }
    }

    /// Lets it live on when this process ends.
    pub fn let_go(&mut self) {
        self.child = None;
    }
}

impl Machine for Vmm {
    fn ready(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => bail!(
                "the waiting machine has ended ({status}): {}",
                self.last_words()
            ),
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        // A machine that waits has nothing to lose; give one that runs a moment.
        if let Ok(None) = child.try_wait() {
            if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::TERM);
            }
            let deadline = Instant::now() + Duration::from_secs(3);
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
        }
        let _ = child.wait();
        let _ = fs::remove_file(&self.qmp);
    }
}
