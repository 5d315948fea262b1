// SPDX-License-Identifier: GPL-2.0

//! Pages that user space may map, each with a reference of its own.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use super::{
    bindings,
    memcg::Memcg, //
};
use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ptr::NonNull,
    sync::atomic::AtomicU64, //
};
use kernel::{
    alloc::{
        flags::GFP_KERNEL_ACCOUNT,
        AllocError, //
    },
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
        // SAFETY: May be called by whoever may sleep.
        let page = unsafe { bindings::remus_page_alloc(0) };
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

    /// Locks the page: until the lock is dropped, no write fault on it completes. May sleep.
    pub(crate) fn lock(&self) -> PageLock<'_> {
        // SAFETY: Valid by the type invariant.
        unsafe { bindings::remus_page_lock(self.0.as_ptr()) };
        // INVARIANT: Just locked.
        PageLock(self)
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

/// Pages that belong together, up to [`BLOCK`] of them. Whoever looks for one finds the block first, so what
/// it takes to find pages is a sixteenth of what it would be for each on its own.
///
/// # Invariants
///
/// Without [`TABLE`] it points to the first of [`BLOCK`] neighbouring `struct page`s of order 0, and owns a
/// reference to each. With it, it is what `KBox::into_foreign` returned for a [`Table`].
pub(crate) struct Block(NonNull<c_void>);

/// Pages in a block, at most.
pub(crate) const BLOCK: usize = 1 << ORDER;
const ORDER: u32 = 4;

/// Pages of a block that are anywhere in physical memory, or fewer than [`BLOCK`].
type Table = [Option<Page>; BLOCK];
/// The bit by which a [`Table`] is told from a `struct page`: both are aligned to more.
const TABLE: usize = 4;
const _: () = assert!(align_of::<bindings::page>() > TABLE && align_of::<Table>() > TABLE);

// SAFETY: Pages may be held and dropped by any thread.
unsafe impl Send for Block {}
// SAFETY: A block is not changed, and its pages may be used by any thread.
unsafe impl Sync for Block {}

impl Block {
    /// Allocates the first `count` pages of a block, at most [`BLOCK`], with whatever was in them, charged to a
    /// memory cgroup; what it takes to keep them is charged to `payer`. A whole block's are neighbours in
    /// physical memory if the host has such. May sleep.
    pub(crate) fn alloc(count: usize, payer: &Memcg) -> Result<Self, AllocError> {
        if count == BLOCK {
            // SAFETY: May be called by whoever may sleep.
            let first = unsafe { bindings::remus_page_alloc(ORDER) };
            if let Some(first) = NonNull::new(first) {
                // INVARIANT: New pages come with a reference each, and those of one allocation are neighbours.
                return Ok(Self(first.cast()));
            }
        }
        let mut table: KBox<Table> = {
            let _charge = payer.charge();
            KBox::new([const { None }; BLOCK], GFP_KERNEL_ACCOUNT)?
        };
        for slot in table.iter_mut().take(count) {
            *slot = Some(Page::alloc()?);
        }
        let table = table.into_foreign();
        // INVARIANT: As documented. The pointer of a box is not null, nor is it with one bit more.
        NonNull::new(table.map_addr(|addr| addr | TABLE))
            .map(Self)
            .ok_or(AllocError)
    }

    /// The table, if it is one.
    fn table(&self) -> Option<*mut c_void> {
        let addr = self.0.as_ptr();
        (addr.addr() & TABLE != 0).then(|| addr.map_addr(|addr| addr & !TABLE))
    }

    /// The page with number `n` in the block, if it has so many. The reference stays the block's.
    fn page(&self, n: usize) -> Option<ManuallyDrop<Page>> {
        let page = match self.table() {
            // SAFETY: By the type invariant, and the block, which owns it, is borrowed.
            Some(table) => unsafe { <KBox<Table>>::borrow(table) }.get(n)?.as_ref()?.0,
            None if n < BLOCK => {
                // SAFETY: By the type invariant there are so many, one after the other.
                unsafe { self.0.cast::<bindings::page>().add(n) }
            }
            None => return None,
        };
        // INVARIANT: The block owns a reference, which is not dropped with this.
        Some(ManuallyDrop::new(Page(page)))
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(table) = self.table() {
            // SAFETY: By the type invariant, and nobody uses the block any more.
            drop(unsafe { <KBox<Table>>::from_foreign(table) });
            return;
        }
        for n in 0..BLOCK {
            if let Some(page) = self.page(n) {
                drop(ManuallyDrop::into_inner(page));
            }
        }
    }
}

// SAFETY: The pointer is one to a `struct page` or to a box, neither of which is null, and both are aligned
// to more than the bit that may be added. It stays valid until the block is dropped.
unsafe impl ForeignOwnable for Block {
    const FOREIGN_ALIGN: usize = TABLE;
    type Borrowed<'a> = BlockRef<'a>;
    type BorrowedMut<'a> = BlockRef<'a>;

    fn into_foreign(self) -> *mut c_void {
        ManuallyDrop::new(self).0.as_ptr()
    }

    unsafe fn from_foreign(ptr: *mut c_void) -> Self {
        // INVARIANT: `into_foreign` gave the block away, which is taken back.
        // SAFETY: The pointer came from `into_foreign`, where it was not null.
        Self(unsafe { NonNull::new_unchecked(ptr) })
    }

    unsafe fn borrow<'a>(ptr: *mut c_void) -> BlockRef<'a> {
        // SAFETY: As in `from_foreign`; the block stays with the foreign owner.
        BlockRef(
            ManuallyDrop::new(unsafe { Self::from_foreign(ptr) }),
            PhantomData,
        )
    }

    unsafe fn borrow_mut<'a>(ptr: *mut c_void) -> BlockRef<'a> {
        // SAFETY: By the safety requirements, which are stricter.
        unsafe { Self::borrow(ptr) }
    }
}

/// A block that somebody else owns, for `'a`.
pub(crate) struct BlockRef<'a>(ManuallyDrop<Block>, PhantomData<&'a Block>);

