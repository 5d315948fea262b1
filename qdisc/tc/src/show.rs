// SPDX-License-Identifier: GPL-2.0

//! What `tc` shows of a `remus` queue discipline: named values, from which [`Print`] makes words or JSON.

use crate::uapi::{direction, tca, tca::Stats};
use core::{ffi::CStr, fmt, mem::offset_of};

/// How a number is written in words; JSON has the bare number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// As it is.
    Plain,
    /// Packets: `65536p`.
    Packets,
    /// Bytes: `256Mb`.
    Bytes,
    /// Nanoseconds: `12.3ms`.
    Time,
}

/// Where the values go.
pub(crate) trait Print {
    /// A name or a choice. In words it follows `word`.
    fn text(&mut self, key: &'static CStr, word: &'static CStr, value: &CStr);
    /// A number. In words it follows `word`.
    fn number(&mut self, key: &'static CStr, word: &'static CStr, unit: Unit, value: u64);
    /// A flag: in words `word`, in JSON whether it is set.
    fn flag(&mut self, key: &'static CStr, word: &'static CStr, value: bool);
    /// In words, a new line of statistics begins.
    fn line(&mut self, first: bool);
}

/// The attributes in a nest: type and content. Ends at the first one that makes no sense.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        const HEADER: usize = 4;
        let head = self.0.first_chunk::<HEADER>()?;
        let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        // Above are the flags NLA_F_NESTED and NLA_F_NET_BYTEORDER.
        let kind = u16::from_ne_bytes([head[2], head[3]]) & 0x3fff;
        let content = self.0.get(HEADER..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, content))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn direction(number: u32) -> &'static CStr {
    if number == u32::from(direction::GUEST) {
        c"guest"
    } else if number == u32::from(direction::EGRESS) {
        c"egress"
    } else {
        // Of a module newer than this.
        c"unknown"
    }
}

/// Shows the content of `TCA_OPTIONS`. Attributes that are not there are not shown.
pub(crate) fn options(nest: &[u8], out: &mut impl Print) {
    // The order is that of the command line, whatever the module's is.
    let find = |kind| Attributes(nest).find_map(|(k, content)| (k == kind).then_some(content));
    if let Some(name) = find(tca::DOMAIN).and_then(|c| CStr::from_bytes_until_nul(c).ok()) {
        out.text(c"domain", c"domain", name);
    }
    if let Some(&[number]) = find(tca::DIRECTION) {
        out.text(c"direction", c"direction", direction(u32::from(number)));
    }
    if let Some(packets) = find(tca::LIMIT_PACKETS).and_then(|c| u32_at(c, 0)) {
        out.number(
            c"limit_packets",
            c"limit",
            Unit::Packets,
            u64::from(packets),
        );
    }
    if let Some(bytes) = find(tca::LIMIT_BYTES).and_then(|c| u64_at(c, 0)) {
        out.number(c"limit_bytes", c"limit", Unit::Bytes, bytes);
    }
    if let Some(&[passthrough]) = find(tca::PASSTHROUGH) {
        let word = if passthrough == 0 {
            c"hold"
        } else {
            c"passthrough"
        };
        out.flag(c"passthrough", word, passthrough != 0);
    }
}

/// A number of [`Stats`] and how it is shown.
struct Figure {
    key: &'static CStr,
    word: &'static CStr,
    unit: Unit,
    at: usize,
}

macro_rules! figures {
    ($($key:literal, $word:literal, $unit:ident, $field:ident;)*) => {
        &[$(Figure { key: $key, word: $word, unit: Unit::$unit, at: offset_of!(Stats, $field) }),*]
    };
}

