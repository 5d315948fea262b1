// SPDX-License-Identifier: GPL-2.0-or-later

//! How far the first copy is, for who watches at a terminal.

use std::io::{stderr, IsTerminal};
use std::sync::Mutex;

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};

use crate::peer::stream::lock;
use crate::report::live::Progress;

/// A bar on standard error, if that is a terminal.
#[derive(Default)]
pub struct Bar(Mutex<Option<ProgressBar>>);

impl Bar {
    /// Shows this, from the first call on.
    pub fn show(&self, progress: &Progress) {
        if !stderr().is_terminal() {
            return;
        }
        let mut bar = lock(&self.0);
        let bar = bar.get_or_insert_with(|| {
            let bar = ProgressBar::new(progress.pages_total);
            // A template of our own that is wrong shows in the test below.
            if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
                bar.set_style(style);
            }
            bar
        });
        bar.set_length(progress.pages_total);
        bar.set_position(progress.pages_done);
        bar.set_prefix(format!("first copy, {}", progress.what()));
        bar.set_message(words(progress));
    }

    /// Takes it away.
    pub fn end(&self) {
        if let Some(bar) = lock(&self.0).take() {
            bar.finish_and_clear();
        }
    }
}

const TEMPLATE: &str = "{prefix} {bar:30} {percent}%, {msg}";

fn words(progress: &Progress) -> String {
    let left = progress.seconds_left.unwrap_or(0.0).clamp(0.0, 1e9);
    format!(
        "{}/s, {} left",
        HumanBytes(progress.bytes_per_s as u64),
        HumanDuration(std::time::Duration::from_secs_f64(left))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_says() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
        let progress = Progress {
            pass: 1,
            pages_done: 50,
            pages_total: 100,
            bytes_per_s: 2.0 * 1024.0 * 1024.0,
            seconds_left: Some(90.0),
            ..Progress::default()
        };
        assert_eq!(words(&progress), "2.00 MiB/s, 2 minutes left");
        Bar::default().end();
    }
}
