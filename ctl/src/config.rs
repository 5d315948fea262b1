// SPDX-License-Identifier: GPL-2.0-or-later

//! The TOML file that describes a domain, which both hosts read, and what it and the command line
//! come to together.

pub mod disk;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use remus_core::uapi::{self, ram::PAGE_SIZE};
use serde::Deserialize;

use crate::args::{self, CowPolicy, Limits, Loss};
use crate::primary::pace::Pace;
use disk::{Disk, Durability, Images};

/// Time from epoch to epoch unless told otherwise.
const INTERVAL: Duration = Duration::from_millis(100);
/// Least time between two epochs on output unless told otherwise.
const FLOOR: Duration = Duration::from_millis(10);
/// Silence after which the other host counts as dead unless told otherwise.
const TIMEOUT: Duration = Duration::from_millis(1000);
/// Most epochs that wait for the standby unless told otherwise.
const DEPTH: usize = 4;
/// Most threads that encode, unless told otherwise.
const ENCODERS: usize = 4;
/// Where this host's keys are unless told otherwise.
pub const KEYS: &str = "/etc/remus/keys/default.pem";
/// Where a standby listens unless told otherwise.
const LISTEN: &str = "0.0.0.0";

/// A domain.
///
/// ```toml
/// name = "web"
/// memory = "4G"
/// ports = ["tap0"]
///
/// [vmm]
/// command = ["qemu-system-x86_64", "-machine", "q35,memory-backend=ram", "-m", "4G",
///     "-object", "memory-backend-file,id=ram,size={memory},mem-path={ram},share=on",
///     "-qmp", "unix:{qmp},server=on,wait=off"]
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the domain.
    pub name: String,
    /// Size of its memory, such as `"128M"`.
    pub memory: Size,
    /// Its network interfaces on this host.
    #[serde(default)]
    pub ports: Vec<String>,
    /// QEMU's QMP socket on the primary.
    pub qmp: Option<PathBuf>,
    /// The standby, `HOST[:PORT]`.
    pub to: Option<String>,
    /// Time between two epochs, in milliseconds.
    pub interval_ms: Option<u64>,
    /// An epoch ends as soon as the guest has sent something.
    #[serde(default)]
    pub on_output: bool,
    /// Least time between two such, in milliseconds.
    pub floor_ms: Option<u64>,
    /// Epochs end so that replies come about this much later, in milliseconds.
    pub target_latency_ms: Option<u64>,
    /// Most epochs that may wait for the standby.
    pub depth: Option<u64>,
    /// Most memory for what the standby has, `"0"` for none.
    pub delta_cache: Option<Amount>,
    /// Threads that encode pages.
    pub encoders: Option<u64>,
    /// Send pages as they are.
    #[serde(default)]
    pub raw: bool,
    /// Copy pages while the guest stands still.
    #[serde(default)]
    pub copy_in_pause: bool,
    /// `"hold"`, or `"continue"`, which needs `-F` on the command line.
    pub on_standby_loss: Option<Loss>,
    /// Keys of the host.
    pub keys: Option<PathBuf>,
    /// Where to serve metrics, `ADDR:PORT`.
    pub metrics: Option<SocketAddr>,
    /// File to append events to.
    pub trace: Option<PathBuf>,
    /// Silence after which the other host counts as dead, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// Most memory for old contents of pages that were written again before they were read.
    pub cow_limit: Option<Size>,
    /// What happens beyond that, `"throttle"` (the guest waits) or `"fail"` (the epoch is aborted).
    pub cow_policy: Option<CowPolicy>,
    /// Most memory to watch pages that are written all the time.
    pub hot_limit: Option<Amount>,
    /// Where the standby listens, `ADDRESS[:PORT]`.
    pub listen: Option<String>,
    /// Its disks; what is not listed is not replicated.
    #[serde(default)]
    pub disk: Vec<Disk>,
    /// Most memory for changes of disks that the standby does not have yet.
    pub disk_buffer: Option<Size>,
    /// When changes of disks count as held by the standby: `"memory"` or `"disk"`.
    #[serde(default)]
    pub durability: Durability,
    /// Where the standby keeps its journal of changes.
    pub journal: Option<PathBuf>,
    /// How to start the virtual machine.
    pub vmm: Option<Vmm>,
    /// What differs on the standby.
    #[serde(default)]
    pub standby: Standby,
}

