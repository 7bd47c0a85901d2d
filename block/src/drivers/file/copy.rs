//! Copying from file to file, through the page cache, and writing many pieces at once.
//!
//! On file systems that move pages of their own to each other's files, the kernel is
//! asked to (`copy_file_range`). Not on those that would let both files share their
//! blocks: the copy has to be one, with blocks of its own and on its own.
//!
//! Elsewhere a thread reads and writes by a small buffer, and finds what it has read in
//! the processor's cache when it writes it. Many large requests in flight do not: each
//! byte then comes from memory twice more.
//!
//! Pieces that are in memory already go before ranges of files: they are short, and their
//! memory is waited for.
//!
//! It is done by threads of its own, which stand back behind those that the guest waits
//! for. While one of them copies pages into a file in memory it has the lock of the file
//! most of the time, though it may have lost its processor: so small writes to the file,
//! which are done on the spot else, are left to it. It does them between two pieces, and
//! whoever asked can go on with other requests.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_channel::oneshot;

use super::{FileDriver, sys};
use crate::buffer::IoVec;
use crate::copy_source::{CopySource, FileRange, Pieces};
use crate::runtime;

/// Bytes that are read before they are written. Measured: docs/performance.md.
const PIECE: usize = 128 << 10;
/// What the buffer is aligned to: the kernel copies by pages, far faster to where each
/// begins as it does in the page cache.
const PAGE: usize = 4096;
/// How long a thread waits for more before it ends.
const LINGER: Duration = Duration::from_millis(500);
/// Bytes after which what was written is sent to the storage.
const WRITEBACK: u64 = 8 << 20;
/// Bytes of pages that are copied before a look at the writes that wait for that.
const PAGES: u64 = 128 << 10;
/// Threads that copy into one file: one waits for storage while the other works. More
/// would wait for the file system's lock of the file.
const THREADS: usize = 2;
/// The same where there is no storage: two would only wait for that lock.
const THREADS_IN_MEMORY: usize = 1;

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; PIECE + PAGE].into_boxed_slice());
}

/// Ranges that are to be copied into one file. Any thread.
#[derive(Default)]
pub(super) struct Copies {
    /// A leaf lock, held to put one in or to take one out.
    queue: Mutex<Queue>,
    /// Rung when one was put in.
    more: Condvar,
    /// `Queue::takes_writes`, for a look without the lock.
    takes_writes: AtomicBool,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Copy>,
    /// Threads that take from it, and those of them that have nothing to do.
    threads: usize,
    idle: usize,
    /// A thread does what is in `writes` soon: it is copying pages, and waits for
    /// nothing. Else there are none.
    takes_writes: bool,
    writes: Vec<Write>,
}

impl Queue {
    fn first_of_files(&self) -> usize {
        let is_file = |copy: &Copy| matches!(copy.from, CopySource::File(_));
        let first = self.waiting.iter().position(is_file);
        first.unwrap_or(self.waiting.len())
    }
}

struct Copy {
    from: CopySource,
    into: Arc<File>,
    offset: u64,
    done: oneshot::Sender<bool>,
}

/// A write that is done by a thread that copies.
struct Write {
    offset: u64,
    iov: IoVec,
    /// Keeps the file, and its locks, as long as it may be written.
    into: Arc<File>,
    done: oneshot::Sender<io::Result<()>>,
}

