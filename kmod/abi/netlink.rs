// SPDX-License-Identifier: GPL-2.0

//! Netlink: attributes, their policies, extended acknowledgements, messages, and generic netlink
//! families.
//!
//! To offer a family, implement [`Handler`] and keep a [`Registration`]; [`multicast`] sends events.
//!
//! C headers: [`include/net/netlink.h`](srctree/include/net/netlink.h),
//! [`include/net/genetlink.h`](srctree/include/net/genetlink.h)

use super::{
    bindings,
    put_name,
    AssertSync,
    Plain, //
};
use core::{
    fmt,
    marker::PhantomData,
    mem::ManuallyDrop,
    ptr::{
        null_mut,
        NonNull, //
    },
    slice, //
};
use kernel::{
    error::to_result,
    ffi::{
        c_int,
        c_long,
        c_ulong,
        c_void, //
    },
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

kernel::sync::global_lock! {
    // SAFETY: Initialised by `Registration::new`, before there is a family.
    unsafe(uninit) static FAMILY: Mutex<Option<AssertSync<NonNull<bindings::genl_family>>>> = None;
}

/// What an attribute must look like: [`struct nla_policy`].
///
/// [`struct nla_policy`]: srctree/include/net/netlink.h
#[repr(transparent)]
pub(crate) struct Policy(bindings::nla_policy);

// SAFETY: A policy is only read.
unsafe impl Sync for Policy {}

impl Policy {
    /// Not accepted at all.
    pub(crate) const REFUSED: Self = Self::new(bindings::NLA_UNSPEC, 0);
    /// Present or not, without content.
    pub(crate) const FLAG: Self = Self::new(bindings::NLA_FLAG, 0);
    /// A number of one byte.
    pub(crate) const U8: Self = Self::new(bindings::NLA_U8, 0);
    /// A number of four bytes.
    pub(crate) const U32: Self = Self::new(bindings::NLA_U32, 0);
    /// A number of eight bytes.
    pub(crate) const U64: Self = Self::new(bindings::NLA_U64, 0);
    /// A number of four or eight bytes.
    pub(crate) const UINT: Self = Self::new(bindings::NLA_UINT, 0);

    /// A NUL-terminated string of at most `max` bytes.
    pub(crate) const fn string(max: u16) -> Self {
        Self::new(bindings::NLA_NUL_STRING, max)
    }

    const fn new(kind: u32, len: u16) -> Self {
        let mut policy = bindings::nla_policy::ZERO;
        policy.type_ = kind as u8;
        policy.len = len;
        Self(policy)
    }
}

/// An attribute of a message that the kernel has validated.
///
/// # Invariants
///
/// Points to an attribute whose header and content are valid for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Attr<'a>(NonNull<bindings::nlattr>, PhantomData<&'a ()>);

impl<'a> Attr<'a> {
    /// # Safety
    ///
    /// `attr` points to an attribute whose header and content are valid for `'a`.
    pub(super) unsafe fn from_raw(attr: NonNull<bindings::nlattr>) -> Self {
        // INVARIANT: By the safety requirements.
        Self(attr, PhantomData)
    }

    fn content(self) -> &'a [u8] {
        const HEADER: usize = core::mem::size_of::<bindings::nlattr>();
        // SAFETY: Header and content are valid by the type invariant; the header counts itself.
        unsafe {
            let len = usize::from((*self.0.as_ptr()).nla_len).saturating_sub(HEADER);
            slice::from_raw_parts(self.0.as_ptr().cast::<u8>().add(HEADER), len)
        }
    }

    /// The number in it: 1, 2, 4 or 8 bytes in native order, else 0.
    pub(crate) fn number(self) -> u64 {
        match *self.content() {
            [a] => u64::from(a),
            [a, b] => u64::from(u16::from_ne_bytes([a, b])),
            [a, b, c, d] => u64::from(u32::from_ne_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            _ => 0,
        }
    }

    /// The string in it, without what follows the first NUL.
    pub(crate) fn string(self) -> &'a [u8] {
        let content = self.content();
        content.split(|&b| b == 0).next().unwrap_or(content)
    }
}

/// The attributes of a message or of a nest, by number.
///
/// # Invariants
///
/// `table` points to `len` pointers, each null or to a valid attribute, all for `'a`.
pub(crate) struct Attrs<'a> {
    table: *const *mut bindings::nlattr,
    len: usize,
    _attrs: PhantomData<&'a ()>,
}