/// How to start the virtual machine.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vmm {
    /// Program and arguments. `{name}`, `{memory}` (bytes), `{ram}` (path of the memory), `{qmp}`
    /// (path of the QMP socket), `{port}` (first network interface) and `{disk:NAME}` (path of the image)
    /// are replaced.
    pub command: Vec<String>,
}

/// What differs on the standby.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standby {
    /// Its network interfaces there, if they have other names.
    #[serde(default)]
    pub ports: Vec<String>,
    /// Paths of its images there, by name of the disk, where they differ.
    #[serde(default)]
    pub disks: BTreeMap<String, PathBuf>,
}

/// What the placeholders of [`Vmm::command`] stand for.
pub struct Places<'a> {
    /// `{name}`.
    pub name: &'a str,
    /// `{memory}`, in bytes.
    pub memory: u64,
    /// `{ram}`.
    pub ram: &'a Path,
    /// `{qmp}`.
    pub qmp: &'a Path,
    /// `{port}`, if there is one.
    pub port: Option<&'a str>,
    /// `{disk:NAME}`.
    pub disks: &'a BTreeMap<String, PathBuf>,
}

impl Config {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("configuration {}", path.display()))
    }

    /// Its limits; those of the command line come first.
    pub fn limits(&self, line: &Limits) -> Limits {
        Limits {
            cow_limit: line.cow_limit.or(self.cow_limit.map(|size| size.0)),
            cow_policy: line.cow_policy.or(self.cow_policy),
            hot_limit: line.hot_limit.or(self.hot_limit.map(|amount| amount.0)),
            ..*line
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| {
            // The parser's message has the line.
            anyhow::anyhow!("{}", friendly(e.to_string().trim_end()))
        })?;
        check_name(&config.name)?;
        let times = [
            ("interval_ms", 1, config.interval_ms),
            ("floor_ms", 1, config.floor_ms),
            ("target_latency_ms", 1, config.target_latency_ms),
            ("timeout_ms", 10, config.timeout_ms),
        ];
        for (key, least, value) in times {
            check_range(key, value, least, 3_600_000)?;
        }
        check_range("depth", config.depth, 1, 1024)?;
        check_range("encoders", config.encoders, 1, 64)?;
        let paces = [
            config.interval_ms.is_some(),
            config.on_output,
            config.target_latency_ms.is_some(),
        ];
        if paces.into_iter().filter(|&p| p).count() > 1 {
            bail!("interval_ms, on_output and target_latency_ms exclude each other: keep one");
        }
        if config.floor_ms.is_some() && !config.on_output {
            bail!("floor_ms is of use only with on_output = true: add that, or remove it");
        }
        disk::check(&config)?;
        Ok(config)
    }
}

fn check_range(key: &str, value: Option<u64>, least: u64, most: u64) -> Result<()> {
    match value {
        Some(value) if !(least..=most).contains(&value) => {
            bail!("{key} = {value} is out of range: it has to be from {least} to {most}")
        }
        _ => Ok(()),
    }
}

/// The parser's message, with the nearest known key in place of a list of all.
fn friendly(message: &str) -> String {
    let Some((before, names)) = message.split_once("unknown field `") else {
        return message.to_owned();
    };
    let mut names = names.split('`').step_by(2);
    let unknown = names.next().unwrap_or("");
    let near = |known: &&str| strsim::jaro_winkler(unknown, known);
    match names.max_by(|a, b| near(a).total_cmp(&near(b))) {
        Some(known) if near(&known) > 0.7 => {
            format!("{before}unknown key {unknown}: did you mean {known}?")
        }
        _ => format!("{before}unknown key {unknown}: docs/operations.md has the known ones"),
    }
}

