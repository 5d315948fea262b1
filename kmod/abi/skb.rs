// SPDX-License-Identifier: GPL-2.0

//! Packets.
//!
//! C header: [`include/linux/skbuff.h`](srctree/include/linux/skbuff.h)

use super::bindings;
use core::{
    mem::ManuallyDrop,
    ptr::{
        null_mut,
        NonNull, //
    },
};

/// A packet.
///
/// Dropping it frees it, and tells the kernel's drop monitor that a queue discipline did. Any
/// context.
///
/// # Invariants
///
/// Points to a valid `struct sk_buff` that this value alone owns, that is on no list, and whose
/// control block belongs to the queue discipline layer.
pub(crate) struct Packet(NonNull<bindings::sk_buff>);

// SAFETY: A packet that is on no list can be used by whichever thread owns it.
unsafe impl Send for Packet {}

impl Packet {
    /// Takes over a packet from C.
    ///
    /// # Safety
    ///
    /// The caller owns the packet, gives it up, and the packet is on no list. The control block of
    /// the packet is not in use by another layer.
    pub(super) unsafe fn from_raw(skb: NonNull<bindings::sk_buff>) -> Self {
        // INVARIANT: By the safety requirements.
        Self(skb)
    }

    /// Hands the packet over to C.
    pub(super) fn into_raw(self) -> *mut bindings::sk_buff {
        ManuallyDrop::new(self).0.as_ptr()
    }

    /// The packet, for a call that leaves it where it is.
    pub(super) fn as_ptr(&self) -> *mut bindings::sk_buff {
        self.0.as_ptr()
    }

    /// Bytes in the packet, from the header that the holding layer sees.
    pub(crate) fn len(&self) -> u32 {
        // SAFETY: The packet is valid by the type invariant.
        unsafe { (*self.0.as_ptr()).len }
    }

    /// Bytes that the packet will be on the wire, as a queue discipline counts them. Only for a packet
    /// that came through one.
    pub(super) fn wire_len(&self) -> u32 {
        // SAFETY: The packet and its control block are valid by the type invariant.
        unsafe { (*control_block(self.0.as_ptr())).pkt_len }
    }

    /// Packets that it will be on the wire, as a queue discipline counts them.
    #[inline]
    pub(super) fn segments(&self) -> u16 {
        let shared = self.shared();
        // SAFETY: Valid. Nobody changes how a packet is cut while clones of it share this.
        unsafe {
            if (*shared).gso_size == 0 {
                1
            } else {
                (*shared).gso_segs
            }
        }
    }

    /// Bytes of memory that the packet keeps.
    pub(crate) fn memory(&self) -> u32 {
        // SAFETY: The packet is valid by the type invariant.
        unsafe { (*self.0.as_ptr()).truesize }
    }

    /// Whether the packet's data is the kernel's own, so that its sender cannot change it any more: where all of it
    /// lies in one piece (`skb_is_nonlinear()`), or none is the sender's (`skb_zcopy()`).
    #[inline]
    pub(crate) fn owns_data(&self) -> bool {
        // SAFETY: Valid. The length is this packet's own; nobody changes the flags while clones of it share them.
        unsafe {
            (*self.0.as_ptr()).data_len == 0
                || u32::from((*self.shared()).flags) & bindings::SKBFL_ZEROCOPY_ENABLE == 0
        }
    }

    /// Its shared information, which is where its data ends (`skb_shinfo()`).
    #[inline]
    fn shared(&self) -> *const bindings::skb_shared_info {
        let skb = self.0.as_ptr();
        // SAFETY: The packet is valid by the type invariant.
        unsafe { (*skb).head.add((*skb).end as usize).cast() }
    }

    /// Gives the packet data of its own ([`owns_data`](Self::owns_data)). False if there is no memory for it: such a
    /// packet cannot be held, as the sender could still change it.
    #[must_use]
    pub(crate) fn detach(&mut self) -> bool {
        // SAFETY: The packet is valid and owned by the type invariant.
        unsafe { bindings::remus_skb_detach(self.0.as_ptr()) }
    }
}

impl Drop for Packet {
    fn drop(&mut self) {
        // SAFETY: The packet is owned by the type invariant, and not used after this.
        unsafe { bindings::remus_skb_free(self.0.as_ptr()) }
    }
}

fn control_block(skb: *mut bindings::sk_buff) -> *mut bindings::qdisc_skb_cb {
    // SAFETY: Only the address of a field is taken.
    unsafe { core::ptr::addr_of_mut!((*skb).cb).cast() }
}

/// Where a held packet keeps its epoch: in the queue discipline's part of the control block, which is
/// free on ingress too. It starts at a multiple of eight bytes.
fn epoch_of(skb: *mut bindings::sk_buff) -> *mut u64 {
    const {
        assert!(core::mem::offset_of!(bindings::qdisc_skb_cb, data) % 8 == 0);
        assert!(bindings::QDISC_CB_PRIV_LEN as usize >= core::mem::size_of::<u64>());
    }
    // SAFETY: Only the address of a field is taken.
    unsafe { core::ptr::addr_of_mut!((*control_block(skb)).data).cast() }
}

fn next_of(skb: *mut bindings::sk_buff) -> *mut *mut bindings::sk_buff {
    // SAFETY: Only the address of a field is taken.
    unsafe { core::ptr::addr_of_mut!((*skb).__bindgen_anon_1.__bindgen_anon_1.next) }
}

/// A first-in first-out queue of packets, each with the epoch it belongs to.
///
/// # Invariants
///
/// `head` is null, or points to the first of a chain of packets linked through `->next` that this
/// value owns, each with an epoch in its control block; `tail` then points to the last. `packets`
/// and `memory` are sums over the chain.
pub(crate) struct PacketQueue {
    head: *mut bindings::sk_buff,
    tail: *mut bindings::sk_buff,
    packets: u64,
    memory: u64,
}