impl Write {
    fn run(self) {
        let Self {
            offset,
            iov,
            into,
            done,
        } = self;
        if done.is_canceled() {
            return;
        }
        let written = sys::write(&into, offset, &iov);
        drop((iov, into));
        let _ = done.send(written);
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FileDriver {
    pub(super) fn copyable_range(&self, offset: u64, len: u64) -> Option<FileRange> {
        self.direct.is_none().then(|| FileRange {
            file: Arc::clone(&self.file),
            offset,
            len,
            in_memory: self.in_memory,
            parts: Vec::new(),
        })
    }

    /// See [`BlockDriver::copy_from`](crate::BlockDriver::copy_from).
    pub(super) async fn copy(&self, offset: u64, from: CopySource) -> bool {
        if self.direct.is_some() || self.read_only {
            return false;
        }
        let from_memory = match &from {
            CopySource::File(range) => range.in_memory,
            CopySource::Memory(_) => true,
        };
        let threads = match self.in_memory && from_memory {
            true => THREADS_IN_MEMORY,
            false => THREADS,
        };
        let (done, copied) = oneshot::channel();
        let copy = Copy {
            from,
            into: Arc::clone(&self.file),
            offset,
            done,
        };
        if self.copies.push(copy, threads) {
            let copies = Arc::clone(&self.copies);
            let thread = std::thread::Builder::new().name("copy".to_owned());
            let started = thread.spawn(move || {
                runtime::stand_back();
                copies.run();
            });
            if let Err(error) = started {
                tracing::warn!(
                    node = &*self.node,
                    "Cannot start a thread that copies: {error}"
                );
                self.copies.give_up();
            }
        }
        copied.await.unwrap_or(false)
    }
}

impl Copies {
    /// Leaves a write to the thread that has the file's lock. `None`: there is none, it is
    /// for the caller to do.
    ///
    /// Cancel: it is done, or not.
    pub(super) async fn write(
        &self,
        into: &Arc<File>,
        offset: u64,
        iov: &IoVec,
    ) -> Option<io::Result<()>> {
        if !self.takes_writes.load(Ordering::Relaxed) {
            return None;
        }
        let (done, written) = oneshot::channel();
        {
            let mut queue = lock(&self.queue);
            if !queue.takes_writes {
                return None;
            }
            queue.writes.push(Write {
                offset,
                iov: iov.clone(),
                into: Arc::clone(into),
                done,
            });
        }
        // A thread that has gone has written nothing, or the same.
        written.await.ok()
    }

    fn take_writes(&self, more_to_come: bool) -> Vec<Write> {
        let mut queue = lock(&self.queue);
        queue.takes_writes = more_to_come;
        self.takes_writes.store(more_to_come, Ordering::Relaxed);
        std::mem::take(&mut queue.writes)
    }

    /// Does what has gathered. Blocks.
    fn do_writes(&self, more_to_come: bool) {
        for write in self.take_writes(more_to_come) {
            write.run();
        }
    }

    /// Copies pages within memory, and does writes between them. Blocks.
    fn copy_beside_writes(&self, from: &FileRange, into: &File, offset: u64) -> io::Result<()> {
        /// Does what waits for a thread that leaves, whatever makes it leave.
        struct Leaving<'a>(&'a Copies);

        impl Drop for Leaving<'_> {
            fn drop(&mut self) {
                self.0.do_writes(false);
            }
        }

        let _leaving = Leaving(self);
        for part in from.parts() {
            let mut at = part.start;
            while at < part.end {
                self.do_writes(true);
                let piece = at..part.end.min(at + PAGES);
                at = piece.end;
                copy_pages(from, piece, into, offset)?;
            }
        }
        Ok(())
    }

    /// Whether another thread is to [`run`](Self::run), of `threads` at most.
    fn push(&self, copy: Copy, threads: usize) -> bool {
        let mut queue = lock(&self.queue);
        let place = match &copy.from {
            CopySource::Memory(_) => queue.first_of_files(),
            CopySource::File(_) => queue.waiting.len(),
        };
        queue.waiting.insert(place, copy);
        let another = queue.waiting.len() > queue.idle && queue.threads < threads;
        queue.threads += usize::from(another);
        drop(queue);
        self.more.notify_one();
        another
    }

    /// The thread that was to run does not. If there is no other, nothing that waits is
    /// copied.
    fn give_up(&self) {
        let mut queue = lock(&self.queue);
        queue.threads -= 1;
        let left = match queue.threads {
            0 => std::mem::take(&mut queue.waiting),
            _ => VecDeque::new(),
        };
        drop(queue);
        // Who waits for one of them is woken.
        drop(left);
    }

    /// The next one; `None` if there was none for a while. Blocks.
    fn pop(&self) -> Option<Copy> {
        let mut queue = lock(&self.queue);
        if queue.waiting.is_empty() {
            queue.idle += 1;
            let empty = |queue: &mut Queue| queue.waiting.is_empty();
            let (woken, _) = self
                .more
                .wait_timeout_while(queue, LINGER, empty)
                .unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            queue.idle -= 1;
        }
        let next = queue.waiting.pop_front();
        if next.is_none() {
            queue.threads -= 1;
        }
        next
    }

    /// Copies until there is no more to be copied. Blocks.
    ///
    /// One thread does all that has gathered: to wake one for each would take as long
    /// as copying some of it.
    fn run(&self) {
        while let Some(copy) = self.pop() {
            let Copy {
                from,
                into,
                offset,
                done,
            } = copy;
            // Who has gone does not want it any more, or not there.
            let copied = !done.is_canceled() && self.copy(&from, &into, offset).is_ok();
            // Who is told may close them, and their locks go with the last who has them.
            drop((from, into));
            let _ = done.send(copied);
        }
    }

    /// Blocks.
    fn copy(&self, from: &CopySource, into: &File, offset: u64) -> io::Result<()> {
        match from {
            CopySource::File(range) => self.copy_range(range, into, offset),
            CopySource::Memory(pieces) => write_pieces(pieces, into, offset),
        }
    }

