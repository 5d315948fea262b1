// SPDX-License-Identifier: GPL-2.0-or-later

//! What the kernel and the running controllers say of the domains on this host.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{bail, Result};
use serde_json::{Map, Value};

use crate::commands::domain::{print, print_json};
use crate::host::kernel::Domain;
use crate::host::netlink::Remus;
use crate::report::live::{self, Live, Progress};

/// A domain on this host: what the kernel says of it, and what its controller does. One may be missing.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    /// The kernel's view.
    pub kernel: Option<Domain>,
    /// The controller's.
    pub live: Option<Live>,
}

/// All domains on this host, by name.
pub type All = BTreeMap<String, Entry>;

/// Asks the kernel and all controllers.
pub fn gather(run_dir: &Path) -> Result<All> {
    let mut all = All::new();
    // A controller may run where the module has gone, and that is worth seeing.
    let kernel = Remus::connect().and_then(|mut k| k.domains());
    let running = live::all(run_dir);
    match kernel {
        Ok(domains) => {
            for domain in domains {
                let name = domain.domain.clone();
                all.entry(name).or_default().kernel = Some(domain);
            }
        }
        Err(e) if running.is_empty() => return Err(e),
        Err(_) => {}
    }
    for (name, live) in running {
        all.entry(name).or_default().live = Some(live);
    }
    Ok(all)
}

/// Keeps only the domain that is named, if one is. Fails if it is not there.
pub fn only(mut all: All, name: Option<&str>) -> Result<All> {
    if let Some(name) = name {
        if !all.contains_key(name) {
            bail!("no domain {name} here (see: remusctl domain list)");
        }
        all.retain(|known, _| known == name);
    }
    Ok(all)
}

/// Shows all domains, or one. As JSON: an object for each, with the attributes of `domain-get` and a
/// member `controller`, or for one domain that object alone.
pub fn show(run_dir: &Path, name: Option<&str>, as_json: bool) -> Result<()> {
    let all = only(gather(run_dir)?, name)?;
    if as_json {
        let objects = all
            .iter()
            .map(|(name, entry)| object(name, entry))
            .collect::<Result<Vec<_>>>()?;
        return match (name, objects.first()) {
            (Some(_), Some(one)) => print_json(one),
            _ => print_json(&objects),
        };
    }
    if all.is_empty() {
        print("no domains");
        return Ok(());
    }
    print(&table(&all));
    if let (Some(_), Some(entry)) = (name, all.values().next()) {
        print(&format!("\n{}", details(entry)));
    }
    Ok(())
}

