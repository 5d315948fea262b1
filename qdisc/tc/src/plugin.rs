// SPDX-License-Identifier: GPL-2.0

//! What `tc` calls, and all that calls `tc`.
//!
//! For a queue discipline that it does not know, `tc` opens `q_remus.so` in its library directory, or in
//! `$TC_LIB_DIR`, and takes the `struct qdisc_util` named `remus_qdisc_util` from it (`tc/tc.c`). The
//! layout of that structure is in no installed header and has no version: [`QdiscUtil`] is that of
//! iproute2's `tc/tc_util.h` from 5.9, when `has_block` was added at its end, to 7.1, the newest
//! looked at. The functions of `tc` called here have the same signatures in 6.1 and 7.1.

use crate::{
    options::{Options, Refused, HELP},
    show::{self, Print, Unit},
    uapi::tca,
};
use core::{
    ffi::{c_char, c_int, c_uint, c_ulonglong, c_void, CStr},
    fmt::{self, Write},
    ptr::{null, null_mut},
    slice,
    sync::atomic::AtomicPtr,
};

/// `struct nlmsghdr` and `struct tcmsg` behind it, as `tc` has filled them in.
#[repr(C)]
struct Request {
    len: u32,
    kind: u16,
    flags: u16,
    seq: u32,
    pid: u32,
    family: u8,
    pad: [u8; 3],
    ifindex: i32,
    handle: u32,
    parent: u32,
    info: u32,
}

/// `struct rtattr`; its content follows.
#[repr(C)]
struct RtAttr {
    len: u16,
    kind: u16,
}

/// `FILE` of the C library.
#[repr(C)]
struct File {
    _opaque: [u8; 0],
}

type ParseOptions = unsafe extern "C" fn(
    *const QdiscUtil,
    c_int,
    *const *const c_char,
    *mut Request,
    *const c_char,
) -> c_int;
type Show = unsafe extern "C" fn(*const QdiscUtil, *mut File, *const RtAttr) -> c_int;
type HasBlock = unsafe extern "C" fn(*const QdiscUtil, *const RtAttr, u32, *mut bool) -> c_int;

/// `struct qdisc_util`.
#[repr(C)]
pub struct QdiscUtil {
    /// `tc` chains what it has found.
    next: AtomicPtr<QdiscUtil>,
    id: &'static [u8; 6],
    parse_qopt: Option<ParseOptions>,
    print_qopt: Option<Show>,
    print_xstats: Option<Show>,
    parse_copt: Option<ParseOptions>,
    print_copt: Option<Show>,
    has_block: Option<HasBlock>,
}

/// What `tc` looks for.
#[no_mangle]
pub static remus_qdisc_util: QdiscUtil = QdiscUtil {
    next: AtomicPtr::new(null_mut()),
    id: b"remus\0",
    parse_qopt: Some(parse_qopt),
    print_qopt: Some(print_qopt),
    print_xstats: Some(print_xstats),
    parse_copt: None,
    print_copt: None,
    has_block: None,
};

extern "C" {
    fn addattr_l(
        n: *mut Request,
        max: c_int,
        kind: c_int,
        data: *const c_void,
        len: c_int,
    ) -> c_int;
    fn addattr_nest(n: *mut Request, max: c_int, kind: c_int) -> *mut RtAttr;
    fn addattr_nest_end(n: *mut Request, nest: *mut RtAttr) -> c_int;
    fn is_json_context() -> bool;
    fn print_nl();
    fn print_color_string(
        kind: c_uint,
        color: c_uint,
        key: *const c_char,
        format: *const c_char,
        value: *const c_char,
    ) -> c_int;
    fn print_color_lluint(
        kind: c_uint,
        color: c_uint,
        key: *const c_char,
        format: *const c_char,
        value: c_ulonglong,
    ) -> c_int;
    fn print_color_bool(
        kind: c_uint,
        color: c_uint,
        key: *const c_char,
        format: *const c_char,
        value: bool,
    ) -> c_int;
    fn sprint_time64(time: i64, buffer: *mut c_char) -> *mut c_char;
}

// Not by `tc`, but in every process that it is.
#[link(name = "c")]
extern "C" {
    fn write(fd: c_int, data: *const c_void, len: usize) -> isize;
    fn abort() -> !;
}

