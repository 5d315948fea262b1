// SPDX-License-Identifier: GPL-2.0-or-later

//! `remusctl keys`: keys for a pair of hosts, made, handed over, installed and shown.
//!
//! A host has one file of keys for each pair that it belongs to, DIR/NAME.pem. Most belong to one,
//! which is called `default`.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{anyhow, bail, ensure, Context, Result};
use clap::{Args, Subcommand};
use rustix::fs::{renameat_with, RenameFlags, CWD};
use serde_json::json;

use crate::peer::identity::{Identity, Pair, FILE_MAX};

/// Where keys are kept.
pub const DIR: &str = "/etc/remus/keys";
/// What a pair is called that is not called otherwise.
pub const PAIR: &str = "default";

/// What to do with keys.
#[derive(Debug, Subcommand)]
pub enum Keys {
    /// Make keys for this host and another, install them here, and hand the other half over there.
    Pair(MakePair),
    /// Make keys for two hosts, as two files.
    Make(Make),
    /// Install a host's half on it.
    Install(Install),
    /// Show which keys this host has.
    Show(Show),
}

/// Which keys.
#[derive(Clone, Debug, Args)]
pub struct Place {
    /// What this pair of hosts is called, if there are several.
    #[arg(long, value_name = "NAME", default_value = PAIR)]
    pub pair: String,
    /// Where keys are kept.
    #[arg(long, value_name = "DIR", env = "REMUS_KEYS_DIR", default_value = DIR)]
    pub dir: PathBuf,
}

impl Place {
    /// The file of these keys.
    pub fn path(&self) -> Result<PathBuf> {
        path(&self.dir, &self.pair)
    }
}

/// The file of the keys for `pair`.
pub fn path(dir: &Path, pair: &str) -> Result<PathBuf> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    ensure!(
        (1..=100).contains(&pair.len())
            && pair.bytes().all(fits)
            && pair.starts_with(|c: char| c.is_ascii_alphanumeric()),
        "{pair:?} cannot be a pair's name: use letters, digits, -, _ and ., a letter or digit first"
    );
    Ok(dir.join(format!("{pair}.pem")))
}

/// What the two hosts are called.
#[derive(Clone, Debug, Args)]
pub struct Names {
    /// What the two hosts are called, the first of them this one.
    #[arg(long, value_name = "A,B", default_value = "a,b")]
    pub names: String,
}

impl Names {
    fn make(&self) -> Result<Pair> {
        let Some((one, other)) = self.names.split_once(',') else {
            bail!("--names wants two names with a comma between them, such as alpha,beta");
        };
        Pair::make(one.trim(), other.trim())
    }
}

/// Arguments of `keys pair`.
#[derive(Debug, Args)]
pub struct MakePair {
    /// The other host, as the command that reaches it calls it.
    #[arg(long, value_name = "HOST")]
    pub to: String,
    /// Command that runs another on a host.
    #[arg(long, value_name = "CMD", default_value = "ssh")]
    pub rsh: String,
    /// What they are called.
    #[command(flatten)]
    pub names: Names,
    /// Which keys.
    #[command(flatten)]
    pub place: Place,
    /// Replace keys that are there already, on both hosts.
    #[arg(short = 'F', long)]
    pub force: bool,
}

/// Arguments of `keys make`.
#[derive(Debug, Args)]
pub struct Make {
    /// What they are called.
    #[command(flatten)]
    pub names: Names,
    /// Where to put the two files.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub out: PathBuf,
    /// Replace files that are there already.
    #[arg(short = 'F', long)]
    pub force: bool,
}

/// Arguments of `keys install`.
#[derive(Debug, Args)]
pub struct Install {
    /// A host's half; - is standard input.
    pub file: PathBuf,
    /// Which keys.
    #[command(flatten)]
    pub place: Place,
    /// Replace keys that are there already.
    #[arg(short = 'F', long)]
    pub force: bool,
}

