// SPDX-License-Identifier: GPL-2.0-or-later

//! QMP: the handful of QEMU's commands that are needed, one at a time.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use rustix::fs::{memfd_create, MemfdFlags};
use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{json, Value};

use crate::host::kernel::{Guest, Successor};

/// How long QEMU may take for a command, and for its greeting.
const PATIENCE: Duration = Duration::from_secs(20);
const GREETING: Duration = Duration::from_secs(5);
/// Most bytes in a line from QEMU.
const LINE_MAX: usize = 16 << 20;
/// Most events kept; older ones are forgotten.
const EVENTS_MAX: usize = 256;
/// Most bytes of device state.
pub const STATE_MAX: u64 = 64 << 20;

/// A connection to a QEMU.
pub struct Qmp {
    stream: UnixStream,
    received: Vec<u8>,
    events: VecDeque<Value>,
    next_id: u64,
    state: Option<StateFile>,
}

impl Qmp {
    /// Connects to a QEMU that listens at `path`.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).map_err(|e| {
            let socket = path.display();
            match e.kind() {
                ErrorKind::NotFound => anyhow!(
                    "there is no QMP socket {socket}: start QEMU with -qmp unix:{socket},server=on,wait=off"
                ),
                ErrorKind::ConnectionRefused => {
                    anyhow!("nobody listens at the QMP socket {socket}: is QEMU still running?")
                }
                _ => anyhow!("cannot connect to the QMP socket {socket}: {e}"),
            }
        })?;
        Self::over(stream).with_context(|| format!("QMP socket {}", path.display()))
    }

    /// Begins the conversation on a connected socket.
    pub fn over(stream: UnixStream) -> Result<Self> {
        let mut qmp = Self {
            stream,
            received: Vec::new(),
            events: VecDeque::new(),
            next_id: 0,
            state: None,
        };
        let greeting = qmp.line(Instant::now() + GREETING).context(
            "no greeting: it is not QEMU's, or another client is connected to it (QEMU talks to one)",
        )?;
        if greeting.get("QMP").is_none() {
            bail!("what answers is not a QEMU");
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.run(command, arguments, None)
    }

    fn run(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value> {
        self.next_id += 1;
        let id = self.next_id;
        let request = json!({"execute": command, "arguments": arguments, "id": id});
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        self.send(&line, fd)
            .with_context(|| format!("cannot send {command} to QEMU"))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self
                .line(deadline)
                .with_context(|| format!("QMP command {command}"))?;
            if answer.get("event").is_some() {
                self.keep(answer);
                continue;
            }
            // An answer to a command that ran out of time before.
            if answer.get("id").and_then(Value::as_u64) != Some(id) {
                continue;
            }
            if let Some(error) = answer.get("error") {
                let text = error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("unknown error");
                bail!("QEMU refused {command}: {text}");
            }
            return Ok(answer.get("return").cloned().unwrap_or(Value::Null));
        }
    }

    /// Waits until QEMU reports an event that `wanted` recognises, for at most `patience`.
    pub fn wait_event(
        &mut self,
        patience: Duration,
        mut wanted: impl FnMut(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + patience;
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return Ok(event);
                }
            }
            let event = self.line(deadline)?;
            if event.get("event").is_some() {
                self.keep(event);
            }
        }
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn send(&mut self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.stream.set_write_timeout(Some(PATIENCE))?;
        let Some(fd) = fd else {
            return Ok(self.stream.write_all(bytes)?);
        };
        // The descriptor travels with the first bytes, which QEMU reads together with it.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            bail!("no room to pass a file descriptor");
        }
        let flags = SendFlags::NOSIGNAL;
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, flags)?;
        Ok(self.stream.write_all(bytes.get(sent..).unwrap_or(&[]))?)
    }

    /// The next line from QEMU.
    fn line(&mut self, deadline: Instant) -> Result<Value> {
        let mut searched = 0;
        loop {
            let fresh = self.received.get(searched..).unwrap_or(&[]);
            if let Some(at) = fresh.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.received.drain(..=searched + at).collect();
                return serde_json::from_slice(&line)
                    .context("QEMU sent something that is not JSON");
            }
            searched = self.received.len();
            if searched > LINE_MAX {
                bail!("QEMU sent a line of more than {LINE_MAX} bytes");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("QEMU did not answer in time");
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut chunk = [0; 16384];
            match self.stream.read(&mut chunk) {
                Ok(0) => bail!("QEMU closed the connection: it has ended"),
                Ok(n) => self
                    .received
                    .extend_from_slice(chunk.get(..n).unwrap_or(&[])),
                Err(e) => match e.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                        bail!("QEMU did not answer in time")
                    }
                    _ => return Err(e).context("cannot read from QEMU"),
                },
            }
        }
    }

    /// Takes in what QEMU has reported meanwhile, without waiting.
    fn poll(&mut self) {
        while let Ok(line) = self.line(Instant::now() + Duration::from_millis(1)) {
            if line.get("event").is_some() {
                self.keep(line);
            }
        }
    }

    /// QEMU's version, such as `10.0.2`.
    pub fn version(&mut self) -> Result<String> {
        let v = self.execute("query-version", json!({}))?;
        let part = |name: &str| v.pointer(&format!("/qemu/{name}")).and_then(Value::as_u64);
        Ok(format!(
            "{}.{}.{}",
            part("major").unwrap_or(0),
            part("minor").unwrap_or(0),
            part("micro").unwrap_or(0)
        ))
    }

    /// Run state, such as `running` or `inmigrate`.
    pub fn status(&mut self) -> Result<String> {
        let status = self.execute("query-status", json!({}))?;
        let status = status.get("status").and_then(Value::as_str);
        Ok(status.context("QEMU does not say its status")?.to_owned())
    }

    /// Fails unless a memory backend of this QEMU is `device`, shared, with `size` bytes.
    pub fn check_memory(&mut self, device: &Path, size: u64) -> Result<()> {
        let backends = self.execute("query-memdev", json!({}))?;
        for backend in backends.as_array().into_iter().flatten() {
            let Some(id) = backend.get("id").and_then(Value::as_str) else {
                continue;
            };
            let mut get = |property: &str| {
                let path = format!("/objects/{id}");
                self.execute("qom-get", json!({"path": path, "property": property}))
            };
            // Backends of other kinds have no path.
            let Ok(Value::String(path)) = get("mem-path") else {
                continue;
            };
            if !same_file(Path::new(&path), device) {
                continue;
            }
            if get("share")?.as_bool() != Some(true) {
                bail!("QEMU has {path} as private memory: add share=on to its memory backend");
            }
            let has = get("size")?.as_u64().unwrap_or(0);
            if has != size {
                bail!(
                    "QEMU uses {has} bytes of {path}, but the domain has {size}: make them equal"
                );
            }
            return Ok(());
        }
        let device = device.display();
        bail!(
            "this QEMU does not have {device} as its memory: start it with \
             -object memory-backend-file,id=ram,size={size},mem-path={device},share=on \
             and -machine …,memory-backend=ram"
        )
    }

    /// Why QEMU said that the machine was shut down, if it did.
    fn shutdown_reason(&mut self) -> Option<String> {
        self.poll();
        let event = self
            .events
            .iter()
            .find(|e| e.get("event") == Some(&json!("SHUTDOWN")))?;
        let reason = event.pointer("/data/reason").and_then(Value::as_str);
        Some(reason.unwrap_or("shutdown").to_owned())
    }

    /// Makes ready to take a state over, ahead of time: `self` is a QEMU started with
    /// `-incoming defer`.
    pub fn prepare_incoming(&mut self) -> Result<()> {
        let status = self.status()?;
        if status != "inmigrate" {
            bail!(
                "QEMU does not wait for a state (it is {status}): drop -incoming from its command"
            );
        }
        self.execute(
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "events", "state": true}]}),
        )?;
        Ok(())
    }
}