/// The command line lacks something, or says what does not go together.
#[derive(Debug)]
pub struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Shorthand for failing because of the command line.
macro_rules! usage {
    ($($arg:tt)*) => { return Err(Usage(format!($($arg)*)).into()) };
}

/// All that `protect` goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtectSettings {
    /// The domain.
    pub domain: String,
    /// QEMU's QMP socket.
    pub qmp: PathBuf,
    /// The standby.
    pub to: String,
    /// When epochs end.
    pub pace: Pace,
    /// Silence after which the standby counts as dead.
    pub timeout: Duration,
    /// Most epochs that may wait for the standby.
    pub depth: usize,
    /// See [`Self::delta_cache`].
    delta_cache: Option<u64>,
    /// Threads that encode pages.
    pub encoders: usize,
    /// Send pages as they are.
    pub raw: bool,
    /// Copy pages while the guest stands still.
    pub copy_in_pause: bool,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Most bytes of their changes that are held until the standby has them.
    pub disk_buffer: u64,
    /// What weakens protection is meant.
    pub force: bool,
    /// What becomes of the guest when the standby is lost.
    pub on_standby_loss: Loss,
    /// Keys of this host; nothing is encrypted without.
    pub keys: Option<PathBuf>,
    /// Where to serve metrics.
    pub metrics: Option<SocketAddr>,
    /// Where to append events to.
    pub trace: Option<PathBuf>,
}

impl ProtectSettings {
    /// What the command line says, else the file, else what is usual.
    pub fn of(line: &args::Protect, file: Option<&Config>) -> Result<Self> {
        if let Some(file) = file.filter(|c| c.name != line.name) {
            bail!(
                "the configuration is for domain {}, not for {}: name that, or another file",
                file.name,
                line.name
            );
        }
        let get = |get: fn(&Config) -> Option<u64>| file.and_then(get);
        let Some(qmp) = line.qmp.clone().or(file.and_then(|c| c.qmp.clone())) else {
            usage!(
                "it is not known where QEMU listens: give --qmp SOCK, or qmp in the configuration"
            );
        };
        let Some(to) = line.to.clone().or(file.and_then(|c| c.to.clone())) else {
            usage!(
                "it is not known where the standby is: give --to HOST, or to in the configuration"
            );
        };
        let on_standby_loss = line
            .on_standby_loss
            .or(file.and_then(|c| c.on_standby_loss))
            .unwrap_or(Loss::Hold);
        if on_standby_loss == Loss::Continue && !line.common.force {
            usage!(
                "to continue when the standby is lost leaves the guest unprotected, and two of them may run \
                 if the standby lives: give -F if that is meant, or --on-standby-loss hold"
            );
        }
        let count = |value: Option<u64>, usual: usize| match value {
            Some(value) => usize::try_from(value),
            None => Ok(usual),
        };
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let common = Common::of(&line.common, file, Path::new(KEYS))?;
        Ok(Self {
            domain: line.name.clone(),
            qmp,
            to,
            pace: pace(&line.pace, file)?,
            timeout: common.timeout,
            depth: count(line.depth.or(get(|c| c.depth)), DEPTH)?,
            delta_cache: line.delta_cache.or(get(|c| c.delta_cache.map(|a| a.0))),
            encoders: count(
                line.encoders.or(get(|c| c.encoders)),
                processors.min(ENCODERS),
            )?,
            raw: line.raw.unwrap_or(file.is_some_and(|c| c.raw)),
            copy_in_pause: line
                .copy_in_pause
                .unwrap_or(file.is_some_and(|c| c.copy_in_pause)),
            disks: file.map(|c| c.disk.clone()).unwrap_or_default(),
            force: line.common.force,
            disk_buffer: get(|c| c.disk_buffer.map(|s| s.0)).unwrap_or(disk::BUFFER),
            on_standby_loss,
            keys: common.keys,
            metrics: common.metrics,
            trace: common.trace,
        })
    }

