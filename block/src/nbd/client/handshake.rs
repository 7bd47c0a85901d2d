//! The handshake: from a fresh connection to an agreed export.
//!
//! The server is not trusted: every reply is bounded in length, and their number.
//! Time is bounded by the caller. What does not live here: requests (`transmission`).

use std::io;

use super::error::NbdError;
use super::socket::Socket;
use crate::nbd::protocol::{
    BASE_ALLOCATION, BlockSizes, EXPORT_NAME_PADDING, ExportInfo, INIT_MAGIC, InfoRequest,
    MAX_PAYLOAD, MAX_STRING, MetaContextRequest, OPTION_MAGIC, OptionHeader, OptionReplyHeader,
    decode_meta_context, handshake_flag, info, option, option_reply, transmission_flag,
};

/// Second word of the greeting of a server that knows no options. § "Oldstyle
/// negotiation".
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Client flags are of 32 bits, of which those of the server are the lower half.
const CLIENT_FLAGS: u32 =
    (handshake_flag::FIXED_NEWSTYLE as u32) | (handshake_flag::NO_ZEROES as u32);
/// Replies to one option. Two or three are usual.
const MAX_REPLIES: u32 = 64;
/// Data of one reply: the longest string, and what goes with it.
const MAX_REPLY_LEN: u32 = MAX_STRING as u32 + 64;
/// Words of an error reply beyond this are not read into memory.
const MAX_SKIPPED: u32 = 1 << 20;
/// Largest minimum block size. § "Block size constraints".
const MAX_MINIMUM_BLOCK: u32 = 64 << 10;
/// Unit of requests that nodes know, in bytes.
const SECTOR: u32 = 512;
/// Largest disk, as QEMU has it.
const MAX_SIZE: u64 = i64::MAX as u64 / (1 << 30) * (1 << 30);

/// How the two sides write requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeaderStyle {
    /// Simple replies only.
    Simple,
    /// Structured replies; requests as before.
    Structured,
    /// Extended requests and replies.
    Extended,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Export {
    /// Size in bytes.
    pub(crate) size: u64,
    /// What it can do ([`transmission_flag`]).
    pub(crate) flags: u16,
    /// What offsets and lengths must be a multiple of; a power of two.
    pub(crate) min_block: u32,
    /// What they had better be a multiple of; a power of two.
    pub(crate) preferred_block: u32,
    /// Longest payload in bytes: a multiple of `min_block` and of a sector.
    pub(crate) max_payload: u32,
    pub(super) style: HeaderStyle,
    /// Number of the context that block status is asked of, if there is one.
    pub(super) context: Option<u32>,
}

impl Export {
    /// Whether the server has all of `flags`.
    pub(crate) fn can(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }

    /// Whether the server tells the block status.
    pub(crate) fn has_status(&self) -> bool {
        self.context.is_some()
    }

    /// Longest range in bytes of a request without payload.
    pub(crate) fn max_range(&self) -> u64 {
        match self.style {
            HeaderStyle::Extended => 1 << 62,
            // A power of two, so that pieces stay aligned.
            HeaderStyle::Simple | HeaderStyle::Structured => 1 << 31,
        }
    }

    fn new(
        found: ExportInfo,
        blocks: Option<BlockSizes>,
        style: HeaderStyle,
        context: Option<u32>,
    ) -> Result<Self, NbdError> {
        let blocks = blocks.unwrap_or(BlockSizes {
            minimum: 1,
            preferred: 4096,
            maximum: MAX_PAYLOAD,
        });
        let (min, preferred) = (blocks.minimum, blocks.preferred);
        if !min.is_power_of_two() {
            return Err(NbdError::MinimumBlockSize(min));
        }
        if min > MAX_MINIMUM_BLOCK {
            return Err(NbdError::LargeBlockSize {
                found: min,
                limit: MAX_MINIMUM_BLOCK,
            });
        }
        if !preferred.is_power_of_two() || preferred < min {
            return Err(NbdError::PreferredBlockSize(preferred));
        }
        let unit = min.max(SECTOR);
        let max_payload = blocks.maximum.min(MAX_PAYLOAD) / unit * unit;
        if max_payload == 0 {
            return Err(NbdError::MaximumBlockSize(blocks.maximum));
        }
        if found.size > MAX_SIZE {
            return Err(NbdError::TooLarge);
        }
        if !found.size.is_multiple_of(min.into()) {
            return Err(NbdError::PartialBlock {
                size: found.size,
                block: min,
            });
        }
        Ok(Self {
            size: found.size,
            // Without the first one the others mean nothing.
            flags: match found.flags & transmission_flag::HAS_FLAGS {
                0 => 0,
                _ => found.flags,
            },
            min_block: min,
            preferred_block: preferred,
            max_payload,
            style,
            context,
        })
    }

