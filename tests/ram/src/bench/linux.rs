// SPDX-License-Identifier: GPL-2.0

//! What Linux has for finding written pages: userfaultfd's write protection, resolved by a thread or
//! by the kernel itself; PAGEMAP_SCAN, which collects and protects again; and KVM's dirty log.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::thread;

use anyhow::{ensure, Context, Result};
use kvm_bindings::{kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, KVMIO};
use remus_ram::abi::iowr;
use remus_ram::guest::Guest;
use remus_ram::map::{memfd, Map};
use remus_ram::PAGE;

use crate::memory::touch;

/// `include/uapi/linux/userfaultfd.h`.
#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
#[derive(Default)]
struct UffdioRegister {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}
#[repr(C)]
#[derive(Default)]
struct UffdioWriteprotect {
    start: u64,
    length: u64,
    mode: u64,
}
const UFFD_API: u64 = 0xAA;
const UFFDIO_API: u32 = iowr::<UffdioApi>(0xAA, 0x3F);
const UFFDIO_REGISTER: u32 = iowr::<UffdioRegister>(0xAA, 0x00);
const UFFDIO_WRITEPROTECT: u32 = iowr::<UffdioWriteprotect>(0xAA, 0x06);
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
/// Bytes in a `struct uffd_msg`, and where in it a fault's address is.
const UFFD_MSG: usize = 32;
const UFFD_MSG_ADDRESS: usize = 16;

/// `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const PAGEMAP_SCAN: u32 = iowr::<PmScanArg>(b'f', 16);
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// Consecutive written pages, as PAGEMAP_SCAN returns them.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// A memfd whose mapping here is write-protected by userfaultfd. Fully touched.
pub struct Protected {
    /// The mapping.
    pub map: Map,
    uffd: File,
    pagemap: File,
}

impl Protected {
    /// Of so many MiB. With `by_kernel` a write to a protected page is let through by the kernel,
    /// which PAGEMAP_SCAN needs; else a thread has to do it.
    pub fn new(mib: u64, by_kernel: bool) -> Result<Self> {
        let length = (mib as usize) << 20;
        let file = memfd(length)?;
        let map = Map::shared(file.as_fd(), length, 0, true)?;
        touch(&map);
        // SAFETY: No pointers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        ensure!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
        // SAFETY: A new descriptor, nobody else's.
        let uffd = unsafe { File::from_raw_fd(fd as i32) };
        let features = UFFD_FEATURE_PAGEFAULT_FLAG_WP
            | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
            | UFFD_FEATURE_WP_UNPOPULATED
            | if by_kernel { UFFD_FEATURE_WP_ASYNC } else { 0 };
        let mut api = UffdioApi {
            api: UFFD_API,
            features,
            ..Default::default()
        };
        call(&uffd, UFFDIO_API, &mut api).context("UFFDIO_API")?;
        let mut register = UffdioRegister {
            start: map.address(0, length) as u64,
            length: length as u64,
            mode: UFFDIO_REGISTER_MODE_WP,
            ..Default::default()
        };
        call(&uffd, UFFDIO_REGISTER, &mut register).context("UFFDIO_REGISTER")?;
        let pagemap = File::open("/proc/self/pagemap").context("/proc/self/pagemap")?;
        Ok(Self { map, uffd, pagemap })
    }

    /// Protects all pages by userfaultfd.
    pub fn protect(&self) -> Result<()> {
        let length = self.map.length();
        write_protect(&self.uffd, self.map.address(0, length) as u64, length, true)
    }

    /// Collects the written pages by PAGEMAP_SCAN and protects them again, in one call. Returns how
    /// many there were. `regions` has to have room for all and one more.
    pub fn scan(&self, regions: &mut [Region]) -> Result<u64> {
        let start = self.map.address(0, self.map.length()) as u64;
        let mut argument = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            start,
            end: start + self.map.length() as u64,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_mask: PAGE_IS_WRITTEN,
            return_mask: PAGE_IS_WRITTEN,
            ..Default::default()
        };
        let found = call(&self.pagemap, PAGEMAP_SCAN, &mut argument).context("PAGEMAP_SCAN")?;
        // Not by walk_end: it stays where the kernel's own buffer was full the last time.
        ensure!(
            (found as usize) < regions.len(),
            "PAGEMAP_SCAN found more than {} regions",
            regions.len()
        );
        let bytes: u64 = regions[..found as usize]
            .iter()
            .map(|r| r.end - r.start)
            .sum();
        Ok(bytes / PAGE as u64)
    }

    /// Starts the thread that lets writes through, for as long as the process lives.
    pub fn answer(&self) -> Result<()> {
        let mut uffd = self.uffd.try_clone()?;
        thread::spawn(move || {
            let mut message = [0; UFFD_MSG];
            while uffd.read_exact(&mut message).is_ok() {
                let mut address = [0; 8];
                address.copy_from_slice(&message[UFFD_MSG_ADDRESS..][..8]);
                let page = u64::from_ne_bytes(address) & !(PAGE as u64 - 1);
                if let Err(error) = write_protect(&uffd, page, PAGE, false) {
                    // The writer would wait forever.
                    eprintln!("ram-bench: {error:#}");
                    std::process::exit(1);
                }
            }
        });
        Ok(())
    }
}

fn write_protect(uffd: &File, start: u64, length: usize, on: bool) -> Result<()> {
    let mut argument = UffdioWriteprotect {
        start,
        length: length as u64,
        mode: if on { UFFDIO_WRITEPROTECT_MODE_WP } else { 0 },
    };
    call(uffd, UFFDIO_WRITEPROTECT, &mut argument)
        .map(drop)
        .context("UFFDIO_WRITEPROTECT")
}

fn call<T>(file: &File, number: u32, argument: &mut T) -> io::Result<i32> {
    // SAFETY: `argument` has the layout that belongs to `number`; what it points to is borrowed by the
    // caller.
    match unsafe { libc::ioctl(file.as_raw_fd(), number.into(), argument) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// Fetches KVM's dirty log and clears it, which protects the pages again. Returns how many there were.
pub fn kvm_log(guest: &Guest) -> Result<u64> {
    let slot = guest.memory();
    let mut log = guest
        .machine()
        .get_dirty_log(slot.slot, slot.memory_size as usize)
        .context("KVM_GET_DIRTY_LOG")?;
    let pages = log.iter().map(|w| u64::from(w.count_ones())).sum();
    let mut argument = kvm_clear_dirty_log {
        slot: slot.slot,
        num_pages: (slot.memory_size / PAGE as u64) as u32,
        first_page: 0,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: log.as_mut_ptr().cast(),
        },
    };
    let number = iowr::<kvm_clear_dirty_log>(KVMIO as u8, 0xC0);
    // SAFETY: The argument is the one of KVM_CLEAR_DIRTY_LOG, its bitmap of the slot's size.
    let done = unsafe { libc::ioctl(guest.machine().as_raw_fd(), number.into(), &mut argument) };
    ensure!(
        done == 0,
        "KVM_CLEAR_DIRTY_LOG: {}",
        io::Error::last_os_error()
    );
    Ok(pages)
}
