//! One connection while it lasts: requests go out, replies come in, in any order.
//!
//! The server is not trusted: a reply must be one to a request in flight, of a kind
//! that this request has, and inside its range; else the connection ends. What does
//! not live here: what happens then (`link`).

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};
use slab::Slab;

use super::error::NbdError;
use super::handshake::{Export, HeaderStyle};
use super::queue::{Answer, LinkState, Queue, Request, Status};
use super::received::Received;
use super::socket::{Part, Reader, Socket};
use crate::buffer::IoVec;
use crate::nbd::protocol::{
    self, ChunkHeader, ErrorChunk, MAX_STRING, SIMPLE_REPLY_MAGIC, SimpleReplyHeader, chunk,
    command, decode_block_status, decode_offset_hole,
};
use crate::runtime::{sleep, yield_now};

/// Requests in flight. Servers that do less at a time let the others wait.
const MAX_IN_FLIGHT: usize = 64;
/// Requests that are sent in one go.
const MAX_BATCH: usize = 32;
/// Bytes that are sent in one go, unless one request has more.
const MAX_BATCH_BYTES: usize = 1 << 20;
/// Payload of a chunk that is read into memory of ours: a description and a few
/// words, or extents, of which one was asked for.
const MAX_CHUNK: usize = MAX_STRING + 64;
/// Replies, or chunks of them, that are read before others have a turn.
const REPLIES_PER_TURN: usize = 64;
/// How long the end of a connection waits for the answers to what is in flight.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// How long a server may be silent that has requests which nobody wants any more.
/// Less than what jobs have at the end of the program.
const SILENCE: Duration = Duration::from_secs(1);
/// How long it may take over them in all, however busy it seems.
const ABANDONED: Duration = Duration::from_secs(10);

/// Why a connection has ended.
pub(super) enum End {
    /// The node is being closed, and the server was told.
    Closed,
    /// It broke, with these requests unanswered, oldest first.
    Broken(NbdError, Vec<Request>),
}

/// A request that has been sent, or is being.
struct Sent {
    cookie: u64,
    request: Request,
    /// What a read has got so far, or is getting.
    received: Received,
    /// First error of a reply in chunks.
    error: Option<i32>,
    status: Option<Status>,
}

impl Sent {
    /// Whether a read has got all that it asked for.
    fn is_complete(&self) -> bool {
        self.received.is(0..self.request.command.len)
    }
}

/// A connection after the handshake.
pub(super) struct Connection {
    socket: Socket,
    export: Export,
    /// By the lower half of the cookie. At most `MAX_IN_FLIGHT`.
    sent: RefCell<Slab<Sent>>,
}

impl Connection {
    pub(super) fn new(socket: Socket, export: Export) -> Self {
        Self {
            socket,
            export,
            sent: RefCell::new(Slab::with_capacity(MAX_IN_FLIGHT)),
        }
    }

    pub(super) fn export(&self) -> Export {
        self.export
    }

    /// Serves `queue` until the connection breaks or the queue is closed.
    pub(super) async fn run(self, queue: &Queue) -> End {
        let ended = {
            let send = pin!(self.send_requests(queue));
            let receive = pin!(self.receive_replies(queue));
            let give_up = pin!(self.give_up_if_silent(queue));
            match select(select(send, receive), give_up).await {
                Either::Left((Either::Left((result, _)) | Either::Right((result, _)), _)) => result,
                Either::Right((error, _)) => Err(error),
            }
        };
        let mut unanswered: Vec<Sent> = self.sent.into_inner().into_iter().map(|e| e.1).collect();
        unanswered.sort_unstable_by_key(|sent| sent.cookie);
        let unanswered = unanswered.into_iter().map(|sent| sent.request);
        match ended {
            Err(error) if queue.state() != LinkState::Closed => {
                End::Broken(error, unanswered.collect())
            }
            // A server that goes when it is told to is no failure.
            _ => {
                for request in unanswered {
                    request.finish(Err(libc::EIO));
                }
                End::Closed
            }
        }
    }