/// Line by line. Not "packets", "bytes" and "drops": in JSON, tc's own figures beside them have these names.
const FIGURES: [&[Figure]; 3] = [
    figures! {
        c"open_epoch", c"open", Plain, open_epoch;
        c"sealed_epochs", c"sealed", Plain, sealed_epochs;
        c"committed_epoch", c"committed", Plain, committed_epoch;
    },
    figures! {
        c"held_packets", c"held", Packets, packets;
        c"held_bytes", c"bytes", Bytes, bytes;
        c"held_memory", c"memory", Bytes, memory;
        c"hold_last_ns", c"hold_last", Time, hold_last_ns;
        c"hold_max_ns", c"hold_max", Time, hold_max_ns;
    },
    figures! {
        c"dropped_limit", c"dropped_limit", Plain, dropped_limit;
        c"dropped_memory", c"dropped_memory", Plain, dropped_memory;
        c"dropped_discarded", c"dropped_discarded", Plain, dropped_discarded;
    },
];

/// Shows the content of `TCA_STATS_APP`. An older module's is shorter: what is not there is not shown. A
/// newer one's is longer: what is not known is not shown either.
pub(crate) fn stats(stats: &[u8], out: &mut impl Print) {
    for (i, figures) in FIGURES.into_iter().enumerate() {
        if !figures.iter().any(|f| u64_at(stats, f.at).is_some()) {
            continue;
        }
        out.line(i == 0);
        if i == 0 {
            if let Some(passthrough) = u32_at(stats, offset_of!(Stats, passthrough)) {
                let mode = if passthrough == 0 {
                    c"holding"
                } else {
                    c"passing"
                };
                out.text(c"mode", c"mode", mode);
            }
            if let Some(number) = u32_at(stats, offset_of!(Stats, direction)) {
                out.text(c"direction", c"direction", direction(number));
            }
        }
        for figure in figures {
            if let Some(value) = u64_at(stats, figure.at) {
                out.number(figure.key, figure.word, figure.unit, value);
            }
        }
    }
}

