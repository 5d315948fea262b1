// SPDX-License-Identifier: GPL-2.0

//! A domain's memory: which pages were written in which epoch, and what a sealed epoch saw.
//!
//! The pages belong to this module and are made on first touch. A page that was not written since
//! the last seal is write-protected wherever it is mapped, or not mapped, so its first write faults:
//! [`Memory::will_write`] then puts it into the open epoch's set, after copying it if a sealed
//! epoch's content would be lost. Every way to write ends there: a vCPU, the VMM, vhost, any process
//! that maps the device, direct I/O (which faults the page in for writing), `pwrite`.
//!
//! Lock order: `mmap_lock`, [`Ram::state`], page lock, `i_mmap_rwsem`, page table lock; [`Ram::room`]
//! and [`Ram::adding`] have none inside.
//!
//! Faults and readers share `state`; a seal, a commit and an abort have it alone. The page lock is held
//! from `will_write` until the page is writable in the faulting page table. So once a seal has `state`
//! and has seen a page unlocked, every write to it is on one side or the other: it finds the page
//! writable, or the writer waits for `state`. No such page becomes writable meanwhile, and
//! what is still writable is still in the sealed epoch. So the snapshot is one instant's, the seal's
//! end, even if something that was not paused writes during it. Hot pages, which a domain has only if it is told to, are
//! the exception: [`hot`].

mod hot;
mod protect;

use self::{
    hot::Hot,
    protect::Run, //
};
use crate::{
    abi::{
        array::Array,
        cancelled,
        cond_resched,
        is_signalled,
        memcg::Memcg,
        page::{
            Block,
            BlockRef,
            Neighbours,
            Page,
            PageRef,
            BLOCK, //
        },
        ramdev::{
            view_offset,
            Mapping,
            Memory,
            Operations,
            Registration,
            View,
            Write, //
        },
        rwsem::RwSem,
        stale,
        workqueue, //
    },
    core::{
        cost::Cost,
        dirty,
        uapi::ram as uapi, //
    },
    domain,
    pageset::PageSet,
    refusal::{
        refusal,
        Refusal, //
    },
    THIS_MODULE,
};
use kernel::{
    alloc::flags::GFP_KERNEL_ACCOUNT,
    impl_has_work,
    new_condvar,
    new_mutex,
    new_work,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        CondVar,
        CondVarTimeoutResult,
        Mutex, //
    },
    time::{
        delay::fsleep,
        msecs_to_jiffies,
        Delta, //
    },
    transmute::{
        AsBytes,
        FromBytes, //
    },
    uaccess::UserSlice,
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

static OPERATIONS: Operations<Ram> = Operations::new(&THIS_MODULE);

/// How long a writer waits for room before it faults again, so that it can be killed: so many glances,
/// this far apart.
const PATIENCE: u32 = 100;
const GLANCE_MS: u32 = 10;

/// Which pages an epoch has written, and what its hand-off mapping shows.
pub(crate) struct Bitmap {
    set: PageSet,
    /// What it takes to have a bit for every page of the memory, in pages.
    pages: u64,
    /// Where nothing was written.
    empty: Page,
}

impl View for Bitmap {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn page(&self, index: u64) -> Result<Page> {
        let words = self.set.words(index);
        Ok(words.map_or_else(|| self.empty.share(), |words| words.page().share()))
    }
}

/// A sealed epoch.
pub(crate) struct Sealed {
    epoch: u64,
    dirty: Arc<Bitmap>,
    /// Content at the seal of pages in `dirty` that were written again since.
    copies: Pin<KBox<Array<Page>>>,
    copied: Atomic<u64>,
    /// Pages that were read out: their content is not needed any more.
    read: PageSet,
    /// Whether a page was written again before it was read, with no room for a copy.
    lost: Atomic<bool>,
}

struct State {
    /// Pages written in the open epoch. It has room for those of every sealed one.
    open: Arc<Bitmap>,
    /// Oldest first.
    sealed: KVec<Arc<Sealed>>,
    /// What it costs to write-protect this memory's pages.
    cost: Cost,
    hot: Hot,
}

