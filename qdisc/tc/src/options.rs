// SPDX-License-Identifier: GPL-2.0

//! The words after `remus` on `tc`'s command line.

use crate::uapi::{direction, NAME_MAX};
use core::fmt;

/// What `tc qdisc add ... remus help` prints.
pub(crate) const HELP: &str = "\
Usage: ... remus [ domain NAME ] [ direction { guest | egress } ]
                 [ limit SIZE ] [ limit PACKETSp ] [ passthrough | hold ]
Where: NAME is the domain to join, and the device's name if absent
       guest is what the guest behind the device sends, egress what the host sends
       SIZE is how much memory held packets may take, such as 256m
       PACKETSp is how many packets may be held, such as 65536p
       passthrough holds nothing before the domain's next seal, hold everything from now on
";

/// What was said; what was not is `None`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options<'a> {
    /// Domain to join.
    pub(crate) domain: Option<&'a [u8]>,
    /// [`direction`].
    pub(crate) direction: Option<u8>,
    /// Most packets.
    pub(crate) packets: Option<u32>,
    /// Most bytes of memory.
    pub(crate) bytes: Option<u64>,
    /// Whether to pass everything until the next seal.
    pub(crate) passthrough: Option<bool>,
}

/// Why the words make no options.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused<'a> {
    /// They ask for help.
    Help,
    /// An option of that name does not exist.
    Unknown(&'a [u8]),
    /// Nothing follows this word, and something has to.
    Incomplete(&'a [u8]),
    /// The option was given before.
    Twice(&'a [u8]),
    /// Longer than a domain's name can be.
    Domain(&'a [u8]),
    /// Neither `guest` nor `egress`.
    Direction(&'a [u8]),
    /// No number, or an unknown unit.
    Limit(&'a [u8]),
    /// More than the kernel can count.
    TooLarge(&'a [u8]),
}

/// A word as it was typed, as far as it is text.
struct Word<'a>(&'a [u8]);

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for chunk in self.0.utf8_chunks() {
            f.write_str(chunk.valid())?;
            if !chunk.invalid().is_empty() {
                f.write_str("\u{fffd}")?;
            }
        }
        f.write_str("\"")
    }
}

impl fmt::Display for Refused<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Help => f.write_str(HELP),
            Self::Unknown(w) => writeln!(
                f,
                "remus: {} is no option: there are domain, direction, limit, passthrough, hold and help.",
                Word(w)
            ),
            Self::Incomplete(w) => {
                let what = match w {
                    b"domain" => "a domain's name",
                    b"direction" => "guest or egress",
                    _ => "a size such as 256m, or a number of packets such as 65536p",
                };
                writeln!(f, "remus: {} wants {what} after it.", Word(w))
            }
            Self::Twice(w) => writeln!(
                f,
                "remus: {} sets once more what was set before it.",
                Word(w)
            ),
            Self::Domain(w) => writeln!(
                f,
                "remus: {} cannot be a domain's name: it has more than {NAME_MAX} bytes.",
                Word(w)
            ),
            Self::Direction(w) => writeln!(
                f,
                "remus: {} is no direction: say guest or egress.",
                Word(w)
            ),
            Self::Limit(w) => writeln!(
                f,
                "remus: {} is no limit: say a size such as 256m, or a number of packets such as 65536p.",
                Word(w)
            ),
            Self::TooLarge(w) => writeln!(f, "remus: {} is too large a limit.", Word(w)),
        }
    }
}

/// A limit: of packets, or of bytes.
#[derive(Debug, PartialEq, Eq)]
enum Limit {
    Packets(u32),
    Bytes(u64),
}

/// `tc`'s units of sizes (`get_size64` in iproute2's `lib/utils_math.c`): powers of 1024, and bits.
const UNITS: [(&[u8], u64); 11] = [
    (b"", 1),
    (b"b", 1),
    (b"k", 1 << 10),
    (b"kb", 1 << 10),
    (b"m", 1 << 20),
    (b"mb", 1 << 20),
    (b"g", 1 << 30),
    (b"gb", 1 << 30),
    (b"kbit", 1 << 7),
    (b"mbit", 1 << 17),
    (b"gbit", 1 << 27),
];

