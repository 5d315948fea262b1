// SPDX-License-Identifier: GPL-2.0-or-later

//! Manual pages and completions, from the command line's own definition.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;

/// Writes `remusctl.8`, and a page for each command, to `dir`.
pub fn man(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    page(dir, command, None)
}

fn page(dir: &Path, command: clap::Command, above: Option<&str>) -> Result<()> {
    let name = match above {
        Some(above) => format!("{above}-{}", command.get_name()),
        None => command.get_name().to_owned(),
    };
    for below in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        page(dir, below.clone(), Some(&name))?;
    }
    let path = dir.join(format!("{name}.8"));
    let mut text = Vec::new();
    clap_mangen::Man::new(command.display_name(name.clone()))
        .title(name)
        .section("8")
        .manual("Remus")
        .render(&mut text)
        .and_then(|()| fs::write(&path, text))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Prints what completes the commands in `shell`.
pub fn completions(shell: Shell) -> Result<()> {
    let mut command = Cli::command();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, "remusctl", &mut text);
    crate::commands::domain::print(String::from_utf8_lossy(&text).trim_end());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages() {
        Cli::command().debug_assert();
        let dir = tempfile::tempdir().unwrap();
        man(dir.path()).unwrap();
        let text = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(text("remusctl.8").contains("Exit codes"));
        assert!(text("remusctl-protect.8").contains("target"));
        assert!(text("remusctl-domain-add.8").contains("memory"));
        assert!(!dir.path().join("remusctl-man.8").exists());
    }
}
