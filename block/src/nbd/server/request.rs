//! What is done for one request.
//!
//! The block layer takes whole sectors; NBD clients may ask for any bytes. What
//! sticks out of the sectors asked for is read, and written back, around it.
//!
//! Specification: § "Request types", "Command flags", "Error values".

use std::time::{Duration, Instant};

use super::buffers::Buffer;
use super::connection::Connection;
use super::handshake::{
    ALLOCATION_DEPTH_ID, BASE_ALLOCATION_ID, Contexts, FIRST_BITMAP_ID, ReplyStyle,
};
use super::reply::{Content, Outcome, Piece, Refusal};
use crate::backend::InFlight;
use crate::buffer::AlignedBuffer;
use crate::dirty_bitmap::DirtyBitmap;
use crate::driver::{WriteFlags, ZeroFlags};
use crate::error::{IoError, IoOp};
use crate::nbd::protocol::{
    BlockDescriptor, DIRTY, MAX_PAYLOAD, Request, allocation_flag, command, command_flag,
};
use crate::node::SECTOR_SIZE;

/// A read of no less than this is looked at for holes first.
const MIN_SPARSE_READ: u64 = 64 << 10;
/// How far a look at holes goes, so that the reads that follow need none.
const LOOK_AHEAD: u64 = 64 << 20;
/// Parts that one read is told in.
const MAX_PIECES: usize = 64;
/// Extents of one answer, of each of two contexts or fewer of each of more. A client asks
/// again for the rest.
const MAX_EXTENTS: usize = 8192;
/// After this time a block status request is answered with what is known.
const STATUS_TIME: Duration = Duration::from_millis(50);
/// Zeroes are written in pieces of this many bytes: between two of them a drained
/// section may come in, and the request may end with its client.
const ZERO_PIECE: u64 = if cfg!(test) { 256 << 10 } else { 256 << 20 };
/// Reading ahead is done in pieces of this many bytes.
const CACHE_PIECE: u64 = 1 << 20;

fn refused(errno: i32, text: &'static str) -> Refusal {
    Refusal { errno, text }
}

/// Whether the request makes sense and is allowed.
///
/// The error numbers are QEMU's where it differs from the specification: a write to
/// a read-only export is `EINVAL`.
pub(super) fn check(request: &Request, connection: &Connection) -> Result<(), Refusal> {
    let export = connection.export();
    let chunks = connection.style != ReplyStyle::Simple;
    let Request {
        command,
        offset,
        len,
        ..
    } = *request;
    let mut known_flags = command_flag::FUA;
    match command {
        command::READ if chunks => known_flags |= command_flag::DF,
        command::READ | command::FLUSH | command::CACHE => {}
        command::WRITE | command::TRIM | command::WRITE_ZEROES => {
            if !export.writable {
                return Err(refused(libc::EINVAL, "Export is read-only"));
            }
            if command == command::WRITE_ZEROES {
                known_flags |= command_flag::NO_HOLE | command_flag::FAST_ZERO;
            }
            if command == command::WRITE && connection.style == ReplyStyle::Extended {
                known_flags |= command_flag::PAYLOAD_LEN;
            }
        }
        command::BLOCK_STATUS => {
            known_flags |= command_flag::REQ_ONE;
            if connection.contexts == Contexts::default() {
                let text = "No metadata context was chosen for this export";
                return Err(refused(libc::EINVAL, text));
            }
            if len == 0 {
                let text = "Block status of no bytes";
                return Err(refused(libc::EINVAL, text));
            }
        }
        _ => return Err(refused(libc::EINVAL, "Unknown request type")),
    }
    if request.flags & !known_flags != 0 {
        return Err(refused(libc::EINVAL, "Unsupported flags"));
    }
    if offset > export.size || len > export.size - offset {
        let errno = match command {
            command::WRITE | command::WRITE_ZEROES => libc::ENOSPC,
            _ => libc::EINVAL,
        };
        return Err(refused(errno, "The range is past the end of the export"));
    }
    if matches!(command, command::READ | command::CACHE) && len > MAX_PAYLOAD.into() {
        return Err(refused(libc::EINVAL, "The length is above the limit"));
    }
    Ok(())
}

/// Memory that the request takes, in bytes.
pub(super) fn memory(request: &Request) -> u64 {
    match request.command {
        command::READ | command::WRITE => request.len,
        command::CACHE => CACHE_PIECE,
        command::BLOCK_STATUS => (2 * MAX_EXTENTS * size_of::<BlockDescriptor>()) as u64,
        _ => 0,
    }
}

/// The sectors that a range touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sectors {
    start: u64,
    end: u64,
    /// Whether the range is just these.
    whole: bool,
}

