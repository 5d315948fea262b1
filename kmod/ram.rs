// SPDX-License-Identifier: GPL-2.0

//! A domain's memory: which pages were written in which epoch, and what a sealed epoch saw.
//!
//! The pages belong to this module and are made on first touch. A page that was not written since
//! the last seal is write-protected wherever it is mapped, so its first write faults:
//! [`Memory::will_write`] then puts it into the open epoch's set, after copying it if a sealed
//! epoch's content would be lost. Every way to write ends there: a vCPU, the VMM, vhost, any process
//! that maps the device, direct I/O (which faults the page in for writing), `pwrite`.
//!
//! Lock order: `mmap_lock`, `Ram::state`, page lock, `i_mmap_rwsem`, page table lock. The page lock
//! is held from `will_write` until the page is writable in the faulting page table, and by `seal`
//! while it write-protects the page, so a seal sees each write on one side or the other. `state` is
//! held by a seal from beginning to end: no write-protected page becomes writable meanwhile, and what
//! is still writable is still in the sealed epoch. So the snapshot is one instant's, the seal's end,
//! even if something that was not paused writes during it.

use crate::{
    abi::{
        page::{
            Page,
            PageLock, //
        },
        ramdev::{
            Mapping,
            Memory,
            Operations,
            Registration, //
        },
    },
    core::{
        dirty::{
            self,
            Dirty, //
        },
        uapi::ram as uapi, //
    },
    refusal::{
        refusal,
        Refusal, //
    },
    THIS_MODULE,
};
use kernel::{
    alloc::AllocError,
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    },
    uaccess::UserSlice,
    xarray::{
        AllocKind,
        XArray, //
    },
};

static OPERATIONS: Operations<Ram> = Operations::new(&THIS_MODULE);

type PageSet = Dirty<KVVec<u64>>;

/// A sealed epoch.
struct Sealed {
    epoch: u64,
    dirty: PageSet,
    /// Content at the seal of pages in `dirty` that were written again since.
    copies: Pin<KBox<XArray<Page>>>,
    copied: u64,
}

struct State {
    /// Pages that exist.
    resident: PageSet,
    /// Pages written in the open epoch.
    dirty: PageSet,
    /// Oldest first.
    sealed: KVec<Sealed>,
}

impl State {
    /// The sealed epoch with this number.
    fn sealed(&self, epoch: u64) -> Result<&Sealed> {
        self.sealed.iter().find(|s| s.epoch == epoch).ok_or(ENOENT)
    }
}

/// Counters of a domain's memory, in pages.
pub(crate) struct Counts {
    /// Written in the open epoch.
    pub(crate) dirty: u64,
    /// Existing.
    pub(crate) resident: u64,
    /// Copies kept for sealed epochs.
    pub(crate) snapshot: u64,
}

/// A domain's memory.
#[pin_data]
pub(crate) struct Ram {
    size: u64,
    mapping: Mapping,
    users: Atomic<i64>,
    #[pin]
    pages: XArray<Page>,
    #[pin]
    state: Mutex<State>,
}

impl Ram {
    /// Memory of `size` bytes, a multiple of the page size.
    pub(crate) fn new(size: u64) -> Result<Arc<Self>, Refusal> {
        let pages = size / PAGE_SIZE as u64;
        let state = State {
            resident: page_set(pages)?,
            dirty: page_set(pages)?,
            sealed: KVec::new(),
        };
        let mapping = Mapping::new(c"[remus]")?;
        Ok(Arc::pin_init(
            pin_init!(Self {
                size,
                mapping,
                users: Atomic::new(0),
                pages <- XArray::new(AllocKind::Alloc),
                state <- new_mutex!(state, "remus_ram"),
            }),
            GFP_KERNEL,
        )?)
    }

    /// Makes the memory appear as `/dev/remus/<name>`.
    pub(crate) fn register(self: &Arc<Self>, name: &[u8]) -> Result<Registration<Self>> {
        Registration::new(b"remus", name, self.clone(), &OPERATIONS)
    }

    /// Size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// How many times the device is open.
    pub(crate) fn users(&self) -> i64 {
        self.users.load(Relaxed)
    }