impl Guest for Qmp {
    fn pause(&mut self) -> Result<()> {
        self.execute("stop", json!({})).map(drop)
    }

    fn save(&mut self) -> Result<Vec<u8>> {
        if self.state.is_none() {
            let file = StateFile::new()?;
            let opaque = json!({"opaque": "remus device state"});
            let answer = self.run("add-fd", opaque, Some(file.sink.as_fd()))?;
            let set = answer.get("fdset-id").and_then(Value::as_u64);
            let set = set.context("QEMU took no file descriptor")?;
            self.state = Some(StateFile {
                path: format!("/dev/fdset/{set}").into(),
                ..file
            });
        }
        let Some(mut file) = self.state.take() else {
            bail!("no file for the device state");
        };
        file.rewind()?;
        let arguments = json!({"filename": file.path, "live": false});
        let saved = self.execute("xen-save-devices-state", arguments);
        let state = saved.and_then(|_| file.read());
        self.state = Some(file);
        state
    }

    fn resume(&mut self) -> Result<()> {
        self.execute("cont", json!({})).map(drop)
    }

    fn runs(&mut self) -> Result<bool> {
        Ok(self.status()? == "running")
    }

    fn quit(&mut self) -> Result<()> {
        self.execute("quit", json!({})).map(drop)
    }

