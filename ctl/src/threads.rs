// SPDX-License-Identifier: GPL-2.0-or-later

//! Threads.

use std::io;
use std::thread::{Builder, Scope};

/// Starts a thread of `scope` that tools show with this name.
pub fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() + Send + 'scope,
) -> io::Result<()> {
    let thread = Builder::new().name(name.into());
    thread.spawn_scoped(scope, work).map(drop)
}
