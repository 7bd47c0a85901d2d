//! The handshake phase of one connection: the greeting, then options, until the
//! client has chosen an export, has gone, or its time is up.
//!
//! Specification: § "Handshake phase", § "Option types". The words of refusals are
//! for people; where QEMU's clients show them they say what QEMU says.

use std::io;
use std::sync::Arc;

use super::Client;
use super::export::{ExportUse, NbdExport};
use super::socket::{Input, Segment, Stream};
use crate::nbd::protocol::{
    BASE_ALLOCATION, EXPORT_NAME_PADDING, ExportInfo, INIT_MAGIC, InfoRequest, MAX_STRING,
    MetaContextRequest, OPTION_MAGIC, OptionHeader, OptionReplyHeader, ProtocolError,
    QEMU_ALLOCATION_DEPTH, QEMU_DIRTY_BITMAP, encode_meta_context, handshake_flag, info, option,
    option_reply,
};

/// Longest data of an option that is looked at: room for a name and a few
/// hundred requests or queries.
const MAX_OPTION: u32 = 64 << 10;
/// Longest data of an option that is skipped; a client that sends more is cut off.
const MAX_SKIPPED: u32 = 1 << 20;

/// How replies look. § "Structured reply", "Extended headers".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ReplyStyle {
    /// Simple replies only.
    #[default]
    Simple,
    /// Chunks where they are of use.
    Structured,
    /// Chunks with extended headers, and 64-bit requests.
    Extended,
}

/// Metadata contexts that the client has chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Contexts {
    pub(super) base_allocation: bool,
    pub(super) allocation_depth: bool,
    /// Places in the export's list of bitmaps, each once.
    pub(super) bitmaps: Vec<usize>,
}

/// Numbers of the contexts on the wire.
pub(super) const BASE_ALLOCATION_ID: u32 = 0;
/// As [`BASE_ALLOCATION_ID`].
pub(super) const ALLOCATION_DEPTH_ID: u32 = 1;
/// As [`BASE_ALLOCATION_ID`], of the export's first bitmap.
pub(super) const FIRST_BITMAP_ID: u32 = 2;

/// What was agreed on.
pub(super) struct Agreed {
    /// Counts the client as one of its connections.
    pub(super) export: ExportUse,
    pub(super) style: ReplyStyle,
    pub(super) contexts: Contexts,
}

/// How the handshake ended without an export.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeEnd {
    /// The client has left, in order or not.
    #[error("the client left")]
    Left,
    /// The connection broke.
    #[error("{0}")]
    Broken(#[from] io::Error),
    /// The client does not keep to the protocol.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// The client does something that there is no answer to.
    #[error("{0}")]
    Unanswerable(&'static str),
}

/// An answer to an option that is not the last.
enum Answer {
    Ack,
    Error(u32, String),
}

impl Answer {
    fn invalid(text: impl Into<String>) -> Self {
        Self::Error(option_reply::ERR_INVALID, text.into())
    }
}

impl From<ProtocolError> for Answer {
    fn from(error: ProtocolError) -> Self {
        Self::invalid(error.to_string())
    }
}

struct Handshake<'a> {
    client: &'a Client,
    stream: &'a Stream,
    input: &'a mut Input,
    style: ReplyStyle,
    no_zeroes: bool,
    /// Contexts, and the export they were chosen for.
    contexts: Option<(Arc<NbdExport>, Contexts)>,
    /// Replies that are not sent yet.
    out: Vec<u8>,
}

/// Takes a client through the handshake. The caller limits the time. Cancel: the
/// connection is of no use any more.
pub(super) async fn negotiate(
    client: &Client,
    stream: &Stream,
    input: &mut Input,
) -> Result<Agreed, HandshakeEnd> {
    let mut handshake = Handshake {
        client,
        stream,
        input,
        style: ReplyStyle::Simple,
        no_zeroes: false,
        contexts: None,
        out: Vec::new(),
    };
    let fixed = handshake.greet().await?;
    loop {
        let header = handshake.input.array(stream).await?;
        let header = OptionHeader::decode(&header.ok_or(HandshakeEnd::Left)?)?;
        if !fixed && header.option != option::EXPORT_NAME {
            return Err(HandshakeEnd::Unanswerable(
                "an option of a client that is not of the fixed newstyle",
            ));
        }
        if let Some(agreed) = handshake.option(header).await? {
            return Ok(agreed);
        }
    }
}