    fn ended(&mut self) -> Option<String> {
        self.shutdown_reason()
    }

    fn qmp(&mut self) -> Option<&mut Qmp> {
        Some(self)
    }
}

impl Successor for Qmp {
    fn load(&mut self, state: &[u8]) -> Result<()> {
        let file = memory_file()?;
        let mut file = File::from(file);
        file.write_all(state)
            .context("no room for the device state")?;
        file.rewind()?;
        self.run("getfd", json!({"fdname": "remus"}), Some(file.as_fd()))?;
        self.execute("migrate-incoming", json!({"uri": "fd:remus"}))?;
        let end = self.wait_event(PATIENCE, |event| {
            let status = event.pointer("/data/status").and_then(Value::as_str);
            event.get("event") == Some(&json!("MIGRATION"))
                && matches!(status, Some("completed" | "failed"))
        });
        let end = end.context("QEMU did not finish loading the device state")?;
        if end.pointer("/data/status") != Some(&json!("completed")) {
            let info = self
                .execute("query-migrate", json!({}))
                .unwrap_or(Value::Null);
            let why = info
                .get("error-desc")
                .and_then(Value::as_str)
                .unwrap_or("see its log");
            bail!("QEMU could not load the device state: {why}");
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        self.execute("cont", json!({})).map(drop)
    }

    fn announce(&mut self) -> Result<()> {
        let pace = json!({"initial": 20, "max": 500, "rounds": 8, "step": 60});
        self.execute("announce-self", pace).map(drop)
    }
}

/// Where QEMU writes its device state: memory that only it and we have, gone with both of us.
struct StateFile {
    /// What it is read through.
    source: File,
    /// The same memory, opened for writing only, as QEMU will open it; QEMU has this descriptor too
    /// and shares its position with us.
    sink: File,
    /// QEMU's name for it.
    path: PathBuf,
}

impl StateFile {
    fn new() -> Result<Self> {
        let source = File::from(memory_file()?);
        let again = format!("/proc/self/fd/{}", source.as_raw_fd());
        let sink = File::options()
            .write(true)
            .open(again)
            .context("cannot open /proc/self/fd")?;
        Ok(Self {
            source,
            sink,
            path: PathBuf::new(),
        })
    }

    fn rewind(&mut self) -> Result<()> {
        self.source.set_len(0)?;
        Ok(self.sink.rewind()?)
    }

    fn read(&mut self) -> Result<Vec<u8>> {
        let length = self.source.metadata()?.len();
        if length == 0 || length > STATE_MAX {
            bail!("QEMU saved {length} bytes of device state, which cannot be");
        }
        self.source.rewind()?;
        let mut state = Vec::with_capacity(length as usize);
        self.source.read_to_end(&mut state)?;
        Ok(state)
    }
}

fn memory_file() -> Result<OwnedFd> {
    memfd_create(c"remus-device-state", MemfdFlags::CLOEXEC).context("cannot create a memory file")
}

fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    a == b
        || match (a.metadata(), b.metadata()) {
            (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
            _ => false,
        }
}