    /// Most bytes for what the standby has of a guest with so much memory; 0 for none.
    pub fn delta_cache(&self, memory: u64) -> u64 {
        self.delta_cache.unwrap_or(memory / 4)
    }
}

/// All that `standby` goes by.
#[derive(Clone, Debug)]
pub struct StandbySettings {
    /// The domain, as the primary calls it.
    pub domain: String,
    /// What it is called here.
    pub local: String,
    /// Bytes of its memory.
    pub memory: u64,
    /// Limits of its memory, for when it is the primary.
    pub limits: Limits,
    /// Its network interface here.
    pub port: Option<String>,
    /// Its disks, if there are any.
    pub images: Option<Images>,
    /// How to start its machine.
    pub vmm: Vmm,
    /// Where to listen.
    pub listen: String,
    /// Silence after which the primary counts as dead.
    pub timeout: Duration,
    /// Keys of this host; nothing is encrypted without.
    pub keys: Option<PathBuf>,
    /// Where to serve metrics.
    pub metrics: Option<SocketAddr>,
    /// Where to append events to.
    pub trace: Option<PathBuf>,
}

impl StandbySettings {
    /// What the command line says, else the file, else what is usual.
    pub fn of(line: &args::Standby, file: Option<&Config>) -> Result<Self> {
        let Some(file) = file else {
            usage!("a standby needs the domain's description: give --config FILE");
        };
        let local = line.local.as_ref().unwrap_or(&file.name);
        check_name(local)?;
        check_fits(file.memory.0)?;
        let Some(vmm) = file.vmm.clone() else {
            bail!(
                "{} does not say how to start the machine: add [vmm] command = [\"qemu-system-x86_64\", …]",
                line.config.display()
            );
        };
        let ports = match file.standby.ports.as_slice() {
            [] => &file.ports,
            _ => &file.standby.ports,
        };
        let listen = line.listen.as_ref().or(file.listen.as_ref());
        let common = Common::of(&line.common, Some(file), Path::new(KEYS))?;
        Ok(Self {
            domain: file.name.clone(),
            local: local.clone(),
            memory: file.memory.0,
            limits: file.limits(&Limits::default()),
            port: line.port.as_ref().or(ports.first()).cloned(),
            images: disk::images(file, local),
            vmm,
            listen: listen.map_or_else(|| LISTEN.to_owned(), Clone::clone),
            timeout: common.timeout,
            keys: common.keys,
            metrics: common.metrics,
            trace: common.trace,
        })
    }
}

/// What both sides go by.
struct Common {
    timeout: Duration,
    keys: Option<PathBuf>,
    metrics: Option<SocketAddr>,
    trace: Option<PathBuf>,
}

impl Common {
    fn of(line: &args::Common, file: Option<&Config>, usual_keys: &Path) -> Result<Self> {
        let timeout = line.timeout.or(file.and_then(|c| c.timeout_ms));
        let trace = line.trace.as_ref().or(file.and_then(|c| c.trace.as_ref()));
        let named = line.keys.as_ref().or(file.and_then(|c| c.keys.as_ref()));
        let keys = match named {
            // That a named one is missing is never what was meant.
            Some(path) => Some(path.clone()),
            None if usual_keys.exists() => Some(usual_keys.to_path_buf()),
            None if line.force => None,
            None => usage!(
                "this host has no keys ({} is not there), and without them whoever reaches the other host's port \
                 can read and replace the guest: make keys (remusctl keys --help), or give -F on both hosts to go \
                 without",
                usual_keys.display()
            ),
        };
        Ok(Self {
            timeout: timeout.map_or(TIMEOUT, Duration::from_millis),
            keys,
            metrics: line.metrics.or(file.and_then(|c| c.metrics)),
            trace: trace.cloned(),
        })
    }
}

