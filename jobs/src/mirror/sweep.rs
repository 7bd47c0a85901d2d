//! Copies everything that is dirty, as fast as it can: for a drained section,
//! in which the guest waits.

use std::ops::ControlFlow;
use std::rc::Rc;

use futures_util::stream::{FuturesUnordered, StreamExt};

use super::copy::{Copied, Copier, CopyError};
use super::state::MirrorState;

/// Operations side by side.
const OPERATIONS: usize = 8;

/// How a sweep ended.
#[derive(Debug)]
pub(crate) enum Swept {
    /// Nothing is dirty that was when it began.
    Clean,
    /// `watch` stopped it, or a node is being drained by somebody else.
    Stopped,
    /// An operation failed. Its range is dirty again.
    Failed(CopyError),
}

/// Copies what is dirty in pieces of a buffer, until nothing is, an operation
/// fails, or `watch` (asked after each operation) breaks. Ends when nothing is in
/// flight.
pub(crate) async fn sweep(
    copier: &Rc<Copier>,
    state: &MirrorState,
    mut watch: impl FnMut(&Copied) -> ControlFlow<()>,
) -> Swept {
    let request = copier.pool().buffer_size() as u64;
    let mut operations = FuturesUnordered::new();
    let mut ended = None;
    let mut cursor = 0;
    loop {
        while ended.is_none() && operations.len() < OPERATIONS {
            let dirty = state
                .dirty
                .next_dirty_area(cursor, request)
                .or_else(|| state.dirty.next_dirty_area(0, request));
            let Some(range) = dirty else { break };
            let Some(nodes) = copier.enter() else {
                ended = Some(Swept::Stopped);
                break;
            };
            cursor = range.end;
            let look = copier.look_at_written(&range, request);
            operations.push(copier.copy(range, look, nodes));
        }
        match operations.next().await {
            None => return ended.unwrap_or(Swept::Clean),
            Some(Ok(copied)) => {
                if watch(&copied).is_break() {
                    ended.get_or_insert(Swept::Stopped);
                }
            }
            Some(Err(error)) => {
                if !matches!(ended, Some(Swept::Failed(_))) {
                    ended = Some(Swept::Failed(error));
                }
            }
        }
    }
}