fn object(name: &str, entry: &Entry) -> Result<Map<String, Value>> {
    let mut map = match serde_json::to_value(&entry.kernel)? {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    map.entry("domain").or_insert_with(|| name.into());
    if let Some(live) = &entry.live {
        map.insert("controller".into(), serde_json::to_value(live)?);
    }
    Ok(map)
}

/// What the columns are called.
const HEAD: [&str; 10] = [
    "DOMAIN", "ROLE", "STATE", "PEER", "EPOCH", "PACE", "PAUSE", "DELAY", "DIRTY/S", "LINK/S",
];

/// A line for each domain, below a head.
pub fn table(all: &All) -> String {
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(all.iter().map(|(name, entry)| row(name, entry)));
    let mut widths = [0; HEAD.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let lines: Vec<String> = rows
        .iter()
        .map(|row| {
            let cells: Vec<String> = row
                .iter()
                .zip(widths)
                .map(|(cell, width)| format!("{cell:width$}"))
                .collect();
            cells.join("  ").trim_end().to_owned()
        })
        .collect();
    lines.join("\n")
}

fn row(name: &str, entry: &Entry) -> [String; HEAD.len()] {
    let none = || "-".to_owned();
    let Some(live) = &entry.live else {
        let kernel = entry.kernel.as_ref();
        let state = match kernel {
            Some(k) if k.packets > 0 => "no controller, output held",
            _ => "no controller",
        };
        let epoch = kernel.map_or_else(none, |k| k.committed_epoch.to_string());
        let mut row = HEAD.map(|_| none());
        for (cell, text) in row.iter_mut().zip([name, "-", state, "-", &epoch]) {
            *cell = text.to_owned();
        }
        return row;
    };
    let time = |ms: Option<f64>| ms.map_or_else(none, |ms| format!("{} ms", short(ms)));
    [
        name.to_owned(),
        live.role.clone(),
        state(live),
        live.peer.clone().unwrap_or_else(none),
        live.epoch.to_string(),
        live.pace.clone().unwrap_or_else(none),
        time(live.pause_ms),
        time(live.commit_lag_ms),
        live.dirty_pages_per_s
            .map_or_else(none, |pages| format!("{pages:.0} pages")),
        live.wire_bytes_per_s.map_or_else(none, amount),
    ]
}

/// Its state in words.
pub fn state(live: &Live) -> String {
    match (&live.first_copy, live.alone) {
        (_, true) => "alone".to_owned(),
        (Some(copy), _) if copy.pages_total > 0 => format!("first copy {}%", percent(copy)),
        _ => live.state.clone(),
    }
}

/// How much of the pass is done.
pub fn percent(copy: &Progress) -> u64 {
    copy.pages_done.min(copy.pages_total) * 100 / copy.pages_total.max(1)
}

/// All about one domain, a line for each thing.
pub fn details(entry: &Entry) -> String {
    let mut lines = Vec::new();
    let mut line = |what: &str, text: String| lines.push(format!("{what:12} {text}"));
    match &entry.live {
        None => line(
            "controller",
            "none runs; see remusctl protect --help".into(),
        ),
        Some(live) => {
            let vmm = live.vmm_pid.map(|pid| format!(", machine {pid}"));
            line(
                "controller",
                format!("process {}{}", live.pid, vmm.unwrap_or_default()),
            );
            if let Some(protects) = &live.protects {
                line("protects", format!("{protects}, as the primary calls it"));
            }
            if let Some(peer) = &live.peer {
                let mut text = peer.clone();
                if let Some(how) = &live.secured {
                    text += match how.as_str() {
                        "plain" => ", plain: neither encrypted nor authenticated",
                        _ => ", encrypted, both hosts authenticated",
                    };
                }
                if let Some(ago) = live.heard_ms_ago {
                    text += &format!(", heard {} ms ago", short(ago));
                }
                if let Some(timeout) = live.timeout_ms {
                    text += &format!(" (dead after {} ms)", short(timeout));
                }
                line("other host", text);
            }
            if live.alone {
                line(
                    "protection",
                    "none: the guest runs on without a standby, its output leaves at once".into(),
                );
            }
            if let Some(disks) = &live.disks {
                let waits = match disks.waiting {
                    0 => "",
                    _ => "; the guest's writes wait",
                };
                line(
                    "disks",
                    format!(
                        "{} of changes on their way to the standby's images, at most {}{waits}",
                        amount(disks.held as f64),
                        amount(disks.bound as f64)
                    ),
                );
            }
            if let Some(copy) = &live.first_copy {
                let left = copy
                    .seconds_left
                    .map(|s| format!(", {s:.0} s left"))
                    .unwrap_or_default();
                line(
                    "first copy",
                    format!(
                        "{}, {} of {} {} ({}%), {}/s{left}",
                        copy.what(),
                        copy.pages_done,
                        copy.pages_total,
                        if copy.disks { "chunks" } else { "pages" },
                        percent(copy),
                        amount(copy.bytes_per_s),
                    ),
                );
            }
            if let Some(reached) = live.interval_reached_ms {
                let mut text = format!("{} ms apart", short(reached));
                if let Some(pace) = &live.pace {
                    text += &format!(" (asked: {pace})");
                }
                if let Some(by) = &live.limited_by {
                    text += &format!(", held up by {by}");
                }
                if let Some(waiting) = live.in_flight {
                    text += &format!(", {waiting} not acknowledged");
                }
                line("epochs", text);
            }
            if let Some(pages) = live.dirty_pages {
                let mut text = format!("{pages} in the last epoch");
                if let Some(bytes) = live.bytes_per_page {
                    text += &format!(", {bytes:.0} bytes each on the wire");
                }
                line("pages", text);
            }
            if let Some(kinds) = &live.pages {
                line(
                    "so far",
                    format!(
                        "{} zero, {} unchanged, {} as differences ({} of them compressed), {} compressed, {} as they are",
                        kinds.zero,
                        kinds.unchanged,
                        kinds.delta + kinds.packed,
                        kinds.packed,
                        kinds.lz4,
                        kinds.raw
                    ),
                );
            }
        }
    }
    if let Some(k) = &entry.kernel {
        line(
            "kernel",
            format!(
                "epoch {} open, {} committed, {} sealed; {} packets held, {} dropped{}",
                k.open_epoch,
                k.committed_epoch,
                k.sealed_epochs,
                k.packets,
                k.dropped,
                match k.orphaned {
                    true => "; its controller has gone, all is held",
                    false => "",
                }
            ),
        );
    }
    lines.join("\n")
}

/// A number of bytes, for people.
pub fn amount(bytes: f64) -> String {
    for (unit, name) in [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")] {
        if bytes >= unit {
            return format!("{} {name}", short(bytes / unit));
        }
    }
    format!("{bytes:.0} B")
}

/// As many digits as matter.
fn short(number: f64) -> String {
    match number {
        n if n >= 100.0 => format!("{n:.0}"),
        n if n >= 10.0 => format!("{n:.1}"),
        n => format!("{n:.2}"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::report::live::PageKinds;

    pub(crate) fn sample() -> All {
        let live = Live {
            role: "primary".into(),
            state: "replicating".into(),
            pid: 42,
            peer: Some("beta".into()),
            secured: Some("tls".into()),
            heard_ms_ago: Some(3.25),
            epoch: 1234,
            epochs: 34,
            pace: Some("every 100 ms".into()),
            interval_reached_ms: Some(100.1),
            pause_ms: Some(3.456),
            commit_lag_ms: Some(12.34),
            in_flight: Some(1),
            dirty_pages: Some(200),
            dirty_pages_per_s: Some(2000.0),
            wire_bytes_per_s: Some(2_500_000.0),
            bytes_per_page: Some(1250.0),
            pages: Some(PageKinds {
                delta: 190,
                raw: 10,
                ..PageKinds::default()
            }),
            ..Live::default()
        };
        let kernel = Domain {
            domain: "db".into(),
            packets: 3,
            committed_epoch: 9,
            ..Domain::default()
        };
        let copying = Live {
            first_copy: Some(Progress {
                pass: 1,
                pages_done: 50,
                pages_total: 200,
                bytes_per_s: 1e6,
                seconds_left: Some(7.2),
                ..Progress::default()
            }),
            ..live.clone()
        };
        All::from([
            (
                "web".into(),
                Entry {
                    live: Some(live),
                    kernel: None,
                },
            ),
            (
                "mail".into(),
                Entry {
                    live: Some(copying),
                    kernel: None,
                },
            ),
            (
                "db".into(),
                Entry {
                    live: None,
                    kernel: Some(kernel),
                },
            ),
        ])
    }

    #[test]
    fn one_line_a_domain() {
        let text = table(&sample());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        let column = |name| lines[0].find(name).unwrap();
        assert!(
            lines[1].starts_with("db      -        no controller, output held  -     9"),
            "{text}"
        );
        assert!(lines[2].contains("first copy 25%"), "{text}");
        let web = lines[3];
        for (head, cell) in [
            ("ROLE", "primary"),
            ("PEER", "beta"),
            ("EPOCH", "1234"),
            ("PACE", "every 100 ms"),
            ("PAUSE", "3.46 ms"),
            ("DELAY", "12.3 ms"),
            ("DIRTY/S", "2000 pages"),
            ("LINK/S", "2.50 MB"),
        ] {
            assert!(
                web[column(head)..].starts_with(cell),
                "{head} {cell}\n{text}"
            );
        }
    }

    #[test]
    fn all_about_one() {
        let all = sample();
        let text = details(&all["web"]);
        for part in [
            "process 42",
            "heard 3.25 ms ago",
            "100 ms apart (asked: every 100 ms), 1 not acknowledged",
            "200 in the last epoch, 1250 bytes each",
            "190 as differences",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert!(
            details(&all["mail"]).contains("pass 1, 50 of 200 pages (25%), 1.00 MB/s, 7 s left")
        );
        assert!(details(&all["db"]).contains("3 packets held"));
    }

    #[test]
    fn as_json() {
        let all = sample();
        let web = object("web", &all["web"]).unwrap();
        assert_eq!(web["domain"], "web");
        assert_eq!(web["controller"]["commit-lag-ms"], 12.34);
        assert_eq!(object("db", &all["db"]).unwrap()["committed-epoch"], 9);
        assert!(only(all.clone(), Some("nope")).is_err());
        assert_eq!(only(all, Some("db")).unwrap().len(), 1);
    }
}
