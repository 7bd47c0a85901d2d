//! One client's conversation: greeting, negotiation, commands in order.
//!
//! A session reads no further while a command of its own is being carried out,
//! unless it negotiated `oob`: then up to [`OOB_QUEUE`] commands wait, and those
//! asked for with `exec-oob` overtake them. A command that has begun is finished
//! even if its client goes away.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, Read};
use std::rc::Rc;
use std::time::Duration;

use block::runtime::{AsyncFd, Interest, sleep, spawn_local, yield_now};
use futures_util::future::{Either, select};
use futures_util::pin_mut;
use serde::Serialize;
use serde_json::{Value, json};

use super::Monitor;
use super::args::Args;
use super::commands;
use super::connection::Connection;
use super::error::{ErrorClass, QmpError};
use super::json::{self, Limits, Reader};
use super::output::{Changed, Output};
use super::request::{self, Request};

/// Commands that may wait while another is carried out, with `oob`.
const OOB_QUEUE: usize = 8;
/// How long a client may take to read the last replies when its session ends.
const FLUSH_TIME: Duration = Duration::from_secs(2);
/// Bytes asked of the socket at once.
const READ_SIZE: usize = 16 << 10;

/// State of one conversation. Main thread only.
#[derive(Debug, Default)]
pub(super) struct Session {
    output: Output,
    /// Capabilities are agreed on: commands are taken, events are sent.
    negotiated: Cell<bool>,
    /// `oob` is one of them.
    oob: Cell<bool>,
    /// Messages that wait for their turn.
    queue: RefCell<VecDeque<Work>>,
    /// Messages read and not answered: those in `queue` and the current one.
    outstanding: Cell<usize>,
    /// Nothing more is read.
    input_ended: Cell<bool>,
    changed: Changed,
}

/// A message whose answer has its place among the others.
#[derive(Debug)]
enum Work {
    Command(Request),
    Refuse { id: Option<Value>, error: QmpError },
}

/// A reply on the wire.
#[derive(Serialize)]
struct Reply<'a> {
    #[serde(rename = "return", skip_serializing_if = "Option::is_none")]
    value: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a QmpError>,
}

impl Session {
    /// Queues an event, if this client is to have any.
    pub(super) fn send_event(&self, line: &[u8]) {
        if self.negotiated.get() {
            self.output.push_event(line);
        }
    }