/// What decides when epochs end.
fn pace(line: &args::Pace, file: Option<&Config>) -> Result<Pace> {
    if let Some(pace) = pace_of_line(line, file.and_then(|c| c.floor_ms)) {
        return Ok(pace);
    }
    let floor = line.floor.or(file.and_then(|c| c.floor_ms));
    if file.is_some_and(|c| c.on_output) {
        return Ok(on_output(floor));
    }
    if line.floor.is_some() {
        usage!("--floor is of use only with --on-output: add that, or leave it out");
    }
    let millis = |get: fn(&Config) -> Option<u64>| file.and_then(get).map(Duration::from_millis);
    Ok(match millis(|c| c.target_latency_ms) {
        Some(target) => Pace::Latency { target },
        None => Pace::Fixed(millis(|c| c.interval_ms).unwrap_or(INTERVAL)),
    })
}

/// The pace that the command line names, if it names one.
fn pace_of_line(line: &args::Pace, floor: Option<u64>) -> Option<Pace> {
    if line.on_output {
        return Some(on_output(line.floor.or(floor)));
    }
    if let Some(target) = line.target_latency {
        let target = Duration::from_millis(target);
        return Some(Pace::Latency { target });
    }
    line.interval
        .map(|ms| Pace::Fixed(Duration::from_millis(ms)))
}

fn on_output(floor: Option<u64>) -> Pace {
    let floor = floor.map_or(FLOOR, Duration::from_millis);
    Pace::OnOutput { floor }
}

/// The pace that `set` is asked for.
pub fn new_pace(line: &args::Pace) -> Result<Pace> {
    match pace_of_line(line, None) {
        Some(pace) => Ok(pace),
        None => usage!("no pace is named: give -i MS, --on-output or --target-latency MS"),
    }
}

impl Vmm {
    /// The command with everything filled in. Fails if it uses a place that nothing is known for,
    /// or is empty.
    pub fn fill(&self, places: &Places<'_>) -> Result<Vec<String>> {
        if self.command.first().is_none_or(|c| c.is_empty()) {
            bail!("vmm.command is empty: it has to start the virtual machine");
        }
        self.command.iter().map(|word| fill(word, places)).collect()
    }
}

fn fill(word: &str, places: &Places<'_>) -> Result<String> {
    if word.contains("{port}") && places.port.is_none() {
        bail!(
            "vmm.command uses {{port}}, but no port is given: add ports = [\"DEVICE\"] or --port"
        );
    }
    let mut word = word
        .replace("{name}", places.name)
        .replace("{memory}", &places.memory.to_string())
        .replace("{ram}", &places.ram.to_string_lossy())
        .replace("{qmp}", &places.qmp.to_string_lossy());
    if let Some(port) = places.port {
        word = word.replace("{port}", port);
    }
    disk::fill(word, places.disks)
}

/// Checks that `name` may be a domain's.
pub fn check_name(name: &str) -> Result<()> {
    let letters = |b: u8| b.is_ascii_alphanumeric();
    let good = name.bytes().next().is_some_and(letters)
        && name.bytes().all(|b| letters(b) || b"._-".contains(&b));
    if !good || name.len() > uapi::NAME_MAX {
        bail!(
            "{name:?} cannot be a domain's name: use up to {} letters, digits, '.', '_' or '-', \
             a letter or digit first",
            uapi::NAME_MAX
        );
    }
    Ok(())
}

/// Checks that this host could hold `bytes` of a domain's memory, which is never swapped out.
pub fn check_fits(bytes: u64) -> Result<()> {
    let info = rustix::system::sysinfo();
    let total = u64::from(info.mem_unit).saturating_mul(info.totalram);
    if bytes > total {
        bail!(
            "a memory of {} MiB does not fit this host, which has {} MiB",
            bytes >> 20,
            total >> 20
        );
    }
    Ok(())
}

/// A number of bytes, a multiple of the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(pub u64);

impl std::str::FromStr for Size {
    type Err = anyhow::Error;

