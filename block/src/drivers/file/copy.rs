//! Copying from file to file, through the page cache.
//!
//! On file systems that move pages of their own to each other's files, the kernel is
//! asked to (`copy_file_range`). Not on those that would let both files share their
//! blocks: the copy has to be one, with blocks of its own and on its own.
//!
//! Elsewhere a thread reads and writes by a small buffer, and finds what it has read in
//! the processor's cache when it writes it. Many large requests in flight do not: each
//! byte then comes from memory twice more.
//!
//! It is done by threads of its own, which stand back behind those that the guest waits
//! for.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_channel::oneshot;

use super::{FileDriver, sys};
use crate::driver::FileRange;
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
/// Threads that copy into one file: one waits for storage while the other works. More
/// would wait for the file system's lock of the file.
const THREADS: usize = 2;

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
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Copy>,
    /// Threads that take from it, and those of them that have nothing to do.
    threads: usize,
    idle: usize,
}

struct Copy {
    from: FileRange,
    into: Arc<File>,
    offset: u64,
    done: oneshot::Sender<bool>,
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
        })
    }

    /// See [`BlockDriver::copy_from`](crate::BlockDriver::copy_from).
    pub(super) async fn copy(&self, offset: u64, from: FileRange) -> bool {
        if self.direct.is_some() || self.read_only {
            return false;
        }
        let (done, copied) = oneshot::channel();
        let copy = Copy {
            from,
            into: Arc::clone(&self.file),
            offset,
            done,
        };
        if self.copies.push(copy) {
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
    /// Whether another thread is to [`run`](Self::run).
    fn push(&self, copy: Copy) -> bool {
        let mut queue = lock(&self.queue);
        queue.waiting.push_back(copy);
        let another = queue.waiting.len() > queue.idle && queue.threads < THREADS;
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
            let copied = !done.is_canceled() && copy_range(&from, &into, offset).is_ok();
            // Who is told may close them, and their locks go with the last who has them.
            drop((from, into));
            let _ = done.send(copied);
        }
    }
}

/// Blocks. A range that goes past the end of its file fails.
fn copy_range(from: &FileRange, into: &File, offset: u64) -> io::Result<()> {
    // All of it is on its way from the storage while the first piece is waited for.
    sys::will_need(&from.file, from.offset, from.len);
    if sys::copies_pages(&from.file, into) {
        copy_pages(from, into, offset)?;
    } else {
        copy_bytes(from, into, offset)?;
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

fn copy_pages(from: &FileRange, into: &File, offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < from.len {
        let left = from.len - done;
        match sys::copy(&from.file, from.offset + done, into, offset + done, left)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            copied => done += copied,
        }
    }
    Ok(())
}

fn copy_bytes(from: &FileRange, into: &File, offset: u64) -> io::Result<()> {
    BUFFER.with_borrow_mut(|buffer| {
        let page = buffer.as_ptr().align_offset(PAGE).min(PAGE);
        let buffer = &mut buffer[page..page + PIECE];
        let mut done = 0;
        while done < from.len {
            // At most a piece, so it fits.
            let len = (from.len - done).min(PIECE as u64) as usize;
            let piece = &mut buffer[..len];
            from.file.read_exact_at(piece, from.offset + done)?;
            into.write_all_at(piece, offset + done)?;
            done += len as u64;
        }
        Ok(())
    })
}
