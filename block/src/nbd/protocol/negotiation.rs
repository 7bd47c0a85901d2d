//! Messages of the handshake phase.

use super::{
    Cursor, OPTION_MAGIC, OPTION_REPLY_MAGIC, ProtocolError, expect_magic, info, option_reply,
};

/// Before the data of an option. § "Fixed newstyle negotiation".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which one ([`option`](super::option)).
    pub option: u32,
    /// Length of its data in bytes. The peer's word: to be bounded.
    pub len: u32,
}

impl OptionHeader {
    /// Length on the wire.
    pub const LEN: usize = 16;

    /// Reads a header.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("option", bytes);
        expect_magic("option", cursor.u64()?, OPTION_MAGIC)?;
        Ok(Self {
            option: cursor.u32()?,
            len: cursor.u32()?,
        })
    }

    /// Appends the header.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.option.to_be_bytes());
        out.extend_from_slice(&self.len.to_be_bytes());
    }
}

/// Before the data of a reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: u32,
    /// What it says ([`option_reply`]).
    pub reply: u32,
    /// Length of its data in bytes. The peer's word: to be bounded.
    pub len: u32,
}

impl OptionReplyHeader {
    /// Length on the wire.
    pub const LEN: usize = 20;

    /// Reads a header.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("option reply", bytes);
        expect_magic("option reply", cursor.u64()?, OPTION_REPLY_MAGIC)?;
        Ok(Self {
            option: cursor.u32()?,
            reply: cursor.u32()?,
            len: cursor.u32()?,
        })
    }

    /// Appends the header.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.option.to_be_bytes());
        out.extend_from_slice(&self.reply.to_be_bytes());
        out.extend_from_slice(&self.len.to_be_bytes());
    }

    /// Whether it is an error.
    pub fn is_error(self) -> bool {
        self.reply & option_reply::ERROR_BIT != 0
    }
}

/// Data of `INFO` and `GO`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// Which export; empty for the default one.
    pub export: &'a str,
    /// What the client would like to be told ([`info`]).
    pub wanted: Vec<u16>,
}

impl<'a> InfoRequest<'a> {
    /// Reads the data of the option.
    pub fn decode(data: &'a [u8]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("INFO option", data);
        let export = cursor.counted_text()?;
        let count = cursor.u16()?;
        let wanted = (0..count).map(|_| cursor.u16()).collect::<Result<_, _>>()?;
        cursor.end()?;
        Ok(Self { export, wanted })
    }

    /// Appends the data of the option. The caller bounds both members.
    pub fn encode(&self, out: &mut Vec<u8>) {
        push_counted(out, self.export);
        out.extend_from_slice(&(self.wanted.len() as u16).to_be_bytes());
        for kind in &self.wanted {
            out.extend_from_slice(&kind.to_be_bytes());
        }
    }
}

/// Size and abilities of an export: data of `INFO_EXPORT`, and, without the type
/// before it, of the answer to `EXPORT_NAME`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// In bytes.
    pub size: u64,
    /// What it can do ([`transmission_flag`](super::transmission_flag)).
    pub flags: u16,
}

impl ExportInfo {
    /// Length on the wire.
    pub const LEN: usize = 10;

    /// Reads it; `bytes` begin after the type.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("export information", bytes);
        let this = Self {
            size: cursor.u64()?,
            flags: cursor.u16()?,
        };
        cursor.end()?;
        Ok(this)
    }

    /// Appends it, without the type.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.size.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
    }
}

/// Data of `INFO_BLOCK_SIZE`, all in bytes. § "Block size constraints".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// What offsets and lengths must be a multiple of. A power of two.
    pub minimum: u32,
    /// What they had better be a multiple of. A power of two.
    pub preferred: u32,
    /// Longest payload.
    pub maximum: u32,
}

impl BlockSizes {
    /// Reads it; `bytes` begin after the type.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("block sizes", bytes);
        let this = Self {
            minimum: cursor.u32()?,
            preferred: cursor.u32()?,
            maximum: cursor.u32()?,
        };
        cursor.end()?;
        Ok(this)
    }

    /// Appends it, with the type.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        for size in [self.minimum, self.preferred, self.maximum] {
            out.extend_from_slice(&size.to_be_bytes());
        }
    }
}

/// Data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetaContextRequest<'a> {
    /// Which export; empty for the default one.
    pub export: &'a str,
    /// Names of contexts, or of groups of them (`base:`).
    pub queries: Vec<&'a str>,
}

impl<'a> MetaContextRequest<'a> {
    /// Reads the data of the option.
    pub fn decode(data: &'a [u8]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("META_CONTEXT option", data);
        let export = cursor.counted_text()?;
        let count = cursor.u32()?;
        // Not reserved in advance: the count is the peer's word, while every query
        // has at least its length in the data.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(cursor.counted_text()?);
        }
        cursor.end()?;
        Ok(Self { export, queries })
    }

    /// Appends the data of the option. The caller bounds both members.
    pub fn encode(&self, out: &mut Vec<u8>) {
        push_counted(out, self.export);
        out.extend_from_slice(&(self.queries.len() as u32).to_be_bytes());
        for query in &self.queries {
            push_counted(out, query);
        }
    }
}

/// Reads the data of `REP_META_CONTEXT`: number and name.
pub fn decode_meta_context(data: &[u8]) -> Result<(u32, &str), ProtocolError> {
    let mut cursor = Cursor::new("META_CONTEXT reply", data);
    Ok((cursor.u32()?, cursor.rest_text()?))
}

/// Appends the data of `REP_META_CONTEXT`.
pub fn encode_meta_context(id: u32, name: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(name.as_bytes());
}

fn push_counted(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}
