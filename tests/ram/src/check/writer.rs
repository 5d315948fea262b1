// SPDX-License-Identifier: GPL-2.0

//! A process that writes the memory, told by lines on its standard input when to:
//!
//! ```text
//! run ROUND     begin the pattern of that round, in bursts, up to a number of steps
//! pause         stop after the step in progress; the answer is a line with the number of steps
//! ```
//!
//! It ends with its input, so that it does not outlive the checker.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use anyhow::{bail, Context, Result};
use clap::Args;
use remus_ram::device::Device;
use remus_ram::guest::{leave_first_processor, Guest};
use remus_ram::map::{memfd, Map};
use remus_ram::PAGE;

use crate::pattern::{Pattern, Span, Step};

/// Which writer it is.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Domain whose memory to write
    pub domain: String,
    /// Pages of it
    pub pages: u64,
    /// Seed of all patterns
    pub seed: u64,
    /// Number of this writer
    pub number: u64,
    /// Write from a KVM guest
    #[arg(long)]
    pub guest: bool,
}

/// Writes until the input ends.
pub fn run(options: &Options) -> Result<()> {
    let device = Device::open(&options.domain, options.pages)?;
    if options.guest {
        leave_first_processor()?;
        let memory = device.map(true)?;
        let mut guest = Guest::new(&memory, false)?;
        obey(options, |pattern| guest.run(pattern.job()))
    } else {
        let mut process = Process {
            map: device.map(true)?,
            source: memfd(2 * PAGE)?,
            device,
        };
        obey(options, |pattern| process.step(pattern.step()))
    }
}

/// Does steps as the input says.
fn obey(options: &Options, mut step: impl FnMut(&mut Pattern) -> Result<()>) -> Result<()> {
    let input = io::stdin().as_fd().try_clone_to_owned()?;
    let mut lines = Lines(BufReader::new(input.into()));
    let mut out = io::stdout();
    while let Some(line) = lines.next()? {
        let Some(round) = line.strip_prefix("run ") else {
            bail!("'{line}' instead of 'run ROUND'");
        };
        let mut pattern = Pattern::new(options.seed, options.number, round.parse()?, options.pages);
        let mut steps = 0u64;
        let (most, burst) = pattern.pace(options.guest);
        loop {
            // Leaves the processors to those who read, now and then, and for good at the end.
            let wait = match steps {
                n if n == most => -1,
                n if n % burst == 0 => 1,
                _ => 0,
            };
            if lines.ready(wait)? {
                break;
            }
            if steps < most {
                step(&mut pattern).with_context(|| format!("step {steps} of round {round}"))?;
                steps += 1;
            }
        }
        match lines.next()?.as_deref() {
            Some("pause") => {
                writeln!(out, "{steps}")?;
                out.flush()?;
            }
            Some(other) => bail!("'{other}' instead of 'pause'"),
            None => break,
        }
    }
    Ok(())
}

/// Lines of the standard input.
struct Lines(BufReader<File>);

impl Lines {
    /// Whether there is a line, or the end, within so many milliseconds; -1 waits for it.
    fn ready(&self, wait: i32) -> Result<bool> {
        if !self.0.buffer().is_empty() {
            return Ok(true);
        }
        let mut poll = libc::pollfd {
            fd: self.0.get_ref().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: One entry, borrowed for the call.
        match unsafe { libc::poll(&mut poll, 1, wait) } {
            -1 => Err(io::Error::last_os_error()).context("cannot poll the input"),
            n => Ok(n > 0),
        }
    }

    fn next(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        let length = self.0.read_line(&mut line)?;
        Ok((length > 0).then(|| line.trim_end().to_owned()))
    }
}

/// A process's ways to write.
struct Process {
    device: Device,
    map: Map,
    /// What `pread` reads.
    source: File,
}

impl Process {
    fn step(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Store { page, word, value } => {
                self.word(page, word).store(value, Ordering::Relaxed);
            }
            Step::Fill { page, value } => {
                for word in 0..PAGE / 8 {
                    self.word(page, word).store(value, Ordering::Relaxed);
                }
            }
            Step::Same { page, word } => {
                let word = self.word(page, word);
                word.store(word.load(Ordering::Relaxed), Ordering::Relaxed);
            }
            Step::Pwrite(span) => {
                self.device
                    .file()
                    .write_all_at(&content(span), span.at)
                    .context("pwrite")?;
            }
            Step::Pread(span) => {
                self.source.write_all_at(&content(span), 0)?;
                let to = self.map.address(span.at as usize, span.length);
                // SAFETY: `to` is in the mapping and has room for so much.
                let done =
                    unsafe { libc::pread(self.source.as_raw_fd(), to.cast(), span.length, 0) };
                whole(done, span).context("pread into the mapping")?;
            }
            Step::Remote(span) => {
                let mut content = content(span);
                let from = libc::iovec {
                    iov_base: content.as_mut_ptr().cast(),
                    iov_len: span.length,
                };
                let to = libc::iovec {
                    iov_base: self.map.address(span.at as usize, span.length).cast(),
                    iov_len: span.length,
                };
                // SAFETY: Both are memory of this process, of that length.
                let done = unsafe {
                    libc::process_vm_writev(std::process::id() as i32, &from, 1, &to, 1, 0)
                };
                whole(done, span).context("process_vm_writev into the mapping")?;
            }
            Step::Remap => self.map = self.device.map(true)?,
            Step::Forget { page, count } => {
                let length = count as usize * PAGE;
                let start = self.map.address(page as usize * PAGE, length);
                // SAFETY: Within the mapping; the content of shared memory stays.
                if unsafe { libc::madvise(start.cast(), length, libc::MADV_DONTNEED) } != 0 {
                    return Err(io::Error::last_os_error()).context("madvise");
                }
            }
        }
        Ok(())
    }

    fn word(&self, page: u64, word: usize) -> &std::sync::atomic::AtomicU64 {
        self.map.word(page as usize * PAGE + word * 8)
    }
}

/// What is to be written.
fn content(span: Span) -> Vec<u8> {
    let bytes = span.value.to_le_bytes();
    bytes.into_iter().cycle().take(span.length).collect()
}

/// Whether a call did all that it should.
fn whole(done: isize, span: Span) -> Result<()> {
    match done {
        -1 => Err(io::Error::last_os_error().into()),
        n if n as usize == span.length => Ok(()),
        n => bail!("{n} of {} bytes", span.length),
    }
}
