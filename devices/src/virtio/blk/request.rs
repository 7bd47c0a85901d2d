//! From a descriptor chain to a checked request (virtio 1.2 §5.2.6).
//!
//! Everything in a chain is the guest's word: nothing is believed. Memory that a
//! request needs is looked up here, once; what runs later works on it without
//! looking at the chain again.

use std::ptr::NonNull;
use std::sync::Arc;

use block::{IoVec, MemoryOwner};
use smallvec::SmallVec;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::config::{
    MAX_DISCARD_SECTORS, MAX_RANGES, MAX_WRITE_ZEROES_SECTORS, SECTOR, VirtioBlkConfig,
};
use crate::GuestMemory;

/// The status byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as isize,
    IoErr = VIRTIO_BLK_S_IOERR as isize,
    Unsupported = VIRTIO_BLK_S_UNSUPP as isize,
}

/// A range of a DISCARD or WRITE_ZEROES request, in bytes, inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DiskRange {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The range may be unmapped (WRITE_ZEROES only).
    pub(super) unmap: bool,
}

/// What is to be done. Offsets are in bytes; ranges are inside the disk.
pub(super) enum Command {
    Read {
        offset: u64,
        data: IoVec,
    },
    Write {
        offset: u64,
        data: IoVec,
    },
    Flush,
    Discard(Vec<DiskRange>),
    WriteZeroes(Vec<DiskRange>),
    GetId {
        data: IoVec,
    },
    /// Ends at once with this status.
    Refuse(Status),
}

/// A request, and where its answer goes.
pub(super) struct Request {
    pub(super) command: Command,
    pub(super) reply: Reply,
}

/// Where the answer to a request goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    /// The chain's head, for the used ring.
    pub(super) head: u16,
    /// Where the status byte goes: in guest memory when the chain was parsed.
    pub(super) status_gpa: GuestAddress,
    /// What the used ring says was written if all went well: bytes from the
    /// front of the writable part, without a gap (virtio 1.2 §2.7.8.2).
    pub(super) len_if_ok: u32,
    /// The same after an error, when the data is nothing to rely on.
    pub(super) len_if_failed: u32,
}

/// A chain that leaves nowhere to put an answer, or is none: the driver cannot be
/// trusted with this queue any more.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainError {
    /// The chain ends in the middle: an index out of range, a loop, a table that
    /// is not in guest memory or is malformed, or more than 4 GiB of data.
    #[error("Descriptor chain {head} is broken")]
    Broken { head: u16 },
    /// More descriptors than the device allows.
    #[error("Descriptor chain {head} is longer than {max} descriptors")]
    TooLong { head: u16, max: u16 },
    /// A readable descriptor after a writable one (virtio 1.2 §2.7.4.2).
    #[error("Descriptor chain {head} has a readable descriptor after a writable one")]
    WrongOrder { head: u16 },
    /// No writable byte for the status, or it is not in guest memory.
    #[error("Descriptor chain {head} has no place for the status")]
    NoStatus { head: u16 },
}

/// What a chain is checked against.
pub(super) struct Parser {
    mem: Arc<GuestMemory>,
    /// Made from `mem`.
    owner: Arc<dyn MemoryOwner>,
    /// Longest chain, in descriptors.
    max_descriptors: u16,
    /// In bytes.
    logical_block_size: u32,
    read_only: bool,
    /// DISCARD and WRITE_ZEROES are offered.
    discard: bool,
}

/// Keeps guest memory mapped for requests in the kernel.
struct GuestMemoryOwner {
    _mem: Arc<GuestMemory>,
}

// SAFETY: a GuestMemoryMmap never changes or unmaps its regions, so what lies
// in them stays mapped at one address until the last Arc is dropped; guest RAM
// is mapped writable.
unsafe impl MemoryOwner for GuestMemoryOwner {}

/// Buffers of one direction, in the order of the chain.
#[derive(Default)]
struct Buffers {
    segments: SmallVec<[(GuestAddress, usize); 8]>,
    len: usize,
}

impl Buffers {
    /// `len` comes from a descriptor, and a chain's sum from a 32-bit counter:
    /// nothing here overflows.
    fn push(&mut self, gpa: GuestAddress, len: u32) {
        if len > 0 {
            self.segments.push((gpa, len as usize));
            self.len += len as usize;
        }
    }

