//! The host's end of the guest's mailbox (see `guest::mailbox`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use guest::mailbox::{ORDER_OFFSET, Order, STATUS_OFFSET, Status};
use guest::sector::SECTOR_BYTES;

/// The image behind the mailbox disk. The guest's requests and ours meet in the
/// page cache.
#[derive(Debug)]
pub struct Mailbox {
    file: File,
}

impl Mailbox {
    /// Opens the image.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self { file })
    }

    /// Gives an order; the guest reads it within some milliseconds.
    pub fn order(&self, order: Order) -> io::Result<()> {
        self.file.write_all_at(&order.encode(), ORDER_OFFSET)
    }

    /// What the guest said last; `None` if it has not said anything yet, or is
    /// just about to.
    pub fn status(&self) -> io::Result<Option<Status>> {
        let mut sector = [0; SECTOR_BYTES];
        self.file.read_exact_at(&mut sector, STATUS_OFFSET)?;
        Ok(Status::decode(&sector))
    }
}
