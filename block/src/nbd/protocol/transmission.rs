//! Messages of the transmission phase.

use super::{
    Cursor, EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, ProtocolError, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, expect_magic,
};

/// Header of a request. § "Request message".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How it is to be done ([`command_flag`](super::command_flag)).
    pub flags: u16,
    /// What is to be done ([`command`](super::command)).
    pub command: u16,
    /// The client's name for it, given back in the reply.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes: below 2^32 with compact headers.
    pub len: u64,
}

impl Request {
    /// Length of a compact header on the wire.
    pub const COMPACT_LEN: usize = 28;
    /// Length of an extended header on the wire.
    pub const EXTENDED_LEN: usize = 32;

    /// Reads a compact header.
    pub fn decode_compact(bytes: &[u8; Self::COMPACT_LEN]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("request", bytes);
        expect_magic("request", cursor.u32()?.into(), REQUEST_MAGIC.into())?;
        Ok(Self {
            flags: cursor.u16()?,
            command: cursor.u16()?,
            cookie: cursor.u64()?,
            offset: cursor.u64()?,
            len: cursor.u32()?.into(),
        })
    }

    /// Reads an extended header.
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_LEN]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("request", bytes);
        expect_magic(
            "request",
            cursor.u32()?.into(),
            EXTENDED_REQUEST_MAGIC.into(),
        )?;
        Ok(Self {
            flags: cursor.u16()?,
            command: cursor.u16()?,
            cookie: cursor.u64()?,
            offset: cursor.u64()?,
            len: cursor.u64()?,
        })
    }

    /// Appends a compact header. A length of 2^32 or more does not fit: the caller
    /// splits such requests.
    pub fn encode_compact(self, out: &mut Vec<u8>) {
        debug_assert!(u32::try_from(self.len).is_ok());
        out.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        self.encode_middle(out);
        out.extend_from_slice(&(self.len as u32).to_be_bytes());
    }

    /// Appends an extended header.
    pub fn encode_extended(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&EXTENDED_REQUEST_MAGIC.to_be_bytes());
        self.encode_middle(out);
        out.extend_from_slice(&self.len.to_be_bytes());
    }

    fn encode_middle(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&self.command.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
    }
}

/// A simple reply; data follows if a read succeeded. § "Simple reply message".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReplyHeader {
    /// The specification's number ([`errno_from_wire`](super::errno_from_wire)); 0
    /// for success.
    pub error: u32,
    /// Of the request.
    pub cookie: u64,
}

impl SimpleReplyHeader {
    /// Length on the wire.
    pub const LEN: usize = 16;

    /// Reads a header.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("simple reply", bytes);
        expect_magic(
            "simple reply",
            cursor.u32()?.into(),
            SIMPLE_REPLY_MAGIC.into(),
        )?;
        Ok(Self {
            error: cursor.u32()?,
            cookie: cursor.u64()?,
        })
    }

    /// Appends the header.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.error.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
    }
}

/// Header of one chunk of a structured reply, or of one with extended headers.
/// § "Structured reply chunk message", "Extended reply chunk message".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// See [`chunk_flag`](super::chunk_flag).
    pub flags: u16,
    /// What the payload is ([`chunk`]).
    pub kind: u16,
    /// Of the request.
    pub cookie: u64,
    /// The request's offset again; extended headers only, else 0.
    pub offset: u64,
    /// Length of the payload in bytes. The peer's word: to be bounded.
    pub len: u64,
}

impl ChunkHeader {
    /// Length of a structured header on the wire.
    pub const STRUCTURED_LEN: usize = 20;
    /// Length of an extended header on the wire.
    pub const EXTENDED_LEN: usize = 32;

    /// Reads a structured header.
    pub fn decode_structured(bytes: &[u8; Self::STRUCTURED_LEN]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("reply chunk", bytes);
        expect_magic(
            "reply chunk",
            cursor.u32()?.into(),
            STRUCTURED_REPLY_MAGIC.into(),
        )?;
        Ok(Self {
            flags: cursor.u16()?,
            kind: cursor.u16()?,
            cookie: cursor.u64()?,
            offset: 0,
            len: cursor.u32()?.into(),
        })
    }

    /// Reads an extended header.
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_LEN]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("reply chunk", bytes);
        expect_magic(
            "reply chunk",
            cursor.u32()?.into(),
            EXTENDED_REPLY_MAGIC.into(),
        )?;
        Ok(Self {
            flags: cursor.u16()?,
            kind: cursor.u16()?,
            cookie: cursor.u64()?,
            offset: cursor.u64()?,
            len: cursor.u64()?,
        })
    }

    /// Appends a structured header. `offset` is left out; a length of 2^32 or more
    /// does not fit.
    pub fn encode_structured(self, out: &mut Vec<u8>) {
        debug_assert!(u32::try_from(self.len).is_ok());
        out.extend_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&self.kind.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&(self.len as u32).to_be_bytes());
    }

    /// Appends an extended header.
    pub fn encode_extended(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&EXTENDED_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&self.kind.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        out.extend_from_slice(&self.len.to_be_bytes());
    }

    /// Whether it ends the reply.
    pub fn is_done(self) -> bool {
        self.flags & super::chunk_flag::DONE != 0
    }

    /// Whether it is an error, also one of a type that is not known.
    pub fn is_error(self) -> bool {
        self.kind & chunk::ERROR_BIT != 0
    }
}