impl Sectors {
    /// `offset + len` has been checked to be no more than a size.
    fn of(offset: u64, len: u64) -> Self {
        let end = offset + len;
        Self {
            start: offset / SECTOR_SIZE * SECTOR_SIZE,
            end: end.next_multiple_of(SECTOR_SIZE),
            whole: (offset | len).is_multiple_of(SECTOR_SIZE),
        }
    }

    fn len(self) -> u64 {
        self.end - self.start
    }
}

/// Carries a request out that was [`check`]ed and counted in; `data` is what it
/// writes. Gives, when it is counted out, the buffer that the outcome is in, or that
/// was not needed any more.
pub(super) async fn perform(
    connection: &Connection,
    in_flight: InFlight,
    request: &Request,
    data: Option<Buffer>,
) -> (Outcome, Option<Buffer>) {
    if request.command == command::WRITE_ZEROES {
        let outcome = match zeroes_in_pieces(connection, in_flight, request).await {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Refused(failed(&error, "Writing zeroes failed")),
        };
        return (outcome, data);
    }
    let in_flight = &in_flight;
    let flags = request.flags;
    let (offset, len) = (request.offset, request.len);
    let fua = is_fua(connection, request);
    let result = match request.command {
        command::READ => {
            let whole = flags & command_flag::DF != 0 || connection.style == ReplyStyle::Simple;
            return read(connection, in_flight, offset, len, whole).await;
        }
        command::WRITE => {
            let result = match &data {
                Some(data) => write(connection, in_flight, offset, len, data, fua).await,
                None => Ok(()),
            };
            result.map_err(|error| failed(&error, "Writing failed"))
        }
        command::TRIM => trim(connection, in_flight, offset, len, fua)
            .await
            .map_err(|error| failed(&error, "Trimming failed")),
        command::FLUSH => in_flight
            .flush()
            .await
            .map_err(|error| failed(&error, "Flushing failed")),
        command::CACHE => cache(in_flight, offset, len)
            .await
            .map_err(|error| failed(&error, "Reading ahead failed")),
        command::BLOCK_STATUS => {
            let one = flags & command_flag::REQ_ONE != 0;
            let status = status(connection, in_flight, offset, len, one).await;
            let outcome = match status {
                Ok(contexts) => Outcome::Status(contexts),
                Err(error) => Outcome::Refused(failed(&error, "Asking for block status failed")),
            };
            return (outcome, data);
        }
        _ => Err(refused(libc::EINVAL, "Unknown request type")),
    };
    let outcome = match result {
        Ok(()) => Outcome::Done,
        Err(refusal) => Outcome::Refused(refusal),
    };
    (outcome, data)
}

/// Whether what is written has to be durable when it is answered.
fn is_fua(connection: &Connection, request: &Request) -> bool {
    request.flags & command_flag::FUA != 0 || connection.export().writethrough
}

fn failed(error: &IoError, text: &'static str) -> Refusal {
    tracing::debug!(%error, "NBD request failed");
    refused(error.errno, text)
}

async fn read(
    connection: &Connection,
    in_flight: &InFlight,
    offset: u64,
    len: u64,
    in_one: bool,
) -> (Outcome, Option<Buffer>) {
    if len == 0 {
        return (Outcome::Read(Vec::new()), None);
    }
    let (known, known_end) = connection.known_data.get();
    let sparse = !in_one
        && len >= MIN_SPARSE_READ
        && Sectors::of(offset, len).whole
        && !(known <= offset && offset + len <= known_end);
    let pieces = match sparse {
        true => look_for_holes(connection, in_flight, offset, len).await,
        false => vec![(offset, len, true)],
    };
    let total = match pieces.as_slice() {
        [(_, _, false)] => 0,
        _ => Sectors::of(offset, len).len(),
    };
    if total == 0 {
        let zeroes = Piece {
            offset,
            content: Content::Zeroes(len as u32),
        };
        return (Outcome::Read(vec![zeroes]), None);
    }
    let buffer = connection.buffers.borrow_mut().take(total as usize);
    let all = buffer.io_vec(total as usize);
    let first = Sectors::of(offset, len).start;
    let mut parts = Vec::with_capacity(pieces.len());
    for (at, len, data) in pieces {
        let content = if data {
            let sectors = Sectors::of(at, len);
            let into = all.slice((sectors.start - first) as usize, sectors.len() as usize);
            if let Err(error) = in_flight.read(sectors.start, into).await {
                let refusal = failed(&error, "Reading failed");
                return (Outcome::Refused(refusal), Some(buffer));
            }
            Content::Data(all.slice((at - first) as usize, len as usize))
        } else {
            Content::Zeroes(len as u32)
        };
        parts.push(Piece {
            offset: at,
            content,
        });
    }
    (Outcome::Read(parts), Some(buffer))
}

