// SPDX-License-Identifier: GPL-2.0

//! A character device that is memory: its shared mappings all show the same pages, and the first
//! write to a write-protected page is announced before it happens.
//!
//! To offer one, implement [`Memory`], make a `static` [`Operations`] for it, and keep a
//! [`Registration`]. Each device has an address space of its own, whatever node it is opened
//! through, so that [`Mapping::write_protect`] finds every mapping.
//!
//! C headers: [`include/linux/miscdevice.h`](srctree/include/linux/miscdevice.h),
//! [`include/linux/mm.h`](srctree/include/linux/mm.h)

use super::{
    bindings,
    is_signalled,
    page::{
        Page,
        PageLock, //
    },
    AssertSync,
    Plain, //
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    error::{
        from_err_ptr,
        to_result, //
    },
    ffi::{
        c_int,
        c_long,
        c_uint,
        c_ulong, //
    },
    mm::virt::VmaNew,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        Arc,
        ArcBorrow, //
    },
    types::{
        ForeignOwnable,
        Opaque, //
    },
    uaccess::UserSlice, //
};

/// What became of the wish to write a page.
pub(crate) enum Write<'a> {
    /// It may be written; it stays locked until the write can happen.
    Ready(PageLock<'a>),
    /// Not now: [`Memory::wait`] with this number, and ask again.
    Wait(u64),
}

/// Pages that can be looked at through a mapping, beside the memory itself.
pub(crate) trait View: Send + Sync + 'static {
    /// How many there are, at most 2^18.
    fn pages(&self) -> u64;

    /// The page with this number, which is below [`pages`](Self::pages). Process context.
    fn page(&self, index: u64) -> Result<Page>;
}

/// Memory behind a device. Methods are called in process context and may sleep.
pub(crate) trait Memory: Send + Sync + 'static {
    /// What else can be mapped.
    type View: View;

    /// The view with this number, if there is one.
    fn view(&self, number: u64) -> Option<Arc<Self::View>>;

    /// Size in pages. Never changes.
    fn pages(&self) -> u64;

    /// The address space of the memory's mappings.
    fn mapping(&self) -> &Mapping;

    /// The page with this number, which is below [`pages`](Self::pages). Always the same one; made
    /// on first use.
    fn page(&self, index: u64) -> Result<Page>;

    /// `page`, number `index`, is about to be written through a mapping for the first time since it
    /// was made or write-protected. Lock order: what this takes comes before the page's lock and after
    /// `mmap_lock`.
    fn will_write<'a>(&self, index: u64, page: &'a Page) -> Result<Write<'a>>;

    /// Waits until it may be worth asking [`will_write`](Self::will_write) again, but not for long. Called
    /// with `mmap_lock` held for reading, or the lock of one mapping.
    fn wait(&self, turn: u64);

    /// A call. `argument` usually is an address in the caller's memory.
    fn ioctl(&self, command: u32, argument: usize) -> Result<isize>;

    /// The device was opened once more.
    fn opened(&self);

    /// One of those who opened it is gone, with all its mappings.
    fn closed(&self);
}

/// Offsets from here on, in pages, are those of [`View`]s; below is the memory.
const VIEWS: u64 = 1 << 40;
/// From one view to the next, in pages.
const VIEW_STRIDE: u64 = 1 << 18;

/// Where the view with this number is mapped from, in bytes.
pub(crate) const fn view_offset(number: u64) -> u64 {
    (VIEWS + number * VIEW_STRIDE) * PAGE_SIZE as u64
}

/// The address space of a device's mappings.
///
/// # Invariants
///
/// Points to an inode of which one reference is owned, and whose mapping only holds mappings of
/// files that [`Operations`] opened for this memory.
pub(crate) struct Mapping(NonNull<bindings::inode>);