    /// Reads and takes away the first `into.len()` bytes. `None`: they are not
    /// there, or not in guest memory.
    fn take_front(&mut self, mem: &GuestMemory, into: &mut [u8]) -> Option<()> {
        if self.len < into.len() {
            return None;
        }
        let mut done = 0;
        let mut used_up = 0;
        for (gpa, len) in &mut self.segments {
            let take = (*len).min(into.len() - done);
            mem.read_slice(&mut into[done..done + take], *gpa).ok()?;
            done += take;
            if take == *len {
                used_up += 1;
            } else {
                *gpa = gpa.checked_add(take as u64)?;
                *len -= take;
            }
            if done == into.len() {
                break;
            }
        }
        self.segments.drain(..used_up);
        self.len -= done;
        Some(())
    }

    /// Takes away the last byte, and gives its address if it is in guest memory.
    fn take_last(&mut self, mem: &GuestMemory) -> Option<GuestAddress> {
        let (gpa, len) = self.segments.last_mut()?;
        *len -= 1;
        let last = gpa.checked_add(*len as u64)?;
        if *len == 0 {
            self.segments.pop();
        }
        self.len -= 1;
        mem.address_in_range(last).then_some(last)
    }

    /// Leaves the first `len` bytes.
    fn truncate(&mut self, len: usize) {
        let mut left = len.min(self.len);
        self.len = left;
        self.segments.retain(|(_, segment)| {
            *segment = (*segment).min(left);
            left -= *segment;
            *segment > 0
        });
    }

    /// The buffers where the host has them. `None`: not all of it is in guest
    /// memory.
    fn io_vec(&self, mem: &Arc<GuestMemory>, owner: &Arc<dyn MemoryOwner>) -> Option<IoVec> {
        let mut segments: SmallVec<[(NonNull<u8>, usize); 8]> = SmallVec::new();
        for (gpa, len) in &self.segments {
            for slice in mem.get_slices(*gpa, *len) {
                let slice = slice.ok()?;
                segments.push((NonNull::new(slice.ptr_guard_mut().as_ptr())?, slice.len()));
            }
        }
        // SAFETY: each segment is a slice that `get_slices` found inside a region
        // of `mem`, and `owner` (which `Parser::new` makes from the same memory)
        // keeps that mapped.
        Some(unsafe { IoVec::new(segments, Arc::clone(owner)) })
    }
}

impl Parser {
    pub(super) fn new(mem: Arc<GuestMemory>, config: &VirtioBlkConfig) -> Self {
        Self {
            owner: Arc::new(GuestMemoryOwner {
                _mem: Arc::clone(&mem),
            }),
            mem,
            max_descriptors: config.queue_size,
            logical_block_size: config.logical_block_size,
            read_only: config.read_only,
            discard: config.discard,
        }
    }

    pub(super) fn mem(&self) -> &GuestMemory {
        &self.mem
    }

    /// Turns a chain into a request. `capacity` is the disk's size in bytes.
    ///
    /// What is wrong with the request as such ends in [`Command::Refuse`].
    pub(super) fn parse(
        &self,
        chain: DescriptorChain<&GuestMemory>,
        capacity: u64,
    ) -> Result<Request, ChainError> {
        let head = chain.head_index();
        let (mut readable, mut writable) = self.collect(chain)?;
        let status_gpa = writable
            .take_last(&self.mem)
            .ok_or(ChainError::NoStatus { head })?;
        let before_status = writable.len as u32;
        let command = self
            .command(&mut readable, &mut writable, capacity)
            .unwrap_or_else(Command::Refuse);
        let data = match &command {
            Command::Read { data, .. } | Command::GetId { data } => data.len() as u32,
            _ => 0,
        };
        let with_status = |data: u32| data + u32::from(data == before_status);
        Ok(Request {
            command,
            reply: Reply {
                head,
                status_gpa,
                len_if_ok: with_status(data),
                len_if_failed: with_status(0),
            },
        })
    }

    /// The chain's readable and writable buffers.
    fn collect(
        &self,
        chain: DescriptorChain<&GuestMemory>,
    ) -> Result<(Buffers, Buffers), ChainError> {
        let head = chain.head_index();
        let max = self.max_descriptors;
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        let mut in_writable_part = false;
        // The iterator ends without a word where a chain is broken: then the last
        // descriptor announced another one, or there was none at all.
        let mut complete = false;
        for (count, descriptor) in (0..).zip(chain) {
            if count == max {
                return Err(ChainError::TooLong { head, max });
            }
            complete = !descriptor.has_next();
            if descriptor.is_write_only() {
                in_writable_part = true;
                writable.push(descriptor.addr(), descriptor.len());
            } else if in_writable_part {
                return Err(ChainError::WrongOrder { head });
            } else {
                readable.push(descriptor.addr(), descriptor.len());
            }
        }
        if !complete {
            return Err(ChainError::Broken { head });
        }
        Ok((readable, writable))
    }

