// SPDX-License-Identifier: GPL-2.0-or-later

//! Whether this host is fit, and if not, what to do.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::geteuid;
use rustix::thread::{capabilities, CapabilitySet};
use serde::Serialize;

use crate::commands::domain::{print, print_json};
use crate::config::{Config, KEYS};
use crate::host::netlink::Remus;
use crate::peer::address;
use crate::peer::identity::Identity;
use crate::primary::disks::server;

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

/// Looks at everything, prints it, and returns whether nothing failed. With a configuration or the name
/// of a peer, also at what these name.
pub fn run(config: Option<&Path>, peer: Option<&str>, as_json: bool) -> Result<bool> {
    let file = config.map(Config::read).transpose()?;
    let config = KernelConfig::read();
    let mut findings = vec![
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
        nbdkit(),
        clock(),
        memory(file.as_ref().map(|f| f.memory.0)),
    ];
    let named = file.as_ref().and_then(|f| f.keys.as_deref());
    findings.push(keys(named.unwrap_or(Path::new(KEYS))));
    if let Some(file) = &file {
        findings.extend(vmm(file));
    }
    if let Some(peer) = peer.or(file.as_ref().and_then(|f| f.to.as_deref())) {
        findings.extend(way_to(peer));
    }
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

/// What the primary hears of writes to disks by.
fn nbdkit() -> Finding {
    let warn = |text: &str| finding("nbdkit", Grade::Warn, text);
    let Some(version) = version("nbdkit", "--version") else {
        return warn(
            "there is no nbdkit, so disks cannot be replicated from here: apt-get install nbdkit",
        );
    };
    let loads = server::plugin()
        .ok()
        .and_then(|plugin| output("nbdkit", &["--dump-plugin", &plugin.to_string_lossy()]));
    match loads {
        Some(_) => finding("nbdkit", Grade::Ok, format!("{version}, with the plugin remus")),
        None => warn("nbdkit does not find the plugin remus, so disks cannot be replicated from here: make install"),
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

/// Standard output of a program that ended well.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let out = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    out.status.success().then_some(text)
}

/// Take-over does not go by the clock, but whoever compares the logs of two hosts does, and so does the
/// validity of keys.
fn clock() -> Finding {
    let how = "systemctl enable --now systemd-timesyncd, or chrony";
    match output(
        "timedatectl",
        &["show", "--property=NTPSynchronized", "--value"],
    )
    .as_deref()
    {
        Some("yes") => finding("clock", Grade::Ok, "the clock is synchronised"),
        Some("no") => finding(
            "clock",
            Grade::Warn,
            format!("the clock is not synchronised: {how}"),
        ),
        _ if Path::new("/run/systemd/timesync/synchronized").exists() => {
            finding("clock", Grade::Ok, "the clock is synchronised")
        }
        _ => finding(
            "clock",
            Grade::Warn,
            format!("unknown whether the clock is synchronised: {how}"),
        ),
    }
}

/// What a domain with `wanted` bytes of memory needs, beside what there is.
fn memory(wanted: Option<u64>) -> Finding {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let Some(available) = meminfo(&text, "MemAvailable") else {
        return finding(
            "memory",
            Grade::Warn,
            "unknown how much memory is available: /proc/meminfo does not say",
        );
    };
    let mib = |bytes: u64| bytes >> 20;
    match wanted {
        Some(wanted) if wanted > available => finding(
            "memory",
            Grade::Warn,
            format!(
                "{} MiB available, the domain has {} MiB: fine if it runs here already, else free some; it is never swapped out",
                mib(available),
                mib(wanted)
            ),
        ),
        _ => finding(
            "memory",
            Grade::Ok,
            format!("{} MiB available", mib(available)),
        ),
    }
}

fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Whether the keys are there and good.
fn keys(path: &Path) -> Finding {
    if !path.exists() {
        return finding(
            "keys",
            Grade::Warn,
            format!(
                "there are none in {}: make them (remusctl keys --help), or protect without, with -F on both hosts",
                path.display()
            ),
        );
    }
    match Identity::load(path) {
        Ok(identity) => finding(
            "keys",
            Grade::Ok,
            format!(
                "this host is {:?} in {}, the other one {:?}",
                identity.name(),
                path.display(),
                identity.peer()
            ),
        ),
        Err(e) => finding("keys", Grade::Fail, format!("{e:#}")),
    }
}

/// Whether the machine of the configuration could be started here.
fn vmm(file: &Config) -> Option<Finding> {
    let program = file.vmm.as_ref()?.command.first()?;
    let found = program.contains('/').then(|| Path::new(program).exists());
    let found = found.unwrap_or_else(|| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|dir| dir.join(program).exists())
    });
    Some(match found {
        true => finding("vmm", Grade::Ok, format!("{program} is here")),
        false => finding(
            "vmm",
            Grade::Fail,
            format!(
                "vmm.command starts {program}, which is not here: install it, or correct the file"
            ),
        ),
    })
}

