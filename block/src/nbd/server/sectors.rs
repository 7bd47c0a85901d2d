//! Writes of parts of sectors: the rest of the sector is read and written back, so
//! nobody else may write it in between.
//!
//! NBD clients may send such requests, and hardly any does. So ordinary writes only
//! count themselves, and a write of parts waits until there is none.

use std::future::poll_fn;
use std::task::Poll;

use futures_util::lock::{Mutex, MutexGuard};

use crate::gate::{Gate, ShardIndex};

/// Orders the writes of one export. Other users of its node are not held: who
/// writes the same sector through two of them at once must expect either content.
pub(super) struct SectorGate {
    gate: Gate,
    /// One write of parts at a time.
    turn: Mutex<()>,
}

impl Default for SectorGate {
    fn default() -> Self {
        Self {
            gate: Gate::new(true),
            turn: Mutex::new(()),
        }
    }
}

/// A write of whole sectors, until this is dropped.
pub(super) struct WholeSectors<'a> {
    gate: &'a Gate,
    shard: ShardIndex,
}

impl Drop for WholeSectors<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.shard);
    }
}

/// A write of parts of sectors, alone until this is dropped.
pub(super) struct PartsOfSectors<'a> {
    gate: &'a Gate,
    _turn: MutexGuard<'a, ()>,
}

impl Drop for PartsOfSectors<'_> {
    fn drop(&mut self) {
        self.gate.forget_drainer(0);
        self.gate.open();
    }
}

impl SectorGate {
    /// Waits for writes of parts to end. Cancel: nothing happens.
    pub(super) async fn whole(&self) -> WholeSectors<'_> {
        WholeSectors {
            shard: self.gate.enter().await,
            gate: &self.gate,
        }
    }

    /// Waits for all writes to end, and holds those that come. Cancel: they go on.
    pub(super) async fn parts(&self) -> PartsOfSectors<'_> {
        let turn = self.turn.lock().await;
        self.gate.close();
        let alone = PartsOfSectors {
            gate: &self.gate,
            _turn: turn,
        };
        poll_fn(|cx| match self.gate.poll_idle(0, cx.waker()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
        alone
    }
}