    /// Reads such as `4096`, `512K`, `128M`, `4G`, `1T`, powers of 1024.
    fn from_str(text: &str) -> Result<Self> {
        let (digits, shift) = match text.char_indices().next_back() {
            Some((at, unit)) if unit.is_ascii_alphabetic() => {
                let shift = match unit.to_ascii_uppercase() {
                    'K' => 10,
                    'M' => 20,
                    'G' => 30,
                    'T' => 40,
                    _ => bail!("{text:?} is not a size: write such as 128M or 4G"),
                };
                (text.get(..at).unwrap_or(""), shift)
            }
            _ => (text, 0),
        };
        let number: u64 = digits
            .parse()
            .ok()
            .with_context(|| format!("{text:?} is not a size: write such as 128M or 4G"))?;
        let bytes = number
            .checked_mul(1 << shift)
            .filter(|b| *b <= uapi::MEMORY_MAX);
        match bytes {
            Some(bytes) if bytes > 0 && bytes % PAGE_SIZE as u64 == 0 => Ok(Self(bytes)),
            Some(_) => bail!("{text:?} is not a multiple of {PAGE_SIZE} bytes, at least one"),
            None => bail!("{text:?} is more than the largest memory, 16T"),
        }
    }
}

impl TryFrom<String> for Size {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

/// A size, or 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Amount(pub u64);

impl std::str::FromStr for Amount {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "0" => Ok(Self(0)),
            _ => text.parse().map(|Size(bytes)| Self(bytes)),
        }
    }
}