/// Arguments of `keys show`.
#[derive(Debug, Args)]
pub struct Show {
    /// A file of keys; by default all that are installed.
    pub file: Option<PathBuf>,
    /// Where keys are kept.
    #[arg(long, value_name = "DIR", env = "REMUS_KEYS_DIR", default_value = DIR)]
    pub dir: PathBuf,
    /// Print JSON.
    #[arg(short, long)]
    pub json: bool,
}

/// Does it, and returns what to tell the user.
pub fn run(keys: &Keys) -> Result<String> {
    match keys {
        Keys::Pair(args) => pair(args),
        Keys::Make(args) => make(args),
        Keys::Install(args) => install(args, &mut io::stdin()),
        Keys::Show(args) => show(args),
    }
}

/// Makes two files.
pub fn make(args: &Make) -> Result<String> {
    let made = args.names.make()?;
    let files = made.halves.each_ref().map(|(name, text)| {
        let path = args.out.join(format!("{name}.pem"));
        (path, text.as_bytes())
    });
    if !args.force {
        for (path, _) in &files {
            ensure!(
                !path.exists(),
                "{} is there already: name another --out, or replace it with -F",
                path.display()
            );
        }
    }
    // Both or, as far as can be, neither.
    let staged = files.each_ref().map(|(path, text)| Staged::new(path, text));
    let [one, other] = staged;
    one?.put(args.force)?;
    other?.put(args.force)?;
    let [(one, _), (other, _)] = &files;
    let (one, other) = (one.display(), other.display());
    Ok(format!(
        "wrote {one} and {other}\n\
         Each is one host's secret: bring it there, run remusctl keys install FILE there, and delete it here."
    ))
}

/// Installs a half, from a file or from `stdin`.
pub fn install(args: &Install, stdin: &mut dyn Read) -> Result<String> {
    let shown = args.file.display();
    let mut text = Vec::new();
    let of_stdin = args.file == Path::new("-");
    let read = if of_stdin {
        stdin.take(FILE_MAX + 1).read_to_end(&mut text)
    } else {
        File::open(&args.file).and_then(|f| f.take(FILE_MAX + 1).read_to_end(&mut text))
    };
    read.with_context(|| format!("cannot read {shown}"))?;
    let identity = Identity::parse(&text).with_context(|| {
        format!("{shown} is not a file of remusctl keys make: nothing was installed")
    })?;
    identity.check()?;
    let path = args.place.path()?;
    make_dir(&args.place.dir)?;
    if same(&path, &text) {
        return Ok(format!("{} has these keys already", path.display()));
    }
    check_free(&path, args.force)?;
    Staged::new(&path, &text)?.put(args.force)?;
    let (name, peer) = (identity.name(), identity.peer());
    let advice = if of_stdin {
        String::new()
    } else {
        format!("\nDelete {shown} now: it is a secret.")
    };
    Ok(format!(
        "installed {}: this host is {name}, the other one {peer}{advice}",
        path.display()
    ))
}