const PRINT_FP: c_uint = 1;
const PRINT_JSON: c_uint = 2;
const COLOR_NONE: c_uint = 6;
const TC_H_UNSPEC: u32 = 0;
const TC_H_ROOT: u32 = 0xffff_ffff;
const TCA_OPTIONS: c_int = 2;
const NLA_F_NESTED: c_int = 1 << 15;
/// The request's buffer is larger (`TCA_BUF_MAX`), but all of `tc` keeps to this.
const MAX: c_int = 1024;
const STDERR: c_int = 2;
/// `SPRINT_BSIZE`, what `sprint_time64` writes at most.
const BUFFER: usize = 64;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: It may be called at any time.
    unsafe { abort() }
}

/// Standard error, unbuffered as `tc`'s own.
struct Stderr;

impl Write for Stderr {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            // SAFETY: The bytes are there.
            let n = unsafe { write(STDERR, rest.as_ptr().cast(), rest.len()) };
            rest = match usize::try_from(n) {
                Ok(n @ 1..) => &rest[n..],
                _ => return Err(fmt::Error),
            };
        }
        Ok(())
    }
}

/// A short text that C can read.
struct Buffer {
    bytes: [u8; BUFFER],
    len: usize,
}

impl Buffer {
    fn new() -> Self {
        Self {
            bytes: [0; BUFFER],
            len: 0,
        }
    }
}