    /// The command in `readable`, whose answer goes to `writable`; or the status
    /// that says what is wrong with it.
    fn command(
        &self,
        readable: &mut Buffers,
        writable: &mut Buffers,
        capacity: u64,
    ) -> Result<Command, Status> {
        // struct virtio_blk_req: type, reserved, sector.
        let mut header = [0; 16];
        readable
            .take_front(&self.mem, &mut header)
            .ok_or(Status::IoErr)?;
        let (kind, rest) = split_u32(&header);
        let (_reserved, rest) = split_u32(rest);
        let sector = le_u64(rest);
        let io_vec =
            |buffers: &Buffers| buffers.io_vec(&self.mem, &self.owner).ok_or(Status::IoErr);
        let offset = |len: usize| self.range(sector, len as u64, capacity);
        match kind {
            VIRTIO_BLK_T_IN => Ok(Command::Read {
                offset: offset(writable.len)?,
                data: io_vec(writable)?,
            }),
            VIRTIO_BLK_T_OUT if self.read_only => Err(Status::IoErr),
            VIRTIO_BLK_T_OUT => Ok(Command::Write {
                offset: offset(readable.len)?,
                data: io_vec(readable)?,
            }),
            VIRTIO_BLK_T_FLUSH => Ok(Command::Flush),
            VIRTIO_BLK_T_GET_ID => {
                writable.truncate(VIRTIO_BLK_ID_BYTES as usize);
                Ok(Command::GetId {
                    data: io_vec(writable)?,
                })
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if self.read_only => {
                Err(Status::IoErr)
            }
            VIRTIO_BLK_T_DISCARD if self.discard => Ok(Command::Discard(self.ranges(
                readable,
                capacity,
                MAX_DISCARD_SECTORS,
                0,
            )?)),
            VIRTIO_BLK_T_WRITE_ZEROES if self.discard => Ok(Command::WriteZeroes(self.ranges(
                readable,
                capacity,
                MAX_WRITE_ZEROES_SECTORS,
                VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
            )?)),
            _ => Err(Status::Unsupported),
        }
    }

    /// Offset in bytes of `len` bytes from `sector`, if they are whole blocks
    /// inside the disk.
    fn range(&self, sector: u64, len: u64, capacity: u64) -> Result<u64, Status> {
        let offset = sector.checked_mul(SECTOR).ok_or(Status::IoErr)?;
        let end = offset.checked_add(len).ok_or(Status::IoErr)?;
        let block = u64::from(self.logical_block_size);
        if end > capacity || !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Err(Status::IoErr);
        }
        Ok(offset)
    }

    /// The ranges of a DISCARD or WRITE_ZEROES request: all are checked before
    /// anything is done.
    fn ranges(
        &self,
        readable: &mut Buffers,
        capacity: u64,
        max_sectors: u32,
        known_flags: u32,
    ) -> Result<Vec<DiskRange>, Status> {
        // struct virtio_blk_discard_write_zeroes: sector, num_sectors, flags.
        const LEN: usize = 16;
        let count = readable.len / LEN;
        if count == 0 || !readable.len.is_multiple_of(LEN) || count > MAX_RANGES as usize {
            return Err(Status::IoErr);
        }
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            let mut bytes = [0; LEN];
            readable
                .take_front(&self.mem, &mut bytes)
                .ok_or(Status::IoErr)?;
            let sector = le_u64(&bytes[..8]);
            let (num_sectors, rest) = split_u32(&bytes[8..]);
            let (flags, _) = split_u32(rest);
            if flags & !known_flags != 0 {
                return Err(Status::Unsupported);
            }
            if num_sectors > max_sectors {
                return Err(Status::IoErr);
            }
            let len = u64::from(num_sectors) * SECTOR;
            ranges.push(DiskRange {
                offset: self.range(sector, len, capacity)?,
                len,
                unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            });
        }
        Ok(ranges)
    }
}

fn split_u32(bytes: &[u8]) -> (u32, &[u8]) {
    let (word, rest) = bytes.split_at(4);
    (
        u32::from_le_bytes(word.try_into().expect("four bytes")),
        rest,
    )
}

fn le_u64(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}