impl TryFrom<String> for Amount {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("4096", 4096),
            ("8k", 8192),
            ("128M", 128 << 20),
            ("16T", 1 << 44),
        ] {
            assert_eq!(text.parse::<Size>().unwrap(), Size(bytes));
        }
        for text in [
            "",
            "M",
            "0",
            "100",
            "17T",
            "99999999999999999999G",
            "-1M",
            "1X",
            "1é",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn unknown_keys_are_named() {
        let error = Config::parse("name = 'web'\nmemory = '1M'\nmemroy = 3\n").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("memroy") && text.lines().count() <= 5 && text.len() < 300,
            "{text}"
        );
        assert!(Config::parse("name = 'we b'\nmemory = '1M'\n").is_err());
        assert!(Config::parse("name = 'web'\nmemory = '1.5M'\n").is_err());
        assert!(Config::parse("name = 'web'\nmemory = '1M'\ntimeout_ms = 0\n").is_err());
    }

    #[test]
    fn places() {
        let vmm = Vmm {
            command: vec!["q".into(), "{ram},{memory},{port},{qmp},{name}".into()],
        };
        let mut places = Places {
            name: "n",
            memory: 4096,
            ram: Path::new("/dev/r"),
            qmp: Path::new("/q"),
            port: Some("tap0"),
            disks: &BTreeMap::new(),
        };
        assert_eq!(vmm.fill(&places).unwrap(), ["q", "/dev/r,4096,tap0,/q,n"]);
        places.port = None;
        assert!(vmm.fill(&places).is_err());
        assert!(Vmm { command: vec![] }.fill(&places).is_err());
    }

    fn protect(line: &str) -> Result<args::Protect> {
        match command(&format!("protect web {line}"))? {
            args::Command::Protect(protect) => Ok(*protect),
            other => bail!("{other:?}"),
        }
    }

    fn command(line: &str) -> Result<args::Command> {
        let words = ["remusctl"].into_iter().chain(line.split_whitespace());
        Ok(<args::Cli as clap::Parser>::try_parse_from(words)?.command)
    }

    fn settings(line: &str, file: &str) -> Result<ProtectSettings> {
        let file = Config::parse(&format!("name = 'web'\nmemory = '1M'\n{file}"))?;
        ProtectSettings::of(&protect(line)?, Some(&file))
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    const LEAST: &str = "--qmp /q --to beta -F";

    #[test]
    fn what_is_usual() {
        let s =
            ProtectSettings::of(&protect("--qmp /q --to beta --keys /k").unwrap(), None).unwrap();
        assert_eq!(s.pace, Pace::Fixed(ms(100)));
        assert_eq!((s.timeout, s.depth), (ms(1000), 4));
        assert!((1..=4).contains(&s.encoders));
        assert_eq!(s.delta_cache(1 << 30), 1 << 28);
        assert_eq!(s.on_standby_loss, Loss::Hold);
        assert_eq!(s.keys.as_deref(), Some(Path::new("/k")));
        assert!(!s.raw && !s.copy_in_pause && s.metrics.is_none() && s.trace.is_none());
    }

    #[test]
    fn flags_come_before_the_file() {
        let file = "qmp = '/f'\nto = 'gamma'\ntimeout_ms = 50\ndepth = 2\ndelta_cache = '8K'\n\
            encoders = 3\nraw = true\ncopy_in_pause = true\non_standby_loss = 'continue'\n\
            keys = '/fk'\nmetrics = '127.0.0.1:1'\ntrace = '/ft'\non_output = true\nfloor_ms = 7\n";
        let s = settings("-F", file).unwrap();
        assert_eq!((s.qmp.to_str(), s.to.as_str()), (Some("/f"), "gamma"));
        assert_eq!((s.timeout, s.depth, s.encoders), (ms(50), 2, 3));
        assert_eq!(s.delta_cache(1 << 30), 8192);
        assert_eq!(s.on_standby_loss, Loss::Continue);
        assert_eq!(s.keys.as_deref(), Some(Path::new("/fk")));
        assert_eq!(s.pace, Pace::OnOutput { floor: ms(7) });
        assert!(s.raw && s.copy_in_pause && s.trace.is_some());
        let s = settings(
            "--qmp /q --to beta --timeout 60 --depth 5 --delta-cache 0 --encoders 1 --raw=false \
             --copy-in-pause=false --on-standby-loss hold --keys /k --metrics 127.0.0.1:2 --trace /t -i 20",
            file,
        )
        .unwrap();
        assert_eq!((s.qmp.to_str(), s.to.as_str()), (Some("/q"), "beta"));
        assert_eq!((s.timeout, s.depth, s.encoders), (ms(60), 5, 1));
        assert_eq!(s.delta_cache(1 << 30), 0);
        assert_eq!(s.on_standby_loss, Loss::Hold);
        assert_eq!(s.keys.as_deref(), Some(Path::new("/k")));
        assert_eq!(s.metrics.map(|m| m.port()), Some(2));
        assert_eq!(s.pace, Pace::Fixed(ms(20)));
        assert!(!s.raw && !s.copy_in_pause);
    }

    #[test]
    fn paces() {
        let pace =
            |line: &str, file: &str| settings(&format!("{LEAST} {line}"), file).map(|s| s.pace);
        let (floor, usual) = (|floor| Pace::OnOutput { floor }, ms(10));
        assert_eq!(pace("--on-output", "").unwrap(), floor(usual));
        assert_eq!(pace("--on-output --floor 3", "").unwrap(), floor(ms(3)));
        assert_eq!(
            pace("--on-output", "interval_ms = 5").unwrap(),
            floor(usual)
        );
        assert_eq!(pace("", "on_output = true").unwrap(), floor(usual));
        assert_eq!(
            pace("--floor 4", "on_output = true\nfloor_ms = 8").unwrap(),
            floor(ms(4))
        );
        let target = ms(9);
        assert_eq!(
            pace("--target-latency 9", "").unwrap(),
            Pace::Latency { target }
        );
        assert_eq!(
            pace("", "target_latency_ms = 9").unwrap(),
            Pace::Latency { target }
        );
        assert_eq!(
            pace("-i 5", "target_latency_ms = 9").unwrap(),
            Pace::Fixed(ms(5))
        );
        for bad in [
            "-i 5 --on-output",
            "-i 5 --target-latency 5",
            "--on-output --target-latency 5",
            "--target-latency 5 --floor 5",
            "-i 0",
            "--floor 5",
        ] {
            assert!(pace(bad, "").is_err(), "{bad}");
        }
        for bad in [
            "interval_ms = 5\non_output = true",
            "interval_ms = 5\ntarget_latency_ms = 5",
            "floor_ms = 5",
            "target_latency_ms = 0",
        ] {
            assert!(pace("", bad).is_err(), "{bad}");
        }
        let new = |line: &str| match command(&format!("set web {line}")) {
            Ok(args::Command::Set { pace, .. }) => new_pace(&pace),
            other => bail!("{other:?}"),
        };
        assert_eq!(new("-i 5").unwrap(), Pace::Fixed(ms(5)));
        assert!(new("").unwrap_err().is::<Usage>());
    }

    #[test]
    fn guards() {
        let usage = |line: &str, part: &str| {
            let error = ProtectSettings::of(&protect(line).unwrap(), None).unwrap_err();
            let text = error.to_string();
            assert!(error.is::<Usage>() && text.contains(part), "{line}: {text}");
        };
        usage("--to beta -F", "--qmp");
        usage("--qmp /q -F", "--to");
        usage(
            "--qmp /q --to beta --keys /k --on-standby-loss continue",
            "-F",
        );
        let line = |force| args::Common {
            force,
            ..args::Common::default()
        };
        let keys = |force, path: &Path| Common::of(&line(force), None, path).map(|c| c.keys);
        let error = keys(false, Path::new("/nowhere")).unwrap_err().to_string();
        assert!(
            error.contains("no keys") && error.contains("give -F"),
            "{error}"
        );
        assert_eq!(keys(true, Path::new("/nowhere")).unwrap(), None);
        // Force is no reason to leave out what is there.
        assert!(keys(true, Path::new("/")).unwrap().is_some());
        // The wrong file.
        let other = Config::parse("name = 'db'\nmemory = '1M'\n").unwrap();
        assert!(ProtectSettings::of(&protect(LEAST).unwrap(), Some(&other)).is_err());
    }

    #[test]
    fn standby_settings() {
        let of = |line: &str, file: &str| {
            let file = Config::parse(&format!("name = 'web'\nmemory = '1M'\n{file}"))?;
            match command(&format!("standby --config /c {line}"))? {
                args::Command::Standby(standby) => StandbySettings::of(&standby, Some(&file)),
                other => bail!("{other:?}"),
            }
        };
        let vmm = "[vmm]\ncommand = ['q']\n";
        let error = of("-F", "").unwrap_err().to_string();
        assert!(error.contains("[vmm]"), "{error}");
        let s = of("--keys /k", vmm).unwrap();
        assert_eq!((s.local.as_str(), s.listen.as_str()), ("web", LISTEN));
        assert_eq!((s.port, s.timeout), (None, TIMEOUT));
        assert_eq!(s.limits, Limits::default());
        let file = format!(
            "ports = ['tap0']\nlisten = '::'\ncow_limit = '8M'\nhot_limit = '0'\n{vmm}[standby]\nports = ['tap1']\n"
        );
        let s = of("-F", &file).unwrap();
        assert_eq!(
            (s.limits.cow_limit, s.limits.hot_limit),
            (Some(8 << 20), Some(0))
        );
        assert_eq!((s.port.as_deref(), s.listen.as_str()), (Some("tap1"), "::"));
        let s = of(
            "-F --as web-b --port tap2 --listen 1.2.3.4 --timeout 70",
            &file,
        )
        .unwrap();
        assert_eq!((s.domain.as_str(), s.local.as_str()), ("web", "web-b"));
        assert_eq!(
            (s.port.as_deref(), s.listen.as_str()),
            (Some("tap2"), "1.2.3.4")
        );
        assert_eq!(s.timeout, ms(70));
    }

    #[test]
    fn nearest_key() {
        for (key, near) in [
            ("memroy", "memory"),
            ("intervall_ms", "interval_ms"),
            ("time_out_ms", "timeout_ms"),
        ] {
            let error =
                Config::parse(&format!("name = 'web'\nmemory = '1M'\n{key} = 3\n")).unwrap_err();
            let text = error.to_string();
            assert!(text.ends_with(&format!("did you mean {near}?")), "{text}");
        }
        let text = Config::parse("name = 'web'\nmemory = '1M'\nzzz = 3\n")
            .unwrap_err()
            .to_string();
        assert!(!text.contains("did you mean"), "{text}");
    }
}
