//! Requests on a real ring, against temporary files.

use std::cell::RefCell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::FutureExt;
use futures_util::future::join_all;

use super::*;
use crate::buffer::{AlignedBuffer, MemoryOwner};
use crate::runtime::{EventLoop, Iothread, current_ring, sleep};

fn file(content: &[u8]) -> Arc<File> {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    Arc::new(file)
}

/// A pipe end as a file: a read of it lasts until the other end writes.
fn pipe() -> (Arc<File>, File) {
    use std::os::fd::OwnedFd;
    let (reader, writer) = std::io::pipe().unwrap();
    (
        Arc::new(File::from(OwnedFd::from(reader))),
        File::from(OwnedFd::from(writer)),
    )
}

/// Memory that tells when it is freed.
struct Tracked {
    memory: Arc<AlignedBuffer>,
    freed: Arc<AtomicBool>,
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.freed.store(true, Ordering::SeqCst);
    }
}

// SAFETY: the memory lives as long as the inner buffer, which this owns.
unsafe impl MemoryOwner for Tracked {}

fn tracked(len: usize) -> (IoVec, Arc<AtomicBool>) {
    let freed = Arc::new(AtomicBool::new(false));
    let memory = AlignedBuffer::new(len);
    let base = memory.io_vec(len).to_iovecs()[0].iov_base.cast::<u8>();
    let owner = Arc::new(Tracked {
        memory,
        freed: Arc::clone(&freed),
    });
    assert_eq!(owner.memory.io_vec(len).len(), len);
    // SAFETY: the segment is the buffer that the owner keeps.
    let iov = unsafe { IoVec::new([(NonNull::new(base).unwrap(), len)], owner) };
    (iov, freed)
}

#[test]
fn memory_of_a_dropped_read_lives_until_the_kernel_has_done_with_it() {
    use std::io::Write;
    let event_loop = EventLoop::new("test").unwrap();
    let (reader, mut writer) = pipe();
    event_loop.block_on(async {
        let ring = current_ring();
        let (iov, freed) = tracked(4096);
        let mut read = Box::pin(async move {
            let ring = current_ring();
            read(&ring, &reader, 0, &iov, 1).await
        });
        assert!(read.as_mut().now_or_never().is_none());
        // Lets the loop submit it.
        sleep(Duration::from_millis(1)).await;
        assert_eq!(ring.in_flight(), 1);
        drop(read);
        sleep(Duration::from_millis(1)).await;
        assert_eq!(ring.in_flight(), 1);
        assert!(!freed.load(Ordering::SeqCst));
        writer.write_all(b"late").unwrap();
        while ring.in_flight() > 0 {
            sleep(Duration::from_millis(1)).await;
        }
        assert!(freed.load(Ordering::SeqCst));
        assert!(ring.entries.borrow().is_empty());
    });
}

#[test]
fn a_stopping_iothread_waits_for_orphaned_requests() {
    use std::io::Write;
    let iothread = Iothread::spawn("io0").unwrap();
    let (reader, mut writer) = pipe();
    let (iov, freed) = tracked(4096);
    let (submitted, wait_submitted) = std::sync::mpsc::channel();
    iothread.handle().spawn(move || async move {
        crate::runtime::spawn_local(async move {
            let ring = current_ring();
            let _ = read(&ring, &reader, 0, &iov, 1).await;
        })
        .detach();
        sleep(Duration::from_millis(1)).await;
        assert_eq!(current_ring().in_flight(), 1);
        submitted.send(()).unwrap();
    });
    wait_submitted.recv().unwrap();
    let (stopping, stopped) = (Arc::new(AtomicBool::new(false)), freed);
    let stopper = std::thread::spawn({
        let stopping = Arc::clone(&stopping);
        move || {
            stopping.store(true, Ordering::SeqCst);
            iothread.stop();
        }
    });
    while !stopping.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    assert!(!stopped.load(Ordering::SeqCst));
    assert!(!stopper.is_finished());
    writer.write_all(b"x").unwrap();
    stopper.join().unwrap();
    assert!(stopped.load(Ordering::SeqCst));
}

