// SPDX-License-Identifier: GPL-2.0-or-later

//! What QEMU mirrors the disks to: nbdkit with our plugin, and the socket on which the plugin says
//! what was changed. The protocol is in `proto/src/export.rs`.

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{sync_channel, SyncSender};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use remus_proto::disk::{Change, Record};
use remus_proto::export::{Action, Request, REQUEST_SIZE};
use rustix::net::{shutdown, Shutdown};

use super::queue::Queue;
use super::Disk;

/// How long nbdkit may take to listen.
const START: Duration = Duration::from_secs(20);
/// How often to look whether it does.
const TICK: Duration = Duration::from_millis(10);
/// Most bytes that are taken in at once: whole chunks.
const PIECE: u64 = 1 << 20;
/// Most bytes of a change that are read together with what it is.
const SMALL: usize = 16 << 10;
/// errno(3), as the plugin hands them to QEMU.
const EIO: i32 = 5;
const EINVAL: i32 = 22;

/// nbdkit and what listens to its plugin. Both end when this is dropped; the queue does not take
/// changes any more then.
pub struct Server {
    nbdkit: Child,
    words: Option<JoinHandle<String>>,
    listener: Arc<UnixListener>,
    accepting: Option<JoinHandle<()>>,
    closing: Arc<AtomicBool>,
    queue: Arc<Queue>,
    /// For QEMU, and for the plugin.
    socket: PathBuf,
    own: PathBuf,
}

