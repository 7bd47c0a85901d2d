//! Telling of the first write past an offset: an image that grows is near the end of
//! its storage.

use std::sync::Arc;

use super::Node;

/// An offset past which somebody wants to hear of a write.
pub(super) struct WriteThreshold {
    offset: u64,
    tell: Box<dyn Fn(u64) + Send + Sync>,
}

impl Node {
    /// `tell` is called once, by the first write, write of zeroes or discard that is not
    /// ignored from now on that ends past `offset`, with the number of bytes by which it does: on its thread,
    /// before it is carried out. It must not block. 0 asks for nothing. What was
    /// asked for before is forgotten. Any thread.
    pub fn set_write_threshold(&self, offset: u64, tell: impl Fn(u64) + Send + Sync + 'static) {
        let threshold = (offset > 0).then(|| {
            Arc::new(WriteThreshold {
                offset,
                tell: Box::new(tell),
            })
        });
        self.write_threshold.store(threshold);
    }

    /// The offset that a write has to go past to be told of; 0 if none.
    pub fn write_threshold(&self) -> u64 {
        let threshold = self.write_threshold.load();
        threshold.as_ref().map_or(0, |threshold| threshold.offset)
    }

    pub(super) fn check_write_threshold(&self, end: u64) {
        let set = self.write_threshold.load();
        let Some(threshold) = set.as_ref().filter(|threshold| end > threshold.offset) else {
            return;
        };
        let none = None::<Arc<WriteThreshold>>;
        let before = self.write_threshold.compare_and_swap(&*set, none);
        // Of several such writes, the one that took it out tells.
        if before
            .as_ref()
            .is_some_and(|before| Arc::ptr_eq(before, threshold))
        {
            (threshold.tell)(end - threshold.offset);
        }
    }
}