    /// Checks that `again`, offered after a reconnect, can stand for this one:
    /// users rely on what they were told once.
    pub(super) fn check_still_there(&self, again: &Self) -> Result<(), NbdError> {
        const NEEDED: u16 = transmission_flag::SEND_FLUSH
            | transmission_flag::SEND_FUA
            | transmission_flag::SEND_TRIM
            | transmission_flag::SEND_WRITE_ZEROES
            | transmission_flag::SEND_FAST_ZERO;
        let lost = if self.size != again.size {
            "its size is another"
        } else if again.can(transmission_flag::READ_ONLY) && !self.can(transmission_flag::READ_ONLY)
        {
            "it can only be read"
        } else if !again.can(self.flags & NEEDED) {
            "it can do less"
        } else if again.min_block > self.min_block || again.max_payload < self.max_payload {
            "its block sizes are others"
        } else if again.max_range() < self.max_range() {
            "it takes shorter requests"
        } else {
            return Ok(());
        };
        Err(NbdError::Changed(lost))
    }
}

/// Agrees with the server at the other end of `socket` on `export`, and on the block status of
/// `context`, or of `base:allocation` if the server has that: names of at most [`MAX_STRING`]
/// bytes.
///
/// Takes as long as the server does: bound it. Cancel: the connection is of no
/// more use.
pub(super) async fn negotiate(
    socket: &Socket,
    export: &str,
    context: Option<&str>,
) -> Result<Export, NbdError> {
    let agreed = agree(socket, export, context.unwrap_or(BASE_ALLOCATION)).await?;
    match context {
        Some(wanted) if !agreed.has_status() => Err(NbdError::NoContext(wanted.to_owned())),
        _ => Ok(agreed),
    }
}

async fn agree(socket: &Socket, export: &str, context: &str) -> Result<Export, NbdError> {
    let magic = read_u64(socket, "initial magic").await?;
    if magic != INIT_MAGIC {
        return Err(NbdError::InitialMagic(magic));
    }
    match read_u64(socket, "server magic").await? {
        OPTION_MAGIC => newstyle(socket, export, context).await,
        OLDSTYLE_MAGIC if export.is_empty() => oldstyle(socket).await,
        OLDSTYLE_MAGIC => Err(NbdError::OldServer),
        other => Err(NbdError::ServerMagic(other)),
    }
}

async fn oldstyle(socket: &Socket) -> Result<Export, NbdError> {
    let size = read_u64(socket, "export length").await?;
    let mut flags = [0; 4];
    read(socket, "export flags", &mut flags).await?;
    read(socket, "reserved block", &mut [0; EXPORT_NAME_PADDING]).await?;
    // The lower half is what the other negotiation gives in 16 bits.
    let flags = u16::from_be_bytes([flags[2], flags[3]]);
    Export::new(ExportInfo { size, flags }, None, HeaderStyle::Simple, None)
}

async fn newstyle(socket: &Socket, export: &str, context: &str) -> Result<Export, NbdError> {
    let mut flags = [0; 2];
    read(socket, "server flags", &mut flags).await?;
    let flags = u16::from_be_bytes(flags);
    let ours = CLIENT_FLAGS & u32::from(flags);
    send(socket, "clientflags field", &ours.to_be_bytes()).await?;
    let no_zeroes = flags & handshake_flag::NO_ZEROES != 0;
    if flags & handshake_flag::FIXED_NEWSTYLE == 0 {
        return export_name(socket, export, no_zeroes, HeaderStyle::Simple, None).await;
    }
    let style = if simple_option(socket, option::EXTENDED_HEADERS).await? {
        HeaderStyle::Extended
    } else if simple_option(socket, option::STRUCTURED_REPLY).await? {
        HeaderStyle::Structured
    } else {
        HeaderStyle::Simple
    };
    let context = match style {
        HeaderStyle::Simple => None,
        HeaderStyle::Structured | HeaderStyle::Extended => {
            set_context(socket, export, context).await?
        }
    };
    match go(socket, export).await? {
        Some((found, blocks)) => Export::new(found, blocks, style, context),
        None => export_name(socket, export, no_zeroes, style, context).await,
    }
}