// SAFETY: References to an inode may be held and dropped by any thread that may sleep.
unsafe impl Send for Mapping {}
// SAFETY: `&self` methods take the locks that they need.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// An empty address space. Process context.
    pub(crate) fn new(name: &'static CStr) -> Result<Self> {
        // SAFETY: The name is NUL-terminated. Process context.
        let inode = from_err_ptr(unsafe { bindings::remus_inode_new(name.as_char_ptr()) })?;
        // INVARIANT: A new inode, with a reference for the caller.
        NonNull::new(inode).map(Self).ok_or(ENOMEM)
    }

    /// Write-protects `pages` pages from number `index` on in all mappings, those of KVM included:
    /// whoever writes one next will fault. They are neighbours in physical memory and begin at frame
    /// `pfn`; a number that is mapped to another frame is left alone. Costs one call to whoever watches
    /// the mappings (MMU notifiers), and a flush of the TLB for each page. Takes `i_mmap_rwsem` and page
    /// table locks. May sleep.
    pub(crate) fn write_protect(&self, index: u64, pfn: usize, pages: u64) -> Result {
        // SAFETY: The inode is valid by the type invariant. The pages are only named by their numbers.
        let done = unsafe {
            bindings::mapping_wrprotect_range(
                bindings::remus_inode_mapping(self.0.as_ptr()),
                index as c_ulong,
                pfn as c_ulong,
                pages as c_ulong,
            )
        };
        if done < 0 {
            return Err(Error::from_errno(done));
        }
        Ok(())
    }

    /// Takes `pages` pages from number `index` on, at least one, out of all mappings, those of KVM included:
    /// whoever reads or writes one next will fault. Costs one call to whoever watches the mappings, and a
    /// flush of the TLB for all of them. Takes what [`write_protect`](Self::write_protect) takes. May sleep.
    pub(crate) fn unmap(&self, index: u64, pages: u64) {
        // SAFETY: As in `write_protect`.
        unsafe {
            bindings::unmap_mapping_pages(
                bindings::remus_inode_mapping(self.0.as_ptr()),
                index as c_ulong,
                pages as c_ulong,
                true,
            )
        };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: Owns a reference by the type invariant.
        unsafe { bindings::iput(self.0.as_ptr()) };
    }
}

/// The operations of the devices of one type of memory, for a `static`.
pub(crate) struct Operations<T: Memory>(AssertSync<bindings::file_operations>, PhantomData<T>);

impl<T: Memory> Operations<T> {
    const VM_OPS: AssertSync<bindings::vm_operations_struct> =
        AssertSync(bindings::vm_operations_struct {
            fault: Some(Self::fault),
            page_mkwrite: Some(Self::page_mkwrite),
            ..Plain::ZERO
        });

    const VIEW_VM_OPS: AssertSync<bindings::vm_operations_struct> =
        AssertSync(bindings::vm_operations_struct {
            open: Some(Self::view_open),
            close: Some(Self::view_close),
            fault: Some(Self::view_fault),
            ..Plain::ZERO
        });

    /// Operations of devices of `module`.
    pub(crate) const fn new(module: &'static ThisModule) -> Self {
        Self(
            AssertSync(bindings::file_operations {
                owner: module.as_ptr(),
                open: Some(Self::open),
                release: Some(Self::release),
                mmap: Some(Self::mmap),
                read: Some(Self::read),
                write: Some(Self::write),
                llseek: Some(Self::llseek),
                unlocked_ioctl: Some(Self::ioctl),
                // There is nothing to write back to; QEMU syncs its memory after it has loaded a state.
                fsync: Some(bindings::noop_fsync),
                ..Plain::ZERO
            }),
            PhantomData,
        )
    }

    /// # Safety
    ///
    /// `file` was opened by `open`, and not released yet, for `'a`.
    unsafe fn memory<'a>(file: *mut bindings::file) -> &'a T {
        // SAFETY: `open` put a reference of an `Arc<T>` there, which `release` drops.
        unsafe { &*(*file).private_data.cast::<T>() }
    }

    /// # Safety
    ///
    /// Called by `misc_open()` with `private_data` pointing to the `misc` of a [`Device<T>`].
    unsafe extern "C" fn open(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: `misc` is the first field of `Device<T>`; `misc_open` holds a mutex that
        // `misc_deregister` needs, so the device is still there.
        let device = unsafe { &*(*file).private_data.cast::<Device<T>>() };
        let memory = device.memory.clone();
        memory.opened();
        // SAFETY: The file is being opened, so nothing uses its mapping yet. The inode lives as
        // long as the memory, of which the file gets a reference.
        unsafe {
            bindings::remus_file_set_mapping(file, memory.mapping().0.as_ptr());
            (*file).private_data = Arc::into_raw(memory).cast_mut().cast();
        }
        0
    }

