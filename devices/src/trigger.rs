//! Ties `vm-superio`'s interrupts to event descriptors.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// An event descriptor that `vm-superio` devices can signal.
pub(crate) struct EventTrigger(pub(crate) Arc<EventFd>);

impl vm_superio::Trigger for EventTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
