//! A storage in memory that remembers the order of all that was done, so that a stop
//! of the process or of the machine at any point can be played back.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::buffer::IoVec;
use crate::driver::{BlockDriver, BoxFuture, Extent, ExtentFlags, Limits, WriteFlags, ZeroFlags};
use crate::error::{IoError, IoOp};
use crate::runtime::yield_now;

/// One thing that was done.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Write {
        offset: usize,
        bytes: Vec<u8>,
    },
    Resize(usize),
    /// What was done before the event of this number is durable.
    Flush {
        covers: usize,
    },
}

impl Event {
    pub(super) fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Write { offset, bytes } => {
                let end = offset + bytes.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*offset..end].copy_from_slice(bytes);
            }
            Self::Resize(len) => content.resize(*len, 0),
            Self::Flush { .. } => {}
        }
    }
}

#[derive(Default)]
struct State {
    content: Vec<u8>,
    events: Vec<Event>,
    seed: u64,
    fail_writes_after: Option<usize>,
}

/// Clones share the storage.
#[derive(Clone, Default)]
pub(super) struct Recorder {
    state: Arc<Mutex<State>>,
}

impl Recorder {
    pub(super) fn new(content: Vec<u8>, seed: u64) -> Self {
        let recorder = Self::default();
        *recorder.state() = State {
            content,
            seed,
            ..State::default()
        };
        recorder
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn driver(&self) -> Box<dyn BlockDriver> {
        Box::new(self.clone())
    }

    /// Number of events so far.
    pub(super) fn position(&self) -> usize {
        self.state().events.len()
    }

    pub(super) fn events(&self) -> Vec<Event> {
        self.state().events.clone()
    }

    pub(super) fn content(&self) -> Vec<u8> {
        self.state().content.clone()
    }

    /// All writes fail after so many events more.
    pub(super) fn fail_writes_after(&self, events: usize) {
        let mut state = self.state();
        state.fail_writes_after = Some(state.events.len() + events);
    }

    /// Writes fail no more.
    pub(super) fn heal(&self) {
        self.state().fail_writes_after = None;
    }

    fn random(&self) -> u64 {
        let mut state = self.state();
        state.seed = state
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state.seed >> 33
    }

    /// Lets others come first, now and then.
    async fn pause(&self) {
        for _ in 0..self.random() % 6 {
            yield_now().await;
        }
    }

    fn record(&self, event: Event) -> Result<(), IoError> {
        let mut guard = self.state();
        let state = &mut *guard;
        let failing = |after: usize| state.events.len() >= after;
        if matches!(event, Event::Write { .. }) && state.fail_writes_after.is_some_and(failing) {
            return Err(IoError {
                op: IoOp::Write,
                node: "recorder".into(),
                offset: 0,
                len: 0,
                errno: libc::EIO,
            });
        }
        event.apply(&mut state.content);
        state.events.push(event);
        Ok(())
    }
}

impl BlockDriver for Recorder {
    fn name(&self) -> &'static str {
        "recorder"
    }
    fn size(&self) -> u64 {
        self.state().content.len() as u64
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn filename(&self) -> String {
        String::new()
    }
    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.pause().await;
            let bytes = {
                let state = self.state();
                let mut bytes = state.content.get(offset as usize..).unwrap_or(&[]).to_vec();
                bytes.resize(iov.len(), 0);
                bytes
            };
            iov.copy_from(0, &bytes);
            self.pause().await;
            Ok(())
        })
    }
    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        _: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.pause().await;
            let mut bytes = vec![0; iov.len()];
            iov.copy_to(0, &mut bytes);
            let offset = offset as usize;
            self.record(Event::Write { offset, bytes })?;
            self.pause().await;
            Ok(())
        })
    }
    fn write_zeroes<'a>(
        &'a self,
        _: u64,
        _: u64,
        _: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            Err(IoError {
                op: IoOp::WriteZeroes,
                node: "recorder".into(),
                offset: 0,
                len: 0,
                errno: libc::EOPNOTSUPP,
            })
        })
    }
    /// What is discarded is overwritten, so that a loss is seen.
    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.pause().await;
            let bytes = vec![0xdd; len as usize];
            let offset = offset as usize;
            self.record(Event::Write { offset, bytes })
        })
    }
    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let covers = self.position();
            self.pause().await;
            self.record(Event::Flush { covers })
        })
    }
    fn block_status<'a>(&'a self, _: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        let flags = ExtentFlags {
            data: true,
            zero: false,
            allocated: true,
        };
        Box::pin(async move { Ok(Extent { len, flags }) })
    }
    fn resize<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.record(Event::Resize(size as usize)) })
    }
}
