//! Where a file has data and where holes.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::FileDriver;
use super::data_runs::Look;
use super::open::Kind;
use super::sys;
use crate::driver::{BlockDriver, Extent, ExtentFlags};
use crate::runtime;

/// Unit of requests that nodes know.
const SECTOR: u64 = 512;

const DATA: ExtentFlags = ExtentFlags {
    data: true,
    zero: false,
    allocated: true,
};

const HOLE: ExtentFlags = ExtentFlags {
    data: false,
    zero: true,
    allocated: true,
};

/// Runs of data that one look finds at most.
const MAX_RUNS: usize = 64;
/// Bytes after which a look ends: whoever has asked is waiting.
const MAX_LOOK: u64 = 64 << 20;
/// Bytes in memory that are looked at before it is seen whether there is a hole in them:
/// fewest, as runs may be short, and most.
const STRIDES: (u64, u64) = (1 << 20, 16 << 20);
/// Bytes in memory after which the search for the end of data ends, too, though there is more.
const MAX_WALK: u64 = 256 << 20;
/// How long a look of another that may tell is waited for.
const PATIENCE: Duration = Duration::from_millis(20);
/// A seek that takes no longer is one that an iothread may make.
const QUICK: Duration = Duration::from_micros(50);

impl FileDriver {
    pub(super) async fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        if !matches!(self.kind, Kind::Regular) {
            return Ok(Extent { len, flags: DATA });
        }
        let reach = offset..offset.saturating_add(MAX_LOOK);
        let patience = runtime::sleep(PATIENCE);
        let looking = self.data_runs.look_at(reach, patience).await;
        let end = self.size().max(offset + len);
        if looking.is_none() {
            let known = self.data_runs.data_at(offset);
            if known > 0 {
                return Ok(Extent {
                    len: known.min(len),
                    flags: DATA,
                });
            }
            if self.in_memory
                && self.data_runs.is_quick_at(offset)
                && let Some(hole) = hole_at(&self.file, offset, end)?
            {
                return Ok(Extent {
                    len: hole.min(len),
                    flags: HOLE,
                });
            }
        }
        // Holes between runs that are known need no more than their own ends.
        let more = looking.is_some();
        let looking = looking.unwrap_or_else(|| self.data_runs.look_again());
        // The file system may have to read its maps from the disk for this, so
        // it is done where blocking is allowed.
        let file = Arc::clone(&self.file);
        let in_memory = self.in_memory;
        let (mut extent, look) = runtime::unblock(move || {
            let extent = extent_at(&file, in_memory, offset, end)?;
            let look =
                (more || extent.flags == DATA).then(|| look(&file, in_memory, offset, extent, end));
            io::Result::Ok((extent, look))
        })
        .await?;
        if let Some(look) = look {
            looking.has_found(look);
        }
        extent.len = extent.len.min(len);
        Ok(extent)
    }
}

/// Looks at what follows the extent `first` at `offset`. Blocks.
fn look(file: &File, in_memory: bool, offset: u64, first: Extent, end: u64) -> Look {
    let mut look = Look {
        runs: Vec::new(),
        span: offset..offset,
        quick: true,
    };
    let mut extent = first;
    loop {
        let at = look.span.end;
        look.span.end += extent.len;
        if extent.flags == DATA {
            look.runs.push(at..look.span.end);
        }
        if look.runs.len() == MAX_RUNS || look.span.end >= end || look.span.end - offset >= MAX_LOOK
        {
            return look;
        }
        let began = Instant::now();
        extent = match extent_at(file, in_memory, look.span.end, end) {
            Ok(extent) => extent,
            // Whoever asks for it is told.
            Err(_) => return look,
        };
        if extent.flags == HOLE {
            look.quick &= began.elapsed() < QUICK;
        }
    }
}

/// Length of the hole at `offset`, which ends at `end` at the latest; `None` if there is
/// none, or the file system cannot tell. Blocks, as long as it takes to find data.
fn hole_at(file: &File, offset: u64, end: u64) -> io::Result<Option<u64>> {
    match sys::seek(file, offset, libc::SEEK_DATA) {
        Ok(Some(data)) => {
            let data = data - data % SECTOR;
            Ok((data > offset).then(|| data.min(end) - offset))
        }
        // A hole up to the end of the file, or past it.
        Ok(None) => Ok(Some(end - offset)),
        // File systems that cannot tell have data everywhere.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The extent at `offset`, which ends at `end` at the latest. Blocks.
fn extent_at(file: &File, in_memory: bool, offset: u64, end: u64) -> io::Result<Extent> {
    if let Some(len) = hole_at(file, offset, end)? {
        return Ok(Extent { len, flags: HOLE });
    }
    let from = match in_memory {
        true => without_holes(file, offset, end),
        false => offset,
    };
    if from - offset == MAX_WALK {
        return Ok(Extent {
            len: MAX_WALK,
            flags: DATA,
        });
    }
    // A hole always follows: the end of the file counts as one. Data that was
    // punched in between is still read as such.
    let hole = match sys::seek(file, from, libc::SEEK_HOLE) {
        Ok(Some(hole)) => hole,
        Ok(None) if from > offset => from,
        Ok(None) => end,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => end,
        Err(error) => return Err(error),
    };
    let hole = hole
        .checked_next_multiple_of(SECTOR)
        .unwrap_or(end)
        .max(offset + 1);
    Ok(Extent {
        len: hole.min(end) - offset,
        flags: DATA,
    })
}

/// A place not behind `end` up to which there is no hole from `offset` on, in a file in
/// memory, and which is not far from the next one or [`MAX_WALK`] away. Blocks.
///
/// To seek the hole takes time for each page before it, and tmpfs has the lock of the
/// inode meanwhile: guests' writes would wait 40 ms for each GiB. The look at what pages
/// there are takes as long, but no lock.
fn without_holes(file: &File, offset: u64, end: u64) -> u64 {
    let end = end.min(offset.saturating_add(MAX_WALK));
    let (mut at, mut stride) = (offset, STRIDES.0);
    while at < end {
        let len = stride.min(end - at);
        if !sys::has_all_pages(file, at, len) {
            break;
        }
        at += len;
        stride = (stride * 2).min(STRIDES.1);
    }
    at.min(end)
}