impl<'a> BlockRef<'a> {
    /// The page with number `n` in the block, if it has so many.
    pub(crate) fn page(&self, n: usize) -> Option<PageRef<'a>> {
        self.0.page(n).map(|page| PageRef(page, PhantomData))
    }

    /// Pages of the block from number `n` on, at most `most`, as many as are known to be neighbours in physical
    /// memory: at least one, unless it has not so many.
    pub(crate) fn neighbours(&self, n: usize, most: usize) -> Option<Neighbours<'a>> {
        let first = self.page(n)?.0 .0;
        let there = match self.0.table() {
            Some(_) => 1,
            None => BLOCK - n,
        };
        // INVARIANT: A block without a table has them all, `n` of which come before the first.
        Some(Neighbours {
            first,
            // SAFETY: The block, which stays where it is for `'a`, has a reference to the page.
            pfn: unsafe { bindings::remus_page_pfn(first.as_ptr()) },
            count: there.min(most),
            _block: PhantomData,
        })
    }
}

/// Neighbours in physical memory that somebody else holds references to, for `'a`.
///
/// # Invariants
///
/// `first` points to the first of `count` neighbouring `struct page`s of order 0, and the references are held.
pub(crate) struct Neighbours<'a> {
    first: NonNull<bindings::page>,
    /// The first one's frame number.
    pub(crate) pfn: usize,
    count: usize,
    _block: PhantomData<&'a Block>,
}

impl<'a> Neighbours<'a> {
    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Waits until each of them was seen without anybody having it locked. May sleep.
    pub(crate) fn wait_unlocked(&self) {
        // SAFETY: So many are valid by the type invariant.
        unsafe { bindings::remus_pages_wait_unlocked(self.first.as_ptr(), self.count) };
    }

    /// The first one from number `from` on, and its number, to which anybody but its owner and the page tables may have a
    /// reference, and so may write it without a fault: whoever pinned it (`pin_user_pages()`), or got it
    /// (`get_user_pages()`, as `/proc/PID/mem` does). That of [`Page::share`] counts, too. Locks the pages, one
    /// at a time. May sleep.
    pub(crate) fn next_held(&self, from: usize) -> Option<(usize, PageRef<'a>)> {
        // SAFETY: So many are valid by the type invariant.
        let n = unsafe { bindings::remus_pages_next_held(self.first.as_ptr(), from, self.count) };
        if n >= self.count {
            return None;
        }
        // SAFETY: By the type invariant there are so many, one after the other.
        let page = Page(unsafe { self.first.add(n) });
        // INVARIANT: A reference is held for `'a`, and not dropped with this.
        Some((n, PageRef(ManuallyDrop::new(page), PhantomData)))
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
            PhantomData,
        )
    }

    unsafe fn borrow_mut<'a>(ptr: *mut c_void) -> PageRef<'a> {
        // SAFETY: By the safety requirements, which are stricter.
        unsafe { Self::borrow(ptr) }
    }
}

/// A page that somebody else holds a reference to, for `'a`.
pub(crate) struct PageRef<'a>(ManuallyDrop<Page>, PhantomData<&'a Page>);

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