/// Parts of the range, in order: offset, length, and whether it has to be read. All
/// of it where it cannot be told.
async fn look_for_holes(
    connection: &Connection,
    in_flight: &InFlight,
    offset: u64,
    len: u64,
) -> Vec<(u64, u64, bool)> {
    let end = offset + len;
    let look_end = connection.export().size.min(end.max(offset + LOOK_AHEAD));
    let mut parts: Vec<(u64, u64, bool)> = Vec::new();
    let mut at = offset;
    while at < end {
        let extent = match parts.len() {
            MAX_PIECES.. => None,
            _ => in_flight
                .node()
                .chain_status(None, at, look_end - at)
                .await
                .ok(),
        };
        let (found, data) = extent.map_or((end - at, true), |extent| (extent.len, !extent.zero));
        if data && extent.is_some() {
            connection.known_data.set((at, at + found));
        }
        let here = found.min(end - at);
        match parts.last_mut() {
            Some((_, len, same)) if *same == data => *len += here,
            _ => parts.push((at, here, data)),
        }
        at += here;
    }
    parts
}

async fn write(
    connection: &Connection,
    in_flight: &InFlight,
    offset: u64,
    len: u64,
    data: &Buffer,
    fua: bool,
) -> Result<(), IoError> {
    let sectors = Sectors::of(offset, len);
    let data = data.io_vec(len as usize);
    let flags = WriteFlags {
        fua,
        unchanged: false,
    };
    if sectors.whole {
        let _order = connection.export().sectors.whole().await;
        return in_flight.write(offset, data, flags).await;
    }
    let _alone = connection.export().sectors.parts().await;
    let around = AlignedBuffer::new(sectors.len() as usize).io_vec(sectors.len() as usize);
    read_edges(in_flight, sectors, &around).await?;
    around.copy_from_iov((offset - sectors.start) as usize, &data);
    in_flight.write(sectors.start, around, flags).await
}

/// Reads the first and the last of `sectors` to where they belong in `into`.
async fn read_edges(
    in_flight: &InFlight,
    sectors: Sectors,
    into: &crate::buffer::IoVec,
) -> Result<(), IoError> {
    let sector = SECTOR_SIZE as usize;
    in_flight.read(sectors.start, into.slice(0, sector)).await?;
    if sectors.len() > SECTOR_SIZE {
        let last = sectors.len() as usize - sector;
        in_flight
            .read(sectors.end - SECTOR_SIZE, into.slice(last, sector))
            .await?;
    }
    Ok(())
}

/// The request may be for all of a large disk, and the storage may have to write it
/// all.
async fn zeroes_in_pieces(
    connection: &Connection,
    mut in_flight: InFlight,
    request: &Request,
) -> Result<(), IoError> {
    let flags = ZeroFlags {
        fua: is_fua(connection, request),
        may_unmap: request.flags & command_flag::NO_HOLE == 0,
        no_fallback: request.flags & command_flag::FAST_ZERO != 0,
    };
    let end = request.offset + request.len;
    let mut at = request.offset;
    loop {
        let piece_end = end.min((at / ZERO_PIECE + 1) * ZERO_PIECE);
        write_zeroes(connection, &in_flight, at, piece_end - at, flags).await?;
        at = piece_end;
        if at >= end {
            return Ok(());
        }
        if connection.is_ended() {
            // Nobody will hear how it ended.
            return Err(in_flight.error(IoOp::WriteZeroes, at, end - at, libc::ESHUTDOWN));
        }
        drop(in_flight);
        in_flight = connection.export().backend.enter().await;
    }
}

async fn write_zeroes(
    connection: &Connection,
    in_flight: &InFlight,
    offset: u64,
    len: u64,
    flags: ZeroFlags,
) -> Result<(), IoError> {
    let sectors = Sectors::of(offset, len);
    if sectors.whole {
        let _order = connection.export().sectors.whole().await;
        return in_flight.write_zeroes(offset, len, flags).await;
    }
    let _alone = connection.export().sectors.parts().await;
    let end = offset + len;
    let middle = offset.next_multiple_of(SECTOR_SIZE)..end / SECTOR_SIZE * SECTOR_SIZE;
    if middle.start >= middle.end {
        // No whole sector in it.
        return zero_parts(in_flight, offset, end, flags.fua).await;
    }
    zero_parts(in_flight, offset, middle.start, flags.fua).await?;
    in_flight
        .write_zeroes(middle.start, middle.end - middle.start, flags)
        .await?;
    zero_parts(in_flight, middle.end, end, flags.fua).await
}