    /// # Safety
    ///
    /// Called by the VFS when the last reference to an open file is dropped.
    unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: `open` put it there, and nobody uses it after this.
        let memory = unsafe { Arc::from_raw((*file).private_data.cast::<T>()) };
        memory.closed();
        0
    }

    /// # Safety
    ///
    /// Called by the VFS for an open file, with a `vma` that is being set up.
    unsafe extern "C" fn mmap(
        file: *mut bindings::file,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: The file is open.
        let memory = unsafe { Self::memory(file) };
        // SAFETY: `vma` is being set up.
        let new = unsafe { VmaNew::from_raw(vma) };
        // A private mapping would hide its writes.
        // SAFETY: As above.
        if !unsafe { bindings::remus_vma_is_shared(vma) } {
            return EINVAL.to_errno();
        }
        // SAFETY: As above.
        let offset = unsafe { (*vma).vm_pgoff } as u64;
        let pages = ((new.end() - new.start()) / PAGE_SIZE) as u64;
        let fits = |offset: u64, room| offset.checked_add(pages).is_some_and(|end| end <= room);
        new.set_dontexpand();
        if let Some(offset) = offset.checked_sub(VIEWS) {
            let Some(view) = memory.view(offset / VIEW_STRIDE) else {
                return ENXIO.to_errno();
            };
            if !fits(offset % VIEW_STRIDE, view.pages()) {
                return ENXIO.to_errno();
            }
            if new.try_clear_maywrite().is_err() {
                return EACCES.to_errno();
            }
            // SAFETY: As above. `VIEW_VM_OPS` is promoted to a static; the reference is dropped by
            // `view_close`.
            unsafe {
                (*vma).vm_ops = &const { Self::VIEW_VM_OPS }.0;
                (*vma).vm_private_data = Arc::into_raw(view).cast_mut().cast();
            }
            return 0;
        }
        if !fits(offset, memory.pages()) {
            return ENXIO.to_errno();
        }
        // SAFETY: As above. `VM_OPS` is promoted to a static.
        unsafe { (*vma).vm_ops = &const { Self::VM_OPS }.0 };
        0
    }

    /// # Safety
    ///
    /// Called by the memory management for a fault in a mapping made by `mmap`.
    unsafe extern "C" fn fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: The fault is in one of our mappings, whose file is open.
        let (memory, index) = unsafe { Self::place(vmf) };
        if index >= memory.pages() {
            return bindings::vm_fault_reason_VM_FAULT_SIGBUS;
        }
        match memory.page(index) {
            Ok(page) => {
                // SAFETY: The fault is ours to answer; the reference goes with the page.
                unsafe { (*vmf).page = page.into_raw() };
                0
            }
            Err(error) => Self::failed(error),
        }
    }

    /// # Safety
    ///
    /// Called by the memory management before a page in a mapping made by `mmap` becomes writable.
    unsafe extern "C" fn page_mkwrite(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: The fault is in one of our mappings, whose file is open.
        let (memory, index) = unsafe { Self::place(vmf) };
        // SAFETY: The fault holds a reference to its page, which stays with it.
        let page = unsafe { Page::borrow((*vmf).page.cast()) };
        let wish = memory.will_write(index, &page);
        match wish {
            Ok(Write::Ready(lock)) => {
                // The fault handler unlocks the page when it has made it writable.
                lock.keep();
                bindings::vm_fault_reason_VM_FAULT_LOCKED
            }
            Ok(Write::Wait(turn)) => {
                memory.wait(turn);
                // It faults again, unless it was killed meanwhile.
                bindings::vm_fault_reason_VM_FAULT_NOPAGE
            }
            Err(error) => Self::failed(error),
        }
    }

    /// # Safety
    ///
    /// Called by the memory management when it has copied a mapping of a view.
    unsafe extern "C" fn view_open(vma: *mut bindings::vm_area_struct) {
        // SAFETY: The copy has the pointer of the original, which keeps its reference.
        let original = unsafe { ArcBorrow::from_raw((*vma).vm_private_data.cast::<T::View>()) };
        let _ = Arc::into_raw(Arc::from(original));
    }

    /// # Safety
    ///
    /// Called by the memory management when a mapping of a view goes.
    unsafe extern "C" fn view_close(vma: *mut bindings::vm_area_struct) {
        // SAFETY: Each mapping has a reference, from `mmap` or `view_open`.
        drop(unsafe { Arc::from_raw((*vma).vm_private_data.cast::<T::View>()) });
    }

    /// # Safety
    ///
    /// Called by the memory management for a fault in a mapping of a view.
    unsafe extern "C" fn view_fault(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
        // SAFETY: The fault is in a mapping of a view, where `mmap` put a reference that lives as long.
        let (view, offset) = unsafe {
            let fault = &(*vmf).__bindgen_anon_1;
            (
                &*(*fault.vma).vm_private_data.cast::<T::View>(),
                fault.pgoff as u64,
            )
        };
        match view.page((offset - VIEWS) % VIEW_STRIDE) {
            Ok(page) => {
                // SAFETY: The fault is ours to answer; the reference goes with the page.
                unsafe { (*vmf).page = page.into_raw() };
                0
            }
            Err(error) => Self::failed(error),
        }
    }

    /// # Safety
    ///
    /// `vmf` is a fault in a mapping made by `mmap`.
    unsafe fn place<'a>(vmf: *mut bindings::vm_fault) -> (&'a T, u64) {
        // SAFETY: `mmap` was called for the mapping's file, so it is open, and stays so during the
        // fault.
        unsafe {
            let fault = &(*vmf).__bindgen_anon_1;
            (Self::memory((*fault.vma).vm_file), fault.pgoff as u64)
        }
    }

    fn failed(error: Error) -> bindings::vm_fault_t {
        if error == ENOMEM {
            bindings::vm_fault_reason_VM_FAULT_OOM
        } else {
            bindings::vm_fault_reason_VM_FAULT_SIGBUS
        }
    }

    /// # Safety
    ///
    /// Called by the VFS for an open file.
    unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
        // SAFETY: The file is open.
        match unsafe { Self::memory(file) }.ioctl(cmd, arg) {
            Ok(value) => value as c_long,
            Err(error) => error.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// Called by the VFS for an open file.
    unsafe extern "C" fn llseek(
        file: *mut bindings::file,
        offset: bindings::loff_t,
        whence: c_int,
    ) -> bindings::loff_t {
        // SAFETY: The file is open.
        unsafe {
            let size = Self::memory(file).pages() as i64 * PAGE_SIZE as i64;
            bindings::fixed_size_llseek(file, offset, whence, size)
        }
    }

    /// # Safety
    ///
    /// Called by the VFS for an open file, with a valid `position` and a user buffer.
    unsafe extern "C" fn read(
        file: *mut bindings::file,
        buffer: *mut kernel::ffi::c_char,
        len: usize,
        position: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The file is open, and the position this call's.
        let (memory, position) = unsafe { (Self::memory(file), &mut *position) };
        let mut user = UserSlice::new(UserPtr::from_ptr(buffer.cast()), len).writer();
        Self::each_page(memory, len, position, |index, at, n, bounce| {
            memory.page(index)?.read(bounce);
            user.write_slice(&bounce[at..at + n])
        })
    }

    /// # Safety
    ///
    /// Called by the VFS for an open file, with a valid `position` and a user buffer.
    unsafe extern "C" fn write(
        file: *mut bindings::file,
        buffer: *const kernel::ffi::c_char,
        len: usize,
        position: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The file is open, and the position this call's.
        let (memory, position) = unsafe { (Self::memory(file), &mut *position) };
        let mut user = UserSlice::new(UserPtr::from_ptr(buffer.cast_mut().cast()), len).reader();
        Self::each_page(memory, len, position, |index, at, n, bounce| {
            // The user's memory is read first: it may be a mapping of this very page.
            user.read_slice(&mut bounce[..n])?;
            let page = memory.page(index)?;
            loop {
                match memory.will_write(index, &page)? {
                    Write::Ready(lock) => {
                        lock.write(at, &bounce[..n]);
                        return Ok(());
                    }
                    Write::Wait(_) if is_signalled() => return Err(EINTR),
                    Write::Wait(turn) => memory.wait(turn),
                }
            }
        })
    }

    /// Cuts `len` bytes from `position` on at page boundaries and at the end of the memory, and
    /// calls `f` with each page's number, the offset and length in it, and a page to bounce.
    fn each_page(
        memory: &T,
        len: usize,
        position: &mut bindings::loff_t,
        mut f: impl FnMut(u64, usize, usize, &mut [u8; PAGE_SIZE]) -> Result,
    ) -> isize {
        let Ok(start) = u64::try_from(*position) else {
            return EINVAL.to_errno() as isize;
        };
        let room = (memory.pages() * PAGE_SIZE as u64).saturating_sub(start);
        let len = len
            .min(usize::try_from(room).unwrap_or(usize::MAX))
            .min(1 << 30);
        let Ok(mut bounce) = KBox::new([0; PAGE_SIZE], GFP_KERNEL) else {
            return ENOMEM.to_errno() as isize;
        };
        let mut done = 0;
        while done < len {
            let at = ((start + done as u64) % PAGE_SIZE as u64) as usize;
            let n = (PAGE_SIZE - at).min(len - done);
            match f((start + done as u64) / PAGE_SIZE as u64, at, n, &mut bounce) {
                Ok(()) => done += n,
                Err(error) if done == 0 => return error.to_errno() as isize,
                Err(_) => break,
            }
        }
        *position += done as i64;
        done as isize
    }
}

