// SPDX-License-Identifier: GPL-2.0

//! The writers as the checker sees them: processes that it starts, pauses, and asks what they did.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{bail, Context, Result};
use remus_ram::bits::Bits;

use crate::pattern::Pattern;

/// How long a writer may take to pause, in milliseconds.
const PATIENCE: i32 = 120_000;

/// All writers. They are killed when this is dropped.
pub struct Crew {
    seed: u64,
    pages: u64,
    writers: Vec<Writer>,
}

struct Writer {
    guest: bool,
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Crew {
    /// Starts `processes` writers and, after them, `guests` that write from a KVM guest.
    pub fn start(
        domain: &str,
        pages: u64,
        seed: u64,
        processes: usize,
        guests: usize,
    ) -> Result<Self> {
        let mut crew = Self {
            seed,
            pages,
            writers: Vec::new(),
        };
        for number in 0..processes + guests {
            let guest = number >= processes;
            let mut command = Command::new("/proc/self/exe");
            command
                .args(["writer", domain])
                .args([pages, seed, number as u64].map(|n| n.to_string()))
                .args(guest.then_some("--guest"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            let mut process = command.spawn().context("cannot start a writer")?;
            let (Some(input), Some(output)) = (process.stdin.take(), process.stdout.take()) else {
                bail!("a writer has no pipes");
            };
            crew.writers.push(Writer {
                guest,
                process,
                input,
                output: BufReader::new(output),
            });
        }
        Ok(crew)
    }

    /// Lets all write the patterns of `round`.
    pub fn go(&mut self, round: u64) -> Result<()> {
        for writer in &mut self.writers {
            writeln!(writer.input, "run {round}").context("a writer has ended")?;
        }
        Ok(())
    }

    /// Pauses all. Returns how many steps each one did.
    pub fn pause(&mut self) -> Result<Vec<u64>> {
        for writer in &mut self.writers {
            writeln!(writer.input, "pause").context("a writer has ended")?;
        }
        let answers = self.writers.iter_mut().enumerate();
        answers
            .map(|(n, writer)| writer.answer().with_context(|| format!("writer {n}")))
            .collect()
    }

    /// The pages that were written in `round`, in which the writers did so many steps.
    pub fn written(&self, round: u64, steps: &[u64]) -> Bits {
        let mut set = Bits::new(self.pages);
        for (number, (writer, &steps)) in self.writers.iter().zip(steps).enumerate() {
            let pattern = Pattern::new(self.seed, number as u64, round, self.pages);
            if writer.guest {
                pattern.guest_writes(steps, &mut set);
            } else {
                pattern.process_writes(steps, &mut set);
            }
        }
        set
    }

    /// Which writers are guests.
    pub fn guests(&self) -> impl Iterator<Item = bool> + '_ {
        self.writers.iter().map(|w| w.guest)
    }
}

impl Writer {
    fn answer(&mut self) -> Result<u64> {
        let mut poll = libc::pollfd {
            fd: self.output.get_ref().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: One entry, borrowed for the call.
        match unsafe { libc::poll(&mut poll, 1, PATIENCE) } {
            -1 => return Err(io::Error::last_os_error()).context("cannot poll"),
            0 => bail!("did not pause within {} s", PATIENCE / 1000),
            _ => {}
        }
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("ended: {}", self.process.wait()?);
        }
        line.trim_end()
            .parse()
            .with_context(|| format!("answered {line:?}"))
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for writer in &mut self.writers {
            let _ = writer.process.kill();
            let _ = writer.process.wait();
        }
    }
}