/// `digits` as a number, and how many they are.
fn number(digits: &[u8]) -> (Option<u64>, usize) {
    let len = digits.iter().take_while(|b| b.is_ascii_digit()).count();
    let value = digits[..len].iter().try_fold(0_u64, |n, digit| {
        n.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    });
    (value, len)
}

impl Limit {
    /// Reads `256m`, `1.5g`, `1000` (bytes) or `65536p` (packets). As in `tc`, what is less than a byte
    /// is cut off.
    fn parse(word: &[u8]) -> Result<Self, Refused<'_>> {
        let (whole, len) = number(word);
        let rest = &word[len..];
        if len == 0 {
            return Err(Refused::Limit(word));
        }
        let whole = whole.ok_or(Refused::TooLarge(word));
        if rest.eq_ignore_ascii_case(b"p") {
            let packets = whole?.try_into().map_err(|_| Refused::TooLarge(word))?;
            return Ok(Self::Packets(packets));
        }
        // Further digits than these do not amount to a byte.
        let (tenths, unit) = match rest.split_first() {
            Some((b'.', rest)) => {
                let (_, len) = number(rest);
                let (digits, unit) = rest.split_at(len);
                if digits.is_empty() {
                    return Err(Refused::Limit(word));
                }
                (&digits[..len.min(12)], unit)
            }
            _ => (&rest[..0], rest),
        };
        let (_, unit) = UNITS
            .iter()
            .find(|(name, _)| unit.eq_ignore_ascii_case(name))
            .ok_or(Refused::Limit(word))?;
        let part = number(tenths).0.unwrap_or(0);
        let scale = 10_u128.pow(tenths.len() as u32);
        let part = u128::from(part) * u128::from(*unit) / scale;
        u64::try_from(u128::from(whole?) * u128::from(*unit) + part)
            .map(Self::Bytes)
            .map_err(|_| Refused::TooLarge(word))
    }
}

/// Sets what was not set before.
fn once<'a, T>(to: &mut Option<T>, value: T, word: &'a [u8]) -> Result<(), Refused<'a>> {
    match to.replace(value) {
        None => Ok(()),
        Some(_) => Err(Refused::Twice(word)),
    }
}

