//! Requests to the kernel by io_uring, as futures.
//!
//! What does not live here: retries of short transfers by meaning (end of file,
//! no space), bounce buffers, alignment: the file driver. When requests are
//! submitted and harvested: `runtime`.
//!
//! # Who owns the memory
//!
//! The kernel may use an operation's memory and descriptor until it has posted
//! the completion. So both belong to the operation's entry in the ring, which
//! lives until then; a future that is dropped early leaves its entry behind as
//! an orphan. A ring waits for all completions before it goes away.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use slab::Slab;

use crate::buffer::IoVec;

/// Requests that one `io_uring_enter` takes.
const SQ_ENTRIES: u32 = 256;
/// Completions that fit before the kernel has to set them aside.
const CQ_ENTRIES: u32 = 4096;
/// Segments that the kernel takes in one request (`IOV_MAX`).
const MAX_SEGMENTS: usize = 1024;
/// Bytes that the kernel transfers in one request (`MAX_RW_COUNT`, for 4 KiB
/// pages), rounded down to a boundary that every alignment divides.
const MAX_BYTES: usize = 0x7ff0_0000;
/// Time after which a refused submission is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(2);

/// What the kernel uses during an operation.
struct Keep {
    _file: Arc<File>,
    /// The array that the kernel reads; at a fixed address.
    _iovecs: Option<Box<[libc::iovec]>>,
    _iov: Option<IoVec>,
    /// What else must last until the completion: the lock of the range.
    hold: Option<Rc<dyn Hold>>,
}

/// Something that a request holds until the kernel has done with it, even if its
/// future is dropped.
pub(crate) trait Hold {
    /// The kernel has done with a request that held this, with `result`: 0 or
    /// more, or a negative errno.
    fn completed(&self, result: i32) {
        let _ = result;
    }
}

enum State {
    /// The kernel has it, or will.
    Waiting(Option<Waker>),
    /// It has ended with this result.
    Done(i32),
    /// Its future was dropped.
    Orphaned,
}

struct Entry {
    state: State,
    /// Dropped when the completion has come.
    keep: Option<Keep>,
}

/// One thread's io_uring.
pub(crate) struct Ring {
    ring: RefCell<IoUring>,
    entries: RefCell<Slab<Entry>>,
    /// What does not fit the submission queue yet.
    backlog: RefCell<VecDeque<squeue::Entry>>,
    /// Operations whose completion has not come.
    in_flight: Cell<usize>,
    /// When to try again after the kernel refused a submission.
    retry_at: Cell<Option<Instant>>,
    /// Scratch.
    completed: RefCell<Vec<(u64, i32)>>,
}

impl Ring {
    pub(crate) fn new() -> io::Result<Self> {
        let ring = build()?;
        check_opcodes(&ring)?;
        Ok(Self {
            ring: RefCell::new(ring),
            entries: RefCell::default(),
            backlog: RefCell::default(),
            in_flight: Cell::new(0),
            retry_at: Cell::new(None),
            completed: RefCell::default(),
        })
    }

    /// Queues a request; it is submitted with the others at the end of the turn.
    ///
    /// # Safety
    ///
    /// The kernel must find everything that `sqe` points to, and its descriptor,
    /// in what `keep` keeps alive.
    unsafe fn push(self: &Rc<Self>, sqe: squeue::Entry, keep: Keep) -> Operation {
        let key = self.entries.borrow_mut().insert(Entry {
            state: State::Waiting(None),
            keep: Some(keep),
        });
        self.in_flight.set(self.in_flight.get() + 1);
        self.backlog
            .borrow_mut()
            .push_back(sqe.user_data(key as u64));
        Operation {
            ring: Rc::clone(self),
            key: Some(key),
        }
    }