#[test]
fn more_requests_than_the_queue_holds_all_complete() {
    const COUNT: usize = 3 * SQ_ENTRIES as usize + 7;
    let content: Vec<u8> = (0..COUNT).map(|i| (i % 251) as u8).collect();
    let file = file(&content);
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let ring = current_ring();
        join_all((0..COUNT).map(|i| {
            let (ring, file, content) = (&ring, &file, &content);
            async move {
                let iov = AlignedBuffer::new(1).io_vec(1);
                let count = read(ring, file, i as u64, &iov, 1).await.unwrap();
                assert_eq!(count, 1);
                let mut byte = [0];
                iov.copy_to(0, &mut byte);
                assert_eq!(byte[0], content[i]);
            }
        }))
        .await;
        assert_eq!(ring.in_flight(), 0);
        assert!(ring.entries.borrow().is_empty());
    });
}

#[test]
fn more_completions_than_fit_are_not_lost() {
    const COUNT: usize = 2 * CQ_ENTRIES as usize;
    let file = file(&[1; 4096]);
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let ring = current_ring();
        let iov = AlignedBuffer::new(4096).io_vec(4096);
        // All are queued before the loop gets to harvest.
        let reads = (0..COUNT).map(|_| read(&ring, &file, 0, &iov, 1));
        let results = join_all(reads).await;
        assert!(results.into_iter().all(|r| r.unwrap() == 4096));
        assert_eq!(ring.in_flight(), 0);
    });
}

#[test]
fn a_list_longer_than_the_kernel_takes_is_done_in_parts() {
    const SEGMENTS: usize = 3 * MAX_SEGMENTS + 5;
    let content: Vec<u8> = (0..SEGMENTS * 3).map(|i| (i % 253) as u8).collect();
    let memory = AlignedBuffer::new(SEGMENTS * 4);
    let base = memory.io_vec(SEGMENTS * 4).to_iovecs()[0]
        .iov_base
        .cast::<u8>();
    let segments = (0..SEGMENTS).map(|i| {
        // SAFETY: inside the buffer.
        let base = unsafe { base.add(i * 4) };
        (NonNull::new(base).unwrap(), 3)
    });
    // SAFETY: all segments are in the buffer, which is the owner.
    let iov = unsafe { IoVec::new(segments, memory as Arc<dyn MemoryOwner>) };
    let source = file(&content);
    let target = file(&[]);
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let ring = current_ring();
        let count = read(&ring, &source, 0, &iov, 1).await.unwrap();
        assert_eq!(count, content.len());
        write(&ring, &target, 0, &iov, 1, None).await.unwrap();
    });
    let mut copied = vec![0; content.len()];
    std::os::unix::fs::FileExt::read_exact_at(&*target, &mut copied, 0).unwrap();
    assert!(copied == content);
}

#[test]
fn a_read_past_the_end_of_the_file_is_short() {
    let file = file(&[7; 1000]);
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let ring = current_ring();
        let iov = AlignedBuffer::new(4096).io_vec(4096);
        assert_eq!(read(&ring, &file, 512, &iov, 1).await.unwrap(), 488);
        assert_eq!(read(&ring, &file, 5000, &iov, 1).await.unwrap(), 0);
    });
}

#[test]
fn a_holder_learns_the_result_even_of_a_dropped_request() {
    struct Witness(RefCell<Vec<i32>>);
    impl Hold for Witness {
        fn completed(&self, result: i32) {
            self.0.borrow_mut().push(result);
        }
    }
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let ring = current_ring();
        let witness = Rc::new(Witness(RefCell::default()));
        let hold: Rc<dyn Hold> = Rc::clone(&witness) as _;
        // A pipe cannot be synced.
        let (reader, _writer) = pipe();
        let mut sync = Box::pin(fdatasync(&ring, &reader, &hold));
        assert!(sync.as_mut().now_or_never().is_none());
        drop(sync);
        while ring.in_flight() > 0 {
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(*witness.0.borrow(), [-libc::EINVAL]);
        drop(hold);
        assert_eq!(Rc::strong_count(&witness), 1);
    });
}

#[test]
fn errors_of_the_kernel_come_back() {
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let ring = current_ring();
        let read_only = Arc::new(File::open("/proc/self/exe").unwrap());
        let iov = AlignedBuffer::new(512).io_vec(512);
        let error = write(&ring, &read_only, 0, &iov, 1, None)
            .await
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        let error = fallocate(&ring, &read_only, 0, 0, 512, None)
            .await
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    });
}