impl<'a> Attrs<'a> {
    /// The attribute with this number, if it is there.
    pub(crate) fn get(&self, number: u16) -> Option<Attr<'a>> {
        let number = usize::from(number);
        if number >= self.len || self.table.is_null() {
            return None;
        }
        // SAFETY: In bounds, and null or valid, by the type invariant.
        unsafe { NonNull::new(*self.table.add(number)).map(|attr| Attr::from_raw(attr)) }
    }

    /// Parses what is nested in `nest`, strictly, and hands it to `f`. `policy` has one entry for
    /// each number from 0 to `N - 1`.
    pub(crate) fn nested<const N: usize, R>(
        nest: Attr<'_>,
        policy: &'static [Policy; N],
        ack: &Ack<'_>,
        f: impl FnOnce(&Attrs<'_>) -> Result<R>,
    ) -> Result<R> {
        let mut table: [*mut bindings::nlattr; N] = [null_mut(); N];
        // SAFETY: `table` and `policy` have an entry for each number up to `N - 1`; `Policy` is
        // transparent; the nest is valid by the invariant of `Attr`.
        to_result(unsafe {
            bindings::remus_nla_parse_nested(
                table.as_mut_ptr(),
                N as c_int - 1,
                nest.0.as_ptr(),
                policy.as_ptr().cast(),
                ack.0,
            )
        })?;
        // INVARIANT: Filled by the parser; valid as long as the nest and the table.
        f(&Attrs {
            table: table.as_ptr(),
            len: N,
            _attrs: PhantomData,
        })
    }
}

/// The extended acknowledgement of a request: one sentence, and the attribute that is wrong.
///
/// # Invariants
///
/// Null, or points to a `struct netlink_ext_ack` that is valid, and this request's, for `'a`.
pub(crate) struct Ack<'a>(*mut bindings::netlink_ext_ack, PhantomData<&'a ()>);

impl Ack<'_> {
    /// # Safety
    ///
    /// `ack` is null, or valid and this request's for the lifetime of the result.
    pub(super) unsafe fn from_raw(ack: *mut bindings::netlink_ext_ack) -> Self {
        // INVARIANT: By the safety requirements.
        Self(ack, PhantomData)
    }

    /// Sets the sentence. What does not fit in 79 bytes is cut off.
    pub(crate) fn say(&self, text: &[u8]) {
        let Some(ack) = NonNull::new(self.0) else {
            return;
        };
        // SAFETY: Valid and this request's by the type invariant; nobody reads it before the
        // request is done.
        unsafe {
            let ack = ack.as_ptr();
            let buffer = &mut (*ack)._msg_buf;
            buffer.fill(0);
            put_name(buffer, text);
            (*ack)._msg = buffer.as_ptr();
        }
    }

    /// Names the attribute that is wrong.
    pub(crate) fn blame(&self, attr: Attr<'_>) {
        if let Some(ack) = NonNull::new(self.0) {
            // SAFETY: As in `say`. The attribute is part of the request.
            unsafe { (*ack.as_ptr()).bad_attr = attr.0.as_ptr() };
        }
    }

    /// Names the attribute that is missing.
    pub(crate) fn miss(&self, number: u16) {
        if let Some(ack) = NonNull::new(self.0) {
            // SAFETY: As in `say`.
            unsafe { (*ack.as_ptr()).miss_type = number };
        }
    }
}

/// A message that is being written.
///
/// # Invariants
///
/// Points to a valid `struct sk_buff` with a netlink message in it, for `'a`.
pub(crate) struct Message<'a>(NonNull<bindings::sk_buff>, PhantomData<&'a ()>);

