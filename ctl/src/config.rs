// SPDX-License-Identifier: GPL-2.0

//! The TOML file that describes a domain; both hosts read the same one.

use std::fs;
use std::path::Path;

use anyhow::{bail, Context, Result};
use remus_core::uapi::{self, ram::PAGE_SIZE};
use serde::Deserialize;

use crate::args::{CowPolicy, Limits};

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
    /// Time between two epochs, in milliseconds.
    pub interval_ms: Option<u64>,
    /// Silence after which the other host counts as dead, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// Most memory for old contents of pages that were written again before they were read.
    pub cow_limit: Option<Size>,
    /// What happens beyond that, `"throttle"` (the guest waits) or `"fail"` (the epoch is aborted).
    pub cow_policy: Option<CowPolicy>,
    /// Where the standby listens, `ADDRESS[:PORT]`.
    pub listen: Option<String>,
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
    /// (path of the QMP socket) and `{port}` (first network interface) are replaced.
    pub command: Vec<String>,
}

/// What differs on the standby.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standby {
    /// Its network interfaces there, if they have other names.
    #[serde(default)]
    pub ports: Vec<String>,
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
            ..*line
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| {
            // The parser's message has the line and the keys that are known.
            anyhow::anyhow!("{}", e.to_string().trim_end())
        })?;
        check_name(&config.name)?;
        if config.interval_ms == Some(0) || config.timeout_ms == Some(0) {
            bail!("interval_ms and timeout_ms have to be at least 1");
        }
        Ok(config)
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
    Ok(word)
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
            text.contains("memroy") && text.contains("interval_ms"),
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
        };
        assert_eq!(vmm.fill(&places).unwrap(), ["q", "/dev/r,4096,tap0,/q,n"]);
        places.port = None;
        assert!(vmm.fill(&places).is_err());
        assert!(Vmm { command: vec![] }.fill(&places).is_err());
    }
}