    /// Submits what is queued. No system call if there is nothing to do.
    pub(crate) fn submit(&self) {
        let mut ring = self.ring.borrow_mut();
        let mut backlog = self.backlog.borrow_mut();
        self.retry_at.set(None);
        loop {
            let queued = {
                let mut sq = ring.submission();
                while let Some(sqe) = backlog.front() {
                    // SAFETY: what the entry points to is kept until its
                    // completion; see `push`.
                    if unsafe { sq.push(sqe) }.is_err() {
                        break;
                    }
                    backlog.pop_front();
                }
                if sq.is_empty() && !sq.cq_overflow() && !sq.taskrun() {
                    return;
                }
                sq.len()
            };
            match ring.submit() {
                // All that there was, and no flag matters before the next turn.
                Ok(submitted) if submitted >= queued && backlog.is_empty() => return,
                Ok(submitted) if submitted > 0 => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                refused => {
                    // EAGAIN, EBUSY: no memory, or completions to be harvested
                    // first. Others are not expected, and no reason to drop
                    // requests.
                    if let Err(error) = refused
                        && !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
                    {
                        tracing::error!("io_uring_enter failed: {error}");
                    }
                    self.retry_at.set(Some(Instant::now() + RETRY_AFTER));
                    return;
                }
            }
        }
    }

    /// When `submit` wants to be called again at the latest.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        self.retry_at.get()
    }

    /// Takes completions and wakes their futures. No system call.
    pub(crate) fn harvest(&self) {
        let mut completed = self.completed.take();
        {
            let mut ring = self.ring.borrow_mut();
            completed.extend(ring.completion().map(|cqe| (cqe.user_data(), cqe.result())));
        }
        for (key, result) in completed.drain(..) {
            let key = key as usize;
            self.in_flight.set(self.in_flight.get() - 1);
            let mut entries = self.entries.borrow_mut();
            let Some(entry) = entries.get_mut(key) else {
                drop(entries);
                tracing::error!("io_uring completed an unknown request");
                continue;
            };
            let keep = entry.keep.take();
            let waker = match std::mem::replace(&mut entry.state, State::Done(result)) {
                State::Waiting(waker) => waker,
                State::Orphaned | State::Done(_) => {
                    entries.remove(key);
                    None
                }
            };
            drop(entries);
            // Outside the borrow: all three may do anything.
            if let Some(hold) = keep.as_ref().and_then(|keep| keep.hold.as_ref()) {
                hold.completed(result);
            }
            drop(keep);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        self.completed.replace(completed);
    }

    /// Waits until the kernel has done with everything. `name` is for the
    /// message if that takes long.
    pub(crate) fn drain(&self, name: &str) {
        let mut next_warning = Instant::now() + Duration::from_secs(5);
        while self.in_flight.get() > 0 {
            self.submit();
            self.harvest();
            if self.in_flight.get() == 0 {
                break;
            }
            let timeout = types::Timespec::from(Duration::from_secs(1));
            let args = types::SubmitArgs::new().timespec(&timeout);
            let waited = self.ring.borrow().submitter().submit_with_args(1, &args);
            if let Err(error) = waited
                && !matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY)
                )
            {
                // A kernel without timeouts here (before 5.11), or worse.
                std::thread::sleep(Duration::from_millis(1));
            }
            self.harvest();
            if Instant::now() >= next_warning && self.in_flight.get() > 0 {
                tracing::warn!(
                    iothread = name,
                    "Still waiting for {} requests to storage",
                    self.in_flight.get()
                );
                next_warning += Duration::from_secs(30);
            }
        }
    }

    /// Operations whose completion has not come.
    #[cfg(all(test, not(shuttle)))]
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.borrow().as_raw_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The loop drains before; this is for a panic on the way there.
        self.drain("ending");
    }
}