impl Message<'_> {
    /// # Safety
    ///
    /// `skb` is valid, and its message this caller's to write, for the lifetime of the result.
    pub(super) unsafe fn from_raw(skb: NonNull<bindings::sk_buff>) -> Self {
        // INVARIANT: By the safety requirements.
        Self(skb, PhantomData)
    }

    fn put(&mut self, number: u16, content: &[u8]) -> Result {
        // SAFETY: The message is valid by the type invariant, and `content` is `len` bytes long.
        to_result(unsafe {
            bindings::nla_put(
                self.0.as_ptr(),
                c_int::from(number),
                content.len() as c_int,
                content.as_ptr().cast(),
            )
        })
    }

    /// Appends a number of one byte.
    pub(crate) fn put_u8(&mut self, number: u16, value: u8) -> Result {
        self.put(number, &[value])
    }

    /// Appends a number of four bytes.
    pub(crate) fn put_u32(&mut self, number: u16, value: u32) -> Result {
        self.put(number, &value.to_ne_bytes())
    }

    /// Appends a number of eight bytes. Not aligned: there is no padding attribute.
    pub(crate) fn put_u64(&mut self, number: u16, value: u64) -> Result {
        self.put(number, &value.to_ne_bytes())
    }

    /// Appends a number of four bytes, or of eight if it needs them.
    pub(crate) fn put_uint(&mut self, number: u16, value: u64) -> Result {
        match u32::try_from(value) {
            Ok(value) => self.put_u32(number, value),
            Err(_) => self.put_u64(number, value),
        }
    }

    /// Appends a string, with a NUL. It is cut at 63 bytes.
    pub(crate) fn put_string(&mut self, number: u16, text: &[u8]) -> Result {
        let mut content = [0; 64];
        let len = text.len().min(content.len() - 1);
        content[..len].copy_from_slice(&text[..len]);
        self.put(number, &content[..len + 1])
    }

    /// Appends an attribute without content.
    pub(crate) fn put_flag(&mut self, number: u16) -> Result {
        self.put(number, &[])
    }

    /// Appends a nest with what `f` writes.
    pub(crate) fn put_nest(&mut self, number: u16, f: impl FnOnce(&mut Self) -> Result) -> Result {
        // SAFETY: The message is valid by the type invariant.
        let start = unsafe { bindings::remus_nla_nest_start(self.0.as_ptr(), c_int::from(number)) };
        if start.is_null() {
            return Err(EMSGSIZE);
        }
        f(self)?;
        // SAFETY: `start` is the nest that was begun in this message.
        unsafe { bindings::remus_nla_nest_end(self.0.as_ptr(), start) };
        Ok(())
    }
}

/// A command that a family understands.
pub(crate) struct Command {
    /// Its number.
    pub(crate) number: u8,
    /// What its attributes must look like, one entry for each number from 0 on.
    pub(crate) policy: &'static [Policy],
    /// Whether it can be asked for one object.
    pub(crate) one: bool,
    /// Whether it can be asked for a dump.
    pub(crate) dump: bool,
}

/// A netlink socket. As long as it is open no other one equals it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Socket {
    /// Identifies the network namespace: never used as a pointer.
    net: usize,
    /// Its netlink port number in that namespace.
    port: u32,
}

/// Who sent a request.
#[derive(Clone, Copy)]
pub(crate) struct Sender {
    /// The socket.
    pub(crate) socket: Socket,
    /// The process, by its number in the initial namespace.
    pub(crate) process: i32,
}

/// How far a dump has come; zeros at its beginning.
pub(crate) type Position = [u64; 2];

/// A generic netlink family. Every command needs `CAP_NET_ADMIN` in the initial user namespace.
pub(crate) trait Handler: Send + Sync + 'static {
    /// Name of the family, at most 15 bytes.
    const NAME: &'static [u8];
    /// Its version.
    const VERSION: u8;
    /// Its commands, at most 16.
    const COMMANDS: &'static [Command];
    /// Name of the multicast group of its events, at most 15 bytes.
    const EVENTS: &'static [u8];

    /// Executes a command. Process context. The kernel has checked the attributes against the
    /// command's policy. Either it is done and replied to, or nothing has changed and `ack` says
    /// why.
    fn execute(request: &Request<'_>, ack: &Ack<'_>) -> Result;

    /// Writes the first object after `position` to a dump, and moves `position` there. Process context.
    /// Returns false after the last one. Objects may come and go meanwhile: one that stays is written
    /// once.
    fn describe(
        command: u8,
        attrs: &Attrs<'_>,
        position: &mut Position,
        message: &mut Message<'_>,
        ack: &Ack<'_>,
    ) -> Result<bool, DumpError>;

    /// A socket of generic netlink was closed. Process context.
    fn closed(socket: Socket);
}

