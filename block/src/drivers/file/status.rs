//! Where a file has data and where holes.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::FileDriver;
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

impl FileDriver {
    pub(super) async fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        if !matches!(self.kind, Kind::Regular) {
            return Ok(Extent { len, flags: DATA });
        }
        let known = self.data_region.data_at(offset);
        if known > 0 {
            return Ok(Extent {
                len: known.min(len),
                flags: DATA,
            });
        }
        let asked = self.data_region.ask();
        // The file system may have to read its maps from the disk for this, so
        // it is done where blocking is allowed.
        let file = Arc::clone(&self.file);
        let end = self.size().max(offset + len);
        let mut extent = runtime::unblock(move || extent_at(&file, offset, end)).await?;
        if extent.flags == DATA {
            self.data_region
                .remember(asked, offset..offset + extent.len);
        }
        extent.len = extent.len.min(len);
        Ok(extent)
    }
}

/// The extent at `offset`, which ends at `end` at the latest. Blocks.
fn extent_at(file: &File, offset: u64, end: u64) -> io::Result<Extent> {
    let len = end - offset;
    let data = match sys::seek(file, offset, libc::SEEK_DATA) {
        Ok(Some(data)) => data,
        // A hole up to the end of the file, or past it.
        Ok(None) => return Ok(Extent { len, flags: HOLE }),
        // File systems that cannot tell have data everywhere.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            return Ok(Extent { len, flags: DATA });
        }
        Err(error) => return Err(error),
    };
    let data = data - data % SECTOR;
    if data > offset {
        let len = data.min(end) - offset;
        return Ok(Extent { len, flags: HOLE });
    }
    // A hole always follows: the end of the file counts as one. Data that was
    // punched in between is still read as such.
    let hole = sys::seek(file, offset, libc::SEEK_HOLE)?
        .unwrap_or(end)
        .checked_next_multiple_of(SECTOR)
        .unwrap_or(end)
        .max(offset + 1);
    Ok(Extent {
        len: hole.min(end) - offset,
        flags: DATA,
    })
}