/// Writes a size as it could be typed: in the largest of `tc`'s units that divides it.
pub(crate) fn size(bytes: u64, to: &mut impl fmt::Write) -> fmt::Result {
    let (shift, unit) = match bytes.trailing_zeros() {
        _ if bytes == 0 => (0, "b"),
        30.. => (30, "Gb"),
        20.. => (20, "Mb"),
        10.. => (10, "Kb"),
        _ => (0, "b"),
    };
    write!(to, "{}{unit}", bytes >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    /// What was shown, in words.
    #[derive(Default)]
    struct Words(String);

    impl Words {
        fn word(&mut self, word: &CStr) {
            write!(self.0, "{} ", word.to_str().unwrap()).unwrap();
        }
    }

    impl Print for Words {
        fn text(&mut self, key: &'static CStr, word: &'static CStr, value: &CStr) {
            assert!(!key.is_empty());
            self.word(word);
            self.word(value);
        }

        fn number(&mut self, _: &'static CStr, word: &'static CStr, unit: Unit, value: u64) {
            self.word(word);
            match unit {
                Unit::Plain => write!(self.0, "{value} "),
                Unit::Packets => write!(self.0, "{value}p "),
                Unit::Bytes => size(value, &mut self.0).and_then(|()| self.0.write_str(" ")),
                Unit::Time => write!(self.0, "{value}ns "),
            }
            .unwrap();
        }

        fn flag(&mut self, _: &'static CStr, word: &'static CStr, _: bool) {
            self.word(word);
        }

        fn line(&mut self, first: bool) {
            self.0.push_str(if first { "  " } else { "\n  " });
        }
    }

    fn attribute(kind: u16, content: &[u8]) -> Vec<u8> {
        let mut out = (4 + content.len() as u16).to_ne_bytes().to_vec();
        out.extend(kind.to_ne_bytes());
        out.extend(content);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    fn all() -> Vec<u8> {
        [
            attribute(tca::LIMIT_BYTES, &(256_u64 << 20).to_ne_bytes()),
            attribute(tca::DOMAIN, b"web\0"),
            attribute(99, b"new"),
            attribute(tca::DIRECTION, &[direction::GUEST]),
            attribute(tca::PASSTHROUGH, &[1]),
            attribute(tca::LIMIT_PACKETS | 0x8000, &1000_u32.to_ne_bytes()),
        ]
        .concat()
    }

    fn shown(nest: &[u8]) -> String {
        let mut words = Words::default();
        options(nest, &mut words);
        words.0
    }

    #[test]
    fn options_can_be_typed_again() {
        let words = shown(&all());
        assert_eq!(
            words,
            "domain web direction guest limit 1000p limit 256Mb passthrough "
        );
        let words: Vec<_> = words.split_ascii_whitespace().map(str::as_bytes).collect();
        let typed = crate::options::Options::parse(words).unwrap();
        assert_eq!(typed.domain, Some(&b"web"[..]));
        assert_eq!((typed.packets, typed.bytes), (Some(1000), Some(256 << 20)));
        assert_eq!(typed.passthrough, Some(true));
    }

    #[test]
    fn options_of_an_older_module() {
        assert_eq!(shown(&attribute(tca::DOMAIN, b"web\0")), "domain web ");
        assert_eq!(shown(&attribute(tca::PASSTHROUGH, &[0])), "hold ");
        assert_eq!(shown(&[]), "");
    }

    #[test]
    fn options_that_make_no_sense() {
        // Without a NUL, too short, of no known direction, and cut off anywhere.
        assert_eq!(shown(&attribute(tca::DOMAIN, b"web")), "");
        assert_eq!(shown(&attribute(tca::LIMIT_PACKETS, &[1, 2])), "");
        assert_eq!(shown(&attribute(tca::DIRECTION, &[1, 2])), "");
        assert_eq!(
            shown(&attribute(tca::DIRECTION, &[7])),
            "direction unknown "
        );
        assert_eq!(shown(&[0, 0, 1, 0, 0, 0, 0, 0]), "");
        assert_eq!(shown(&[3, 0, 1, 0]), "");
        assert_eq!(shown(&[255, 255, 1, 0, 0]), "");
        let all = all();
        for end in 0..all.len() {
            shown(&all[..end]);
        }
    }

    /// A `Stats` whose every byte tells where it is.
    fn bytes() -> Vec<u8> {
        (0..size_of::<Stats>() as u8).collect()
    }

    fn shown_stats(bytes: &[u8]) -> String {
        let mut words = Words::default();
        stats(bytes, &mut words);
        words.0
    }

    #[test]
    fn every_figure_is_shown_once() {
        let mut at: Vec<_> = FIGURES.into_iter().flatten().map(|f| f.at).collect();
        at.sort_unstable();
        assert!(at.iter().enumerate().all(|(i, &at)| at == 8 * i), "{at:?}");
        assert_eq!(offset_of!(Stats, passthrough), 8 * at.len());
        assert_eq!(size_of::<Stats>(), 8 * at.len() + 8);
    }

    #[test]
    fn stats_of_an_older_and_a_newer_module() {
        let mut bytes = bytes();
        let end = bytes.len();
        bytes[end - 8..].copy_from_slice(&[0, 0, 0, 0, 2, 0, 0, 0]);
        let whole = shown_stats(&bytes);
        assert!(
            whole.starts_with("  mode holding direction egress open 506097522914230528 sealed "),
            "{whole}"
        );
        assert_eq!(whole.lines().count(), 3, "{whole}");
        assert_eq!(shown_stats(&[&bytes[..], b"more"].concat()), whole);
        let short = shown_stats(&bytes[..20]);
        assert!(
            short.contains("open ") && short.contains("committed ") && !short.contains("sealed "),
            "{short}"
        );
        for end in 0..end {
            assert!(shown_stats(&bytes[..end]).len() < whole.len());
        }
    }

    #[test]
    fn sizes_are_exact() {
        for (bytes, words) in [
            (0, "0b"),
            (1, "1b"),
            (1023, "1023b"),
            (1024, "1Kb"),
            (1025, "1025b"),
            (3 << 19, "1536Kb"),
            (256 << 20, "256Mb"),
            (64 << 30, "64Gb"),
            ((64 << 30) + 1, "68719476737b"),
            (u64::MAX, "18446744073709551615b"),
        ] {
            let mut out = String::new();
            size(bytes, &mut out).unwrap();
            assert_eq!(out, words);
        }
    }
}