    /// `Ok`: closed.
    async fn send_requests(&self, queue: &Queue) -> Result<(), NbdError> {
        let mut number = 0u64;
        loop {
            let batch = poll_fn(|cx| {
                queue.register(cx.waker());
                let batch = self.next_batch(queue, &mut number);
                if batch.is_empty() && queue.state() != LinkState::Closed {
                    return Poll::Pending;
                }
                Poll::Ready(batch)
            })
            .await;
            if batch.is_empty() {
                return self.say_goodbye(queue).await;
            }
            self.socket
                .send(&batch)
                .await
                .map_err(|error| NbdError::Send {
                    what: "requests",
                    error,
                })?;
        }
    }

    /// Ends if the server has been sent requests that nobody wants any more, and is
    /// silent, or never gets to them: what hangs there has to end here.
    async fn give_up_if_silent(&self, queue: &Queue) -> NbdError {
        let has_abandoned = || {
            let abandoned = queue.abandoned();
            abandoned > 0
                && self
                    .sent
                    .borrow()
                    .iter()
                    .any(|(_, sent)| sent.request.is_abandoned(abandoned))
        };
        loop {
            poll_fn(|cx| {
                queue.register(cx.waker());
                match has_abandoned() {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                }
            })
            .await;
            let began = Instant::now();
            while has_abandoned() {
                let heard = self.socket.heard();
                sleep(SILENCE).await;
                let is_silent = self.socket.heard() == heard;
                if has_abandoned() && (is_silent || began.elapsed() > ABANDONED) {
                    return NbdError::Silent;
                }
            }
        }
    }

    /// Takes as many requests as may be sent now.
    fn next_batch(&self, queue: &Queue, number: &mut u64) -> Vec<Part> {
        let mut sent = self.sent.borrow_mut();
        let mut parts: Vec<Part> = Vec::new();
        let (mut count, mut bytes) = (0, 0);
        while count < MAX_BATCH && bytes < MAX_BATCH_BYTES && sent.len() < MAX_IN_FLIGHT {
            let Some(request) = queue.take() else { break };
            if request.command.kind == command::BLOCK_STATUS && self.export.context.is_none() {
                // It came back without: it may all be data.
                let len = request.command.len;
                request.finish(Ok(Some(Status { len, flags: 0 })));
                continue;
            }
            let entry = sent.vacant_entry();
            *number += 1;
            let cookie = *number << 16 | entry.key() as u64;
            let header = self.header(&request, cookie);
            match parts.last_mut() {
                Some(Part::Bytes(bytes)) => bytes.extend_from_slice(&header),
                _ => parts.push(Part::Bytes(header)),
            }
            if request.command.kind == command::WRITE
                && let Some(iov) = &request.command.iov
            {
                parts.push(Part::Data(iov.clone()));
                bytes += iov.len();
            }
            entry.insert(Sent {
                cookie,
                request,
                received: Received::default(),
                error: None,
                status: None,
            });
            count += 1;
        }
        parts
    }

    fn header(&self, request: &Request, cookie: u64) -> Vec<u8> {
        let command = &request.command;
        let extended = self.export.style == HeaderStyle::Extended;
        let payload = extended && command.kind == command::WRITE;
        let header = protocol::Request {
            flags: command.flags
                | if payload {
                    protocol::command_flag::PAYLOAD_LEN
                } else {
                    0
                },
            command: command.kind,
            cookie,
            offset: command.offset,
            len: command.len,
        };
        let mut bytes = Vec::with_capacity(protocol::Request::EXTENDED_LEN);
        if extended {
            header.encode_extended(&mut bytes);
        } else {
            header.encode_compact(&mut bytes);
        }
        bytes
    }