/// Zeroes a range that touches two sectors at most, and leaves the rest of them.
async fn zero_parts(in_flight: &InFlight, offset: u64, end: u64, fua: bool) -> Result<(), IoError> {
    if offset == end {
        return Ok(());
    }
    let sectors = Sectors::of(offset, end - offset);
    let around = AlignedBuffer::new(sectors.len() as usize).io_vec(sectors.len() as usize);
    read_edges(in_flight, sectors, &around).await?;
    around
        .slice((offset - sectors.start) as usize, (end - offset) as usize)
        .fill(0);
    let flags = WriteFlags {
        fua,
        unchanged: false,
    };
    in_flight.write(sectors.start, around, flags).await
}

/// Discards the whole sectors of the range: it is a hint.
async fn trim(
    connection: &Connection,
    in_flight: &InFlight,
    offset: u64,
    len: u64,
    fua: bool,
) -> Result<(), IoError> {
    let start = offset.next_multiple_of(SECTOR_SIZE);
    let end = (offset + len) / SECTOR_SIZE * SECTOR_SIZE;
    if start < end {
        let _order = connection.export().sectors.whole().await;
        in_flight.discard(start, end - start).await?;
    }
    if fua {
        in_flight.flush().await?;
    }
    Ok(())
}

/// Reads the range and forgets it, so that what is below has it at hand.
async fn cache(in_flight: &InFlight, offset: u64, len: u64) -> Result<(), IoError> {
    let Sectors { start, end, .. } = Sectors::of(offset, len);
    let buffer = AlignedBuffer::new(CACHE_PIECE.min(end - start) as usize);
    let mut at = start;
    while at < end {
        let piece = CACHE_PIECE.min(end - at);
        in_flight.read(at, buffer.io_vec(piece as usize)).await?;
        at += piece;
    }
    Ok(())
}

/// Extents of each chosen context, from the beginning of the range on.
async fn status(
    connection: &Connection,
    in_flight: &InFlight,
    offset: u64,
    len: u64,
    one: bool,
) -> Result<Vec<(u32, Vec<BlockDescriptor>)>, IoError> {
    let begun = Instant::now();
    let contexts = &connection.contexts;
    let most = (2 * MAX_EXTENTS / (2 + contexts.bitmaps.len())).max(1);
    let most = if one { 1 } else { most };
    let enough = |extents: usize| extents >= most || begun.elapsed() > STATUS_TIME;
    let mut chosen = Vec::with_capacity(2 + contexts.bitmaps.len());
    if contexts.base_allocation || contexts.allocation_depth {
        let end = offset + len;
        let sectors = Sectors::of(offset, len);
        let mut allocation: Vec<BlockDescriptor> = Vec::new();
        let mut depths: Vec<BlockDescriptor> = Vec::new();
        let mut at = sectors.start;
        while at < sectors.end {
            let extent = in_flight
                .node()
                .chain_status(None, at, sectors.end - at)
                .await?;
            let len = end.min(at + extent.len) - offset.max(at);
            at += extent.len;
            let mut flags = 0;
            if !extent.data {
                flags |= allocation_flag::HOLE;
            }
            if extent.zero {
                flags |= allocation_flag::ZERO;
            }
            push(&mut allocation, len, flags.into());
            push(&mut depths, len, extent.depth.into());
            if enough(allocation.len().max(depths.len())) {
                break;
            }
        }
        if contexts.base_allocation {
            chosen.push((BASE_ALLOCATION_ID, allocation));
        }
        if contexts.allocation_depth {
            chosen.push((ALLOCATION_DEPTH_ID, depths));
        }
    }
    for place in &contexts.bitmaps {
        if let Some(bitmap) = connection.export().bitmaps.get(*place) {
            let extents = dirty(&bitmap.bits(), offset, len, enough);
            chosen.push((FIRST_BITMAP_ID + *place as u32, extents));
        }
    }
    Ok(chosen)
}

/// Dirty and clean extents, from the beginning of the range on, until there are
/// `enough`: one at least. What is past the bitmap's end is clean.
fn dirty(
    bits: &DirtyBitmap,
    offset: u64,
    len: u64,
    enough: impl Fn(usize) -> bool,
) -> Vec<BlockDescriptor> {
    let end = offset + len;
    let mut extents = Vec::new();
    let mut at = offset;
    while at < end {
        let run = bits.next_dirty_area(at, end - at);
        let (start, stop) = run.map_or((end, end), |run| (run.start.min(end), run.end.min(end)));
        if start > at {
            push(&mut extents, start - at, 0);
            at = start;
        } else {
            push(&mut extents, stop - at, DIRTY.into());
            at = stop;
        }
        if enough(extents.len()) {
            break;
        }
    }
    extents
}

fn push(extents: &mut Vec<BlockDescriptor>, len: u64, status: u64) {
    match extents.last_mut() {
        Some(last) if last.status == status => last.len += len,
        _ => extents.push(BlockDescriptor { len, status }),
    }
}