    /// Counters now.
    pub(crate) fn counts(&self) -> Counts {
        let state = self.state.lock();
        Counts {
            dirty: state.dirty.count(),
            resident: state.resident.count(),
            snapshot: state.sealed.iter().map(|s| s.copied).sum(),
        }
    }

    /// Seals the open epoch as `epoch`; with `full`, as if every existing page had been written in
    /// it, which is refused while older epochs wait (their content would be missed). Returns the
    /// number of pages in it. After an error the open epoch is as before.
    pub(crate) fn seal(&self, epoch: u64, full: bool) -> Result<u64, Refusal> {
        let new = page_set(self.pages())?;
        let copies = KBox::pin_init(XArray::new(AllocKind::Alloc), GFP_KERNEL)?;
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if full && !state.sealed.is_empty() {
            return Err(refusal!(
                EBUSY,
                "a full seal needs all sealed epochs committed or aborted first"
            ));
        }
        state.sealed.reserve(1, GFP_KERNEL)?;
        let mut sealed = Sealed {
            epoch,
            dirty: core::mem::replace(&mut state.dirty, new),
            copies,
            copied: 0,
        };
        if let Err(error) = self.protect(&mut sealed, &mut state.dirty) {
            // What is write-protected already is written into this set again when it faults.
            state.dirty.merge(&sealed.dirty);
            return Err(error);
        }
        if full {
            sealed.dirty.merge(&state.resident);
        }
        let count = sealed.dirty.count();
        // Cannot fail: there is room.
        let _ = state.sealed.push_within_capacity(sealed);
        Ok(count)
    }

    /// Write-protects the pages of `sealed`. A page that may be written without a fault, because
    /// somebody holds it for direct access, is copied now and belongs to `open` as well.
    fn protect(&self, sealed: &mut Sealed, open: &mut PageSet) -> Result<(), Refusal> {
        let mut from = 0;
        while let Some(index) = sealed.dirty.next(from) {
            from = index + 1;
            let Some(page) = self.resident_page(index) else {
                continue;
            };
            let lock = page.lock();
            self.mapping.write_protect(index, &lock)?;
            if lock.maybe_pinned() {
                sealed.keep(index, &lock)?;
                open.insert(index);
            }
        }
        Ok(())
    }

    /// Forgets every sealed epoch up to `epoch`.
    pub(crate) fn commit(&self, epoch: u64) {
        loop {
            // One at a time, and freed without the lock: faults go on meanwhile.
            let gone = {
                let mut state = self.state.lock();
                match state.sealed.first() {
                    Some(first) if first.epoch <= epoch => state.sealed.remove(0).ok(),
                    _ => None,
                }
            };
            if gone.is_none() {
                return;
            }
        }
    }

    /// Folds the sealed epochs from `epoch` on into the open one. Returns the number of pages that
    /// were in them.
    pub(crate) fn abort(&self, epoch: u64) -> u64 {
        let mut pages = 0;
        loop {
            let gone = {
                let mut guard = self.state.lock();
                let state = &mut *guard;
                match state.sealed.last() {
                    Some(last) if last.epoch >= epoch => {}
                    _ => return pages,
                }
                let gone = state.sealed.pop();
                if let Some(gone) = &gone {
                    pages += gone.dirty.count();
                    state.dirty.merge(&gone.dirty);
                }
                gone
            };
            drop(gone);
        }
    }

    /// The page with this number, if it exists.
    fn resident_page(&self, index: u64) -> Option<Page> {
        self.pages
            .lock()
            .get(index as usize)
            .map(|page| page.share())
    }

    /// Finds the next page of a sealed epoch, from `cursor` on, and its content at the seal.
    fn snapshot(
        &self,
        epoch: u64,
        cursor: u64,
        content: &mut [u8; PAGE_SIZE],
    ) -> Result<Option<u64>> {
        let state = self.state.lock();
        let sealed = state.sealed(epoch)?;
        let Some(index) = sealed.dirty.next(cursor) else {
            return Ok(None);
        };
        let copy = sealed
            .copies
            .lock()
            .get(index as usize)
            .map(|page| page.share());
        match copy.or_else(|| self.resident_page(index)) {
            // Without a copy it was not written since, and cannot be while `state` is held.
            Some(page) => page.read(content),
            None => content.fill(0),
        }
        Ok(Some(index))
    }

