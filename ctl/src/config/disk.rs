// SPDX-License-Identifier: GPL-2.0-or-later

//! The disks of a domain, as its file describes them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use remus_proto::disk::DISKS_MAX;
use serde::Deserialize;

use super::{check_name, Config};

/// Most bytes of changes that are held until the standby has them, unless told otherwise.
pub const BUFFER: u64 = 256 << 20;
/// Least that can be asked for: some changes of the largest size.
pub const BUFFER_MIN: u64 = 8 << 20;

/// A disk of the guest.
///
/// ```toml
/// [[disk]]
/// name = "root"
/// node = "disk0"
/// path = "/srv/web.img"
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// What it is called in messages and in `{disk:NAME}`.
    pub name: String,
    /// The block node of the primary's QEMU that the guest's device uses (`-blockdev node-name=…`).
    pub node: String,
    /// The image on this host.
    pub path: PathBuf,
    /// What kind of image that is.
    #[serde(default)]
    pub format: Format,
}

/// What kind of image there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk, in a file or a block device.
    #[default]
    Raw,
    /// QEMU's.
    Qcow2,
}

/// When an epoch's changes of the disks count as held by the standby.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// When they are in its memory.
    #[default]
    Memory,
    /// When they are in its journal, on disk.
    Disk,
}

/// What a standby does with the disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// The disks, with the paths that they have on the standby.
    pub disks: Vec<Disk>,
    /// Where the journal is.
    pub journal: PathBuf,
    /// When changes count as held.
    pub durability: Durability,
    /// Bytes of changes that the primary may hold back (`disk_buffer`).
    pub bound: u64,
}

/// Checks what a file says of disks.
pub(super) fn check(config: &Config) -> Result<()> {
    if config.disk.len() > DISKS_MAX {
        bail!(
            "a domain can have {DISKS_MAX} disks, not {}",
            config.disk.len()
        );
    }
    for (index, disk) in config.disk.iter().enumerate() {
        check_name(&disk.name).context("disk.name")?;
        let before = config.disk.get(..index).unwrap_or(&[]);
        let path = disk.path.display().to_string();
        for (key, value, same) in [
            (
                "name",
                &disk.name,
                before.iter().any(|d| d.name == disk.name),
            ),
            (
                "node",
                &disk.node,
                before.iter().any(|d| d.node == disk.node),
            ),
            ("path", &path, before.iter().any(|d| d.path == disk.path)),
        ] {
            if same {
                bail!("two disks have the {key} {value}: give each its own");
            }
        }
    }
    let known = |name: &String| config.disk.iter().any(|d| d.name == *name);
    if let Some(name) = config.standby.disks.keys().find(|name| !known(name)) {
        bail!("standby.disks names {name}, but there is no [[disk]] of that name");
    }
    match config.disk_buffer {
        Some(size) if size.0 < BUFFER_MIN => {
            bail!(
                "disk_buffer is less than {} MiB: give it as much, or remove it ({} MiB then)",
                BUFFER_MIN >> 20,
                BUFFER >> 20
            )
        }
        _ => Ok(()),
    }
}

/// What the standby does with the disks of `config`; nothing if it has none.
pub(super) fn images(config: &Config, local: &str) -> Option<Images> {
    let here = |disk: &Disk| {
        config
            .standby
            .disks
            .get(&disk.name)
            .unwrap_or(&disk.path)
            .clone()
    };
    let disks: Vec<Disk> = config
        .disk
        .iter()
        .map(|disk| Disk {
            path: here(disk),
            ..disk.clone()
        })
        .collect();
    let first = disks.first()?;
    let usual = || first.path.with_file_name(format!("{local}.journal"));
    Some(Images {
        journal: config.journal.clone().unwrap_or_else(usual),
        durability: config.durability,
        bound: config.disk_buffer.map_or(BUFFER, |size| size.0),
        disks,
    })
}

/// Puts the paths of disks in the place of `{disk:NAME}`.
pub(super) fn fill(word: String, disks: &BTreeMap<String, PathBuf>) -> Result<String> {
    let (mut filled, mut rest) = (String::new(), word.as_str());
    while let Some((before, after)) = rest.split_once("{disk:") {
        let (name, after) = after
            .split_once('}')
            .context("vmm.command has a {disk: without its }")?;
        let Some(path) = disks.get(name) else {
            bail!("vmm.command uses {{disk:{name}}}, but there is no [[disk]] of that name");
        };
        filled = format!("{filled}{before}{}", path.display());
        rest = after;
    }
    Ok(filled + rest)
}

/// Where each disk's image is, by name.
pub fn paths(disks: &[Disk]) -> BTreeMap<String, PathBuf> {
    let path = |disk: &Disk| (disk.name.clone(), Path::to_path_buf(&disk.path));
    disks.iter().map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: &str = "[[disk]]\nname = 'root'\nnode = 'disk0'\npath = '/a/web.img'\n";

    fn parse(text: &str) -> Result<Config> {
        Config::parse(&format!("name = 'web'\nmemory = '1M'\n{text}"))
    }

    #[test]
    fn described() {
        let config = parse(&format!(
            "{DISK}[[disk]]\nname = 'data'\nnode = 'disk1'\npath = '/a/d'\nformat = 'qcow2'\n\
             [standby.disks]\nroot = '/b/web.img'\n"
        ))
        .unwrap();
        let images = images(&config, "web-b").unwrap();
        assert_eq!(images.journal, Path::new("/b/web-b.journal"));
        assert_eq!(
            (images.durability, images.bound),
            (Durability::Memory, BUFFER)
        );
        let [root, data] = images.disks.as_slice() else {
            panic!("{images:?}");
        };
        assert_eq!(
            (root.path.as_path(), root.format),
            (Path::new("/b/web.img"), Format::Raw)
        );
        assert_eq!(
            (data.path.as_path(), data.format),
            (Path::new("/a/d"), Format::Qcow2)
        );
        let word = fill("x={disk:root},y={disk:data}".into(), &paths(&images.disks)).unwrap();
        assert_eq!(word, "x=/b/web.img,y=/a/d");
        assert!(fill("{disk:none}".into(), &paths(&images.disks)).is_err());
        let odd = BTreeMap::from([("a".into(), "/{disk:a}".into())]);
        assert_eq!(fill("{disk:a}".into(), &odd).unwrap(), "/{disk:a}");
        assert!(super::images(&parse("").unwrap(), "web").is_none());
    }

    #[test]
    fn mistakes() {
        for (text, part) in [
            (format!("{DISK}{DISK}"), "two disks have the name root"),
            (
                format!("{DISK}{}", DISK.replace("root", "a").replace("disk0", "b")),
                "two disks have the path /a/web.img",
            ),
            (
                format!("{DISK}[standby.disks]\nroto = '/x'\n"),
                "names roto",
            ),
            (format!("disk_buffer = '4K'\n{DISK}"), "disk_buffer"),
            (format!("durability = 'none'\n{DISK}"), "durability"),
            (
                "[[disk]]\nname = 'a b'\nnode = 'd'\npath = '/x'\n".into(),
                "disk.name",
            ),
        ] {
            let told = format!("{:#}", parse(&text).unwrap_err());
            assert!(told.contains(part), "{told}");
        }
    }
}
