//! System calls that the standard library has not, as safe functions.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use libc::c_int;

use crate::buffer::IoVec;

/// What O_DIRECT wants, in bytes (`statx(2)`, `STATX_DIOALIGN`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectAlignment {
    /// Of buffers in memory.
    pub memory: u32,
    /// Of offsets and lengths.
    pub request: u32,
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The file system's word on O_DIRECT; `None` if it has none (before Linux 6.1).
pub(super) fn direct_alignment(file: &File) -> Option<DirectAlignment> {
    // SAFETY: statx is plain data, for which zeroes are a value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a literal that ends in NUL, and the kernel writes no
    // more than `stat`.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut stat,
        )
    };
    if result < 0 || stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    Some(DirectAlignment {
        memory: stat.stx_dio_mem_align,
        request: stat.stx_dio_offset_align,
    })
}

/// Reads `len` bytes at offset 0 into `buffer` from `skip` on, to see whether
/// the kernel lets us.
pub(super) fn probe_read(
    file: &File,
    buffer: &mut [u8],
    skip: usize,
    len: usize,
) -> io::Result<()> {
    let into = &mut buffer[skip..skip + len];
    // SAFETY: the kernel writes into `into` only, which is ours.
    let result = unsafe { libc::pread(file.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Size of a block device in bytes (`BLKGETSIZE64`).
pub(super) fn device_size(file: &File) -> io::Result<u64> {
    /// `_IOR(0x12, 114, size_t)`, from linux/fs.h.
    const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
    let mut size = 0u64;
    // SAFETY: the kernel writes one u64.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &mut size) })?;
    Ok(size)
}

/// Logical sector size of a block device in bytes (`BLKSSZGET`).
pub(super) fn sector_size(file: &File) -> io::Result<u32> {
    let mut size: c_int = 0;
    // SAFETY: the kernel writes one int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &mut size) })?;
    u32::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))
}

/// Whether a block device refuses writes (`BLKROGET`).
pub(super) fn device_read_only(file: &File) -> io::Result<bool> {
    /// `_IO(0x12, 94)`, from linux/fs.h.
    const BLKROGET: libc::Ioctl = 0x125e;
    let mut read_only: c_int = 0;
    // SAFETY: the kernel writes one int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &mut read_only) })?;
    Ok(read_only != 0)
}

/// Discards a range of a block device (`BLKDISCARD`). Blocks.
pub(super) fn device_discard(file: &File, offset: u64, len: u64) -> io::Result<()> {
    /// `_IO(0x12, 119)`, from linux/fs.h.
    const BLKDISCARD: libc::Ioctl = 0x1277;
    let range = [offset, len];
    // SAFETY: the kernel reads two u64.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, &range) })
}

/// `lseek(2)` with `SEEK_DATA` or `SEEK_HOLE`; `None` if there is none of it
/// from `offset` on. Blocks. Moves the file position, which nobody uses.
pub(super) fn seek(file: &File, offset: u64, whence: c_int) -> io::Result<Option<u64>> {
    let from = libc::off64_t::try_from(offset)
        .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: touches no memory of ours.
    let at = unsafe { libc::lseek64(file.as_raw_fd(), from, whence) };
    match u64::try_from(at) {
        Ok(at) => Ok(Some(at)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// Whether a file on tmpfs has all the pages that `len` bytes at `offset` touch, be they
/// written or only allocated (`cachestat(2)`). `false` also if that is not told: before
/// Linux 6.5, or to a reader who may not write.
pub(super) fn has_all_pages(file: &File, offset: u64, len: u64) -> bool {
    /// The same on all architectures.
    const SYS_CACHESTAT: libc::c_long = 451;
    const PAGE: u64 = 4096;
    #[repr(C)]
    struct Range {
        offset: u64,
        len: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Stat {
        cached: u64,
        dirty: u64,
        writeback: u64,
        /// Swapped out, on tmpfs.
        evicted: u64,
        recently_evicted: u64,
    }
    // A length of 0 stands for all.
    let Some(last) = len.checked_sub(1).and_then(|len| offset.checked_add(len)) else {
        return false;
    };
    let pages = last / PAGE - offset / PAGE + 1;
    let (range, mut stat) = (Range { offset, len }, Stat::default());
    // SAFETY: the kernel reads one range and writes one struct, which are laid out as its
    // own (linux/mman.h).
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0,
        )
    };
    result == 0 && stat.cached.saturating_add(stat.evicted) >= pages
}

/// Kind of the file system that a file is on (`fstatfs(2)`); `None` if that is not told.
fn file_system(file: &File) -> Option<libc::__fsword_t> {
    // SAFETY: statfs is plain data, for which zeroes are a value.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes no more than `stat`.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) };
    (result == 0).then_some(stat.f_type)
}

/// Whether a file is in memory only: on tmpfs.
pub(super) fn is_in_memory(file: &File) -> bool {
    file_system(file) == Some(libc::TMPFS_MAGIC)
}

/// Whether [`copy`] moves data between these two, and nothing else: both are regular
/// files on one file system, of a kind that cannot let files share blocks.
pub(super) fn copies_pages(from: &File, into: &File) -> bool {
    let (Ok(from), Ok(to)) = (from.metadata(), into.metadata()) else {
        return false;
    };
    let copies = || {
        let kind = file_system(into);
        matches!(kind, Some(libc::TMPFS_MAGIC | libc::EXT4_SUPER_MAGIC))
    };
    from.is_file() && to.is_file() && from.dev() == to.dev() && copies()
}

/// Copies at most `len` bytes (`copy_file_range(2)`); gives how many, 0 at the end of
/// `from`. Blocks.
pub(super) fn copy(
    from: &File,
    from_offset: u64,
    into: &File,
    into_offset: u64,
    len: u64,
) -> io::Result<u64> {
    let too_large = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
    let mut from_offset = libc::off64_t::try_from(from_offset).map_err(too_large)?;
    let mut into_offset = libc::off64_t::try_from(into_offset).map_err(too_large)?;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    loop {
        // SAFETY: the kernel reads and writes the two offsets.
        let copied = unsafe {
            libc::copy_file_range(
                from.as_raw_fd(),
                &mut from_offset,
                into.as_raw_fd(),
                &mut into_offset,
                len,
                0,
            )
        };
        match u64::try_from(copied) {
            Ok(copied) => return Ok(copied),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// Reads until `iov` is full or the file ends; gives the bytes read. Blocks.
pub(super) fn read(file: &File, offset: u64, iov: &IoVec) -> io::Result<usize> {
    transfer(offset, iov, |iovecs, at| {
        // SAFETY: the segments are memory of the IoVec.
        unsafe { libc::preadv64(file.as_raw_fd(), iovecs.as_ptr(), count(iovecs), at) }
    })
}

/// Writes all of `iov`. Blocks.
pub(super) fn write(file: &File, offset: u64, iov: &IoVec) -> io::Result<()> {
    let written = transfer(offset, iov, |iovecs, at| match iovecs {
        // The usual case, which takes the kernel less.
        // SAFETY: the segment is memory of the IoVec.
        [one] => unsafe { libc::pwrite64(file.as_raw_fd(), one.iov_base, one.iov_len, at) },
        // SAFETY: as above, for all segments.
        _ => unsafe { libc::pwritev64(file.as_raw_fd(), iovecs.as_ptr(), count(iovecs), at) },
    })?;
    if written < iov.len() {
        return Err(io::Error::from_raw_os_error(libc::ENOSPC));
    }
    Ok(())
}

/// Segments that the kernel takes in one request (`IOV_MAX`).
const MAX_SEGMENTS: usize = 1024;

fn count(iovecs: &[libc::iovec]) -> c_int {
    // It fits: see MAX_SEGMENTS.
    iovecs.len().min(MAX_SEGMENTS) as c_int
}

/// Repeats `call` until all of `iov` is done or it gives 0; gives the bytes done.
fn transfer(
    offset: u64,
    iov: &IoVec,
    call: impl Fn(&[libc::iovec], libc::off64_t) -> isize,
) -> io::Result<usize> {
    let mut done = 0;
    let mut iovecs = iov.to_iovecs();
    while done < iov.len() {
        let at = libc::off64_t::try_from(offset + done as u64)
            .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        match usize::try_from(call(&iovecs, at)) {
            Ok(0) => break,
            Ok(count) => {
                done += count;
                if done < iov.len() {
                    iovecs = iov.slice(done, iov.len() - done).to_iovecs();
                }
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(done)
}

/// Tells the kernel that a range is about to be read (`POSIX_FADV_WILLNEED`). A hint.
pub(super) fn will_need(file: &File, offset: u64, len: u64) {
    let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) else {
        return;
    };
    // SAFETY: touches no memory of ours.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, len, libc::POSIX_FADV_WILLNEED) };
}

/// Begins to write a range of the page cache to the storage (`sync_file_range(2)`).
/// A hint: what fails is found by the flush. May block while the storage is busy.
pub(super) fn begin_writeback(file: &File, offset: u64, len: u64) {
    let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) else {
        return;
    };
    // SAFETY: touches no memory of ours.
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE);
    }
}

fn one_byte(kind: c_int, offset: i64) -> libc::flock {
    libc::flock {
        // The constants are small.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: offset,
        l_len: 1,
        l_pid: 0,
    }
}

/// Takes (`F_RDLCK`) or gives up (`F_UNLCK`) the lock of one byte for this open
/// file description.
pub(super) fn set_byte_lock(file: &File, kind: c_int, offset: i64) -> io::Result<()> {
    let lock = one_byte(kind, offset);
    // SAFETY: the kernel reads one flock.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) })
}

/// Whether another open file description holds the lock of one byte.
pub(super) fn byte_is_locked(file: &File, offset: i64) -> io::Result<bool> {
    let mut lock = one_byte(libc::F_WRLCK, offset);
    // SAFETY: the kernel reads and writes one flock.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) })?;
    Ok(c_int::from(lock.l_type) != libc::F_UNLCK)
}