impl Write for Buffer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // The last byte stays NUL.
        let end = self.len + text.len();
        self.bytes[..BUFFER - 1]
            .get_mut(self.len..end)
            .ok_or(fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

/// `tc`'s output: words or JSON, as it was asked for.
struct Output;

impl Output {
    fn word(&self, word: *const c_char) {
        // SAFETY: All are C strings, and the format has one %s. Without JSON it goes to standard output.
        unsafe { print_color_string(PRINT_FP, COLOR_NONE, null(), c"%s ".as_ptr(), word) };
    }
}

impl Print for Output {
    fn text(&mut self, key: &'static CStr, word: &'static CStr, value: &CStr) {
        self.word(word.as_ptr());
        self.word(value.as_ptr());
        // SAFETY: Both are C strings; JSON needs no format.
        unsafe { print_color_string(PRINT_JSON, COLOR_NONE, key.as_ptr(), null(), value.as_ptr()) };
    }

    fn number(&mut self, key: &'static CStr, word: &'static CStr, unit: Unit, value: u64) {
        // SAFETY: A C string; JSON needs no format.
        unsafe { print_color_lluint(PRINT_JSON, COLOR_NONE, key.as_ptr(), null(), value) };
        let mut text = Buffer::new();
        // No number is longer than the buffer.
        let _ = match unit {
            Unit::Plain => write!(text, "{value}"),
            Unit::Packets => write!(text, "{value}p"),
            Unit::Bytes => show::size(value, &mut text),
            Unit::Time => {
                let time = i64::try_from(value).unwrap_or(i64::MAX);
                // SAFETY: The buffer is as large as all that tc makes for it.
                unsafe { sprint_time64(time, text.bytes.as_mut_ptr().cast()) };
                Ok(())
            }
        };
        self.word(word.as_ptr());
        self.word(text.bytes.as_ptr().cast());
    }

    fn flag(&mut self, key: &'static CStr, word: &'static CStr, value: bool) {
        self.word(word.as_ptr());
        // SAFETY: A C string; JSON needs no format.
        unsafe { print_color_bool(PRINT_JSON, COLOR_NONE, key.as_ptr(), null(), value) };
    }

    fn line(&mut self, first: bool) {
        // SAFETY: All are C strings; no format is without its one value.
        unsafe {
            if !first {
                print_nl();
            }
            if !is_json_context() {
                print_color_string(PRINT_FP, COLOR_NONE, null(), c"%s".as_ptr(), c"  ".as_ptr());
            }
        }
    }
}

/// Adds an attribute. Whether it has fitted in.
///
/// # Safety
///
/// `request` is one of `tc`.
unsafe fn add(request: *mut Request, kind: u16, content: &[u8]) -> bool {
    // SAFETY: The content is there, and the request by the caller.
    unsafe {
        addattr_l(
            request,
            MAX,
            c_int::from(kind),
            content.as_ptr().cast(),
            content.len() as c_int,
        ) == 0
    }
}

/// Adds `TCA_OPTIONS`. Whether it has fitted in.
///
/// # Safety
///
/// `request` is one of `tc`.
unsafe fn add_options(request: *mut Request, options: &Options<'_>) -> bool {
    let add = |kind, content: &[u8]| {
        // SAFETY: By the caller.
        unsafe { add(request, kind, content) }
    };
    // SAFETY: By the caller. It fits in: nothing else is in the request but the kind.
    let nest = unsafe { addattr_nest(request, MAX, TCA_OPTIONS | NLA_F_NESTED) };
    let mut fits = true;
    if let Some(name) = options.domain {
        let mut string = [0; crate::uapi::NAME_MAX + 1];
        string[..name.len()].copy_from_slice(name);
        fits &= add(tca::DOMAIN, &string[..=name.len()]);
    }
    if let Some(direction) = options.direction {
        fits &= add(tca::DIRECTION, &[direction]);
    }
    if let Some(packets) = options.packets {
        fits &= add(tca::LIMIT_PACKETS, &packets.to_ne_bytes());
    }
    if let Some(bytes) = options.bytes {
        fits &= add(tca::LIMIT_BYTES, &bytes.to_ne_bytes());
    }
    if let Some(passthrough) = options.passthrough {
        fits &= add(tca::PASSTHROUGH, &[u8::from(passthrough)]);
    }
    // SAFETY: It was begun above, in the same request.
    unsafe { addattr_nest_end(request, nest) };
    fits
}

/// Reads what follows `remus` on the command line of an add, replace, change or del.
///
/// # Safety
///
/// `argv` are `argc` C strings, and `request` is one of `tc`.
unsafe extern "C" fn parse_qopt(
    _: *const QdiscUtil,
    argc: c_int,
    argv: *const *const c_char,
    request: *mut Request,
    _: *const c_char,
) -> c_int {
    let words = (0..usize::try_from(argc).unwrap_or(0)).map(|i| {
        // SAFETY: By the caller. They are there until tc has sent its request.
        unsafe { CStr::from_ptr(*argv.add(i)) }.to_bytes()
    });
    let options = match Options::parse(words) {
        Ok(options) => options,
        Err(refused) => {
            let text: &dyn fmt::Display = if refused == Refused::Help {
                &HELP
            } else {
                &refused
            };
            // There is nobody to tell that nobody can be told.
            let _ = write!(Stderr, "{text}");
            return -1;
        }
    };
    // SAFETY: By the caller. Nobody else has a reference to it meanwhile.
    let parent = unsafe { &mut (*request).parent };
    if *parent == TC_H_UNSPEC {
        *parent = TC_H_ROOT;
    }
    // SAFETY: By the caller.
    if options != Options::default() && !unsafe { add_options(request, &options) } {
        let _ = writeln!(Stderr, "remus: the options do not fit into tc's request.");
        return -1;
    }
    0
}

/// The content of an attribute.
///
/// # Safety
///
/// `attr` is null, or a whole attribute.
unsafe fn content<'a>(attr: *const RtAttr) -> &'a [u8] {
    if attr.is_null() {
        return &[];
    }
    // SAFETY: By the caller, its header is there, and as much behind it as that says.
    unsafe {
        let len = usize::from((*attr).len).saturating_sub(size_of::<RtAttr>());
        slice::from_raw_parts(attr.add(1).cast(), len)
    }
}

/// Shows the options.
///
/// # Safety
///
/// `attr` is null, or a whole attribute.
unsafe extern "C" fn print_qopt(_: *const QdiscUtil, _: *mut File, attr: *const RtAttr) -> c_int {
    // SAFETY: By the caller.
    show::options(unsafe { content(attr) }, &mut Output);
    0
}

/// Shows the statistics.
///
/// # Safety
///
/// `attr` is null, or a whole attribute.
unsafe extern "C" fn print_xstats(_: *const QdiscUtil, _: *mut File, attr: *const RtAttr) -> c_int {
    // SAFETY: By the caller.
    show::stats(unsafe { content(attr) }, &mut Output);
    0
}