/// Payload of `OFFSET_HOLE`: offset and length in bytes.
pub fn decode_offset_hole(payload: &[u8]) -> Result<(u64, u32), ProtocolError> {
    let mut cursor = Cursor::new("hole chunk", payload);
    let hole = (cursor.u64()?, cursor.u32()?);
    cursor.end()?;
    Ok(hole)
}

/// Payload of an error chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorChunk<'a> {
    /// The specification's number; never 0 on the wire.
    pub error: u32,
    /// Words for people; may be empty.
    pub message: &'a str,
    /// Where it happened, in bytes; of `ERROR_OFFSET`.
    pub offset: Option<u64>,
}

impl<'a> ErrorChunk<'a> {
    /// Reads the payload of a chunk of type `kind`, which is an error's. What
    /// follows the message in a type that is not known is skipped.
    pub fn decode(kind: u16, payload: &'a [u8]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("error chunk", payload);
        let error = cursor.u32()?;
        let len = cursor.u16()?;
        let message = cursor.text(len.into())?;
        let offset = match kind {
            chunk::ERROR_OFFSET => Some(cursor.u64()?),
            _ => None,
        };
        if matches!(kind, chunk::ERROR | chunk::ERROR_OFFSET) {
            cursor.end()?;
        }
        Ok(Self {
            error,
            message,
            offset,
        })
    }
}

/// Appends the payload of an `ERROR` chunk; `message` is cut to what fits.
pub fn encode_error_chunk(error: u32, message: &str, out: &mut Vec<u8>) {
    let message = &message[..message.floor_char_boundary(super::MAX_STRING)];
    out.extend_from_slice(&error.to_be_bytes());
    out.extend_from_slice(&(message.len() as u16).to_be_bytes());
    out.extend_from_slice(message.as_bytes());
}

/// One extent of a block status reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockDescriptor {
    /// In bytes; never 0 on the wire.
    pub len: u64,
    /// What the context says of it.
    pub status: u64,
}

/// Reads the payload of a `BLOCK_STATUS` or (`extended`) `BLOCK_STATUS_EXT` chunk:
/// number of the context, extents.
///
/// Errors: no extent, one of length 0, or one more or less than was announced.
pub fn decode_block_status(
    extended: bool,
    payload: &[u8],
) -> Result<(u32, Vec<BlockDescriptor>), ProtocolError> {
    const WHAT: &str = "block status chunk";
    let wrong = ProtocolError::Length { what: WHAT };
    let mut cursor = Cursor::new(WHAT, payload);
    let context = cursor.u32()?;
    let announced = if extended { Some(cursor.u32()?) } else { None };
    let body = cursor.rest();
    let unit = if extended { 16 } else { 8 };
    if body.is_empty() || !body.len().is_multiple_of(unit) {
        return Err(wrong);
    }
    if announced.is_some_and(|count| count as usize != body.len() / unit) {
        return Err(wrong);
    }
    let mut cursor = Cursor::new(WHAT, body);
    let mut extents = Vec::with_capacity(body.len() / unit);
    while !cursor.bytes.is_empty() {
        let extent = if extended {
            BlockDescriptor {
                len: cursor.u64()?,
                status: cursor.u64()?,
            }
        } else {
            BlockDescriptor {
                len: cursor.u32()?.into(),
                status: cursor.u32()?.into(),
            }
        };
        if extent.len == 0 {
            return Err(wrong);
        }
        extents.push(extent);
    }
    Ok((context, extents))
}

/// Appends the payload of a `BLOCK_STATUS` or (`extended`) `BLOCK_STATUS_EXT` chunk.
/// Without `extended`, lengths and status have to fit 32 bits.
pub fn encode_block_status(
    extended: bool,
    context: u32,
    extents: &[BlockDescriptor],
    out: &mut Vec<u8>,
) {
    out.extend_from_slice(&context.to_be_bytes());
    if extended {
        out.extend_from_slice(&(extents.len() as u32).to_be_bytes());
    }
    for extent in extents {
        if extended {
            out.extend_from_slice(&extent.len.to_be_bytes());
            out.extend_from_slice(&extent.status.to_be_bytes());
        } else {
            out.extend_from_slice(&(extent.len as u32).to_be_bytes());
            out.extend_from_slice(&(extent.status as u32).to_be_bytes());
        }
    }
}