impl State {
    /// The sealed epoch with this number.
    fn sealed(&self, epoch: u64) -> Result<&Arc<Sealed>> {
        self.sealed.iter().find(|s| s.epoch == epoch).ok_or(ENOENT)
    }

    /// Whether a page may have been written after the seal of `epoch`.
    fn written_since(&self, epoch: u64, page: u64) -> bool {
        let mut later = self.sealed.iter().rev().take_while(|s| s.epoch > epoch);
        self.open.set.contains(page) || later.any(|s| s.dirty.set.contains(page))
    }
}

/// What to do when there is no room for another copy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum CowPolicy {
    /// Who writes waits until the page was read out, or its epoch is committed or aborted.
    Throttle,
    /// The epoch is aborted.
    Fail,
}

/// Counters of a domain's memory, in pages unless they say otherwise.
pub(crate) struct Counts {
    /// Written in the open epoch.
    pub(crate) dirty: u64,
    /// Existing.
    pub(crate) resident: u64,
    /// Copies kept for sealed epochs, now, at most so far, and all that were ever made.
    pub(crate) copies: u64,
    pub(crate) copies_peak: u64,
    pub(crate) copies_made: u64,
    /// How often somebody waited for room for a copy, in times.
    pub(crate) waits: u64,
    /// Copies that may be kept, 0 for any number, and what happens beyond.
    pub(crate) limit: u64,
    pub(crate) policy: CowPolicy,
    /// Hot, and how many may be.
    pub(crate) hot: u64,
    pub(crate) hot_limit: u64,
}

/// A domain's memory.
#[pin_data]
pub(crate) struct Ram {
    size: u64,
    mapping: Mapping,
    users: Atomic<i64>,
    /// Who made the domain pays for what is kept about its memory; who touches a page, for the page.
    payer: Memcg,
    /// What a bitmap shows where nothing was written.
    empty: Page,
    /// Its pages, taken from the host a block at a time, so that a seal can write-protect neighbours by one call.
    #[pin]
    blocks: Array<Block>,
    /// Pages that somebody touched. Others in `blocks` only have neighbours that somebody did.
    resident: PageSet,
    /// Held while a block is added.
    #[pin]
    adding: Mutex<()>,
    #[pin]
    state: RwSem<State>,
    copies: Atomic<u64>,
    copies_peak: Atomic<u64>,
    copies_made: Atomic<u64>,
    limit: Atomic<u64>,
    fails: Atomic<bool>,
    hot_limit: Atomic<u64>,
    waits: Atomic<u64>,
    /// Goes up whenever there may be room for a copy, or one less that is needed.
    turn: Atomic<u64>,
    #[pin]
    room: Mutex<()>,
    #[pin]
    room_made: CondVar,
    alarm: Arc<Alarm>,
}

/// Has the domain know that there was no room for a copy.
#[pin_data]
pub(crate) struct Alarm {
    #[pin]
    work: Work<Alarm>,
}

impl_has_work! {
    impl HasWork<Self> for Alarm { self.work }
}

impl WorkItem for Alarm {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        domain::out_of_room(&this);
    }
}