/// Room for a name below `/dev`, with its NUL.
const NAME_LEN: usize = 48;

/// What the kernel keeps pointers to while a device is registered.
///
/// # Invariants
///
/// `misc` is the first field, so that a pointer to it is one to the device.
#[repr(C)]
struct Device<T: Memory> {
    misc: Opaque<bindings::miscdevice>,
    name: [u8; NAME_LEN],
    node: [u8; NAME_LEN],
    memory: Arc<T>,
}

// SAFETY: `misc` is only used by the kernel, under its own lock; the rest is not changed.
unsafe impl<T: Memory> Send for Device<T> {}
// SAFETY: As above.
unsafe impl<T: Memory> Sync for Device<T> {}

/// A device that is registered; it is removed when this is dropped. Who has it open keeps the
/// memory.
///
/// # Invariants
///
/// `device.misc` is registered.
pub(crate) struct Registration<T: Memory> {
    device: KBox<Device<T>>,
}

impl<T: Memory> Registration<T> {
    /// Makes `memory` appear as `/dev/<directory>/<name>`, for root alone. Process context. Fails
    /// with `EINVAL` if the name is too long.
    pub(crate) fn new(
        directory: &[u8],
        name: &[u8],
        memory: Arc<T>,
        operations: &'static Operations<T>,
    ) -> Result<Self> {
        let join = |separator| {
            let mut text = [0; NAME_LEN];
            let len = directory.len() + 1 + name.len();
            if len >= NAME_LEN {
                return Err(EINVAL);
            }
            text[..directory.len()].copy_from_slice(directory);
            text[directory.len()] = separator;
            text[directory.len() + 1..len].copy_from_slice(name);
            Ok(text)
        };
        let device = KBox::new(
            Device {
                misc: Opaque::uninit(),
                name: join(b'-')?,
                node: join(b'/')?,
                memory,
            },
            GFP_KERNEL,
        )?;
        let misc = bindings::miscdevice {
            minor: bindings::MISC_DYNAMIC_MINOR as c_int,
            name: device.name.as_ptr().cast(),
            nodename: device.node.as_ptr().cast(),
            mode: 0o600,
            fops: &operations.0 .0,
            ..Plain::ZERO
        };
        // SAFETY: The slot is ours to write. The device is on the heap and stays there until `drop`
        // removes it.
        to_result(unsafe {
            device.misc.get().write(misc);
            bindings::misc_register(device.misc.get())
        })?;
        // INVARIANT: Just registered.
        Ok(Self { device })
    }
}

impl<T: Memory> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: Registered by the type invariant. Waits until no open is under way.
        unsafe { bindings::misc_deregister(self.device.misc.get()) };
    }
}
