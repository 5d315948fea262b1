// SPDX-License-Identifier: GPL-2.0

//! The trace: one JSON object a line, whole in the file before the next thing is done.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde_json::{Map, Value};

/// Where events are written to, or nowhere. Clones write to the same file.
#[derive(Clone, Default)]
pub struct Trace {
    file: Option<Arc<Mutex<File>>>,
}

impl Trace {
    /// Appends to the file at `path`; writes nothing without one.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .with_context(|| format!("cannot write the trace {}", path.display()))?;
        Ok(Self {
            file: Some(Arc::new(Mutex::new(file))),
        })
    }

    /// Writes an event with the members of `fields`, an object. Trouble with the file is not worth
    /// stopping for.
    pub fn event(&self, event: &str, fields: Value) {
        let Some(file) = &self.file else {
            return;
        };
        let mut line = Map::new();
        line.insert("event".into(), event.into());
        line.insert("t_ms".into(), unix_ms().into());
        if let Value::Object(fields) = fields {
            line.extend(fields);
        }
        // One write: the line is there whole or not at all when this process is killed.
        let text = format!("{}\n", Value::Object(line));
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = file.write_all(text.as_bytes());
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

/// Says something to the person who started this, on standard error.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => { eprintln!("remusctl: {}", format_args!($($arg)*)) };
}