/// Why an object is not in the message.
pub(crate) enum DumpError {
    /// The message is full.
    Full,
    /// The dump is refused.
    Refused(Error),
}

/// A request for a command.
///
/// # Invariants
///
/// Points to the `struct genl_info` of a request that is being handled, for `'a`.
pub(crate) struct Request<'a>(NonNull<bindings::genl_info>, usize, PhantomData<&'a ()>);

impl<'a> Request<'a> {
    /// The command.
    pub(crate) fn command(&self) -> u8 {
        // SAFETY: Valid by the type invariant.
        unsafe { (*(*self.0.as_ptr()).genlhdr).cmd }
    }

    /// Its attributes.
    pub(crate) fn attrs(&self) -> Attrs<'a> {
        // SAFETY: Valid by the type invariant.
        let table = unsafe { (*self.0.as_ptr()).attrs };
        // INVARIANT: The kernel made a table for the command's policy, which has `self.1` entries.
        Attrs {
            table,
            len: self.1,
            _attrs: PhantomData,
        }
    }

    /// Who sent it: netlink calls in the context of the sender.
    pub(crate) fn sender(&self) -> Sender {
        // SAFETY: Valid by the type invariant.
        let socket = unsafe {
            Socket {
                net: bindings::remus_genl_net(self.0.as_ptr()).addr(),
                port: (*self.0.as_ptr()).snd_portid,
            }
        };
        Sender {
            socket,
            process: kernel::current!().group_leader().pid(),
        }
    }

    /// Prepares the answer. To be called before anything is changed, as this can fail.
    pub(crate) fn reply(&self) -> Result<Reply<'_>> {
        let mut header = null_mut();
        let (info, command) = (self.0.as_ptr(), self.command());
        // SAFETY: The request is valid by the type invariant, and so is the family that it is for.
        let skb = unsafe {
            let (family, port, sequence) = ((*info).family, (*info).snd_portid, (*info).snd_seq);
            bindings::remus_genl_new(family, port, sequence, command, &mut header)
        };
        let skb = NonNull::new(skb).ok_or(ENOMEM)?;
        // INVARIANT: A new message, with the header of this request's answer.
        Ok(Reply {
            skb,
            header,
            info: self.0,
            _request: PhantomData,
        })
    }
}

/// The answer to a request, with room for a few kilobytes.
///
/// # Invariants
///
/// Owns `skb`, a message that `header` is in; `info` is the request that it answers.
pub(crate) struct Reply<'a> {
    skb: NonNull<bindings::sk_buff>,
    header: *mut c_void,
    info: NonNull<bindings::genl_info>,
    _request: PhantomData<&'a ()>,
}

impl Reply<'_> {
    /// Sends the answer, with what `f` writes.
    pub(crate) fn send(self, f: impl FnOnce(&mut Message<'_>) -> Result) -> Result {
        // SAFETY: Owned by the type invariant.
        f(&mut unsafe { Message::from_raw(self.skb) })?;
        let this = ManuallyDrop::new(self);
        // SAFETY: Owned by the type invariant, complete, and given away.
        to_result(unsafe {
            bindings::remus_genl_reply(this.skb.as_ptr(), this.header, this.info.as_ptr())
        })
    }
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        // SAFETY: Owned by the type invariant.
        unsafe { bindings::remus_nlmsg_free(self.skb.as_ptr()) };
    }
}

/// Whether a socket has ever joined the group. (Counting them would need to know which leave that never
/// were in it.)
static LISTENED: Atomic<bool> = Atomic::new(false);

/// Whether anybody may listen to the registered family's group. Any context.
pub(crate) fn may_have_listeners() -> bool {
    LISTENED.load(Relaxed)
}