impl Handshake<'_> {
    /// Whether the client takes answers to options.
    async fn greet(&mut self) -> Result<bool, HandshakeEnd> {
        let offered = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        self.out.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&offered.to_be_bytes());
        self.send().await?;
        let flags = self.input.array(self.stream).await?;
        let flags = u32::from_be_bytes(flags.ok_or(HandshakeEnd::Left)?);
        if flags & !u32::from(offered) != 0 {
            return Err(HandshakeEnd::Unanswerable("unknown client flags"));
        }
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        Ok(flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0)
    }

    async fn send(&mut self) -> io::Result<()> {
        let out = [Segment::Bytes(std::mem::take(&mut self.out))];
        self.stream.send_all(&out).await
    }

    fn reply(&mut self, option: u32, reply: u32, data: &[u8]) {
        OptionReplyHeader {
            option,
            reply,
            len: data.len() as u32,
        }
        .encode(&mut self.out);
        self.out.extend_from_slice(data);
    }

    /// One option. Gives what was agreed on if it was the last.
    async fn option(&mut self, header: OptionHeader) -> Result<Option<Agreed>, HandshakeEnd> {
        let OptionHeader { option, len } = header;
        if len > MAX_OPTION {
            if len > MAX_SKIPPED || option == option::EXPORT_NAME {
                return Err(HandshakeEnd::Unanswerable("an option of absurd length"));
            }
            self.input.skip(self.stream, len.into()).await?;
            self.reply(option, option_reply::ERR_TOO_BIG, b"Option is too long");
            self.send().await?;
            return Ok(None);
        }
        let data = self.input.bytes(self.stream, len as usize).await?;
        let answer = match option {
            option::EXPORT_NAME => return self.export_name(&data).await.map(Some),
            option::ABORT => {
                self.reply(option, option_reply::ACK, &[]);
                // It need not wait for the answer.
                let _ = self.send().await;
                return Err(HandshakeEnd::Left);
            }
            option::INFO | option::GO => match self.info(option, &data) {
                Ok(agreed) => {
                    self.reply(option, option_reply::ACK, &[]);
                    self.send().await?;
                    return Ok(agreed);
                }
                Err(answer) => answer,
            },
            option::LIST => self.list(&data),
            option::STARTTLS => {
                Answer::Error(option_reply::ERR_POLICY, "TLS not configured".to_owned())
            }
            option::STRUCTURED_REPLY => self.structured_reply(&data),
            option::EXTENDED_HEADERS => self.extended_headers(&data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                match self.meta_context(option, &data) {
                    Ok(()) => Answer::Ack,
                    Err(answer) => answer,
                }
            }
            _ => Answer::Error(
                option_reply::ERR_UNSUP,
                format!("Unsupported option {option} (<unknown>)"),
            ),
        };
        match answer {
            Answer::Ack => self.reply(option, option_reply::ACK, &[]),
            Answer::Error(error, text) => {
                let text = &text[..text.floor_char_boundary(MAX_STRING)];
                self.reply(option, error, text.as_bytes());
            }
        }
        self.send().await?;
        Ok(None)
    }

    /// § "`NBD_OPT_EXPORT_NAME`": there is no way to refuse but to hang up.
    async fn export_name(&mut self, name: &[u8]) -> Result<Agreed, HandshakeEnd> {
        let export = std::str::from_utf8(name)
            .ok()
            .and_then(|name| self.client.shared.choose_export(self.client, name))
            .ok_or(HandshakeEnd::Unanswerable("export not found"))?;
        ExportInfo {
            size: export.size,
            flags: export.flags(self.style >= ReplyStyle::Structured),
        }
        .encode(&mut self.out);
        if !self.no_zeroes {
            self.out.extend_from_slice(&[0; EXPORT_NAME_PADDING]);
        }
        self.send().await?;
        Ok(self.agreed(export))
    }

    fn agreed(&self, export: ExportUse) -> Agreed {
        // Contexts count for the export that they were chosen for.
        let contexts = match &self.contexts {
            Some((chosen_for, contexts)) if Arc::ptr_eq(chosen_for, &export) => contexts.clone(),
            _ => Contexts::default(),
        };
        Agreed {
            export,
            style: self.style,
            contexts,
        }
    }

    /// `INFO` and `GO`: queues all replies but the last. Gives what was agreed on
    /// for `GO`.
    fn info(&mut self, option: u32, data: &[u8]) -> Result<Option<Agreed>, Answer> {
        let request = InfoRequest::decode(data)?;
        let name = request.export;
        let shared = &self.client.shared;
        let (export, chosen) = match option {
            option::GO => {
                let chosen = shared.choose_export(self.client, name);
                (chosen.as_deref().cloned(), chosen)
            }
            _ => (shared.find_export(name), None),
        };
        let export = export.ok_or_else(|| unknown_export(name))?;
        let mut payload = Vec::new();
        if request.wanted.contains(&info::NAME) {
            payload.extend_from_slice(&info::NAME.to_be_bytes());
            payload.extend_from_slice(export.name.as_bytes());
            self.reply(option, option_reply::INFO, &payload);
        }
        if let Some(description) = &export.description {
            payload.clear();
            payload.extend_from_slice(&info::DESCRIPTION.to_be_bytes());
            payload.extend_from_slice(description.as_bytes());
            self.reply(option, option_reply::INFO, &payload);
        }
        // A client that asks for the sizes has to heed them.
        let heeded = option == option::INFO || request.wanted.contains(&info::BLOCK_SIZE);
        payload.clear();
        export.block_sizes(heeded).encode(&mut payload);
        self.reply(option, option_reply::INFO, &payload);

        payload.clear();
        payload.extend_from_slice(&info::EXPORT.to_be_bytes());
        ExportInfo {
            size: export.size,
            flags: export.flags(self.style >= ReplyStyle::Structured),
        }
        .encode(&mut payload);
        self.reply(option, option_reply::INFO, &payload);
        Ok(chosen.map(|export| self.agreed(export)))
    }

    fn list(&mut self, data: &[u8]) -> Answer {
        if !data.is_empty() {
            return Answer::invalid("option 'list' has unexpected length");
        }
        for export in self.client.shared.exports() {
            let mut payload = Vec::new();
            payload.extend_from_slice(&(export.name.len() as u32).to_be_bytes());
            payload.extend_from_slice(export.name.as_bytes());
            if let Some(description) = &export.description {
                payload.extend_from_slice(description.as_bytes());
            }
            self.reply(option::LIST, option_reply::SERVER, &payload);
        }
        Answer::Ack
    }

    fn structured_reply(&mut self, data: &[u8]) -> Answer {
        if !data.is_empty() {
            return Answer::invalid("option 'structured reply' has unexpected length");
        }
        match self.style {
            ReplyStyle::Simple => {
                self.style = ReplyStyle::Structured;
                Answer::Ack
            }
            ReplyStyle::Structured => Answer::invalid("structured reply already negotiated"),
            ReplyStyle::Extended => Answer::Error(
                option_reply::ERR_EXT_HEADER_REQD,
                "extended headers already negotiated".to_owned(),
            ),
        }
    }

    fn extended_headers(&mut self, data: &[u8]) -> Answer {
        if !data.is_empty() {
            return Answer::invalid("option 'extended headers' has unexpected length");
        }
        if self.style == ReplyStyle::Extended {
            return Answer::invalid("extended headers already negotiated");
        }
        self.style = ReplyStyle::Extended;
        Answer::Ack
    }

    /// § "`NBD_OPT_SET_META_CONTEXT`". A query is a name, or to list them also what
    /// names begin with (up to a colon); no query lists all and chooses none.
    fn meta_context(&mut self, option: u32, data: &[u8]) -> Result<(), Answer> {
        let set = option == option::SET_META_CONTEXT;
        if set {
            // Whatever comes of it, an earlier choice is gone.
            self.contexts = None;
        }
        if set && self.style == ReplyStyle::Simple {
            return Err(Answer::invalid(
                "request option 'set meta context' when structured reply is not negotiated",
            ));
        }
        let request = MetaContextRequest::decode(data)?;
        let export = self
            .client
            .shared
            .find_export(request.export)
            .ok_or_else(|| unknown_export(request.export))?;
        let wanted = |name: &str, prefixes: &[&str]| {
            let all = !set && request.queries.is_empty();
            let named = |query: &&str| *query == name || (!set && prefixes.contains(query));
            all || request.queries.iter().any(named)
        };
        let mut contexts = Contexts {
            base_allocation: wanted(BASE_ALLOCATION, &["base:"]),
            allocation_depth: export.allocation_depth && wanted(QEMU_ALLOCATION_DEPTH, &["qemu:"]),
            bitmaps: Vec::new(),
        };
        let mut chosen = Vec::new();
        if contexts.base_allocation {
            chosen.push((BASE_ALLOCATION_ID, BASE_ALLOCATION.to_owned()));
        }
        if contexts.allocation_depth {
            chosen.push((ALLOCATION_DEPTH_ID, QEMU_ALLOCATION_DEPTH.to_owned()));
        }
        for (place, bitmap) in export.bitmaps.iter().enumerate() {
            let name = format!("{QEMU_DIRTY_BITMAP}{}", bitmap.name());
            if wanted(&name, &["qemu:", QEMU_DIRTY_BITMAP]) {
                contexts.bitmaps.push(place);
                chosen.push((FIRST_BITMAP_ID + place as u32, name));
            }
        }
        for (id, name) in chosen {
            let mut payload = Vec::new();
            // The number means something for those that are chosen only.
            encode_meta_context(if set { id } else { 0 }, &name, &mut payload);
            self.reply(option, option_reply::META_CONTEXT, &payload);
        }
        if set {
            self.contexts = Some((export, contexts));
        }
        Ok(())
    }
}

fn unknown_export(name: &str) -> Answer {
    Answer::Error(
        option_reply::ERR_UNKNOWN,
        format!("export '{name}' not present"),
    )
}
