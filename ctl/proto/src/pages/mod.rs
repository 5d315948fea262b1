// SPDX-License-Identifier: GPL-2.0-or-later

//! The pages of an epoch, in as few bytes as pays.
//!
//! # The payload of a [`Pages`](crate::frame::Kind::Pages) frame
//!
//! Entries one after another, to the payload's end. A varint is a number in as
//! few bytes as it needs: seven bits a byte, lowest first, the top bit set in all but the last.
//!
//! ```text
//!  entry = head     varint: gap << 3 | kind
//!          length   varint, not for kinds 0 and 3: bytes of content, 1 to 4093
//!          content
//!
//!  kind  content
//!     0  none: the page is all zeros
//!     1  what changed in the page, see `delta`
//!     2  the page, as an LZ4 block
//!     3  the page, 4096 bytes
//!     4  what changed in the page, as an LZ4 block of at most 4093 bytes
//! ```
//!
//! `gap` says how many pages lie between the last entry's page and this one, in the first entry how many
//! lie below it. So page numbers ascend within a payload in whatever way it is damaged. They do not
//! from one payload to the next: several encoders send what is ready, each its own [`Share`] of the
//! pages.
//!
//! A delta goes on top of what the page was after all that was encoded before. So the payloads of an
//! encoder are applied in their order, without leaving one out; if one will not be, the encoder has to
//! [forget](Encoder::forget).
//!
//! # Sizes
//!
//! A page number is below 2^32 ([`PAGES_MAX`]), so a head has at most 35 bits, which is five bytes. The
//! longest entry is five bytes and a whole page, [`ENTRY_MAX`]; compressed content is not longer than
//! that with its length. An entry is never longer than a kernel's page record.

mod cache;
pub mod cost;
mod encoder;

pub use crate::delta::Page;
pub use encoder::{Counts, Encoder, Options, RecordsError, Share};

use crate::frame::{PAYLOAD_MAX, RECORDS_MAX};
use crate::{delta, varint};
use lz4_flex::block::decompress_into;
use remus_core::uapi::ram::PAGE_SIZE;
use remus_core::uapi::MEMORY_MAX;
use std::convert::Infallible;

/// Page numbers are below this.
pub const PAGES_MAX: u64 = MEMORY_MAX / PAGE_SIZE as u64;
/// Most bytes in the head of an entry.
const HEAD_MAX: usize = varint::size((PAGES_MAX - 1) << Kind::BITS | Kind::MASK);
/// Most bytes that an entry takes.
pub const ENTRY_MAX: usize = HEAD_MAX + PAGE_SIZE;
/// Most bytes of content that is not a whole page. With its length it is still shorter than one.
const LENGTH_MAX: usize = PAGE_SIZE - 3;
/// Most records that are encoded into one payload.
pub const BATCH_RECORDS: usize = RECORDS_MAX;

const _: () = assert!(BATCH_RECORDS * ENTRY_MAX <= PAYLOAD_MAX);
const _: () = assert!(varint::size(LENGTH_MAX as u64) + LENGTH_MAX < PAGE_SIZE);

/// What an entry has as content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Zero = 0,
    Delta = 1,
    Lz4 = 2,
    Raw = 3,
    Packed = 4,
}

impl Kind {
    /// Bits of a head that are the kind. There is room for more kinds than there are.
    const BITS: u32 = 3;
    const MASK: u64 = (1 << Self::BITS) - 1;

    const fn from_head(head: u64) -> Option<Self> {
        Some(match head & Self::MASK {
            0 => Self::Zero,
            1 => Self::Delta,
            2 => Self::Lz4,
            3 => Self::Raw,
            4 => Self::Packed,
            _ => return None,
        })
    }

    const fn has_length(self) -> bool {
        matches!(self, Self::Delta | Self::Lz4 | Self::Packed)
    }
}

/// Why a payload is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageError {
    /// It ends within an entry, or a number in it is not well formed.
    Form,
    /// No such kind of entry.
    Kind(u8),
    /// A page is not below the limit.
    Limit,
    /// Content of no bytes, or of as many as a page has.
    Length(u64),
    /// What changed in this page is more than it has.
    Delta(u64),
    /// What this page has is no LZ4 block, or not one of a page.
    Lz4(u64),
}

impl core::fmt::Display for PageError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Form => f.write_str("pages are cut short or malformed"),
            Self::Kind(kind) => write!(f, "unknown kind of page {kind}"),
            Self::Limit => f.write_str("a page is outside of the memory"),
            Self::Length(page) => write!(f, "page {page} has a wrong length"),
            Self::Delta(page) => write!(f, "what changed in page {page} does not fit"),
            Self::Lz4(page) => write!(f, "page {page} cannot be decompressed"),
        }
    }
}

impl core::error::Error for PageError {}

/// Why a payload was not applied as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplyError<E> {
    /// It is malformed. Never, if [`check`] accepted it.
    Page(PageError),
    /// The image failed.
    Image(E),
}

impl<E: core::fmt::Display> core::fmt::Display for ApplyError<E> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Page(error) => error.fmt(f),
            Self::Image(error) => error.fmt(f),
        }
    }
}

impl<E: core::fmt::Debug + core::fmt::Display> core::error::Error for ApplyError<E> {}

/// The standby's copy of the memory.
pub trait Image {
    /// Why it fails.
    type Error;