// SAFETY: The packets belong to the queue, whichever thread has it.
unsafe impl Send for PacketQueue {}

impl PacketQueue {
    /// An empty queue.
    pub(crate) const fn new() -> Self {
        Self {
            head: null_mut(),
            tail: null_mut(),
            packets: 0,
            memory: 0,
        }
    }

    /// How many packets are in the queue.
    pub(crate) fn packets(&self) -> u64 {
        self.packets
    }

    /// Sum of [`Packet::memory`].
    pub(crate) fn memory(&self) -> u64 {
        self.memory
    }

    /// Appends a packet of `epoch`. No socket accounts for it any more (as `skb_orphan()` has it): to be there for an
    /// epoch would fill that, and keep its namespace. Process context or softirq: the socket's destructor is called,
    /// under whatever lock the caller holds.
    #[inline]
    pub(crate) fn push(&mut self, packet: Packet, epoch: u64) {
        // Sums over what is in memory do not overflow: not checked, as it is for each packet.
        self.packets = self.packets.wrapping_add(1);
        self.memory = self.memory.wrapping_add(packet.memory().into());
        let skb = packet.into_raw();
        // SAFETY: The packet was owned, so nothing else has it; its control block is the queue
        // discipline's, by the invariant of `Packet`. `tail` is valid if it is not null. The destructor is in this
        // union, as no queue of a socket's has the packet, and is for the socket that `sk` is.
        unsafe {
            *epoch_of(skb) = epoch;
            *next_of(skb) = null_mut();
            if self.tail.is_null() {
                self.head = skb;
            } else {
                *next_of(self.tail) = skb;
            }
            if let Some(told) = (*skb).__bindgen_anon_3.__bindgen_anon_1.destructor {
                told(skb);
                (*skb).__bindgen_anon_3.__bindgen_anon_1.destructor = None;
                (*skb).sk = null_mut();
            }
        }
        self.tail = skb;
    }

    /// [`Packet::memory`] of the first packet, if its epoch is at most `epoch`.
    pub(crate) fn first_due(&self, epoch: u64) -> Option<u64> {
        let first = NonNull::new(self.head)?.as_ptr();
        // SAFETY: The chain is valid by the type invariant, and each packet has an epoch.
        unsafe { (*epoch_of(first) <= epoch).then(|| (*first).truesize.into()) }
    }

    /// Takes out the first packet if its epoch is at most `epoch`.
    pub(crate) fn pop(&mut self, epoch: u64) -> Option<Packet> {
        let skb = NonNull::new(self.head)?;
        // SAFETY: The chain is valid by the type invariant, and each packet has an epoch.
        unsafe {
            if *epoch_of(skb.as_ptr()) > epoch {
                return None;
            }
            self.head = *next_of(skb.as_ptr());
            *next_of(skb.as_ptr()) = null_mut();
        }
        if self.head.is_null() {
            self.tail = null_mut();
        }
        // SAFETY: The queue owned the packet, which is now off the chain.
        let packet = unsafe { Packet::from_raw(skb) };
        // It was in the sums.
        self.packets = self.packets.wrapping_sub(1);
        self.memory = self.memory.wrapping_sub(packet.memory().into());
        Some(packet)
    }

    /// Takes out the packets at the head whose epoch is at most `epoch`, at most so many.
    pub(crate) fn take(&mut self, most: u64, epoch: u64) -> Self {
        let mut taken = Self {
            head: self.head,
            ..Self::new()
        };
        while taken.packets < most {
            let Some(skb) = NonNull::new(self.head) else {
                break;
            };
            // SAFETY: The chain is valid by the type invariant, and each packet has an epoch.
            unsafe {
                if *epoch_of(skb.as_ptr()) > epoch {
                    break;
                }
                taken.memory += u64::from((*skb.as_ptr()).truesize);
                self.head = *next_of(skb.as_ptr());
            }
            taken.tail = skb.as_ptr();
            taken.packets += 1;
        }
        if self.head.is_null() {
            self.tail = null_mut();
        }
        if taken.tail.is_null() {
            taken.head = null_mut();
        } else {
            // SAFETY: A packet of the chain, which ends with it.
            unsafe { *next_of(taken.tail) = null_mut() };
        }
        self.packets -= taken.packets;
        self.memory -= taken.memory;
        // INVARIANT: The chain was cut after `tail`, and what was counted is before that.
        taken
    }

    /// Appends all of `other`.
    pub(crate) fn append(&mut self, other: Self) {
        let other = ManuallyDrop::new(other);
        if other.head.is_null() {
            return;
        }
        if self.tail.is_null() {
            self.head = other.head;
        } else {
            // SAFETY: `tail` is the last packet of this chain, by the type invariant; the other chain
            // is given up by its owner.
            unsafe { *next_of(self.tail) = other.head };
        }
        self.tail = other.tail;
        self.packets += other.packets;
        self.memory += other.memory;
    }

    /// Hands the packets to the network stack, in order, as received after the ingress hook of
    /// their device (see [`super::hook`]). Process context, no lock held. At most a few hundred
    /// packets at once: the receiving side's backlog is bounded.
    pub(crate) fn receive(self) {
        let first = ManuallyDrop::new(self).head;
        // SAFETY: The chain is valid, and given up: `self` is not dropped.
        unsafe { bindings::remus_skb_receive(first) }
    }
}

impl Drop for PacketQueue {
    fn drop(&mut self) {
        while self.pop(u64::MAX).is_some() {}
    }
}
