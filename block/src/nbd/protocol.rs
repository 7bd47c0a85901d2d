//! What NBD peers say to each other: numbers, headers, payloads.
//!
//! The source is `doc/proto.md` of the NetworkBlockDevice project ("the NBD
//! specification"); section names are quoted where something is defined. Only
//! fixed newstyle negotiation is known here.
//!
//! No I/O and no state: functions between bytes and values. All integers are
//! big-endian. Decoders take bytes of a hostile peer: they check lengths, never
//! panic, and allocate no more than they were given. Encoders append to a buffer.
//!
//! - `negotiation`: options and their replies, until transmission begins;
//! - `transmission`: requests, replies, chunks.

mod negotiation;
#[cfg(test)]
mod tests;
mod transmission;

pub use negotiation::{
    BlockSizes, ExportInfo, InfoRequest, MetaContextRequest, OptionHeader, OptionReplyHeader,
    decode_meta_context, encode_meta_context,
};
pub use transmission::{
    BlockDescriptor, ChunkHeader, ErrorChunk, Request, SimpleReplyHeader, decode_block_status,
    decode_offset_hole, encode_block_status, encode_error_chunk,
};

/// TCP port that is registered for NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// Begins the server's greeting: `NBDMAGIC`. § "Newstyle negotiation".
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting, and before each option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option. § "Fixed newstyle negotiation".
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request with a compact header. § "Request message".
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each request with an extended header.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Before each simple reply. § "Simple reply message".
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before each chunk of a structured reply. § "Structured reply chunk message".
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Before each chunk of a reply with extended headers. § "Extended reply chunk
/// message".
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest string (export or context name, description) in bytes. § "Values":
/// "String values".
pub const MAX_STRING: usize = 4096;
/// Longest payload that every peer must take where block sizes were not agreed
/// on, in bytes. § "Block size constraints".
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// Flags of the server's greeting and, under the same numbers, of the client's
/// answer. § "Handshake phase": "Handshake flags", "Client flags".
pub mod handshake_flag {
    /// Fixed newstyle: unknown options are answered.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zero bytes after `EXPORT_NAME` are left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Bytes of padding after the reply to `EXPORT_NAME` without `NO_ZEROES`.
pub const EXPORT_NAME_PADDING: usize = 124;

/// What an export can do. § "Transmission flags".
pub mod transmission_flag {
    /// The field is valid.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` is known.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The `FUA` flag is known.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Behaves like a rotating disk.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// `TRIM` is known.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` and its `NO_HOLE` are known.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The `DF` flag is known.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see one disk: what one has written and flushed, all see.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `RESIZE` is known (an experimental extension).
    pub const SEND_RESIZE: u16 = 1 << 9;
    /// `CACHE` is known.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The `FAST_ZERO` flag is known.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// `BLOCK_STATUS` takes a payload that chooses contexts.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Options of the client. § "Option types".
pub mod option {
    /// Ends negotiation with the named export, without a way to refuse.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the session.
    pub const ABORT: u32 = 2;
    /// Lists the exports.
    pub const LIST: u32 = 3;
    /// Withdrawn.
    pub const PEEK_EXPORT: u32 = 4;
    /// Upgrades to TLS.
    pub const STARTTLS: u32 = 5;
    /// Asks for details of an export.
    pub const INFO: u32 = 6;
    /// As `INFO`, and ends negotiation.
    pub const GO: u32 = 7;
    /// Asks for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Lists the metadata contexts that match.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts for `BLOCK_STATUS`.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Asks for extended headers (and structured replies with them).
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options. § "Option reply types". Errors have bit 31 set.
pub mod option_reply {
    /// Bit of all errors.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// Done, or end of a list.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One detail of an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// Forbidden by policy.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// Badly formed, or at the wrong time.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// Not possible on this platform.
    pub const ERR_PLATFORM: u32 = ERROR_BIT | 4;
    /// TLS comes first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is shutting down.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The client has to ask for block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// Too large to handle.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
    /// The client has to ask for extended headers.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT | 10;
}

/// Kinds of `INFO` replies, and of requests for them. § "`NBD_REP_INFO`".
pub mod info {
    /// Size and transmission flags. Always sent.
    pub const EXPORT: u16 = 0;
    /// The export's canonical name.
    pub const NAME: u16 = 1;
    /// A description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum and preferred block size, largest payload.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Types of requests. § "Request types".
pub mod command {
    /// Reads.
    pub const READ: u16 = 0;
    /// Writes; data follows the header.
    pub const WRITE: u16 = 1;
    /// Ends the session; no reply.
    pub const DISC: u16 = 2;
    /// Makes what was written durable.
    pub const FLUSH: u16 = 3;
    /// Frees a range.
    pub const TRIM: u16 = 4;
    /// Reads ahead into a cache.
    pub const CACHE: u16 = 5;
    /// Writes zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Asks what a range is, in the contexts that were chosen.
    pub const BLOCK_STATUS: u16 = 7;
    /// Resizes (an experimental extension).
    pub const RESIZE: u16 = 8;
}

/// Flags of requests. § "Command flags".
pub mod command_flag {
    /// Durable when answered.
    pub const FUA: u16 = 1 << 0;
    /// `WRITE_ZEROES` must not make a hole.
    pub const NO_HOLE: u16 = 1 << 1;
    /// `READ` must be answered in one chunk.
    pub const DF: u16 = 1 << 2;
    /// `BLOCK_STATUS` must be answered with one extent, inside the range.
    pub const REQ_ONE: u16 = 1 << 3;
    /// `WRITE_ZEROES` must fail quickly where it is no faster than a write.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length field is that of a payload. With extended headers only.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Flags of chunks. § "Structured reply flags".
pub mod chunk_flag {
    /// The last chunk of a reply.
    pub const DONE: u16 = 1 << 0;
}

/// Types of chunks. § "Structured reply types". Errors have bit 15 set.
pub mod chunk {
    /// Bit of all errors.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// Nothing; ends a reply.
    pub const NONE: u16 = 0;
    /// An offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset and a number of zero bytes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of one context, 32 bits each.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents of one context, 64 bits each. With extended headers only.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error of the whole request.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Name of the metadata context of allocation. § "`base:allocation` metadata
/// context".
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Flags of the extents of `base:allocation`.
pub mod allocation_flag {
    /// Not allocated.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Name of QEMU's context that tells how many layers down the data is: 0 not
/// allocated, 1 in the top layer, 2 in its backing image, ….
pub const QEMU_ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// QEMU's contexts of dirty bitmaps begin so; the bitmap's name follows.
pub const QEMU_DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// In the status of a dirty bitmap's context: the range is dirty.
pub const DIRTY: u32 = 1 << 0;

/// What the specification calls an error, from Linux's number of it. What it has
/// no number for is `EINVAL` there, as is `EACCES`, which a snapshot gives. § "Error
/// values".
pub fn errno_to_wire(errno: i32) -> u32 {
    match errno {
        libc::EPERM | libc::EROFS => 1,
        libc::EIO => 5,
        libc::ENOMEM => 12,
        libc::ENOSPC | libc::EFBIG | libc::EDQUOT => 28,
        libc::EOVERFLOW => 75,
        libc::EOPNOTSUPP => 95,
        libc::ESHUTDOWN => 108,
        _ => 22,
    }
}

/// Linux's number of an error of the specification: `EINVAL` for those that it
/// does not have, as it demands. 0 stays 0 (no error).
pub fn errno_from_wire(error: u32) -> i32 {
    match error {
        0 => 0,
        1 => libc::EPERM,
        5 => libc::EIO,
        12 => libc::ENOMEM,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::EOPNOTSUPP,
        108 => libc::ESHUTDOWN,
        _ => libc::EINVAL,
    }
}

/// A peer's bytes that make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A magic number is not the expected one.
    #[error("Bad magic number {found:#x} in the NBD {what}")]
    Magic {
        /// Which message.
        what: &'static str,
        /// What was there instead.
        found: u64,
    },
    /// A payload is not as long as its content says.
    #[error("The NBD {what} has a wrong length")]
    Length {
        /// Which message.
        what: &'static str,
    },
    /// A string is longer than [`MAX_STRING`] or not UTF-8.
    #[error("The NBD {what} has a bad string")]
    Text {
        /// Which message.
        what: &'static str,
    },
}

/// Takes big-endian integers and strings off a message, front to back.
struct Cursor<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Cursor<'a> {
    fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { bytes, what }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], ProtocolError> {
        let (taken, rest) = self
            .bytes
            .split_at_checked(len)
            .ok_or(ProtocolError::Length { what: self.what })?;
        self.bytes = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let (taken, rest) = self
            .bytes
            .split_first_chunk::<N>()
            .ok_or(ProtocolError::Length { what: self.what })?;
        self.bytes = rest;
        Ok(*taken)
    }

    fn u16(&mut self) -> Result<u16, ProtocolError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, ProtocolError> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, ProtocolError> {
        self.array().map(u64::from_be_bytes)
    }

    fn text(&mut self, len: usize) -> Result<&'a str, ProtocolError> {
        let bytes = self.take(len)?;
        if len > MAX_STRING {
            return Err(ProtocolError::Text { what: self.what });
        }
        std::str::from_utf8(bytes).map_err(|_| ProtocolError::Text { what: self.what })
    }

    /// A string with its length before it.
    fn counted_text(&mut self) -> Result<&'a str, ProtocolError> {
        let len = self.u32()?;
        self.text(len as usize)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    fn rest_text(&mut self) -> Result<&'a str, ProtocolError> {
        self.text(self.bytes.len())
    }

    fn end(self) -> Result<(), ProtocolError> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        Err(ProtocolError::Length { what: self.what })
    }
}

fn expect_magic(what: &'static str, found: u64, expected: u64) -> Result<(), ProtocolError> {
    if found == expected {
        return Ok(());
    }
    Err(ProtocolError::Magic { what, found })
}