/// Sends an event of the registered family to the listeners of its multicast group, with what `f`
/// writes. Process context. An event for which there is no memory is lost, as it is for a listener that
/// does not read.
pub(crate) fn multicast(command: u8, f: impl FnOnce(&mut Message<'_>) -> Result) {
    let family = FAMILY.lock();
    let Some(family) = &*family else {
        return;
    };
    let (family, mut header) = (family.0.as_ptr(), null_mut());
    // SAFETY: The family stays registered while the lock is held.
    let skb = unsafe { bindings::remus_genl_new(family, 0, 0, command, &mut header) };
    let Some(skb) = NonNull::new(skb) else {
        return;
    };
    // SAFETY: Just created, and ours.
    if f(&mut unsafe { Message::from_raw(skb) }).is_err() {
        // SAFETY: As above.
        unsafe { bindings::remus_nlmsg_free(skb.as_ptr()) };
        return;
    }
    // SAFETY: As above; complete, and given away. The family has one group.
    unsafe { bindings::remus_genl_event_send(family, skb.as_ptr(), header, 0) };
}

const MAX_COMMANDS: usize = 16;

/// What the kernel keeps pointers to while a family is registered.
struct Tables {
    family: bindings::genl_family,
    ops: [bindings::genl_ops; MAX_COMMANDS],
    group: bindings::genl_multicast_group,
    notifier: bindings::notifier_block,
}

/// A family that is registered; it is removed when this is dropped.
///
/// # Invariants
///
/// `tables.family` is registered, with its `ops` and `mcgrps` in `tables`, and so is `tables.notifier`.
pub(crate) struct Registration<T: Handler> {
    tables: KBox<AssertSync<Tables>>,
    _handler: PhantomData<T>,
}

impl<T: Handler> Registration<T> {
    /// Registers the family. Process context; once, from the module's `init`.
    pub(crate) fn new(module: &'static ThisModule) -> Result<Self> {
        // SAFETY: Called once.
        unsafe { FAMILY.init() };
        let mut tables: KBox<AssertSync<Tables>> = KBox::new(
            AssertSync(Tables {
                family: Plain::ZERO,
                ops: [const { Plain::ZERO }; MAX_COMMANDS],
                group: Plain::ZERO,
                notifier: Plain::ZERO,
            }),
            GFP_KERNEL,
        )?;
        let Tables {
            family,
            ops,
            group,
            notifier,
        } = &mut tables.0;
        for (op, command) in ops.iter_mut().zip(T::COMMANDS) {
            op.cmd = command.number;
            op.flags = bindings::GENL_ADMIN_PERM as u8;
            op.policy = command.policy.as_ptr().cast();
            op.maxattr = command.policy.len() as u32 - 1;
            if command.one {
                op.doit = Some(Self::doit);
            }
            if command.dump {
                op.dumpit = Some(Self::dumpit);
            }
        }
        put_name(&mut family.name, T::NAME);
        family.version = u32::from(T::VERSION);
        // Domains are found from every network namespace; who may ask is checked by capability.
        family.set_netnsok(1);
        family.module = module.as_ptr();
        family.n_ops = T::COMMANDS.len().min(MAX_COMMANDS) as u8;
        family.resv_start_op = 1;
        family.ops = ops.as_ptr();
        put_name(&mut group.name, T::EVENTS);
        group.flags = bindings::REMUS_MCAST_CAP_NET_ADMIN;
        family.mcgrps = group;
        family.n_mcgrps = 1;
        family.bind = Some(Self::bind);
        // SAFETY: The family is complete, and stays where it is, on the heap, until `drop`
        // unregisters it. `maxattr` of each operation is that of its policy.
        to_result(unsafe { bindings::genl_register_family(family) })?;
        *FAMILY.lock() = Some(AssertSync(NonNull::from(&mut *family)));
        notifier.notifier_call = Some(Self::notify);
        // SAFETY: The notifier stays where it is until `drop`. This cannot fail.
        unsafe { bindings::netlink_register_notifier(notifier) };
        // INVARIANT: Just registered.
        Ok(Self {
            tables,
            _handler: PhantomData,
        })
    }

    /// # Safety
    ///
    /// Called by generic netlink as a socket joins the group.
    unsafe extern "C" fn bind(_group: c_int) -> c_int {
        LISTENED.store(true, Relaxed);
        0
    }

    /// # Safety
    ///
    /// Called by netlink for a registered notifier.
    unsafe extern "C" fn notify(
        _block: *mut bindings::notifier_block,
        event: c_ulong,
        data: *mut c_void,
    ) -> c_int {
        // SAFETY: This event comes with this structure, valid during the call.
        let notify = unsafe { &*data.cast::<bindings::netlink_notify>() };
        if event == bindings::NETLINK_URELEASE as c_ulong
            && notify.protocol == bindings::NETLINK_GENERIC as c_int
        {
            T::closed(Socket {
                net: notify.net.addr(),
                port: notify.portid,
            });
        }
        0 // NOTIFY_DONE
    }

    /// # Safety
    ///
    /// Called by generic netlink for a registered family.
    unsafe extern "C" fn doit(
        _skb: *mut bindings::sk_buff,
        info: *mut bindings::genl_info,
    ) -> c_int {
        let Some(info) = NonNull::new(info) else {
            return EINVAL.to_errno();
        };
        // SAFETY: `info` is the request's, valid during this call.
        let ack = unsafe { Ack::from_raw((*info.as_ptr()).extack) };
        // SAFETY: As above.
        let command = unsafe { (*(*info.as_ptr()).genlhdr).cmd };
        let known = T::COMMANDS.iter().find(|c| c.number == command);
        let len = known.map_or(0, |c| c.policy.len());
        // INVARIANT: `info` is valid during this call, and its table is for this policy.
        match T::execute(&Request(info, len, PhantomData), &ack) {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Called by generic netlink for a registered family.
    unsafe extern "C" fn dumpit(
        skb: *mut bindings::sk_buff,
        cb: *mut bindings::netlink_callback,
    ) -> c_int {
        // SAFETY: `cb` and `skb` are valid during this call, and so is the dump's request, whose table
        // of attributes was made for the command's policy.
        let (command, attrs) = unsafe {
            let info = bindings::remus_genl_dump_info(cb);
            let command = (*(*info).genlhdr).cmd;
            let known = T::COMMANDS.iter().find(|c| c.number == command);
            let attrs = Attrs {
                table: (*info).attrs,
                len: known.map_or(0, |c| c.policy.len()),
                _attrs: PhantomData,
            };
            (command, attrs)
        };
        // SAFETY: `cb` is valid during this call, and its acknowledgement this dump's.
        let ack = unsafe { Ack::from_raw((*cb).extack) };
        // SAFETY: `args` is this dump's to use; it starts as zeros.
        let [first, second, ..] = unsafe { (*cb).__bindgen_anon_1.args.as_mut() };
        loop {
            // SAFETY: `cb` and `skb` are valid during this call.
            let header = unsafe { bindings::remus_genl_dump_begin(skb, cb) };
            let (Some(message), false) = (NonNull::new(skb), header.is_null()) else {
                break;
            };
            let mut position: Position = [*first as u64, *second as u64];
            // SAFETY: The message is this call's to write.
            let mut message = unsafe { Message::from_raw(message) };
            let described = T::describe(command, &attrs, &mut position, &mut message, &ack);
            if let Ok(true) = described {
                // SAFETY: `header` was begun in this message.
                unsafe { bindings::remus_genl_dump_end(skb, header) };
                (*first, *second) = (position[0] as c_long, position[1] as c_long);
                continue;
            }
            // SAFETY: As above.
            unsafe { bindings::remus_genl_dump_cancel(skb, header) };
            match described {
                // Go on in the next message.
                Err(DumpError::Full) => break,
                Err(DumpError::Refused(error)) => return error.to_errno(),
                _ => return 0,
            }
        }
        // SAFETY: Valid during this call.
        unsafe { (*skb).len as c_int }
    }
}

impl<T: Handler> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: Registered by the type invariant. Waits until no notification runs.
        unsafe { bindings::netlink_unregister_notifier(&mut self.tables.0.notifier) };
        *FAMILY.lock() = None;
        // SAFETY: Registered by the type invariant. Waits until no command runs.
        unsafe { bindings::genl_unregister_family(&self.tables.0.family) };
    }
}

/// A short text that is put together without allocating: what does not fit is cut off.
pub(crate) struct Text {
    bytes: [u8; 79],
    len: usize,
}

impl Text {
    /// Formats.
    pub(crate) fn new(args: fmt::Arguments<'_>) -> Self {
        let mut text = Self {
            bytes: [0; 79],
            len: 0,
        };
        // Writing to the buffer below cannot fail.
        let _ = fmt::Write::write_fmt(&mut text, args);
        text
    }

    /// The bytes.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let room = &mut self.bytes[self.len..];
        let n = room.len().min(s.len());
        room[..n].copy_from_slice(&s.as_bytes()[..n]);
        self.len += n;
        Ok(())
    }
}