/// A ring with the best settings that this kernel takes.
fn build() -> io::Result<IoUring> {
    type Setting = fn(&mut io_uring::Builder);
    // Completions without interrupting this thread, which looks for them anyway:
    // COOP_TASKRUN since 5.19, SINGLE_ISSUER since 6.0.
    let settings: [Setting; 3] = [
        |b| {
            b.setup_single_issuer()
                .setup_coop_taskrun()
                .setup_taskrun_flag();
        },
        |b| {
            b.setup_coop_taskrun().setup_taskrun_flag();
        },
        |_| {},
    ];
    let mut last = io::Error::from_raw_os_error(libc::EINVAL);
    for set in settings {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(CQ_ENTRIES);
        set(&mut builder);
        match builder.build(SQ_ENTRIES) {
            Ok(ring) => return Ok(ring),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// Refuses kernels that lack what we use.
fn check_opcodes(ring: &IoUring) -> io::Result<()> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
    ];
    if !ring.params().is_feature_nodrop() || needed.iter().any(|code| !probe.is_supported(*code)) {
        return Err(io::Error::from_raw_os_error(libc::ENOSYS));
    }
    Ok(())
}

/// A request that has been queued.
///
/// Gives the kernel's result: 0 or more, or an error. Dropping it leaves the
/// request running and its memory with the ring.
pub(crate) struct Operation {
    ring: Rc<Ring>,
    /// `None` once the result has been given.
    key: Option<usize>,
}

impl Future for Operation {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(key) = self.key else {
            return Poll::Pending;
        };
        let mut entries = self.ring.entries.borrow_mut();
        let result = match entries.get_mut(key).map(|entry| &mut entry.state) {
            Some(State::Waiting(waker)) => {
                let old = waker.replace(cx.waker().clone());
                drop(entries);
                drop(old);
                return Poll::Pending;
            }
            Some(State::Done(result)) => *result,
            // Nobody else removes or orphans it.
            Some(State::Orphaned) | None => -libc::ECANCELED,
        };
        entries.try_remove(key);
        drop(entries);
        self.key = None;
        Poll::Ready(match usize::try_from(result) {
            Ok(count) => Ok(count),
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        })
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut entries = self.ring.entries.borrow_mut();
        let old = match entries.get_mut(key) {
            Some(entry) => match entry.state {
                State::Waiting(_) => {
                    // Keeps the entry, and with it the memory.
                    Some(std::mem::replace(&mut entry.state, State::Orphaned))
                }
                State::Done(_) | State::Orphaned => {
                    entries.remove(key);
                    None
                }
            },
            None => None,
        };
        drop(entries);
        drop(old);
    }
}

/// Whether an operation is to be tried again as it was.
fn transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// Which way data goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// One request for as much of `iov` as the kernel takes at once. (Under O_DIRECT
/// each segment is of whole blocks, so a cut is never inside one.)
fn transfer(
    ring: &Rc<Ring>,
    file: &Arc<File>,
    offset: u64,
    iov: IoVec,
    direction: Direction,
    hold: Option<Rc<dyn Hold>>,
) -> Operation {
    let fd = types::Fd(file.as_raw_fd());
    let mut iovecs = iov.to_iovecs();
    iovecs.truncate(MAX_SEGMENTS);
    let keep = Keep {
        _file: Arc::clone(file),
        _iovecs: None,
        _iov: Some(iov),
        hold,
    };
    match (iovecs.as_slice(), direction) {
        ([one], direction) => {
            let base = one.iov_base.cast::<u8>();
            // At most MAX_BYTES, so it fits.
            let len = one.iov_len as u32;
            let sqe = match direction {
                Direction::Read => opcode::Read::new(fd, base, len).offset(offset).build(),
                Direction::Write => opcode::Write::new(fd, base, len).offset(offset).build(),
            };
            // SAFETY: the segment is memory of the IoVec, and the descriptor
            // that of the file, both kept.
            unsafe { ring.push(sqe, keep) }
        }
        (_, direction) => {
            let iovecs = iovecs.into_vec().into_boxed_slice();
            // At most MAX_SEGMENTS, so it fits.
            let count = iovecs.len() as u32;
            let sqe = match direction {
                Direction::Read => opcode::Readv::new(fd, iovecs.as_ptr(), count)
                    .offset(offset)
                    .build(),
                Direction::Write => opcode::Writev::new(fd, iovecs.as_ptr(), count)
                    .offset(offset)
                    .build(),
            };
            let keep = Keep {
                _iovecs: Some(iovecs),
                ..keep
            };
            // SAFETY: as above; the array is kept too, and moving its box does
            // not move it.
            unsafe { ring.push(sqe, keep) }
        }
    }
}

