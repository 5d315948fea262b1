// SPDX-License-Identifier: GPL-2.0

//! Pages that user space may map, each with a reference of its own.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use super::bindings;
use core::{
    mem::ManuallyDrop,
    ptr::NonNull, //
};
use kernel::{
    alloc::AllocError,
    ffi::c_void,
    page::PAGE_SIZE,
    types::ForeignOwnable, //
};

/// How many pages of memory this host has.
pub(crate) fn total() -> u64 {
    // SAFETY: Reads a counter.
    unsafe { bindings::remus_page_total() as u64 }
}

/// A reference to a page of memory.
///
/// # Invariants
///
/// Points to a `struct page` of order 0, and owns one reference to it.
pub(crate) struct Page(NonNull<bindings::page>);

// SAFETY: References to a page may be held and dropped by any thread.
unsafe impl Send for Page {}
// SAFETY: The content is only accessed as the methods say, whichever thread calls them.
unsafe impl Sync for Page {}

impl Page {
    /// Allocates a page of zeros, charged to the memory cgroup of the caller. May sleep.
    pub(crate) fn zeroed() -> Result<Self, AllocError> {
        Self::alloc(true)
    }

    fn alloc(zero: bool) -> Result<Self, AllocError> {
        // SAFETY: May be called by whoever may sleep.
        let page = unsafe { bindings::remus_page_alloc(zero) };
        // INVARIANT: A new page comes with one reference.
        NonNull::new(page).map(Self).ok_or(AllocError)
    }

    /// Another reference to the same page.
    pub(crate) fn share(&self) -> Self {
        // SAFETY: Valid by the type invariant.
        unsafe { bindings::remus_page_get(self.0.as_ptr()) };
        // INVARIANT: Owns the reference just taken.
        Self(self.0)
    }

    /// Gives the reference to C.
    pub(super) fn into_raw(self) -> *mut bindings::page {
        ManuallyDrop::new(self).0.as_ptr()
    }

    /// The page's frame number.
    pub(super) fn pfn(&self) -> usize {
        // SAFETY: Valid by the type invariant.
        unsafe { bindings::remus_page_pfn(self.0.as_ptr()) }
    }

    /// Locks the page: until the lock is dropped, no write fault on it completes. May sleep.
    pub(crate) fn lock(&self) -> PageLock<'_> {
        // SAFETY: Valid by the type invariant.
        unsafe { bindings::remus_page_lock(self.0.as_ptr()) };
        // INVARIANT: Just locked.
        PageLock(self)
    }

    /// Copies the whole content out. It is torn if somebody writes meanwhile.
    pub(crate) fn read(&self, to: &mut [u8; PAGE_SIZE]) {
        // SAFETY: Valid by the type invariant; both are a page long.
        unsafe { bindings::remus_page_read(self.0.as_ptr(), 0, to.as_mut_ptr().cast(), PAGE_SIZE) };
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: Owns a reference by the type invariant.
        unsafe { bindings::remus_page_put(self.0.as_ptr()) };
    }
}

// SAFETY: The pointer is that of a `struct page`, which is not null, aligned to its size class, and
// stays valid while the reference that comes with it is not dropped.
unsafe impl ForeignOwnable for Page {
    const FOREIGN_ALIGN: usize = core::mem::align_of::<bindings::page>();
    type Borrowed<'a> = PageRef<'a>;
    type BorrowedMut<'a> = PageRef<'a>;

    fn into_foreign(self) -> *mut c_void {
        self.into_raw().cast()
    }

    unsafe fn from_foreign(ptr: *mut c_void) -> Self {
        // INVARIANT: `into_foreign` gave the reference away, which is taken back.
        // SAFETY: The pointer came from `into_foreign`, where it was not null.
        Self(unsafe { NonNull::new_unchecked(ptr.cast()) })
    }

    unsafe fn borrow<'a>(ptr: *mut c_void) -> PageRef<'a> {
        // SAFETY: As in `from_foreign`; the reference stays with the foreign owner.
        PageRef(
            ManuallyDrop::new(unsafe { Self::from_foreign(ptr) }),
            core::marker::PhantomData,
        )
    }

    unsafe fn borrow_mut<'a>(ptr: *mut c_void) -> PageRef<'a> {
        // SAFETY: By the safety requirements, which are stricter.
        unsafe { Self::borrow(ptr) }
    }
}

/// A page that somebody else holds a reference to, for `'a`.
pub(crate) struct PageRef<'a>(ManuallyDrop<Page>, core::marker::PhantomData<&'a Page>);

impl core::ops::Deref for PageRef<'_> {
    type Target = Page;

    fn deref(&self) -> &Page {
        &self.0
    }
}

/// A locked page.
///
/// # Invariants
///
/// The caller holds the page's lock.
pub(crate) struct PageLock<'a>(&'a Page);

impl<'a> PageLock<'a> {
    /// The page.
    pub(super) fn page(&self) -> &'a Page {
        self.0
    }

    /// A new page with the same content. May sleep.
    pub(crate) fn copy(&self) -> Result<Page, AllocError> {
        let copy = Page::alloc(false)?;
        // SAFETY: Both are valid by the type invariant.
        unsafe { bindings::remus_page_copy(copy.0.as_ptr(), self.0 .0.as_ptr()) };
        Ok(copy)
    }

    /// Writes into the page.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        let len = from.len().min(PAGE_SIZE.saturating_sub(offset));
        // SAFETY: Valid by the type invariant, and within the page.
        unsafe {
            bindings::remus_page_write(self.0 .0.as_ptr(), offset, from.as_ptr().cast(), len)
        };
    }

    /// Whether somebody may hold the page for direct access (a pin of `pin_user_pages()`), and so
    /// may write it without a fault.
    pub(crate) fn maybe_pinned(&self) -> bool {
        // SAFETY: Valid by the type invariant.
        unsafe { bindings::remus_page_maybe_pinned(self.0 .0.as_ptr()) }
    }

    /// Leaves the page locked: whoever takes over unlocks it.
    pub(super) fn keep(self) {
        core::mem::forget(self);
    }
}

impl Drop for PageLock<'_> {
    fn drop(&mut self) {
        // SAFETY: Locked by the type invariant.
        unsafe { bindings::remus_page_unlock(self.0 .0.as_ptr()) };
    }
}