/// Asks for an option without data that the server has or has not.
async fn simple_option(socket: &Socket, asked: u32) -> Result<bool, NbdError> {
    send_option(socket, asked, &[]).await?;
    let reply = reply_header(socket, asked).await?;
    if reply.is_error() {
        skip(socket, asked, reply.len).await?;
        return Ok(false);
    }
    if reply.reply != option_reply::ACK {
        return Err(NbdError::UnexpectedReply {
            option: asked,
            found: reply.reply,
        });
    }
    match reply.len {
        0 => Ok(true),
        _ => Err(NbdError::BadAck),
    }
}

/// Asks for a context; gives its number if the server has it.
async fn set_context(
    socket: &Socket,
    export: &str,
    context: &str,
) -> Result<Option<u32>, NbdError> {
    const ASKED: u32 = option::SET_META_CONTEXT;
    let mut data = Vec::new();
    MetaContextRequest {
        export,
        queries: vec![context],
    }
    .encode(&mut data);
    send_option(socket, ASKED, &data).await?;
    let mut number = None;
    for _ in 0..MAX_REPLIES {
        let reply = reply_header(socket, ASKED).await?;
        if reply.is_error() {
            skip(socket, ASKED, reply.len).await?;
            return Ok(None);
        }
        match reply.reply {
            option_reply::ACK if reply.len == 0 => return Ok(number),
            option_reply::ACK => return Err(NbdError::BadAck),
            option_reply::META_CONTEXT => {
                let data = reply_data(socket, ASKED, reply.len).await?;
                let (id, name) = decode_meta_context(&data)?;
                if name == context {
                    number = Some(id);
                }
            }
            found => {
                return Err(NbdError::UnexpectedReply {
                    option: ASKED,
                    found,
                });
            }
        }
    }
    Err(NbdError::TooManyReplies { option: ASKED })
}

/// Asks for the export. `None`: the server does not know this way.
async fn go(
    socket: &Socket,
    export: &str,
) -> Result<Option<(ExportInfo, Option<BlockSizes>)>, NbdError> {
    const ASKED: u32 = option::GO;
    let mut data = Vec::new();
    InfoRequest {
        export,
        wanted: vec![info::BLOCK_SIZE],
    }
    .encode(&mut data);
    send_option(socket, ASKED, &data).await?;
    let (mut found, mut blocks) = (None, None);
    for _ in 0..MAX_REPLIES {
        let reply = reply_header(socket, ASKED).await?;
        match reply.reply {
            option_reply::ACK if reply.len > 0 => return Err(NbdError::BadAck),
            option_reply::ACK => {
                return match found {
                    Some(found) => Ok(Some((found, blocks))),
                    None => Err(NbdError::NoExportInfo),
                };
            }
            option_reply::INFO => {
                let data = reply_data(socket, ASKED, reply.len).await?;
                let Some((kind, rest)) = data.split_first_chunk::<2>() else {
                    return Err(NbdError::ShortInfo(reply.len));
                };
                match u16::from_be_bytes(*kind) {
                    info::EXPORT => {
                        let read = ExportInfo::decode(rest)
                            .map_err(|_| NbdError::ExportInfoLength(reply.len - 2))?;
                        // Without this flag the others mean nothing.
                        if read.flags & transmission_flag::HAS_FLAGS == 0 {
                            return Err(NbdError::NoExportInfo);
                        }
                        found = Some(read);
                    }
                    info::BLOCK_SIZE => {
                        let read = BlockSizes::decode(rest)
                            .map_err(|_| NbdError::BlockSizeLength(reply.len - 2))?;
                        blocks = Some(read);
                    }
                    // Names and descriptions that nobody asked for.
                    _ => {}
                }
            }
            option_reply::ERR_UNSUP => {
                skip(socket, ASKED, reply.len).await?;
                return Ok(None);
            }
            _ if reply.is_error() => {
                let message = error_message(socket, reply.len).await?;
                return Err(NbdError::Refused {
                    option: ASKED,
                    reply: reply.reply,
                    message,
                });
            }
            found => return Err(NbdError::ReplyType { found }),
        }
    }
    Err(NbdError::TooManyReplies { option: ASKED })
}