/// Reads until `iov` is full or the file ends; gives the bytes read.
///
/// `alignment` (a power of two) is what the file wants of offsets and lengths: a
/// read that stops between is at the end of the file.
///
/// Cancel: the memory stays owned, and may still be written.
pub(crate) async fn read(
    ring: &Rc<Ring>,
    file: &Arc<File>,
    offset: u64,
    iov: &IoVec,
    alignment: usize,
) -> io::Result<usize> {
    let mut done = 0;
    while done < iov.len() {
        let part = iov.slice(done, (iov.len() - done).min(MAX_BYTES));
        let at = offset + done as u64;
        match transfer(ring, file, at, part, Direction::Read, None).await {
            Ok(0) => break,
            Ok(count) => {
                done += count;
                if count % alignment != 0 {
                    break;
                }
            }
            Err(error) if transient(&error) => crate::runtime::yield_now().await,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Writes all of `iov`, which a flush makes durable.
/// `alignment` (a power of two) is what the file wants of offsets and lengths.
///
/// Cancel: the memory stays owned, and `hold` held, until the kernel has done with
/// it; all, part or nothing of it is written.
pub(crate) async fn write(
    ring: &Rc<Ring>,
    file: &Arc<File>,
    offset: u64,
    iov: &IoVec,
    alignment: usize,
    hold: Option<&Rc<dyn Hold>>,
) -> io::Result<()> {
    let mut done = 0;
    while done < iov.len() {
        let part = iov.slice(done, (iov.len() - done).min(MAX_BYTES));
        let at = offset + done as u64;
        match transfer(ring, file, at, part, Direction::Write, hold.cloned()).await {
            // A full device; trying again would spin.
            Ok(count) if count < alignment => {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            // What is not a whole unit is written again.
            Ok(count) => done += count - count % alignment,
            Err(error) if transient(&error) => crate::runtime::yield_now().await,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes written data durable (`fdatasync`).
///
/// Cancel: it goes on; `hold` learns the result.
pub(crate) async fn fdatasync(
    ring: &Rc<Ring>,
    file: &Arc<File>,
    hold: &Rc<dyn Hold>,
) -> io::Result<()> {
    loop {
        let sqe = opcode::Fsync::new(types::Fd(file.as_raw_fd()))
            .flags(types::FsyncFlags::DATASYNC)
            .build();
        // SAFETY: points to no memory; the file is kept.
        let operation = unsafe { ring.push(sqe, Keep::file(file, Some(Rc::clone(hold)))) };
        match operation.await {
            Ok(_) => return Ok(()),
            // Not EAGAIN: a failed fsync must not be repeated into a success.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// `fallocate(2)` with `mode` (`FALLOC_FL_*`).
pub(crate) async fn fallocate(
    ring: &Rc<Ring>,
    file: &Arc<File>,
    mode: i32,
    offset: u64,
    len: u64,
    hold: Option<&Rc<dyn Hold>>,
) -> io::Result<()> {
    loop {
        let sqe = opcode::Fallocate::new(types::Fd(file.as_raw_fd()), len)
            .offset(offset)
            .mode(mode)
            .build();
        // SAFETY: points to no memory; the file is kept.
        let operation = unsafe { ring.push(sqe, Keep::file(file, hold.cloned())) };
        match operation.await {
            Ok(_) => return Ok(()),
            Err(error) if transient(&error) => crate::runtime::yield_now().await,
            Err(error) => return Err(error),
        }
    }
}

impl Keep {
    fn file(file: &Arc<File>, hold: Option<Rc<dyn Hold>>) -> Self {
        Self {
            _file: Arc::clone(file),
            _iovecs: None,
            _iov: None,
            hold,
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests;