impl Ram {
    /// Memory of `size` bytes, a multiple of the page size.
    pub(crate) fn new(size: u64) -> Result<Arc<Self>, Refusal> {
        let payer = Memcg::current();
        let _charge = payer.charge();
        let empty = Page::alloc()?;
        empty.lock().clear();
        let open = open_set(size / PAGE_SIZE as u64, &empty)?;
        let resident = PageSet::new()?;
        let mapping = Mapping::new(c"[remus]")?;
        let alarm = Arc::pin_init(
            pin_init!(Alarm { work <- new_work!("remus_alarm") }),
            GFP_KERNEL_ACCOUNT,
        )?;
        let paying = Memcg::current();
        Ok(Arc::pin_init(
            pin_init!(Self {
                size,
                mapping,
                users: Atomic::new(0),
                payer: paying,
                empty,
                blocks <- Array::new(),
                resident,
                adding <- new_mutex!((), "remus_blocks"),
                state <- RwSem::new(
                    State {
                        open,
                        sealed: KVec::new(),
                        cost: Cost::new(),
                        hot: Hot::new(),
                    },
                    c"remus_ram",
                    kernel::static_lock_class!(),
                ),
                copies: Atomic::new(0),
                copies_peak: Atomic::new(0),
                copies_made: Atomic::new(0),
                limit: Atomic::new(0),
                fails: Atomic::new(false),
                hot_limit: Atomic::new(0),
                waits: Atomic::new(0),
                turn: Atomic::new(0),
                room <- new_mutex!((), "remus_room"),
                room_made <- new_condvar!("remus_room"),
                alarm,
            }),
            GFP_KERNEL_ACCOUNT,
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
        let (dirty, hot) = {
            let state = self.state.read();
            (state.open.set.count(), state.hot.count())
        };
        Counts {
            dirty,
            hot,
            hot_limit: self.hot_limit.load(Relaxed),
            resident: self.resident.count(),
            copies: self.copies.load(Relaxed),
            copies_peak: self.copies_peak.load(Relaxed),
            copies_made: self.copies_made.load(Relaxed),
            waits: self.waits.load(Relaxed),
            limit: self.limit.load(Relaxed),
            policy: if self.fails.load(Relaxed) {
                CowPolicy::Fail
            } else {
                CowPolicy::Throttle
            },
        }
    }

    /// Changes how many copies may be kept, 0 for any number, and what happens beyond; and how many pages may be hot.
    pub(crate) fn set(&self, limit: Option<u64>, policy: Option<CowPolicy>, hot: Option<u64>) {
        if let Some(hot) = hot {
            self.hot_limit.store(hot, Relaxed);
        }
        if let Some(limit) = limit {
            self.limit.store(limit, Relaxed);
        }
        if let Some(policy) = policy {
            self.fails.store(policy == CowPolicy::Fail, Relaxed);
        }
        self.wake();
    }

    /// Seals the open epoch as `epoch`; with `full`, as if every existing page had been written in
    /// it, which is refused while older epochs wait (their content would be missed). Returns the
    /// number of pages in it. After an error the open epoch is as before.
    pub(crate) fn seal(&self, epoch: u64, full: bool) -> Result<u64, Refusal> {
        let _charge = self.payer.charge();
        let new = open_set(self.pages(), &self.empty)?;
        let mut run = Run::new()?;
        let (copies, read) = (KBox::pin_init(Array::new(), GFP_KERNEL)?, PageSet::new()?);
        let hot_limit = self.hot_limit.load(Relaxed);
        let mut guard = self.state.write();
        let state = &mut *guard;
        if full && !state.sealed.is_empty() {
            return Err(refusal!(
                EBUSY,
                "a full seal needs all sealed epochs committed or aborted first"
            ));
        }
        state.sealed.reserve(1, GFP_KERNEL)?;
        let sealed = Arc::new(
            Sealed {
                epoch,
                dirty: state.open.clone(),
                copies,
                copied: Atomic::new(0),
                read,
                lost: Atomic::new(false),
            },
            GFP_KERNEL,
        )?;
        let done = self
            .compare(&sealed, &mut state.hot, hot_limit, full)
            .and_then(|()| self.heat(&sealed, &mut state.hot, hot_limit))
            .and_then(|()| self.make_room(state, &new.set, full))
            .and_then(|()| self.protect(&sealed, &new.set, &mut run, state));
        if let Err(error) = done {
            // It stays the open one. What is write-protected already is written into it again.
            self.forget(&sealed);
            return Err(error.into());
        }
        if full {
            sealed.dirty.set.merge(&self.resident);
        }
        let count = sealed.dirty.set.count();
        // What a full seal says of a page is not that it was written.
        state.hot.sealed(&sealed.dirty, hot_limit != 0 && !full);
        state.open = new;
        // Cannot fail: there is room.
        let _ = state.sealed.push_within_capacity(sealed);
        Ok(count)
    }

    /// An abort must not fail for want of memory: `new` gets room for what it may have to take back.
    fn make_room(&self, state: &State, new: &PageSet, full: bool) -> Result {
        for older in &state.sealed {
            new.make_room(&older.dirty.set, &self.payer)?;
        }
        new.make_room(&state.open.set, &self.payer)?;
        if full {
            new.make_room(&self.resident, &self.payer)?;
            state.open.set.make_room(&self.resident, &self.payer)?;
        }
        Ok(())
    }

    /// Forgets every sealed epoch up to `epoch`.
    pub(crate) fn commit(&self, epoch: u64) {
        loop {
            // One at a time, and freed without the lock: faults go on meanwhile.
            let gone = {
                let mut state = self.state.write();
                match state.sealed.first() {
                    Some(first) if first.epoch <= epoch => state.sealed.remove(0).ok(),
                    _ => None,
                }
            };
            match gone {
                Some(gone) => self.forget(&gone),
                None => return,
            }
        }
    }

    /// Folds the sealed epochs from `epoch` on into the open one. Returns the number of pages that
    /// were in them.
    pub(crate) fn abort(&self, epoch: u64) -> u64 {
        let mut pages = 0;
        loop {
            let gone = {
                let mut guard = self.state.write();
                let state = &mut *guard;
                match state.sealed.last() {
                    Some(last) if last.epoch >= epoch => {}
                    _ => return pages,
                }
                let gone = state.sealed.pop();
                if let Some(gone) = &gone {
                    pages += gone.dirty.set.count();
                    state.open.set.merge(&gone.dirty.set);
                }
                gone
            };
            if let Some(gone) = gone {
                self.forget(&gone);
            }
        }
    }

    /// The oldest sealed epoch that has lost a page, if there is one.
    pub(crate) fn lost(&self) -> Option<u64> {
        let state = self.state.read();
        let lost = state.sealed.iter().find(|s| s.lost.load(Relaxed));
        lost.map(|s| s.epoch)
    }

    /// The copies of a sealed epoch go, as soon as nobody reads them any more.
    fn forget(&self, gone: &Sealed) {
        self.copies.fetch_sub(gone.copied.load(Relaxed), Relaxed);
        self.wake();
    }

    /// Keeps the content of a page for `sealed`, unless that was done before. Called with the page's lock
    /// held. False if that would be a copy too many, unless it must be.
    fn keep(
        &self,
        sealed: &Sealed,
        index: u64,
        must: bool,
        copy: impl FnOnce() -> Result<Page>,
    ) -> Result<bool> {
        if sealed.copies.get(index).is_some() {
            return Ok(true);
        }
        let copies = self.copies.fetch_add(1, Relaxed) + 1;
        let limit = self.limit.load(Relaxed);
        let done = if limit != 0 && copies > limit && !must {
            Ok(false)
        } else {
            let _charge = self.payer.charge();
            copy().and_then(|copy| sealed.copies.insert(index, copy))
        };
        if !matches!(done, Ok(true)) {
            self.copies.fetch_sub(1, Relaxed);
            return done;
        }
        sealed.copied.fetch_add(1, Relaxed);
        self.copies_made.fetch_add(1, Relaxed);
        let mut peak = self.copies_peak.load(Relaxed);
        while copies > peak {
            match self.copies_peak.cmpxchg(peak, copies, Relaxed) {
                Ok(_) => break,
                Err(now) => peak = now,
            }
        }
        Ok(true)
    }

    /// Who waits for room may look again.
    fn wake(&self) {
        self.turn.fetch_add(1, Relaxed);
        self.room_made.notify_all();
    }

    fn raise_alarm(&self) {
        if let Some(queue) = workqueue::queue() {
            // If it is queued already it has not begun, and will see this, too.
            let _ = queue.enqueue(self.alarm.clone());
        }
    }

    /// What tells the domain.
    pub(crate) fn alarm(&self) -> &Arc<Alarm> {
        &self.alarm
    }

    /// The page with this number, if it is there.
    fn page_at(&self, index: u64) -> Option<PageRef<'_>> {
        self.near().page(index)
    }

    /// Looks for pages, several of which may be near each other.
    fn near(&self) -> Near<'_> {
        Near {
            blocks: &self.blocks,
            last: None,
        }
    }

