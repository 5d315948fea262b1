// SPDX-License-Identifier: GPL-2.0

//! Whether this host is fit, and if not, what to do.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use rustix::process::geteuid;
use rustix::thread::{capabilities, CapabilitySet};
use serde::Serialize;

use crate::commands::domain::{print, print_json};
use crate::host::netlink::Remus;

/// How good something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// As it should be.
    Ok,
    /// It works without, or it is not known.
    Warn,
    /// It does not work without.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What it is.
    pub check: &'static str,
    /// How good it is.
    pub grade: Grade,
    /// What was found, and what to do.
    pub message: String,
}

/// Looks at everything, prints it, and returns whether nothing failed.
pub fn run(as_json: bool) -> Result<bool> {
    let config = KernelConfig::read();
    let findings = [
        privilege(),
        config.option(
            "CONFIG_RUST",
            "kernel-rust",
            Grade::Fail,
            "the module is in Rust: use a kernel built with it, or make kernel for a test kernel",
        ),
        config.option(
            "CONFIG_NETFILTER_INGRESS",
            "kernel-ingress",
            Grade::Fail,
            "packets of guests are caught there: use a kernel built with it",
        ),
        module(),
        kvm(),
        qemu(),
        tc(),
    ];
    if as_json {
        print_json(&findings)?;
    } else {
        for f in &findings {
            let grade = match f.grade {
                Grade::Ok => "ok  ",
                Grade::Warn => "warn",
                Grade::Fail => "FAIL",
            };
            print(&format!("{grade}  {:15} {}", f.check, f.message));
        }
    }
    Ok(findings.iter().all(|f| f.grade != Grade::Fail))
}

fn finding(check: &'static str, grade: Grade, message: impl Into<String>) -> Finding {
    Finding {
        check,
        grade,
        message: message.into(),
    }
}

fn privilege() -> Finding {
    let admin = capabilities(None).is_ok_and(|c| c.effective.contains(CapabilitySet::NET_ADMIN));
    match (geteuid().is_root(), admin) {
        (true, true) => finding("privilege", Grade::Ok, "root with CAP_NET_ADMIN"),
        (false, true) => finding(
            "privilege",
            Grade::Warn,
            "CAP_NET_ADMIN but not root: the memory devices belong to root",
        ),
        _ => finding("privilege", Grade::Fail, "no CAP_NET_ADMIN: run it as root"),
    }
}

/// The running kernel's configuration, where it can be read.
struct KernelConfig {
    release: String,
    text: Option<String>,
}

impl KernelConfig {
    fn read() -> Self {
        let release = rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned();
        let packed = || {
            let out = Command::new("zcat").arg("/proc/config.gz").output().ok()?;
            let text = String::from_utf8(out.stdout).ok()?;
            (out.status.success() && !text.is_empty()).then_some(text)
        };
        let text = fs::read_to_string(format!("/boot/config-{release}"))
            .or_else(|_| fs::read_to_string(format!("/lib/modules/{release}/config")))
            .ok()
            .or_else(packed);
        Self { release, text }
    }

    fn option(&self, name: &str, check: &'static str, missing: Grade, why: &str) -> Finding {
        let release = &self.release;
        let Some(text) = &self.text else {
            return finding(
                check,
                Grade::Warn,
                format!("unknown whether Linux {release} has {name}: neither /proc/config.gz nor /boot/config-{release} can be read"),
            );
        };
        let on = text.lines().any(|l| l == format!("{name}=y"));
        if on {
            finding(check, Grade::Ok, format!("Linux {release} has {name}"))
        } else {
            finding(
                check,
                missing,
                format!("Linux {release} lacks {name}; {why}"),
            )
        }
    }
}

fn module() -> Finding {
    match Remus::connect() {
        Ok(_) => finding("module", Grade::Ok, "remus_buf is loaded"),
        Err(e) => finding("module", Grade::Fail, format!("{e:#}")),
    }
}

fn kvm() -> Finding {
    match fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => finding("kvm", Grade::Ok, "/dev/kvm can be opened"),
        Err(e) => finding(
            "kvm",
            Grade::Warn,
            format!("/dev/kvm: {e}; guests are emulated, slowly (modprobe kvm_intel or kvm_amd, or switch virtualisation on in the firmware)"),
        ),
    }
}

/// First line that `program` prints about its version.
fn version(program: &str, argument: &str) -> Option<String> {
    let out = Command::new(program).arg(argument).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Some(text.lines().next().unwrap_or("").trim().to_owned())
}

fn qemu() -> Finding {
    let Some(line) = version("qemu-system-x86_64", "--version") else {
        return finding(
            "qemu",
            Grade::Fail,
            "there is no qemu-system-x86_64: apt-get install qemu-system-x86 (10.0 or newer is best)",
        );
    };
    let major = line.split_whitespace().find_map(|w| {
        w.split_once('.')
            .and_then(|(major, _)| major.parse::<u32>().ok())
    });
    match major {
        Some(major) if major >= 10 => finding("qemu", Grade::Ok, line),
        Some(_) => finding(
            "qemu",
            Grade::Warn,
            format!("{line}: 10.0 or newer is known to be good (bookworm-backports has it)"),
        ),
        None => finding(
            "qemu",
            Grade::Warn,
            format!("cannot tell the version from: {line}"),
        ),
    }
}

fn tc() -> Finding {
    let candidates = ["tc", "/usr/sbin/tc", "/sbin/tc"].map(PathBuf::from);
    match candidates
        .iter()
        .find_map(|p| version(&p.to_string_lossy(), "-V"))
    {
        Some(line) => finding("tc", Grade::Ok, line),
        None => finding(
            "tc",
            Grade::Warn,
            "there is no tc: apt-get install iproute2 (remusctl works without it)",
        ),
    }
}
