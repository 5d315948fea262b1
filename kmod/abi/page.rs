// SPDX-License-Identifier: GPL-2.0

//! Pages that user space may map, each with a reference of its own.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use super::bindings;
use core::{
    mem::ManuallyDrop,
    ptr::NonNull,
    sync::atomic::AtomicU64, //
};
use kernel::{
    alloc::AllocError,
    error::to_result,
    ffi::c_void,
    page::PAGE_SIZE,
    prelude::*,
    types::ForeignOwnable, //
};

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
    /// Allocates a page with whatever was in it, charged to a memory cgroup. May sleep.
    pub(crate) fn alloc() -> Result<Self, AllocError> {
        Block::alloc(0)?.next().ok_or(AllocError)
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
    pub(crate) fn pfn(&self) -> usize {
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

    /// Waits until nobody has the page locked any more. May sleep.
    pub(crate) fn wait_unlocked(&self) {
        // SAFETY: Valid by the type invariant.
        unsafe { bindings::remus_page_wait_unlocked(self.0.as_ptr()) };
    }

    /// Whether anybody but its owner and the page tables may have a reference to the page, and so may
    /// write it without a fault: whoever pinned it (`pin_user_pages()`), or got it (`get_user_pages()`,
    /// as `/proc/PID/mem` does). That of [`Page::share`] counts, too. Locks the page. May sleep.
    pub(crate) fn maybe_held(&self) -> bool {
        // SAFETY: Valid by the type invariant.
        unsafe { bindings::remus_page_maybe_held(self.0.as_ptr()) }
    }

    /// Copies the whole content to user space. It is torn if somebody writes meanwhile. May sleep.
    pub(crate) fn read_to_user(&self, to: UserPtr) -> Result {
        // SAFETY: Valid by the type invariant; any address will do.
        to_result(unsafe {
            bindings::remus_page_read_to_user(self.0.as_ptr(), to.as_const_ptr().cast_mut().cast())
        })
    }

    /// Copies the whole content out. It is torn if somebody writes meanwhile.
    pub(crate) fn read(&self, to: &mut [u8; PAGE_SIZE]) {
        // SAFETY: Valid by the type invariant; both are a page long.
        unsafe { bindings::remus_page_read(self.0.as_ptr(), 0, to.as_mut_ptr().cast(), PAGE_SIZE) };
    }
}

/// Pages that were allocated together, neighbours in physical memory: an iterator over them.
///
/// # Invariants
///
/// Owns a reference to each of the `left` pages, of order 0, that begin at `next`.
pub(crate) struct Block {
    next: *mut bindings::page,
    left: usize,
}

impl Block {
    /// 2 to the power of `order` pages, with whatever was in them, charged to a memory cgroup. More than
    /// one are not worth much trouble: it may fail although there is memory. May sleep.
    pub(crate) fn alloc(order: u32) -> Result<Self, AllocError> {
        // SAFETY: May be called by whoever may sleep.
        let next = unsafe { bindings::remus_page_alloc(order) };
        if next.is_null() {
            return Err(AllocError);
        }
        // INVARIANT: New pages come with a reference each.
        Ok(Self {
            next,
            left: 1 << order,
        })
    }
}

impl Iterator for Block {
    type Item = Page;

    fn next(&mut self) -> Option<Page> {
        self.left = self.left.checked_sub(1)?;
        let page = NonNull::new(self.next)?;
        // SAFETY: `struct page`s of one allocation are neighbours, too. Past the last one nothing is left.
        self.next = unsafe { self.next.add(1) };
        // INVARIANT: The reference goes along.
        Some(Page(page))
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

/// A page of 64-bit words that user space may look at.
///
/// # Invariants
///
/// `words` is the kernel address of `page`, and the page is written through this alone.
pub(crate) struct Words {
    page: Page,
    words: NonNull<[AtomicU64; PAGE_SIZE / 8]>,
}

// SAFETY: The words go with the page, whoever owns it.
unsafe impl Send for Words {}
// SAFETY: They are atomic.
unsafe impl Sync for Words {}

impl Words {
    /// A page with whatever was in it, charged to a memory cgroup. May sleep.
    pub(crate) fn new() -> Result<Self, AllocError> {
        // SAFETY: May be called by whoever may sleep.
        let page = unsafe { bindings::remus_page_alloc_low() };
        let page = NonNull::new(page).map(Page).ok_or(AllocError)?;
        // SAFETY: The page is valid, and was asked for with an address.
        let words = unsafe { bindings::remus_page_address(page.0.as_ptr()) };
        // INVARIANT: A new page comes with one reference, and this one with an address.
        let words = NonNull::new(words.cast()).ok_or(AllocError)?;
        Ok(Self { page, words })
    }

    /// The page.
    pub(crate) fn page(&self) -> &Page {
        &self.page
    }
}

impl core::ops::Deref for Words {
    type Target = [AtomicU64; PAGE_SIZE / 8];

    fn deref(&self) -> &Self::Target {
        // SAFETY: By the type invariant a page of memory is there, aligned, and any bits make a number.
        // Whoever maps it only reads.
        unsafe { self.words.as_ref() }
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

impl PageLock<'_> {
    /// A new page with the same content. May sleep.
    pub(crate) fn copy(&self) -> Result<Page, AllocError> {
        let copy = Page::alloc()?;
        // SAFETY: Both are valid by the type invariant.
        unsafe { bindings::remus_page_copy(copy.0.as_ptr(), self.0 .0.as_ptr()) };
        Ok(copy)
    }

    /// Whether the page has the same content as another, which nobody writes.
    pub(crate) fn equals(&self, other: &Page) -> bool {
        // SAFETY: Both are valid by the type invariant.
        unsafe { bindings::remus_page_equal(self.0 .0.as_ptr(), other.0.as_ptr()) }
    }

    /// Writes into the page.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        let len = from.len().min(PAGE_SIZE.saturating_sub(offset));
        // SAFETY: Valid by the type invariant, and within the page.
        unsafe {
            bindings::remus_page_write(self.0 .0.as_ptr(), offset, from.as_ptr().cast(), len)
        };
    }

    /// Fills the page with zeros.
    pub(crate) fn clear(&self) {
        // SAFETY: Valid by the type invariant.
        unsafe { bindings::remus_page_clear(self.0 .0.as_ptr()) };
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