    /// Adds the block around `index`.
    fn add_block(&self, index: u64) -> Result {
        let _adding = self.adding.lock();
        let number = index / BLOCK as u64;
        if self.blocks.get(number).is_some() {
            return Ok(());
        }
        let left = self.pages() - number * BLOCK as u64;
        let block = Block::alloc(left.min(BLOCK as u64) as usize, &self.payer)?;
        let _charge = self.payer.charge();
        self.blocks.insert(number, block).map(drop)
    }

    /// The page with this number, made if it is touched for the first time.
    fn touch(&self, index: u64) -> Result<PageRef<'_>> {
        loop {
            let Some(page) = self.page_at(index) else {
                self.add_block(index)?;
                continue;
            };
            if self.resident.contains(index) {
                return Ok(page);
            }
            let lock = page.lock();
            // Somebody else may have been faster, and have written since.
            if !self.resident.contains(index) {
                lock.clear();
                self.resident.insert(index, &self.payer)?;
            }
            drop(lock);
            return Ok(page);
        }
    }

    /// Copies the content of a page at the seal of `sealed` to user space.
    fn deliver(&self, sealed: &Sealed, index: u64, to: UserPtr) -> Result {
        let copy = |to| match sealed.copies.get(index) {
            Some(page) => page.read_to_user(to).map(|()| true),
            None => Ok(false),
        };
        if copy(to)? {
            return Ok(());
        }
        // Nobody keeps it from being written meanwhile: that would be seen below, and there would be a
        // copy then.
        self.touch(index)?.read_to_user(to)?;
        kernel::sync::barrier::smp_rmb();
        let written = {
            let state = self.state.read();
            state.sealed(sealed.epoch)?;
            state.written_since(sealed.epoch, index)
        };
        if sealed.lost.load(Relaxed) {
            return Err(cancelled());
        }
        if written && !copy(to)? {
            // It was read out before, and written then.
            return Err(stale());
        }
        Ok(())
    }

    /// [`uapi::READ`].
    fn read_sealed(&self, argument: UserPtr) -> Result<isize> {
        let mut call: uapi::Read = read_argument(argument)?;
        let room = call.length / uapi::RECORD_SIZE as u32;
        if room == 0 || call.flags & !uapi::KEEP != 0 || call.reserved != 0 {
            return Err(EINVAL);
        }
        let sealed = self.state.read().sealed(call.epoch)?.clone();
        let buffer = UserPtr::from_addr(usize::try_from(call.buffer)?);
        let mut pages = sealed.dirty.set.from(call.cursor);
        call.count = 0;
        let end = loop {
            let Some(index) = pages.next().filter(|n| *n < call.end) else {
                call.cursor = uapi::END;
                break Ok(());
            };
            // Here, so that the caller need not ask again in vain if this was all.
            if call.count == room {
                break Ok(());
            }
            let record = buffer.wrapping_byte_add(call.count as usize * uapi::RECORD_SIZE);
            let done = UserSlice::new(record, 8)
                .writer()
                .write(&index.to_le())
                .and_then(|()| self.deliver(&sealed, index, record.wrapping_byte_add(8)));
            if let Err(error) = done {
                break Err(error);
            }
            if call.flags & uapi::KEEP == 0 {
                // Without memory for the mark it is only copied once too often.
                let _ = sealed.read.insert(index, &self.payer);
                self.wake();
            }
            call.count += 1;
            call.cursor = index + 1;
            cond_resched();
            if is_signalled() {
                break Ok(());
            }
        };
        match end {
            // Who has some records must be told, for they count as read out. The next call says what is wrong.
            Err(error) if call.count == 0 => Err(error),
            _ => write_argument(argument, &call),
        }
    }

    /// [`uapi::BITMAP`].
    fn bitmap(&self, argument: UserPtr) -> Result<isize> {
        let mut call: uapi::Bitmap = read_argument(argument)?;
        let state = self.state.read();
        let bitmap = &state.sealed(call.epoch)?.dirty;
        call.offset = view_offset(view_number(call.epoch));
        call.length = bitmap.pages * PAGE_SIZE as u64;
        call.pages = bitmap.set.count();
        drop(state);
        write_argument(argument, &call)
    }
}