/// Makes keys, and installs one half here and the other on another host. That one's is never in a
/// file here.
pub fn pair(args: &MakePair) -> Result<String> {
    let to = &args.to;
    ensure!(
        !to.is_empty() && !to.starts_with('-'),
        "{to:?} is not a host"
    );
    let mut words = args.rsh.split_whitespace();
    let program = words.next().context("--rsh wants a command")?;
    let path = args.place.path()?;
    make_dir(&args.place.dir)?;
    check_free(&path, args.force)?;
    let made = args.names.make()?;
    let [(name, own), (peer, theirs)] = &made.halves;
    // Written before the other host is asked, so that little can fail after it has agreed.
    let staged = Staged::new(&path, own.as_bytes())?;

    let mut remote: Vec<OsString> = words.map(OsString::from).collect();
    let tail = ["keys", "install", "-", "--pair", args.place.pair.as_str()];
    remote.extend([to.as_str(), "remusctl"].map(OsString::from));
    remote.extend(tail.map(OsString::from));
    if args.force {
        remote.push("-F".into());
    }
    let mut child = Command::new(program)
        .args(&remote)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| {
            format!(
                "cannot run {program}: name another command with --rsh, or use remusctl keys make"
            )
        })?;
    let sent = match child.stdin.take() {
        Some(mut stdin) => stdin.write_all(theirs.as_bytes()),
        None => Err(ErrorKind::BrokenPipe.into()),
    };
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "{program} {to} remusctl keys install failed ({}): nothing was changed here; see what it says \
             above, or use remusctl keys make",
            output.status
        );
    }
    sent.with_context(|| format!("{program} did not take the keys: nothing was changed here"))?;
    staged.put(args.force).with_context(|| {
        format!("{to} has its half now and this host has not: do it again with -F")
    })?;
    let told = String::from_utf8_lossy(&output.stdout);
    let told = match told.trim() {
        "" => String::new(),
        text => format!("\n{to}: {text}"),
    };
    Ok(format!(
        "installed {}: this host is {name}, {to} is {peer}{told}",
        path.display()
    ))
}

/// What keys there are.
pub fn show(args: &Show) -> Result<String> {
    let files = match &args.file {
        Some(file) => vec![file.clone()],
        None => installed(&args.dir)?,
    };
    if files.is_empty() && !args.json {
        bail!(
            "there are no keys in {}: make a pair with remusctl keys pair --to HOST",
            args.dir.display()
        );
    }
    let mut all = Vec::new();
    let mut text = Vec::new();
    for file in &files {
        let identity = Identity::read(file);
        // One file that is asked for has to be good enough to show.
        let identity = match (identity, &args.file) {
            (Err(e), Some(_)) => return Err(e),
            (identity, _) => identity,
        };
        let problem = match &identity {
            Ok(identity) => identity.check().err(),
            Err(_) => None,
        };
        let shown = file.display().to_string();
        let mut lines = format!("{shown}\n");
        let mut object = json!({"file": shown});
        match &identity {
            Ok(identity) => {
                let about = identity.describe();
                lines.push_str(&about.to_string());
                if let (Some(to), serde_json::Value::Object(from)) =
                    (object.as_object_mut(), serde_json::to_value(about)?)
                {
                    to.extend(from);
                }
            }
            Err(e) => lines.push_str(&format!("problem      {e:#}")),
        }
        if let Some(e) = problem.as_ref().or(identity.as_ref().err()) {
            if identity.is_ok() {
                lines.push_str(&format!("\nproblem      {e:#}"));
            }
            if let Some(object) = object.as_object_mut() {
                object.insert("problem".into(), format!("{e:#}").into());
            }
        }
        all.push(object);
        text.push(lines);
    }
    match args.json {
        true => Ok(serde_json::to_string_pretty(&all)?),
        false => Ok(text.join("\n\n")),
    }
}

/// The files of keys in `dir`.
fn installed(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("cannot read {}", dir.display()))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".pem") && !name.starts_with('.') {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Makes the directory of keys, or fails if others could put theirs in it.
fn make_dir(dir: &Path) -> Result<()> {
    let shown = dir.display();
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot create {shown}"))?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
        other => other.with_context(|| format!("cannot create {shown}"))?,
    }
    let mode = fs::metadata(dir).with_context(|| shown.to_string())?.mode();
    ensure!(
        mode & 0o022 == 0,
        "others can write to {shown}: chmod 700 {shown}"
    );
    Ok(())
}

fn same(path: &Path, text: &[u8]) -> bool {
    Identity::read(path).is_ok() && fs::read(path).is_ok_and(|there| there == text)
}

/// Fails if there are keys that must not be replaced.
fn check_free(path: &Path, force: bool) -> Result<()> {
    if force || path.symlink_metadata().is_err() {
        return Ok(());
    }
    let shown = path.display();
    let whose = match Identity::read(path) {
        Ok(there) => format!(
            "this host is {}, the other one {}",
            there.name(),
            there.peer()
        ),
        Err(_) => "they are damaged".to_owned(),
    };
    bail!(
        "there are keys in {shown} already ({whose}): replace them with -F, or name another --pair"
    )
}

