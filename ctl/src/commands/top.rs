// SPDX-License-Identifier: GPL-2.0-or-later

//! What the domains on this host do, again and again, on a terminal.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::termios::{tcgetattr, tcgetwinsize, tcsetattr, LocalModes, OptionalActions, Termios};

use crate::commands::domain::print;
use crate::commands::status::{amount, details, gather, only, percent, table, All};
use crate::host::kernel::Port;
use crate::host::netlink::Remus;
use crate::signals;

/// Another screen, without a cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// From the upper left on; the rest of a line; the rest of the screen.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_REST: &str = "\x1b[J";

/// Columns of a bar.
const BAR: u64 = 30;

/// Shows all domains, or one, every second until `q`; once if standard output is no terminal.
pub fn run(run_dir: &Path, name: Option<&str>) -> Result<()> {
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        print(&frame(run_dir, name)?);
        return Ok(());
    }
    // What cannot be shown at all is said on the screen that stays.
    frame(run_dir, name)?;
    let stop = signals::gentle_stop_flag()?;
    let _screen = Screen::enter()?;
    while !stop.load(Ordering::Relaxed) {
        let text = frame(run_dir, name).unwrap_or_else(|e| format!("{e:#}"));
        paint(&text)?;
        if quits()? {
            break;
        }
    }
    Ok(())
}

/// Waits a second. Returns whether `q` was pressed, or the terminal has gone.
fn quits() -> Result<bool> {
    let second = Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    let stdin = std::io::stdin();
    match poll(&mut [PollFd::new(&stdin, PollFlags::IN)], Some(&second)) {
        // Signals are looked at by whoever calls this.
        Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(false),
        other => other.context("cannot wait for a key")?,
    };
    let mut keys = [0; 64];
    let n = rustix::io::read(&stdin, &mut keys).context("cannot read a key")?;
    let keys = keys.get(..n).unwrap_or(&[]);
    Ok(n == 0 || keys.iter().any(|k| b"qQ".contains(k)))
}

/// A terminal that is as it was when this is dropped.
struct Screen {
    before: Termios,
}

impl Screen {
    fn enter() -> Result<Self> {
        let before = tcgetattr(std::io::stdin()).context("cannot set up the terminal")?;
        let mut keys = before.clone();
        // Keys at once and unseen; Ctrl-C still is a signal.
        keys.local_modes
            .remove(LocalModes::ICANON | LocalModes::ECHO);
        tcsetattr(std::io::stdin(), OptionalActions::Now, &keys)
            .context("cannot set up the terminal")?;
        let screen = Self { before };
        write(ENTER)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = write(LEAVE);
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.before);
    }
}

fn write(text: &str) -> Result<()> {
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())?;
    Ok(())
}

fn paint(text: &str) -> Result<()> {
    let (rows, columns) = match tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_row > 0 => (usize::from(size.ws_row), usize::from(size.ws_col)),
        _ => (24, 80),
    };
    write(&fit(text, rows, columns))
}

/// What paints `text` on a screen of this size.
fn fit(text: &str, rows: usize, columns: usize) -> String {
    let lines: Vec<String> = text
        .lines()
        .take(rows)
        .map(|line| {
            let line: String = line.chars().take(columns).collect();
            format!("{line}{CLEAR_LINE}")
        })
        .collect();
    format!("{HOME}{}{CLEAR_REST}", lines.join("\r\n"))
}

/// All of it as text.
fn frame(run_dir: &Path, name: Option<&str>) -> Result<String> {
    let all = only(gather(run_dir)?, name)?;
    // Without the module there is something to show all the same.
    let ports = Remus::connect()
        .and_then(|mut kernel| kernel.ports(name))
        .unwrap_or_default();
    Ok(text(&all, &ports, name.is_some()))
}

fn text(all: &All, ports: &[Port], detailed: bool) -> String {
    let mut parts = match all.is_empty() {
        true => vec!["no domains".to_owned()],
        false => vec![table(all)],
    };
    let copies: Vec<String> = all
        .iter()
        .filter_map(|(name, entry)| {
            let copy = entry.live.as_ref()?.first_copy.as_ref()?;
            let done = percent(copy);
            let full = done * BAR / 100;
            Some(format!(
                "{name:12} first copy, {} [{}{}] {done:3}%  {}/s{}",
                copy.what(),
                "#".repeat(full as usize),
                ".".repeat((BAR - full) as usize),
                amount(copy.bytes_per_s),
                match copy.seconds_left {
                    Some(left) => format!(", {left:.0} s left"),
                    None => String::new(),
                }
            ))
        })
        .collect();
    if !copies.is_empty() {
        parts.push(copies.join("\n"));
    }
    if !ports.is_empty() {
        let mut lines = vec![format!(
            "{:12}  {:15}  {:>12}  {:>10}  {:>5}  {:>9}  {:>9}  {:>8}",
            "DOMAIN", "PORT", "HELD", "MEMORY", "FULL", "LAST", "LONGEST", "DROPPED"
        )];
        lines.extend(ports.iter().map(|p| {
            let millis = |ns: u64| format!("{:.1} ms", ns as f64 / 1e6);
            format!(
                "{:12}  {:15}  {:>12}  {:>10}  {:>4}%  {:>9}  {:>9}  {:>8}",
                p.domain,
                p.port,
                match p.passthrough {
                    true => "let through".to_owned(),
                    false => format!("{} packets", p.packets),
                },
                amount(p.held_memory as f64),
                fullness(p),
                millis(p.hold_last_ns),
                millis(p.hold_max_ns),
                p.dropped
            )
        }));
        parts.push(lines.join("\n"));
    }
    if let (true, Some(entry)) = (detailed, all.values().next()) {
        parts.push(details(entry));
    }
    parts.join("\n\n")
}

/// How much of what a port may hold it holds, in percent.
fn fullness(port: &Port) -> u64 {
    let part = |held: u64, limit: u64| match limit {
        0 => 0,
        limit => held.saturating_mul(100) / limit,
    };
    part(port.packets, port.limit_packets).max(part(port.held_memory, port.limit_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::status::tests::sample;

    #[test]
    fn one_frame() {
        let port = Port {
            domain: "web".into(),
            port: "tap0".into(),
            direction: None,
            passthrough: false,
            packets: 7,
            bytes: 700,
            held_memory: 32_000,
            limit_packets: 0,
            limit_bytes: 64_000,
            dropped: 0,
            hold_last_ns: 12_300_000,
            hold_max_ns: 99_000_000,
        };
        let text = text(&sample(), &[port], false);
        for part in [
            "first copy, pass 1 [#######.......................]  25%  1.00 MB/s, 7 s left",
            "tap0                7 packets     32.0 kB    50%    12.3 ms    99.0 ms         0",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn fits_the_screen() {
        let painted = fit("one line\ntwo\nthree", 2, 5);
        assert_eq!(painted, "\x1b[Hone l\x1b[K\r\ntwo\x1b[K\x1b[J");
    }
}