/// A look for pages, one after the other: what is in the block of the one before is found without a search.
struct Near<'a> {
    blocks: &'a Array<Block>,
    last: Option<(u64, BlockRef<'a>)>,
}

impl<'a> Near<'a> {
    /// The page with this number, if it is there.
    fn page(&mut self, index: u64) -> Option<PageRef<'a>> {
        self.block(index)?.page((index % BLOCK as u64) as usize)
    }

    /// The page with this number, if it is there, with those after it that are known to be its neighbours in physical
    /// memory, at most `most` in all.
    fn neighbours(&mut self, index: u64, most: u64) -> Option<Neighbours<'a>> {
        let most = most.min(BLOCK as u64) as usize;
        self.block(index)?
            .neighbours((index % BLOCK as u64) as usize, most)
    }

    /// The block around a page.
    fn block(&mut self, index: u64) -> Option<&BlockRef<'a>> {
        let number = index / BLOCK as u64;
        if !matches!(&self.last, Some((last, _)) if *last == number) {
            self.last = Some((number, self.blocks.get(number)?));
        }
        self.last.as_ref().map(|(_, block)| block)
    }
}

impl Memory for Ram {
    type View = Bitmap;

    fn pages(&self) -> u64 {
        self.size / PAGE_SIZE as u64
    }

    fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    fn view(&self, number: u64) -> Option<Arc<Bitmap>> {
        let state = self.state.read();
        let sealed = state
            .sealed
            .iter()
            .find(|s| view_number(s.epoch) == number)?;
        Some(sealed.dirty.clone())
    }

    fn page(&self, index: u64) -> Result<Page> {
        self.touch(index).map(|page| page.share())
    }

    fn will_write<'a>(&self, index: u64, page: &'a Page) -> Result<Write<'a>> {
        let state = self.state.read();
        let lock = page.lock();
        // The content until now is that of the newest sealed epoch that the page is in; if that has
        // a copy already, the page was written since. Older epochs got their copy when it was.
        let mut sealed = state.sealed.iter().rev();
        if let Some(sealed) = sealed.find(|s| s.dirty.set.contains(index)) {
            // Before the look at the limit, so that whoever makes room after it is noticed.
            let turn = self.turn.load(Relaxed);
            let needed = !sealed.read.contains(index) && !state.written_since(sealed.epoch, index);
            if needed && !self.keep(sealed, index, false, || Ok(lock.copy()?))? {
                if !self.fails.load(Relaxed) {
                    return Ok(Write::Wait(turn));
                }
                if !sealed.lost.xchg(true, Relaxed) {
                    self.raise_alarm();
                }
            }
        }
        state.open.set.insert(index, &self.payer)?;
        Ok(Write::Ready(lock))
    }

    fn wait(&self, turn: u64) {
        self.waits.fetch_add(1, Relaxed);
        self.raise_alarm();
        let mut guard = self.room.lock();
        for _ in 0..PATIENCE {
            if self.turn.load(Relaxed) != turn {
                return;
            }
            let pause = msecs_to_jiffies(GLANCE_MS);
            let woken = self.room_made.wait_interruptible_timeout(&mut guard, pause);
            if matches!(woken, CondVarTimeoutResult::Signal { .. }) {
                break;
            }
        }
        drop(guard);
        // A signal that does not end the process leaves it with the same fault: not at full speed.
        fsleep(Delta::from_millis(1));
    }

    fn ioctl(&self, command: u32, argument: usize) -> Result<isize> {
        let argument = UserPtr::from_addr(argument);
        match command {
            uapi::READ => self.read_sealed(argument),
            uapi::BITMAP => self.bitmap(argument),
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

/// An empty set, for a memory of so many pages.
fn open_set(pages: u64, empty: &Page) -> Result<Arc<Bitmap>> {
    let bitmap = Bitmap {
        set: PageSet::new()?,
        pages: pages.div_ceil(dirty::PAGES),
        empty: empty.share(),
    };
    Ok(Arc::new(bitmap, GFP_KERNEL)?)
}

/// The number of an epoch's view. Two that are outstanding at once never share one.
fn view_number(epoch: u64) -> u64 {
    epoch & u64::from(u32::MAX)
}

fn read_argument<T: FromBytes>(argument: UserPtr) -> Result<T> {
    UserSlice::new(argument, core::mem::size_of::<T>())
        .reader()
        .read()
}

fn write_argument<T: AsBytes>(argument: UserPtr, value: &T) -> Result<isize> {
    UserSlice::new(argument, core::mem::size_of::<T>())
        .writer()
        .write(value)?;
    Ok(0)
}