    /// Waits for the last answers, but not long, and tells the server.
    async fn say_goodbye(&self, queue: &Queue) -> Result<(), NbdError> {
        let answered = poll_fn(|cx| {
            queue.register(cx.waker());
            match self.sent.borrow().is_empty() {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        });
        select(pin!(answered), pin!(sleep(LAST_ANSWERS))).await;
        let header = protocol::Request {
            flags: 0,
            command: command::DISC,
            cookie: 0,
            offset: 0,
            len: 0,
        };
        let mut bytes = Vec::new();
        if self.export.style == HeaderStyle::Extended {
            header.encode_extended(&mut bytes);
        } else {
            header.encode_compact(&mut bytes);
        }
        // It may have gone, or not read: the end of the connection says it too.
        let sent = self.socket.write_all(&bytes);
        select(pin!(sent), pin!(sleep(LAST_ANSWERS))).await;
        Ok(())
    }

    /// Ends only with an error.
    async fn receive_replies(&self, queue: &Queue) -> Result<(), NbdError> {
        let mut reader = Reader::new(&self.socket);
        let mut replies = 0;
        loop {
            replies += 1;
            if replies == REPLIES_PER_TURN {
                // A server that never stops to talk must not keep requests, and the
                // end, from their turn.
                replies = 0;
                yield_now().await;
            }
            match self.export.style {
                HeaderStyle::Simple => {
                    let mut header = [0; SimpleReplyHeader::LEN];
                    fill(&mut reader, &mut header).await?;
                    self.simple_reply(&mut reader, &header, queue).await?;
                }
                HeaderStyle::Structured => {
                    // The shorter of the two kinds.
                    let mut header = [0; ChunkHeader::STRUCTURED_LEN];
                    let (simple, rest) = header.split_at_mut(SimpleReplyHeader::LEN);
                    fill(&mut reader, simple).await?;
                    if simple.starts_with(&SIMPLE_REPLY_MAGIC.to_be_bytes()) {
                        let mut header = [0; SimpleReplyHeader::LEN];
                        header.copy_from_slice(simple);
                        self.simple_reply(&mut reader, &header, queue).await?;
                    } else {
                        fill(&mut reader, rest).await?;
                        let header = ChunkHeader::decode_structured(&header)?;
                        self.chunk(&mut reader, header, queue).await?;
                    }
                }
                HeaderStyle::Extended => {
                    let mut header = [0; ChunkHeader::EXTENDED_LEN];
                    fill(&mut reader, &mut header).await?;
                    let header = ChunkHeader::decode_extended(&header)?;
                    self.chunk(&mut reader, header, queue).await?;
                }
            }
        }
    }

    async fn simple_reply(
        &self,
        reader: &mut Reader<'_>,
        header: &[u8; SimpleReplyHeader::LEN],
        queue: &Queue,
    ) -> Result<(), NbdError> {
        let reply = SimpleReplyHeader::decode(header)?;
        let (key, command) = self.find(reply.cookie)?;
        if reply.error != 0 {
            self.finish(key, Err(protocol::errno_from_wire(reply.error)), queue);
            return Ok(());
        }
        match (command, self.export.style) {
            (command::READ, HeaderStyle::Simple) => {
                let iov = self.sent.borrow()[key].request.command.iov.clone();
                if let Some(iov) = iov {
                    read_error(reader.read_into(&iov).await)?;
                }
            }
            (command::READ | command::BLOCK_STATUS, _) => {
                return Err(NbdError::Violation("a simple reply with data"));
            }
            _ => {}
        }
        self.finish(key, Ok(None), queue);
        Ok(())
    }

    async fn chunk(
        &self,
        reader: &mut Reader<'_>,
        header: ChunkHeader,
        queue: &Queue,
    ) -> Result<(), NbdError> {
        let (key, command) = self.find(header.cookie)?;
        match header.kind {
            chunk::NONE if header.len == 0 && header.is_done() => {}
            chunk::NONE => return Err(NbdError::Violation("a bad empty chunk")),
            chunk::OFFSET_DATA if command == command::READ => {
                self.data_chunk(reader, header, key).await?;
            }
            chunk::OFFSET_HOLE if command == command::READ => {
                let payload = payload(reader, header.len).await?;
                let (offset, len) = decode_offset_hole(&payload)?;
                if let Some(iov) = self.part(key, offset, len.into())? {
                    iov.fill(0);
                }
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT
                if command == command::BLOCK_STATUS
                    && (header.kind == chunk::BLOCK_STATUS_EXT)
                        == (self.export.style == HeaderStyle::Extended) =>
            {
                let payload = payload(reader, header.len).await?;
                let extended = header.kind == chunk::BLOCK_STATUS_EXT;
                let (context, extents) = decode_block_status(extended, &payload)?;
                if Some(context) != self.export.context {
                    return Err(NbdError::Violation("a context that was not asked for"));
                }
                let mut sent = self.sent.borrow_mut();
                if sent[key].status.is_some() {
                    return Err(NbdError::Violation("two replies about one context"));
                }
                sent[key].status = extents.first().map(|extent| Status {
                    len: extent.len,
                    flags: extent.status,
                });
            }
            kind if header.is_error() => {
                let payload = payload(reader, header.len).await?;
                let error = ErrorChunk::decode(kind, &payload)?;
                tracing::debug!(
                    error = error.error,
                    message = error.message,
                    "NBD server reports an error"
                );
                if error.error == 0 {
                    return Err(NbdError::Violation("an error chunk without error"));
                }
                let errno = protocol::errno_from_wire(error.error);
                self.sent.borrow_mut()[key].error.get_or_insert(errno);
            }
            _ => return Err(NbdError::Violation("a chunk that does not fit the request")),
        }
        if !header.is_done() {
            return Ok(());
        }
        let answer = self.answer(key)?;
        self.finish(key, answer, queue);
        Ok(())
    }

    /// What all chunks of a reply together say.
    fn answer(&self, key: usize) -> Result<Answer, NbdError> {
        let sent = self.sent.borrow();
        let entry = &sent[key];
        if let Some(errno) = entry.error {
            return Ok(Err(errno));
        }
        match entry.request.command.kind {
            command::READ if !entry.is_complete() => {
                Err(NbdError::Violation("a read that is not answered in full"))
            }
            command::BLOCK_STATUS if entry.status.is_none() => {
                Err(NbdError::Violation("a block status without extents"))
            }
            _ => Ok(Ok(entry.status)),
        }
    }

    async fn data_chunk(
        &self,
        reader: &mut Reader<'_>,
        header: ChunkHeader,
        key: usize,
    ) -> Result<(), NbdError> {
        let len = header
            .len
            .checked_sub(8)
            .filter(|len| *len > 0)
            .ok_or(NbdError::Violation("a data chunk without data"))?;
        let mut offset = [0; 8];
        fill(reader, &mut offset).await?;
        let part = self.part(key, u64::from_be_bytes(offset), len)?;
        if let Some(iov) = part {
            read_error(reader.read_into(&iov).await)?;
        }
        Ok(())
    }

    /// The memory of a read for `len` bytes at `offset`, which the server names. They
    /// count as received.
    fn part(&self, key: usize, offset: u64, len: u64) -> Result<Option<IoVec>, NbdError> {
        let mut sent = self.sent.borrow_mut();
        let entry = &mut sent[key];
        let command = &entry.request.command;
        let outside = NbdError::Violation("data outside the range that was asked for");
        let Some(from) = offset.checked_sub(command.offset) else {
            return Err(outside);
        };
        let inside = from
            .checked_add(len)
            .is_some_and(|end| end <= command.len && len > 0);
        if !inside {
            return Err(outside);
        }
        entry.received.add(from..from + len)?;
        Ok(command
            .iov
            .as_ref()
            .map(|iov| iov.slice(from as usize, len as usize)))
    }

    /// The request that a reply names, and what it asked.
    fn find(&self, cookie: u64) -> Result<(usize, u16), NbdError> {
        let key = (cookie & 0xffff) as usize;
        match self.sent.borrow().get(key) {
            Some(sent) if sent.cookie == cookie => Ok((key, sent.request.command.kind)),
            _ => Err(NbdError::Violation("a reply to no request")),
        }
    }

    fn finish(&self, key: usize, answer: Answer, queue: &Queue) {
        let (sent, left) = {
            let mut sent = self.sent.borrow_mut();
            (sent.remove(key), sent.len())
        };
        sent.request.finish(answer);
        // There is room for another, or nothing is in flight any more.
        if left == 0 || left == MAX_IN_FLIGHT - 1 {
            queue.task.wake();
        }
    }
}

fn read_error(result: io::Result<()>) -> Result<(), NbdError> {
    result.map_err(|error| NbdError::Read {
        what: "reply",
        error,
    })
}

async fn fill(reader: &mut Reader<'_>, buffer: &mut [u8]) -> Result<(), NbdError> {
    read_error(reader.read_exact(buffer).await)
}

/// A chunk's payload, whose length is checked before memory is taken.
async fn payload(reader: &mut Reader<'_>, len: u64) -> Result<Vec<u8>, NbdError> {
    let len = usize::try_from(len)
        .ok()
        .filter(|len| *len <= MAX_CHUNK)
        .ok_or(NbdError::Violation("a chunk that is too long"))?;
    let mut payload = vec![0; len];
    fill(reader, &mut payload).await?;
    Ok(payload)
}
