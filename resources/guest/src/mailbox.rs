//! How host and guest talk while the guest runs: through a small disk.
//!
//! The host writes an [`Order`] into sector 0 of the image that is behind the
//! disk; the guest reads that sector every few milliseconds with an ordinary
//! request, and writes [`Status`] into sector 1. Neither needs an exit that an
//! idle device would not cause, and it works on any VMM with virtio-blk.
//!
//! A sector read while the other side writes it is caught by its checksum and
//! read again later.

use crate::sector::SECTOR_BYTES;

/// Size of the image, in bytes: one page.
pub const MAILBOX_BYTES: u64 = 4096;
/// Where the host writes its order, in bytes.
pub const ORDER_OFFSET: u64 = 0;
/// Where the guest writes its status, in bytes.
pub const STATUS_OFFSET: u64 = SECTOR_BYTES as u64;

const ORDER_MAGIC: u64 = u64::from_le_bytes(*b"diporder");
const STATUS_MAGIC: u64 = u64::from_le_bytes(*b"dipstat1");

/// What the host wants. Each replaces the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// The phase to be in (see [`crate::phase::Phases::enter`]).
    pub phase: u64,
    /// Stop the workload, verify, report and power off.
    pub finish: bool,
}

/// What the guest has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The phase it is in: the order has arrived.
    pub phase: u64,
    /// Writes acknowledged since the start, over all disks.
    pub writes: u64,
    /// Bytes written with data since the start.
    pub written_bytes: u64,
    /// Requests failed or blocks found wrong.
    pub errors: u64,
    /// Whether the disks have been filled as ordered, so that phase 0 began.
    pub filled: bool,
}

impl Order {
    /// The sector that says so.
    pub fn encode(&self) -> [u8; SECTOR_BYTES] {
        encode(ORDER_MAGIC, [self.phase, u64::from(self.finish), 0, 0, 0])
    }

    /// Reads a sector; `None` if it holds no (whole) order.
    pub fn decode(sector: &[u8; SECTOR_BYTES]) -> Option<Self> {
        let [phase, finish, ..] = decode(ORDER_MAGIC, sector)?;
        Some(Self {
            phase,
            finish: finish != 0,
        })
    }
}

impl Status {
    /// The sector that says so.
    pub fn encode(&self) -> [u8; SECTOR_BYTES] {
        encode(
            STATUS_MAGIC,
            [
                self.phase,
                self.writes,
                self.written_bytes,
                self.errors,
                u64::from(self.filled),
            ],
        )
    }

    /// Reads a sector; `None` if it holds no (whole) status.
    pub fn decode(sector: &[u8; SECTOR_BYTES]) -> Option<Self> {
        let [phase, writes, written_bytes, errors, filled] = decode(STATUS_MAGIC, sector)?;
        Some(Self {
            phase,
            writes,
            written_bytes,
            errors,
            filled: filled != 0,
        })
    }
}

fn encode(magic: u64, fields: [u64; 5]) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    let (words, _) = sector.as_chunks_mut::<8>();
    words[0] = magic.to_le_bytes();
    for (word, field) in words[1..].iter_mut().zip(fields) {
        *word = field.to_le_bytes();
    }
    words[6] = checksum(magic, fields).to_le_bytes();
    sector
}

fn decode(magic: u64, sector: &[u8; SECTOR_BYTES]) -> Option<[u64; 5]> {
    let (words, _) = sector.as_chunks::<8>();
    let word = |i: usize| u64::from_le_bytes(words[i]);
    let fields = [word(1), word(2), word(3), word(4), word(5)];
    (word(0) == magic && word(6) == checksum(magic, fields)).then_some(fields)
}

fn checksum(magic: u64, fields: [u64; 5]) -> u64 {
    fields.into_iter().fold(magic, |sum, field| {
        (sum ^ field)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_arrives_as_it_was_sent() {
        let order = Order {
            phase: 3,
            finish: true,
        };
        assert_eq!(Order::decode(&order.encode()), Some(order));
    }

    #[test]
    fn a_status_arrives_as_it_was_sent() {
        let status = Status {
            phase: 1,
            writes: 2,
            written_bytes: 3,
            errors: 4,
            filled: true,
        };
        assert_eq!(Status::decode(&status.encode()), Some(status));
    }

    #[test]
    fn an_empty_or_torn_mailbox_says_nothing() {
        assert_eq!(Order::decode(&[0; 512]), None);
        let mut torn = Order::default().encode();
        torn[8] ^= 1;
        assert_eq!(Order::decode(&torn), None);
        assert_eq!(Status::decode(&Order::default().encode()), None);
    }
}
