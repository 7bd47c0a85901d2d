//! The transmission phase of one connection: requests are read one after another and
//! carried out side by side; replies go out in the order in which they are ready,
//! many at a time.
//!
//! # What a client can make us hold
//!
//! A request counts against the connection's limits from when it was read until its
//! reply was sent. At the limits nothing more is read: the client's requests wait in
//! the socket. So one that sends without reading replies stops itself.
//!
//! # Drain
//!
//! A request is read as a whole, then counted in at the backend, then begun. While
//! a drained section holds the backend, the request read last waits there, and no
//! further one is read. A client that stops in the midst of a request holds up no
//! section.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, select};

use super::Client;
use super::buffers::{Buffer, Buffers};
use super::export::{ExportUse, NbdExport};
use super::handshake::{Agreed, Contexts, ReplyStyle};
use super::reply::{Outcome, encode};
use super::request;
use super::socket::{Input, Segment, Stream};
use crate::nbd::protocol::{MAX_PAYLOAD, ProtocolError, Request, command, command_flag};
use crate::runtime::{sleep, spawn_local};
use crate::wait::LocalWaiters;

/// Requests in flight of one connection.
const MAX_REQUESTS: usize = 256;
/// Bytes of data that the requests in flight of one connection have, unless it is
/// but one.
const MAX_BYTES: u64 = MAX_PAYLOAD as u64;
/// How long the last replies may take when the client has said that it leaves.
const FAREWELL: Duration = Duration::from_secs(10);

/// What a request counts against the limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Load {
    requests: usize,
    bytes: u64,
}

/// Replies that are ready to be sent.
#[derive(Default)]
struct Output {
    segments: Vec<Segment>,
    /// What the segments' data is in.
    buffers: Vec<Buffer>,
    /// What the replies' requests count.
    load: Load,
    /// The connection is broken: nothing is sent any more.
    broken: bool,
}

/// A connection on its thread. Its tasks share it; it goes with the last of them.
pub(super) struct Connection {
    // First, so that it leaves the loop before anybody else may close the socket.
    stream: Stream,
    pub(super) export: ExportUse,
    pub(super) style: ReplyStyle,
    pub(super) contexts: Contexts,
    pub(super) buffers: RefCell<Buffers>,
    /// A range that was data when it was looked at last: it is read without looking.
    pub(super) known_data: Cell<(u64, u64)>,
    load: Cell<Load>,
    /// The reader, waiting for `load` to become less.
    room: LocalWaiters,
    output: RefCell<Output>,
    /// The writer, waiting for `output`.
    ready: LocalWaiters,
    /// Nothing more is read.
    ended: Cell<bool>,
    // Last: the client's place is free when all else has gone.
    client: Client,
}

