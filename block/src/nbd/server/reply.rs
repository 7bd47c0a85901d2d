//! How a request is answered: from what came of it to bytes, in each style.
//!
//! Specification: § "Simple reply message", "Structured reply chunk message",
//! "Extended reply chunk message".

use super::handshake::ReplyStyle;
use super::socket::Segment;
use crate::buffer::IoVec;
use crate::nbd::protocol::{
    BlockDescriptor, ChunkHeader, Request, SimpleReplyHeader, chunk, chunk_flag, command,
    encode_block_status, encode_error_chunk, errno_to_wire,
};

/// Why a request was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Linux's number.
    pub(super) errno: i32,
    /// For people.
    pub(super) text: &'static str,
}

/// A part of what was read.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) content: Content,
}

/// What a part of what was read is.
#[derive(Debug)]
pub(super) enum Content {
    Data(IoVec),
    /// So many zero bytes.
    Zeroes(u32),
}

/// What came of a request.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It was carried out, and there is nothing to tell.
    Done,
    /// It was refused, or failed.
    Refused(Refusal),
    /// The parts of what was read, in order, without gaps. One part of data, unless
    /// the style has chunks.
    Read(Vec<Piece>),
    /// The extents by number of their context; at least one of each.
    Status(Vec<(u32, Vec<BlockDescriptor>)>),
}

/// Appends a reply to `out`.
pub(super) fn encode(
    style: ReplyStyle,
    request: &Request,
    outcome: Outcome,
    out: &mut Vec<Segment>,
) {
    let mut writer = Writer {
        style,
        request,
        out,
    };
    match (style, outcome) {
        (ReplyStyle::Simple, Outcome::Refused(refusal)) => {
            writer.simple(errno_to_wire(refusal.errno));
        }
        (_, Outcome::Refused(refusal)) => {
            let mut payload = Vec::new();
            encode_error_chunk(errno_to_wire(refusal.errno), refusal.text, &mut payload);
            writer.chunk(true, chunk::ERROR, payload.len());
            writer.bytes().extend_from_slice(&payload);
        }
        (ReplyStyle::Simple, Outcome::Read(pieces)) => {
            writer.simple(0);
            for piece in pieces {
                match piece.content {
                    Content::Data(data) => writer.data(data),
                    Content::Zeroes(len) => {
                        let end = writer.bytes().len() + len as usize;
                        writer.bytes().resize(end, 0);
                    }
                }
            }
        }
        (_, Outcome::Read(pieces)) if pieces.is_empty() => writer.chunk(true, chunk::NONE, 0),
        (_, Outcome::Read(pieces)) => {
            let last = pieces.len() - 1;
            for (number, piece) in pieces.into_iter().enumerate() {
                writer.piece(number == last, piece);
            }
        }
        (_, Outcome::Status(contexts)) => {
            let extended = style == ReplyStyle::Extended;
            let last = contexts.len().saturating_sub(1);
            for (number, (context, extents)) in contexts.iter().enumerate() {
                let mut payload = Vec::new();
                encode_block_status(extended, *context, extents, &mut payload);
                let kind = if extended {
                    chunk::BLOCK_STATUS_EXT
                } else {
                    chunk::BLOCK_STATUS
                };
                writer.chunk(number == last, kind, payload.len());
                writer.bytes().extend_from_slice(&payload);
            }
        }
        // Requests without an answer of their own may be answered simply, which is
        // shorter; but not reads, and not with extended headers.
        (ReplyStyle::Structured, Outcome::Done) if request.command != command::READ => {
            writer.simple(0);
        }
        (ReplyStyle::Simple, Outcome::Done) => writer.simple(0),
        (_, Outcome::Done) => writer.chunk(true, chunk::NONE, 0),
    }
}

struct Writer<'a> {
    style: ReplyStyle,
    request: &'a Request,
    out: &'a mut Vec<Segment>,
}

impl Writer<'_> {
    /// Where small things are appended: behind those before, if nothing large came
    /// in between.
    fn bytes(&mut self) -> &mut Vec<u8> {
        if !matches!(self.out.last(), Some(Segment::Bytes(_))) {
            self.out.push(Segment::Bytes(Vec::with_capacity(64)));
        }
        match self.out.last_mut() {
            Some(Segment::Bytes(bytes)) => bytes,
            _ => unreachable!("such a segment was pushed if it was not there"),
        }
    }

    fn data(&mut self, data: IoVec) {
        self.out.push(Segment::Data(data));
    }

    fn simple(&mut self, error: u32) {
        let cookie = self.request.cookie;
        SimpleReplyHeader { error, cookie }.encode(self.bytes());
    }

    fn chunk(&mut self, done: bool, kind: u16, len: usize) {
        let header = ChunkHeader {
            flags: if done { chunk_flag::DONE } else { 0 },
            kind,
            cookie: self.request.cookie,
            offset: self.request.offset,
            len: len as u64,
        };
        if self.style == ReplyStyle::Extended {
            header.encode_extended(self.bytes());
        } else {
            header.encode_structured(self.bytes());
        }
    }

    fn piece(&mut self, done: bool, piece: Piece) {
        match piece.content {
            Content::Data(data) => {
                self.chunk(done, chunk::OFFSET_DATA, size_of::<u64>() + data.len());
                self.bytes().extend_from_slice(&piece.offset.to_be_bytes());
                self.data(data);
            }
            Content::Zeroes(len) => {
                self.chunk(
                    done,
                    chunk::OFFSET_HOLE,
                    size_of::<u64>() + size_of::<u32>(),
                );
                let bytes = self.bytes();
                bytes.extend_from_slice(&piece.offset.to_be_bytes());
                bytes.extend_from_slice(&len.to_be_bytes());
            }
        }
    }
}
