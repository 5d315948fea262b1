// SPDX-License-Identifier: GPL-2.0

//! A stock QEMU whose memory is a RAM device, driven by QMP.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};

/// How long QEMU may take to listen, and how long its firmware gets to settle.
const PATIENCE: Duration = Duration::from_secs(60);
const SETTLE: Duration = Duration::from_secs(5);

/// A machine that idles in its firmware, which finds nothing to boot. Killed when this is dropped.
pub struct Qemu {
    process: Child,
    qmp: BufReader<UnixStream>,
    directory: PathBuf,
}

impl Qemu {
    /// Starts it on the memory of `domain`, of so many MiB.
    pub fn start(domain: &str, mib: u64) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("ram-bench-{}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        let socket = directory.join("qmp");
        let mut process = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35,memory-backend=ram", "-accel", "kvm"])
            .args(["-m", &mib.to_string(), "-object"])
            .arg(format!(
                "memory-backend-file,id=ram,size={mib}M,mem-path=/dev/remus/{domain},share=on"
            ))
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start QEMU")?;
        let begin = Instant::now();
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(&socket) {
                break stream;
            }
            if let Some(status) = process.try_wait()? {
                bail!("QEMU ended: {status}");
            }
            if begin.elapsed() > PATIENCE {
                let _ = process.kill();
                bail!("QEMU does not listen after {} s", PATIENCE.as_secs());
            }
            thread::sleep(Duration::from_millis(50));
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qemu = Self {
            process,
            qmp: BufReader::new(stream),
            directory,
        };
        qemu.answer().context("QEMU's greeting")?;
        qemu.command("qmp_capabilities")?;
        thread::sleep(SETTLE);
        Ok(qemu)
    }

    /// A command without arguments.
    pub fn command(&mut self, name: &str) -> Result<()> {
        self.execute(name, &json!({}))
    }

    /// Saves the state of the devices. Returns how many bytes it is.
    pub fn save_state(&mut self) -> Result<u64> {
        let file = self.directory.join("state");
        let arguments = json!({ "filename": file, "live": false });
        self.execute("xen-save-devices-state", &arguments)?;
        Ok(std::fs::metadata(&file)?.len())
    }

    fn execute(&mut self, name: &str, arguments: &Value) -> Result<()> {
        let request = json!({ "execute": name, "arguments": arguments });
        writeln!(self.qmp.get_mut(), "{request}").context("QEMU is gone")?;
        loop {
            let answer = self.answer().with_context(|| format!("QMP {name}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QMP {name}: {error}");
            }
            // All else is an event.
            if answer.get("return").is_some() {
                return Ok(());
            }
        }
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.qmp.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("QEMU said {line:?}"))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
