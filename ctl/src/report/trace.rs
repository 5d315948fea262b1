// SPDX-License-Identifier: GPL-2.0-or-later

//! The trace: one JSON object a line, whole in the file before the next thing is done.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use crate::peer::stream::lock;

/// A file that lines are appended to.
pub struct Lines(Mutex<File>);

impl Lines {
    /// Appends to the file at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .with_context(|| format!("cannot write the trace {}", path.display()))?;
        Ok(Self(Mutex::new(file)))
    }

    /// Writes a line, which ends in a newline. Trouble with the file is not worth stopping for.
    pub fn write(&self, line: &str) {
        // One write: the line is there whole or not at all when this process is killed.
        let _ = lock(&self.0).write_all(line.as_bytes());
    }
}

/// Milliseconds since 1970, with fraction.
pub fn unix_ms() -> f64 {
    ms(SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default())
}

/// A time span in milliseconds, rounded to microseconds.
pub fn ms(span: Duration) -> f64 {
    span.as_micros() as f64 / 1000.0
}