    /// Reads a page.
    fn read(&mut self, page: u64, to: &mut Page) -> Result<(), Self::Error>;

    /// Replaces a page.
    fn write(&mut self, page: u64, content: &Page) -> Result<(), Self::Error>;
}

/// Room for a page and for what changed in it, while it is decoded.
#[derive(Clone, Debug)]
pub struct Scratch {
    page: Page,
    runs: [u8; LENGTH_MAX],
}

impl Scratch {
    /// Some room.
    pub const fn new() -> Self {
        Self {
            page: [0; PAGE_SIZE],
            runs: [0; LENGTH_MAX],
        }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Decodes a whole payload, without an image: whether it is well formed and all pages are below
/// `limit_pages`. Returns how many entries it has.
pub fn check(payload: &[u8], limit_pages: u64, scratch: &mut Scratch) -> Result<u64, PageError> {
    /// Whatever is read is as good as anything: nothing of it decides on what is well formed.
    struct Nowhere;

    impl Image for Nowhere {
        type Error = Infallible;

        fn read(&mut self, _: u64, _: &mut Page) -> Result<(), Infallible> {
            Ok(())
        }

        fn write(&mut self, _: u64, _: &Page) -> Result<(), Infallible> {
            Ok(())
        }
    }

    // The very code that applies it, so that both agree.
    apply(payload, limit_pages, scratch, &mut Nowhere).map_err(|error| match error {
        ApplyError::Page(error) => error,
        ApplyError::Image(never) => match never {},
    })
}

/// Applies a payload to `image`; all pages have to be below `limit_pages`. Returns how many entries it
/// has. After an error, the entries before it are applied.
pub fn apply<I: Image>(
    payload: &[u8],
    limit_pages: u64,
    scratch: &mut Scratch,
    image: &mut I,
) -> Result<u64, ApplyError<I::Error>> {
    let Scratch {
        page: content,
        runs: unpacked,
    } = scratch;
    let mut entries = Entries {
        rest: payload,
        next: 0,
        limit: limit_pages,
    };
    let mut count = 0;
    while let Some(entry) = entries.take().map_err(ApplyError::Page)? {
        let page = entry.page;
        match entry.content {
            Content::Zero => image.write(page, &[0; PAGE_SIZE]),
            Content::Raw(raw) => image.write(page, raw),
            Content::Delta(runs) => {
                image.read(page, content).map_err(ApplyError::Image)?;
                delta::apply(runs, content).ok_or(ApplyError::Page(PageError::Delta(page)))?;
                image.write(page, content)
            }
            Content::Packed(packed) => {
                let runs = decompress_into(packed, unpacked)
                    .ok()
                    .and_then(|length| unpacked.get(..length))
                    .ok_or(ApplyError::Page(PageError::Lz4(page)))?;
                image.read(page, content).map_err(ApplyError::Image)?;
                delta::apply(runs, content).ok_or(ApplyError::Page(PageError::Delta(page)))?;
                image.write(page, content)
            }
            Content::Lz4(packed) => {
                if !matches!(decompress_into(packed, content), Ok(PAGE_SIZE)) {
                    return Err(ApplyError::Page(PageError::Lz4(page)));
                }
                image.write(page, content)
            }
        }
        .map_err(ApplyError::Image)?;
        count += 1;
    }
    Ok(count)
}

/// An entry, its content as it is in the payload.
struct Entry<'a> {
    page: u64,
    content: Content<'a>,
}

enum Content<'a> {
    Zero,
    Delta(&'a [u8]),
    Lz4(&'a [u8]),
    Raw(&'a Page),
    Packed(&'a [u8]),
}

/// Takes a payload apart.
struct Entries<'a> {
    rest: &'a [u8],
    /// The lowest that the next page can be.
    next: u64,
    limit: u64,
}

impl<'a> Entries<'a> {
    /// The next entry; `None` at the payload's end.
    fn take(&mut self) -> Result<Option<Entry<'a>>, PageError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let head = varint::take(&mut self.rest).ok_or(PageError::Form)?;
        let kind = Kind::from_head(head).ok_or(PageError::Kind((head & Kind::MASK) as u8))?;
        let page = self
            .next
            .checked_add(head >> Kind::BITS)
            .filter(|page| *page < self.limit)
            .ok_or(PageError::Limit)?;
        // Not above the limit.
        self.next = page + 1;
        let content = match kind {
            Kind::Zero => Content::Zero,
            Kind::Raw => Content::Raw(
                self.rest
                    .split_off(..PAGE_SIZE)
                    .and_then(|raw| raw.first_chunk())
                    .ok_or(PageError::Form)?,
            ),
            Kind::Delta => Content::Delta(self.sized(page)?),
            Kind::Lz4 => Content::Lz4(self.sized(page)?),
            Kind::Packed => Content::Packed(self.sized(page)?),
        };
        Ok(Some(Entry { page, content }))
    }

    /// Content of the length before it.
    fn sized(&mut self, page: u64) -> Result<&'a [u8], PageError> {
        let length = varint::take(&mut self.rest).ok_or(PageError::Form)?;
        let length = usize::try_from(length)
            .ok()
            .filter(|length| (1..=LENGTH_MAX).contains(length))
            .ok_or(PageError::Length(page))?;
        self.rest.split_off(..length).ok_or(PageError::Form)
    }
}