/// Asks for the export of a server that does not know `GO`, and closes the
/// connection if it has none of that name.
async fn export_name(
    socket: &Socket,
    export: &str,
    no_zeroes: bool,
    style: HeaderStyle,
    context: Option<u32>,
) -> Result<Export, NbdError> {
    send_option(socket, option::EXPORT_NAME, export.as_bytes()).await?;
    let mut found = [0; ExportInfo::LEN];
    read(socket, "export length", &mut found).await?;
    let found = ExportInfo::decode(&found)?;
    if !no_zeroes {
        read(socket, "reserved block", &mut [0; EXPORT_NAME_PADDING]).await?;
    }
    Export::new(found, None, style, context)
}

async fn send_option(socket: &Socket, option: u32, data: &[u8]) -> Result<(), NbdError> {
    let mut message = Vec::with_capacity(OptionHeader::LEN + data.len());
    OptionHeader {
        option,
        // At most a string and a few words.
        len: data.len() as u32,
    }
    .encode(&mut message);
    message.extend_from_slice(data);
    send(socket, "option request", &message).await
}

async fn reply_header(socket: &Socket, asked: u32) -> Result<OptionReplyHeader, NbdError> {
    let mut bytes = [0; OptionReplyHeader::LEN];
    read(socket, "option reply", &mut bytes).await?;
    let header = OptionReplyHeader::decode(&bytes).map_err(|_| NbdError::ReplyMagic)?;
    if header.option != asked {
        return Err(NbdError::ReplyOption {
            found: header.option,
            expected: asked,
        });
    }
    Ok(header)
}

/// Data of a reply. The length is checked before memory is taken.
async fn reply_data(socket: &Socket, option: u32, len: u32) -> Result<Vec<u8>, NbdError> {
    if len > MAX_REPLY_LEN {
        return Err(NbdError::LongReply { option, len });
    }
    let mut data = vec![0; len as usize];
    read(socket, "option reply payload", &mut data).await?;
    Ok(data)
}

/// What an error says to people, as far as it is of a sensible length. Nothing else
/// is read from the connection after it.
async fn error_message(socket: &Socket, len: u32) -> Result<String, NbdError> {
    let mut data = vec![0; len.min(MAX_REPLY_LEN) as usize];
    read(socket, "option error message", &mut data).await?;
    Ok(String::from_utf8_lossy(&data).into_owned())
}

async fn skip(socket: &Socket, option: u32, len: u32) -> Result<(), NbdError> {
    if len > MAX_SKIPPED {
        return Err(NbdError::LongReply { option, len });
    }
    let mut left = len as usize;
    let mut block = [0; 1024];
    while left > 0 {
        let count = left.min(block.len());
        read(socket, "option reply payload", &mut block[..count]).await?;
        left -= count;
    }
    Ok(())
}

async fn read(socket: &Socket, what: &'static str, buffer: &mut [u8]) -> Result<(), NbdError> {
    let result: io::Result<()> = socket.read_exact(buffer).await;
    result.map_err(|error| NbdError::Read { what, error })
}

async fn read_u64(socket: &Socket, what: &'static str) -> Result<u64, NbdError> {
    let mut bytes = [0; 8];
    read(socket, what, &mut bytes).await?;
    Ok(u64::from_be_bytes(bytes))
}

async fn send(socket: &Socket, what: &'static str, bytes: &[u8]) -> Result<(), NbdError> {
    let result = socket.write_all(bytes).await;
    result.map_err(|error| NbdError::Send { what, error })
}