    /// Blocks. A range that goes past the end of its file fails.
    fn copy_range(&self, from: &FileRange, into: &File, offset: u64) -> io::Result<()> {
        let pages = sys::copies_pages(&from.file, into);
        if pages && from.in_memory {
            return self.copy_beside_writes(from, into, offset);
        }
        // All of it is on its way from the storage while the first piece is waited for.
        for part in from.parts() {
            sys::will_need(&from.file, from.offset + part.start, part.end - part.start);
        }
        for part in from.parts() {
            match pages {
                true => copy_pages(from, part, into, offset)?,
                false => copy_bytes(from, part, into, offset)?,
            }
        }
        // The flush that follows such copying, and those of others on the same file
        // system, would else wait for all of it.
        let end = offset + from.len;
        let whole = end - end % WRITEBACK;
        if whole > offset {
            sys::begin_writeback(into, whole - WRITEBACK, WRITEBACK);
        }
        Ok(())
    }
}

/// Blocks.
fn write_pieces(from: &Pieces, into: &File, offset: u64) -> io::Result<()> {
    for (at, iov) in &from.pieces {
        sys::write(into, offset + at, iov)?;
    }
    Ok(())
}

/// Copies a part of `from` to its place in what begins at `offset` of `into`. Blocks.
fn copy_pages(from: &FileRange, part: Range<u64>, into: &File, offset: u64) -> io::Result<()> {
    let mut at = part.start;
    while at < part.end {
        let left = part.end - at;
        match sys::copy(&from.file, from.offset + at, into, offset + at, left)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            copied => at += copied,
        }
    }
    Ok(())
}

/// As [`copy_pages`], by a buffer.
fn copy_bytes(from: &FileRange, part: Range<u64>, into: &File, offset: u64) -> io::Result<()> {
    BUFFER.with_borrow_mut(|buffer| {
        let page = buffer.as_ptr().align_offset(PAGE).min(PAGE);
        let buffer = &mut buffer[page..page + PIECE];
        let mut at = part.start;
        while at < part.end {
            // At most a piece, so it fits.
            let len = (part.end - at).min(PIECE as u64) as usize;
            let piece = &mut buffer[..len];
            from.file.read_exact_at(piece, from.offset + at)?;
            into.write_all_at(piece, offset + at)?;
            at += len as u64;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Poll;

    use futures_util::poll;

    use super::*;
    use crate::buffer::AlignedBuffer;
    use crate::runtime::EventLoop;

    #[test]
    fn pieces_go_before_ranges_of_files_and_in_their_order() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let copies = Copies::default();
        let push = |from| {
            let (done, _) = oneshot::channel();
            let into = Arc::clone(&file);
            let copy = Copy {
                from,
                into,
                offset: 0,
                done,
            };
            copies.push(copy, 1);
        };
        let range = || {
            CopySource::File(FileRange {
                file: Arc::clone(&file),
                offset: 0,
                len: 1,
                in_memory: true,
                parts: Vec::new(),
            })
        };
        let pieces = |len: usize| {
            let piece = (0, AlignedBuffer::new(len).io_vec(len));
            CopySource::Memory(Pieces::new(vec![piece]).unwrap().1)
        };
        for from in [range(), pieces(2), range(), pieces(3)] {
            push(from);
        }
        let order: Vec<_> = std::iter::from_fn(|| lock(&copies.queue).waiting.pop_front())
            .map(|copy| copy.from.len())
            .collect();
        assert_eq!(order, [2, 3, 1, 1]);
    }

    #[test]
    fn a_write_is_left_to_a_thread_as_long_as_that_takes_some() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let content = || {
            let mut bytes = Vec::new();
            let len = file.metadata().unwrap().len() as usize;
            bytes.resize(len, 0);
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let iov = AlignedBuffer::new(2).io_vec(2);
        iov.fill(7);
        EventLoop::new("test").unwrap().block_on(async {
            let copies = Copies::default();
            assert!(copies.write(&file, 0, &iov).await.is_none(), "no thread");
            copies.do_writes(true);
            let mut write = pin!(copies.write(&file, 1, &iov));
            assert!(poll!(write.as_mut()).is_pending());
            {
                let mut dropped = pin!(copies.write(&file, 8, &iov));
                assert!(poll!(dropped.as_mut()).is_pending());
            }
            assert!(content().is_empty());
            // The last ones are done, too, before a thread takes none.
            copies.do_writes(false);
            assert!(matches!(poll!(write), Poll::Ready(Some(Ok(())))));
            assert_eq!(content(), [0, 7, 7], "and not what nobody waits for");
            assert!(copies.write(&file, 0, &iov).await.is_none());
        });
    }
}