/// Why no more requests are read.
#[derive(Debug, thiserror::Error)]
enum ReadEnd {
    #[error("{0}")]
    Broken(#[from] io::Error),
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    #[error("a payload of {0} bytes")]
    Payload(u64),
}

impl Connection {
    /// Serves a client that has chosen its export, until it leaves or is cut off.
    /// Returns when nobody uses the connection any more but requests in flight.
    pub(super) async fn serve(client: Client, agreed: Agreed, mut input: Input) {
        let stream = match Stream::new(std::sync::Arc::clone(&client.line.socket)) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "Cannot watch an NBD client's socket");
                client.line.socket.shut_down();
                return;
            }
        };
        let Agreed {
            export,
            style,
            contexts,
        } = agreed;
        let this = Rc::new(Self {
            stream,
            export,
            style,
            contexts,
            buffers: RefCell::default(),
            known_data: Cell::new((0, 0)),
            load: Cell::default(),
            room: LocalWaiters::default(),
            output: RefCell::default(),
            ready: LocalWaiters::default(),
            ended: Cell::new(false),
            client,
        });
        let writer = spawn_local(Rc::clone(&this).write_replies());
        this.until_end(&mut input).await;
        this.ended.set(true);
        this.stream.socket().shut_down();
        this.ready.wake();
        writer.await;
    }

    async fn until_end(self: &Rc<Self>, input: &mut Input) {
        let name = &self.export.name;
        let end = {
            let reading = pin!(self.read_requests(input));
            let cut = pin!(self.client.line.until_cut());
            match select(reading, cut).await {
                Either::Left((end, _)) => end,
                Either::Right(_) => {
                    tracing::debug!(export = name, "NBD client cut off");
                    return;
                }
            }
        };
        if let Err(error) = end {
            tracing::info!(export = name, %error, "NBD client cut off");
            return;
        }
        // What was accepted is answered, if the client still listens.
        let answered = pin!(
            self.room
                .until(|| (self.load.get().requests == 0).then_some(()))
        );
        let limit = pin!(sleep(FAREWELL));
        let cut = pin!(self.client.line.until_cut());
        select(answered, select(limit, cut)).await;
        tracing::debug!(export = name, "NBD client left");
    }

    /// Reads requests and begins them, until the client leaves.
    async fn read_requests(self: &Rc<Self>, input: &mut Input) -> Result<(), ReadEnd> {
        loop {
            let room = || (self.load.get().requests < MAX_REQUESTS).then_some(());
            self.room.until(room).await;
            let request = match self.style {
                ReplyStyle::Extended => match input.array(&self.stream).await? {
                    Some(bytes) => Request::decode_extended(&bytes)?,
                    None => return Ok(()),
                },
                _ => match input.array(&self.stream).await? {
                    Some(bytes) => Request::decode_compact(&bytes)?,
                    None => return Ok(()),
                },
            };
            if request.command == command::DISC {
                return Ok(());
            }
            let payload = self.payload_of(&request);
            if payload > MAX_PAYLOAD.into() {
                return Err(ReadEnd::Payload(payload));
            }
            if let Err(refusal) = request::check(&request, self) {
                input.skip(&self.stream, payload).await?;
                let load = Load {
                    requests: 1,
                    bytes: 0,
                };
                self.take_load(load);
                self.reply(&request, load, Outcome::Refused(refusal), None);
                continue;
            }
            let load = Load {
                requests: 1,
                bytes: request::memory(&request),
            };
            let room = || {
                let used = self.load.get().bytes;
                (used == 0 || used + load.bytes <= MAX_BYTES).then_some(())
            };
            self.room.until(room).await;
            let data = match payload {
                0 => None,
                len => {
                    let len = len as usize;
                    let buffer = self.buffers.borrow_mut().take(len);
                    input.fill(&self.stream, &buffer.io_vec(len)).await?;
                    Some(buffer)
                }
            };
            self.begin(request, load, data).await;
        }
    }

    /// Bytes that follow the header. § "Request message".
    fn payload_of(&self, request: &Request) -> u64 {
        let extended = self.style == ReplyStyle::Extended;
        let payload = request.command == command::WRITE
            || (extended && request.flags & command_flag::PAYLOAD_LEN != 0);
        if payload { request.len } else { 0 }
    }

    /// Counts the request in and begins it in a task of its own, which nobody
    /// cancels: it ends even if the client has gone.
    async fn begin(self: &Rc<Self>, request: Request, load: Load, data: Option<Buffer>) {
        let in_flight = self.export.backend.enter().await;
        self.take_load(load);
        let this = Rc::clone(self);
        spawn_local(async move {
            let panicked = CutOnPanic(&this);
            // Counted out when it ends: the reply may have to wait for the client, a
            // drained section does not.
            let (outcome, buffer) = request::perform(&this, in_flight, &request, data).await;
            std::mem::forget(panicked);
            this.reply(&request, load, outcome, buffer);
        })
        .detach();
    }

    fn take_load(&self, load: Load) {
        let mut all = self.load.get();
        all.requests += load.requests;
        all.bytes += load.bytes;
        self.load.set(all);
    }

    fn give_load_back(&self, load: Load) {
        let mut all = self.load.get();
        all.requests -= load.requests;
        all.bytes -= load.bytes;
        self.load.set(all);
        self.room.wake();
    }

    /// Queues a reply. `buffer` is what its data is in, or what the request's was.
    fn reply(&self, request: &Request, load: Load, outcome: Outcome, buffer: Option<Buffer>) {
        let mut output = self.output.borrow_mut();
        if output.broken {
            drop(output);
            self.give_load_back(load);
            return;
        }
        encode(self.style, request, outcome, &mut output.segments);
        output.buffers.extend(buffer);
        output.load.requests += load.requests;
        output.load.bytes += load.bytes;
        drop(output);
        self.ready.wake();
    }

    /// Sends what is ready, all of it at a time, until nothing more is read and all
    /// is sent, or the connection breaks.
    async fn write_replies(self: Rc<Self>) {
        let mut batch = Output::default();
        loop {
            let more = self.ready.until(|| {
                if self.output.borrow().load.requests > 0 {
                    return Some(true);
                }
                self.ended.get().then_some(false)
            });
            if !more.await {
                return;
            }
            std::mem::swap(&mut batch, &mut self.output.borrow_mut());
            let sent = self.stream.send_all(&batch.segments).await;
            self.recycle(&mut batch);
            if sent.is_err() {
                // The reader sees it too, but may be waiting for room.
                self.client.line.cut();
                let mut rest = std::mem::take(&mut *self.output.borrow_mut());
                self.output.borrow_mut().broken = true;
                self.recycle(&mut rest);
                return;
            }
        }
    }

    /// Gives back what replies held that were sent, or will never be.
    fn recycle(&self, batch: &mut Output) {
        // Before their buffers: what is still in use is not used again.
        batch.segments.clear();
        let mut buffers = self.buffers.borrow_mut();
        for buffer in batch.buffers.drain(..) {
            buffers.give_back(buffer);
        }
        drop(buffers);
        self.give_load_back(std::mem::take(&mut batch.load));
    }

    /// Whether the client has gone, or was cut off: replies reach nobody.
    pub(super) fn is_ended(&self) -> bool {
        self.ended.get() || self.client.line.is_cut()
    }

    pub(super) fn export(&self) -> &NbdExport {
        &self.export
    }
}

/// Cuts a client off whose request panicked: it would wait for the reply for ever.
struct CutOnPanic<'a>(&'a Connection);

impl Drop for CutOnPanic<'_> {
    fn drop(&mut self) {
        self.0.client.line.cut();
    }
}