/// The way to the other host.
fn way_to(peer: &str) -> Vec<Finding> {
    let begin = Instant::now();
    let stream = match address::connect(peer, Duration::from_secs(3)) {
        Ok(stream) => stream,
        Err(e) => return vec![finding("peer", Grade::Fail, format!("{e:#}"))],
    };
    let took = begin.elapsed().as_secs_f64() * 1000.0;
    let mut findings = vec![finding(
        "peer",
        Grade::Ok,
        format!("{peer} answers, connected in {took:.1} ms"),
    )];
    let Some(device) = stream.peer_addr().ok().and_then(|a| device_to(a.ip())) else {
        findings.push(finding(
            "link",
            Grade::Warn,
            format!("unknown which network interface leads to {peer}: see ip route get"),
        ));
        return findings;
    };
    let number = |what: &str| -> Option<i64> {
        let text = fs::read_to_string(format!("/sys/class/net/{device}/{what}")).ok()?;
        text.trim().parse().ok()
    };
    findings.push(mtu(&device, number("mtu")));
    findings.push(speed(&device, number("speed")));
    findings
}

fn device_to(address: IpAddr) -> Option<String> {
    let text = output("ip", &["-j", "route", "get", &address.to_string()])?;
    let routes: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(routes.get(0)?.get("dev")?.as_str()?.to_owned())
}

fn mtu(device: &str, mtu: Option<i64>) -> Finding {
    match mtu {
        Some(mtu) if mtu >= 9000 => finding("mtu", Grade::Ok, format!("{device} has MTU {mtu}")),
        Some(mtu) if mtu >= 1500 => finding(
            "mtu",
            Grade::Ok,
            format!(
                "{device} has MTU {mtu}; 9000 on both hosts and between them costs less processor time: ip link set {device} mtu 9000"
            ),
        ),
        Some(mtu) => finding(
            "mtu",
            Grade::Warn,
            format!("{device} has MTU {mtu}, which is little: is there a tunnel on the way?"),
        ),
        None => finding("mtu", Grade::Warn, format!("{device} does not tell its MTU")),
    }
}

fn speed(device: &str, speed: Option<i64>) -> Finding {
    match speed {
        Some(speed) if speed >= 10_000 => {
            finding("speed", Grade::Ok, format!("{device} has {speed} Mbit/s"))
        }
        Some(speed) if speed > 0 => finding(
            "speed",
            Grade::Warn,
            format!(
                "{device} has {speed} Mbit/s: a guest that writes more than {} MB/s of memory, after encoding, waits for it; use 10 Gbit/s or a link of its own",
                speed / 8
            ),
        ),
        _ => finding(
            "speed",
            Grade::Ok,
            format!("{device} does not tell its speed, as virtual interfaces do not"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use rustix::net::{self, AddressFamily, SocketType};

    use super::*;

    #[test]
    fn numbers() {
        let text = "MemTotal:  100 kB\nMemAvailable:      64 kB\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(65536));
        assert_eq!(meminfo(text, "Mem"), None);
        assert_eq!(memory(Some(1 << 60)).grade, Grade::Warn);
        assert_eq!(memory(None).grade, Grade::Ok);
    }

    #[test]
    fn links() {
        assert_eq!(mtu("eth0", Some(1400)).grade, Grade::Warn);
        assert_eq!(mtu("eth0", Some(1500)).grade, Grade::Ok);
        assert_eq!(speed("eth0", Some(1000)).grade, Grade::Warn);
        assert_eq!(speed("eth0", Some(-1)).grade, Grade::Ok);
    }

    #[test]
    fn somebody_to_reach() {
        let any = "127.0.0.1:0";
        let listener = std::net::TcpListener::bind(any).unwrap();
        let peer = listener.local_addr().unwrap().to_string();
        assert_eq!(way_to(&peer)[0].grade, Grade::Ok);
        // Bound, so that no other test gets the port, and never listening.
        let silent = net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        net::bind(&silent, &any.parse::<SocketAddr>().unwrap()).unwrap();
        let peer = SocketAddr::try_from(net::getsockname(&silent).unwrap()).unwrap();
        assert_eq!(way_to(&peer.to_string())[0].grade, Grade::Fail);
    }

    #[test]
    fn keys_that_are_not_there() {
        let found = keys(Path::new("/nowhere.pem"));
        assert_eq!(found.grade, Grade::Warn);
        assert!(found.message.contains("remusctl keys"), "{}", found.message);
    }
}