impl Server {
    /// Starts nbdkit for the disks of `domain`, whose changes go to `queue`. The sockets are
    /// `NAME.nbd` and `NAME.disks` in `run_dir`.
    pub fn start(run_dir: &Path, domain: &str, disks: &[Disk], queue: &Arc<Queue>) -> Result<Self> {
        let run_dir = std::path::absolute(run_dir).context("the run directory")?;
        let socket = run_dir.join(format!("{domain}.nbd"));
        let own = run_dir.join(format!("{domain}.disks"));
        let (socket_is, own_is) = (socket.display(), own.display());
        // Left by one that was killed: the domain has one controller at a time.
        for path in [&socket, &own] {
            let _ = fs::remove_file(path);
        }
        let listener = UnixListener::bind(&own).with_context(|| format!("cannot open {own_is}"))?;
        fs::set_permissions(&own, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("cannot close {own_is} to others"))?;
        let mut command = Command::new("nbdkit");
        command
            .args(["--foreground", "--exit-with-parent", "--newstyle"])
            // Without it QEMU's mirror would begin with zeros all over the standby's image.
            .arg("--filter=nozero")
            .arg("--unix")
            .arg(&socket)
            .arg(plugin()?)
            .arg(format!("socket={own_is}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let (nbdkit, words) = spawn(command)?;
        let listener = Arc::new(listener);
        let mut server = Self {
            nbdkit,
            words: Some(words),
            listener,
            accepting: None,
            closing: Arc::default(),
            queue: Arc::clone(queue),
            socket: socket.clone(),
            own: own.clone(),
        };
        server.accepting = Some(server.accept(disks)?);
        let deadline = Instant::now() + START;
        while UnixStream::connect(&socket).is_err() {
            if server.ended()?.is_some() {
                bail!(
                    "nbdkit, which takes the changes of the disks from QEMU, ended: {}",
                    server.last_words()
                );
            }
            if Instant::now() > deadline {
                bail!("nbdkit does not open {socket_is}: see what this host is busy with");
            }
            std::thread::sleep(TICK);
        }
        Ok(server)
    }

    /// The socket that QEMU connects to; each disk is an export with its name.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// How nbdkit has ended, if it has: QEMU mirrors nothing then.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.nbdkit.try_wait().context("cannot watch nbdkit")
    }

    /// Process of nbdkit.
    #[cfg(test)]
    pub fn pid(&self) -> u32 {
        self.nbdkit.id()
    }

    /// The first that nbdkit has complained of. Waits for its end.
    fn last_words(&mut self) -> String {
        let words = self.words.take().and_then(|words| words.join().ok());
        match words.as_deref().map(str::trim) {
            None | Some("") => "it said nothing".to_owned(),
            Some(words) => words.to_owned(),
        }
    }

    fn accept(&self, disks: &[Disk]) -> Result<JoinHandle<()>> {
        let (listener, closing) = (Arc::clone(&self.listener), Arc::clone(&self.closing));
        let (queue, disks) = (Arc::clone(&self.queue), Arc::<[Disk]>::from(disks));
        let accept = move || {
            for client in listener.incoming() {
                if closing.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(client) = client else {
                    // For want of file descriptors, which may take a while.
                    std::thread::sleep(TICK);
                    continue;
                };
                let (queue, disks) = (Arc::clone(&queue), Arc::clone(&disks));
                let work = move || {
                    // A plugin that has gone needs no answer.
                    let _ = attend(client, &disks, &queue);
                };
                // The plugin tells QEMU of what it cannot pass on, if there is no thread.
                let _ = Builder::new().name("disk".into()).spawn(work);
            }
        };
        Ok(Builder::new().name("disks".into()).spawn(accept)?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // No thread may wait for room in it, or it would not notice the end.
        self.queue.track();
        let _ = self.nbdkit.kill();
        let _ = self.nbdkit.wait();
        self.last_words();
        self.closing.store(true, Ordering::SeqCst);
        let _ = shutdown(&*self.listener, Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        for path in [&self.socket, &self.own] {
            let _ = fs::remove_file(path);
        }
    }
}

/// Where the plugin is: beside this program in the build tree, else nbdkit finds it by its name among
/// its own.
pub fn plugin() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let beside = program.with_file_name("libremus_nbdkit.so");
    Ok(match beside.exists() {
        true => beside,
        false => PathBuf::from("remus"),
    })
}

/// Starts nbdkit, from a thread that lives as long as it does: it takes the end of the thread that has
/// started it for that of its parent. The thread returns the first line of what it complains of.
fn spawn(mut command: Command) -> Result<(Child, JoinHandle<String>)> {
    let (child, started) = sync_channel(1);
    let words = Builder::new()
        .name("nbdkit".into())
        .spawn(move || listen(&mut command, &child))?;
    let child = started.recv().context("the thread of nbdkit ended")?;
    let child = child.map_err(|e| match e.kind() {
        ErrorKind::NotFound => {
            anyhow!("disks are replicated with nbdkit, which is not installed: apt install nbdkit")
        }
        _ => anyhow!("cannot start nbdkit: {e}"),
    })?;
    Ok((child, words))
}

fn listen(command: &mut Command, started: &SyncSender<io::Result<Child>>) -> String {
    let mut first = String::new();
    let mut errors = None;
    let child = command.spawn().map(|mut child| {
        errors = child.stderr.take();
        child
    });
    let _ = started.send(child);
    if let Some(errors) = errors {
        let mut errors = BufReader::new(errors);
        let mut line = Vec::new();
        // It says a line for each change that was refused: read, so that it does not wait.
        while errors.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            if first.is_empty() {
                first = String::from_utf8_lossy(&line).into_owned();
            }
            line.clear();
        }
    }
    first
}

/// Takes the changes that come over one of the plugin's connections.
fn attend(plugin: UnixStream, disks: &[Disk], queue: &Queue) -> io::Result<()> {
    let mut answers = &plugin;
    // A small change comes with its data by one call; a long one is read past the buffer.
    let mut plugin = BufReader::with_capacity(SMALL, &plugin);
    let mut length = [0];
    plugin.read_exact(&mut length)?;
    let [length] = length;
    let mut name = vec![0; length.into()];
    plugin.read_exact(&mut name)?;
    let found = disks.iter().position(|d| d.name.as_bytes() == name);
    let size = found.and_then(|at| disks.get(at)).map_or(0, |d| d.size);
    answers.write_all(&size.to_le_bytes())?;
    let Some(disk) = found.and_then(|at| u16::try_from(at).ok()) else {
        return Ok(());
    };
    let mut data = Vec::new();
    loop {
        let mut request = [0; REQUEST_SIZE];
        plugin.read_exact(&mut request)?;
        let request =
            Request::decode(&request).map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
        let end = request.offset.checked_add(request.length.into());
        let mut status = match end {
            Some(end) if end <= size => 0,
            _ => EINVAL,
        };
        let mut push = |offset: u64, change: Change<'_>| {
            let record = Record {
                disk,
                offset,
                change,
            };
            if status == 0 && queue.push(record).is_err() {
                status = EIO;
            }
        };
        match request.action {
            Action::Discard => push(request.offset, Change::Discard(request.length)),
            Action::Write => {
                let (mut at, mut left) = (request.offset, u64::from(request.length));
                while left > 0 {
                    // Up to where a chunk begins, so that none is taken apart.
                    let piece = left.min(PIECE - at % PIECE);
                    data.resize(piece as usize, 0);
                    plugin.read_exact(&mut data)?;
                    push(at, Change::Write(&data));
                    (at, left) = (at.wrapping_add(piece), left - piece);
                }
            }
        }
        answers.write_all(&status.to_le_bytes())?;
    }
}
