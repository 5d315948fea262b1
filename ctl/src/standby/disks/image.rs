// SPDX-License-Identifier: GPL-2.0-or-later

//! An image: what a disk of the guest is kept in on this host.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{bail, Context, Result};
use remus_core::uapi::NAME_MAX;

use super::lock;
use super::medium::{Medium, Plain};
use super::qcow2::Export;
use super::{Format, Spec};

/// An image that this process has for itself.
pub(super) struct Image {
    pub(super) name: String,
    /// In bytes.
    pub(super) size: u64,
    pub(super) medium: Box<dyn Medium>,
    /// Dropped after `medium`, which is of it.
    pub(super) _export: Option<Export>,
}

impl Image {
    /// Opens and locks it. `mount` is a path where the content of a qcow2 image may be shown.
    pub(super) fn open(spec: &Spec, mount: &Path) -> Result<Self> {
        let (name, path) = (&spec.name, spec.path.as_path());
        if name.is_empty() || name.len() > NAME_MAX {
            bail!("a disk's name has 1 to {NAME_MAX} bytes, '{name}' has not: give it another");
        }
        let file = open(path).map_err(|e| missing(e, spec))?;
        let device = file.metadata()?.file_type().is_block_device();
        let room = (!device).then(|| path.to_owned());
        let (mut plain, export) = match spec.format {
            Format::Raw => {
                let plain = Plain { file, room };
                lock::lock(&plain.file, path)?;
                (plain, None)
            }
            Format::Qcow2 => {
                let export = Export::start(path, mount)?;
                let file = open(export.mount())
                    .with_context(|| format!("cannot open {}", export.mount().display()))?;
                (Plain { file, room }, Some(export))
            }
        };
        let size = plain
            .file
            .seek(SeekFrom::End(0))
            .with_context(|| format!("cannot tell the size of {}", path.display()))?;
        Ok(Self {
            name: name.clone(),
            size,
            medium: Box::new(plain),
            _export: export,
        })
    }

    /// Why it cannot be written to, and what to do.
    pub(super) fn unwritten(&self, e: io::Error) -> anyhow::Error {
        let name = &self.name;
        let what = match e.kind() {
            ErrorKind::StorageFull => {
                format!("there is no space for the image of {name}: free some on its file system")
            }
            _ => format!("cannot write to the image of {name}"),
        };
        anyhow::Error::new(e).context(what)
    }

    /// Returns when what was written to it would outlive a loss of power.
    pub(super) fn sync(&self) -> Result<()> {
        let done = self.medium.sync();
        done.with_context(|| format!("cannot write the image of {} to its disk", self.name))
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn missing(e: io::Error, spec: &Spec) -> anyhow::Error {
    let path = spec.path.display();
    let format = match spec.format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    };
    let what = match e.kind() {
        ErrorKind::NotFound => format!(
            "the image {path} of {} is missing: create it with: qemu-img create -f {format} {path} SIZE \
             (as large as the disk on the primary)",
            spec.name
        ),
        _ => format!("cannot open the image {path} of {}", spec.name),
    };
    anyhow::Error::new(e).context(what)
}