    /// Talks to the client until it leaves or the monitor closes.
    ///
    /// Errors: those of the socket. Cancel: the connection is cut; a command
    /// that was begun is finished.
    pub(super) async fn serve(
        self: &Rc<Self>,
        monitor: &Rc<Monitor>,
        stream: &AsyncFd<Connection>,
    ) -> io::Result<()> {
        self.output.push(&json::write_line(&json!({"QMP": {
            "version": commands::version(),
            "capabilities": ["oob"],
        }})));
        {
            let converse = async {
                let (received, ()) =
                    futures_util::join!(self.receive(monitor, stream), self.execute(monitor));
                received
            };
            let write = self.output.write_to(stream);
            let closing = monitor.closing();
            pin_mut!(converse, write, closing);
            match select(select(converse, write), closing).await {
                Either::Left((Either::Left((Ok(()), _)), _)) | Either::Right(_) => (),
                Either::Left((Either::Left((result, _)) | Either::Right((result, _)), _)) => {
                    return result;
                }
            }
        }
        self.output.finish();
        let flush = self.output.write_to(stream);
        let deadline = sleep(FLUSH_TIME);
        pin_mut!(flush, deadline);
        match select(flush, deadline).await {
            Either::Left((result, _)) => result,
            Either::Right(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "It does not read the last replies",
            )),
        }
    }

    /// Reads messages until the client sends no more.
    async fn receive(&self, monitor: &Monitor, stream: &AsyncFd<Connection>) -> io::Result<()> {
        let result = self.receive_all(monitor, stream).await;
        self.input_ended.set(true);
        self.changed.notify();
        result
    }

    async fn receive_all(&self, monitor: &Monitor, stream: &AsyncFd<Connection>) -> io::Result<()> {
        let mut reader = Reader::new(Limits::default());
        let mut buffer = vec![0; READ_SIZE];
        loop {
            let len = stream
                .io(Interest::Readable, |mut stream| stream.read(&mut buffer))
                .await?;
            let Some(mut input) = buffer.get(..len).filter(|input| !input.is_empty()) else {
                return Ok(());
            };
            // A client that sends and sends must not keep this thread to itself.
            yield_now().await;
            loop {
                self.may_read().await;
                match reader.next(&mut input) {
                    None => break,
                    Some(Ok(message)) => self.accept(monitor, message),
                    Some(Err(error)) => self.enqueue(Work::Refuse {
                        id: None,
                        error: QmpError::generic(error.to_string()),
                    }),
                }
            }
        }
    }

    /// Waits until another message may be looked at.
    async fn may_read(&self) {
        let limit = if self.oob.get() { OOB_QUEUE } else { 1 };
        self.changed
            .until(|| (self.outstanding.get() < limit).then_some(()))
            .await;
        self.output.has_room().await;
    }

    /// Queues a message, or answers it at once if it is out of band.
    fn accept(&self, monitor: &Monitor, message: Value) {
        match request::check(message, self.oob.get()) {
            Ok(request) if request.out_of_band => {
                let result = Err(commands::refuse_out_of_band(monitor, &request.command));
                self.reply(request.id.as_ref(), result);
            }
            Ok(request) => self.enqueue(Work::Command(request)),
            Err(malformed) => self.enqueue(Work::Refuse {
                id: malformed.id,
                error: malformed.error,
            }),
        }
    }

    fn enqueue(&self, work: Work) {
        self.outstanding.set(self.outstanding.get() + 1);
        self.queue.borrow_mut().push_back(work);
        self.changed.notify();
    }

    /// Carries commands out one after another, until no more can come.
    async fn execute(self: &Rc<Self>, monitor: &Rc<Monitor>) {
        loop {
            let next = self
                .changed
                .until(|| {
                    let work = self.queue.borrow_mut().pop_front();
                    if work.is_some() || self.input_ended.get() {
                        Some(work)
                    } else {
                        None
                    }
                })
                .await;
            let Some(work) = next else { return };
            match work {
                Work::Refuse { id, error } => self.reply(id.as_ref(), Err(error)),
                Work::Command(_) if monitor.is_quitting() => {
                    // Never carried out; events still go out until the monitor
                    // closes.
                    std::future::pending::<()>().await;
                }
                Work::Command(request) => {
                    let session = Rc::clone(self);
                    let monitor = Rc::clone(monitor);
                    // A task of its own: it goes on if the client is gone.
                    spawn_local(async move { session.carry_out(&monitor, request).await }).await;
                }
            }
            self.outstanding.set(self.outstanding.get() - 1);
            self.changed.notify();
        }
    }

    async fn carry_out(&self, monitor: &Rc<Monitor>, request: Request) {
        let Request {
            command,
            arguments,
            id,
            ..
        } = request;
        let result = self.run(monitor, &command, Args::new(arguments)).await;
        self.reply(id.as_ref(), result);
        monitor.command_answered();
    }

    /// Carries out one command.
    pub(super) async fn run(
        &self,
        monitor: &Rc<Monitor>,
        command: &str,
        args: Args,
    ) -> Result<Value, QmpError> {
        if command == commands::NEGOTIATE {
            return self.negotiate(args);
        }
        if !self.negotiated.get() {
            return Err(QmpError {
                class: ErrorClass::CommandNotFound,
                desc: format!(
                    "Expecting capabilities negotiation with '{}'",
                    commands::NEGOTIATE
                ),
            });
        }
        let result = commands::start(monitor, command, args)?.await;
        monitor.flush_job_events();
        result
    }

    /// `qmp_capabilities`
    fn negotiate(&self, mut args: Args) -> Result<Value, QmpError> {
        let enable = args.optional_enum_list("enable", &[("oob", ())])?;
        args.finish()?;
        if self.negotiated.get() {
            return Err(QmpError {
                class: ErrorClass::CommandNotFound,
                desc: "Capabilities negotiation is already complete, command ignored".to_owned(),
            });
        }
        self.oob
            .set(enable.is_some_and(|enable| !enable.is_empty()));
        self.negotiated.set(true);
        Ok(json!({}))
    }

    fn reply(&self, id: Option<&Value>, result: Result<Value, QmpError>) {
        let (value, error) = match &result {
            Ok(value) => (Some(value), None),
            Err(error) => (None, Some(error)),
        };
        self.output
            .push(&json::write_line(&Reply { value, id, error }));
    }
}
