// SPDX-License-Identifier: GPL-2.0

//! A virtual machine with one processor that writes memory, and nothing else.
//!
//! Guest-physical memory: from 0 on the mapping under test, and at 3.75 GiB, out of its way, a region
//! of this process's own with the code, followed by a list of addresses. The processor runs in flat
//! 32-bit protected mode without paging, so that an address is a guest-physical one. There is no
//! stack, no descriptor table, no interrupt: a piece of code gets its input in registers and ends
//! with an output to a port.

use std::mem;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, io};

use anyhow::{bail, Context, Result};
use kvm_bindings::{
    kvm_enable_cap, kvm_regs, kvm_segment, kvm_userspace_memory_region,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::map::Map;
use crate::PAGE;

/// Where the code is, guest-physical, and how large the region is that begins with it.
const CODE: u32 = 0xF000_0000;
const REGION: usize = 1 << 20;
/// Where in it the list begins.
const LIST: usize = PAGE;
/// Most addresses in the list.
pub const LIST_MAX: usize = (REGION - LIST) / 4;
/// Slot of the memory under test, and of the region with the code.
const MEMORY_SLOT: u32 = 0;
const CODE_SLOT: u32 = 1;
/// Port that ends a piece of code.
const PORT: u16 = 0x10;
/// Intel processors without unrestricted guest mode want three pages for real mode.
const TSS: usize = 0xFFFB_D000;

/// The generator of [`Job::Scatter`] and [`Job::Touch`]: the next state is this times the last, ...
pub const LCG_MULTIPLIER: u32 = 1_664_525;
/// ... plus this.
pub const LCG_INCREMENT: u32 = 1_013_904_223;

/// Scatter. `eax`: state, `ebx`: mask of page addresses, `ecx`: how many writes.
const SCATTER: &[u8] = &[
    0x69, 0xC0, 0x0D, 0x66, 0x19, 0x00, // 1: imul eax, eax, 1664525
    0x05, 0x5F, 0xF3, 0x6E, 0x3C, //          add eax, 1013904223
    0x89, 0xC7, //                            mov edi, eax
    0x21, 0xDF, //                            and edi, ebx
    0x89, 0x07, //                            mov [edi], eax
    0x49, //                                  dec ecx
    0x75, 0xEC, //                            jnz 1b
    0xE6, 0x10, //                            out 0x10, al
];

/// Touch: the same pages as with scatter, each written with what it holds.
const TOUCH: &[u8] = &[
    0x69, 0xC0, 0x0D, 0x66, 0x19, 0x00, // 1: imul eax, eax, 1664525
    0x05, 0x5F, 0xF3, 0x6E, 0x3C, //          add eax, 1013904223
    0x89, 0xC7, //                            mov edi, eax
    0x21, 0xDF, //                            and edi, ebx
    0x8B, 0x17, //                            mov edx, [edi]
    0x89, 0x17, //                            mov [edi], edx
    0x49, //                                  dec ecx
    0x75, 0xEA, //                            jnz 1b
    0xE6, 0x10, //                            out 0x10, al
];

/// Sweep. `edi`: address of the first page, `ecx`: how many pages, `eax`: what to write.
const SWEEP: &[u8] = &[
    0x89, 0x07, //                         1: mov [edi], eax
    0x81, 0xC7, 0x00, 0x10, 0x00, 0x00, //    add edi, 4096
    0x49, //                                  dec ecx
    0x75, 0xF5, //                            jnz 1b
    0xE6, 0x10, //                            out 0x10, al
];

/// Listed. `esi`: where the list is, `ecx`: how many addresses, `eax`: what to write.
const LISTED: &[u8] = &[
    0x8B, 0x3E, //                         1: mov edi, [esi]
    0x83, 0xC6, 0x04, //                      add esi, 4
    0x89, 0x07, //                            mov [edi], eax
    0x49, //                                  dec ecx
    0x75, 0xF6, //                            jnz 1b
    0xE6, 0x10, //                            out 0x10, al
];

/// The pieces of code, and how far apart they are in the region.
const PIECES: [&[u8]; 4] = [SCATTER, TOUCH, SWEEP, LISTED];
const APART: usize = 64;

/// What the guest does until it ends with an output. Each job writes at least once.
#[derive(Clone, Copy, Debug)]
pub enum Job {
    /// Writes the first word of `count` pages that a generator chooses, its state the value.
    Scatter {
        /// The generator's state before its first step.
        state: u32,
        /// How many writes.
        count: u32,
    },
    /// Writes the first word of the same pages with what it holds.
    Touch {
        /// The generator's state before its first step.
        state: u32,
        /// How many writes.
        count: u32,
    },
    /// Writes the first word of `count` pages from `page` on.
    Sweep {
        /// The first page.
        page: u32,
        /// How many pages.
        count: u32,
        /// What to write.
        value: u32,
    },
    /// Writes the first word of `count` pages of the list of [`Guest::list`], from entry `from` on.
    Listed {
        /// The first entry.
        from: u32,
        /// How many entries.
        count: u32,
        /// What to write.
        value: u32,
    },
}

/// Page of a generator's state, in a memory of `pages` pages, a power of two.
pub fn lcg_page(state: u32, pages: u64) -> u64 {
    u64::from(state & page_mask(pages)) / PAGE as u64
}

/// The generator's next state.
pub fn lcg_next(state: u32) -> u32 {
    state
        .wrapping_mul(LCG_MULTIPLIER)
        .wrapping_add(LCG_INCREMENT)
}

fn page_mask(pages: u64) -> u32 {
    ((pages as u32) - 1) << 12
}

/// Keeps the calling thread, and those that it starts from here on, off the first processor of an emulated machine, which may
/// lose the guest's page tables: see `leave_first_processor` in tests/demo/hosts.py.
pub fn leave_first_processor() -> Result<()> {
    if env::var_os("REMUS_ACCEL").is_none_or(|accel| accel != "tcg") {
        return Ok(());
    }
    // SAFETY: a set of zeros is an empty one, 0 is in its range, and both calls get it with its size.
    let done = unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        let size = mem::size_of_val(&set);
        let known = libc::sched_getaffinity(0, size, &mut set) == 0;
        libc::CPU_CLR(0, &mut set);
        known && (libc::CPU_COUNT(&set) == 0 || libc::sched_setaffinity(0, size, &set) == 0)
    };
    done.then_some(())
        .with_context(|| format!("cannot choose processors: {}", io::Error::last_os_error()))
}