    /// [`uapi::READ`].
    fn read_sealed(&self, argument: usize) -> Result<isize> {
        const FIELDS: usize = 4;
        let user = UserSlice::new(
            UserPtr::from_addr(argument),
            core::mem::size_of::<uapi::Read>(),
        );
        let (mut input, mut output) = user.reader_writer();
        let mut fields = [0u64; FIELDS];
        for field in &mut fields {
            *field = input.read::<u64>()?;
        }
        // The last two fields are 32 bits each.
        let [epoch, mut cursor, buffer, length_and_count] = fields;
        let room = (length_and_count as u32) as usize / uapi::RECORD_SIZE;
        if room == 0 {
            return Err(EINVAL);
        }
        let mut user = UserSlice::new(
            UserPtr::from_addr(usize::try_from(buffer)?),
            room * uapi::RECORD_SIZE,
        )
        .writer();
        let mut content = KBox::new([0; PAGE_SIZE], GFP_KERNEL)?;
        let mut count = 0u64;
        while count < room as u64 {
            let Some(index) = self.snapshot(epoch, cursor, &mut content)? else {
                cursor = uapi::END;
                break;
            };
            user.write_slice(&index.to_le_bytes())?;
            user.write_slice(&content[..])?;
            count += 1;
            cursor = index + 1;
        }
        if count == room as u64 {
            // So that the caller need not ask again in vain.
            let state = self.state.lock();
            let sealed = state.sealed(epoch)?;
            if sealed.dirty.next(cursor).is_none() {
                cursor = uapi::END;
            }
        }
        let length = length_and_count & u64::from(u32::MAX);
        for field in [epoch, cursor, buffer, length | count << 32] {
            output.write(&field)?;
        }
        Ok(0)
    }
}

impl Sealed {
    /// Keeps the content of a page, unless that was done before.
    fn keep(&mut self, index: u64, page: &PageLock<'_>) -> Result<(), AllocError> {
        if self.copies.lock().get(index as usize).is_some() {
            return Ok(());
        }
        let copy = page.copy()?;
        self.copies
            .lock()
            .store(index as usize, copy, GFP_KERNEL)
            .map_err(|_| AllocError)?;
        self.copied += 1;
        Ok(())
    }
}

impl Memory for Ram {
    fn pages(&self) -> u64 {
        self.size / PAGE_SIZE as u64
    }

    fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    fn page(&self, index: u64) -> Result<Page> {
        if let Some(page) = self.resident_page(index) {
            return Ok(page);
        }
        let new = Page::zeroed()?;
        let mut state = self.state.lock();
        // Somebody else may have made it meanwhile.
        if let Some(page) = self.resident_page(index) {
            return Ok(page);
        }
        self.pages
            .lock()
            .store(index as usize, new.share(), GFP_KERNEL)
            .map_err(|e| e.error)?;
        state.resident.insert(index);
        Ok(new)
    }

    fn will_write<'a>(&self, index: u64, page: &'a Page) -> Result<PageLock<'a>> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let lock = page.lock();
        // The content until now is that of the newest sealed epoch that the page is in; if that has
        // a copy already, the page was written since. Older epochs got their copy when it was.
        if let Some(sealed) = state
            .sealed
            .iter_mut()
            .rev()
            .find(|s| s.dirty.contains(index))
        {
            sealed.keep(index, &lock)?;
        }
        state.dirty.insert(index);
        Ok(lock)
    }

    fn ioctl(&self, command: u32, argument: usize) -> Result<isize> {
        match command {
            uapi::READ => self.read_sealed(argument),
            _ => Err(ENOTTY),
        }
    }

    fn opened(&self) {
        self.users.fetch_add(1, Relaxed);
    }

    fn closed(&self) {
        self.users.fetch_sub(1, Relaxed);
    }
}

fn page_set(pages: u64) -> Result<PageSet, AllocError> {
    let words = usize::try_from(dirty::words(pages)).map_err(|_| AllocError)?;
    // A size that cannot be had is the caller's mistake, not worth a warning in the log.
    Ok(Dirty::new(
        KVVec::from_elem(0, words, GFP_KERNEL | __GFP_NOWARN)?,
        pages,
    ))
}