impl<'a> Options<'a> {
    /// Reads the words.
    pub(crate) fn parse(words: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, Refused<'a>> {
        let mut words = words.into_iter();
        let mut options = Self::default();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(Refused::Incomplete(word));
            match word {
                b"domain" => {
                    let name = value()?;
                    if name.len() > NAME_MAX {
                        return Err(Refused::Domain(name));
                    }
                    once(&mut options.domain, name, name)?;
                }
                b"direction" => {
                    let name = value()?;
                    let direction = match name {
                        b"guest" => direction::GUEST,
                        b"egress" => direction::EGRESS,
                        _ => return Err(Refused::Direction(name)),
                    };
                    once(&mut options.direction, direction, name)?;
                }
                b"limit" => {
                    let size = value()?;
                    match Limit::parse(size)? {
                        Limit::Packets(n) => once(&mut options.packets, n, size)?,
                        Limit::Bytes(n) => once(&mut options.bytes, n, size)?,
                    }
                }
                b"passthrough" => once(&mut options.passthrough, true, word)?,
                b"hold" => once(&mut options.passthrough, false, word)?,
                b"help" => return Err(Refused::Help),
                _ => return Err(Refused::Unknown(word)),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options<'_>, Refused<'_>> {
        Options::parse(line.split_ascii_whitespace().map(str::as_bytes))
    }

    #[test]
    fn nothing_said() {
        assert_eq!(parse(""), Ok(Options::default()));
    }

    #[test]
    fn everything_said() {
        assert_eq!(
            parse("domain web direction egress limit 256m limit 1000p passthrough"),
            Ok(Options {
                domain: Some(b"web"),
                direction: Some(direction::EGRESS),
                packets: Some(1000),
                bytes: Some(256 << 20),
                passthrough: Some(true),
            })
        );
        let other = parse("hold limit 7p direction guest").unwrap();
        assert_eq!(other.passthrough, Some(false));
        assert_eq!(other.direction, Some(direction::GUEST));
        assert_eq!((other.packets, other.bytes), (Some(7), None));
    }

    #[test]
    fn sizes() {
        for (word, bytes) in [
            ("0", 0),
            ("1500", 1500),
            ("1500b", 1500),
            ("2k", 2048),
            ("2Kb", 2048),
            ("3M", 3 << 20),
            ("3mb", 3 << 20),
            ("64g", 64 << 30),
            ("64GB", 64 << 30),
            ("1.5m", 3 << 19),
            ("0.0009765625k", 1),
            ("1.9999", 1),
            ("0.9999999999999999999999999999b", 0),
            ("8kbit", 1024),
            ("8mbit", 1 << 20),
            ("8gbit", 1 << 30),
            ("18446744073709551615", u64::MAX),
            ("9007199254740993", 9_007_199_254_740_993),
        ] {
            assert_eq!(
                Limit::parse(word.as_bytes()),
                Ok(Limit::Bytes(bytes)),
                "{word}"
            );
        }
    }

    #[test]
    fn packets() {
        assert_eq!(Limit::parse(b"65536p"), Ok(Limit::Packets(65_536)));
        assert_eq!(Limit::parse(b"4294967295P"), Ok(Limit::Packets(u32::MAX)));
    }

    #[test]
    fn no_limits() {
        for word in [
            "", "p", "m", "-1", "+1", "1x", "1 m", "1.m", "1..5m", "1.5p", "1tb", "0x10", "inf",
            "nan", "1e3", "ten",
        ] {
            assert_eq!(
                Limit::parse(word.as_bytes()),
                Err(Refused::Limit(word.as_bytes())),
                "{word}"
            );
        }
        for word in [
            "4294967296p",
            "18446744073709551616",
            "99999999999999999999999p",
            "17179869184g",
        ] {
            assert_eq!(
                Limit::parse(word.as_bytes()),
                Err(Refused::TooLarge(word.as_bytes())),
                "{word}"
            );
        }
    }

    #[test]
    fn wrong_words() {
        for (line, sentence) in [
            ("limt 5p", "\"limt\" is no option"),
            ("domain", "\"domain\" wants a domain's name"),
            (
                "domain web direction",
                "\"direction\" wants guest or egress",
            ),
            ("limit", "\"limit\" wants a size such as 256m"),
            (
                "direction ingress",
                "\"ingress\" is no direction: say guest or egress",
            ),
            ("direction Guest", "\"Guest\" is no direction"),
            ("limit 5 packets", "\"packets\" is no option"),
            ("limit 5x", "\"5x\" is no limit"),
            ("limit 5g limit 6g", "\"6g\" sets once more"),
            ("limit 5p limit 6p", "\"6p\" sets once more"),
            ("limit 99999999999p", "\"99999999999p\" is too large"),
            ("domain a domain b", "\"b\" sets once more"),
            (
                "direction guest direction egress",
                "\"egress\" sets once more",
            ),
            ("passthrough hold", "\"hold\" sets once more"),
            ("hold hold", "\"hold\" sets once more"),
            (
                "domain 01234567890123456789012345678901",
                "it has more than 31 bytes",
            ),
            ("help", "Usage: ... remus"),
            ("domain web help", "Usage: ... remus"),
        ] {
            let said = parse(line).unwrap_err().to_string();
            assert!(said.contains(sentence), "{line}: {said}");
            assert!(said.ends_with('\n'), "{line}: {said}");
            assert!(
                !said.starts_with("remus: ") || said.lines().count() == 1,
                "{line}: {said}"
            );
        }
    }

    #[test]
    fn a_value_may_look_like_an_option() {
        assert_eq!(parse("domain help").unwrap().domain, Some(&b"help"[..]));
        assert_eq!(
            parse("domain 0123456789012345678901234567890")
                .unwrap()
                .domain
                .map(<[u8]>::len),
            Some(31)
        );
    }

    #[test]
    fn words_that_are_no_text() {
        let said = Options::parse([&b"li\xffmit"[..]]).unwrap_err().to_string();
        assert!(said.contains("\"li\u{fffd}mit\" is no option"), "{said}");
    }
}