/// The virtual machine. It runs in the thread that calls [`Guest::run`].
pub struct Guest {
    // Before what it maps: dropped first.
    processor: VcpuFd,
    machine: VmFd,
    region: Map,
    pages: u64,
    memory: kvm_userspace_memory_region,
}

impl Guest {
    /// A machine whose memory is `memory`: 2^n pages, at most 2 GiB, mapped in this process for as long
    /// as the machine runs. With `log`, KVM keeps its own log of dirty pages, which is cleared by hand.
    pub fn new(memory: &Map, log: bool) -> Result<Self> {
        let pages = (memory.length() / PAGE) as u64;
        if !pages.is_power_of_two() || memory.length() > 1 << 31 {
            bail!("a guest's memory is 2^n pages and at most 2 GiB, not {pages} pages");
        }
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let machine = kvm.create_vm().context("cannot make a virtual machine")?;
        machine.set_tss_address(TSS).ok();
        if log {
            let manual = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                args: [KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into(), 0, 0, 0],
                ..Default::default()
            };
            machine
                .enable_cap(&manual)
                .context("cannot clear KVM's log by hand")?;
        }
        let region = Map::anonymous(REGION)?;
        for (n, piece) in PIECES.iter().enumerate() {
            region.write(n * APART, piece);
        }
        let slot = kvm_userspace_memory_region {
            slot: MEMORY_SLOT,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: 0,
            memory_size: memory.length() as u64,
            userspace_addr: memory.address(0, memory.length()) as u64,
        };
        let code = kvm_userspace_memory_region {
            slot: CODE_SLOT,
            flags: 0,
            guest_phys_addr: CODE.into(),
            memory_size: REGION as u64,
            userspace_addr: region.address(0, REGION) as u64,
        };
        for slot in [slot, code] {
            // SAFETY: The region lives as long as the machine; that the memory does is asked of the
            // caller, and if it goes, the guest's access fails and nothing else.
            unsafe { machine.set_user_memory_region(slot) }
                .context("cannot give a virtual machine its memory")?;
        }
        let processor = machine
            .create_vcpu(0)
            .context("cannot make a virtual processor")?;
        flat_protected_mode(&processor).context("cannot set up a virtual processor")?;
        Ok(Self {
            processor,
            machine,
            region,
            pages,
            memory: slot,
        })
    }

    /// The machine, for its dirty log.
    pub fn machine(&self) -> &VmFd {
        &self.machine
    }

    /// The slot of the memory under test.
    pub fn memory(&self) -> &kvm_userspace_memory_region {
        &self.memory
    }

    /// The processor, for its state.
    pub fn processor(&self) -> &VcpuFd {
        &self.processor
    }

    /// Writes down pages for [`Job::Listed`], from entry `from` on.
    pub fn list(&self, from: usize, pages: &[u64]) -> Result<()> {
        if from + pages.len() > LIST_MAX {
            bail!("a list of {} pages is too long", from + pages.len());
        }
        for (n, page) in pages.iter().enumerate() {
            let place = self.region.address(LIST + (from + n) * 4, 4);
            // SAFETY: Aligned and within the region, which this borrows.
            unsafe { AtomicU32::from_ptr(place.cast()) }
                .store((page * PAGE as u64) as u32, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Does a job; returns when it is done.
    pub fn run(&mut self, job: Job) -> Result<()> {
        let mut regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        let piece = match job {
            Job::Scatter { state, count } | Job::Touch { state, count } => {
                regs.rax = state.into();
                regs.rbx = page_mask(self.pages).into();
                regs.rcx = count.into();
                usize::from(matches!(job, Job::Touch { .. }))
            }
            Job::Sweep { page, count, value } => {
                regs.rdi = u64::from(page) * PAGE as u64;
                regs.rcx = count.into();
                regs.rax = value.into();
                2
            }
            Job::Listed { from, count, value } => {
                regs.rsi = u64::from(CODE) + (LIST + from as usize * 4) as u64;
                regs.rcx = count.into();
                regs.rax = value.into();
                3
            }
        };
        if regs.rcx == 0 {
            bail!("a guest's job writes at least once");
        }
        regs.rip = u64::from(CODE) + (piece * APART) as u64;
        self.processor.set_regs(&regs)?;
        loop {
            match self.processor.run() {
                Ok(VcpuExit::IoOut(PORT, _)) => return Ok(()),
                Ok(other) => bail!("the guest stopped at {other:?} instead of finishing {job:?}"),
                Err(e) if io::Error::from(e).kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).with_context(|| format!("the guest failed at {job:?}")),
            }
        }
    }
}

/// Segments from 0 to 4 GiB, 32 bits, protected mode; no descriptor table, as nothing loads a segment.
fn flat_protected_mode(processor: &VcpuFd) -> Result<()> {
    let mut sregs = processor.get_sregs()?;
    let data = kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector: 0x10,
        type_: 3, // data, writable, accessed
        present: 1,
        dpl: 0,
        db: 1, // 32 bits
        s: 1,  // code or data
        g: 1,  // limit in pages
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 11, // code, readable, accessed
        ..data
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    sregs.cr0 |= 1; // protected mode
    processor.set_sregs(&sregs)?;
    Ok(())
}