/// A file that is written whole but not in its place yet. It goes away again unless it is put there.
struct Staged {
    temporary: PathBuf,
    path: PathBuf,
    done: bool,
}

impl Staged {
    fn new(path: &Path, text: &[u8]) -> Result<Self> {
        let shown = path.display();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // Two that run at once do not meet.
        let temporary = path.with_file_name(format!(".{name}.{}", std::process::id()));
        let _ = fs::remove_file(&temporary);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary);
        let mut file = file.with_context(|| format!("cannot write {shown}"))?;
        let staged = Self {
            temporary,
            path: path.to_owned(),
            done: false,
        };
        file.write_all(text)
            .and_then(|()| file.sync_all())
            .with_context(|| format!("cannot write {shown}"))?;
        Ok(staged)
    }

    fn put(mut self, replace: bool) -> Result<()> {
        let shown = self.path.display();
        let flags = match replace {
            true => RenameFlags::empty(),
            false => RenameFlags::NOREPLACE,
        };
        renameat_with(CWD, &self.temporary, CWD, &self.path, flags).map_err(|e| match e {
            rustix::io::Errno::EXIST => anyhow!("{shown} is there already: replace it with -F"),
            _ => anyhow!("cannot write {shown}: {e}"),
        })?;
        self.done = true;
        let dir = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        // Nothing can be done about it where this fails, and the file is there.
        let _ = File::open(dir.unwrap_or(Path::new("."))).and_then(|d| d.sync_all());
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(subcommand)]
        keys: Keys,
    }

    /// Runs a command line in `dir`, where @ stands for that directory.
    fn keys(dir: &Path, line: &str) -> Result<String> {
        let line = line.replace('@', dir.to_str().unwrap());
        let words = line.split(' ').map(|w| w.replace('~', " "));
        let parsed = Line::try_parse_from(std::iter::once("keys".to_owned()).chain(words))?;
        run(&parsed.keys)
    }

    fn error(dir: &Path, line: &str) -> String {
        format!("{:#}", keys(dir, line).unwrap_err())
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    /// All names in a directory, hidden ones too.
    fn listing(dir: &Path) -> Vec<String> {
        let name = |e: io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn made_and_installed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let said = keys(dir, "make --names alpha,beta --out @").unwrap();
        assert!(
            said.contains("alpha.pem") && said.contains("delete it here"),
            "{said}"
        );
        assert_eq!(listing(dir), ["alpha.pem", "beta.pem"]);
        assert_eq!(mode(&dir.join("alpha.pem")), 0o600);
        assert!(error(dir, "make --names alpha,gamma --out @").contains("there already"));
        assert_eq!(listing(dir), ["alpha.pem", "beta.pem"]);

        let said = keys(dir, "install @/alpha.pem --dir @/etc/remus/keys").unwrap();
        assert!(
            said.contains("this host is alpha, the other one beta"),
            "{said}"
        );
        assert!(said.contains("Delete"), "{said}");
        let place = dir.join("etc/remus/keys");
        assert_eq!(listing(&place), ["default.pem"]);
        assert_eq!(mode(&place), 0o700);
        assert_eq!(mode(&place.join("default.pem")), 0o600);
        Identity::load(&place.join("default.pem")).unwrap();
        // The same again is no trouble; another is.
        let said = keys(dir, "install @/alpha.pem --dir @/etc/remus/keys").unwrap();
        assert!(said.contains("already"), "{said}");
        let said = error(dir, "install @/beta.pem --dir @/etc/remus/keys");
        assert!(
            said.contains("this host is alpha, the other one beta"),
            "{said}"
        );
        assert!(said.contains("-F"), "{said}");
        assert_eq!(
            Identity::load(&place.join("default.pem")).unwrap().name(),
            "alpha"
        );
        keys(dir, "install @/beta.pem --dir @/etc/remus/keys -F").unwrap();
        assert_eq!(
            Identity::load(&place.join("default.pem")).unwrap().name(),
            "beta"
        );
        keys(
            dir,
            "install @/alpha.pem --dir @/etc/remus/keys --pair lab-2",
        )
        .unwrap();
        assert_eq!(listing(&place), ["default.pem", "lab-2.pem"]);
        keys(dir, "make --names alpha,beta --out @ -F").unwrap();
    }

    #[test]
    fn wrong_input() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        for (line, why) in [
            ("make --names a --out @", "two names"),
            ("make --names a,a --out @", "different names"),
            ("make --names a,../b --out @", "cannot be a name"),
            ("make --out @/none", "cannot write"),
            ("install @/none --dir @/keys", "cannot read"),
            ("install /dev/zero --dir @/keys", "too long"),
            (
                "install /dev/null --dir @/keys",
                "not a file of remusctl keys make",
            ),
            ("show --dir @/keys", "there are no keys"),
            ("show @/none", "there are no keys"),
            (
                "pair --to -oProxyCommand=x --dir @/keys",
                "unexpected argument",
            ),
            ("pair --to=-oProxyCommand=x --dir @/keys", "is not a host"),
            ("pair --to x --rsh @/none --dir @/keys", "--rsh"),
        ] {
            let said = error(dir, line);
            assert!(said.contains(why), "{line}: {said}");
        }
        keys(dir, "make --out @").unwrap();
        for pair in ["", "../x", "a/b", ".x", "-x", "a b", "a;b", "a\n"] {
            let pair = pair.replace(' ', "~");
            let said = error(dir, &format!("install @/a.pem --dir @/keys --pair={pair}"));
            assert!(said.contains("cannot be a pair's name"), "{pair}: {said}");
        }
        fs::create_dir(dir.join("open")).unwrap();
        fs::set_permissions(dir.join("open"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(error(dir, "install @/a.pem --dir @/open").contains("chmod 700"));
        assert_eq!(listing(dir), ["a.pem", "b.pem", "keys", "open"]);
        assert!(listing(&dir.join("keys")).is_empty());
    }

    #[test]
    fn shown() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert_eq!(keys(dir, "show --dir @/keys -j").unwrap(), "[]");
        keys(dir, "make --out @").unwrap();
        keys(dir, "install @/a.pem --dir @/keys").unwrap();
        let said = keys(dir, "show --dir @/keys").unwrap();
        assert!(said.contains("this host    a\nother host   b\n"), "{said}");
        assert!(
            !said.contains("problem") && !said.contains("PRIVATE"),
            "{said}"
        );
        let said = keys(dir, "show @/b.pem -j").unwrap();
        let value: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(value[0]["peer"], "a");
        assert_eq!(value[0]["pair-fingerprint"].as_str().unwrap().len(), 95);
        // What is wrong with one does not hide the others.
        fs::write(dir.join("keys/x.pem"), "x").unwrap();
        fs::set_permissions(dir.join("keys/x.pem"), fs::Permissions::from_mode(0o644)).unwrap();
        let said = keys(dir, "show --dir @/keys").unwrap();
        assert!(
            said.contains("this host    a") && said.contains("chmod 600"),
            "{said}"
        );
        let said = keys(dir, "show --dir @/keys -j").unwrap();
        let value: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert!(value[1]["problem"].as_str().unwrap().contains("chmod 600"));
    }

    fn script(dir: &Path, text: &str) {
        let path = dir.join("rsh");
        let _ = fs::remove_file(&path);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    }

    /// Both hosts get their half, and the other host's key is in no file here.
    #[test]
    fn handed_over() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let there = dir.join("there");
        fs::create_dir(&there).unwrap();
        let shown = there.display();
        // The shell first, so that no thread of another test's keeps the script open for writing.
        script(
            dir,
            &format!(
                "echo \"$*\" > {shown}/line; umask 077; cat > {shown}/got.pem; echo done there"
            ),
        );
        let line = "pair --to root@host --rsh sh~@/rsh~-v --dir @/keys --names alpha,beta";
        let line = line.replace("root@host", "host");
        let said = keys(dir, &line).unwrap();
        assert!(
            said.contains("this host is alpha, host is beta\nhost: done there"),
            "{said}"
        );
        let told = fs::read_to_string(there.join("line")).unwrap();
        assert_eq!(
            told.trim(),
            "-v host remusctl keys install - --pair default"
        );
        let here = Identity::load(&dir.join("keys/default.pem")).unwrap();
        let other = Identity::load(&there.join("got.pem")).unwrap();
        assert_eq!((here.name(), other.name()), ("alpha", "beta"));
        assert_eq!(
            here.describe().pair_fingerprint,
            other.describe().pair_fingerprint
        );
        assert_eq!(listing(&dir.join("keys")), ["default.pem"]);

        // Not again, unless forced, and then the other side is told so.
        fs::remove_file(there.join("line")).unwrap();
        assert!(error(dir, &line).contains("-F"));
        assert!(!there.join("line").exists());
        keys(dir, &format!("{line} -F")).unwrap();
        let told = fs::read_to_string(there.join("line")).unwrap();
        assert!(told.trim().ends_with("--pair default -F"), "{told}");
        let now = Identity::load(&dir.join("keys/default.pem")).unwrap();
        assert_ne!(now.describe().fingerprint, here.describe().fingerprint);
    }

    /// What was there stays where the other host refuses or cannot be reached, and nothing is left over.
    #[test]
    fn not_handed_over() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        keys(dir, "make --out @").unwrap();
        keys(dir, "install @/a.pem --dir @/keys").unwrap();
        let before = fs::read(dir.join("keys/default.pem")).unwrap();
        for text in ["exit 1", "cat > /dev/null; exit 255", "kill -9 $$"] {
            script(dir, text);
            let said = error(dir, "pair --to host --rsh sh~@/rsh --dir @/keys -F");
            assert!(said.contains("nothing was changed here"), "{text}: {said}");
            assert_eq!(fs::read(dir.join("keys/default.pem")).unwrap(), before);
            assert_eq!(listing(&dir.join("keys")), ["default.pem"]);
        }
    }

    /// Whoever looks at the place meanwhile sees old keys or new ones, whole.
    #[test]
    fn replaced_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        keys(dir, "make --out @").unwrap();
        keys(dir, "install @/a.pem --dir @/keys").unwrap();
        std::thread::scope(|s| {
            let writer = s.spawn(|| {
                for half in ["b", "a"].iter().cycle().take(40) {
                    keys(dir, &format!("install @/{half}.pem --dir @/keys -F")).unwrap();
                }
            });
            while !writer.is_finished() {
                Identity::load(&dir.join("keys/default.pem")).unwrap();
            }
        });
        // Without force, what came in between is not replaced either.
        let path = dir.join("keys/default.pem");
        let staged = Staged::new(&path, b"x").unwrap();
        assert!(staged.put(false).is_err());
        Identity::load(&path).unwrap();
        assert_eq!(listing(&dir.join("keys")), ["default.pem"]);
    }

    #[test]
    fn from_standard_input() {
        let dir = tempfile::tempdir().unwrap();
        let text = Pair::make("a", "b").unwrap().halves[1].1.clone();
        let args = Install {
            file: "-".into(),
            place: Place {
                pair: PAIR.into(),
                dir: dir.path().join("keys"),
            },
            force: false,
        };
        let said = install(&args, &mut text.as_bytes()).unwrap();
        assert!(
            said.contains("this host is b") && !said.contains("Delete"),
            "{said}"
        );
        let half = &text.as_bytes()[..text.len() / 2];
        assert!(install(&args, &mut &*half).is_err());
        Identity::load(&args.place.path().unwrap()).unwrap();
    }
}
